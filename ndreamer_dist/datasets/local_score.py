"""Score the effects of single cells against a simulated truth whose effects depend on the cell state.

Input: the truth, a function that reads rows of the run's `ite` layer, the cohort cells of these rows, and the points in
which the cells were matched. Output: for each cell type and condition, the correlation between the effects of cells,
smoothed over neighbours, and the true effects. The effect of one cell is mostly noise. Its mean over neighbours in the
matching space is not, and follows the state as far as the space represents it; matching with a random cell of the type
scores about 0. Only sampled cells, and genes with an effect, are held in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.spatial.distance import cdist

from ndreamer_dist.datasets.parameters import CELL_TYPE, CONDITION
from ndreamer_dist.datasets.truth import Truth
from ndreamer_dist.errors import QueryError

SCORED_NEIGHBOURS: Final = 50
"""Number of cells, including the cell itself, over which an effect is smoothed."""
MOST_SCORED_CELLS: Final = 4000
"""Most cells of a cell type and condition that are scored, evenly spaced over the rows."""
CONSTANT: Final = 1e-6
"""Largest difference between true effects that counts as rounding."""

ReadEffects = Callable[[int, int], NDArray[Any]]
"""`read(start, stop)` returns the effects of the own condition against control, (rows, genes)."""


@dataclass(frozen=True)
class LocalScore:
    """Agreement of single cells' effects with the true ones in one cell type and condition."""

    cell_type: str
    condition: str
    cells: int  # scored cells
    genes: int  # genes with a true effect
    correlation: float  # over cells and genes, each gene centred; NaN if no gene's true effect varies


def local_scores(
    truth: Truth,
    read: ReadEffects,
    *,
    positions: ArrayLike,
    points: NDArray[Any],
    genes: Sequence[str],
    chunk_rows: int = 4096,
) -> tuple[LocalScore, ...]:
    """Score the effects of single cells in one pass; return no scores if true effects do not depend on the state.

    Parameters
    ----------
    truth
        Truth of the simulated cohort.
    read
        `read(start, stop)` returns the effects of a range of rows, (rows, genes).
    positions
        (rows,) position of each row in the simulated cohort.
    points
        (rows, dimensions) coordinates in which the rows were matched.
    genes
        Names of the columns of `read`.
    chunk_rows
        Rows of one read.

    Raises
    ------
    QueryError
        A gene is not in the cohort, or the lengths of `positions` and `points` differ.
    """
    rows = np.asarray(positions, dtype=np.intp)
    if len(rows) != len(points):
        msg = f"there are {len(rows)} positions and {len(points)} points; each row needs both"
        raise QueryError(msg)
    populations = _populations(truth, rows, genes) if truth.law.effects else []
    taken = np.unique(np.concatenate([np.empty(0, np.intp), *(p.rows for p in populations)])).astype(np.intp)
    columns = np.unique(np.concatenate([np.empty(0, np.intp), *(p.columns for p in populations)])).astype(np.intp)
    effects = _read_part(read, taken, columns, chunk_rows)
    scores = []
    for p in populations:
        own = effects[np.searchsorted(taken, p.rows)][:, np.searchsorted(columns, p.columns)]
        true = truth.ite(rows[p.rows], genes=[genes[j] for j in p.columns])
        near = smoothed(own, points[p.rows])
        scores.append(
            LocalScore(p.cell_type, p.condition, len(p.rows), len(p.columns), centred_correlation(near, true))
        )
    return tuple(scores)


def smoothed(values: NDArray[Any], points: NDArray[Any], neighbours: int = SCORED_NEIGHBOURS) -> NDArray[np.float64]:
    """Return the mean of each row's values over its nearest rows, including itself: (rows, columns)."""
    near = np.argsort(cdist(points, points), axis=1, kind="stable")[:, :neighbours]
    return np.stack([values[some].mean(0, dtype=np.float64) for some in near])


def centred_correlation(estimate: NDArray[Any], true: NDArray[Any]) -> float:
    """Return the correlation over all entries after centring each column.

    It is 0 for a constant estimate and NaN for a constant truth.
    """
    e, t = (np.asarray(values, np.float64) - values.mean(0, dtype=np.float64) for values in (estimate, true))
    if not np.any(np.abs(t) > CONSTANT):
        return float("nan")
    norm = float(np.sqrt((e**2).sum() * (t**2).sum()))
    return float((e * t).sum()) / norm if norm > 0 else 0.0


@dataclass(frozen=True)
class _Population:
    cell_type: str
    condition: str
    rows: NDArray[np.intp]  # scored rows
    columns: NDArray[np.intp]  # genes with a true effect


def _populations(truth: Truth, positions: NDArray[np.intp], genes: Sequence[str]) -> list[_Population]:
    """Return the pairs of cell type and condition that have more than one cell and any effect."""
    obs, populations = truth.obs(positions), []
    for kind in truth.cell_types:
        for condition in truth.conditions[1:]:
            rows = np.flatnonzero((obs[CELL_TYPE] == kind) & (obs[CONDITION] == condition))
            columns = np.flatnonzero(truth.mean_ite(kind, condition, genes))
            if len(rows) > 1 and len(columns):
                evenly = np.linspace(0, len(rows) - 1, min(len(rows), MOST_SCORED_CELLS)).round().astype(np.intp)
                populations.append(_Population(kind, condition, rows[evenly], columns))
    return populations


def _read_part(
    read: ReadEffects, rows: NDArray[np.intp], columns: NDArray[np.intp], chunk_rows: int
) -> NDArray[np.float32]:
    """Read some rows and columns of the effects, chunk by chunk: (rows, columns)."""
    part = np.empty((len(rows), len(columns)), np.float32)
    for start in np.unique(rows // chunk_rows) * chunk_rows:
        here = slice(*np.searchsorted(rows, [start, start + chunk_rows]))
        first, last = int(rows[here][0]), int(rows[here][-1])
        part[here] = read(first, last + 1)[rows[here] - first][:, columns]
    return part
