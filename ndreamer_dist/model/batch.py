"""The input of a training step: one worker's share of a global mini-batch, and the labels of all cells in it.

A global mini-batch is cut into blocks of `NOISE_ROWS` cells; only its last block may be short. Each worker owns zero or
more consecutive whole blocks, in rank order. `MiniBatch` is the share of one worker. `Labels` holds what the losses
derive from the labels of all cells: the index structure for sums over groups and clusters, and the groups padded to a
common size for the losses inside groups. `Labels` is computed on the host. For a GPU it is computed ahead of the step,
padded so that tensor shapes stay the same from step to step, and sent to the device together with the mini-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from ndreamer_dist.model.collectives import Collective
from ndreamer_dist.settings import NOISE_ROWS

PAIRS_AT_ONCE = {"cpu": 2**18, "cuda": 2**26}
"""Cell pairs, padding included, that are compared at a time; a single group may exceed it."""
LEAST_RELATIVE_SIZE = {"cpu": 0.8, "cuda": 0.0}
"""Groups are compared together only if the smallest has at least this fraction of the largest group's cells."""
ROW_MULTIPLE = {"cpu": 1, "cuda": 256}
"""The row count of each half of the joint tables is padded to a multiple of this."""
MEMBER_MULTIPLE = {"cpu": 1, "cuda": 32}
"""The number of cells per group is padded to a multiple of this in the losses inside groups."""
GROUP_MULTIPLE = {"cpu": 1, "cuda": 16}
"""The number of groups is padded to a multiple of this."""
Nest = TypeVar("Nest")


@dataclass(frozen=True)
class MiniBatch:
    """A worker's share of one global mini-batch.

    Attributes
    ----------
    x
        Expression, (cells, genes), floating.
    condition, group, low, high
        Codes, (cells,), int64: condition, packed group, and the two cluster labels. On the device of `x`, or on the
        host, where reading them does not wait for the GPU.
    batch
        One code per batch covariate, (cells, covariates), int64; no columns without a batch covariate.
    first_block
        Index of the first owned block in the global mini-batch; undefined if the worker owns no cell.
    step
        Training step, counted from 1.
    cells
        Number of cells of the global mini-batch, over all workers.
    labels
        Labels of the global mini-batch if computed ahead of the step, else None.
    key
        Key of the step's noise, (), int64, on the device; None if the step computes it.
    device_bytes
        Bytes on the device that hold all of its tensors except `x`; None if they were not sent in one copy.
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
    labels: Labels | None = None
    key: Tensor | None = None
    device_bytes: Tensor | None = None

    @property
    def blocks(self) -> range:
        """Indices of the owned blocks in the global mini-batch."""
        owned = -(-len(self.x) // NOISE_ROWS)
        return range(self.first_block, self.first_block + owned)


@dataclass(frozen=True)
class Sizes:
    """Minimum sizes to pad labels to, since a CUDA graph needs fixed shapes.

    Attributes
    ----------
    groups, members
        Number of groups of a mini-batch, and of cells in its largest group.
    low, high
        Number of (group, low) and of (group, high) pairs that occur.
    """

    groups: int = 0
    members: int = 0
    low: int = 0
    high: int = 0

    @classmethod
    def of(cls, labels: Labels) -> Sizes:
        """Return the sizes of some labels."""
        members = max((rows.members.shape[1] for rows in labels.rows), default=0)
        low = labels.segments.low_rows
        return cls(len(labels.group_cells), members, low, labels.segments.rows - low)

    def at_least(self, other: Sizes) -> Sizes:
        """Return the element-wise maximum of both."""
        return Sizes(*(max(getattr(self, f.name), getattr(other, f.name)) for f in fields(self)))


UNPADDED = Sizes()


@dataclass(frozen=True)
class Labels:
    """Labels of all cells of the global mini-batch, and the index structure that the losses derive from them.

    `group`, `low` and `high` lie on the host on any device; the tensors that the step reads lie on the training device.
    `segments`, `rows`, `first` and `own` differ between workers.

    Attributes
    ----------
    group
        (global cells,), index of each cell's group among the groups of this mini-batch.
    low, high
        (global cells,), cluster labels.
    group_cells
        (groups,), cells of each group, float64; 1 for padding groups, which have no cells.
    padding_ratio
        Number of groups with padding divided by that without, (), float32; None without padding.
    condition, batches
        Merges of the groups by condition, and by each batch covariate.
    within
        For every batch covariate, merge of the groups by batch inside each condition.
    segments
        The (group, low) and (group, high) pairs that occur.
    rows
        The groups that hold a cell of this worker, in sets that are compared together.
    first, own
        The worker owns the global cells `first` to `first + own`.
    """

    group: Tensor
    low: Tensor
    high: Tensor
    group_cells: Tensor
    padding_ratio: Tensor | None
    condition: Merge
    batches: tuple[Merge, ...]
    within: tuple[Nested, ...]
    segments: Segments
    rows: tuple[GroupRows, ...]
    first: int
    own: int

    @property
    def mine(self) -> slice:
        """Slice of the worker's own cells among the global ones."""
        return slice(self.first, self.first + self.own)

    def moved(self, move: Callable[[Tensor], Tensor]) -> Labels:
        """Return a copy in which `move` was applied to every tensor that the step reads."""
        names = ("group_cells", "padding_ratio", "condition", "batches", "within", "segments", "rows")
        parts = with_tensors(tuple(getattr(self, name) for name in names), move)
        return replace(self, **dict(zip(names, parts, strict=True)))


@dataclass(frozen=True)
class Merge:
    """A map of groups to the sums they are added to.

    Attributes
    ----------
    row
        (groups,), index of the sum that each group is added to.
    sums
        Number of sums, padding included.
    padding_ratio
        `sums` divided by its value without padding, as `Labels.padding_ratio`.
    """

    row: Tensor
    sums: int
    padding_ratio: Tensor | None = None

    @classmethod
    def by(cls, label: Tensor, sums: int = 0) -> Merge:
        """Merge groups by their labels, (groups,), padded to `sums` sums."""
        names, row = torch.unique(label, return_inverse=True)
        return cls(row, sums or len(names), _padding_ratio(sums, len(names)))


@dataclass(frozen=True)
class Nested:
    """Merges of groups by pairs of outer and inner label, and of these pairs by outer label."""

    pairs: Merge
    outer: Merge

    @classmethod
    def by(cls, outer: Tensor, inner: Tensor, sums: int = 0) -> Nested:
        """Merge groups by their labels, (groups,) each, padded to `sums` pairs and `sums` outer labels."""
        pairs, row = torch.unique(torch.stack([outer, inner]), dim=1, return_inverse=True)
        of_pair = torch.cat([pairs[0], pairs[0, -1:].expand(max(sums - pairs.shape[1], 0))])
        return cls(Merge(row, len(of_pair), _padding_ratio(sums, pairs.shape[1])), Merge.by(of_pair, sums))


def _padding_ratio(padded: int, count: int) -> Tensor | None:
    return torch.tensor(padded / count, dtype=torch.float32) if padded else None


@dataclass(frozen=True)
class GroupRows:
    """Some groups of the mini-batch, padded to a common size: the worker's cells are anchors, all cells are members.

    Attributes
    ----------
    anchors
        (groups, anchors), rows of the anchors among the worker's cells; padding is row 0.
    members
        (groups, members), rows of the members among all cells; padding is row 0. The same object as `anchors` if the
        worker owns all cells.
    at
        (groups, anchors), rows of the anchors among all cells.
    is_anchor, is_member
        False for padding.
    anchor_low, anchor_high, low, high
        Cluster labels of anchors and members.
    sizes
        (groups,), cells of each group over all workers.
    """

    anchors: Tensor
    members: Tensor
    at: Tensor
    is_anchor: Tensor
    is_member: Tensor
    anchor_low: Tensor
    anchor_high: Tensor
    low: Tensor
    high: Tensor
    sizes: Tensor


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
        Number of (group, low) rows.
    order
        (2 * own cells,), the worker's cells sorted by row; each cell occurs once per half.
    offsets
        (rows,), start of each row in `order`.
    rows_of_cell
        (own cells, 3): the (group, low) row and the (group, high) row of each cell, and `rows` plus its group.
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

    @property
    def low_order(self) -> Tensor:
        """Indices of the (group, low) rows; `group_offsets` cuts them into groups."""
        return torch.arange(self.low_rows, device=self.order.device)

    @property
    def rows(self) -> int:
        """Number of rows of the tables."""
        return len(self.row_group)


def with_tensors(nest: Nest, change: Callable[[Tensor], Tensor]) -> Nest:
    """Apply a function to every tensor of nested dataclasses and tuples; a tensor that occurs twice is changed once."""
    changed: dict[int, Tensor] = {}

    def visit(part: Any) -> Any:
        if isinstance(part, Tensor):
            if id(part) not in changed:
                changed[id(part)] = change(part)
            return changed[id(part)]
        if isinstance(part, tuple):
            return tuple(visit(each) for each in part)
        if is_dataclass(part) and not isinstance(part, type):
            return replace(part, **{field.name: visit(getattr(part, field.name)) for field in fields(part)})
        return part

    result: Nest = visit(nest)
    return result


def tensors_of(labels: Labels) -> list[torch.Tensor]:
    """Return the tensors of labels that the step reads, without repetition."""
    tensors: list[torch.Tensor] = []

    def note(part: torch.Tensor) -> torch.Tensor:
        tensors.append(part)
        return part

    labels.moved(note)
    return tensors


def gather_labels(batch: MiniBatch, collective: Collective) -> Labels:
    """Return the labels of the global mini-batch, gathered from all workers unless they were computed ahead.

    Raises
    ------
    ValueError
        The workers' shares are not consecutive in rank order, or do not add up to `batch.cells`.
    """
    if batch.labels is not None:
        return batch.labels
    own = len(batch.x)
    first = batch.first_block * NOISE_ROWS if own else -1
    where = torch.full_like(batch.group, first).add_(torch.arange(own, device=batch.group.device))
    packed = torch.cat([torch.stack([where, batch.condition, batch.group, batch.low, batch.high], 1), batch.batch], 1)
    if collective.world > 1:
        packed = packed.to(batch.x.device)
    everyone = collective.all_gather_rows(packed).cpu()
    _check_shares(everyone[:, 0], batch.cells)
    mine, device = slice(max(first, 0), max(first, 0) + own), batch.x.device
    return labels_of(everyone[:, 1:], mine, device.type).moved(lambda part: part.to(device, non_blocking=True))


def labels_of(
    codes: Tensor, mine: slice, device: str, *, anchors: slice | None = None, least: Sizes = UNPADDED
) -> Labels:
    """Compute `Labels` from the codes of all cells, on the host.

    Parameters
    ----------
    codes
        (global cells, 4 + covariates), int64: condition, packed group, low and high cluster, and the batches.
    mine
        Slice of the worker's own cells.
    device
        Type of the training device.
    anchors
        Slice of the worker's anchors if it owns all cells but shares the anchors; `mine` by default.
    least
        Minimum sizes to pad to on a GPU.
    """
    condition, packed_group, low, high = codes[:, :4].unbind(1)
    names, group, cells = torch.unique(packed_group, return_inverse=True, return_counts=True)
    # A group is one (batch, condition) pair, so any of its cells gives the condition and batch of the group.
    cell_of_group = torch.zeros_like(names).scatter_(0, group, torch.arange(len(group)))
    # Padding groups have no cells, so they may take the condition and batch of any group.
    multiple = GROUP_MULTIPLE.get(device, 1)
    padded = up_to(len(names), multiple, least.groups)
    sums = padded if multiple > 1 else 0
    cell_of_group = torch.cat([cell_of_group, cell_of_group[-1:].expand(padded - len(names))])
    conditions, batches = condition[cell_of_group], codes[cell_of_group, 4:].unbind(1)
    compared = rows_of_groups((group, low, high), mine if anchors is None else anchors, device, least=least)
    if anchors is not None:
        compared = (replace(rows, anchors=rows.at) for rows in compared)  # the worker owns all cells
    return Labels(
        group=group, low=low, high=high, group_cells=functional.pad(cells, (0, padded - len(cells)), value=1).double(),
        padding_ratio=_padding_ratio(sums, len(names)),
        condition=Merge.by(conditions, sums),
        batches=tuple(Merge.by(batch, sums) for batch in batches),
        within=tuple(Nested.by(conditions, batch, sums) for batch in batches),
        segments=find_segments(group, low, high, mine, ROW_MULTIPLE.get(device, 1), replace(least, groups=padded)),
        rows=tuple(compared),
        first=mine.start, own=mine.stop - mine.start,
    )  # fmt: skip


def up_to(count: int, multiple: int, least: int = 0) -> int:
    """Round a count up to a multiple, and to at least `least`."""
    return max(-(-count // multiple) * multiple, least)


def find_segments(
    group: Tensor, low: Tensor, high: Tensor, mine: slice, multiple: int = 1, least: Sizes = UNPADDED
) -> Segments:
    """Return the (group, low) and (group, high) pairs among all cells, and the rows of the worker's cells `mine`.

    Parameters
    ----------
    multiple, least
        Each half is padded with empty rows of the last group to a multiple of `multiple`, and to the sizes `least`.
    """
    pairs = [_pairs(group, low).padded(multiple, least.low), _pairs(group, high).padded(multiple, least.high)]
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
        group_offsets=torch.searchsorted(pairs[0].group, torch.arange(max(least.groups, int(group.max()) + 1))),
    )


def rows_of_groups(
    cells: tuple[Tensor, Tensor, Tensor],
    mine: slice,
    device: str,
    *,
    at_once: int | None = None,
    least: Sizes = UNPADDED,
) -> Iterator[GroupRows]:
    """Yield the groups that hold a cell of this worker, in sets that are compared together.

    Parameters
    ----------
    cells
        Group, low and high cluster of all cells, (global cells,) each.
    at_once
        Largest number of pairs to compare together, padding included; by default `PAIRS_AT_ONCE` of the device.
    least
        Minimum number of cells to pad a group to.
    """
    group, low, high = cells
    groups = int(group.max()) + 1
    everyone, anchoring = _ByGroup.of(group, groups), _ByGroup.of(group[mine], groups)
    own = anchoring.counts.tolist()
    present = [each for each in everyone.counts.argsort(descending=True, stable=True).tolist() if own[each]]
    for run in _runs_of_like_size(present, everyone.counts.tolist(), own, device, at_once):
        multiples, empty = MEMBER_MULTIPLE.get(device, 1), up_to(len(run), GROUP_MULTIPLE.get(device, 1), 0) - len(run)
        members, is_member = everyone.padded(run, multiples, least.members, empty)
        alone = mine == slice(0, len(group))
        anchors, is_anchor = (members, is_member) if alone else anchoring.padded(run, multiples, 0, empty)
        at = members if alone else anchors + mine.start
        yield GroupRows(
            anchors, members, at, is_anchor, is_member, low[at], high[at], low[members], high[members],
            functional.pad(everyone.counts[run], (0, empty), value=1),
        )  # fmt: skip


@dataclass(frozen=True)
class _ByGroup:
    """Cells sorted by group, the number of cells of each group, and where each group starts."""

    order: Tensor
    counts: Tensor
    starts: Tensor

    @classmethod
    def of(cls, group: Tensor, groups: int) -> _ByGroup:
        counts = torch.bincount(group, minlength=groups)
        return cls(group.argsort(stable=True), counts, counts.cumsum(0) - counts)

    def padded(self, groups: list[int], multiple: int, least: int, empty: int) -> tuple[Tensor, Tensor]:
        """Return the cells of `groups` and of `empty` empty groups, (groups, largest size), and which are no padding."""
        column = torch.arange(up_to(int(self.counts[groups].max()), multiple, least))
        counts, starts = (functional.pad(part[groups], (0, empty))[:, None] for part in (self.counts, self.starts))
        filled = column < counts
        return torch.where(filled, self.order[(starts + column) * filled], 0), filled


def _runs_of_like_size(
    groups: list[int], sizes: list[int], own: list[int], device: str, at_once: int | None
) -> Iterator[list[int]]:
    """Cut groups, sorted by descending size, into runs of similar size that hold at most `at_once` padded pairs."""
    limit = at_once or PAIRS_AT_ONCE.get(device, PAIRS_AT_ONCE["cpu"])
    fraction = LEAST_RELATIVE_SIZE.get(device, LEAST_RELATIVE_SIZE["cpu"])
    run: list[int] = []
    for group in groups:
        if run:
            largest, anchors = sizes[run[0]], max(own[member] for member in [*run, group])
            if (len(run) + 1) * largest * anchors > limit or sizes[group] < fraction * largest:
                yield run
                run = []
        run.append(group)
    if run:
        yield run


@dataclass(frozen=True)
class _Pairs:
    """The sorted (group, label) pairs that occur: the pair of each cell, and the group and cell count of each pair."""

    row: Tensor
    group: Tensor
    cells: Tensor

    def padded(self, multiple: int, least: int) -> _Pairs:
        """Return a copy with empty pairs of the last group appended, up to a multiple of `multiple` and to `least`."""
        empty = up_to(len(self.cells), multiple, least) - len(self.cells)
        return _Pairs(
            self.row, torch.cat([self.group, self.group[-1:].expand(empty)]), functional.pad(self.cells, (0, empty))
        )


def _pairs(group: Tensor, label: Tensor) -> _Pairs:
    names, dense = torch.unique(label, return_inverse=True)
    pairs, row, cells = torch.unique(group * len(names) + dense, return_inverse=True, return_counts=True)
    return _Pairs(row=row, group=torch.div(pairs, len(names), rounding_mode="floor"), cells=cells)


def _check_shares(positions: Tensor, cells: int) -> None:
    if not torch.equal(positions, torch.arange(cells, device=positions.device)):
        msg = (
            f"the workers' shares hold {len(positions)} cells that are not the {cells} of the mini-batch in order: "
            f"each rank must own whole blocks of {NOISE_ROWS}, after those of the ranks before it"
        )
        raise ValueError(msg)
