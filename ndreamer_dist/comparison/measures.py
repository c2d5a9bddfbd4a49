"""Measures of a matching space, on arrays. Pure.

Input: coordinates and labels of a sample of cells, mean effects by gene, scores of states. Output: one number each, or NaN
where nothing can be measured. LISI is harmonypy's; the silhouette is scikit-learn's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from threadpoolctl import threadpool_limits

PERPLEXITY = 30.0
"""Of LISI: about the neighbours that count, as published; fewer where cells are few."""
LEAST_POINTS = 12
"""Cells below which neither LISI nor a silhouette is measured."""
MOST_AXES = 3
"""Directions of state that are looked at in a population."""


def scaled_lisi(points: np.ndarray, codes: np.ndarray) -> float:
    """Return how mixed labels are around a cell: the median LISI, 0 for one label and 1 for all labels alike.

    Parameters
    ----------
    points, codes
        (cells, dimensions) and (cells,).
    """
    from harmonypy import compute_lisi  # it gives its logger a handler, so it is loaded where it is used

    labels = len(np.unique(codes))
    if labels < 2 or len(points) < LEAST_POINTS:
        return float("nan")
    perplexity = min(PERPLEXITY, (len(points) - 1) // 3)
    with threadpool_limits(1):
        lisi = compute_lisi(points, {"label": np.asarray(codes)}, ["label"], perplexity)[:, 0]
    return float((np.median(lisi) - 1) / (labels - 1))


def silhouette(points: np.ndarray, codes: np.ndarray) -> float:
    """Return the mean silhouette of labels, -1 to 1; labels of a single cell are left out."""
    from sklearn.metrics import silhouette_score

    _, dense, counts = np.unique(codes, return_inverse=True, return_counts=True)
    kept = counts[dense] > 1
    if len(np.unique(dense[kept])) < 2 or kept.sum() < LEAST_POINTS:
        return float("nan")
    with threadpool_limits(1):
        return float(silhouette_score(points[kept].astype(np.float64), dense[kept]))


def agreement(effects: np.ndarray, differences: np.ndarray) -> tuple[float, float]:
    """Return correlation and slope of effects on differences of means over genes, mean over populations.

    Parameters
    ----------
    effects, differences
        (populations, genes); a population with a NaN, or without any difference, is left out.
    """
    pairs = [
        (np.corrcoef(difference, effect)[0, 1], np.polyfit(difference, effect, 1)[0])
        for effect, difference in zip(effects, differences, strict=True)
        if np.isfinite(effect).all() and np.isfinite(difference).all() and min(np.ptp(effect), np.ptp(difference)) > 0
    ]
    return (float(np.mean([r for r, _ in pairs])), float(np.mean([s for _, s in pairs]))) if pairs else (np.nan, np.nan)


# --- state -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StateAxes:
    """The directions of state of a population, from each half of its cells.

    Attributes
    ----------
    left, right
        (2, genes of a set, axes): by fold of the cells that are scored; made from those of the other fold.
    own
        Mean product of a cell's two scores.
    shared
        Correlation of the two scores: how much state can be seen in a cell.
    cells
        How many the two were taken over.
    """

    left: np.ndarray
    right: np.ndarray
    own: float
    shared: float
    cells: int

    def scores(self, first: np.ndarray, second: np.ndarray, fold: int) -> tuple[np.ndarray, np.ndarray]:
        """Return two scores of cells' states: (cells, axes) each."""
        with threadpool_limits(1):
            return first @ self.left[fold], second @ self.right[fold]


def state_axes(first: np.ndarray, second: np.ndarray, folds: np.ndarray) -> StateAxes:
    """Return the directions in which two disjoint sets of genes covary most: what both say of a cell is its state.

    Parameters
    ----------
    first, second
        (cells, genes) expression of a random sample of a population, centred inside donors.
    folds
        (cells,) 0 or 1.
    """
    left, right = [], []
    for fold in (0, 1):
        with threadpool_limits(1):
            u, _, v = np.linalg.svd(first[folds != fold].T @ second[folds != fold], full_matrices=False)
        left.append(u[:, :MOST_AXES])
        right.append(v[:MOST_AXES].T)
    bare = StateAxes(np.stack(left), np.stack(right), 0.0, 0.0, len(first))
    a, b = (np.concatenate(parts) for parts in zip(
        *(bare.scores(first[folds == fold], second[folds == fold], fold) for fold in (0, 1)), strict=True
    ))  # fmt: skip
    scale = np.sqrt((a**2).sum() * (b**2).sum())
    product = float((a * b).sum())
    return replace(bare, own=product / len(first), shared=product / scale if scale > 0 else 0.0)


def state_held(
    axes: StateAxes, cells: tuple[np.ndarray, np.ndarray], matches: tuple[np.ndarray, np.ndarray], folds: np.ndarray
) -> float:
    """Return how much of a cell's state its match has: 1 for a match in the same state, 0 for a random cell.

    The product of the cell's score from one set of genes and its match's from the other, over that of a cell's own two
    scores. Noise enters neither, if cells were matched by other genes than these; so the share is corrected for the
    reliability of single cells.

    Parameters
    ----------
    cells, matches
        Expression of both sets of genes, (pairs, genes) each, centred inside donors.
    folds
        (pairs,) fold of both the cell and its match.
    """
    crossed = 0.0
    for fold in (0, 1):
        here = folds == fold
        a, b = axes.scores(cells[0][here], cells[1][here], fold)
        c, d = axes.scores(matches[0][here], matches[1][here], fold)
        crossed += float((a * d).sum() + (b * c).sum()) / 2
    return crossed / len(folds) / axes.own
