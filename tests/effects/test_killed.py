"""A job that is killed during the effects stage resumes shard by shard, with the same bits."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import ndreamer_dist as nd
from ndreamer_dist import keys
from ndreamer_dist.errors import StoreError
from tests.tiny import NAMES, SETTINGS, assert_same_bits, run_words

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.usefixtures("ray_token")]
MANY_SHARDS = SETTINGS | {"pack.block_rows": 64, "embed.tile_rows": 64, "train.epochs": 2}
ON_RAY = {name: value for name, value in MANY_SHARDS.items() if name != "run.serial"}
LEAST_DONE = 3


def kill_in_the_middle(cohort: Path, run: Path) -> None:
    """Resume a run on its own local Ray, and kill the job after some shards of the effects stage."""
    words = run_words(cohort, run, ON_RAY | {"run.cpus": 1, "run.object_store_gb": 0.1})
    command = [sys.executable, "-m", "ndreamer_dist.cli", *words]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=os.environ) as job:
        assert job.stderr is not None
        while len(list((run / keys.DONE / keys.STAGE_EFFECTS).glob("rows-*"))) < LEAST_DONE:
            assert job.poll() is None, job.stderr.read().decode()
            time.sleep(0.002)
        job.send_signal(signal.SIGKILL)


def test_a_job_killed_in_the_middle_of_the_effects_goes_on_to_the_same_bits(tiny: Path, tmp_path: Path) -> None:
    cohort, undisturbed, run = tiny, tmp_path / "undisturbed", tmp_path / "run"
    nd.run(cohort, out=undisturbed, preset="small", settings=MANY_SHARDS, **NAMES)
    shutil.copytree(undisturbed, run)
    shutil.rmtree(run / keys.DONE / keys.STAGE_EFFECTS)
    shutil.rmtree(run / keys.RESULTS)
    kill_in_the_middle(cohort, run)
    with pytest.raises(StoreError, match="has not finished; give the same `run` command again"):
        nd.open_results(run)
    markers = run / keys.DONE / keys.STAGE_EFFECTS
    before = {file: file.stat().st_mtime_ns for file in markers.iterdir()}
    shards = {run / name for file in before for name in json.loads(file.read_text())["files"]}
    written = {file: file.stat().st_mtime_ns for file in shards}
    assert LEAST_DONE <= len(before) < len(list((undisturbed / keys.DONE / keys.STAGE_EFFECTS).iterdir()))
    nd.run(cohort, out=run, preset="small", settings=MANY_SHARDS, **NAMES)
    assert {file: file.stat().st_mtime_ns for file in before} == before
    assert {file: file.stat().st_mtime_ns for file in shards} == written
    assert_same_bits(undisturbed, run)
