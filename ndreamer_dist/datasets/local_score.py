"""How well the effects of single cells follow those of a simulated cohort whose effects depend on the state.

Input: the truth, a function that reads rows of the run's `ite` layer, the cohort cells of these rows, and the points in
which the cells were matched. Output: inside each cell type and condition, the correlation between the effects of cells,
smoothed over neighbours, and the true effects. The effect of one cell is mostly noise. A mean over cells that are
neighbours in the space is not, and it shows the state as far as the space represents it: a cell that is matched to a
random cell of its type scores about 0. Only the sampled cells, and genes with an effect, are held.
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
"""Cells that an effect is averaged over, the cell itself among them."""
MOST_SCORED_CELLS: Final = 4000
"""Cells of a cell type and condition that are looked at, evenly over the rows."""
CONSTANT: Final = 1e-6
"""Differences between true effects up to this are rounding."""

ReadEffects = Callable[[int, int], NDArray[Any]]
"""`read(start, stop)` gives the effects of own condition against control, (rows, genes)."""


@dataclass(frozen=True)
class LocalScore:
    """Agreement of the cells' effects with the true ones inside one cell type and condition."""

    cell_type: str
    condition: str
    cells: int  # that were looked at
    genes: int  # with a true effect
    correlation: float  # over cells and genes, each gene centred; NaN where no gene's effect varies


def local_scores(
    truth: Truth,
    read: ReadEffects,
    *,
    positions: ArrayLike,
    points: NDArray[Any],
    genes: Sequence[str],
    chunk_rows: int = 4096,
) -> tuple[LocalScore, ...]:
    """Score the effects of single cells, reading them once; empty where true effects do not depend on the state.

    Parameters
    ----------
    truth
        Of the simulated cohort.
    read
        `read(start, stop)`: effects of the rows, (rows, genes).
    positions
        Of the rows in the simulated cohort, (rows,).
    points
        Where the rows were matched, (rows, dimensions).
    genes
        Names of the columns.

    Raises
    ------
    QueryError
        A name is not the cohort's, or lengths differ.
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
    """Return each row's mean over the rows nearest to it, itself among them, (rows, columns)."""
    near = np.argsort(cdist(points, points), axis=1, kind="stable")[:, :neighbours]
    return np.stack([values[some].mean(0, dtype=np.float64) for some in near])


def centred_correlation(estimate: NDArray[Any], true: NDArray[Any]) -> float:
    """Return the correlation over all entries, each column centred; 0 for a constant estimate, NaN for a constant truth."""
    e, t = (np.asarray(values, np.float64) - values.mean(0, dtype=np.float64) for values in (estimate, true))
    if not np.any(np.abs(t) > CONSTANT):
        return float("nan")
    norm = float(np.sqrt((e**2).sum() * (t**2).sum()))
    return float((e * t).sum()) / norm if norm > 0 else 0.0


@dataclass(frozen=True)
class _Population:
    cell_type: str
    condition: str
    rows: NDArray[np.intp]  # that are looked at
    columns: NDArray[np.intp]  # genes with an effect


def _populations(truth: Truth, positions: NDArray[np.intp], genes: Sequence[str]) -> list[_Population]:
    """Return the cell types and conditions that have cells and effects."""
    obs, found = truth.obs(positions), []
    for kind in truth.cell_types:
        for condition in truth.conditions[1:]:
            rows = np.flatnonzero((obs[CELL_TYPE] == kind) & (obs[CONDITION] == condition))
            columns = np.flatnonzero(truth.mean_ite(kind, condition, genes))
            if len(rows) > 1 and len(columns):
                evenly = np.linspace(0, len(rows) - 1, min(len(rows), MOST_SCORED_CELLS)).round().astype(np.intp)
                found.append(_Population(kind, condition, rows[evenly], columns))
    return found


def _read_part(
    read: ReadEffects, rows: NDArray[np.intp], columns: NDArray[np.intp], chunk_rows: int
) -> NDArray[np.float32]:
    """Return some rows and columns of the effects, read chunk by chunk."""
    part = np.empty((len(rows), len(columns)), np.float32)
    for start in np.unique(rows // chunk_rows) * chunk_rows:
        here = slice(*np.searchsorted(rows, [start, start + chunk_rows]))
        first, last = int(rows[here][0]), int(rows[here][-1])
        part[here] = read(first, last + 1)[rows[here] - first][:, columns]
    return part
