"""Find exact nearest neighbours by distances corrected for hubs, as in CSLS (METHOD section 9).

Input: queries, the index of a target group, and the remoteness r of each target: its mean distance to its 10 nearest
queries. Output, for every query: the k targets c that minimise `2 d(q, c) - r(c)`, with their true distances. In many
dimensions a few targets, the hubs, are near to everything. A hub is near to the queries too, so its r is small and its
distances are hardly reduced. A target that is near to few queries has a large r, so its distances are reduced most.

The search is that of `exact`: float32 products propose, the index rules out whole cells of its partition, and float64
distances decide. With h = r / 2, the score t = d - h has the same order. A target can have t <= U only if
`d^2 <= (U + h)^2`. For any D this is the same as `|p|^2 - h^2 - 2 h D - 2 p q <= U^2 + 2 h (U - D) - |q|^2`. D is the
mean h of the cell. The left side is one product, as long as that of the plain search. On the right side, the largest or
smallest h of the cell gives a limit per query. Queries of several groups, each with its own h, are searched together:
the left side has one row of norms per group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from ndreamer_dist.matching.exact import (
    FAR,
    FLOAT32,
    FLOAT64,
    FOLD,
    LARGEST,
    WIDEST,
    Neighbours,
    Tile,
    best_pairs,
    exact_squared,
    folded,
    k_best,
    kth_by_query,
    kth_smallest,
    mapped,
    nearest,
    nothing_found,
    one_thread,
    rounded_up,
    tabled,
    tiled,
    tiles,
)
from ndreamer_dist.matching.labels import WHOLE, Placed, Stratum, nearest_by_stratum, places_among, strata_of
from ndreamer_dist.matching.partition import Index, build_index

NEAREST_QUERIES = 10
"""Number of nearest queries whose mean distance is the remoteness of a target."""
MOST_QUERIES = 4096
"""Most cells of a query group to measure remoteness from: the first in packed order, which is random."""
KEPT_INDEXES = 32
"""Indexes of query groups that a task caches, at a few megabytes each."""
USUAL = 4
"""Candidates per neighbour of a query in one scan that need no sifting."""
MOST_KEPT = 2**23
"""Most cached remoteness values of target groups that are measured together, per label."""


def remoteness(targets: np.ndarray, queries: np.ndarray | Index, *, threads: int = 1) -> np.ndarray:
    """Return each target's mean distance to its 10 nearest queries, or to all queries if there are fewer.

    Parameters
    ----------
    targets
        (t, d) float32 coordinates.
    queries
        (q, d) float32 coordinates of the query group's cells, at least one, or their index.

    Returns
    -------
    (t,) float32; exact distances averaged in float64 and rounded once.
    """
    if not len(targets):
        return np.empty(0, dtype=np.float32)
    with one_thread(queries):
        index = queries if isinstance(queries, Index) else build_index(queries)

        def search(part: slice) -> tuple[np.ndarray]:
            return (_mean_distance(Tile(index, targets[part], np.full(len(targets[part]), -1), NEAREST_QUERIES)),)

        parts = list(mapped(search, tiles(len(targets), threads), threads))
    return np.concatenate([part for (part,) in parts])


def _mean_distance(tile: Tile) -> np.ndarray:
    """Return the mean distance of a tile's queries to their k nearest: (q,) float32; ties need no order."""
    query, row, squared = tile.candidates()
    count, k = len(tile.queries), min(tile.k, len(tile.index.targets))
    if count * np.bincount(query, minlength=count).max(initial=0) > WIDEST * len(query):
        smallest = k_best(count, k, query, row, squared)[1]
    else:
        smallest = np.sort(tabled(count, query, squared, k), axis=1)[:, :k]
    return np.sqrt(smallest).mean(axis=1).astype(np.float32)


def pool(starts: np.ndarray, target: int) -> np.ndarray:
    """Return the pooled sample of queries for the remoteness of a target group: packed rows, ascending.

    It holds the same number of cells of each other group, at most about `MOST_QUERIES` in all. These are the first
    cells of a group, whose order is random.

    Parameters
    ----------
    starts
        (groups + 1,) first row of every group, and the number of cells.
    """
    others = [group for group in range(len(starts) - 1) if group != target]
    each = max(1, MOST_QUERIES // max(len(others), 1))
    return np.concatenate([np.arange(starts[g], min(starts[g] + each, starts[g + 1])) for g in others])


class Remoteness:
    """Measure the remoteness of target groups from query groups, of which at most `MOST_QUERIES` cells are used.

    Consecutive target groups are measured together, since every search has a fixed cost.

    Parameters
    ----------
    points
        (cells, d) float32 coordinates, in packed order; `gpu` measures on the device that holds them.
    starts
        (groups + 1,) first row of every group, and the number of cells.
    labels
        (cells,) label codes for matching inside labels; None without labels.
    edges
        (target group, query group) pairs that will be requested, sorted by target group.
    pooled
        Whether to measure a target group once, from a sample of all other groups (`pool`), not from each query group.
    """

    def __init__(
        self, points: Any, starts: np.ndarray, labels: np.ndarray | None = None, *,
        edges: Sequence[tuple[int, int]], pooled: bool = False, threads: int = 1,
    ) -> None:  # fmt: skip
        self._points, self._starts, self._labels, self._threads = points, starts, labels, threads
        self._edges, self._pooled = edges, pooled
        self._index = lru_cache(maxsize=KEPT_INDEXES)(self._built)
        self._kept: dict[tuple[int, int, int], np.ndarray] = {}
        self._together: set[int] = set()

    def of(self, target: int, query: int, label: int = WHOLE) -> np.ndarray:
        """Return the remoteness of the target group's cells, of one label or all, from the query group: (t,)."""
        if target not in self._together:
            self._kept, self._together = {}, self._from(target)
        place = target, target if self._pooled else query, label
        if place not in self._kept:
            self._measure(*place)
        return self._kept[place]

    def whole(self, group: int, label: int = WHOLE) -> Index | None:
        """Return a group's index if remoteness is measured from all its cells (of the label), else None.

        The index then serves as target index too, and need not be built twice.
        """
        cells = len(self._of_label(np.arange(*self._starts[group : group + 2]), label))
        return self._index(group, label) if not self._pooled and 0 < cells <= MOST_QUERIES else None

    def _from(self, target: int) -> set[int]:
        """Return the target groups to measure together, from `target` on, as `MOST_KEPT` allows."""
        following = list(dict.fromkeys(other for other, _ in self._edges))
        following = following[following.index(target) :]
        cells = np.cumsum([self._starts[group + 1] - self._starts[group] for group in following])
        return {target, *following[: int((cells * len(self._starts) <= MOST_KEPT).sum())]}

    def _measure(self, target: int, query: int, label: int) -> None:
        wanted = [(target, query)] if self._pooled else self._edges
        groups = sorted({group for group, other in wanted if group in self._together and other == query})
        rows = [self._of_label(np.arange(*self._starts[group : group + 2]), label) for group in groups]
        found = self._measured(self._points[np.concatenate(rows)], self._index(query, label))
        for group, part in zip(groups, np.split(found, np.cumsum([len(part) for part in rows])[:-1]), strict=True):
            self._kept[group, query, label] = part

    def _of_label(self, rows: np.ndarray, label: int) -> np.ndarray:
        return rows if label == WHOLE or self._labels is None else rows[self._labels[rows] == label]

    def _built(self, query: int, label: int) -> Any:
        rows = pool(self._starts, query) if self._pooled else np.arange(*self._starts[query : query + 2])
        labelled = self._of_label(rows, label)
        return self._index_of(self._points[(labelled if len(labelled) else rows)[:MOST_QUERIES]])

    def _index_of(self, points: Any) -> Any:
        """Return the index of query cells."""
        return build_index(points)

    def _measured(self, targets: Any, queries: Any) -> np.ndarray:
        """Return the remoteness of targets from the query cells of an index: (t,) float32."""
        return remoteness(targets, queries, threads=self._threads)


def nearest_corrected(
    queries: np.ndarray, targets: np.ndarray | Index, remote: np.ndarray, k: int, *,
    groups: np.ndarray | None = None, threads: int = 1,
) -> Neighbours:  # fmt: skip
    """Return the k targets of smallest `2 d - r` for every query, exactly; ties go to the smaller row.

    Parameters
    ----------
    queries
        (q, d) float32 coordinates.
    targets
        (t, d) float32 coordinates, or their index.
    remote
        (t,) float32 remoteness r of every target, or (groups, t) with one row per query group. Targets with equal
        coordinates have equal r.
    groups
        (q,) row of `remote` to use for each query; by default there is one row.

    Returns
    -------
    Neighbours, smallest score first, with true distances.
    """
    group = np.zeros(len(queries), dtype=np.int64) if groups is None else groups

    def prepare(index: Index) -> Callable[[slice], Tile]:
        frame = Frame(index, np.atleast_2d(remote))
        return lambda part: CorrectedTile(frame, queries[part], group[part], k)

    return tiled(len(queries), targets, k, threads, prepare)


def nearest_inside(
    queries: Placed, targets: Placed, own: np.ndarray, least: int, asking: Placed | None = None, k: int = 1
) -> Neighbours:
    """Return the k nearest targets of every query, inside its label if enough targets have it, as the match stage does.

    Parameters
    ----------
    own
        (q,) position of the query among the targets, which cannot match it, or -1.
    least
        Fewest targets of a label for a match inside it.
    asking
        Cells to measure the remoteness of targets from; None if distances are not corrected for hubs.
    """

    def search(stratum: Stratum) -> Neighbours:
        near = queries.points[stratum.queries]
        far = targets.points if stratum.targets is None else targets.points[stratum.targets]
        if asking is None:
            return nearest(near, far, k, exclude=places_among(stratum.targets, own[stratum.queries]))
        labelled = asking.codes == stratum.label
        chosen = labelled if stratum.label != WHOLE and labelled.any() else slice(None)
        return nearest_corrected(near, far, remoteness(far, asking.points[chosen][:MOST_QUERIES]), k)

    strata = strata_of(queries.codes, targets.codes, own >= 0, least)
    return nearest_by_stratum(strata, len(queries.points), k, search)


class Frame:
    """An index with the remoteness of its points from every query group.

    Attributes
    ----------
    half, exact_half
        (groups, n) h of every point in the index's frame: float32, for the products, and float64.
    guess
        (groups, cells) float64 D, the mean h of each cell of the partition.
    taken
        (groups, n) float64: `h^2 + 2 h D`.
    products
        (d + groups, n) float32: `-2 p`, then one row per group of `|p|^2 - h^2 - 2 h D`.
    most, least
        (groups, cells) largest and smallest h of each cell.
    overflows
        Whether an h is too large for float32 products.
    """

    def __init__(self, index: Index, remote: np.ndarray) -> None:
        self.index, self.remote = index, remote
        half = remote[:, index.rows[index.first]].astype(np.float64) / 2 * index.scale
        self.overflows = not bool((half < FAR).all())
        self.half = np.where(self.overflows, 0.0, half).astype(np.float32)
        self.exact_half = half
        wide, starts, sizes = self.half.astype(np.float64), index.starts[:-1], np.diff(index.starts)
        self.most, self.least = np.maximum.reduceat(wide, starts, axis=1), np.minimum.reduceat(wide, starts, axis=1)
        self.guess = np.add.reduceat(wide, starts, axis=1) / sizes
        self.taken = wide * (wide + 2 * np.repeat(self.guess, sizes, axis=1))
        norms = index.points[-1].astype(np.float64) - self.taken
        self.products = np.concatenate([index.points[:-1], norms.astype(np.float32)])
        self.smallest, self.largest = float(self.least.min()), float(self.most.max())


class CorrectedTile(Tile):
    """The search of one tile of queries by corrected distances; see `exact.Tile`.

    Attributes
    ----------
    group
        (q,) query group: a row of the frame's arrays.
    bound
        (q,) float64 upper bound U of the k-th smallest t, in the index's frame; a float32 value, or infinite.
    error
        (q,) error bound of a computed squared distance, or of a product, of a target within U.
    """

    def __init__(self, frame: Frame, queries: np.ndarray, group: np.ndarray, k: int) -> None:
        super().__init__(frame.index, queries, np.full(len(queries), -1, dtype=np.int64), k)
        self.frame, self.group, self.products = frame, group, frame.products
        self.usual = USUAL * k
        if frame.overflows:
            self.far[:] = True
            self.local[:, :-1], self.squared[:] = 0, 0.0
        self.norms = np.sqrt(self.squared)
        self.bound, self.error = np.full(len(queries), np.inf), np.full(len(queries), np.inf)
        which = group[:, None] == np.arange(len(frame.remote))
        self.local = np.concatenate([self.local[:, :-1], which.astype(np.float32)], axis=1)

    def search(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return rows and squared distances, (q, k) each, and which queries were widened, (q,)."""
        query, row, exact = self.candidates()
        remote = self.frame.remote[self.group[query], row].astype(np.float64)
        rows, squared = nothing_found(len(self.queries), self.k)
        place, rank, pair = best_pairs(len(self.queries), self.k, query, row, 2 * np.sqrt(exact) - remote)
        rows[place, rank], squared[place, rank] = row[pair], exact[pair]
        return rows, squared, self.widened

    def _scan_own(self, own: np.ndarray) -> None:
        super()._scan_own(own)
        if self.k == 1:  # for larger k, the tighter bounds would not save enough later
            self._lower(*self._ordered())

    def _reach(self, cell: int) -> np.ndarray:
        """Return the lower bound up to which a cell has to be scanned: (q,) squared distances, -inf for never."""
        far = self.bound + self.frame.most[self.group, cell]
        return np.where(far < 0, -np.inf, np.minimum(far * far + self.error, LARGEST))  # scanned cells are at infinity

    def _error_within(self, bound: np.ndarray, norms: np.ndarray) -> np.ndarray:
        """Return the error bound of computed squared distances of targets within the bounds.

        As in `exact.certain_limit`: such a target is within U + h, so its norm is at most |q| + U + h. The group's row
        of `products` adds h^2 + 2 h D to the sum, and the square root adds two roundings.
        """
        most, dimensions = self.frame.largest, self.queries.shape[1]
        reach, other = 2 * norms + np.maximum(bound + most, 0), 2 * most + np.abs(bound)
        return (2 * dimensions + 64) * FLOAT32 * (reach * reach + other * other) + dimensions * 2.0**-120

    def _limits(self, part: np.ndarray, cell: int | np.ndarray) -> np.ndarray:
        """Return the largest computed values of a cell's points that can be within the bounds.

        If t is at most U, `d^2 - h^2 - 2 h D` is at most `U^2 + 2 h (U - D)`.
        """
        bound, group = self.bound[part], self.group[part]
        beyond = bound - self.frame.guess[group, cell]
        half = np.where(beyond > 0, self.frame.most[group, cell], self.frame.least[group, cell])
        limit = bound * bound + 2 * half * beyond - self.squared[part] + self.error[part]
        return rounded_up(np.where(np.isfinite(bound), limit, np.inf))

    def _kth(self, part: np.ndarray, values: np.ndarray) -> np.ndarray:
        del part
        return kth_smallest(values if self.k == 1 else folded(values, FOLD * self.k), self.k)

    def _bound(self, part: np.ndarray, kth: np.ndarray, cell: int | np.ndarray) -> None:
        """Lower the bounds from an upper bound of the k-th smallest computed value in a cell.

        The h of that point is unknown, so take the h of the cell that makes t largest. For a computed value below D^2,
        t grows with h; above, it falls.
        """
        group, value = self.group[part], kth + self.squared[part]
        guess = self.frame.guess[group, cell]
        half = np.where(value < guess * guess, self.frame.most[group, cell], self.frame.least[group, cell])
        self._tighten(part, np.sqrt(np.maximum(value + half * (half + 2 * guess), 0)) - half)

    def _lower(self, query: np.ndarray, point: np.ndarray, value: np.ndarray) -> None:
        score = rounded_up(self._score(query, point, value))
        self._tighten(*kth_by_query(query, score, self.k, len(self.queries)))

    def _tighten(self, part: np.ndarray, kth: np.ndarray) -> None:
        """Lower the bounds of queries, given an upper bound `kth` of their k-th smallest computed t."""
        lower = np.flatnonzero((kth < self.bound[part]) & ~self.far[part])
        part, kth = part[lower], kth[lower].astype(np.float64)
        error = self._error_within(kth, self.norms[part])
        bound = kth + self._slack(kth, error)
        bound = np.where(bound < LARGEST, rounded_up(bound).astype(np.float64), np.inf)
        self.bound[part] = np.minimum(self.bound[part], bound)
        self.error[part] = self._error_within(self.bound[part], self.norms[part])

    def _slack(self, score: np.ndarray, error: np.ndarray) -> np.ndarray:
        """Return the error bound of a computed t. It is larger for small distances, because of the square root."""
        near = np.maximum(score + self.frame.smallest, 0)
        return error / (near + np.sqrt(near * near + error)) + 8 * FLOAT32 * (np.abs(score) + self.frame.largest)

    def _score(self, query: np.ndarray, point: np.ndarray, value: np.ndarray) -> np.ndarray:
        """Return t of pairs from their computed values: (pairs,) float64."""
        place = self.group[query] * len(self.index.copies) + point
        distance = value + self.squared[query] + self.frame.taken.take(place)
        return np.sqrt(np.maximum(distance, 0)) - self.frame.half.take(place)

    def _decided(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return (query, target row) pairs within the final bounds, and their exact squared distances."""
        query, point, value = self._ordered()
        score = self._score(query, point, value)
        if self.k > 1:
            self._tighten(*kth_by_query(query, rounded_up(score), self.k, len(self.queries)))
        bound = self.bound + np.where(np.isfinite(self.bound), self._slack(self.bound, self.error), 0)
        kept = np.flatnonzero(score <= bound[query])
        query, row = self._members(query[kept], point[kept])
        return query, row, exact_squared(self.queries, self.index.targets, query, row)

    def _sifted(self, values: np.ndarray, squared: np.ndarray, part: np.ndarray, points: slice) -> np.ndarray:
        """Return which pairs can be among the k best by their float64 distances: (queries, points) bool."""
        half = self.frame.exact_half[self.group[part], points]
        distance = np.maximum(values + squared[:, None], 0)
        score = np.sqrt(distance) - half
        kth, most = kth_smallest(score, self.k), half.max(axis=1)
        with np.errstate(invalid="ignore"):
            farthest = np.where(np.isfinite(kth), kth + most, 0)
            norm = 2 * np.sqrt(squared) + np.maximum(farthest, 0)
            factor = (2 * self.queries.shape[1] + 64) * FLOAT64
            error = factor * (norm**2 + (most + np.abs(kth)) ** 2)
            slack = 2 * np.sqrt(error)
        return score <= np.where(np.isfinite(kth), kth + slack, np.finfo(np.float64).max)[:, None]
