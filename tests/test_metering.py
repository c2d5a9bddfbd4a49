"""Costs are measured over the whole process tree, and one line a stage is kept."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ndreamer_dist import keys
from ndreamer_dist.metering import PeakMemory, metered, tree_memory
from ndreamer_dist.rundir import RunDirectory

HOLD = "import sys, time; held = bytearray(200_000_000); print('held', flush=True); time.sleep(60)"


def test_a_childs_memory_counts_while_it_lives_and_the_peak_remembers_it() -> None:
    before = tree_memory(os.getpid())
    meter = PeakMemory()
    with subprocess.Popen([sys.executable, "-c", HOLD], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"held\n"
        assert tree_memory(os.getpid()) > before + 150e6
        time.sleep(1.2)
        child.kill()
    meter.close()
    assert meter.bytes > before + 150e6
    assert tree_memory(os.getpid()) < meter.bytes - 100e6


def test_every_stage_adds_its_line(tmp_path: Path) -> None:
    run = RunDirectory.at(tmp_path)
    for stage in ("pack", "train"):
        with metered(run, stage) as facts:
            facts["workers"] = 2
    lines = [json.loads(line) for line in (tmp_path / keys.STAGES_LOG).read_text().splitlines()]
    assert [(line["stage"], line["workers"]) for line in lines] == [("pack", 2), ("train", 2)]


def test_a_stage_that_fails_is_not_logged_as_done(tmp_path: Path) -> None:
    run = RunDirectory.at(tmp_path)
    with pytest.raises(ValueError, match="broken"), metered(run, "pack"):
        raise ValueError("broken")
    assert not (tmp_path / keys.STAGES_LOG).exists()
