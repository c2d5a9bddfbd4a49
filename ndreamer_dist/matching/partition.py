"""Index a target group for exact search: distinct points, partitioned into cells, with bounds between the cells.

Input: the (targets, d) coordinates of a group. Output: an `Index`. Equal rows become one point. A *cell* here is a part
of the partition: the points around one centroid. For every pair of cells the index stores how near the points of the
one come to the other, along the line between the centroids. So one number can rule out a whole cell for a query. The
partition affects speed only.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

MOST_CELLS = 256
"""Largest number of cells of an index."""
CELL_POINTS = 64
"""Mean number of points per cell below which the fixed cost of scanning a cell dominates."""
ROUNDS = 5
"""Rounds of Lloyd's algorithm. A rough partition is good enough."""
TILE = 16_384
"""Points processed at once, to bound the size of intermediate arrays."""
SAMPLE = 64
"""Points per cell in the sample that Lloyd's algorithm clusters."""


@dataclass(frozen=True)
class Index:
    """Distinct points of a target group, sorted by cell.

    Attributes
    ----------
    targets
        (t, d) float32 coordinates of the target group.
    centre, scale
        Frame of the index: point p is stored as `(p - centre) * scale`, rounded once to float32. No coordinate exceeds
        1, so nothing over- or underflows.
    points
        (d + 1, n) float32: `-2 p`, and the squared norm in the last row.
    starts
        (cells + 1,) first point of every cell, and the number of points.
    rows, first, copies, place
        The target rows of point i are `rows[first[i] : first[i] + copies[i]]`, ascending. Target row r is point
        `place[r]`.
    centroids
        (cells, d) float32 centroids.
    slabs
        (cells, cells) float32: entry [b, a] is the smallest `(c_b - c_a) . p` over the points p of cell b.
    steepness
        (cells, cells) float32 inverse distances between centroids; 0 if two coincide.
    radius
        Largest norm of a point.
    """

    targets: np.ndarray
    centre: np.ndarray
    scale: float
    points: np.ndarray
    starts: np.ndarray
    rows: np.ndarray
    first: np.ndarray
    copies: np.ndarray
    place: np.ndarray
    centroids: np.ndarray
    slabs: np.ndarray
    steepness: np.ndarray
    radius: float

    @property
    def cells(self) -> int:
        """Number of cells."""
        return len(self.starts) - 1

    def local(self, queries: np.ndarray) -> np.ndarray:
        """Return queries in the index's frame: (q, d) float32, infinite on overflow."""
        return framed(queries, self.centre, self.scale)


def build_index(targets: np.ndarray, *, cells: int | None = None) -> Index:
    """Return the index of a target group.

    Parameters
    ----------
    targets
        (t, d) float32, at least one.
    cells
        Largest number of cells; by default chosen from the number of points.
    """
    order, starts = distinct_rows(targets)
    centre = targets.mean(axis=0, dtype=np.float64)
    scale = _scale(targets, centre)
    points = framed(targets[order[starts]], centre, scale)
    centroids = lloyd(points, min(cells or cell_count(len(points)), len(points)))
    cell = nearest_centroid(points, centroids)
    by_cell = np.argsort(cell, kind="stable")
    points = points[by_cell]
    sizes = np.bincount(cell, minlength=len(centroids))
    centroids, sizes = centroids[sizes > 0], sizes[sizes > 0]
    cuts = np.concatenate([[0], np.cumsum(sizes)])
    copies = np.diff(np.append(starts, len(targets)))
    place = np.empty(len(targets), dtype=np.int64)
    place[order] = np.repeat(np.argsort(by_cell), copies)
    norms = np.einsum("nd,nd->n", points, points, dtype=np.float64)
    augmented = np.empty((points.shape[1] + 1, len(points)), dtype=np.float32)
    augmented[:-1], augmented[-1] = -2 * points.T, norms
    slabs, steepness = _separations(points, cuts, centroids)
    return Index(
        targets=targets, centre=centre, scale=scale, points=augmented, starts=cuts, rows=order, first=starts[by_cell],
        copies=copies[by_cell], place=place, centroids=centroids, slabs=slabs, steepness=steepness,
        radius=float(np.sqrt(norms.max())),
    )  # fmt: skip


def framed(points: np.ndarray, centre: np.ndarray, scale: float) -> np.ndarray:
    """Return `(points - centre) * scale`, rounded once to float32; infinite on overflow."""
    moved = np.empty_like(points)
    with np.errstate(over="ignore"):
        for start in range(0, len(points), TILE):
            moved[start : start + TILE] = (points[start : start + TILE] - centre) * scale
    return moved


def cell_count(points: int) -> int:
    """Choose the number of cells; for 600 to 15 000 points, neither half nor twice as many are faster."""
    return max(1, min(MOST_CELLS, int(np.sqrt(points) * 3 / 8), points // CELL_POINTS))


def distinct_rows(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return an order of the rows in which equal rows are adjacent and ascend, and the start of each run of equal rows.

    Without equal rows, the order is unchanged. Equal rows can stay apart after a hash collision, which only costs time.
    """
    bits = np.ascontiguousarray(points + np.float32(0)).view(np.uint32)  # -0 and 0 are one value
    factors = np.random.default_rng(0).integers(2**63, size=points.shape[1], dtype=np.uint64) * np.uint64(
        2
    ) + np.uint64(1)
    hashes = np.einsum("nd,d->n", bits, factors, dtype=np.uint64, casting="safe")
    order = np.argsort(hashes, kind="stable")
    new = np.ones(len(points), dtype=bool)
    new[1:] = hashes[order[1:]] != hashes[order[:-1]]
    repeated = np.flatnonzero(~new)
    if not len(repeated):
        return np.arange(len(points)), np.arange(len(points))
    new[repeated] = (points[order[repeated]] != points[order[repeated - 1]]).any(axis=1)
    return order, np.flatnonzero(new)


def lloyd(points: np.ndarray, cells: int) -> np.ndarray:
    """Return centroids from a few rounds of Lloyd's algorithm on evenly spaced points: (cells, d) float32."""
    sample = points[:: max(1, len(points) // (cells * SAMPLE))]
    centroids = sample[np.linspace(0, len(sample) - 1, cells).astype(np.int64)].copy()
    for _ in range(ROUNDS if cells > 1 else 0):
        members = (np.arange(cells)[:, None] == nearest_centroid(sample, centroids)).astype(np.float32)
        sizes = members.sum(axis=1)
        filled = sizes > 0
        centroids[filled] = (members @ sample)[filled] / sizes[filled, None]
    return centroids


def nearest_centroid(points: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """Return the nearest centroid of each point, computed in float32: (n,) int64."""
    half = np.einsum("cd,cd->c", centroids, centroids) / 2
    tiles = [
        (half - points[start : start + TILE] @ centroids.T).argmin(axis=1) for start in range(0, len(points), TILE)
    ]
    return np.concatenate(tiles)


def _scale(targets: np.ndarray, centre: np.ndarray) -> float:
    """Return the largest power of two that scales all centred coordinates to 1 or less; 1 if all are 0."""
    largest = max(float(np.max(targets.max(axis=0) - centre)), float(np.max(centre - targets.min(axis=0))))
    return float(2.0 ** -np.ceil(np.log2(largest))) if largest > 0 else 1.0


def _separations(points: np.ndarray, starts: np.ndarray, centroids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return `slabs` and `steepness` of all pairs of cells; see `Index`."""
    wide = centroids.astype(np.float64)
    slabs = np.empty((len(centroids), len(centroids)))
    for cell in range(len(centroids)):
        along = points[starts[cell] : starts[cell + 1]] @ wide.T
        slabs[cell] = (along[:, cell, None] - along).min(axis=0)
    distances = np.sqrt(np.stack([((wide - one) ** 2).sum(axis=1) for one in wide]))
    steepness = np.divide(1.0, distances, out=np.zeros_like(distances), where=distances > 1e-15)
    return slabs.astype(np.float32), steepness.astype(np.float32)
