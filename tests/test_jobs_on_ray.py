"""The whole job as a user starts it, each on a Ray of its own: the same bits, no hang, and on from any kill.

A fit of Ray Train takes half a minute, so the tests share few of them: one job loses one of its two training workers
and is then killed itself, and what it left is gone on from with two training workers; in the slow tier also with one.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

import ndreamer_dist as nd
from ndreamer_dist import keys
from ndreamer_dist.compute.monitors import process_tree
from ndreamer_dist.training.checkpoints import ASK_EVERY
from tests.results.brute_force import check
from tests.security.looked_at import assert_no_pickle, assert_no_secret
from tests.security.test_ports import is_loopback, listening
from tests.tiny import NAMES, SETTINGS, assert_same_bits, run_words
from tests.two_workers import WORKERS, run_with_two_workers

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900), pytest.mark.usefixtures("ray_token")]
# With next to no weight the independence loss does not fall, which is worth a warning. At this learning rate rounding stays
# rounding, so that two workers can be compared with one.
LEARNING: dict[str, Any] = {
    "train.epochs": 30, "train.checkpoint_steps": 8, "train.reset_every": 20, "train.learning_rate": 1e-4,
    "loss.independence": 1e-6,
}  # fmt: skip
ON_RAY = (
    {name: value for name, value in SETTINGS.items() if name != "run.serial"}
    | LEARNING
    | {"run.cpus": 2, "run.serial": False}
)
STEPS, WORKER_KILLED_AFTER, JOB_KILLED_AFTER, CHECKPOINT_STEPS = 90, 24, 48, 8
WARNING = "the independence loss does not fall"
CANCELLED = re.compile(r"(encoder\.layers\.\d|head\.narrow|quantiser)\.bias|running_mean")
"""Biases that a batch norm takes out again: their gradient is rounding, which AdamW scales up to whole steps."""
PATIENCE_SECONDS = 300


def command(cohort: Path, out: Path, settings: dict[str, Any], *more: str) -> list[str]:
    return [sys.executable, "-m", "ndreamer_dist.cli", *run_words(cohort, out, settings, *more)]


def in_a_process(words: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, which must come in time."""
    return subprocess.run(words, capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=False)


def in_a_process_with_its_ports(words: Sequence[str]) -> tuple[subprocess.CompletedProcess[str], set[str]]:
    """Run a command to its end; return also the addresses on which it, or what it started, listened meanwhile."""
    addresses: set[str] = set()
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(words, **pipes) as job:  # type: ignore[call-overload]
        deadline = time.monotonic() + PATIENCE_SECONDS
        while job.poll() is None:
            if time.monotonic() > deadline:
                job.kill()
            addresses |= {address for address, *_ in listening(job.pid)}
            time.sleep(0.3)
        return subprocess.CompletedProcess(words, job.returncode, *job.communicate()), addresses


def measures_of(run: Path) -> pd.DataFrame:
    log = run / keys.METRICS
    return pd.read_csv(log) if log.exists() else pd.DataFrame({"step": [], "seconds": []})


def wait_until(condition: Callable[[], Any], job: subprocess.Popen[bytes], said: Path) -> Any:
    """Wait for something to be true while a job runs, and return it."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not (found := condition()):
        assert job.poll() is None, said.read_text()
        assert time.monotonic() < deadline, f"waited in vain; {said.read_text()}"
        time.sleep(0.05)
    return found


def training_workers(job: int) -> list[int]:
    """Return the process ids of a job's training workers."""
    found = []
    for pid in [process.pid for process in process_tree(job)]:
        try:
            title = Path(f"/proc/{pid}/cmdline").read_text()
        except OSError:
            continue  # it has ended
        if title.startswith("ray::") and "TrainWorker" in title:
            found.append(pid)
    return found


@dataclass(frozen=True)
class Disturbed:
    """A run of which a training worker was killed, and later the job; and what had been measured before each."""

    run: Path
    before_worker: pd.DataFrame
    before_job: pd.DataFrame


@pytest.fixture(scope="module")
def cohort(tiny: Path) -> Path:
    return tiny


@pytest.fixture(scope="module")
def undisturbed(cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without Ray, from end to end."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    nd.run(cohort, out=out, preset="small", settings=SETTINGS | LEARNING, **NAMES)
    return out


@pytest.fixture(scope="module")
def undisturbed_by_two(cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without Ray, trained by two workers."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    return run_with_two_workers(cohort, out, SETTINGS | LEARNING)


@pytest.fixture(scope="module")
def disturbed(cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> Disturbed:
    folder = tmp_path_factory.mktemp("disturbed")
    run, said = folder / "run", folder / "stderr"
    with (
        said.open("wb") as stderr,
        subprocess.Popen(
            command(cohort, run, ON_RAY, "--workers", str(WORKERS)),
            stdout=subprocess.DEVNULL, stderr=stderr,
        ) as job,
    ):  # fmt: skip
        try:
            wait_until(lambda: len(measures_of(run)) >= WORKER_KILLED_AFTER, job, said)
            workers = training_workers(job.pid)
            assert len(workers) == WORKERS
            os.kill(max(workers), signal.SIGKILL)
            before_worker = measures_of(run)
            wait_until(lambda: len(set(training_workers(job.pid)) - set(workers)) == WORKERS, job, said)
            more = max(JOB_KILLED_AFTER, len(before_worker) + 1)
            wait_until(lambda: len(measures_of(run)) >= more, job, said)
        finally:
            job.kill()
    return Disturbed(run, before_worker, measures_of(run))


def goes_on_from(before: pd.DataFrame, after: pd.DataFrame) -> bool:
    """Return whether only steps since a checkpoint were done again.

    Logs are written with a checkpoint, and Ray Train learns of it a moment later: what was killed in that moment goes on
    from an earlier one.
    """
    same = (after["seconds"][: len(before)].to_numpy() == before["seconds"].to_numpy()).tolist()
    kept = same.index(False) if False in same else len(same)
    return kept > 0 and kept % CHECKPOINT_STEPS == 0 and len(before) - kept <= 2 * CHECKPOINT_STEPS


def test_a_job_of_two_workers_on_ray_gives_the_bits_of_one_without_ray(
    cohort: Path, tmp_path: Path, local_ray: None
) -> None:
    run, short = tmp_path / "run", {"train.epochs": 4}
    nd.run(cohort, out=run, preset="small", settings=ON_RAY | short | {"train.workers": WORKERS}, **NAMES)
    known = run_with_two_workers(cohort, tmp_path / "known", SETTINGS | LEARNING | short)
    assert (run / keys.MODEL_WEIGHTS).read_bytes() == (known / keys.MODEL_WEIGHTS).read_bytes()
    assert_same_bits(known, run)
    assert_no_pickle(run)


@pytest.mark.slow
def test_a_killed_worker_is_replaced_and_training_goes_on_from_its_checkpoint(disturbed: Disturbed) -> None:
    before, after = disturbed.before_worker, disturbed.before_job
    assert WORKER_KILLED_AFTER <= len(before) < len(after) < STEPS
    assert after["step"].tolist() == list(range(1, len(after) + 1))
    assert goes_on_from(before, after)


@pytest.mark.slow
def test_a_killed_job_goes_on_to_the_bits_of_an_undisturbed_one_without_ray(
    cohort: Path, disturbed: Disturbed, undisturbed_by_two: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(disturbed.run, tmp_path / "run"))
    by_minutes = {"train.checkpoint_steps": 1000, "train.checkpoint_minutes": 0.005}
    done = in_a_process(command(cohort, run, ON_RAY | by_minutes, "--workers", str(WORKERS)))
    assert done.returncode == 0, done.stderr
    assert "\ndone: " in f"\n{done.stdout}"
    assert done.stderr.count(WARNING) == 1
    after = measures_of(run)
    assert after["step"].tolist() == list(range(1, STEPS + 1))
    assert goes_on_from(disturbed.before_job, after)
    epochs = pd.read_csv(run / keys.EPOCHS)
    assert epochs["epoch"].tolist() == list(range(1, LEARNING["train.epochs"] + 1))
    assert (run / keys.MODEL_WEIGHTS).read_bytes() == (undisturbed_by_two / keys.MODEL_WEIGHTS).read_bytes()
    assert_same_bits(undisturbed_by_two, run)
    checkpoints = (run / keys.TRAIN_DIR).glob("checkpoint_*/state.json")
    newest = max(json.loads(path.read_text())["step"] for path in checkpoints)
    assert newest > len(disturbed.before_job)
    assert newest % ASK_EVERY == 0
    check(run / keys.RESULTS)
    assert_no_pickle(run)
    assert_no_secret([Path(os.environ["RAY_AUTH_TOKEN_PATH"]).read_text()], run, done.stdout, done.stderr)


@pytest.mark.slow
def test_one_worker_on_one_processor_goes_on_from_the_checkpoint_of_two(
    cohort: Path, disturbed: Disturbed, undisturbed: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(disturbed.run, tmp_path / "run"))
    done, addresses = in_a_process_with_its_ports(command(cohort, run, ON_RAY | {"run.cpus": 1}))
    assert done.returncode == 0, done.stderr
    assert [address for address in addresses if not is_loopback(address)] == []
    after, expected = measures_of(run), measures_of(undisturbed)
    assert after["step"].tolist() == list(range(1, STEPS + 1))
    assert goes_on_from(disturbed.before_job, after)
    # Rounding grows from step to step, so only the first steps of two workers are close to those of one.
    compared = slice(JOB_KILLED_AFTER + 20)
    assert np.allclose(after["total"][compared], expected["total"][compared], rtol=1e-3)
    weights, known = (load_file(folder / keys.MODEL_WEIGHTS) for folder in (run, undisturbed))
    assert any(not torch.equal(weights[name], value) for name, value in known.items())  # the checkpoint was of two
    for name, value in known.items():
        if not CANCELLED.search(name):
            assert float((weights[name] - value).norm() / value.norm()) < 5e-2, name  # rounding has grown all along
    check(run / keys.RESULTS)
    assert_no_pickle(run)
    assert_no_secret([Path(os.environ["RAY_AUTH_TOKEN_PATH"]).read_text()], run, done.stdout, done.stderr)


@pytest.mark.slow
def test_a_loss_that_is_not_finite_ends_the_job_in_one_line(cohort: Path, undisturbed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for part in ("packed.zarr", "cohort", *(f"{keys.DONE}/{stage}" for stage in ("cohort", "pack", "clusters"))):
        shutil.copytree(undisturbed / part, run / part)
    shutil.copy(undisturbed / keys.RUN_JSON, run)
    done = in_a_process(command(cohort, run, ON_RAY | {"train.learning_rate": 1e30}))
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if "error" in line.lower()]
    assert len(lines) == 1
    assert lines[0].startswith("error: the loss is not finite at step ")
    assert "train.learning_rate" in lines[0]
