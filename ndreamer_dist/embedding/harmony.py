"""Principal components corrected by Harmony, with the group as the batch (METHOD section 9).

The correction is harmonypy's (2.1, GPL-3.0-or-later, C++ behind numpy): the same bits for any number of threads. Cells that
are mapped onto corrected ones later are corrected as Symphony does it (Kang 2021): the clusters stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

CELLS_PER_CLUSTER = 30
"""Cells of one of Harmony's soft clusters, on average, at the least; there are at most 100."""
BYTES_PER_CELL = 2900
"""What Harmony needs a cell of 50 dimensions: its coordinates four times in float64, and 100 soft assignments."""
SUMMED_ROWS = 65_536
"""Cells whose assignments are summed at a time."""
SHARPNESS = 0.1
"""Harmony's and Symphony's sigma: how soft the assignments are."""
RIDGE = 1.0
"""Symphony's lambda: how much a new batch's own effect is held back."""


@dataclass(frozen=True)
class FrozenClusters:
    """What is kept of Harmony's clusters, to correct other cells by.

    Attributes
    ----------
    cells, sums
        (clusters,) sum of the cells' assignments, and (clusters, d) of their corrected coordinates by it.
    """

    cells: np.ndarray
    sums: np.ndarray

    def assigned(self, points: np.ndarray) -> np.ndarray:
        """Return the soft assignments of points, principal components that are not corrected: (cells, clusters)."""
        centroids = self.sums / np.linalg.norm(self.sums, axis=1, keepdims=True)
        lengths = np.maximum(np.linalg.norm(points, axis=1, keepdims=True), 1e-12)
        near = 2 / SHARPNESS * (points / lengths) @ centroids.T
        weights = np.exp(near - near.max(axis=1, keepdims=True))
        return np.asarray(weights / weights.sum(axis=1, keepdims=True))

    def batch_effects(self, cells: np.ndarray, sums: np.ndarray) -> np.ndarray:
        """Return what one new batch adds in every cluster, by ridge regression on it and the stored cells: (clusters, d).

        Parameters
        ----------
        cells, sums
            (clusters,) and (clusters, d) of the new batch, as the attributes are of the stored cells.
        """
        stored = self.cells
        determinant = (cells + stored) * (cells + RIDGE) - cells**2
        return np.asarray((stored[:, None] * sums - cells[:, None] * self.sums) / determinant[:, None])


@dataclass(frozen=True)
class Harmonised:
    """Corrected coordinates, (cells, d) float32, and the clusters that they were corrected by."""

    points: np.ndarray
    clusters: FrozenClusters


def harmonised(points: np.ndarray, batches: Mapping[str, np.ndarray], *, seed: int, threads: int) -> Harmonised:
    """Return coordinates corrected for batches.

    Parameters
    ----------
    points
        (cells, d) principal components.
    batches
        (cells,) codes of the batch, by the name of the key that it is from; several are corrected for together.
    seed
        Of the clusters' first centres.
    threads
        How many threads work; the numbers do not depend on it.
    """
    from harmonypy import run_harmony  # it gives its logger a handler, so it is loaded where it is used

    clusters = int(np.clip(round(len(points) / CELLS_PER_CLUSTER), 1, 100))
    found = run_harmony(
        points, dict(batches), list(batches), nclust=clusters, verbose=False, random_state=seed, ncores=threads
    )
    corrected, soft = found.Z_corr, found.R
    sums = np.zeros((soft.shape[1], corrected.shape[1]))
    for start in range(0, len(points), SUMMED_ROWS):
        part = slice(start, start + SUMMED_ROWS)
        # Products in one order, whatever the threads of the library that multiplies matrices.
        sums += np.einsum("ck,cd->kd", soft[part], corrected[part])
    return Harmonised(np.asarray(corrected, dtype=np.float32), FrozenClusters(soft.sum(axis=0), sums))
