"""A run on object storage equals a local one bit by bit, also after interruptions, and makes few requests."""

from __future__ import annotations

import collections
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import pytest

import ndreamer_dist as nd
from ndreamer_dist import keys
from ndreamer_dist.cohort import source, stored
from ndreamer_dist.errors import CohortError, RunError, StoreError
from ndreamer_dist.rundir import lock
from ndreamer_dist.rundir.directory import RunDirectory
from ndreamer_dist.storage.files import open_storage
from tests.security.looked_at import assert_no_secret
from tests.servers import S3_ENVIRONMENT, Plain, Ranges, s3, serving
from tests.tiny import NAMES, SETTINGS, as_memory, assert_same_bits, run_words, tiny_cohort

s3fs = pytest.importorskip("s3fs")
JOB = SETTINGS | {"train.epochs": 4}
AROUND = "around"
MOST_REQUESTS = {
    AROUND: (10, 95), keys.STAGE_COHORT: (12, 100), keys.STAGE_PACK: (17, 180), keys.STAGE_CLUSTERS: (20, 140),
    keys.STAGE_TRAIN: (50, 205), keys.STAGE_EMBED: (10, 110), keys.STAGE_PCA: (8, 105), keys.STAGE_MATCH: (14, 260),
    keys.STAGE_EFFECTS: (32, 850),
}  # fmt: skip
"""Listings, and requests in all, of each stage and around them (start, locks, logs), for 900 cells in 4 blocks and 6
groups: about a third above what was counted."""
MOST_FOR_A_PLAN, MOST_FOR_NOTHING = 55, 300
"""Requests of a plan, and of a run that finds all done, its lock among them."""


@pytest.fixture(scope="module")
def cohort(tiny: Path) -> Path:
    return tiny


@pytest.fixture(scope="module")
def h5ad(cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same cohort as an h5ad file of many blocks, beside the zarr store."""
    path = tmp_path_factory.mktemp("served") / "cohort.h5ad"
    shutil.copytree(cohort, path.with_suffix(".zarr"))
    as_memory(cohort).write_h5ad(path)
    return path


@pytest.fixture
def blocks_of(monkeypatch: pytest.MonkeyPatch) -> int:
    """Block size of remote h5ad files: so small that this file is read by ranges."""
    monkeypatch.setattr(stored, "REMOTE_BLOCK", 2**16)
    monkeypatch.setattr(stored, "REMOTE_BLOCKS", 4)
    return 2**16


@pytest.fixture(scope="module")
def local(cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on a local disk."""
    out = tmp_path_factory.mktemp("local") / "run"
    nd.run(cohort, out=out, preset="small", settings=JOB, **NAMES)
    return out


@pytest.fixture(scope="module")
def server(cohort: Path) -> Iterator[SimpleNamespace]:
    """An S3 server with the cohort; only the environment holds its address and credentials."""
    with s3() as serving, pytest.MonkeyPatch.context() as patch:
        for name, value in (S3_ENVIRONMENT | {"AWS_ENDPOINT_URL": serving.url}).items():
            patch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        files = s3fs.S3FileSystem()
        files.mkdir("bucket")
        files.put(str(cohort), "bucket/cohort.zarr", recursive=True)
        yield serving
        s3fs.S3FileSystem.clear_instance_cache()


def fetched(url: str, folder: Path) -> Path:
    """Copy a run from S3 to a folder."""
    fsspec.filesystem("s3").get(url.removeprefix("s3://"), str(folder), recursive=True)
    return folder


def counted(asked: list[tuple[float, str, str, str]], run: str) -> dict[str, tuple[int, int]]:
    """Return the numbers of listings and of all requests of every stage of a run, and of those outside stages."""
    lines = map(json.loads, open_storage(run).read(keys.STAGES_LOG).splitlines()[: len(keys.STAGES)])
    spans = {line["stage"]: (line["started"], line["started"] + line["seconds"]) for line in lines}
    listed, found = collections.Counter(), collections.Counter()
    for at, _, _, query in asked:
        stage = next((stage for stage, (start, stop) in spans.items() if start <= at <= stop), AROUND)
        found[stage] += 1
        listed[stage] += "list-type" in query
    return {stage: (listed[stage], found[stage]) for stage in found}


@pytest.fixture(scope="module")
def remote_and_asked(server: SimpleNamespace) -> tuple[str, dict[str, tuple[int, int]]]:
    """A finished run on S3 of the cohort on S3, and its numbers of requests."""
    before = len(server.asked)
    nd.run("s3://bucket/cohort.zarr", out="s3://bucket/run", preset="small", settings=JOB, **NAMES)
    return "s3://bucket/run", counted(server.asked[before:], "s3://bucket/run")


@pytest.fixture(scope="module")
def remote(remote_and_asked: tuple[str, Any]) -> str:
    """A finished run on S3."""
    return remote_and_asked[0]


def test_the_whole_job_on_s3_gives_the_bits_of_a_local_one(local: Path, remote: str, tmp_path: Path) -> None:
    run = fetched(remote, tmp_path / "run")
    assert_same_bits(local, run)
    for name in (keys.MODEL_WEIGHTS, keys.MODEL_JSON, keys.DROPPED):
        assert (run / name).read_bytes() == (local / name).read_bytes()
    assert (
        json.loads((run / keys.RUN_JSON).read_text())["input"]
        == json.loads((local / keys.RUN_JSON).read_text())["input"]
    )
    assert list((run / keys.TRAIN_SERIAL).iterdir())
    assert not (run / keys.LOCK).exists()
    assert_no_secret([S3_ENVIRONMENT["AWS_SECRET_ACCESS_KEY"]], run)
    assert nd.open_results(remote).ite(cells="cell_type == 'type_1'").n_obs > 0


def test_every_stage_asks_and_lists_seldom(remote_and_asked: tuple[str, dict[str, tuple[int, int]]]) -> None:
    found = remote_and_asked[1]
    assert found.keys() == MOST_REQUESTS.keys()
    assert {
        stage: numbers
        for stage, numbers in found.items()
        if any(number > most for number, most in zip(numbers, MOST_REQUESTS[stage], strict=True))
    } == {}


@pytest.mark.slow
def test_requests_grow_with_shards_and_not_with_cells(
    server: SimpleNamespace, remote_and_asked: tuple[str, dict[str, tuple[int, int]]], tmp_path: Path
) -> None:
    twice = tiny_cohort(tmp_path, cells=1800)
    files = {str(path.relative_to(twice)): path.read_bytes() for path in twice.rglob("*") if path.is_file()}
    for name, data in files.items():
        open_storage("s3://bucket/twice.zarr").write_atomic(name, data)
    larger = {"pack.block_rows": 512, "embed.tile_rows": 256, "train.batch_size": 128}  # equal numbers of shards, steps
    before = len(server.asked)
    nd.run("s3://bucket/twice.zarr", out="s3://bucket/twice", preset="small", settings=JOB | larger, **NAMES)
    asked = counted(server.asked[before:], "s3://bucket/twice")
    # The fingerprint samples a bounded number of places of the input, however long it is.
    samples = asked.pop(AROUND)[1] - remote_and_asked[1][AROUND][1]
    assert 0 < samples <= 3 * source.SAMPLES
    for stage, numbers in asked.items():
        for now, once in zip(numbers, remote_and_asked[1][stage], strict=True):
            assert now <= once + 8, stage  # progress and the lock are written by the clock


def test_a_finished_run_on_s3_does_nothing_and_says_so_in_few_requests(server: SimpleNamespace, remote: str) -> None:
    before, asked = open_storage(remote).list(), len(server.asked)
    nd.plan("s3://bucket/cohort.zarr", preset="small", settings=JOB, **NAMES)
    assert len(server.asked) - asked <= MOST_FOR_A_PLAN
    asked = len(server.asked)
    nd.run("s3://bucket/cohort.zarr", out=remote, preset="small", settings=JOB, **NAMES)
    assert len(server.asked) - asked <= MOST_FOR_NOTHING
    written = {path for _, method, path, _ in server.asked[asked:] if method == "PUT"}
    names = {path.partition("/run/")[2] for path in written}
    assert {name for name in names if not name.startswith(f"{keys.LOCK_ANNOUNCED}/")} == {
        keys.LOCK, keys.RUN_JSON, keys.STAGES_LOG,
    }  # fmt: skip
    assert open_storage(remote).list().keys() == before.keys()


@pytest.mark.slow
def test_a_job_killed_on_s3_never_looks_finished_and_goes_on(
    server: SimpleNamespace, cohort: Path, local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = run_words(cohort, "s3://bucket/killed", JOB)  # type: ignore[arg-type]
    with subprocess.Popen([sys.executable, "-m", "ndreamer_dist.cli", *words], stderr=subprocess.PIPE) as job:
        assert job.stderr is not None
        while not any(method == "PUT" and "/killed/results.zarr/layers" in path for _, method, path, _ in server.asked):
            assert job.poll() is None, job.stderr.read().decode()
            time.sleep(0.005)
        job.send_signal(signal.SIGKILL)
    with pytest.raises(StoreError, match="has not finished"):
        nd.open_results("s3://bucket/killed")
    done = open_storage("s3://bucket/killed").list(keys.DONE)
    # The lease of the killed job is taken over at once, since its process was on this machine.
    nd.run(cohort, out="s3://bucket/killed", preset="small", settings=JOB, **NAMES)
    run = fetched("s3://bucket/killed", tmp_path / "run")
    assert_same_bits(local, run)
    assert set(done) <= set(open_storage("s3://bucket/killed").list(keys.DONE))


UPLOAD = """
import sys
from ndreamer_dist.storage.files import open_storage
print("begun", flush=True)
open_storage("s3://bucket").write_atomic("large", bytes(200 * 2**20))
"""


def test_an_interrupted_upload_is_not_there(server: SimpleNamespace) -> None:
    with subprocess.Popen([sys.executable, "-c", UPLOAD], stdout=subprocess.PIPE) as writer:
        while not any("partNumber" in query for *_, query in server.asked):
            assert writer.poll() is None
            time.sleep(0.005)
        writer.send_signal(signal.SIGKILL)
    storage = open_storage("s3://bucket")
    assert not storage.exists("large")
    assert "large" not in storage.list()


def test_the_lock_of_a_living_run_holds_on_s3(server: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDirectory.at("s3://bucket/locked")
    with run.locked(), pytest.raises(RunError, match="is being worked on"), run.locked():
        pass
    run.write_json(keys.LOCK, lock._holder() | {"pid": os.getpid()})
    with pytest.raises(RunError, match="is being worked on"), run.locked():
        pass
    monkeypatch.setattr(lock, "LEASE_SECONDS", 2.0)
    for other in ({"host": "elsewhere", "pid": 0}, {"space": "elsewhere", "pid": 0}):
        holder = lock._holder() | other
        run.write_json(keys.LOCK, holder)
        renewal = threading.Timer(0.3, run.write_json, (keys.LOCK, holder | {"time": time.time() + 0.3}))
        renewal.start()
        with pytest.raises(RunError, match="is being worked on"), run.locked():
            pass
        renewal.join()
    with subprocess.Popen(["true"]) as gone:
        gone.wait()
    run.write_json(keys.LOCK, lock._holder() | {"pid": gone.pid})
    with run.locked():
        pass


@pytest.mark.slow
def test_a_server_that_fails_is_named_and_the_next_run_repairs_it(
    server: SimpleNamespace, cohort: Path, local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = "s3://bucket/failing"

    def answer(method: str, path: str) -> str | None:
        return "500 Internal Server Error" if method == "PUT" and "/failing/embedding.zarr" in path else None

    monkeypatch.setattr(server, "answer", answer)
    with pytest.raises((OSError, nd.NDreamerError), match=r"(?i)internal|500|embedding"):
        nd.run(cohort, out=out, preset="small", settings=JOB, **NAMES)
    monkeypatch.undo()
    nd.run(cohort, out=out, preset="small", settings=JOB, **NAMES)
    assert_same_bits(local, fetched(out, tmp_path / "run"))


# --- cohorts behind servers ------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cohort.zarr", "cohort.h5ad"])
def test_a_cohort_behind_a_web_server_gives_the_bits_of_a_local_one(
    name: str, h5ad: Path, local: Path, blocks_of: int, tmp_path: Path
) -> None:
    with serving(Ranges, h5ad.parent) as web:
        planned = nd.plan(f"{web.url}/{name}", preset="small", settings=JOB, **NAMES)
        for_the_plan = web.sent
        nd.run(f"{web.url}/{name}", out=tmp_path / "run", preset="small", settings=JOB, **NAMES)
        for_the_run = web.sent - for_the_plan
    assert planned == nd.plan(h5ad.parent / name, preset="small", settings=JOB, **NAMES)
    assert 0 < for_the_plan < for_the_run / 2  # the plan reads a sample, here all cells; the run reads them twice more
    assert_same_bits(local, tmp_path / "run")


def test_an_h5ad_file_on_s3_gives_the_bits_of_a_local_cohort(
    server: SimpleNamespace, h5ad: Path, local: Path, blocks_of: int, tmp_path: Path
) -> None:
    open_storage("s3://bucket").write_atomic("cohort.h5ad", h5ad.read_bytes())
    nd.run("s3://bucket/cohort.h5ad", out=tmp_path / "run", preset="small", settings=JOB, **NAMES)
    assert_same_bits(local, tmp_path / "run")


def test_a_file_behind_a_server_without_ranges_is_refused_in_one_line(h5ad: Path, blocks_of: int) -> None:
    with serving(Plain, h5ad.parent) as web, pytest.raises(StoreError) as refused:
        nd.plan(f"{web.url}/cohort.h5ad", preset="small", settings=JOB, **NAMES)
    assert str(refused.value) == (
        f"{web.url}/cohort.h5ad cannot be read by ranges (the server does not support range requests); download it first"
    )


def test_a_store_behind_a_web_server_that_lacks_a_chunk_is_refused(cohort: Path, tmp_path: Path) -> None:
    shutil.copytree(cohort, tmp_path / "cut.zarr")
    next((tmp_path / "cut.zarr/X/indices/c").iterdir()).unlink()
    with serving(Plain, tmp_path) as web, pytest.raises(CohortError, match=r"1 of 1 chunks of X/indices are missing"):
        nd.plan(f"{web.url}/cut.zarr", preset="small", settings=JOB, **NAMES)
