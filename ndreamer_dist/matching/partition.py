"""A target group prepared for exact search: its distinct points, partitioned into cells with bounds between them.

Input: the (targets, d) coordinates of a group. Output: an `Index`. Equal rows become one point. Each cell of the
partition holds the points around a centroid. For every pair of cells the index knows where the points of the other cell
begin, along the direction between the two centroids. So a query can rule out a whole cell by one number. The partition
affects the speed alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

MOST_CELLS = 256
"""Cells of an index at most."""
CELL_POINTS = 64
"""Points that a cell should have for a pass over it to be worth its fixed costs."""
ROUNDS = 5
"""Rounds of Lloyd's algorithm; cells need not be good, only fair."""
TILE = 16_384
"""Points worked on at once where an intermediate would be larger than the points."""
SAMPLE = 64
"""Points per cell that Lloyd's algorithm looks at."""


@dataclass(frozen=True)
class Index:
    """Distinct points of a target group, by cell.

    Attributes
    ----------
    targets
        (t, d) float32, as given.
    centre, scale
        A point p is stored as `(p - centre) * scale`, rounded once to float32; no coordinate exceeds 1, so nothing
        over- or underflows.
    points
        (d + 1, n) float32, cell by cell: `-2 p`, and below it the squared norm.
    starts
        (cells + 1,) first point of every cell.
    rows, first, copies, place
        The target rows of point i are `rows[first[i] : first[i] + copies[i]]`, ascending; target row r is point
        `place[r]`.
    centroids
        (cells, d) float32.
    slabs
        (cells, cells) float32: the smallest `(own centroid - c_a) . p` over the points p of cell b, at [b, a].
    steepness
        (cells, cells) float32, one over the distance of two centroids; 0 where they are one.
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
        """Return coordinates of queries in the index's frame: (q, d) float32; infinite where they overflow."""
        return framed(queries, self.centre, self.scale)


def build_index(targets: np.ndarray, *, cells: int | None = None) -> Index:
    """Return the index of a target group.

    Parameters
    ----------
    targets
        (t, d) float32, at least one.
    cells
        Number of cells at most; by default chosen by the number of points.
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
    """Return `(points - centre) * scale`, rounded once to float32; infinite where it overflows."""
    moved = np.empty_like(points)
    with np.errstate(over="ignore"):
        for start in range(0, len(points), TILE):
            moved[start : start + TILE] = (points[start : start + TILE] - centre) * scale
    return moved


def cell_count(points: int) -> int:
    """Return the number of cells for a number of points; in groups of 600 to 15 000, half or twice it is no faster."""
    return max(1, min(MOST_CELLS, int(np.sqrt(points) * 3 / 8), points // CELL_POINTS))


def distinct_rows(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return an order in which equal rows are neighbours, ascending, and where each run of equal rows begins.

    Without equal rows the order is that of the rows. Rows whose hashes collide may stay apart, which costs only time.
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
    """Return centroids by a few rounds of Lloyd's algorithm on evenly spaced points: (cells, d) float32."""
    sample = points[:: max(1, len(points) // (cells * SAMPLE))]
    centroids = sample[np.linspace(0, len(sample) - 1, cells).astype(np.int64)].copy()
    for _ in range(ROUNDS if cells > 1 else 0):
        members = (np.arange(cells)[:, None] == nearest_centroid(sample, centroids)).astype(np.float32)
        sizes = members.sum(axis=1)
        filled = sizes > 0
        centroids[filled] = (members @ sample)[filled] / sizes[filled, None]
    return centroids


def nearest_centroid(points: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """Return the centroid nearest to each point, in float32 and by tiles: (n,) int64."""
    half = np.einsum("cd,cd->c", centroids, centroids) / 2
    tiles = [
        (half - points[start : start + TILE] @ centroids.T).argmin(axis=1) for start in range(0, len(points), TILE)
    ]
    return np.concatenate(tiles)


def _scale(targets: np.ndarray, centre: np.ndarray) -> float:
    """Return the power of two that brings all coordinates below 1."""
    largest = max(float(np.max(targets.max(axis=0) - centre)), float(np.max(centre - targets.min(axis=0))))
    return float(2.0 ** -np.ceil(np.log2(largest))) if largest > 0 else 1.0


def _separations(points: np.ndarray, starts: np.ndarray, centroids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the slabs and the steepness of all pairs of cells; see `Index`."""
    wide = centroids.astype(np.float64)
    slabs = np.empty((len(centroids), len(centroids)))
    for cell in range(len(centroids)):
        along = points[starts[cell] : starts[cell + 1]] @ wide.T
        slabs[cell] = (along[:, cell, None] - along).min(axis=0)
    distances = np.sqrt(np.stack([((wide - one) ** 2).sum(axis=1) for one in wide]))
    steepness = np.divide(1.0, distances, out=np.zeros_like(distances), where=distances > 1e-15)
    return slabs.astype(np.float32), steepness.astype(np.float32)
