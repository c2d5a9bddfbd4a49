"""The averages of expression from which every effect is computed (METHOD section 6). Pure.

Input: rows and distances of matches, and expression in blocks of packed rows. Output: the expected expression F of any
cells under any condition, and the layers. A cell sums its counterparts in float64, in the order of their packed rows, so
the same question has the same bits however the work is cut. Stored layers and layers on demand both come from here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from scipy import sparse

from ndreamer_dist import keys
from ndreamer_dist.cohort.design import Design, Group
from ndreamer_dist.effects.rounding import rounded

Edges = Mapping[tuple[int, int], tuple[np.ndarray, np.ndarray]]
"""Rows and distances, (cells, k) each, by (query group, target group)."""


@dataclass(frozen=True)
class Average:
    """Which rows are averaged for each cell: the sum over entries of weight times row, divided by `groups`.

    Attributes
    ----------
    cell, row, weight
        (entries,) place of the cell among those asked for, packed row of its counterpart, float64 weight.
    groups
        (cells,) number of groups averaged over; 0 where the average is not wanted.
    """

    cell: np.ndarray
    row: np.ndarray
    weight: np.ndarray
    groups: np.ndarray


@dataclass(frozen=True)
class Term:
    """An average that a question needs.

    Attributes
    ----------
    condition
        Over which condition's groups; by default each cell's own.
    without
        Condition whose cells are not asked, if any.
    denoised
        Whether it is over `denoise.neighbours`, and not over `match.neighbours`.
    """

    condition: int | None
    without: int | None = None
    denoised: bool = False


def layer_terms(layer: str) -> tuple[Term, ...]:
    """Return the averages that a layer is made of."""
    return (Term(None, without=0), Term(0, without=0)) if layer == keys.LAYER_ITE else (Term(None, denoised=True),)


def segments(design: Design, rows: np.ndarray) -> Iterator[tuple[Group, slice]]:
    """Give the groups that ascending packed rows belong to, with the places of each among the rows."""
    bounds = np.searchsorted(rows, design.starts)
    for code in np.flatnonzero(np.diff(bounds)).tolist():
        yield design.groups[code], slice(int(bounds[code]), int(bounds[code + 1]))


def kernel_weights(distances: np.ndarray, bandwidth: float) -> np.ndarray:
    """Return `softmax(-(d - min d) / bandwidth)` along the neighbours (METHOD section 6).

    Parameters
    ----------
    distances
        (cells, k); NaN where a target group has fewer cells, which gets weight 0.
    """
    near = np.where(np.isnan(distances), np.inf, distances).astype(np.float64)
    nearest = near.min(axis=1, keepdims=True)
    kernel = np.exp(-(near - np.where(np.isinf(nearest), 0.0, nearest)) / bandwidth)
    total = kernel.sum(axis=1, keepdims=True)
    return kernel / np.where(total == 0, 1.0, total)


def average_over(
    design: Design, edges: Edges, rows: np.ndarray, term: Term, bandwidth: float, neighbours: int | None = None
) -> Average:
    """Return what F is an average of: the counterparts of some cells in a condition's groups.

    In its own group a cell is its own counterpart. Cells of the condition that a term leaves out get no groups.

    Parameters
    ----------
    rows
        Packed rows of the cells, ascending; `edges` has those of each query group in this order.
    neighbours
        How many of the best neighbours of each group count; by default all that `edges` has.
    """
    parts = [(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))]
    groups = np.zeros(len(rows), dtype=np.int64)
    for group, here in segments(design, rows):
        if group.condition == term.without:
            continue
        code = group.condition if term.condition is None else term.condition
        targets = design.counted(code, group)
        groups[here] = design.number(code, group)
        stands_for, cells = design.stands_for(code, group), rows[here] - group.start
        for target in targets:
            if target.code == group.code:
                parts.append((np.arange(here.start, here.stop), rows[here], np.ones(here.stop - here.start)))
                continue
            found, distances = (values[:, :neighbours] for values in edges[group.code, target.code])
            weights = kernel_weights(distances, bandwidth)
            cell, place = np.nonzero((found >= 0) & design.taking(group, target, cells)[:, None])
            parts.append((cell + here.start, found[cell, place].astype(np.int64), stands_for * weights[cell, place]))
    cell, row, weight = (np.concatenate(column) for column in zip(*parts, strict=True))
    return Average(cell, row, weight, groups)


def average_through(
    averages: Sequence[Average],
    blocks: Iterable[tuple[np.ndarray, sparse.csr_matrix]],
    genes: int,
    sums: Sequence[np.ndarray] | None = None,
) -> Sequence[np.ndarray]:
    """Return the averages of expression that the entries ask for: one (cells, genes) float64 each.

    Each cell sums its counterparts in the order of their rows, so the averages have the same bits however rows are cut
    into blocks and cells into calls.

    Parameters
    ----------
    averages
        What to average; NaN comes out for cells with `groups` 0.
    blocks
        (packed rows, CSR) of row blocks; rows ascend inside and from block to block, and all together hold every row
        asked for. One is used at a time, so this may load them as it goes.
    sums
        Where the averages go, whatever is there; by default new memory.
    """
    sums = [np.empty((len(average.groups), genes)) for average in averages] if sums is None else sums
    entries = [_Entries.of(average) for average in averages]
    for rows, block in blocks:
        if block.nnz and not 0 <= block.indices.min() <= block.indices.max() < genes:
            msg = f"an expression block names genes outside the {genes} that are averaged"
            raise ValueError(msg)
        for total, entry in zip(sums, entries, strict=True):
            entry.add(total, rows, block)
    for total, entry in zip(sums, entries, strict=True):
        if not np.array_equal(entry.next, entry.stop):
            msg = "the expression blocks do not hold every row that is averaged"
            raise ValueError(msg)
        without = entry.start == entry.stop
        with np.errstate(invalid="ignore"):  # nothing, divided by no group, is NaN
            total[without] = (0.0 / entry.groups[without])[:, None]
    return sums


@dataclass(frozen=True)
class _Entries:
    """The entries of an average, sorted by cell and then by row, and how far each cell has got.

    Attributes
    ----------
    row, weight
        (entries,) int64 and float64.
    start, next, stop
        (cells,) each cell's first entry, the first that is not yet added, and the one after its last.
    groups
        (cells,) what its sum is divided by after the last.
    """

    row: np.ndarray
    weight: np.ndarray
    start: np.ndarray
    next: np.ndarray
    stop: np.ndarray
    groups: np.ndarray

    @classmethod
    def of(cls, average: Average) -> _Entries:
        """Sort the entries of an average."""
        rows = int(average.row.max(initial=0)) + 1
        # One key sorts several times faster than two; the sort keeps the order of equal entries.
        order = np.argsort(average.cell * rows + average.row, kind="stable")
        bounds = np.concatenate([[0], np.cumsum(np.bincount(average.cell, minlength=len(average.groups)))])
        return cls(
            average.row[order], average.weight[order], bounds[:-1], bounds[:-1].copy(), bounds[1:], average.groups
        )

    def add(self, total: np.ndarray, rows: np.ndarray, block: sparse.csr_matrix) -> None:
        """Add the share of a block of rows to sums, (cells, genes), and divide those that are complete."""
        if not len(rows):
            return
        first, last = int(rows[0]), int(rows[-1])
        # The place in the block of an entry that is not of the block is never looked at.
        place = self.row - first if last - first + 1 == len(rows) else np.searchsorted(rows, self.row)
        entries = (self.row, place, self.weight, self.start, self.next, self.stop)
        _compiled()(total, entries, self.groups, (first, last), (block.indptr, block.indices, block.data))


def _add_rows(
    total: np.ndarray,
    entries: tuple[np.ndarray, ...],
    groups: np.ndarray,
    span: tuple[int, int],
    block: tuple[np.ndarray, ...],
) -> None:
    """Add one block's share to the sums, entry by entry; divide a cell's sum after its last. This is compiled.

    Parameters
    ----------
    entries
        Row, place in the block and weight of every entry; of every cell its first entry, its next, and the end of its own.
    span
        First and last row of the block.
    block
        Its `indptr`, `indices` and `data`.
    """
    row, place, weight, start, following, stop = entries
    indptr, indices, data = block
    for cell in range(len(stop)):
        entry = following[cell]
        if entry == stop[cell]:
            continue
        sums = total[cell]
        if entry == start[cell]:
            sums[:] = 0.0
        while entry < stop[cell] and span[0] <= row[entry] <= span[1]:
            here, share = place[entry], weight[entry]
            # Unsigned, since an index that may be negative takes a look at every value.
            for value in range(np.uint64(indptr[here]), np.uint64(indptr[here + 1])):
                sums[np.uint64(indices[value])] += data[value] * share
            entry += 1
        following[cell] = entry
        if entry == stop[cell]:
            for gene in range(len(sums)):
                sums[gene] /= groups[cell]


@cache
def _compiled() -> Callable[..., None]:
    """Return `_add_rows` as machine code: neither numpy nor scipy adds sparse rows in a fixed order without copies.

    The code is kept on disk, where there is a folder to keep it in. Without `fastmath` no operation changes its place.
    """
    import numba

    how = {"nogil": True, "error_model": "numpy"}
    try:
        compiled: Any = numba.njit(cache=True, **how)(_add_rows)
    except RuntimeError:  # neither this file's folder nor the home can be written
        compiled = numba.njit(**how)(_add_rows)
    return compiled


def layer_values(
    name: str,
    values: np.ndarray,
    own: np.ndarray,
    control: np.ndarray | None = None,
    keep_bits: int | None = None,
) -> np.ndarray:
    """Return a layer as it is stored: (cells, genes) float32 (METHOD section 6).

    `batch_effect` is taken from the rounded `denoised`, so that the two add up to the expression, up to the rounding
    of `batch_effect` itself.

    Parameters
    ----------
    values
        (cells, genes) float32 the cells' expression, which `batch_effect` alone looks at.
    own, control
        (cells, genes) float64 averages under the own condition and the control; the latter is for `ite` alone. For
        `ite`, own is the average over `match.neighbours`, for the other layers that over `denoise.neighbours`.
    """
    if name == keys.LAYER_DENOISED:
        return rounded(own, keep_bits)
    if name == keys.LAYER_BATCH_EFFECT:
        return rounded(values - rounded(own, keep_bits), keep_bits)
    if control is None:
        msg = f"{name} needs the averages under the control"
        raise ValueError(msg)
    return rounded(own - control, keep_bits)


def control_distance(design: Design, edges: Edges, rows: np.ndarray) -> np.ndarray:
    """Return each cell's mean distance to its nearest neighbours in the control groups: (rows,) float32.

    A cell's own group is left out; NaN where no other control group is.
    """
    means = np.full(len(rows), np.nan, dtype=np.float32)
    for group, here in segments(design, rows):
        total, number = np.zeros(here.stop - here.start), np.zeros(here.stop - here.start)
        for target in (target for target in design.counted(0, group) if target.code != group.code):
            taking = design.taking(group, target, rows[here] - group.start)
            total[taking] += edges[group.code, target.code][1][taking, 0]
            number += taking
        with np.errstate(invalid="ignore"):
            means[here] = total / number
    return means


def own_distance(design: Design, edges: Edges, rows: np.ndarray) -> np.ndarray:
    """Return each cell's distance to the nearest other cell of its group: (rows,) float32; NaN in a group of one."""
    distances = np.empty(len(rows), dtype=np.float32)
    for group, here in segments(design, rows):
        distances[here] = edges[group.code, group.code][1][:, 0]
    return distances


def effective_number(times: np.ndarray) -> float:
    """Return how many cells used alike would carry as much: `(sum w)^2 / sum w^2`; NaN where none is used."""
    used = times.astype(np.float64)
    return float(used.sum() ** 2 / (used**2).sum()) if used.any() else float("nan")


def near_control(control: np.ndarray, own: np.ndarray, quantile: float) -> np.ndarray:
    """Return which cells have a near counterpart in the control: (cells,) bool.

    They are those whose distance to the control is within what a share of all cells has to its own kind: one quantile
    of the distances inside groups, over the whole cohort. A cell without another control group to match is near.

    Parameters
    ----------
    control, own
        (cells,) of all cells, what `control_distance` and `own_distance` return.
    """
    return ~(control > near_distance(own, quantile))


def near_distance(own: np.ndarray, quantile: float) -> float:
    """Return the distance within which a control match is near; see `near_control`."""
    known = own[np.isfinite(own)]
    return float(np.quantile(known, quantile)) if len(known) else float("inf")
