"""The input of a training step: one worker's share of a global mini-batch, and the codes of all its cells.

A global mini-batch is cut into blocks of `NOISE_ROWS` cells. A worker owns a run of whole blocks, perhaps none; later
ranks own later blocks. Only the last block of the mini-batch may be short. `MiniBatch` is the share of one worker.
`Labels` adds what follows from the codes of all cells: the sorted structure for sums over groups and clusters, and the groups
padded to one size for the losses inside groups. It is found on the host. Before a GPU's step it is found ahead, padded so
that the shapes are those of the step before, and lies on the device already.
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
"""Pairs of cells, padding included, that are compared at a time, unless one group has more."""
MOST_PADDING = {"cpu": 0.8, "cuda": 0.0}
"""Groups smaller than this share of the largest beside them are compared apart."""
ROWS_TO = {"cpu": 1, "cuda": 256}
"""Rows of the joint tables, of each half, are made a multiple of this."""
MEMBERS_TO = {"cpu": 1, "cuda": 32}
"""Cells of a group that is compared, padding included, are made a multiple of this."""
GROUPS_TO = {"cpu": 1, "cuda": 16}
"""Groups, padding included, are made a multiple of this."""
Thing = TypeVar("Thing")


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
    labels
        Of the global mini-batch, where they were found ahead.
    key
        Of the step's noise, (), int64, where it lies on the device already.
    sent
        What came to the device with this mini-batch, bytes in which the device's tensors but x lie.
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
    sent: Tensor | None = None

    @property
    def blocks(self) -> range:
        """Global numbers of the blocks owned."""
        owned = -(-len(self.x) // NOISE_ROWS)
        return range(self.first_block, self.first_block + owned)


@dataclass(frozen=True)
class Sizes:
    """Least sizes of what is padded for a GPU, whose work is recorded for fixed sizes.

    Attributes
    ----------
    groups, members
        Groups of a mini-batch, and cells of the largest of them.
    low, high
        The (group, low) and (group, high) pairs that occur.
    """

    groups: int = 0
    members: int = 0
    low: int = 0
    high: int = 0

    @classmethod
    def of(cls, labels: Labels) -> Sizes:
        """Return the sizes that labels have."""
        members = max((rows.members.shape[1] for rows in labels.rows), default=0)
        low = labels.segments.low_rows
        return cls(len(labels.group_cells), members, low, labels.segments.rows - low)

    def at_least(self, other: Sizes) -> Sizes:
        """Return the larger of both, each."""
        return Sizes(*(max(getattr(self, f.name), getattr(other, f.name)) for f in fields(self)))


UNPADDED = Sizes()


@dataclass(frozen=True)
class Labels:
    """Codes of all cells of the global mini-batch, the same on every worker but for `first` and `own`.

    The codes lie on the host, whatever device trains; what follows from them and the step reads, on that device.

    Attributes
    ----------
    group
        (global cells,), groups of this mini-batch numbered from 0 without gaps.
    low, high
        (global cells,), cluster labels as they came.
    group_cells
        (groups,), cells of each group, float64; 1 where a group is padding, which has no cells.
    more
        Where groups are padded: how many times as many they are with padding, (), float32.
    condition, batches
        Groups of one condition, and, for every batch covariate, those of one batch.
    within
        For every batch covariate, the batches inside each condition.
    segments
        The (group, low) and (group, high) pairs that occur.
    rows
        The groups in which this worker has a cell, in runs of those that are compared together.
    first, own
        The worker's own cells are global cells `first` to `first + own`.
    """

    group: Tensor
    low: Tensor
    high: Tensor
    group_cells: Tensor
    more: Tensor | None
    condition: Merge
    batches: tuple[Merge, ...]
    within: tuple[Nested, ...]
    segments: Segments
    rows: tuple[GroupRows, ...]
    first: int
    own: int

    @property
    def mine(self) -> slice:
        """The worker's own rows among the global ones."""
        return slice(self.first, self.first + self.own)

    def sent(self, send: Callable[[Tensor], Tensor]) -> Labels:
        """Return the same with what the step reads brought to its device by `send`."""
        names = ("group_cells", "more", "condition", "batches", "within", "segments", "rows")
        parts = with_tensors(tuple(getattr(self, name) for name in names), send)
        return replace(self, **dict(zip(names, parts, strict=True)))


@dataclass(frozen=True)
class Merge:
    """Groups that are added up: (groups,) where each goes, how many sums there are, and `more` of padding as in `Labels`."""

    row: Tensor
    sums: int
    more: Tensor | None = None

    @classmethod
    def by(cls, label: Tensor, sums: int = 0) -> Merge:
        """Return which groups have the same label, (groups,), padded to so many sums."""
        names, row = torch.unique(label, return_inverse=True)
        return cls(row, sums or len(names), _more(sums, len(names)))


@dataclass(frozen=True)
class Nested:
    """Groups that are added up by inner labels inside outer ones, and the outer label of each such pair."""

    pairs: Merge
    outer: Merge

    @classmethod
    def by(cls, outer: Tensor, inner: Tensor, sums: int = 0) -> Nested:
        """Return which groups have the same labels, (groups,) each, padded to so many pairs and outer labels."""
        pairs, row = torch.unique(torch.stack([outer, inner]), dim=1, return_inverse=True)
        of_pair = torch.cat([pairs[0], pairs[0, -1:].expand(max(sums - pairs.shape[1], 0))])
        return cls(Merge(row, len(of_pair), _more(sums, pairs.shape[1])), Merge.by(of_pair, sums))


def _more(padded: int, count: int) -> Tensor | None:
    return torch.tensor(padded / count, dtype=torch.float32) if padded else None


@dataclass(frozen=True)
class GroupRows:
    """Some groups of the mini-batch, padded to one size: own cells that are anchors here, and all cells of the groups.

    Attributes
    ----------
    anchors, members
        Rows of the anchors among own cells, (groups, anchors), and of the members among all cells, (groups, members).
        The same object where all cells are own. Padding is row 0.
    at
        (groups, anchors), rows of the anchors among all cells.
    is_anchor, is_member
        Which of them are no padding.
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

    @property
    def low_order(self) -> Tensor:
        """The (group, low) rows one after the other, as `group_offsets` cuts them."""
        return torch.arange(self.low_rows, device=self.order.device)

    @property
    def rows(self) -> int:
        """Rows of the tables."""
        return len(self.row_group)


def with_tensors(thing: Thing, change: Callable[[Tensor], Tensor]) -> Thing:
    """Return dataclasses and tuples of them with every tensor in them changed; what is one object stays one."""
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

    result: Thing = visit(thing)
    return result


def tensors_of(labels: Labels) -> list[torch.Tensor]:
    """Return the tensors of labels that the step reads, each once."""
    found: list[torch.Tensor] = []

    def note(part: torch.Tensor) -> torch.Tensor:
        found.append(part)
        return part

    labels.sent(note)
    return found


def gather_labels(batch: MiniBatch, collective: Collective) -> Labels:
    """Return the codes of the whole global mini-batch.

    Raises
    ------
    ValueError
        The workers' shares do not follow each other in rank order, or do not add up to `batch.cells`.
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
    return labels_of(everyone[:, 1:], mine, device.type).sent(lambda part: part.to(device, non_blocking=True))


def labels_of(
    codes: Tensor, mine: slice, device: str, *, anchors: slice | None = None, least: Sizes = UNPADDED
) -> Labels:
    """Return what follows from the codes of all cells, on the host.

    Parameters
    ----------
    codes
        (global cells, 4 + covariates), int64: condition, packed group, low and high cluster, and the batches.
    mine
        The worker's own cells among them.
    device
        Type of the device that trains.
    anchors
        Of a worker that has all cells: those that are its anchors. By default its own cells are.
    least
        For a GPU: what is padded is padded to these sizes, where that is enough.
    """
    condition, packed_group, low, high = codes[:, :4].unbind(1)
    names, group, cells = torch.unique(packed_group, return_inverse=True, return_counts=True)
    # Any cell of a group tells the group's condition and batch, since a group is one (batch, condition) pair.
    cell_of_group = torch.zeros_like(names).scatter_(0, group, torch.arange(len(group)))
    # Groups that are padding have no cells; whose condition and batch they have is all the same.
    multiple = GROUPS_TO.get(device, 1)
    padded = up_to(len(names), multiple, least.groups)
    sums = padded if multiple > 1 else 0
    cell_of_group = torch.cat([cell_of_group, cell_of_group[-1:].expand(padded - len(names))])
    conditions, batches = condition[cell_of_group], codes[cell_of_group, 4:].unbind(1)
    compared = rows_of_groups((group, low, high), mine if anchors is None else anchors, device, least=least)
    if anchors is not None:
        compared = (replace(rows, anchors=rows.at) for rows in compared)  # all cells are at hand
    return Labels(
        group=group, low=low, high=high, group_cells=functional.pad(cells, (0, padded - len(cells)), value=1).double(),
        more=_more(sums, len(names)),
        condition=Merge.by(conditions, sums),
        batches=tuple(Merge.by(batch, sums) for batch in batches),
        within=tuple(Nested.by(conditions, batch, sums) for batch in batches),
        segments=find_segments(group, low, high, mine, ROWS_TO.get(device, 1), replace(least, groups=padded)),
        rows=tuple(compared),
        first=mine.start, own=mine.stop - mine.start,
    )  # fmt: skip


def up_to(count: int, multiple: int, least: int = 0) -> int:
    """Return the next multiple, and at least so many."""
    return max(-(-count // multiple) * multiple, least)


def find_segments(
    group: Tensor, low: Tensor, high: Tensor, mine: slice, multiple: int = 1, least: Sizes = UNPADDED
) -> Segments:
    """Return the (group, low) and (group, high) pairs among all cells, and where the cells `mine` belong.

    Parameters
    ----------
    multiple
        Of each half, rows without a cell are added to the last group until there are a multiple of this, and `least`.
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
    """Yield the groups of the mini-batch in which this worker has a cell, in runs of those that are compared together.

    Parameters
    ----------
    cells
        Group, low and high cluster of all cells, (global cells,) each.
    at_once
        Pairs, padding included, that may be compared together; by default as many as suit the device.
    least
        To what cells of a group are padded.
    """
    group, low, high = cells
    groups = int(group.max()) + 1
    everyone, anchoring = _ByGroup.of(group, groups), _ByGroup.of(group[mine], groups)
    own = anchoring.counts.tolist()
    present = [each for each in everyone.counts.argsort(descending=True, stable=True).tolist() if own[each]]
    for run in _alike(present, everyone.counts.tolist(), own, device, at_once):
        multiples, more = MEMBERS_TO.get(device, 1), up_to(len(run), GROUPS_TO.get(device, 1), 0) - len(run)
        members, is_member = everyone.padded(run, multiples, least.members, more)
        alone = mine == slice(0, len(group))
        anchors, is_anchor = (members, is_member) if alone else anchoring.padded(run, multiples, 0, more)
        at = members if alone else anchors + mine.start
        yield GroupRows(
            anchors, members, at, is_anchor, is_member, low[at], high[at], low[members], high[members],
            functional.pad(everyone.counts[run], (0, more), value=1),
        )  # fmt: skip


@dataclass(frozen=True)
class _ByGroup:
    """Rows sorted by group, how many each group has, and where its rows start."""

    order: Tensor
    counts: Tensor
    starts: Tensor

    @classmethod
    def of(cls, group: Tensor, groups: int) -> _ByGroup:
        counts = torch.bincount(group, minlength=groups)
        return cls(group.argsort(stable=True), counts, counts.cumsum(0) - counts)

    def padded(self, groups: list[int], multiple: int, least: int, more: int) -> tuple[Tensor, Tensor]:
        """Return the rows of some groups, and of `more` empty ones, (groups, most rows), and which are no padding."""
        column = torch.arange(up_to(int(self.counts[groups].max()), multiple, least))
        counts, starts = (functional.pad(part[groups], (0, more))[:, None] for part in (self.counts, self.starts))
        filled = column < counts
        return torch.where(filled, self.order[(starts + column) * filled], 0), filled


def _alike(
    groups: list[int], sizes: list[int], own: list[int], device: str, at_once: int | None
) -> Iterator[list[int]]:
    """Cut groups, largest first, in runs of groups of like size that are padded to few enough pairs."""
    most = at_once or PAIRS_AT_ONCE.get(device, PAIRS_AT_ONCE["cpu"])
    smallest = MOST_PADDING.get(device, MOST_PADDING["cpu"])
    run: list[int] = []
    for group in groups:
        if run:
            largest, anchors = sizes[run[0]], max(own[member] for member in [*run, group])
            if (len(run) + 1) * largest * anchors > most or sizes[group] < smallest * largest:
                yield run
                run = []
        run.append(group)
    if run:
        yield run


@dataclass(frozen=True)
class _Pairs:
    """The (group, label) pairs that occur, in order: each cell's pair, and each pair's group and number of cells."""

    row: Tensor
    group: Tensor
    cells: Tensor

    def padded(self, multiple: int, least: int) -> _Pairs:
        """Return the same with pairs without a cell behind, of the last group, a multiple of so many in all."""
        more = up_to(len(self.cells), multiple, least) - len(self.cells)
        return _Pairs(
            self.row, torch.cat([self.group, self.group[-1:].expand(more)]), functional.pad(self.cells, (0, more))
        )


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
