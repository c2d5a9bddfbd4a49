"""Rows are read in any order from as few chunks as possible, and damage is an error that names the chunk."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ndreamer_dist import keys
from ndreamer_dist.cohort.packed import Packed, write_csr
from ndreamer_dist.errors import StoreError
from ndreamer_dist.training.rows import Stretch, read_rows, stretches
from tests.cohorts import packed_cohort


@pytest.fixture(scope="module", params=[pytest.param(None, id="a_chunk_a_block"), pytest.param(50, id="small_chunks")])
def packed(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Packed:
    """A cohort of six blocks, one of them empty, in chunks of the parametrised size."""
    packed = packed_cohort(tmp_path_factory.mktemp("rows"), cells=(300, 90), genes=20, block_rows=70)
    for block in range(packed.n_blocks):
        rows = packed.block(block)
        if block == 2:
            rows = rows[:, :0].copy()
            rows.resize((rows.shape[0], packed.n_genes))
        write_csr(packed.storage, f"{keys.PACKED_X}/{keys.block_name(block)}", rows, chunk=request.param)
    return packed


@settings(max_examples=30, deadline=None)
@given(
    runs=st.lists(st.tuples(st.integers(0, 389), st.integers(1, 90)), max_size=12),
)
def test_rows_come_in_the_order_asked_for(packed: Packed, runs: list[tuple[int, int]]) -> None:
    rows = np.concatenate([np.zeros(0, dtype=np.int64), *(np.arange(a, min(a + n, 390)) for a, n in runs)])
    everything = packed.rows(0, packed.n_rows)
    found = read_rows(packed, rows)
    assert found.shape == (len(rows), packed.n_genes)
    expected = everything[rows]
    for part in ("data", "indices", "indptr"):
        assert np.array_equal(getattr(found, part), getattr(expected, part))


def test_stretches_end_at_gaps_and_at_blocks() -> None:
    rows = np.array([98, 99, 100, 101, 7, 8, 100])
    assert stretches(rows, 100) == {
        0: [Stretch(0, 98, 2), Stretch(4, 7, 2)],
        1: [Stretch(2, 0, 2), Stretch(6, 0, 1)],
    }


def test_only_chunks_that_hold_wanted_values_are_read(tmp_path: Path) -> None:
    packed = packed_cohort(tmp_path, cells=(140,), genes=20, block_rows=70)
    write_csr(packed.storage, f"{keys.PACKED_X}/{keys.block_name(0)}", packed.block(0), chunk=50)
    last = packed.block(0).nnz // 50
    Path(packed.storage.path(f"{keys.PACKED_X}/{keys.block_name(0)}/{keys.DATA}/c/{last}")).unlink()
    Path(packed.storage.path(f"{keys.PACKED_X}/{keys.block_name(1)}/{keys.DATA}/c/0")).unlink()
    assert read_rows(packed, np.arange(5)).shape == (5, 20)
    with pytest.raises(StoreError, match=rf"00000/data'?, chunk \({last},\) is missing"):
        read_rows(packed, np.arange(60, 70))
    with pytest.raises(StoreError, match=r"00001/data'?, chunk \(0,\) is missing"):
        read_rows(packed, np.arange(70, 75))


@pytest.mark.parametrize("part", [keys.DATA, keys.INDICES, keys.INDPTR])
def test_a_flipped_bit_is_an_error_that_names_the_chunk(tmp_path: Path, part: str) -> None:
    packed = packed_cohort(tmp_path, cells=(140,), genes=20, block_rows=70)
    chunk = Path(packed.storage.path(f"{keys.PACKED_X}/{keys.block_name(1)}/{part}/c/0"))
    data = bytearray(chunk.read_bytes())
    data[len(data) // 2] ^= 4
    chunk.write_bytes(data)
    with pytest.raises(StoreError, match=rf"X/00001/{part}'?, chunk \(0,\) is damaged"):
        read_rows(packed, np.arange(69, 71))


def test_a_block_that_is_not_there_is_named(tmp_path: Path) -> None:
    packed = packed_cohort(tmp_path, cells=(140,), genes=20, block_rows=70)
    packed.storage.delete(f"{keys.PACKED_X}/{keys.block_name(1)}")
    with pytest.raises(StoreError, match=r"X/00001/indptr' cannot be opened"):
        read_rows(packed, np.arange(140))


def test_processes_that_only_read_load_no_torch() -> None:
    code = "import sys; import ndreamer_dist.training.windows; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
