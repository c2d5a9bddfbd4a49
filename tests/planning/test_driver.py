"""The memory of the driver stays below its promise, whatever columns obs has."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pyarrow as pa
import pytest

from ndreamer_dist.effects import cells
from ndreamer_dist.effects.cells import CellTable
from ndreamer_dist.planning.memory import DRIVER_BYTES_PER_CELL
from ndreamer_dist.settings import Settings
from ndreamer_dist.storage import texts
from tests.memory import peak_bytes

JOB = Path(__file__).parents[2] / "jobs" / "benchmark_driver.py"


def loaded() -> ModuleType:
    """Return the benchmark as a module."""
    spec = importlib.util.spec_from_file_location("benchmark_driver", JOB)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


driver = loaded()


def peak_of_tables(folder: Path, count: int) -> int:
    """Return the peak memory in bytes of opening and checking a cohort and writing its obs."""
    settings = Settings.build(preset="small", overrides=driver.SETTINGS)
    rows = np.random.default_rng(0).permutation(count)

    def work() -> None:
        source, _ = driver.opened(folder / f"{count}.zarr", settings)
        for _ in CellTable(source.cells, rows, {}).files():
            pass

    return peak_bytes(work)


def test_a_cell_more_takes_less_of_the_driver_than_promised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cells, "TEXT_ROWS", 4096)  # blocks of text have a fixed size and count once
    monkeypatch.setattr(texts, "TEXT_BLOCK", 4096)
    for count in (5_000, 25_000):  # before memory is counted, since pandas 3 holds text with pyarrow
        driver.write_cohort(tmp_path / f"{count}.zarr", count)
    before, counted = pa.default_memory_pool(), pa.proxy_memory_pool(pa.default_memory_pool())
    pa.set_memory_pool(counted)  # other tests of this process use the default pool
    try:
        few, many = (peak_of_tables(tmp_path, count) for count in (5_000, 25_000))
    finally:
        pa.set_memory_pool(before)
    assert (many - few) / 20_000 < DRIVER_BYTES_PER_CELL
    assert 0 < counted.max_memory() / 25_000 < DRIVER_BYTES_PER_CELL


@pytest.mark.slow
def test_of_a_million_cells_the_whole_job_takes_less_of_the_driver_than_promised(tmp_path: Path) -> None:
    driver.write_cohort(tmp_path / "cohort.zarr", 10**6)
    peaks = driver.measured(tmp_path / "cohort.zarr", tmp_path)
    assert max(peaks.values()) < DRIVER_BYTES_PER_CELL * 10**6, peaks
