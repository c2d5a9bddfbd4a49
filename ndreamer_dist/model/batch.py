"""The input of a training step: one worker's share of a global mini-batch, and the codes of all its cells.

A global mini-batch is cut into blocks of `NOISE_ROWS` cells. A worker owns a run of whole blocks, perhaps none; later
ranks own later blocks. Only the last block of the mini-batch may be short. `MiniBatch` is the share of one worker.
`Labels` adds the codes of all cells, which the losses inside groups need, and the sorted structure for sums over groups
and clusters.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from ndreamer_dist.model.collectives import Collective
from ndreamer_dist.settings import NOISE_ROWS


@dataclass(frozen=True)
class MiniBatch:
    """A worker's share of one global mini-batch.

    Attributes
    ----------
    x
        Expression, (cells, genes), floating.
    condition, group, low, high
        Codes, (cells,), int64: condition, packed group, and the two cluster labels. On the device of x, or on the host,
        where a GPU need not be waited for to read them.
    batch
        One code per batch covariate, (cells, covariates), int64; no columns where there is no batch.
    first_block
        Number, in the global mini-batch, of the first block owned; of no meaning where no cell is owned.
    step
        Training step, counted from 1.
    cells
        Cells of the global mini-batch, all workers together.
    """

    x: Tensor
    condition: Tensor
    batch: Tensor
    group: Tensor
    low: Tensor
    high: Tensor
    first_block: int
    step: int
    cells: int

    @property
    def blocks(self) -> range:
        """Global numbers of the blocks owned."""
        owned = -(-len(self.x) // NOISE_ROWS)
        return range(self.first_block, self.first_block + owned)


@dataclass(frozen=True)
class Labels:
    """Codes of all cells of the global mini-batch, the same on every worker but for `first` and `own`.

    All but `segments` lie on the host, whatever device trains: what follows from codes alone is found there while the
    device works.

    Attributes
    ----------
    group
        (global cells,), groups of this mini-batch numbered from 0 without gaps.
    low, high
        (global cells,), cluster labels as they came.
    group_cells
        (groups,), cells of each group, float64.
    group_condition, group_batch
        (groups,) and (groups, covariates): the condition and batch codes that make the group.
    segments
        The (group, low) and (group, high) pairs that occur; on the device that trains.
    first, own
        The worker's own cells are global cells `first` to `first + own`.
    """

    group: Tensor
    low: Tensor
    high: Tensor
    group_cells: Tensor
    group_condition: Tensor
    group_batch: Tensor
    segments: Segments
    first: int
    own: int

    @property
    def mine(self) -> slice:
        """The worker's own rows among the global ones."""
        return slice(self.first, self.first + self.own)


@dataclass(frozen=True)
class Segments:
    """Rows of the joint tables of codes and cluster labels: first all (group, low) pairs, then all (group, high) pairs.

    Attributes
    ----------
    row_group
        (rows,), group of each row; ascending inside each of the two halves.
    row_cells
        (rows,), cells of each row over all workers, float64.
    low_rows
        How many of the rows are (group, low) pairs.
    order, offsets
        Own cells in row order, each cell once per half, and where each row starts among them.
    rows_of_cell
        (own cells, 3): a cell's (group, low) row, (group, high) row, and, counted from `rows` on, its group.
    group_offsets
        (groups,), the first (group, low) row of each group.
    """

    row_group: Tensor
    row_cells: Tensor
    low_rows: int
    order: Tensor
    offsets: Tensor
    rows_of_cell: Tensor
    group_offsets: Tensor

    def to(self, device: torch.device) -> Segments:
        """Return the same on another device."""
        names = [field.name for field in fields(self) if field.name != "low_rows"]
        moved: dict[str, Any] = {name: getattr(self, name).to(device, non_blocking=True) for name in names}
        return replace(self, **moved)

    @property
    def low_order(self) -> Tensor:
        """The (group, low) rows one after the other, as `group_offsets` cuts them."""
        return torch.arange(self.low_rows, device=self.order.device)

    @property
    def rows(self) -> int:
        """Rows of the tables."""
        return len(self.row_group)


def gather_labels(batch: MiniBatch, collective: Collective) -> Labels:
    """Return the codes of the whole global mini-batch.

    Raises
    ------
    ValueError
        The workers' shares do not follow each other in rank order, or do not add up to `batch.cells`.
    """
    own = len(batch.x)
    first = batch.first_block * NOISE_ROWS if own else -1
    where = torch.full_like(batch.group, first).add_(torch.arange(own, device=batch.group.device))
    packed = torch.cat([torch.stack([where, batch.condition, batch.group, batch.low, batch.high], 1), batch.batch], 1)
    if collective.world > 1:
        packed = packed.to(batch.x.device)
    everyone = collective.all_gather_rows(packed).cpu()
    _check_shares(everyone[:, 0], batch.cells)
    codes, group, cells = torch.unique(everyone[:, 2], return_inverse=True, return_counts=True)
    # Any cell of a group tells the group's condition and batch, since a group is one (batch, condition) pair.
    cell_of_group = torch.zeros_like(codes).scatter_(0, group, torch.arange(len(group), device=group.device))
    low, high = everyone[:, 3], everyone[:, 4]
    mine = slice(max(first, 0), max(first, 0) + own)
    return Labels(
        group=group, low=low, high=high, group_cells=cells.double(),
        group_condition=everyone[cell_of_group, 1], group_batch=everyone[cell_of_group, 5:],
        segments=find_segments(group, low, high, mine).to(batch.x.device), first=mine.start, own=own,
    )  # fmt: skip


def find_segments(group: Tensor, low: Tensor, high: Tensor, mine: slice) -> Segments:
    """Return the (group, low) and (group, high) pairs among all cells, and where the cells `mine` belong."""
    pairs = [_pairs(group, low), _pairs(group, high)]
    low_rows = len(pairs[0].cells)
    starts = [0, low_rows]
    own = [pair.row[mine] + start for pair, start in zip(pairs, starts, strict=True)]
    row_cells = torch.cat([pair.cells for pair in pairs])
    rows = len(row_cells)
    sizes = torch.bincount(torch.cat(own), minlength=rows)
    return Segments(
        row_group=torch.cat([pair.group for pair in pairs]),
        row_cells=row_cells.double(),
        low_rows=low_rows,
        order=torch.cat([rows_of_own.argsort(stable=True) for rows_of_own in own]),
        offsets=sizes.cumsum(0) - sizes,
        rows_of_cell=torch.stack([*own, group[mine] + rows], 1),
        group_offsets=torch.searchsorted(pairs[0].group, torch.arange(int(group.max()) + 1, device=group.device)),
    )


@dataclass(frozen=True)
class _Pairs:
    """The (group, label) pairs that occur, in order: each cell's pair, and each pair's group and number of cells."""

    row: Tensor
    group: Tensor
    cells: Tensor


def _pairs(group: Tensor, label: Tensor) -> _Pairs:
    names, dense = torch.unique(label, return_inverse=True)
    found, row, cells = torch.unique(group * len(names) + dense, return_inverse=True, return_counts=True)
    return _Pairs(row=row, group=torch.div(found, len(names), rounding_mode="floor"), cells=cells)


def _check_shares(positions: Tensor, cells: int) -> None:
    if not torch.equal(positions, torch.arange(cells, device=positions.device)):
        msg = (
            f"the workers' shares hold {len(positions)} cells that are not the {cells} of the mini-batch in order: "
            f"each rank must own whole blocks of {NOISE_ROWS}, after those of the ranks before it"
        )
        raise ValueError(msg)
