"""The benchmark of a training step runs and prints its table."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

JOB = Path(__file__).parents[2] / "jobs" / "benchmark_step.py"


@pytest.mark.slow
def test_the_benchmark_prints_speed_memory_and_what_bounds_a_step() -> None:
    options = ["--preset", "small", "--genes", "60", "--steps", "1", "--warmup", "1", "--threads", "1"]
    told = subprocess.run([sys.executable, JOB, "-", *options], capture_output=True, text=True, check=True).stdout
    row = re.search(r"^\| ours \| ([\d.]+) \| (\d+) \| [\d.]+ \| ([\d.]+) \|", told, re.MULTILINE)
    assert row
    seconds, cells_per_second, gigabytes = map(float, row.groups())
    assert abs(seconds * cells_per_second - 1024) < 10
    assert 0.1 < gigabytes < 3
    counted = re.search(r"a step: (\d+) operations, (\d+) GFLOP", told)
    assert counted
    assert int(counted[1]) > 100
    assert int(counted[2]) > 0
    assert "naive" not in told
