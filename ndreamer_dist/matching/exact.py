"""Find exact nearest neighbours on the processor (METHOD section 6).

Input: queries and the index of a target group. Output: rows and distances of the k nearest targets. First, the index
rules out cells of the partition that hold no neighbour for certain. Then float32 products keep the few targets within
the k-th distance plus the worst rounding error. Where many remain, float64 products reduce them; near copies are
ordinary, since cells with the same codes have the same embedding. Finally, float64 distances of the original
coordinates decide, and the smaller row wins ties. So neither tiles, threads nor partitions change the answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, TypeVar

import numpy as np
from threadpoolctl import threadpool_limits

from ndreamer_dist.matching.partition import Index, build_index

SPARE = 8
"""A query left with more than k and these float32 candidates is sifted in float64."""
QUERY_TILE = 16_384
"""Queries that go through the cells together, at most; one thread works on a tile."""
SCAN_PAIRS = 262_144
"""Query-target pairs of one product: what fits into a processor's cache."""
SETTLED_PAIRS = 2**20
"""Query-target pairs of own cells whose values are held until limits are set."""
EXACT_PAIRS = 2048
"""Pairs whose exact distances are computed at once."""
WIDEST = 4
"""Entries of a table of pairs per pair, up to which sorting along its rows beats sorting all pairs."""
FOLD = 4
"""Values per neighbour among which the k-th smallest is sought; where these are few, the limit is looser."""
FAR = 1e15
"""Queries beyond this distance, in the index's frame, would overflow float32: they are sifted against all targets."""
FLOAT32, FLOAT64 = 2.0**-24, 2.0**-53
"""Largest relative error of one rounding."""
Numbers = TypeVar("Numbers", bound=Any)
"""An array, or a tensor."""
LARGEST = np.finfo(np.float32).max
"""What stands for no limit: finite, so that an excluded target, at infinity, is beyond it."""


class Neighbours(NamedTuple):
    """The k nearest targets of every query.

    Attributes
    ----------
    rows, distances
        (q, k) int64 and (q, k) float32, nearest first, ties by smaller row; -1 and NaN where there are fewer targets.
    widened
        (q,) bool, whether float32 left more than a handful of candidates.
    """

    rows: np.ndarray
    distances: np.ndarray
    widened: np.ndarray


def nearest(
    queries: np.ndarray,
    targets: np.ndarray | Index,
    k: int,
    *,
    exclude: np.ndarray | None = None,
    threads: int = 1,
) -> Neighbours:
    """Return the k nearest targets of every query, exactly (METHOD section 6).

    Parameters
    ----------
    queries
        (q, d) float32 coordinates.
    targets
        (t, d) float32 coordinates, or their index.
    exclude
        (q,) target row that is no candidate for a query, or -1: the cell itself in its own group.
    threads
        Tiles of queries worked on at once.
    """
    skipped = np.full(len(queries), -1, dtype=np.int64) if exclude is None else np.asarray(exclude, dtype=np.int64)
    given = targets.targets if isinstance(targets, Index) else targets
    if not len(queries) or not len(given):
        return Neighbours(*distances_of(*nothing_found(len(queries), k)), np.zeros(len(queries), dtype=bool))
    with one_thread(targets):
        index = targets if isinstance(targets, Index) else build_index(targets)

        def search(part: slice) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            return Tile(index, queries[part], skipped[part], k).search()

        found = list(mapped(search, tiles(len(queries), threads), threads))
    rows, squared, widened = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return Neighbours(*distances_of(rows, squared), widened)


def one_thread(points: np.ndarray | Index) -> AbstractContextManager[object]:
    """Hold BLAS to one thread, which costs milliseconds, unless an index is there: whoever made it has done so."""
    return nullcontext() if isinstance(points, Index) else threadpool_limits(1)


def tiles(queries: int, threads: int) -> list[slice]:
    """Return the tiles that queries are searched in: by threads, and small enough for a processor."""
    size = max(1, min(QUERY_TILE, -(-queries // threads)))
    return [slice(start, start + size) for start in range(0, queries, size)]


def mapped(function: Callable[[slice], tuple], parts: list[slice], threads: int) -> Iterator[tuple]:
    """Call a function for every part, by threads where there are several of both, and give the answers in order."""
    if threads == 1 or len(parts) == 1:
        yield from map(function, parts)
        return
    with ThreadPoolExecutor(threads) as pool:
        yield from pool.map(function, parts)


# --- what float arithmetic can be trusted with -----------------------------------------------------------------------


def certain_limit(kth: Numbers, norms: Numbers, dimensions: int, rounding: float) -> Numbers:
    """Return the computed squared distance beyond which no target can be among a query's k nearest; of arrays or tensors.

    A target at distance e has a norm of at most |q| + e, so `|p|^2 - 2 q p + |q|^2` comes out wrong by at most
    E(e) = (d + 16) u (2 |q| + e)^2: d roundings in each sum, a few in adding them, two in moving to the frame. The
    k-th computed value is wrong by E, and so is that of a target just as far, hence twice; the distances that decide
    are wrong by d u e^2 themselves. The constant at the end is for underflow.

    Parameters
    ----------
    kth
        (q,) k-th smallest computed squared distance; infinite where there is none.
    norms
        (q,) norms of the queries.
    rounding
        Largest relative error of one rounding, u.
    """
    factor = (2 * dimensions + 32) * rounding
    root = factor**0.5
    reach = (kth.clip(0) ** 0.5 + 2 * root * norms) / (1 - root)  # an upper bound of the true k-th distance
    return kth + 2 * factor * (2 * norms + reach) ** 2 + dimensions * 2.0**-120


def exact_squared(queries: np.ndarray, targets: np.ndarray, query: np.ndarray, row: np.ndarray) -> np.ndarray:
    """Return float64 squared distances of pairs (query, row): (pairs,).

    Each is a sum along its own contiguous row of coordinates, so its bits depend on the pair alone.
    """
    squared = np.empty(len(query))
    queries, targets = np.ascontiguousarray(queries), np.ascontiguousarray(targets)
    for start in range(0, len(query), EXACT_PAIRS):
        part = slice(start, start + EXACT_PAIRS)
        difference = queries.take(query[part], axis=0).astype(np.float64)
        difference -= targets.take(row[part], axis=0).astype(np.float64)
        difference *= difference
        squared[part] = difference.sum(axis=1)
    return squared


def kth_smallest(values: np.ndarray, k: int) -> np.ndarray:
    """Return the k-th smallest value of each row, infinite where there are fewer: (rows,)."""
    if values.shape[1] < k:
        return np.full(len(values), np.inf)
    smallest = values.min(axis=1) if k == 1 else np.partition(values, k - 1, axis=1)[:, k - 1]
    return smallest.astype(np.float64)


def folded(values: np.ndarray, width: int) -> np.ndarray:
    """Return some values of every row, of different columns, the smallest among them, at most `2 * width`: (rows, few).

    Halves are laid over each other and the smaller values kept, so the k-th smallest of what is left is no smaller
    than the k-th smallest of all; sorting the few costs a fraction of a partition of the many.
    """
    while values.shape[1] >= 2 * width:
        half = values.shape[1] // 2
        values = np.concatenate(
            [np.minimum(values[:, :half], values[:, half : 2 * half]), values[:, 2 * half :]], axis=1
        )
    return values


def sorted_by_query(query: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return float32 values in the order of their queries, and of each query ascending: (values,).

    Query and value make one whole number, whose order is theirs: numbers are sorted many times faster than pairs.
    """
    bits = values.view(np.uint32)
    ordered = np.where(bits >> 31, ~bits, bits | np.uint32(2**31))
    key = np.sort((query.astype(np.uint64) << np.uint64(32)) | ordered).astype(np.uint32)
    return np.where(key >> 31, key & np.uint32(2**31 - 1), ~key).astype(np.uint32).view(np.float32)


def kth_by_query(query: np.ndarray, values: np.ndarray, k: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return which of `count` queries have k values or more, and the k-th smallest of each; pairs are in their order."""
    if k == 1:
        return smallest_by_query(query, values)
    numbers = np.bincount(query, minlength=count)
    enough = np.flatnonzero(numbers >= k)
    kth = np.empty(count, dtype=values.dtype)
    crowded = (numbers > WIDEST * max(k, len(query) // max(count, 1)))[query]
    if len(enough):
        few = tabled(count, query[~crowded], values[~crowded], k)
        kth[:] = np.partition(few, k - 1, axis=1)[:, k - 1]
        query, many = query[crowded], sorted_by_query(query[crowded], values[crowded])
        starts = np.searchsorted(query, np.unique(query))
        kth[query[starts]] = many[starts + k - 1]
    return enough, kth[enough]


def stable_order(values: np.ndarray) -> np.ndarray:
    """Return the order of whole numbers from 0 on, equal ones as they come: 16 bits at a time, which is a radix sort."""
    order = np.argsort(values.astype(np.uint16), kind="stable")
    for shift in range(16, int(values.max(initial=0)).bit_length(), 16):
        order = order[np.argsort((values[order] >> shift).astype(np.uint16), kind="stable")]
    return order


def smallest_by_query(query: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the queries of pairs that are in the order of their queries, each once, and their smallest values."""
    begins = np.append(0, np.flatnonzero(query[1:] != query[:-1]) + 1)[: len(query)]
    return query[begins], np.minimum.reduceat(values, begins) if len(query) else values


def rounded_up(limit: np.ndarray) -> np.ndarray:
    """Return float32 numbers no smaller than these, `LARGEST` at most."""
    return np.nextafter(np.minimum(limit, LARGEST).astype(np.float32), LARGEST)


# --- one tile of queries ---------------------------------------------------------------------------------------------


class Tile:
    """A tile of queries on its way through the cells of an index; what it has found so far is its state.

    Attributes
    ----------
    best
        (q, k) smallest computed squared distances so far, less the query's squared norm; float32.
    limit
        (q,) computed squared distance beyond which nothing counts any more, less the squared norm; float32, rounded up.
    reach
        (q,) the same with the squared norm: a cell that begins beyond it is ruled out.
    pairs
        (query, point, computed value) of the candidates, piece by piece.
    """

    def __init__(self, index: Index, queries: np.ndarray, skipped: np.ndarray, k: int) -> None:
        self.index, self.queries, self.skipped, self.k = index, queries, skipped, k
        self.products = index.points
        self.usual = k if k == 1 else 3 * k  # candidates of a query in one scan that are no crowd
        local = index.local(queries)
        squared = np.einsum("qd,qd->q", local, local, dtype=np.float64)
        self.far = ~(squared < FAR**2)
        local[self.far] = 0
        self.squared = np.where(self.far, 0.0, squared)
        self.local = np.concatenate([local, np.ones((len(queries), 1), dtype=np.float32)], axis=1)
        self.best = np.full((len(queries), k), np.inf, dtype=np.float32)
        self.limit = np.full(len(queries), LARGEST, dtype=np.float32)
        self.reach = np.full(len(queries), LARGEST, dtype=np.float32)
        self.widened = np.zeros(len(queries), dtype=bool)
        none = np.empty(0, dtype=np.int64)
        self.pairs = [(none, none, np.empty(0, dtype=np.float32))]
        itself = np.where(skipped >= 0, index.place[skipped], -1)
        # Where the excluded target has copies, its point stays and the row is left out at the end.
        self.excluded = np.where(index.copies[itself] == 1, itself, -1)
        self.excludes = bool((self.excluded >= 0).any())

    def search(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return rows, squared distances, both (q, k), and which queries were widened."""
        return *k_best(len(self.queries), self.k, *self.candidates()), self.widened

    @np.errstate(invalid="ignore")  # products of some BLAS kernels raise the flag over finite numbers
    def candidates(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the pairs of query and target row among which the k nearest are, and their squared distances."""
        begins, own = self.beginnings()
        self._scan_own(own)  # the own cells first: they set limits that rule out most of the others
        begins[own, np.arange(len(own))] = np.inf
        for cell in range(self.index.cells):
            self._scan(cell, np.flatnonzero(begins[cell] <= self._reach(cell)))
        return self._decided()

    def beginnings(self) -> tuple[np.ndarray, np.ndarray]:
        """Return a lower bound of the squared distance to any point of a cell, (cells, q), and the own cell, (q,)."""
        along = self.local[:, : self.index.centroids.shape[1]] @ self.index.centroids.T
        nearness = np.einsum("cd,cd->c", self.index.centroids, self.index.centroids) / 2 - along
        own = nearness.argmin(axis=1)
        return self._beginnings(np.ascontiguousarray(along.T), own), own

    def _beginnings(self, along: np.ndarray, own: np.ndarray) -> np.ndarray:
        """Return a lower bound of the squared distance to any point of a cell: (cells, q), -1 for the own cell.

        Seen along the line from the query's own centroid to another one, the other cell begins somewhere; nothing of
        it is nearer than that.
        """
        index, tile = self.index, np.arange(len(own))
        norms = np.sqrt(self.squared).astype(np.float32) + np.float32(index.radius)
        rounding = np.float32((2 * len(index.points) + 32) * FLOAT32 * index.radius) * norms
        start = along[own, tile] - rounding
        bounds = np.empty_like(along)
        for cell in range(index.cells):
            bound = (index.slabs[cell][own] - along[cell] + start) * index.steepness[cell][own]
            np.maximum(bound, 0, out=bound)
            np.multiply(bound, bound * np.float32(1 - 1e-6), out=bounds[cell])
        bounds[:, self.far] = 0
        bounds[own, tile] = -1
        return bounds

    def _reach(self, cell: int) -> np.ndarray:
        """Return the squared distance up to which a cell has to be looked at: (q,)."""
        del cell
        return self.reach

    def _scan_own(self, own: np.ndarray) -> None:
        """Look at each query's own cell; limits are set for many queries at once, since a call has its price."""
        cuts = np.cumsum(np.bincount(own, minlength=self.index.cells))
        looked: list[tuple[np.ndarray, int, np.ndarray, np.ndarray]] = []
        for cell, queries in enumerate(np.split(np.argsort(own, kind="stable"), cuts[:-1])):
            for part in self._parts(cell, queries):
                values = self._values(part, cell)
                looked.append((part, cell, values, self._kth(part, values)))
                if sum(values.size for _, _, values, _ in looked) > SETTLED_PAIRS:
                    self._settle(looked, own)
                    looked = []
        self._settle(looked, own)

    def _settle(self, looked: list[tuple[np.ndarray, int, np.ndarray, np.ndarray]], own: np.ndarray) -> None:
        """Set the limits of queries that were looked at, each once, and keep the points within them."""
        if not looked:
            return
        queries = np.concatenate([part for part, _, _, _ in looked])
        self._bound(queries, np.concatenate([kth for _, _, _, kth in looked]), own[queries])
        limits = np.split(self._limits(queries, own[queries]), np.cumsum([len(part) for part, _, _, _ in looked])[:-1])
        for (part, cell, values, _), limit in zip(looked, limits, strict=True):
            self._choose(part, cell, values, values <= limit[:, None])

    def _scan(self, cell: int, queries: np.ndarray) -> None:
        """Look at a cell's points for some of the queries."""
        for part in self._parts(cell, queries):
            values = self._values(part, cell)
            near = values <= self._limits(part, cell)[:, None]
            count = np.count_nonzero(near)
            if count > 2 * self.k * len(part):
                self._bound(part, self._kth(part, values), cell)
                near = values <= self._limits(part, cell)[:, None]
            if count:
                query, point, value = self._choose(part, cell, values, near)
                if self.k == 1:
                    self._lower(query, point, value)

    def _parts(self, cell: int, queries: np.ndarray) -> Iterator[np.ndarray]:
        """Give queries in parts whose products with a cell's points fit into a processor's cache."""
        step = max(1, SCAN_PAIRS // int(self.index.starts[cell + 1] - self.index.starts[cell]))
        return (queries[first : first + step] for first in range(0, len(queries), step))

    def _values(self, part: np.ndarray, cell: int) -> np.ndarray:
        """Return computed values of some queries and a cell's points: (queries, points)."""
        start, stop = self.index.starts[cell], self.index.starts[cell + 1]
        values = self.local[part] @ self.products[:, start:stop]
        if self.excludes:
            excluded = self.excluded[part]
            hit = np.flatnonzero((excluded >= start) & (excluded < stop))
            values[hit, excluded[hit] - start] = np.inf
        return values

    def _choose(
        self, part: np.ndarray, cell: int, values: np.ndarray, near: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Keep the pairs that are within the limits, in the order of the queries, and return them."""
        start = int(self.index.starts[cell])
        if np.count_nonzero(near) > self.usual * len(part) + SPARE:
            self._sift(part, near, start)
        flat = np.flatnonzero(near)
        query, point = np.divmod(flat, near.shape[1])
        pairs = part[query], point + start, values.ravel()[flat]
        self.pairs.append(pairs)
        return pairs

    def _kth(self, part: np.ndarray, values: np.ndarray) -> np.ndarray:
        """Return the k-th smallest computed value so far of some queries, or one that is no smaller: (queries,)."""
        if self.k == 1:
            best = np.minimum(self.best[part], values.min(axis=1, keepdims=True))
        else:
            few = np.concatenate([self.best[part], folded(values, FOLD * self.k)], axis=1)
            best = np.sort(few, axis=1)[:, : self.k]
        self.best[part] = best
        return best[:, -1]

    def _bound(self, part: np.ndarray, kth: np.ndarray, cell: int | np.ndarray) -> None:
        """Set the limits of some queries by a computed value of a cell's points that is not below their k-th smallest."""
        del cell
        self._limit(part, kth)

    def _limits(self, part: np.ndarray, cell: int | np.ndarray) -> np.ndarray:
        """Return the limits of some queries for the computed values of a cell's points."""
        del cell
        return self.limit[part]

    def _lower(self, query: np.ndarray, point: np.ndarray, value: np.ndarray) -> None:
        """Lower the limits by pairs, in the order of their queries, where one neighbour is sought."""
        del point
        query, value = smallest_by_query(query, value)
        lower = np.flatnonzero(value < self.best[query, 0])
        if len(lower):
            self.best[query[lower], 0] = value[lower]
            self._limit(query[lower], value[lower])

    def _limit(self, part: np.ndarray, kth: np.ndarray) -> None:
        """Set the limits of some queries by a computed value that is not below their k-th smallest."""
        squared = self.squared[part]
        limit = certain_limit(kth.astype(np.float64) + squared, np.sqrt(squared), self.queries.shape[1], FLOAT32)
        limit[self.far[part]] = np.inf
        self.limit[part] = rounded_up(limit - squared)
        self.reach[part] = rounded_up(limit)

    def _sift(self, part: np.ndarray, near: np.ndarray, start: int) -> None:
        """Of queries with many candidates, leave only those that are candidates by float64 products too.

        Parameters
        ----------
        near
            (queries, points) bool, changed in place: the candidates of one product, whose points begin at `start`.
        """
        left = np.flatnonzero(near.sum(axis=1) > self.usual + SPARE)
        self.widened[part[left]] = True
        while len(left):
            origin = int(near[left[0]].argmax())
            crowd = near[left, origin]
            self._sift_about(origin, part, near, left[crowd], start)
            left = left[~crowd]

    def _sift_about(self, origin: int, part: np.ndarray, near: np.ndarray, crowded: np.ndarray, start: int) -> None:
        """Sift queries that share a candidate; about it, distances within its crowd lose next to nothing to rounding."""
        index = self.index
        candidates = near[crowded]
        wanted = np.flatnonzero(candidates.any(axis=0))
        span = slice(wanted[0], wanted[-1] + 1)
        point = index.rows[index.first[start + span.start : start + span.stop]]
        centre = index.targets[point[origin - span.start]].astype(np.float64)
        targets = (index.targets[point] - centre) * index.scale
        queries = (self.queries[part[crowded]] - centre) * index.scale
        values = (-2 * queries) @ targets.T
        values += np.einsum("td,td->t", targets, targets)
        np.copyto(values, np.inf, where=~candidates[:, span])
        squared = np.einsum("qd,qd->q", queries, queries)
        points = slice(start + span.start, start + span.stop)
        candidates[:, span] &= self._sifted(values, squared, part[crowded], points)
        near[crowded] = candidates

    def _sifted(self, values: np.ndarray, squared: np.ndarray, part: np.ndarray, points: slice) -> np.ndarray:
        """Return which pairs may be among the k nearest by float64 products, less the squared norms of the queries."""
        del part, points
        kth = kth_smallest(values, self.k) + squared
        limit = certain_limit(kth, np.sqrt(squared), self.queries.shape[1], FLOAT64) - squared
        return values <= np.minimum(limit, np.finfo(np.float64).max)[:, None]

    def _decided(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the pairs that are still within the limits, and their exact squared distances."""
        index = self.index
        query, point, value = self._ordered()
        if self.k > 1:
            self._limit_by(query, value)
        within = np.flatnonzero(value <= self.limit[query])
        query, row = self._members(query[within], point[within])
        other = row != self.skipped[query]
        query, row = query[other], row[other]
        return query, row, exact_squared(self.queries, index.targets, query, row)

    def _ordered(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return query, point and value of all pairs so far, in the order of the queries."""
        query, point, value = (np.concatenate(parts) for parts in zip(*self.pairs, strict=True))
        order = stable_order(query)
        return query[order], point[order], value[order]

    def _limit_by(self, query: np.ndarray, value: np.ndarray) -> None:
        """Set the limits by the k-th smallest computed value of all pairs, where the scans have not found it."""
        enough, kth = kth_by_query(query, value, self.k, len(self.queries))
        lower = kth < self.best[enough, -1]
        self._limit(enough[lower], kth[lower])

    def _members(self, query: np.ndarray, point: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the target rows behind the candidates: of a point's copies the first k, and one for the excluded."""
        copies = np.minimum(self.index.copies[point], self.k + 1)
        if len(self.index.copies) == len(self.index.rows):
            return query, self.index.rows[self.index.first[point]]
        ends = np.cumsum(copies)
        within = np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - copies, copies)
        return np.repeat(query, copies), self.index.rows[np.repeat(self.index.first[point], copies) + within]


# --- lists of the best -----------------------------------------------------------------------------------------------


def nothing_found(count: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return empty lists of rows and squared distances: (count, k) each."""
    return np.full((count, k), -1, dtype=np.int64), np.full((count, k), np.inf)


def k_best(count: int, k: int, query: np.ndarray, row: np.ndarray, exact: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return each query's k smallest pairs, by distance and then by row: (count, k) rows and squared distances.

    Pairs come in the order of their queries.
    """
    rows, squared = nothing_found(count, k)
    place, rank, pair = best_pairs(count, k, query, row, exact)
    rows[place, rank], squared[place, rank] = row[pair], exact[pair]
    return rows, squared


def best_pairs(
    count: int, k: int, query: np.ndarray, row: np.ndarray, exact: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the pairs of `k_best`: of each its query, its rank there, and its place among all pairs."""
    if k == 1:
        return _smallest_pairs(count, query, row, exact)
    order = stable_order(row)
    order = order[stable_order(query[order])]
    numbers = np.bincount(query, minlength=count)
    starts, widest = np.cumsum(numbers) - numbers, int(numbers.max(initial=0))
    if count * widest > WIDEST * len(query):  # a few queries have so many pairs that a table would be mostly empty
        order = np.lexsort((row, exact, query))
        place = query[order]
        rank = np.arange(len(place)) - starts[place]
        return place[rank < k], rank[rank < k], order[rank < k]
    table = tabled(count, query[order], exact[order], k)  # ties stay in the order of their rows
    column = np.argsort(table, axis=1, kind="stable")[:, :k]
    place, rank = np.nonzero(np.arange(k) < numbers[:, None])
    return place, rank, order[starts[place] + column[place, rank]]


def _smallest_pairs(
    count: int, query: np.ndarray, row: np.ndarray, exact: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    smallest, first = np.empty(count), np.empty(count, dtype=np.int64)
    asking, values = smallest_by_query(query, exact)
    smallest[asking] = values
    tied = np.flatnonzero(exact == smallest[query])
    asking, rows = smallest_by_query(query[tied], row[tied])
    first[asking] = rows
    pair = tied[row[tied] == first[query[tied]]]
    return asking, np.zeros(len(pair), dtype=np.int64), pair


def tabled(count: int, query: np.ndarray, values: np.ndarray, width: int) -> np.ndarray:
    """Return the values of pairs, which are in the order of their queries, as a table: (count, `width` or more)."""
    numbers = np.bincount(query, minlength=count)
    table = np.full((count, max(int(numbers.max(initial=0)), width)), np.inf, dtype=values.dtype)
    table[query, np.arange(len(query)) - np.repeat(np.cumsum(numbers) - numbers, numbers)] = values
    return table


def distances_of(rows: np.ndarray, squared: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return rows and float32 distances, NaN where there is no row."""
    return rows, np.where(rows < 0, np.nan, np.sqrt(squared)).astype(np.float32)
