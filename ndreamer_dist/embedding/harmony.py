"""Principal components corrected by Harmony, with the group as the batch (METHOD section 9).

The correction is harmonypy's (2.1, GPL-3.0-or-later, C++ behind numpy): the same bits for any number of threads.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

CELLS_PER_CLUSTER = 30
"""Cells of one of Harmony's soft clusters, on average, at the least; there are at most 100."""
BYTES_PER_CELL = 2600
"""What Harmony needs a cell of 50 dimensions: its coordinates four times in float64, and 100 soft assignments."""


def harmonised(points: np.ndarray, batches: Mapping[str, np.ndarray], *, seed: int, threads: int) -> np.ndarray:
    """Return coordinates corrected for batches: (cells, d) float32.

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
    return np.asarray(found.Z_corr, dtype=np.float32)
