"""Costs are measured over the whole process tree, and each stage logs one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from ndreamer_dist import keys
from ndreamer_dist.compute.monitors import PeakMemory, metered, stage_costs, tree_memory
from ndreamer_dist.rundir.directory import RunDirectory

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
        with metered(run.storage, stage) as facts:
            facts["workers"] = 2
    lines = [json.loads(line) for line in (tmp_path / keys.STAGES_LOG).read_text().splitlines()]
    assert [(line["stage"], line["workers"]) for line in lines] == [("pack", 2), ("train", 2)]


def test_the_bytes_of_a_stage_and_of_its_children_are_counted_from_its_beginning(tmp_path: Path) -> None:
    run, big = RunDirectory.at(tmp_path / "run"), tmp_path / "big"
    big.write_bytes(bytes(5_000_000))
    with metered(run.storage, "cohort", promised=3 * 10**9):
        big.read_bytes()
    with metered(run.storage, "pack"):
        (tmp_path / "copy").write_bytes(bytes(3_000_000))
        copy = "import sys, time; sys.stdout.write('x' * 4_000_000); sys.stdout.flush(); time.sleep(60)"
        with subprocess.Popen([sys.executable, "-c", copy], stdout=subprocess.PIPE) as child:
            assert child.stdout is not None
            child.stdout.read(4_000_000)
            time.sleep(1.2)
            child.kill()
    table = stage_costs(run.storage).set_index("stage")
    assert list(table.index) == ["cohort", "pack"]
    assert 0.005 <= table["read_gb"]["cohort"] < 0.006
    assert table["written_gb"]["cohort"] < 0.001
    assert 0.007 <= table["written_gb"]["pack"] < 0.008
    assert table["promised_gb"]["cohort"] == 3.0
    assert np.isnan(table["promised_gb"]["pack"])


def test_what_a_stage_cost_is_not_what_finding_it_finished_costs(tmp_path: Path) -> None:
    run = RunDirectory.at(tmp_path)
    with metered(run.storage, "pack"):
        time.sleep(0.2)
    with metered(run.storage, "pack"):
        pass
    assert stage_costs(run.storage)["seconds"].tolist() == [pytest.approx(0.2, abs=0.15)]


def test_a_stage_that_fails_is_not_logged_as_done(tmp_path: Path) -> None:
    run = RunDirectory.at(tmp_path)
    with pytest.raises(ValueError, match="broken"), metered(run.storage, "pack"):
        raise ValueError("broken")
    assert not (tmp_path / keys.STAGES_LOG).exists()
