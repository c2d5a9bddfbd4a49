"""Exact nearest neighbours by a distance that is corrected for hubs (METHOD section 9).

Input: queries, the index of a target group, and the remoteness of each target: its mean distance to its 10 nearest
queries. Output, for every query: the k targets c that minimise `2 d(q, c) - r(c)`, with their true distances. In many
dimensions a few targets, the hubs, are near to everything. The queries are near to a hub as well, so its r is small and
its distances count in full. A target that is near to few queries has a large r and is corrected the most.

The search is that of `exact`: float32 products propose, the partitions of the index rule targets out, and float64
decides. With h = r / 2 the score is t = d - h, halved. A target can be better than a bound U on t only where
`d^2 <= (U + h)^2`, that is `|p|^2 - h^2 - 2 p q - 2 h U <= U^2 - |q|^2`: one product with two more columns.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from ndreamer_dist.matching.exact import (
    FAR,
    FLOAT32,
    FLOAT64,
    FOLD,
    LARGEST,
    SCAN_PAIRS,
    SPARE,
    Neighbours,
    Tile,
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
SETTLED_PAIRS = 2**22
"""Query-target pairs of own partitions whose scores are held until bounds are set."""
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
    order = np.argsort(query)
    table = tabled(count, query[order], squared[order])
    smallest = k_best(count, k, query, row, squared)[1] if table is None else np.sort(table, axis=1)[:, :k]
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
    queries: np.ndarray, targets: np.ndarray | Index, remote: np.ndarray, k: int, *, threads: int = 1
) -> Neighbours:
    """Return the k targets of least `2 d - r` of every query, exactly; ties go to the smaller row.

    Parameters
    ----------
    queries
        (q, d) float32 coordinates.
    targets
        (t, d) float32 coordinates, or their index.
    remote
        (t,) float32, r of every target; equal targets have equal ones.

    Returns
    -------
    Best score first, with true distances.
    """
    coordinates = targets.targets if isinstance(targets, Index) else targets
    if not len(queries) or not len(coordinates):
        return Neighbours(*distances_of(*nothing_found(len(queries), k)), np.zeros(len(queries), dtype=bool))
    with one_thread(targets):
        index = targets if isinstance(targets, Index) else build_index(targets)
        frame = _Frame(index, remote)

        def search(part: slice) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            return _CorrectedTile(frame, queries[part], k).search()

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
    """An index with the remoteness of its points.

    Attributes
    ----------
    half
        (n,) float32, h of every point in the index's frame.
    products
        (d + 2, n) float32: `-2 p`, `|p|^2 - h^2` and `-2 h`.
    most
        (partitions,) largest h.
    overflows
        Whether some h is too large for float32 products.
    """

    def __init__(self, index: Index, remote: np.ndarray) -> None:
        self.index, self.remote = index, remote
        half = remote[index.rows[index.first]].astype(np.float64) / 2 * index.scale
        self.overflows = not bool((half < FAR).all())
        self.half = np.where(self.overflows, 0.0, half).astype(np.float32)
        self.exact_half = half
        norms = index.points[-1].astype(np.float64) - self.half.astype(np.float64) ** 2
        self.products = np.concatenate([index.points[:-1], norms.astype(np.float32)[None], -2 * self.half[None]])
        self.most = np.maximum.reduceat(self.half, index.starts[:-1]).astype(np.float64)
        self.least = float(self.half.min())
        self.largest = float(self.half.max())


class _CorrectedTile(Tile):
    """A tile of queries on its way through the partitions; see `exact.Tile`.

    Attributes
    ----------
    bound
        (q,) float64, an upper bound of the k-th best t in the index's frame; a float32 number, or infinite.
    """

    def __init__(self, frame: _Frame, queries: np.ndarray, k: int) -> None:
        super().__init__(frame.index, queries, np.full(len(queries), -1, dtype=np.int64), k)
        self.frame = frame
        if frame.overflows:
            self.far[:] = True
            self.local[:, :-1], self.squared[:] = 0, 0.0
        self.norms = np.sqrt(self.squared)
        self.bound = np.full(len(queries), np.inf)
        self.asking = np.concatenate([self.local, np.zeros((len(queries), 1), dtype=np.float32)], axis=1)

    def search(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return rows, squared distances, both (q, k), and which queries were widened."""
        begins, own = self.beginnings()
        self._look_at_own(own)  # the own ones first: they set bounds that rule out most of the others
        begins[own, np.arange(len(own))] = np.inf
        for part in range(self.index.cells):
            self._scan(part, np.flatnonzero(begins[part] <= self._farthest(part)))
        return self._decide()

    def _farthest(self, part: int) -> np.ndarray:
        """Return the squared distance up to which a partition has to be looked at: (q,), -inf for not at all."""
        far = self.bound + self.frame.most[part]
        reach = np.minimum(np.maximum(far, 0) ** 2 + self._error(slice(None)), LARGEST)  # what is done is beyond it
        return np.where(far < 0, -np.inf, reach)

    def _error(self, part: np.ndarray | slice, rounding: float = FLOAT32) -> np.ndarray:
        """Return how wrong a computed squared distance can be that counts, or a product that it is compared by.

        As in `exact.certain_limit`: a target that counts lies within U + h, so has a norm of at most |q| + U + h;
        the two columns more add h^2 + 2 h U to what is summed, and rounding the square root adds two roundings.
        """
        bound, most = self.bound[part], self.frame.largest
        dimensions = self.queries.shape[1]
        reach = 2 * self.norms[part] + np.maximum(bound + most, 0)
        return (2 * dimensions + 64) * rounding * (reach**2 + (most + np.abs(bound)) ** 2) + dimensions * 2.0**-120

    def _tighten_by(self, part: np.ndarray, kth: np.ndarray) -> None:
        """Lower the bounds of queries to what the k-th smallest computed t of each implies."""
        kth = kth.astype(np.float64)
        before = self.bound[part]
        self.bound[part] = kth
        error = self._error(part)
        near = np.maximum(kth + self.frame.least, 0)  # the smaller the distance, the more of it is error
        with np.errstate(invalid="ignore"):
            slack = error / (near + np.sqrt(near**2 + error)) + 8 * FLOAT32 * (np.abs(kth) + self.frame.largest)
            bound = np.where(np.isfinite(kth) & ~self.far[part], kth + slack, np.inf)
        rounded = np.where(bound < LARGEST, rounded_up(bound).astype(np.float64), np.inf)
        self.bound[part] = np.minimum(before, rounded)
        self.asking[part, -1] = np.where(np.isfinite(self.bound[part]), self.bound[part], 0)

    def _scan(self, cell: int, queries: np.ndarray) -> None:
        """Look at a partition's points for some of the queries."""
        start, stop = self.index.starts[cell], self.index.starts[cell + 1]
        step = max(1, SCAN_PAIRS // (stop - start))
        bounded = np.isfinite(self.bound[queries])
        for chosen, look in ((queries[bounded], self._filter), (queries[~bounded], self._look)):
            for first in range(0, len(chosen), step):
                look(chosen[first : first + step], int(start), int(stop))

    def _filter(self, part: np.ndarray, start: int, stop: int) -> None:
        """Look at points for queries with a bound: a product tells which can be within it."""
        bound, squared = self.bound[part], self.squared[part]
        values = self.asking[part] @ self.frame.products[:, start:stop]
        near = values <= rounded_up(bound**2 - squared + self._error(part))[:, None]
        count = np.count_nonzero(near)
        if not count:
            return
        if count > self.usual * len(part) + SPARE:
            self._look(part, start, stop)
            return
        query, point = np.divmod(np.flatnonzero(near), stop - start)
        half = self.frame.half[start + point].astype(np.float64)
        distance = values[query, point] + squared[query] + half * (half + 2 * bound[query])
        score = np.sqrt(np.maximum(distance, 0)) - half
        self._keep(part[query], start + point, score)
        if self.k == 1:
            begins = np.flatnonzero(np.diff(query, prepend=-1))
            self._tighten_by(part[query[begins]], np.minimum.reduceat(score, begins))

    def _look_at_own(self, own: np.ndarray) -> None:
        """Look at each query's own partition; bounds are set for many queries at once, since a call has its price."""
        looked: list[tuple[np.ndarray, int, np.ndarray]] = []
        for cell, (start, stop) in enumerate(itertools.pairwise(self.index.starts.tolist())):
            queries, step = np.flatnonzero(own == cell), max(1, SCAN_PAIRS // (stop - start))
            for first in range(0, len(queries), step):
                looked.append(self._scored(queries[first : first + step], start, stop))
                if sum(score.size for _, _, score in looked) > SETTLED_PAIRS:
                    self._settle(looked)
                    looked = []
        self._settle(looked)

    def _look(self, part: np.ndarray, start: int, stop: int) -> None:
        """Look at points for queries without a bound, or with many points within it: t of all pairs is computed."""
        self._settle([self._scored(part, start, stop)])

    def _scored(self, part: np.ndarray, start: int, stop: int) -> tuple[np.ndarray, int, np.ndarray]:
        """Compute t of queries and points, note the best, and return the queries, the first point and t."""
        score = self.local[part] @ self.index.points[:, start:stop]
        score += self.squared[part].astype(np.float32)[:, None]
        np.maximum(score, 0, out=score)
        np.sqrt(score, out=score)
        score -= self.frame.half[start:stop]
        few = folded(score, FOLD * self.k) if self.k > 1 else score.min(axis=1, keepdims=True)
        self.best[part] = np.sort(np.concatenate([self.best[part], few], axis=1), axis=1)[:, : self.k]
        return part, start, score

    def _settle(self, looked: list[tuple[np.ndarray, int, np.ndarray]]) -> None:
        """Lower the bounds of queries that were looked at, and keep the points within them; each query comes once."""
        if not looked:
            return
        queries = np.concatenate([part for part, _, _ in looked])
        self._tighten_by(queries, self.best[queries, -1])
        limits = np.split(self._within(queries), np.cumsum([len(part) for part, _, _ in looked])[:-1])
        for (part, start, score), limit in zip(looked, limits, strict=True):
            near = score <= limit[:, None]
            if np.count_nonzero(near) > self.usual * len(part) + SPARE:
                self._sift(part, near, start)
            query, point = np.divmod(np.flatnonzero(near), score.shape[1])
            self._keep(part[query], start + point, score[query, point].astype(np.float64))

    def _within(self, part: np.ndarray) -> np.ndarray:
        """Return the computed t up to which a target may be within the bound: (queries,)."""
        bound, error = self.bound[part], self._error(part)
        near = np.maximum(bound + self.frame.least, 0)
        with np.errstate(invalid="ignore"):
            slack = error / (near + np.sqrt(near**2 + error)) + 8 * FLOAT32 * (np.abs(bound) + self.frame.largest)
        return np.where(np.isfinite(bound), bound + slack, np.inf)

    def _keep(self, query: np.ndarray, point: np.ndarray, score: np.ndarray) -> None:
        self.pairs.append((query, point, score.astype(np.float32)))

    def _sifted(self, values: np.ndarray, squared: np.ndarray, points: slice) -> np.ndarray:
        """Return which pairs may still be among the k best by float64 distances about the crowd: (queries, points)."""
        half = self.frame.exact_half[points]
        distance = np.maximum(values + squared[:, None], 0)
        score = np.sqrt(distance) - half
        kth = kth_smallest(score, self.k)
        with np.errstate(invalid="ignore"):
            farthest = np.where(np.isfinite(kth), kth + half.max(), 0)
            norm = 2 * np.sqrt(squared) + np.maximum(farthest, 0)
            factor = (2 * self.queries.shape[1] + 64) * FLOAT64
            error = factor * (norm**2 + (half.max() + np.abs(kth)) ** 2)
            slack = 2 * np.sqrt(error)
        return score <= np.where(np.isfinite(kth), kth + slack, np.finfo(np.float64).max)[:, None]

    def _decide(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Let exact scores decide among the candidates that are still within the bounds."""
        query, point, score = (np.concatenate(parts) for parts in zip(*self.pairs, strict=True))
        if self.k > 1:
            self._tighten_by(*kth_by_query(query, score, self.k, len(self.queries)))
        kept = np.flatnonzero(score <= self._within(np.arange(len(self.queries)))[query])
        query, row = self._members(query[kept], point[kept])
        targets, remote = self.index.targets, self.frame.remote.astype(np.float64)
        scores = 2 * np.sqrt(exact_squared(self.queries, targets, query, row)) - remote[row]
        rows, _ = k_best(len(self.queries), self.k, query, row, scores)
        squared = np.full(rows.shape, np.inf)
        place, rank = np.nonzero(rows >= 0)
        squared[place, rank] = exact_squared(self.queries, targets, place, rows[place, rank])
        return rows, squared, self.widened
