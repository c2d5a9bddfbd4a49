"""Correct principal components by Harmony, with the group as the batch (METHOD section 9).

harmonypy (2.1, GPL-3.0-or-later, C++ behind numpy) does the correction, with the same bits for any number of threads.
Cells that are mapped later are corrected as in Symphony (Kang 2021), with the clusters frozen.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

CELLS_PER_CLUSTER = 30
"""Smallest mean number of cells per soft cluster of Harmony. There are at most 100 clusters."""
BYTES_PER_CELL = 2900
"""Memory of Harmony per cell with 50 dimensions: four float64 copies of the coordinates, and 100 soft assignments."""
SUMMED_ROWS = 65_536
"""Number of cells whose assignments are summed at a time."""
SHARPNESS = 0.1
"""Sigma of Harmony and Symphony: the width of the soft assignments."""
RIDGE = 1.0
"""Lambda of Symphony: the ridge penalty on the effect of a new batch."""


@dataclass(frozen=True)
class FrozenClusters:
    """Summary of Harmony's clusters, enough to correct other cells.

    Attributes
    ----------
    cells, sums
        (clusters,) sum of the soft assignments, and (clusters, d) sum of corrected coordinates weighted by them.
    """

    cells: np.ndarray
    sums: np.ndarray

    def assigned(self, points: np.ndarray) -> np.ndarray:
        """Return the soft assignments of uncorrected principal components: (cells, clusters)."""
        centroids = self.sums / np.linalg.norm(self.sums, axis=1, keepdims=True)
        lengths = np.maximum(np.linalg.norm(points, axis=1, keepdims=True), 1e-12)
        near = 2 / SHARPNESS * (points / lengths) @ centroids.T
        weights = np.exp(near - near.max(axis=1, keepdims=True))
        return np.asarray(weights / weights.sum(axis=1, keepdims=True))

    def batch_effects(self, cells: np.ndarray, sums: np.ndarray) -> np.ndarray:
        """Return the effect of one new batch in every cluster, by ridge regression: (clusters, d).

        Parameters
        ----------
        cells, sums
            (clusters,) sum of the new batch's assignments, and (clusters, d) sum of its uncorrected coordinates,
            weighted by them.
        """
        stored = self.cells
        determinant = (cells + stored) * (cells + RIDGE) - cells**2
        return np.asarray((stored[:, None] * sums - cells[:, None] * self.sums) / determinant[:, None])


@dataclass(frozen=True)
class Harmonised:
    """Corrected coordinates, (cells, d) float32, and the clusters of the correction."""

    points: np.ndarray
    clusters: FrozenClusters


def harmonised(points: np.ndarray, batches: Mapping[str, np.ndarray], *, seed: int, threads: int) -> Harmonised:
    """Return coordinates corrected for batches.

    Parameters
    ----------
    points
        (cells, d) principal components.
    batches
        (cells,) batch codes by key; several keys are corrected for jointly.
    seed
        Seed of the initial cluster centres.
    threads
        Number of threads, which does not affect the result.
    """
    from harmonypy import run_harmony  # imported here, since the import adds a log handler

    clusters = int(np.clip(round(len(points) / CELLS_PER_CLUSTER), 1, 100))
    found = run_harmony(
        points, dict(batches), list(batches), nclust=clusters, verbose=False, random_state=seed, ncores=threads
    )
    corrected, soft = found.Z_corr, found.R
    sums = np.zeros((soft.shape[1], corrected.shape[1]))
    for start in range(0, len(points), SUMMED_ROWS):
        part = slice(start, start + SUMMED_ROWS)
        # einsum sums in a fixed order, unlike BLAS, whose order depends on its threads.
        sums += np.einsum("ck,cd->kd", soft[part], corrected[part])
    return Harmonised(np.asarray(corrected, dtype=np.float32), FrozenClusters(soft.sum(axis=0), sums))
