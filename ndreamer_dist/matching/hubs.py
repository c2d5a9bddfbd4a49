"""Exact nearest neighbours by a distance that is corrected for hubs (METHOD section 9).

Input: queries, the index of a target group, and the remoteness of each target: its mean distance to its 10 nearest
queries. Output, for every query: the k targets c that minimise `2 d(q, c) - r(c)`, with their true distances. In many
dimensions a few targets, the hubs, are near to everything. The queries are near to a hub as well, so its r is small and
its distances count in full. A target that is near to few queries has a large r and is corrected the most.

The search is that of `exact`: float32 products propose, the partitions of the index rule targets out, and float64
decides. With h = r / 2 the score is t = d - h, halved. A target can be better than a bound U on t only where
`d^2 <= (U + h)^2`. For any D, and so for the mean h of a partition, that is
`|p|^2 - h^2 - 2 h D - 2 p q <= U^2 + 2 h (U - D) - |q|^2`. On the left is a product as long as the plain one. On the right
the largest or the smallest h of the partition makes it a limit of the query. Queries of several groups, each with its own
h, are searched together: a row of norms per group.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

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
    distances_of,
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
    tiles,
)
from ndreamer_dist.matching.labels import WHOLE, Placed, Stratum, nearest_by_stratum, places_among, strata_of
from ndreamer_dist.matching.partition import Index, build_index

NEAREST_QUERIES = 10
"""Queries nearest to a target that its remoteness is a mean over."""
MOST_QUERIES = 4096
"""Cells of a query group that remoteness is measured from: the first in packed order, which is random."""
KEPT_INDEXES = 32
"""Indexes of query groups that a task keeps, at some megabytes each."""
USUAL = 4
"""Candidates per neighbour of a query in one scan that are no crowd."""
MOST_KEPT = 2**23
"""Numbers that a task keeps of target groups that are measured together, a label at a time."""


def remoteness(targets: np.ndarray, queries: np.ndarray | Index, *, threads: int = 1) -> np.ndarray:
    """Return each target's mean distance to its 10 nearest queries, all of them where there are fewer.

    Parameters
    ----------
    targets
        (t, d) float32 coordinates.
    queries
        (q, d) float32 coordinates of the query group's cells, at least one, or their index.

    Returns
    -------
    (t,) float32: means, in float64, of the exact distances, rounded once.
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
    """Return the mean distance of a tile's cells to the k nearest, as float32; which these are is left open."""
    query, row, squared = tile.candidates()
    count, k = len(tile.queries), min(tile.k, len(tile.index.targets))
    if count * np.bincount(query, minlength=count).max(initial=0) > WIDEST * len(query):
        smallest = k_best(count, k, query, row, squared)[1]
    else:
        smallest = np.sort(tabled(count, query, squared, k), axis=1)[:, :k]
    return np.sqrt(smallest).mean(axis=1).astype(np.float32)


def pool(starts: np.ndarray, target: int) -> np.ndarray:
    """Return the packed rows that a target group's remoteness is measured from in place of a query group's, ascending.

    They are of all other groups, as many of each, the first ones, which are in random order; few enough to measure from.

    Parameters
    ----------
    starts
        (groups + 1,) first row of every group, and the number of cells.
    """
    others = [group for group in range(len(starts) - 1) if group != target]
    each = max(1, MOST_QUERIES // max(len(others), 1))
    return np.concatenate([np.arange(starts[g], min(starts[g] + each, starts[g + 1])) for g in others])


class Remoteness:
    """Measures how remote groups' cells are from a query group, from a bounded number of that group's cells.

    Target groups that are asked for one after the other are measured together, since small searches have their price.

    Parameters
    ----------
    points
        (cells, d) float32 coordinates, in packed order.
    starts
        (groups + 1,) first row of every group, and the number of cells.
    labels
        (cells,) codes of labels, where cells are matched inside them.
    edges
        (target group, query group) that will be asked for, by target group.
    pooled
        Whether all other groups stand for a query group, so that a target group is measured once and not once a query group.
    """

    def __init__(
        self, points: np.ndarray, starts: np.ndarray, labels: np.ndarray | None = None, *,
        edges: Sequence[tuple[int, int]], pooled: bool = False, threads: int = 1,
    ) -> None:  # fmt: skip
        self._points, self._starts, self._labels, self._threads = points, starts, labels, threads
        self._edges, self._pooled = edges, pooled
        self._index = lru_cache(maxsize=KEPT_INDEXES)(self._built)
        self._kept: dict[tuple[int, int, int], np.ndarray] = {}
        self._together: set[int] = set()

    def of(self, target: int, query: int, label: int = WHOLE) -> np.ndarray:
        """Return the remoteness of a target group's cells of a label, or of all, from those of the query group."""
        if target not in self._together:
            self._kept, self._together = {}, self._from(target)
        place = target, target if self._pooled else query, label
        if place not in self._kept:
            self._measure(*place)
        return self._kept[place]

    def whole(self, group: int, label: int = WHOLE) -> Index | None:
        """Return the index of all a group's cells of a label, where remoteness is measured from just these, or nothing."""
        cells = len(self._of_label(np.arange(*self._starts[group : group + 2]), label))
        return self._index(group, label) if not self._pooled and 0 < cells <= MOST_QUERIES else None

    def _from(self, target: int) -> set[int]:
        """Return the target groups that are measured together, from one on: as many as are not too many numbers."""
        following = list(dict.fromkeys(other for other, _ in self._edges))
        following = following[following.index(target) :]
        cells = np.cumsum([self._starts[group + 1] - self._starts[group] for group in following])
        return {target, *following[: int((cells * len(self._starts) <= MOST_KEPT).sum())]}

    def _measure(self, target: int, query: int, label: int) -> None:
        wanted = [(target, query)] if self._pooled else self._edges
        groups = sorted({group for group, other in wanted if group in self._together and other == query})
        rows = [self._of_label(np.arange(*self._starts[group : group + 2]), label) for group in groups]
        found = remoteness(self._points[np.concatenate(rows)], self._index(query, label), threads=self._threads)
        for group, part in zip(groups, np.split(found, np.cumsum([len(part) for part in rows])[:-1]), strict=True):
            self._kept[group, query, label] = part

    def _of_label(self, rows: np.ndarray, label: int) -> np.ndarray:
        return rows if label == WHOLE or self._labels is None else rows[self._labels[rows] == label]

    def _built(self, query: int, label: int) -> Index:
        rows = pool(self._starts, query) if self._pooled else np.arange(*self._starts[query : query + 2])
        labelled = self._of_label(rows, label)
        return build_index(self._points[(labelled if len(labelled) else rows)[:MOST_QUERIES]])


def nearest_corrected(
    queries: np.ndarray, targets: np.ndarray | Index, remote: np.ndarray, k: int, *,
    groups: np.ndarray | None = None, threads: int = 1,
) -> Neighbours:  # fmt: skip
    """Return the k targets of least `2 d - r` of every query, exactly; ties go to the smaller row.

    Parameters
    ----------
    queries
        (q, d) float32 coordinates.
    targets
        (t, d) float32 coordinates, or their index.
    remote
        (t,) float32, r of every target, or (groups, t), r from every query group; equal targets have equal ones.
    groups
        (q,) which row of `remote` is a query's; by default there is one.

    Returns
    -------
    Best score first, with true distances.
    """
    coordinates = targets.targets if isinstance(targets, Index) else targets
    if not len(queries) or not len(coordinates):
        return Neighbours(*distances_of(*nothing_found(len(queries), k)), np.zeros(len(queries), dtype=bool))
    group = np.zeros(len(queries), dtype=np.int64) if groups is None else groups
    with one_thread(targets):
        index = targets if isinstance(targets, Index) else build_index(targets)
        frame = _Frame(index, np.atleast_2d(remote))

        def search(part: slice) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            return _CorrectedTile(frame, queries[part], group[part], k).search()

        parts = list(mapped(search, tiles(len(queries), threads), threads))
    rows, squared, widened = (np.concatenate(values) for values in zip(*parts, strict=True))
    return Neighbours(*distances_of(rows, squared), widened)


def nearest_inside(
    queries: Placed, targets: Placed, own: np.ndarray, least: int, asking: Placed | None = None, k: int = 1
) -> Neighbours:
    """Return the k nearest targets of every query, as the stage finds them: inside its label where there are enough of it.

    Parameters
    ----------
    own
        (q,) the query's place among the targets, which is no candidate, or -1.
    least
        Targets of a label that are enough.
    asking
        Cells that the targets' remoteness is measured from; none where distances are not corrected for hubs.
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


class _Frame:
    """An index with the remoteness of its points from every query group.

    Attributes
    ----------
    half, exact_half
        (groups, n) h of every point in the index's frame: float32, which products are made of, and float64.
    guess
        (groups, partitions) float64, D: the mean h of a partition, of which the scores there are guessed to be.
    taken
        (groups, n) float64: `h^2 + 2 h D`.
    products
        (d + groups, n) float32: `-2 p`, and below it `|p|^2 - h^2 - 2 h D`, a row per group.
    most, least
        (groups, partitions) largest and smallest h.
    overflows
        Whether some h is too large for float32 products.
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


class _CorrectedTile(Tile):
    """A tile of queries on its way through the partitions; see `exact.Tile`.

    Attributes
    ----------
    group
        (q,) query group, a row of the frame's tables.
    bound
        (q,) float64, an upper bound U of the k-th best t in the index's frame; a float32 number, or infinite.
    error
        (q,) how wrong a computed squared distance can be that counts, or a product that it is compared by.
    """

    def __init__(self, frame: _Frame, queries: np.ndarray, group: np.ndarray, k: int) -> None:
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
        """Return rows, squared distances, both (q, k), and which queries were widened."""
        query, row, exact = self.candidates()
        remote = self.frame.remote[self.group[query], row].astype(np.float64)
        rows, squared = nothing_found(len(self.queries), self.k)
        place, rank, pair = best_pairs(len(self.queries), self.k, query, row, 2 * np.sqrt(exact) - remote)
        rows[place, rank], squared[place, rank] = row[pair], exact[pair]
        return rows, squared, self.widened

    def _scan_own(self, own: np.ndarray) -> None:
        super()._scan_own(own)
        if self.k == 1:  # of more, the few pairs less elsewhere would not pay
            self._lower(*self._ordered())

    def _reach(self, cell: int) -> np.ndarray:
        """Return the squared distance up to which a partition has to be looked at: (q,), -inf for not at all."""
        far = self.bound + self.frame.most[self.group, cell]
        return np.where(far < 0, -np.inf, np.minimum(far * far + self.error, LARGEST))  # what is done is beyond it

    def _error_within(self, bound: np.ndarray, norms: np.ndarray) -> np.ndarray:
        """Return how wrong a computed squared distance can be of what is within bounds.

        As in `exact.certain_limit`: a target that counts lies within U + h, so has a norm of at most |q| + U + h;
        the row below the coordinates adds h^2 + 2 h D to what is summed, and rounding the square root adds two roundings.
        """
        most, dimensions = self.frame.largest, self.queries.shape[1]
        reach, other = 2 * norms + np.maximum(bound + most, 0), 2 * most + np.abs(bound)
        return (2 * dimensions + 64) * FLOAT32 * (reach * reach + other * other) + dimensions * 2.0**-120

    def _limits(self, part: np.ndarray, cell: int | np.ndarray) -> np.ndarray:
        """Return the computed values up to which a partition's points may be within the bounds.

        Where t is at most U, `d^2 - h^2 - 2 h D` is at most `U^2 + 2 h (U - D)`.
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
        """Lower the bounds by a computed value of a partition's points that is not below the k-th smallest.

        What h its point has is left open: of those in the partition, the one by which t is largest. At a computed value
        below D^2, t grows with h, and above it falls.
        """
        group, value = self.group[part], kth + self.squared[part]
        guess = self.frame.guess[group, cell]
        half = np.where(value < guess * guess, self.frame.most[group, cell], self.frame.least[group, cell])
        self._tighten(part, np.sqrt(np.maximum(value + half * (half + 2 * guess), 0)) - half)

    def _lower(self, query: np.ndarray, point: np.ndarray, value: np.ndarray) -> None:
        score = rounded_up(self._score(query, point, value))
        self._tighten(*kth_by_query(query, score, self.k, len(self.queries)))

    def _tighten(self, part: np.ndarray, kth: np.ndarray) -> None:
        """Lower the bounds of queries to what a computed t implies that is not below their k-th smallest."""
        lower = np.flatnonzero((kth < self.bound[part]) & ~self.far[part])
        part, kth = part[lower], kth[lower].astype(np.float64)
        error = self._error_within(kth, self.norms[part])
        bound = kth + self._slack(kth, error)
        bound = np.where(bound < LARGEST, rounded_up(bound).astype(np.float64), np.inf)
        self.bound[part] = np.minimum(self.bound[part], bound)
        self.error[part] = self._error_within(self.bound[part], self.norms[part])

    def _slack(self, score: np.ndarray, error: np.ndarray) -> np.ndarray:
        """Return how wrong a computed t can be; the smaller the distance, the more of it is error."""
        near = np.maximum(score + self.frame.smallest, 0)
        return error / (near + np.sqrt(near * near + error)) + 8 * FLOAT32 * (np.abs(score) + self.frame.largest)

    def _score(self, query: np.ndarray, point: np.ndarray, value: np.ndarray) -> np.ndarray:
        """Return t of pairs by their computed values: (pairs,) float64."""
        place = self.group[query] * len(self.index.copies) + point
        distance = value + self.squared[query] + self.frame.taken.take(place)
        return np.sqrt(np.maximum(distance, 0)) - self.frame.half.take(place)

    def _decided(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the pairs that are still within the bounds, and their exact squared distances."""
        query, point, value = self._ordered()
        score = self._score(query, point, value)
        if self.k > 1:
            self._tighten(*kth_by_query(query, rounded_up(score), self.k, len(self.queries)))
        bound = self.bound + np.where(np.isfinite(self.bound), self._slack(self.bound, self.error), 0)
        kept = np.flatnonzero(score <= bound[query])
        query, row = self._members(query[kept], point[kept])
        return query, row, exact_squared(self.queries, self.index.targets, query, row)

    def _sifted(self, values: np.ndarray, squared: np.ndarray, part: np.ndarray, points: slice) -> np.ndarray:
        """Return which pairs may still be among the k best by float64 distances about the crowd: (queries, points)."""
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
