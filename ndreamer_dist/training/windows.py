"""A Ray Data `Datasource` that executes the sampling plan on packed.zarr.

A read task covers a window of steps. It reads the rows of the window once, assembles the worker's share of each step,
and yields one Arrow table with a row per step: the CSR of the cells and their packed row numbers. The training process
turns each row into a `MiniBatch` (`densify`). The serial runtime reads the same windows in its own process.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
from ray.data import DataContext
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask
from scipy import sparse

from ndreamer_dist import keys
from ndreamer_dist.cohort.packed import Packed
from ndreamer_dist.training.rows import read_rows
from ndreamer_dist.training.sampling import SamplingPlan

WINDOW_STEPS = 8
"""Least number of steps of a window; it is rounded up to whole epochs, so that an epoch reads no block twice."""
LONGEST_WINDOW = 64
"""Largest number of steps of a window; it bounds the memory of a read task if epochs are long (many groups)."""


@dataclass(frozen=True)
class Share:
    """A worker's share of one step, still sparse."""

    step: int
    rows: np.ndarray  # (cells,) packed rows
    x: Any  # (cells, genes) CSR, or the whole packed matrix on a GPU (`densify.Resident`)


@dataclass(frozen=True)
class Window:
    """A worker's shares of some steps, concatenated."""

    steps: range
    cuts: np.ndarray  # (steps + 1,) start of each step's cells
    rows: np.ndarray  # (cells of all steps,) packed rows
    x: sparse.csr_matrix  # (cells of all steps, genes)

    def shares(self) -> Iterator[Share]:
        """Yield each step's share, in order."""
        for step, (start, stop) in zip(self.steps, itertools.pairwise(self.cuts.tolist()), strict=True):
            yield Share(step, self.rows[start:stop], _row_view(self.x, start, stop))


def _row_view(x: sparse.csr_matrix, start: int, stop: int) -> sparse.csr_matrix:
    """Return some rows of a CSR without copying their values; slicing would copy them."""
    first, last = x.indptr[start], x.indptr[stop]
    parts = x.data[first:last], x.indices[first:last], x.indptr[start : stop + 1] - first
    return sparse.csr_matrix(parts, shape=(stop - start, x.shape[1]), copy=False)


def windows(plan: SamplingPlan, first_step: int) -> list[range]:
    """Cut the steps from `first_step` on into windows, one per read task."""
    epochs = -(-WINDOW_STEPS // plan.steps_per_epoch)
    length = min(epochs * plan.steps_per_epoch, LONGEST_WINDOW)
    edges = [first_step, *range((first_step // length + 1) * length, plan.steps, length), plan.steps]
    return [range(a, b) for a, b in itertools.pairwise(edges) if b > a]


def read_window(packed: Packed, plan: SamplingPlan, steps: range, rank: int, world: int) -> Iterator[Share]:
    """Read a worker's shares of a window of steps, in step order; each chunk is read once.

    Memory: the sparse rows of the window, and the chunks of a few blocks.
    """
    yield from load_window(packed, plan, steps, rank, world).shares()


def load_window(packed: Packed, plan: SamplingPlan, steps: range, rank: int, world: int) -> Window:
    """Read a worker's shares of a window of steps as one `Window`."""
    wanted = [plan.share_rows(step, rank, world) for step in steps]
    rows = np.concatenate(wanted)
    cuts = np.concatenate([[0], np.cumsum([len(share) for share in wanted])])
    return Window(steps, cuts, rows, read_rows(packed, rows))


def to_arrow(window: Window) -> pa.Table:
    """Return a window as a table with one row per step and list columns, without copying arrays."""
    entries = window.x.indptr[window.cuts]
    columns = {
        "rows": (window.cuts, window.rows.astype(np.int64, copy=False)),
        "counts": (window.cuts, np.diff(window.x.indptr).astype(np.int32, copy=False)),
        keys.INDICES: (entries, window.x.indices.astype(np.int32, copy=False)),
        keys.DATA: (entries, window.x.data.astype(np.float32, copy=False)),
    }
    lists = {
        name: pa.LargeListArray.from_arrays(pa.array(cuts, pa.int64()), pa.array(values))
        for name, (cuts, values) in columns.items()
    }
    return pa.table({"step": pa.array(window.steps, pa.int64()), **lists})


def from_arrow(table: pa.Table, genes: int) -> Share:
    """Return the share in a table of one row (see `to_arrow`), without copying arrays."""
    rows, counts, indices, data = (
        table.column(name).combine_chunks().flatten().to_numpy(zero_copy_only=True)
        for name in ("rows", "counts", keys.INDICES, keys.DATA)
    )
    indptr = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
    x = sparse.csr_matrix((data, indices, indptr), shape=(len(rows), genes), copy=False)
    return Share(int(table.column("step")[0].as_py()), rows, x)


class PlanSource(Datasource):
    """Ray Data source of a worker's shares of all steps from `first_step` on: one Arrow row per step, in order."""

    def __init__(self, packed: Packed, plan: SamplingPlan, *, rank: int, world: int, first_step: int) -> None:
        super().__init__()
        self._packed = packed
        self._plan = plan
        self._place = (rank, world)
        self._first_step = first_step

    def estimate_inmemory_data_size(self) -> int | None:
        """Return None: the number of stored values is not known before blocks are read."""
        return None

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: DataContext | None = None
    ) -> list[ReadTask]:
        """Return one task per window of steps; the plan determines the windows, so `parallelism` is ignored."""
        del parallelism, data_context
        return [
            ReadTask(
                partial(_read_tables, self._packed, self._plan, steps, *self._place),
                BlockMetadata(num_rows=len(steps), size_bytes=None, input_files=None, exec_stats=None),
                per_task_row_limit=per_task_row_limit,
            )
            for steps in windows(self._plan, self._first_step)
        ]


def _read_tables(packed: Packed, plan: SamplingPlan, steps: range, rank: int, world: int) -> Iterable[pa.Table]:
    yield to_arrow(load_window(packed, plan, steps, rank, world))
