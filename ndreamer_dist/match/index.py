"""Proposing neighbours: the k targets nearest to each query in float32, by FAISS, on a GPU where there is one.

What comes out is a proposal: its order among near-ties depends on device and tiling. `search` decides in float64.
"""

from __future__ import annotations

import faiss
import numpy as np

QUERY_TILE = 1024
"""Queries of one FAISS call; the last tile is padded to it, since FAISS's arithmetic depends on their number."""
TARGET_BLOCK = 262_144
"""Targets of one FAISS call; it bounds the memory of their centred copy."""


def propose(queries: np.ndarray, targets: np.ndarray, centre: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the `count` targets nearest to each query by float32 arithmetic.

    Parameters
    ----------
    queries, targets
        (q, d) and (t, d) float32.
    centre
        (d,) float64; subtracted from both, so that norms, and with them rounding errors, are small.
    count
        Candidates per query, at most t.

    Returns
    -------
    rows, squared
        (q, count) int64 and (q, count) float32, nearest first. No target left out has a smaller float32 squared
        distance than the last candidate.
    """
    rows = np.zeros((len(queries), count), dtype=np.int64)
    squared = np.full((len(queries), count), np.inf, dtype=np.float32)
    for first in range(0, len(targets), TARGET_BLOCK):
        block = centred(targets[first : first + TARGET_BLOCK], centre)
        for start in range(0, len(queries), QUERY_TILE):
            tile = slice(start, start + QUERY_TILE)
            found, near = _tile(centred(queries[tile], centre), block, min(count, len(block)))
            rows[tile], squared[tile] = _merged(rows[tile], squared[tile], found + first, near, count)
    return rows, squared


def centred(points: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """Return points minus the centre, rounded once to float32."""
    return np.ascontiguousarray(points.astype(np.float64) - centre, dtype=np.float32)


def _tile(queries: np.ndarray, block: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    padded = np.zeros((QUERY_TILE, queries.shape[1]), dtype=np.float32)
    padded[: len(queries)] = queries
    squared, rows = _knn(padded, block, count)
    return rows[: len(queries)], squared[: len(queries)]


def _knn(queries: np.ndarray, block: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    if has_gpu() and count <= 1024:
        return faiss.knn_gpu(faiss.StandardGpuResources(), queries, block, count)
    return faiss.knn(queries, block, count)


def has_gpu() -> bool:
    """Return whether FAISS is built for a GPU and sees one."""
    return bool(hasattr(faiss, "knn_gpu") and hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus() > 0)


def _merged(
    rows: np.ndarray, squared: np.ndarray, more: np.ndarray, near: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Keep the `count` smallest of two lists per query; absent entries of the first are infinite."""
    rows, squared = np.hstack([rows, more]), np.hstack([squared, near])
    order = np.argsort(squared, axis=1, kind="stable")[:, :count]
    return np.take_along_axis(rows, order, axis=1), np.take_along_axis(squared, order, axis=1)
