"""Measures of a matching space, on arrays. Pure.

Input: coordinates and labels of a sample of cells, mean effects per gene, expression of cells and their matches.
Output: one number per measure, or NaN where it cannot be measured. LISI is harmonypy's; the silhouette is
scikit-learn's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from threadpoolctl import threadpool_limits

PERPLEXITY = 30.0
"""Perplexity of LISI, as published; smaller for small samples."""
LEAST_POINTS = 12
"""Cells below which neither LISI nor the silhouette is measured."""
MOST_AXES = 3
"""Most axes of state in a population."""


def scaled_lisi(points: np.ndarray, codes: np.ndarray) -> float:
    """Return the median LISI of labels, scaled to 0 (one label around a cell) to 1 (all labels equally often).

    Parameters
    ----------
    points, codes
        (cells, dimensions) coordinates and (cells,) labels.
    """
    from harmonypy import compute_lisi  # imported here because the import adds a handler to a logger

    labels = len(np.unique(codes))
    if labels < 2 or len(points) < LEAST_POINTS:
        return float("nan")
    perplexity = min(PERPLEXITY, (len(points) - 1) // 3)
    with threadpool_limits(1):
        lisi = compute_lisi(points, {"label": np.asarray(codes)}, ["label"], perplexity)[:, 0]
    return float((np.median(lisi) - 1) / (labels - 1))


def silhouette(points: np.ndarray, codes: np.ndarray) -> float:
    """Return the mean silhouette of labels, -1 to 1, without labels of a single cell."""
    from sklearn.metrics import silhouette_score

    _, dense, counts = np.unique(codes, return_inverse=True, return_counts=True)
    kept = counts[dense] > 1
    if len(np.unique(dense[kept])) < 2 or kept.sum() < LEAST_POINTS:
        return float("nan")
    with threadpool_limits(1):
        return float(silhouette_score(points[kept].astype(np.float64), dense[kept]))


def agreement(effects: np.ndarray, differences: np.ndarray) -> tuple[float, float]:
    """Return the correlation and the regression slope of effects on differences over genes, mean over populations.

    Parameters
    ----------
    effects, differences
        (populations, genes). Populations with a NaN, or with constant effects or differences, are left out.
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
    """The axes of state of a population, cross-fitted on two folds of its cells.

    Attributes
    ----------
    left, right
        (folds, genes of a set, axes) loadings of the two sets of genes. Entry f scores cells of fold f and was fitted
        on the other fold.
    own
        Mean product of a cell's two scores.
    shared
        Correlation of the two scores: how well a cell's state can be measured.
    cells
        Number of cells behind `own` and `shared`.
    """

    left: np.ndarray
    right: np.ndarray
    own: float
    shared: float
    cells: int

    def scores(self, first: np.ndarray, second: np.ndarray, fold: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the two state scores of cells of a fold, from each set of genes: (cells, axes) each."""
        with threadpool_limits(1):
            return first @ self.left[fold], second @ self.right[fold]


def state_axes(first: np.ndarray, second: np.ndarray, folds: np.ndarray) -> StateAxes:
    """Return the axes along which two disjoint sets of genes covary most; this shared signal is a cell's state.

    Parameters
    ----------
    first, second
        (cells, genes) expression of both sets in a random sample of a population, centred within donors.
    folds
        (cells,) fold of every cell, 0 or 1.
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
    """Return the share of a cell's state that its match has: 1 for a match in the same state, 0 for a random cell.

    It is the mean product of the cell's score from one set of genes and the match's score from the other set, divided
    by the mean product of a cell's own two scores. If these genes took no part in the matching, noise cancels in both
    products, so the share is corrected for the unreliability of single cells.

    Parameters
    ----------
    cells, matches
        Expression of both sets of genes, (pairs, genes) each, centred within donors.
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
