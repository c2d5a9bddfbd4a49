"""The averages of expression from which every effect is computed (METHOD section 6). Pure.

Input: rows and distances of matches, and expression in blocks of packed rows. Output: the expected expression F of any
cells under any condition, and the layers. A cell sums its counterparts in float64, in the order of their packed rows, so
the same question has the same bits however the work is cut. Stored layers and layers on demand both come from here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import sparse

from ndreamer_dist import keys
from ndreamer_dist.cohort.design import Design, Group
from ndreamer_dist.effects.rounding import rounded

ENTRIES = 2048
"""Counterparts' rows added at once; it bounds the memory of their gathered values."""

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
    own_cells
        Whether the condition's own cells are wanted.
    denoised
        Whether it is over `denoise.neighbours`, and not over `match.neighbours`.
    """

    condition: int | None
    own_cells: bool = True
    denoised: bool = False


def layer_terms(layer: str) -> tuple[Term, ...]:
    """Return the averages that a layer is made of."""
    return (Term(None), Term(0, own_cells=False)) if layer == keys.LAYER_ITE else (Term(None, denoised=True),)


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
    design: Design,
    edges: Edges,
    rows: np.ndarray,
    bandwidth: float,
    *,
    condition: int | None,
    own_cells: bool = True,
    neighbours: int | None = None,
) -> Average:
    """Return what F is an average of: the counterparts of some cells in a condition's groups.

    Parameters
    ----------
    rows
        Packed rows of the cells, ascending; `edges` has those of each query group in this order.
    condition
        Its code; by default each cell's own condition. In its own group a cell is its own counterpart.
    own_cells
        Whether the condition's own cells are wanted too; otherwise they get no groups.
    neighbours
        How many of the best neighbours of each group count; by default all that `edges` has.
    """
    parts = [(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))]
    groups = np.zeros(len(rows), dtype=np.int64)
    for group, here in segments(design, rows):
        if group.condition == condition and not own_cells:
            continue
        code = group.condition if condition is None else condition
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
    averages: Sequence[Average], blocks: Iterable[tuple[np.ndarray, sparse.csr_matrix]], genes: int
) -> list[np.ndarray]:
    """Return the averages of expression that the entries ask for: one (cells, genes) float64 each.

    Parameters
    ----------
    averages
        What to average; NaN comes out for cells with `groups` 0.
    blocks
        (packed rows, CSR) of row blocks; rows ascend inside and from block to block, and all together hold every row
        asked for. One is used at a time, so this may load them as it goes.
    """
    sums = [np.zeros((len(average.groups), genes)) for average in averages]
    for rows, block in blocks:
        for total, average in zip(sums, averages, strict=True):
            _add_rows(total, average, rows, block)
    for total, average in zip(sums, averages, strict=True):
        with np.errstate(invalid="ignore"):  # nothing, divided by no group, is NaN
            total /= average.groups[:, None]
    return sums


def _add_rows(total: np.ndarray, average: Average, rows: np.ndarray, block: sparse.csr_matrix) -> None:
    """Add one block's share; each cell sums its counterparts in the order of their rows."""
    inside = np.flatnonzero((average.row >= rows[0]) & (average.row <= rows[-1]))
    inside = inside[np.lexsort((average.row[inside], average.cell[inside]))]
    flat = total.reshape(-1)
    for first in range(0, len(inside), ENTRIES):
        part = inside[first : first + ENTRIES]
        gathered = block[np.searchsorted(rows, average.row[part])]
        stored = np.diff(gathered.indptr)
        places = np.repeat(average.cell[part] * total.shape[1], stored) + gathered.indices
        # add.at goes through its arguments one by one, which is what fixes the order of the sums.
        np.add.at(flat, places, gathered.data * np.repeat(average.weight[part], stored))


def layer_values(
    name: str,
    values: sparse.csr_matrix,
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
        (cells, genes) the cells' expression.
    own, control
        (cells, genes) float64 averages under the own condition and the control; the latter is for `ite` alone. For
        `ite`, own is the average over `match.neighbours`, for the other layers that over `denoise.neighbours`.
    """
    if name == keys.LAYER_DENOISED:
        return rounded(own, keep_bits)
    if name == keys.LAYER_BATCH_EFFECT:
        return rounded(values.toarray() - rounded(own, keep_bits), keep_bits)
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
