"""The whole job as a user starts it, each on a Ray of its own: the same bits, no hang, and on from a kill."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import pytest

from ndreamer_dist import keys
from tests.results.brute_force import check
from tests.tiny import SETTINGS, assert_same_bits, run_words, tiny_cohort

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400), pytest.mark.usefixtures("ray_token")]
ON_RAY = {name: value for name, value in SETTINGS.items() if name != "run.serial"} | {
    "train.epochs": 40, "train.checkpoint_steps": 30,
}  # fmt: skip
STEPS = 120
KILLED_AFTER = 60
"""Steps after which the job is killed: two checkpoints, so that one at least is surely there."""


def command(arguments: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "ndreamer_dist.cli", *arguments]


def steps_of(log: Path) -> int:
    return len(pd.read_csv(log)) if log.exists() else 0


def in_a_process(arguments: Sequence[str]) -> None:
    """Run the command line to its end, which must be a good one and come in time."""
    done = subprocess.run(command(arguments), capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("done: ")


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_cohort(tmp_path_factory.mktemp("cohort"))


@pytest.fixture(scope="module")
def undisturbed(cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on Ray with two processors; training streams through Ray Data and Ray Train."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    in_a_process(run_words(cohort, out, {**ON_RAY, "run.cpus": 2}))
    return out


def test_two_training_workers_on_two_processors_run_to_the_end(cohort: Path, tmp_path: Path) -> None:
    in_a_process(run_words(cohort, tmp_path / "run", {**ON_RAY, "run.cpus": 2, "train.epochs": 6}, "--workers", "2"))
    check(tmp_path / "run" / keys.RESULTS)


def test_a_killed_job_goes_on_from_its_checkpoint_on_one_processor_to_the_bits_of_two(
    cohort: Path, undisturbed: Path, tmp_path: Path
) -> None:
    words = run_words(cohort, tmp_path / "run", {**ON_RAY, "run.cpus": 2})
    log = tmp_path / "run" / keys.METRICS
    with subprocess.Popen(command(words), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as job:
        deadline = time.monotonic() + 200
        while steps_of(log) < KILLED_AFTER and time.monotonic() < deadline:
            time.sleep(0.05)
        os.kill(job.pid, signal.SIGKILL)
    done = pd.read_csv(log)
    assert KILLED_AFTER <= len(done) < STEPS
    in_a_process(run_words(cohort, tmp_path / "run", {**ON_RAY, "run.cpus": 1}))
    after = pd.read_csv(log)
    assert after["step"].tolist() == list(range(1, STEPS + 1))
    kept = slice(0, KILLED_AFTER // 2)  # what the first checkpoint holds was not done again: its times are the old ones
    assert after["cells_per_second"][kept].equals(done["cells_per_second"][kept])
    assert_same_bits(undisturbed, tmp_path / "run")
    check(undisturbed / keys.RESULTS)
