"""Exact nearest neighbours by FAISS's flat search, on a GPU where there is one.

Input: queries and targets. Output: the answer of `exact.nearest`, bit for bit. FAISS proposes a few more candidates than
needed by float32 arithmetic, whose order among near-ties depends on device and tiling. Float64 distances of the original
coordinates decide among the candidates, and a bound certifies that no better target was missed. `exact.nearest` searches
the queries that the bound cannot certify.
"""

from __future__ import annotations

import threading
from functools import cache
from typing import Any

import faiss
import numpy as np

from ndreamer_dist.matching.exact import (
    FLOAT32,
    SPARE,
    Neighbours,
    certain_limit,
    distances_of,
    exact_squared,
    k_best,
    kth_smallest,
    mapped,
)
from ndreamer_dist.matching.exact import nearest as nearest_by_cells

GPU = threading.Lock()
"""Held while the GPU works for one of this process's threads."""
QUERY_TILE = 65_536
"""Queries of one FAISS call."""
TARGET_BLOCK = 262_144
"""Targets of one FAISS call; it bounds the memory of their centred copy."""


def nearest(
    queries: np.ndarray, targets: np.ndarray, k: int, *, exclude: np.ndarray | None = None, threads: int = 1
) -> Neighbours:
    """Return the k nearest targets of every query, exactly; see `exact.nearest`.

    Parameters
    ----------
    threads
        Threads that settle FAISS's proposals, and search for the queries that they leave open.
    """
    if not len(queries) or not len(targets):
        return nearest_by_cells(queries, targets, k)
    skipped = np.full(len(queries), -1, dtype=np.int64) if exclude is None else np.asarray(exclude, dtype=np.int64)
    centre = targets.mean(axis=0, dtype=np.float64)
    tiles = [slice(start, start + QUERY_TILE) for start in range(0, len(queries), QUERY_TILE)]

    def settle(tile: slice) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return _settled(queries[tile], targets, centre, k, skipped[tile])

    parts = list(mapped(settle, tiles, threads))
    rows, squared, final = (np.concatenate(values) for values in zip(*parts, strict=True))
    rows, distances = distances_of(rows, squared)
    open_ = np.flatnonzero(~final)
    if len(open_):
        found = nearest_by_cells(queries[open_], targets, k, exclude=skipped[open_], threads=threads)
        rows[open_], distances[open_] = found.rows, found.distances
    return Neighbours(rows, distances, ~final)


def _settled(
    queries: np.ndarray, targets: np.ndarray, centre: np.ndarray, k: int, skipped: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the best of the proposed candidates, and for which queries they are certainly the best of all."""
    count = min(len(targets), k + 1 + SPARE)
    candidates, approximate = propose(queries, targets, centre, count)
    norms = np.sqrt(((queries - centre) ** 2).sum(axis=1))
    last = approximate[:, -1].astype(np.float64)
    approximate[(candidates < 0) | (candidates == skipped[:, None])] = np.inf
    with np.errstate(invalid="ignore"):
        limit = certain_limit(kth_smallest(approximate, k), norms, queries.shape[1], FLOAT32)
    query, place = np.nonzero((approximate <= limit[:, None]) & np.isfinite(approximate))
    row = candidates[query, place]
    rows, squared = k_best(len(queries), k, query, row, exact_squared(queries, targets, query, row))
    # Where FAISS met an infinity it hands out no row at all, so that even a full list proves nothing.
    whole = (count == len(targets)) & (candidates >= 0).all(axis=1)
    return rows, squared, np.isfinite(last) & (whole | (last > limit))


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
    moved = _centred(queries, centre)
    for first in range(0, len(targets), TARGET_BLOCK):
        block = _centred(targets[first : first + TARGET_BLOCK], centre)
        near, found = _knn(moved, block, min(count, len(block)))
        rows, squared = _merged(rows, squared, np.where(found < 0, -1, found + first), near, count)
    return rows, squared


def has_gpu() -> bool:
    """Return whether FAISS is built for a GPU and sees one."""
    return bool(hasattr(faiss, "knn_gpu") and hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus() > 0)


def _centred(points: np.ndarray, centre: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(points.astype(np.float64) - centre, dtype=np.float32)


def _knn(queries: np.ndarray, block: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    if has_gpu() and count <= 1024:
        with GPU:
            return faiss.knn_gpu(_resources(), queries, block, count)
    return faiss.knn(queries, block, count)


@cache
def _resources() -> Any:
    """Return this process's memory on the GPU, which is costly to make and serves one call at a time."""
    return faiss.StandardGpuResources()


def _merged(
    rows: np.ndarray, squared: np.ndarray, more: np.ndarray, near: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Keep the `count` smallest of two lists per query; absent entries of the first are infinite."""
    rows, squared = np.hstack([rows, more]), np.hstack([squared, near])
    order = np.argsort(squared, axis=1, kind="stable")[:, :count]
    return np.take_along_axis(rows, order, axis=1), np.take_along_axis(squared, order, axis=1)
