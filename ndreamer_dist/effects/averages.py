"""Average the expression of matches, from which all effects are computed (METHOD section 6). Pure.

Input: rows and distances of matches, and expression in blocks of packed rows. Output: the expected expression F of any
cells under any condition, and the layers. A cell's counterparts are summed in float64, in the order of their packed
rows, so the bits do not depend on how the work is cut. Stored layers and layers on demand both use this module.
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
"""Rows and distances of matches, (cells, k) each, by (query group, target group)."""


@dataclass(frozen=True)
class Average:
    """A sparse weighted average per cell: the sum over its entries of weight times row, divided by `groups`.

    Attributes
    ----------
    cell, row, weight
        (entries,) position of the cell among the requested cells, packed row of its counterpart, float64 weight.
    groups
        (cells,) number of groups averaged over; 0 for a cell that needs no average.
    """

    cell: np.ndarray
    row: np.ndarray
    weight: np.ndarray
    groups: np.ndarray


@dataclass(frozen=True)
class Term:
    """An average that a layer or a query needs.

    Attributes
    ----------
    condition
        Condition whose groups are averaged over; None for each cell's own.
    without
        Condition whose cells need no average, if any.
    denoised
        Whether to average over `denoise.neighbours` instead of `match.neighbours`.
    """

    condition: int | None
    without: int | None = None
    denoised: bool = False


def layer_terms(layer: str) -> tuple[Term, ...]:
    """Return the averages that a layer needs."""
    return (Term(None, without=0), Term(0, without=0)) if layer == keys.LAYER_ITE else (Term(None, denoised=True),)


def segments(design: Design, rows: np.ndarray) -> Iterator[tuple[Group, slice]]:
    """Yield the groups of ascending packed rows, each with the slice of the rows that belongs to it."""
    bounds = np.searchsorted(rows, design.starts)
    for code in np.flatnonzero(np.diff(bounds)).tolist():
        yield design.groups[code], slice(int(bounds[code]), int(bounds[code + 1]))


def kernel_weights(distances: np.ndarray, bandwidth: float) -> np.ndarray:
    """Return `softmax(-(d - min d) / bandwidth)` along the neighbours (METHOD section 6).

    Parameters
    ----------
    distances
        (cells, k); NaN for a missing neighbour, which gets weight 0.
    """
    near = np.where(np.isnan(distances), np.inf, distances).astype(np.float64)
    nearest = near.min(axis=1, keepdims=True)
    kernel = np.exp(-(near - np.where(np.isinf(nearest), 0.0, nearest)) / bandwidth)
    total = kernel.sum(axis=1, keepdims=True)
    return kernel / np.where(total == 0, 1.0, total)


def average_over(
    design: Design, edges: Edges, rows: np.ndarray, term: Term, bandwidth: float, neighbours: int | None = None
) -> Average:
    """Return the sparse average that F is: over the counterparts of some cells in a condition's groups.

    In its own group a cell is its own counterpart. Cells of the condition `term.without` get `groups` 0.

    Parameters
    ----------
    edges
        Matches of the cells of each query group, in the order of `rows`.
    rows
        Packed rows of the cells, ascending.
    bandwidth
        Bandwidth of the kernel weights.
    neighbours
        Number of nearest neighbours per group to average; by default all in `edges`.
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
    """Compute averages of expression: one (cells, genes) float64 array each.

    The counterparts of a cell are summed in the order of their rows, so the bits do not depend on how rows are cut into
    blocks and cells into calls.

    Parameters
    ----------
    averages
        The sparse averages; cells with `groups` 0 become NaN.
    blocks
        (packed rows, CSR) of row blocks. Rows ascend inside blocks and from block to block, and must include every row
        of the averages. Blocks are used one at a time, so an iterator may load them lazily.
    genes
        Number of genes.
    sums
        Arrays to write the averages to, with any content; by default new ones.

    Raises
    ------
    ValueError
        A block has more genes, or a row is in no block.
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
        with np.errstate(invalid="ignore"):  # 0 / 0 groups is NaN
            total[without] = (0.0 / entry.groups[without])[:, None]
    return sums


@dataclass(frozen=True)
class _Entries:
    """The entries of an average, sorted by cell and then by row, and the progress of each cell.

    Attributes
    ----------
    row, weight
        (entries,) int64 and float64.
    start, next, stop
        (cells,) first entry of each cell, its first entry that is not yet added, and the one after its last.
    groups
        (cells,) divisor of the complete sum.
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
        # Sorting one combined key is several times faster than a lexsort.
        order = np.argsort(average.cell * rows + average.row, kind="stable")
        bounds = np.concatenate([[0], np.cumsum(np.bincount(average.cell, minlength=len(average.groups)))])
        return cls(
            average.row[order], average.weight[order], bounds[:-1], bounds[:-1].copy(), bounds[1:], average.groups
        )

    def add(self, total: np.ndarray, rows: np.ndarray, block: sparse.csr_matrix) -> None:
        """Add a block of rows to the sums, (cells, genes), and divide the sums that are complete."""
        if not len(rows):
            return
        first, last = int(rows[0]), int(rows[-1])
        # `place` is meaningless for entries outside the block, which are never read.
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
    """Add a block to the sums, entry by entry, and divide a cell's sum after its last entry; compiled by numba.

    Parameters
    ----------
    total
        (cells, genes) sums, changed in place.
    entries
        Row, position in the block and weight of every entry; `start`, `next` and `stop` of every cell.
    groups
        (cells,) divisors.
    span
        First and last row of the block.
    block
        `indptr`, `indices` and `data` of the block.
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
            # Unsigned indexes spare numba the check for negative ones at every value.
            for value in range(np.uint64(indptr[here]), np.uint64(indptr[here + 1])):
                sums[np.uint64(indices[value])] += data[value] * share
            entry += 1
        following[cell] = entry
        if entry == stop[cell]:
            for gene in range(len(sums)):
                sums[gene] /= groups[cell]


@cache
def _compiled() -> Callable[..., None]:
    """Compile `_add_rows`: neither numpy nor scipy can add sparse rows in a fixed order without copies.

    The code is cached on disk if a folder is writable. Without `fastmath` the compiler does not reorder the sums.
    """
    import numba

    how = {"nogil": True, "error_model": "numpy"}
    try:
        compiled: Any = numba.njit(cache=True, **how)(_add_rows)
    except RuntimeError:  # neither the folder of this file nor the home folder is writable
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

    `batch_effect` is computed from the rounded `denoised`. So the two add up to the expression, up to the rounding of
    `batch_effect` itself.

    Parameters
    ----------
    values
        (cells, genes) float32 expression of the cells, used by `batch_effect` only.
    own
        (cells, genes) float64 average under the own condition: over `match.neighbours` for `ite`, over
        `denoise.neighbours` for other layers.
    control
        (cells, genes) float64 average under the control, for `ite` only.
    keep_bits
        Mantissa bits to keep; by default all.
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

    The own group of a cell is left out. The distance is NaN if there is no other control group.
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
    """Return the effective number of cells (Kish): `(sum w)^2 / sum w^2` of their uses w; NaN if all are 0."""
    used = times.astype(np.float64)
    return float(used.sum() ** 2 / (used**2).sum()) if used.any() else float("nan")


def near_control(control: np.ndarray, own: np.ndarray, quantile: float) -> np.ndarray:
    """Return which cells have a near counterpart in the control: (cells,) bool.

    A counterpart is near if its distance is at most a quantile of the distances inside groups, over the whole cohort. A
    cell without another control group to match counts as near.

    Parameters
    ----------
    control, own
        (cells,) `control_distance` and `own_distance` of all cells.
    quantile
        Quantile of `own`: `effects.near_quantile`.
    """
    return ~(control > near_distance(own, quantile))


def near_distance(own: np.ndarray, quantile: float) -> float:
    """Return the largest distance of a near control match; see `near_control`."""
    finite = own[np.isfinite(own)]
    return float(np.quantile(finite, quantile)) if len(finite) else float("inf")
