"""Streaming mini-batches from packed.zarr: a Ray Data `Datasource` that executes the sampling plan.

A read task covers a window of steps. It reads every row block that the window touches once, takes the worker's share
of each step from it and yields one Arrow row per step: the rows' CSR and their packed row numbers. The training loop
turns that into a dense `MiniBatch` on its device, with labels it looks up by row. The same windows, read in this
process, serve the serial runtime.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from ray.data import DataContext
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask
from scipy import sparse

from ndreamer_dist import keys
from ndreamer_dist.cohort.packed import Packed
from ndreamer_dist.model.batch import MiniBatch
from ndreamer_dist.stream.plan import SamplingPlan

WINDOW_STEPS = 8
"""A read task covers the whole epochs that make at least this many steps, so that no block is read twice for them."""
LONGEST_WINDOW = 64
"""Most steps of a window: it bounds what a read task holds where the groups, and so the steps of an epoch, are many."""


@dataclass(frozen=True)
class Share:
    """A worker's share of one step, still sparse."""

    step: int
    rows: np.ndarray  # (cells,) packed rows
    x: sparse.csr_matrix  # (cells, genes)


def windows(plan: SamplingPlan, first_step: int) -> list[range]:
    """Cut the steps from `first_step` on into the ranges that one read task covers."""
    epochs = -(-WINDOW_STEPS // plan.steps_per_epoch)
    length = min(epochs * plan.steps_per_epoch, LONGEST_WINDOW)
    edges = [first_step, *range((first_step // length + 1) * length, plan.steps, length), plan.steps]
    return [range(a, b) for a, b in itertools.pairwise(edges) if b > a]


def read_window(packed: Packed, plan: SamplingPlan, steps: range, rank: int, world: int) -> Iterator[Share]:
    """Read a worker's shares of a window of steps, in step order; each touched block is read once.

    Memory: the rows of the window, sparse, and one block.
    """
    wanted = [plan.share_rows(step, rank, world) for step in steps]
    unique = np.unique(np.concatenate(wanted))
    blocks = unique // packed.block_rows
    parts = [
        packed.block(int(block))[unique[blocks == block] - block * packed.block_rows] for block in np.unique(blocks)
    ]
    rows = sparse.vstack(parts, format="csr") if parts else sparse.csr_matrix((0, packed.n_genes), dtype=np.float32)
    for step, share in zip(steps, wanted, strict=True):
        yield Share(step, share, rows[np.searchsorted(unique, share)])


def to_arrow(share: Share) -> pa.Table:
    """Return a share as a table of one row, its arrays as list columns."""
    lists = {
        "rows": share.rows.astype(np.int64),
        keys.INDPTR: share.x.indptr.astype(np.int64),
        keys.INDICES: share.x.indices.astype(np.int32),
        keys.DATA: share.x.data.astype(np.float32),
    }
    columns: dict[str, pa.Array] = {"step": pa.array([share.step], pa.int64())}
    for name, values in lists.items():
        columns[name] = pa.LargeListArray.from_arrays(pa.array([0, len(values)], pa.int64()), pa.array(values))
    return pa.table(columns)


def from_arrow(table: pa.Table, genes: int) -> Share:
    """Read what `to_arrow` gave, without copying the arrays."""
    lists = {
        name: table.column(name).combine_chunks().flatten().to_numpy(zero_copy_only=False)
        for name in ("rows", keys.INDPTR, keys.INDICES, keys.DATA)
    }
    x = sparse.csr_matrix(
        (lists[keys.DATA], lists[keys.INDICES], lists[keys.INDPTR]), shape=(len(lists["rows"]), genes), copy=False
    )
    return Share(int(table.column("step")[0].as_py()), lists["rows"], x)


class PlanSource(Datasource):
    """A worker's shares of every step from `first_step` on, one Arrow row per step, in order."""

    def __init__(self, packed: Packed, plan: SamplingPlan, *, rank: int, world: int, first_step: int) -> None:
        super().__init__()
        self._packed = packed
        self._plan = plan
        self._place = (rank, world)
        self._first_step = first_step

    def estimate_inmemory_data_size(self) -> int | None:
        """Return nothing: the number of stored values is known only to the blocks."""
        return None

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: DataContext | None = None
    ) -> list[ReadTask]:
        """Return one task per window of steps, whatever parallelism is asked for: the windows are the plan's."""
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
    return (to_arrow(share) for share in read_window(packed, plan, steps, rank, world))


@dataclass(frozen=True)
class RowLabels:
    """What the losses need to know of every packed row: 8 bytes per cell and the groups' tables."""

    group_starts: np.ndarray  # (groups + 1,)
    group_condition: np.ndarray  # (groups,)
    group_batch: np.ndarray  # (groups, covariates)
    low: np.ndarray  # (rows,) int32
    high: np.ndarray  # (rows,) int32

    @classmethod
    def of(cls, packed: Packed) -> RowLabels:
        """Read the labels of a packed cohort."""
        design = packed.design
        return cls(
            design.starts,
            design.group_conditions,
            design.group_batch_codes,
            packed.clusters(keys.PACKED_LOW),
            packed.clusters(keys.PACKED_HIGH),
        )


def densify(share: Share, labels: RowLabels, plan: SamplingPlan, place: tuple[int, int], device: Any) -> MiniBatch:
    """Turn a sparse share into a mini-batch on a device; what travels there is the sparse form."""
    group = np.searchsorted(labels.group_starts, share.rows, side="right") - 1

    def send(values: np.ndarray) -> torch.Tensor:
        return torch.tensor(values).to(device, torch.int64, non_blocking=True)

    counts = send(np.diff(share.x.indptr))
    x = torch.zeros(share.x.shape, dtype=torch.float32, device=device)
    row = torch.repeat_interleave(torch.arange(len(share.rows), device=device), counts)
    x[row, send(share.x.indices)] = torch.tensor(share.x.data).to(device, non_blocking=True)
    own = plan.share(share.step, *place)
    return MiniBatch(
        x=x,
        condition=send(labels.group_condition[group]),
        batch=send(labels.group_batch[group]),
        group=send(group),
        low=send(labels.low[share.rows]),
        high=send(labels.high[share.rows]),
        first_block=own.start,
        step=share.step + 1,  # the loop's steps count from 0, the method's from 1
        cells=plan.cells(share.step),
    )
