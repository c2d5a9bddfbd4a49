"""A running job can be watched through its log, through `info` of another process, and through Prometheus."""

from __future__ import annotations

import io
import json
import logging
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ndreamer_dist import cli, keys
from ndreamer_dist.commands.info import describe
from ndreamer_dist.compute import events, monitors
from ndreamer_dist.compute.events import PROMETHEUS_METRICS, Lines, choose_format
from ndreamer_dist.compute.executor import choose_runtime
from ndreamer_dist.compute.monitors import metered
from ndreamer_dist.rundir.directory import RunDirectory, Shard
from ndreamer_dist.settings import RunSettings, Settings
from tests.servers import S3_ENVIRONMENT, s3
from tests.tiny import SETTINGS, run_words, tiny_cohort


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    """The log of the command line, as `cli.run_program` sets it up in a fresh process."""
    stream, handler, root = io.StringIO(), logging.StreamHandler(), logging.getLogger()
    handler.setStream(stream)
    handler.setFormatter(Lines())
    root.addHandler(handler)
    monkeypatch.setattr(logging.getLogger("ndreamer_dist"), "level", logging.INFO)
    yield stream
    root.removeHandler(handler)


def test_a_log_is_json_on_request(log: io.StringIO) -> None:
    logger = logging.getLogger("ndreamer_dist.test")
    logger.info('a "name"\nof two lines')
    choose_format("json")
    logger.warning('a "name"\nof two lines')
    try:
        raise ValueError("broken")
    except ValueError:
        logger.exception("it is")
    text, *lines = log.getvalue().splitlines()
    assert text == 'a "name" of two lines'
    first, second = (json.loads(line) for line in lines)
    assert (first["message"], first["level"], first["logger"]) == ('a "name"\nof two lines', "WARNING", logger.name)
    assert abs(time.time() - time.mktime(time.strptime(first["time"], "%Y-%m-%dT%H:%M:%SZ"))) < 86_400
    assert "ValueError: broken" in second["trace"]


def test_a_refusal_is_a_line_of_json_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    words = [
        "run",
        "{}/no.h5ad",
        "--out",
        "{}/run",
        "--condition-key",
        "c",
        "--control",
        "d",
        "--set",
        "run.log_format=json",
    ]
    with pytest.raises(SystemExit) as ended:
        cli.main([word.format(tmp_path) for word in words])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert json.loads(line)["message"] == f"{tmp_path}/no.h5ad does not exist"
    assert json.loads(line)["level"] == "ERROR"


def slow(item: int) -> int:
    time.sleep(0.2)
    return item


def begun(run: RunDirectory) -> None:
    run.write_json(keys.RUN_JSON, {"settings": Settings().model_dump(mode="json")})
    for shard in ("00000", "00001"):
        run.mark("cohort", "key", Shard(shard, ()))


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.slow)])
def directory(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[RunDirectory]:
    """A run directory, local or on S3."""
    if request.param == "local":
        yield RunDirectory.at(tmp_path / "run")
        return
    import s3fs

    with s3() as server:
        for name, value in (S3_ENVIRONMENT | {"AWS_ENDPOINT_URL": server.url}).items():
            monkeypatch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        s3fs.S3FileSystem().mkdir("bucket")
        yield RunDirectory.at("s3://bucket/run")


def test_info_says_how_far_a_run_under_way_is(
    directory: RunDirectory, monkeypatch: pytest.MonkeyPatch, log: io.StringIO
) -> None:
    monkeypatch.setattr(monitors, "LOCAL_SECONDS", 0.1)
    monkeypatch.setattr(monitors, "REMOTE_SECONDS", 0.1)
    monkeypatch.setattr(monitors, "INTERVAL_SECONDS", 0.05)
    monkeypatch.setattr(monitors, "LOG_SECONDS", 0.3)
    begun(directory)
    runtime = choose_runtime(RunSettings(serial=True, progress=False))
    with metered(directory.storage, "pack", cells=1000):
        directory.pending("pack", "key", [Shard(str(i), ("x",)) for i in range(10)])
        done = runtime.map(slow, range(10), title="pack")
        for _ in range(6):
            next(done)
        time.sleep(0.3)
        told = describe(directory.url)
    assert told.startswith(f"{directory.url}: under way")
    assert re.search(r"cohort +2\n", told)
    assert re.search(r"pack, on \S+, [01] s ago, after [1-4] s", told)
    assert "5 of 10 pack (50%)" in told
    (speed,) = re.findall(r"([\d,]+) cells/s", told)
    assert 100 < float(speed.replace(",", "")) < 500
    assert re.search(r"memory 0\.\d GB, at most 0\.\d GB", told) or re.search(r"memory [1-9]\.\d GB", told)
    assert re.search(r"pack: \d of 10 tasks, [\d,]+ cells/s, \d+\.\d GB", log.getvalue())


@pytest.mark.slow
def test_info_from_another_process_follows_a_job_from_stage_to_stage(directory: RunDirectory, tmp_path: Path) -> None:
    cohort = tiny_cohort(tmp_path / "elsewhere")
    words = run_words(cohort, directory.url, SETTINGS)  # type: ignore[arg-type]
    seen: dict[str, str] = {}
    with subprocess.Popen([sys.executable, "-m", "ndreamer_dist.cli", *words], stderr=subprocess.PIPE) as job:
        while job.poll() is None:
            if directory.storage.exists(keys.RUN_JSON):
                told = describe(directory.url)
                if found := re.search(r"^(\w+), on \S+, \d+ s ago", told, re.MULTILINE):
                    seen[found[1]] = told
            time.sleep(0.02)
        assert job.stderr is not None
        assert job.returncode == 0, job.stderr.read().decode()
    stages = list(seen)
    assert stages == sorted(stages, key=keys.STAGES.index)
    assert len(stages) >= 4
    training = seen[keys.STAGE_TRAIN]
    assert "under way" in training
    assert re.search(r"\n  \d+ of \d+ steps \(\d+%\), [\d,]+ cells/s\n", training)
    assert re.search(r"memory [\d.]+ GB", training)
    assert re.search(rf"{keys.STAGE_PACK} +[1-9]\n", training)
    assert re.search(rf"{keys.STAGE_MATCH} +0\n", training)
    assert ": 900 cells x 150 genes" in describe(directory.url)


def test_info_tells_a_stopped_run_and_its_last_loss(tmp_path: Path) -> None:
    run = RunDirectory.at(tmp_path)
    begun(run)
    with metered(run.storage, "train", cells=1000):
        from ndreamer_dist.compute.events import stage_now

        stage = stage_now()
        assert stage is not None
        stage.note_step(120, 400, {"total": 12.345, "cells_per_second": 4321.0, "seconds": 0.5})
    told = json.loads((tmp_path / keys.PROGRESS).read_text())
    run.write_json(keys.PROGRESS, told | {"seen": told["seen"] - 3600})
    text = describe(str(tmp_path))
    assert "not finished; the same `run` command goes on" in text
    assert "train, on" in text
    assert "120 of 400 steps (30%), 4,321 cells/s" in text
    assert "loss 12.35" in text
    assert "3,600 s ago" in text or "3,601 s ago" in text


def test_a_stage_that_finds_nothing_to_do_writes_nothing(tmp_path: Path) -> None:
    with metered(RunDirectory.at(tmp_path).storage, "pack", cells=1000):
        time.sleep(0.6)
    assert not (tmp_path / keys.PROGRESS).exists()


def test_a_resumed_stage_counts_only_the_cells_that_it_does(tmp_path: Path) -> None:
    run, runtime = RunDirectory.at(tmp_path), choose_runtime(RunSettings(serial=True, progress=False))
    shards = [Shard(str(i), ()) for i in range(10)]
    for shard in shards[:8]:
        run.mark("pack", "key", shard)
    with metered(run.storage, "pack", cells=1000):
        todo = run.pending("pack", "key", shards)
        list(runtime.map(slow, todo, title="pack"))
        from ndreamer_dist.compute.events import stage_now

        stage = stage_now()
        assert stage is not None
        assert stage.new_cells == 200


def scraped() -> str:
    """Return the metrics that Prometheus scrapes from the nodes of the connected Ray."""
    import ray

    ports = [(node["NodeManagerAddress"], node["MetricsExportPort"]) for node in ray.nodes() if node["Alive"]]
    texts = []
    for host, port in ports:
        with urllib.request.urlopen(f"http://{host}:{port}/metrics", timeout=10) as answer:
            texts.append(answer.read().decode())
    return "\n".join(texts)


def samples(text: str, name: str) -> dict[str, float]:
    """Return the labels and values of a metric's samples of the run; runs of other tests are on the same Ray."""
    found = re.findall(rf"^(?:ray_)?{name}(?:_total)?{{([^}}]*)}} (\S+)$", text, re.MULTILINE)
    return {labels: float(value) for labels, value in found if f'run="{WATCHED}"' in labels}


def hungry(item: int) -> int:
    return int(np.ones(HUNGER // 8)[item])


def marked(item: int, run: RunDirectory) -> int:
    run.storage.write_atomic(f"store/{item}", b"x" * 1000)
    run.mark("pack", "key", Shard(str(item), (f"store/{item}",)))
    return item


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(120)
def test_prometheus_finds_cells_bytes_steps_and_losses(
    local_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(monitors, "LOCAL_SECONDS", 0.1)
    run, runtime = RunDirectory.at(tmp_path / WATCHED), choose_runtime(RunSettings(progress=False))
    with metered(run.storage, "cohort", cells=1000):
        assert list(runtime.map(hungry, range(4), title="cohort")) == [1] * 4
    with metered(run.storage, "pack", cells=1000):
        assert len(list(runtime.map(marked, range(20), run, title="pack"))) == 20
    with metered(run.storage, "train", cells=1000):
        from ndreamer_dist.compute.events import stage_now

        stage = stage_now()
        assert stage is not None
        stage.note_step(30, 40, {"total": 9.5, "kl": 0.25, "seconds": 0.5, "cells_per_second": 2048.0, "waiting": 0.1})
    deadline = time.monotonic() + 60
    while True:
        text = scraped()
        found = {name: samples(text, f"ndreamer_{name}") for name in WANTED}
        if all(found.values()) and sum(found["bytes_written"].values()) == 20_000:
            break
        assert time.monotonic() < deadline, found
        time.sleep(0.5)
    assert sum(found["cells_done"].values()) == 2000
    assert next(v for labels, v in found["stage_progress"].items() if 'stage="train"' in labels) == 0.75
    assert list(found["step_seconds"].values()) == [0.5]
    losses = {re.search('term="(\\w+)"', labels)[1]: value for labels, value in found["loss"].items()}
    assert losses == {"total": 9.5, "kl": 0.25}
    assert min(found["memory_bytes"].values()) > 1e8
    peaks = {re.search('stage="(\\w+)"', labels)[1]: value for labels, value in found["worker_peak_bytes"].items()}
    logged = [json.loads(line) for line in (tmp_path / WATCHED / keys.STAGES_LOG).read_text().splitlines()]
    assert peaks == {line["stage"]: line["worker_peak_bytes"] for line in logged if "worker_peak_bytes" in line}
    assert peaks["cohort"] > HUNGER
    assert peaks["pack"] < peaks["cohort"] - HUNGER / 2  # reset per stage, even if the worker process is the same


HUNGER = 600_000_000
WATCHED = "watched_run"
WANTED = [metric.name.removeprefix("ndreamer_") for metric in PROMETHEUS_METRICS.values()]


def test_the_page_on_watching_names_the_metrics_that_there_are() -> None:
    page = (Path(__file__).parents[2] / "docs/how-to/watch.md").read_text()
    for metric in PROMETHEUS_METRICS.values():
        name = f"ray_{metric.name}" + "_total" * (metric.kind == "Counter")
        labels = ", ".join(f"`{label}`" for label in metric.labels)
        assert f"| `{name}` | {metric.kind.lower()} | {labels} | {metric.description} |\n" in page
    assert len(set(re.findall(r"ray_ndreamer_\w+", page))) == len(PROMETHEUS_METRICS)


@pytest.mark.ray
def test_tasks_have_the_names_of_what_they_do(local_ray: None) -> None:
    runtime = choose_runtime(RunSettings(progress=False))
    assert list(runtime.map(task_name, [0], title="effects: genes 0 to 10")) == ["effects: genes 0 to 10"]
    from ndreamer_dist.compute.executor import fetch

    assert fetch(runtime.submit(task_name, 0)[0]) == "task_name"


def task_name(_: int) -> str:
    import ray

    return ray.get_runtime_context().get_task_name()


# --- the time left -----------------------------------------------------------------------------------------


def test_the_time_left_is_that_of_the_speed_so_far(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "time", lambda: now)
    stage = events.StageProgress("clusters", cells=1000)
    stage.begin("clusters", 10)
    assert stage.seconds_left is None
    assert "seconds_left" not in stage.as_facts()
    stage.advance()
    stage.advance()
    now = 110.0
    assert stage.seconds_left == pytest.approx(40.0)
    training = events.StageProgress("train")
    training.note_step(50, 100, {})  # resumed from a checkpoint, so earlier steps took no time of this call
    now = 130.0
    training.note_step(60, 100, {})
    assert training.seconds_left == pytest.approx(80.0)
    assert training.as_facts()["seconds_left"] == 80.0


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (75, "75 s"), (120, "2.0 min"), (1500, "25 min"), (7200, "2.0 h"), (200_000, "2.3 d")],
)
def test_durations_come_in_the_unit_that_suits_them(seconds: float, text: str) -> None:
    assert events.duration(seconds) == text


def test_a_bar_says_which_stage_of_how_many_it_is_of() -> None:
    assert events.titled("check") == "check"
    with events.staged("pack", 10, place="2/8"):
        assert events.titled("pack") == "2/8 pack"
