"""Ctrl-C and SIGTERM end a run with one line, the shell's exit code and a checkpoint, and leave no process behind."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from ndreamer_dist import keys
from ndreamer_dist.compute.monitors import process_tree
from tests.tiny import PROMPT, SETTINGS, run_words, tiny_cohort

LONG = SETTINGS | {"train.epochs": 60, "train.checkpoint_steps": 100_000}
"""Without checkpoints of its own, so that the one there is was written when training stopped."""
SECONDS = 240.0


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_cohort(tmp_path_factory.mktemp("cohort"))


def step_of(run: Path) -> int:
    """Return the training step that a run has reached, by what it writes down of its progress."""
    path = run / keys.PROGRESS
    return int(json.loads(path.read_text()).get("step", 0)) if path.exists() else 0


def stopped(words: list[str], run: Path, number: int, environment: Mapping[str, str]) -> tuple[int, str, list[int]]:
    """Start a run, stop it in training; return its exit code, what it said, and the processes that it had started."""
    command = [sys.executable, "-m", "ndreamer_dist.cli", *words]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, **environment},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # a background job ignores it
    ) as job:  # fmt: skip
        until = time.monotonic() + SECONDS
        while step_of(run) < 3 and job.poll() is None and time.monotonic() < until:
            time.sleep(0.1)
        started = [process.pid for process in process_tree(job.pid)[1:]]
        job.send_signal(number)
        said, _ = job.communicate(timeout=SECONDS)
    return job.returncode, said, started


def alive(processes: list[int]) -> list[int]:
    """Return those that still run a minute later at most."""
    until = time.monotonic() + 60
    while (left := [pid for pid in processes if Path(f"/proc/{pid}").exists()]) and time.monotonic() < until:
        time.sleep(0.2)
    return left


def last_checkpoint(run: Path) -> int:
    """Return the step of the newest checkpoint, of either runtime."""
    states = list((run / keys.TRAIN_DIR).rglob("state.json"))
    return max((int(json.loads(path.read_text())["step"]) for path in states), default=0)


def assert_stopped_well(run: Path, code: int, said: str, expected: int) -> None:
    assert code == expected, said
    assert said.count("stopped; the same command continues from here\n") == 1
    assert "Traceback" not in said
    assert "SIGTERM" not in said
    assert last_checkpoint(run) >= 3
    assert not (run / keys.DONE / keys.STAGE_TRAIN).exists()


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_training_leaves_a_checkpoint_of_its_last_step(
    cohort: Path, tmp_path: Path, number: int, code: int
) -> None:
    run = tmp_path / "run"
    ended, said, _ = stopped(run_words(cohort, run, LONG), run, number, {})
    assert_stopped_well(run, ended, said, code)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_on_a_local_ray_no_process_is_left(cohort: Path, tmp_path: Path, number: int, code: int) -> None:
    run = tmp_path / "run"
    settings = LONG | {"run.serial": False, "train.epochs": 2000}
    (tmp_path / "token").write_text(secrets.token_hex(32))
    environment = {**PROMPT, "RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")}
    ended, said, started = stopped(run_words(cohort, run, settings), run, number, environment)
    assert_stopped_well(run, ended, said, code)
    assert len(started) > 3
    assert not alive(started)
