"""Find exact nearest neighbours on the CPU (METHOD section 6).

Input: queries and the index of a target group. Output: rows and distances of the k nearest targets. In this module a
*cell* is a cell of the index's partition (see `partition`). The search has four steps:

1. The index rules out cells that certainly hold no neighbour.
2. Float32 products select candidates: targets within the k-th distance plus the worst rounding error.
3. If many candidates remain, float64 products reduce them. This is common: cells with the same codes have nearly the
   same embedding.
4. Float64 distances of the original coordinates decide. The smaller row wins ties.

So tiles, threads and partitions do not change the result.
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
"""Spare float32 candidates. A query with more than k + SPARE candidates is sifted in float64."""
QUERY_TILE = 16_384
"""Largest number of queries in a tile. One thread searches one tile."""
SCAN_PAIRS = 262_144
"""Query-target pairs of one matrix product, chosen to fit into the CPU cache."""
SETTLED_PAIRS = 2**20
"""Largest number of buffered query-target values before the limits of their queries are set."""
EXACT_PAIRS = 2048
"""Number of pairs whose exact distances are computed at once."""
WIDEST = 4
"""Largest ratio of table entries to pairs at which sorting the rows of a padded table beats sorting all pairs."""
FOLD = 4
"""Values per neighbour that `folded` keeps to find the k-th smallest. Fewer values give a looser limit."""
FAR = 1e15
"""Distance, in the index's frame, beyond which a query would overflow float32. It is sifted against all targets."""
FLOAT32, FLOAT64 = 2.0**-24, 2.0**-53
"""Unit roundoff: largest relative error of one rounding."""
Numbers = TypeVar("Numbers", bound=Any)
"""A numpy array or a torch tensor."""
LARGEST = np.finfo(np.float32).max
"""Value for "no limit". It is finite, so an excluded target, at infinity, still exceeds it."""


class Neighbours(NamedTuple):
    """The k nearest targets of every query.

    Attributes
    ----------
    rows, distances
        (q, k) int64 and float32, nearest first, ties by smaller row; -1 and NaN if there are fewer than k targets.
    widened
        (q,) bool, whether float32 left so many candidates that float64 had to reduce them.
    """

    rows: np.ndarray
    distances: np.ndarray
    widened: np.ndarray


def nearest(
    queries: np.ndarray, targets: np.ndarray | Index, k: int, *, exclude: np.ndarray | None = None, threads: int = 1
) -> Neighbours:
    """Return the k nearest targets of every query, exactly (METHOD section 6).

    Parameters
    ----------
    queries
        (q, d) float32 coordinates.
    targets
        (t, d) float32 coordinates, or their index.
    exclude
        (q,) target row that cannot match the query, or -1. It is the query itself if that is in the target group.
    threads
        Number of threads, which search tiles of queries in parallel.
    """
    skipped = np.full(len(queries), -1, dtype=np.int64) if exclude is None else np.asarray(exclude, dtype=np.int64)
    return tiled(
        len(queries), targets, k, threads, lambda index: lambda part: Tile(index, queries[part], skipped[part], k)
    )


def tiled(
    queries: int, targets: np.ndarray | Index, k: int, threads: int, prepare: Callable[[Index], Callable[[slice], Tile]]
) -> Neighbours:
    """Search tiles of queries.

    Parameters
    ----------
    queries
        Number of queries.
    prepare
        Returns, for the index of the targets, the function that makes the tile of a slice of the queries.
    """
    if not queries or not len(targets.targets if isinstance(targets, Index) else targets):
        return Neighbours(*distances_of(*nothing_found(queries, k)), np.zeros(queries, dtype=bool))
    with one_thread(targets):
        tile = prepare(targets if isinstance(targets, Index) else build_index(targets))
        parts = list(mapped(lambda part: tile(part).search(), tiles(queries, threads), threads))
    rows, squared, widened = (np.concatenate(values) for values in zip(*parts, strict=True))
    return Neighbours(*distances_of(rows, squared), widened)


def one_thread(points: np.ndarray | Index) -> AbstractContextManager[object]:
    """Limit BLAS to one thread. This takes milliseconds, so skip it for an index: its maker has set the limit."""
    return nullcontext() if isinstance(points, Index) else threadpool_limits(1)


def tiles(queries: int, threads: int) -> list[slice]:
    """Cut queries into tiles: at least one per thread, none above `QUERY_TILE`."""
    size = max(1, min(QUERY_TILE, -(-queries // threads)))
    return [slice(start, start + size) for start in range(0, queries, size)]


def mapped(function: Callable[[slice], tuple], parts: list[slice], threads: int) -> Iterator[tuple]:
    """Yield the function's result for every part, in order; run in parallel if there are several threads and parts."""
    if threads == 1 or len(parts) == 1:
        yield from map(function, parts)
        return
    with ThreadPoolExecutor(threads) as pool:
        yield from pool.map(function, parts)


# --- float arithmetic and its error bounds ---------------------------------------------------------------------------


def certain_limit(kth: Numbers, norms: Numbers, dimensions: int, rounding: float) -> Numbers:
    """Return the computed squared distance beyond which a target is certainly not among the k nearest: (q,).

    A target at distance e has a norm of at most |q| + e. So the error of a computed `|p|^2 - 2 q p + |q|^2` is at most
    E(e) = (d + 16) u (2 |q| + e)^2: d roundings in each sum, a few to add them, two to move to the index's frame. Both
    the k-th computed value and the value of another target at the same distance can be wrong by E, hence 2 E. The
    deciding distances have an error of d u e^2 themselves. The last constant covers underflow.

    Parameters
    ----------
    kth
        (q,) k-th smallest computed squared distance; infinite if there are fewer than k.
    norms
        (q,) norms of the queries.
    rounding
        Unit roundoff u: `FLOAT32` or `FLOAT64`.
    """
    factor = (2 * dimensions + 32) * rounding
    root = factor**0.5
    reach = (kth.clip(0) ** 0.5 + 2 * root * norms) / (1 - root)  # an upper bound of the true k-th distance
    return kth + 2 * factor * (2 * norms + reach) ** 2 + dimensions * 2.0**-120


def exact_squared(queries: np.ndarray, targets: np.ndarray, query: np.ndarray, row: np.ndarray) -> np.ndarray:
    """Return float64 squared distances of (query, row) pairs: (pairs,).

    Each distance is summed along its own contiguous row, so its bits depend on the pair alone.
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
    """Return the k-th smallest value of each row, infinite if it has fewer: (rows,)."""
    if values.shape[1] < k:
        return np.full(len(values), np.inf)
    smallest = values.min(axis=1) if k == 1 else np.partition(values, k - 1, axis=1)[:, k - 1]
    return smallest.astype(np.float64)


def folded(values: np.ndarray, width: int) -> np.ndarray:
    """Reduce each row to fewer than `2 * width` of its values, the smallest included: (rows, few).

    Each round takes the element-wise minimum of the two halves of the row. The k-th smallest of the remaining values is
    an upper bound of the k-th smallest of all. Sorting the few is much cheaper than partitioning the full row.
    """
    while values.shape[1] >= 2 * width:
        half = values.shape[1] // 2
        values = np.concatenate(
            [np.minimum(values[:, :half], values[:, half : 2 * half]), values[:, 2 * half :]], axis=1
        )
    return values


def sorted_by_query(query: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return float32 values sorted by query and, inside a query, ascending: (values,).

    Query and value are packed into one uint64 with the same order, which sorts many times faster than pairs do.
    """
    bits = values.view(np.uint32)
    ordered = np.where(bits >> 31, ~bits, bits | np.uint32(2**31))
    key = np.sort((query.astype(np.uint64) << np.uint64(32)) | ordered).astype(np.uint32)
    return np.where(key >> 31, key & np.uint32(2**31 - 1), ~key).astype(np.uint32).view(np.float32)


def kth_by_query(query: np.ndarray, values: np.ndarray, k: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the queries, of `count`, that have at least k values, and the k-th smallest value of each.

    The pairs (query, value) are sorted by query.
    """
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
    """Return the stable sort order of non-negative integers; 16 bits at a time, which numpy sorts by radix."""
    order = np.argsort(values.astype(np.uint16), kind="stable")
    for shift in range(16, int(values.max(initial=0)).bit_length(), 16):
        order = order[np.argsort((values[order] >> shift).astype(np.uint16), kind="stable")]
    return order


def smallest_by_query(query: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the distinct queries of pairs that are sorted by query, and the smallest value of each."""
    begins = np.append(0, np.flatnonzero(query[1:] != query[:-1]) + 1)[: len(query)]
    return query[begins], np.minimum.reduceat(values, begins) if len(query) else values


def rounded_up(limit: np.ndarray) -> np.ndarray:
    """Round up to float32, to `LARGEST` at most."""
    return np.nextafter(np.minimum(limit, LARGEST).astype(np.float32), LARGEST)


# --- one tile of queries ---------------------------------------------------------------------------------------------


class Tile:
    """The search of one tile of queries: it scans the cells of an index and collects candidates.

    A *computed value* is a computed squared distance minus the query's squared norm.

    Attributes
    ----------
    best
        (q, k) float32 smallest computed values so far.
    limit
        (q,) float32 computed value above which a point is no candidate; rounded up.
    reach
        (q,) float32 `limit` plus the squared norm; a cell whose points are all farther than it is ruled out.
    pairs
        Candidates as (query, point, computed value) arrays, one triple per scan.
    """

    def __init__(self, index: Index, queries: np.ndarray, skipped: np.ndarray, k: int) -> None:
        self.index, self.queries, self.skipped, self.k = index, queries, skipped, k
        self.products = index.points
        self.usual = k if k == 1 else 3 * k  # candidates of a query in one scan that need no sifting
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
        # If the excluded target has copies, its point stays a candidate, and `_decided` drops the row.
        self.excluded = np.where(index.copies[itself] == 1, itself, -1)
        self.excludes = bool((self.excluded >= 0).any())

    def search(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return rows and squared distances, (q, k) each, and which queries were widened, (q,)."""
        return *k_best(len(self.queries), self.k, *self.candidates()), self.widened

    @np.errstate(invalid="ignore")  # some BLAS kernels raise the flag for products of finite numbers
    def candidates(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return (query, target row) pairs that include the k nearest, and their exact squared distances."""
        begins, own = self.beginnings()
        self._scan_own(own)  # own cells first: their limits rule out most other cells
        begins[own, np.arange(len(own))] = np.inf
        for cell in range(self.index.cells):
            self._scan(cell, np.flatnonzero(begins[cell] <= self._reach(cell)))
        return self._decided()

    def beginnings(self) -> tuple[np.ndarray, np.ndarray]:
        """Return lower bounds of the squared distance to the points of each cell, (cells, q), and the own cell, (q,).

        The own cell of a query is the one with the nearest centroid.
        """
        along = self.local[:, : self.index.centroids.shape[1]] @ self.index.centroids.T
        nearness = np.einsum("cd,cd->c", self.index.centroids, self.index.centroids) / 2 - along
        own = nearness.argmin(axis=1)
        return self._beginnings(np.ascontiguousarray(along.T), own), own

    def _beginnings(self, along: np.ndarray, own: np.ndarray) -> np.ndarray:
        """Return lower bounds of the squared distance to the points of each cell: (cells, q), -1 for the own cell.

        The bound is the gap between the query and the nearest point of the cell, projected on the line from the own
        centroid to the centroid of that cell.
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
        """Return the lower bound up to which a cell has to be scanned: (q,) squared distances."""
        del cell
        return self.reach

    def _scan_own(self, own: np.ndarray) -> None:
        """Scan each query's own cell. Set limits for many queries at once, since each call has a fixed cost."""
        cuts = np.cumsum(np.bincount(own, minlength=self.index.cells))
        scanned: list[tuple[np.ndarray, int, np.ndarray, np.ndarray]] = []
        for cell, queries in enumerate(np.split(np.argsort(own, kind="stable"), cuts[:-1])):
            for part in self._parts(cell, queries):
                values = self._values(part, cell)
                scanned.append((part, cell, values, self._kth(part, values)))
                if sum(values.size for _, _, values, _ in scanned) > SETTLED_PAIRS:
                    self._settle(scanned, own)
                    scanned = []
        self._settle(scanned, own)

    def _settle(self, scanned: list[tuple[np.ndarray, int, np.ndarray, np.ndarray]], own: np.ndarray) -> None:
        """Set the limits of the buffered queries, each of which occurs once, and keep the points within the limits."""
        if not scanned:
            return
        queries = np.concatenate([part for part, _, _, _ in scanned])
        self._bound(queries, np.concatenate([kth for _, _, _, kth in scanned]), own[queries])
        limits = np.split(self._limits(queries, own[queries]), np.cumsum([len(part) for part, _, _, _ in scanned])[:-1])
        for (part, cell, values, _), limit in zip(scanned, limits, strict=True):
            self._choose(part, cell, values, values <= limit[:, None])

    def _scan(self, cell: int, queries: np.ndarray) -> None:
        """Compare some queries with the points of a cell, and keep the points within the limits."""
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
        """Cut queries into parts whose products with the points of a cell fit into the CPU cache."""
        step = max(1, SCAN_PAIRS // int(self.index.starts[cell + 1] - self.index.starts[cell]))
        return (queries[first : first + step] for first in range(0, len(queries), step))

    def _values(self, part: np.ndarray, cell: int) -> np.ndarray:
        """Return the computed values of some queries and the points of a cell: (queries, points)."""
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
        """Keep the pairs within the limits as candidates, and return them sorted by query."""
        start = int(self.index.starts[cell])
        if np.count_nonzero(near) > self.usual * len(part) + SPARE:
            self._sift(part, near, start)
        flat = np.flatnonzero(near)
        query, point = np.divmod(flat, near.shape[1])
        pairs = part[query], point + start, values.ravel()[flat]
        self.pairs.append(pairs)
        return pairs

    def _kth(self, part: np.ndarray, values: np.ndarray) -> np.ndarray:
        """Update `best` and return an upper bound of the k-th smallest computed value so far: (queries,)."""
        if self.k == 1:
            best = np.minimum(self.best[part], values.min(axis=1, keepdims=True))
        else:
            few = np.concatenate([self.best[part], folded(values, FOLD * self.k)], axis=1)
            best = np.sort(few, axis=1)[:, : self.k]
        self.best[part] = best
        return best[:, -1]

    def _bound(self, part: np.ndarray, kth: np.ndarray, cell: int | np.ndarray) -> None:
        """Set the limits of some queries from an upper bound of their k-th smallest computed value in a cell."""
        del cell
        self._limit(part, kth)

    def _limits(self, part: np.ndarray, cell: int | np.ndarray) -> np.ndarray:
        """Return the limits of some queries for the points of a cell: (queries,) computed values."""
        del cell
        return self.limit[part]

    def _lower(self, query: np.ndarray, point: np.ndarray, value: np.ndarray) -> None:
        """Lower the limits from new candidates, sorted by query; for k = 1."""
        del point
        query, value = smallest_by_query(query, value)
        lower = np.flatnonzero(value < self.best[query, 0])
        if len(lower):
            self.best[query[lower], 0] = value[lower]
            self._limit(query[lower], value[lower])

    def _limit(self, part: np.ndarray, kth: np.ndarray) -> None:
        """Set the limits of some queries from an upper bound of their k-th smallest computed value."""
        squared = self.squared[part]
        limit = certain_limit(kth.astype(np.float64) + squared, np.sqrt(squared), self.queries.shape[1], FLOAT32)
        limit[self.far[part]] = np.inf
        self.limit[part] = rounded_up(limit - squared)
        self.reach[part] = rounded_up(limit)

    def _sift(self, part: np.ndarray, near: np.ndarray, start: int) -> None:
        """Reduce the candidates of queries that have many, by float64 products.

        Parameters
        ----------
        near
            (queries, points) bool, changed in place: candidates among the points from `start` on.
        """
        left = np.flatnonzero(near.sum(axis=1) > self.usual + SPARE)
        self.widened[part[left]] = True
        while len(left):
            origin = int(near[left[0]].argmax())
            crowd = near[left, origin]
            self._sift_about(origin, part, near, left[crowd], start)
            left = left[~crowd]

    def _sift_about(self, origin: int, part: np.ndarray, near: np.ndarray, crowded: np.ndarray, start: int) -> None:
        """Sift queries that share a candidate, in a frame centred on it, where near copies lose little to rounding."""
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
        """Return which pairs can be among the k nearest by their float64 computed values: (queries, points) bool."""
        del part, points
        kth = kth_smallest(values, self.k) + squared
        limit = certain_limit(kth, np.sqrt(squared), self.queries.shape[1], FLOAT64) - squared
        return values <= np.minimum(limit, np.finfo(np.float64).max)[:, None]

    def _decided(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return (query, target row) pairs within the final limits, and their exact squared distances."""
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
        """Return query, point and computed value of all candidates so far, sorted by query."""
        query, point, value = (np.concatenate(parts) for parts in zip(*self.pairs, strict=True))
        order = stable_order(query)
        return query[order], point[order], value[order]

    def _limit_by(self, query: np.ndarray, value: np.ndarray) -> None:
        """Lower the limits to the k-th smallest computed value of all candidates; scans only have an upper bound."""
        enough, kth = kth_by_query(query, value, self.k, len(self.queries))
        lower = kth < self.best[enough, -1]
        self._limit(enough[lower], kth[lower])

    def _members(self, query: np.ndarray, point: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Expand candidate points to target rows: up to k + 1 copies each, since one may be the excluded row."""
        copies = np.minimum(self.index.copies[point], self.k + 1)
        if len(self.index.copies) == len(self.index.rows):
            return query, self.index.rows[self.index.first[point]]
        ends = np.cumsum(copies)
        within = np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - copies, copies)
        return np.repeat(query, copies), self.index.rows[np.repeat(self.index.first[point], copies) + within]


# --- selection of the k best pairs -----------------------------------------------------------------------------------


def nothing_found(count: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return rows of -1 and infinite squared distances: (count, k) each."""
    return np.full((count, k), -1, dtype=np.int64), np.full((count, k), np.inf)


def k_best(count: int, k: int, query: np.ndarray, row: np.ndarray, exact: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return rows and squared distances of each query's k nearest targets: (count, k) each, ties by smaller row.

    The pairs must be sorted by query.
    """
    rows, squared = nothing_found(count, k)
    place, rank, pair = best_pairs(count, k, query, row, exact)
    rows[place, rank], squared[place, rank] = row[pair], exact[pair]
    return rows, squared


def best_pairs(
    count: int, k: int, query: np.ndarray, row: np.ndarray, exact: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return query, rank and position (among all pairs) of the pairs that `k_best` selects."""
    if k == 1:
        return _smallest_pairs(count, query, row, exact)
    order = stable_order(row)
    order = order[stable_order(query[order])]
    numbers = np.bincount(query, minlength=count)
    starts, widest = np.cumsum(numbers) - numbers, int(numbers.max(initial=0))
    if count * widest > WIDEST * len(query):  # a few queries have most pairs: a padded table would be mostly empty
        order = np.lexsort((row, exact, query))
        place = query[order]
        rank = np.arange(len(place)) - starts[place]
        return place[rank < k], rank[rank < k], order[rank < k]
    table = tabled(count, query[order], exact[order], k)  # rows ascend, so a stable sort puts the smaller row first
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
    """Return values sorted by query as a table padded with infinity: (count, at least `width`)."""
    numbers = np.bincount(query, minlength=count)
    table = np.full((count, max(int(numbers.max(initial=0)), width)), np.inf, dtype=values.dtype)
    table[query, np.arange(len(query)) - np.repeat(np.cumsum(numbers) - numbers, numbers)] = values
    return table


def distances_of(rows: np.ndarray, squared: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows, and their distances as float32; NaN where the row is -1."""
    return rows, np.where(rows < 0, np.nan, np.sqrt(squared)).astype(np.float32)
