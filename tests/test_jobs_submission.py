"""Jobs as a cluster takes them: job files, single stages, and the real thing on a Ray whose door is locked."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import runpy
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import pandas as pd
import pytest
import s3fs
import yaml
from click.testing import CliRunner
from ray.dashboard.modules.job import cli as ray_cli

import ndreamer_dist as nd
from ndreamer_dist import keys
from ndreamer_dist.rundir.directory import RunDirectory
from ndreamer_dist.storage.files import open_storage
from ndreamer_dist.training.trainer import SNAPSHOT
from tests.results.brute_force import check
from tests.security.looked_at import assert_no_secret, contents
from tests.servers import S3_ENVIRONMENT, s3
from tests.tiny import NAMES, PROMPT, SETTINGS, assert_same_bits, run_words

ROOT = Path(__file__).parent.parent
JOBS = ROOT / "jobs"
JOB = SETTINGS | {"train.epochs": 30}


@pytest.fixture(scope="module")
def cohort(tiny: Path) -> Path:
    return tiny


def job_file(folder: Path, cohort: Path, out: Path | str, settings: dict[str, Any], **more: Any) -> Path:
    """Write a job file, with the settings by stage as people write them."""
    nested: dict[str, Any] = {}
    for name, value in settings.items():
        stage, _, field = name.partition(".")
        nested.setdefault(stage, {})[field] = value
    values = {"input": str(cohort), "out": str(out), **NAMES, "preset": "small", "settings": nested, **more}
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def spoken(
    job: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, stage: str | None = None
) -> tuple[int, str]:
    """Run a job, or a stage of it, in this process, as `python run_cohort.py JOB`; return its exit code and what it said."""
    script = JOBS / "run_cohort.py"
    monkeypatch.setattr(sys, "argv", [str(script), str(job), *(["--stage", stage] if stage else [])])
    monkeypatch.syspath_prepend(str(JOBS))
    try:
        runpy.run_path(str(script), run_name="__main__")
        code = 0
    except SystemExit as ended:
        code = int(ended.code or 0)
    said = capsys.readouterr()
    return code, (said.out if code == 0 else said.err).strip()


# --- in this process -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "run"
    nd.run(cohort, out=out, preset="small", settings=JOB, **NAMES)
    return out


@pytest.mark.slow
def test_stage_after_stage_gives_the_bits_of_the_whole_job(
    cohort: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    job = job_file(tmp_path, cohort, tmp_path / "run", JOB)
    for stage in keys.STAGES:
        later = set(keys.STAGES[keys.STAGES.index(stage) :])
        assert not {path.name for path in (tmp_path / "run" / keys.DONE).glob("*")} & later
        code, said = spoken(job, monkeypatch, capsys, stage)
        assert code == 0, said
        assert said == f"done: {stage}: {tmp_path / 'run'}"
    assert_same_bits(finished, tmp_path / "run")


@pytest.mark.parametrize("missing", keys.STAGES[:-1])
def test_a_stage_is_refused_and_nothing_deleted_where_an_earlier_one_is_not_finished(
    cohort: Path, finished: Path, tmp_path: Path, missing: str,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture,
) -> None:  # fmt: skip
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    shutil.rmtree(run / keys.DONE / missing)
    shutil.rmtree(run / keys.DONE / keys.STAGE_EFFECTS)
    before = RunDirectory.at(run).storage.list()
    job = job_file(tmp_path, cohort, run, JOB)
    code, said = spoken(job, monkeypatch, capsys, keys.STAGE_EFFECTS)
    assert code == 2
    assert said.splitlines()[-1] == (
        f"error: stage '{missing}' of {run} is not finished; run it before 'effects', or the whole job"
    )
    after = RunDirectory.at(run).storage.list()
    assert {name for name in before if not name.startswith(keys.LOGS)} <= set(after)
    assert not (run / keys.DONE / keys.STAGE_EFFECTS).exists()


def test_a_stage_that_there_is_not_is_refused(cohort: Path, tmp_path: Path) -> None:
    with pytest.raises(nd.NDreamerError, match=r"there is no stage 'trian'; there are cohort, .*'train'"):
        nd.run(cohort, out=tmp_path / "run", stage="trian", **NAMES)


GOOD = {"input": "/in.zarr", "out": "/out", "condition_key": "condition", "control": "control"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        pytest.param(None, "does not exist", id="no_file"),
        pytest.param("", "holds NoneType, expected keys and values", id="empty"),
        pytest.param("- input", "holds list, expected keys and values", id="a_list"),
        pytest.param("input: [", "cannot be read as plain YAML", id="not_yaml"),
        pytest.param("!!python/object/apply:os.system [touch ran]", "cannot be read as plain YAML", id="code"),
        pytest.param({**GOOD, "contrl": "x"}, "there is no key 'contrl'; .* Did you mean 'control'?", id="misspelled_key"),
        pytest.param({**GOOD, "fresh": True}, "there is no key 'fresh'", id="a_retry_would_start_over"),
        pytest.param({"input": "/in.zarr"}, "out: Field required", id="no_out"),
        pytest.param({**GOOD, "control": False}, r"control: .*valid string \(found False\)", id="yaml_made_no_a_boolean"),
        pytest.param({**GOOD, "out": "run"}, r"out: must be an absolute path .* \(found 'run'\)", id="relative_out"),
        pytest.param({**GOOD, "preset": "papr"}, "preset: .*'paper' or 'small'", id="preset"),
        pytest.param({**GOOD, "settings": {"train": {"epoch": 3}}}, "Did you mean 'train.epochs'", id="setting"),
        pytest.param({**GOOD, "settings": {"trian": {}, "tran": 3}}, "there is no setting 'tran'", id="stage_of_settings"),
        pytest.param(GOOD, "/in.zarr does not exist", id="no_input"),
    ],
)  # fmt: skip
def test_a_job_file_that_will_not_do_is_refused_in_one_line(
    text: Any, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "job.yaml"
    if text is not None:
        path.write_text(text if isinstance(text, str) else yaml.safe_dump(text))
    code, line = spoken(path, monkeypatch, capsys)
    assert code == 2
    assert len(line.splitlines()) == 1
    assert line.startswith("error: ")
    assert re.search(said, line), line
    assert {found.name for found in tmp_path.iterdir()} <= {"job.yaml"}


# --- on a Ray cluster ------------------------------------------------------------------------------------------------

ON_RAY = {name: value for name, value in JOB.items() if name != "run.serial"} | {"run.cpus": 2, "run.serial": False}
OUT = "s3://bucket/run"
DRIVER_MOST = 1e9
"""Bytes of a driver with all libraries loaded; a matrix would come on top."""
SDK = """
import asyncio, json, sys, time
from ray.job_submission import JobSubmissionClient

address, folder = sys.argv[1:]
client = JobSubmissionClient(address)

def submit(words):
    return client.submit_job(entrypoint=f"python {words}", runtime_env={"working_dir": folder})

async def followed(job):
    return "".join([part async for part in client.tail_job_logs(job)])

def ended(job):
    logs = asyncio.run(followed(job))
    while not client.get_job_status(job).is_terminal():
        time.sleep(0.1)
    told = client.get_job_info(job)
    return {"status": told.status, "message": told.message, "node": told.driver_node_id, "logs": logs}

bad, stage = submit("run_cohort.py misspelled.yaml"), submit("run_cohort.py --stage cohort job.yaml")
print(json.dumps({"bad": ended(bad), "stage": ended(stage)}), flush=True)
whole = submit("run_cohort.py job.yaml")
sys.stdin.readline()  # when it is to be stopped
client.stop_job(whole)
print(json.dumps(ended(whole)))
"""
SDK_ALONE = "import sys; from ray.job_submission import JobSubmissionClient; JobSubmissionClient(sys.argv[1])"


@dataclass(frozen=True)
class LockedRay:
    """A Ray on loopback: a head without processors, later one node with two; `env` holds the key to its door."""

    address: str  # of the dashboard
    cluster: str
    env: dict[str, str]
    storage: SimpleNamespace  # the S3 that its jobs write to
    written: tuple[Path, Path]  # what Ray writes while it runs, and what its nodes say

    def get(self, path: str, *, token: str | None) -> Any:
        """Ask the dashboard for something."""
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        with urllib.request.urlopen(urllib.request.Request(self.address + path, headers=headers), timeout=30) as answer:
            return json.load(answer)

    @property
    def token(self) -> str:
        return Path(self.env["RAY_AUTH_TOKEN_PATH"]).read_text()

    def nodes(self) -> list[dict[str, Any]]:
        listed = self.get("/api/v0/nodes", token=self.token)["data"]["result"]["result"]
        return [node for node in listed if node["state"] == "ALIVE"]


def free_ports(count: int) -> list[int]:
    """Return ports of loopback that nothing listens on now."""
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def ray_node(env: dict[str, str], *words: str) -> subprocess.Popen[bytes]:
    """Start a Ray node in a process group of its own; its processes end with it."""
    agent, grpc, metrics = free_ports(3)
    ports = ["--dashboard-agent-listen-port", agent, "--dashboard-agent-grpc-port", grpc]
    own = [*ports, "--metrics-export-port", metrics, "--object-store-memory", 90 * 2**20, "--disable-usage-stats"]
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *map(str, own), *words]
    log = (Path(env["TEST_LOGS"]) / f"{agent}.log").open("wb")
    return subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)


def wait_for(there: Callable[[], bool], node: subprocess.Popen[bytes]) -> bool:
    """Wait until something is there; false where the node that it waits for has ended."""
    deadline = time.monotonic() + 120
    while node.poll() is None and time.monotonic() < deadline:
        try:
            if there():
                return True
        except (OSError, KeyError, TypeError, ValueError):  # not up yet
            pass
        time.sleep(0.3)
    return False


def end(node: subprocess.Popen[bytes]) -> None:
    """End a node that was started here, and with it what it started."""
    if node.poll() is not None:
        return
    os.killpg(node.pid, signal.SIGTERM)
    try:
        node.wait(3)
    except subprocess.TimeoutExpired:  # a head hands its work over first, and here there is nobody to take it
        os.killpg(node.pid, signal.SIGKILL)
        node.wait(10)


def started_node(
    nodes: contextlib.ExitStack, env: dict[str, str], words: Sequence[str], there: Callable[[], bool]
) -> None:
    """Start a node and wait until it is there; one that takes more than Ray's 30 seconds for it is started again."""
    for _ in range(3):
        node = ray_node(env, *words)
        nodes.callback(end, node)
        if wait_for(there, node):
            return
    pytest.fail("\n".join(path.read_text() for path in Path(env["TEST_LOGS"]).glob("*.log")))


@pytest.fixture(scope="module")
def locked_ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LockedRay]:
    """The head of a Ray as `cluster/` runs it: a token at the door, no processors."""
    logs, token = tmp_path_factory.mktemp("ray"), tmp_path_factory.mktemp("token") / "token"
    token.write_text(secrets.token_hex(32))
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    env |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "PATH": path, "PYTHONPATH": str(ROOT)}
    env |= {"TEST_LOGS": str(logs), **PROMPT}
    env |= {"RAY_JOB_STOP_WAIT_TIME_S": "30"}  # a busy machine takes its time
    port, dashboard, client = free_ports(3)
    with (
        s3() as storage,
        pytest.MonkeyPatch.context() as patch,
        # Sockets below a folder of pytest's would have names longer than the system takes.
        tempfile.TemporaryDirectory(prefix="nd-", dir="/tmp", ignore_cleanup_errors=True) as folder,
        contextlib.ExitStack() as nodes,
    ):
        for name, value in (S3_ENVIRONMENT | {"AWS_ENDPOINT_URL": storage.url}).items():
            patch.setenv(name, value)
            env[name] = value
        s3fs.S3FileSystem.clear_instance_cache()
        s3fs.S3FileSystem().mkdir("bucket")
        ray = LockedRay(f"http://127.0.0.1:{dashboard}", f"127.0.0.2:{port}", env, storage, (Path(folder), logs))
        # Ray puts the machine's address in place of 127.0.0.1; these two it leaves on loopback.
        head = ["--head", "--node-ip-address", "127.0.0.2", "--port", str(port), "--num-cpus", "0"]
        head += ["--temp-dir", folder, "--ray-client-server-port", str(client)]
        head += ["--include-dashboard", "true", "--dashboard-host", "127.0.0.1", "--dashboard-port", str(dashboard)]
        started_node(nodes, env, head, lambda: len(ray.nodes()) == 1)
        yield ray
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture(scope="module")
def working_ray(locked_ray: LockedRay) -> Iterator[LockedRay]:
    """The same with a node of two processors."""
    worker = ["--address", locked_ray.cluster, "--node-ip-address", "127.0.0.3", "--num-cpus", "2"]
    with contextlib.ExitStack() as nodes:
        started_node(nodes, locked_ray.env, worker, lambda: len(locked_ray.nodes()) == 2)
        yield locked_ray


@pytest.fixture(scope="module")
def sent(tmp_path_factory: pytest.TempPathFactory, cohort: Path) -> Path:
    """The folder that is sent with a job: the scripts, a job file, and one with a misspelled control."""
    folder = Path(shutil.copytree(JOBS, tmp_path_factory.mktemp("sent") / "jobs"))
    good = job_file(folder, cohort, OUT, ON_RAY)
    bad = {**yaml.safe_load(good.read_text()), "control": "contrl", "out": str(folder.parent / "bad")}
    (folder / "misspelled.yaml").write_text(yaml.safe_dump(bad))
    return folder


def ray_job(ray: LockedRay, *words: str) -> subprocess.CompletedProcess[str]:
    """Run the Ray Job command line."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "job", words[0], "--address", ray.address, *words[1:]]
    return subprocess.run(command, env=ray.env, capture_output=True, text=True, timeout=600, check=False)


@pytest.mark.ray
@pytest.mark.timeout(800)
@pytest.mark.slow
def test_whoever_has_no_token_is_refused(locked_ray: LockedRay, cohort: Path, tmp_path: Path) -> None:
    for token, code in ((None, 401), ("0" * 64, 403)):
        with pytest.raises(urllib.error.HTTPError) as refused:
            locked_ray.get("/api/jobs/", token=token)
        assert refused.value.code == code
    env = {name: value for name, value in locked_ray.env.items() if name != "RAY_AUTH_TOKEN_PATH"}
    env["HOME"] = str(tmp_path)  # where a token of one's own would be looked for
    run = run_words(cohort, tmp_path / "run", ON_RAY, "--address", locked_ray.cluster)
    commands = {
        "command line": ["-m", "ray.scripts.scripts", "job", "submit", "--address", locked_ray.address, "--", "true"],
        "SDK": ["-c", SDK_ALONE, locked_ray.address],
        "driver": ["-m", "ndreamer_dist.cli", *run],
    }
    asking = {
        name: subprocess.Popen(
            [sys.executable, *words], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for name, words in commands.items()
    }
    told = {name: process.communicate(timeout=300)[0] for name, process in asking.items()}
    for name, process in asking.items():
        assert process.returncode != 0, name
        assert "token" in told[name].lower(), told[name]
    assert asking["driver"].returncode == 2
    assert locked_ray.get("/api/jobs/", token=locked_ray.token) == []


def measures_of(run: str) -> pd.DataFrame:
    return pd.read_csv(io.BytesIO(open_storage(run).read(keys.METRICS)))


def stopped_in_training(ray: LockedRay, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Submit a job that is refused, one stage, and the whole job, stopped after a checkpoint; return what came of them."""
    with subprocess.Popen(
        [sys.executable, "-c", SDK, ray.address, str(folder)],
        env=ray.env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as sdk:  # fmt: skip
        assert sdk.stdout is not None
        assert sdk.stderr is not None
        first = sdk.stdout.readline()
        # Training goes on from what this file names, which Ray Train writes a moment after the checkpoint.
        while not all(
            any(method == "PUT" and name in path for _, method, path, _ in ray.storage.asked)
            for name in (keys.METRICS, SNAPSHOT)
        ):
            assert sdk.poll() is None, sdk.stderr.read()
            time.sleep(0.05)
        last, error = sdk.communicate("stop\n", timeout=300)
    assert sdk.returncode == 0, error
    return json.loads(first), json.loads(last)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(800)
def test_a_job_that_is_stopped_in_training_lets_go_and_goes_on_to_the_same_bits_when_submitted_again(
    working_ray: LockedRay, sent: Path, finished: Path, tmp_path: Path
) -> None:
    before, stopped = stopped_in_training(working_ray, sent)
    refused, staged = before["bad"], before["stage"]
    assert refused["status"] == "FAILED"
    assert "exit code 2" in refused["message"]
    assert refused["message"].splitlines()[-1].startswith("error: no cell has the control 'contrl'")
    assert "Traceback" not in refused["logs"]
    assert not (sent.parent / "bad").exists()
    assert staged["status"] == "SUCCEEDED", staged["logs"]
    assert f"done: cohort: {OUT}" in staged["logs"]
    assert stopped["status"] == "STOPPED", stopped["logs"]
    assert "stopped; the same command continues from here" in stopped["logs"]
    assert "Traceback" not in stopped["logs"]
    assert stopped["node"] in [node["node_id"] for node in working_ray.nodes() if node["is_head_node"]]
    run = open_storage(OUT)
    assert not run.exists(keys.LOCK)
    assert not run.exists(keys.MODEL_WEIGHTS)
    done_before, learned = {name: run.read(name) for name in run.list(keys.DONE)}, measures_of(OUT)
    assert done_before
    assert len(learned) < 90

    again = ray_job(working_ray, "submit", "--working-dir", str(sent), "--", "python", "run_cohort.py", "job.yaml")
    assert again.returncode == 0, again.stdout + again.stderr
    assert f"done: the whole job: {OUT}" in again.stdout  # the log was followed
    assert {name: run.read(name) for name in done_before} == done_before
    kept = measures_of(OUT)["seconds"][: len(learned)] == learned["seconds"]
    assert kept[: JOB["train.checkpoint_steps"]].all()  # so it went on from a checkpoint
    fsspec.filesystem("s3").get("bucket/run", str(tmp_path / "run"), recursive=True)
    assert_same_bits(finished, tmp_path / "run")
    assert (tmp_path / "run" / keys.MODEL_WEIGHTS).read_bytes() == (finished / keys.MODEL_WEIGHTS).read_bytes()
    check(tmp_path / "run" / keys.RESULTS)
    stages = [json.loads(line) for line in run.read(keys.STAGES_LOG).splitlines()]
    assert max(stage["peak_bytes"] for stage in stages) < DRIVER_MOST


@pytest.mark.slow
@pytest.mark.ray
def test_neither_the_token_nor_the_key_to_s3_is_in_anything_that_ray_has_written(working_ray: LockedRay) -> None:
    """The logs of nodes, workers and jobs, after all of the above."""
    told = [name for name, _ in contents(working_ray.written[0])]
    assert any("job-driver" in name for name in told)
    assert_no_secret([working_ray.token, S3_ENVIRONMENT["AWS_SECRET_ACCESS_KEY"]], *working_ray.written)


def submit_lines(text: str) -> list[list[str]]:
    """Return the words of every `ray job submit` line of a text."""
    return [line.split()[3:] for line in text.splitlines() if line.strip().startswith("ray job submit ")]


def test_the_docstring_of_a_job_holds_the_line_that_submits_it(monkeypatch: pytest.MonkeyPatch) -> None:
    (words,) = submit_lines((JOBS / "run_cohort.py").read_text())
    asked: dict[str, Any] = {}
    monkeypatch.setattr(ray_cli.submit, "callback", lambda **given: asked.update(given))
    answer = CliRunner().invoke(ray_cli.submit, words, catch_exceptions=False)
    assert answer.exit_code == 0, answer.output
    assert asked["entrypoint"] == ("python", "run_cohort.py", "cohort.yaml")
    assert (ROOT / asked["working_dir"] / asked["entrypoint"][1]).exists()
    assert asked["entrypoint_num_cpus"] is None  # a head without processors takes it
