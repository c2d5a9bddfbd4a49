"""Exact nearest neighbours, and the stage that finds every needed one (METHOD section 6).

In: the embedding's PCA coordinates and the design's edges (query group, target group). Out: matches.zarr, which all
effects and statistics read. float32 search proposes, float64 distances of the original coordinates decide, the smaller
row wins ties, and a bound on float32's rounding certifies that no better target was overlooked; where it cannot (near
copies are ordinary here, as cells with the same codes have the same embedding), every target within the bound is
looked at. So neither tiles nor threads nor devices change the answer.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ndreamer_dist import keys
from ndreamer_dist.cohort.design import Design
from ndreamer_dist.errors import StoreError
from ndreamer_dist.match.index import QUERY_TILE, centred, has_gpu, propose
from ndreamer_dist.rundir import RunDirectory, Shard
from ndreamer_dist.runtime import Runtime
from ndreamer_dist.settings import Settings
from ndreamer_dist.storage import Storage, ensure_array, read_array, shard_files, write_part

logger = logging.getLogger(__name__)

SPARE = 8
"""Candidates proposed beyond the k asked for."""
PAIRS = 16_384
"""Query-target pairs whose exact distances are computed at once."""
WIDE_QUERIES, WIDE_TARGETS = 256, 16_384
"""Tile of the distance matrix in which uncertified queries look at all targets."""
UNIT_DISTANCES = 4_000_000_000
"""Distances of one unit of work, some tens of seconds; a single edge tile may have more."""


def nearest(
    queries: np.ndarray, targets: np.ndarray, k: int, *, exclude: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, int]:
    """Return the k nearest targets of every query, exactly (METHOD section 6).

    Parameters
    ----------
    queries, targets
        (q, d) and (t, d) float32 coordinates.
    exclude
        (q,) target row that is no candidate for a query, or -1: the cell itself in its own group.

    Returns
    -------
    rows, distances
        (q, k) int64 and (q, k) float32, nearest first, ties by smaller row; -1 and NaN where there are fewer targets.
    widened
        Number of queries whose first candidates could not be certified.
    """
    skipped = np.full(len(queries), -1, dtype=np.int64) if exclude is None else np.asarray(exclude, dtype=np.int64)
    rows, squared = _nothing_found(len(queries), k)
    if not len(queries) or not len(targets):
        return rows, _distances(squared), 0
    centre = targets.mean(axis=0, dtype=np.float64)
    final = np.zeros(len(queries), dtype=bool)
    for start in range(0, len(queries), QUERY_TILE):
        tile = slice(start, start + QUERY_TILE)
        rows[tile], squared[tile], final[tile] = _first_pass(queries[tile], targets, centre, k, skipped[tile])
    pending = np.flatnonzero(~final)
    if len(pending):
        limits = certain_limit(squared[pending, k - 1], queries[pending], centre)
        found = _all_within(queries[pending], targets, centre, k, skipped[pending], limits)
        rows[pending], squared[pending] = found
    return rows, _distances(squared), len(pending)


def certain_limit(kth: np.ndarray, queries: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """Return the float32 squared distance beyond which no target can be among a query's k nearest.

    A target at most as far as the k-th candidate, e, has a centred norm of at most |q| + e, so float32 puts its
    squared distance at most (d + 16) 2^-24 (2 |q| + e)^2 too high: d roundings in each of the three sums, a few in
    adding them, two in centring. The constant at the end is for underflow.

    Parameters
    ----------
    kth
        (q,) exact squared distance of the k-th candidate; infinite where there is none.
    """
    dimensions = queries.shape[1]
    norms = np.sqrt(((queries.astype(np.float64) - centre) ** 2).sum(axis=1))
    error = (dimensions + 16) * 2.0**-24 * (2 * norms + np.sqrt(kth)) ** 2
    return kth + error + dimensions * 2.0**-140


def exact_squared(queries: np.ndarray, targets: np.ndarray, query: np.ndarray, row: np.ndarray) -> np.ndarray:
    """Return float64 squared distances of pairs (query, row): (pairs,).

    Each is a sum along its own contiguous row of coordinates, so its bits depend on the pair alone.
    """
    squared = np.empty(len(query))
    for start in range(0, len(query), PAIRS):
        part = slice(start, start + PAIRS)
        difference = queries[query[part]].astype(np.float64) - targets[row[part]]
        difference *= difference
        squared[part] = difference.sum(axis=1)
    return squared


def _first_pass(
    queries: np.ndarray, targets: np.ndarray, centre: np.ndarray, k: int, skipped: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the best of the proposed candidates, and for which queries they are certainly the best of all."""
    count = min(len(targets), k + 1 + SPARE)
    candidates, approximate = propose(queries, targets, centre, count)
    query, place = np.nonzero((candidates >= 0) & (candidates != skipped[:, None]))
    row = candidates[query, place]
    exact = exact_squared(queries, targets, query, row)
    rows, squared = _k_best(len(queries), k, query, row, exact)
    last = approximate[:, -1].astype(np.float64)
    final = np.isfinite(last) & (last > certain_limit(squared[:, k - 1], queries, centre))
    # Where FAISS met an infinity it hands out no row at all, so that even a full list proves nothing.
    final |= (count == len(targets)) & (candidates >= 0).all(axis=1)
    return rows, squared, final


def _all_within(
    queries: np.ndarray, targets: np.ndarray, centre: np.ndarray, k: int, skipped: np.ndarray, limits: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the best of all targets whose float32 squared distance is within each query's limit."""
    rows, squared = _nothing_found(len(queries), k)
    ceilings = np.nextafter(limits.astype(np.float32), np.float32(np.inf))
    for first in range(0, len(targets), WIDE_TARGETS):
        block = centred(targets[first : first + WIDE_TARGETS], centre)
        for start in range(0, len(queries), WIDE_QUERIES):
            tile = slice(start, start + WIDE_QUERIES)
            far = _float32_squared(centred(queries[tile], centre), block) > ceilings[tile, None]
            query, row = np.nonzero(~far)  # a NaN, from overflow, is no proof of distance
            row += first
            kept = row != skipped[tile][query]
            query, row = query[kept], row[kept]
            exact = exact_squared(queries[tile], targets, query, row)
            rows[tile], squared[tile] = _merged(rows[tile], squared[tile], query, row, exact)
    return rows, squared


def _float32_squared(queries: np.ndarray, block: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore"):
        squared = np.matmul(queries * np.float32(-2), block.T)
        squared += np.einsum("td,td->t", block, block)
        squared += np.einsum("qd,qd->q", queries, queries)[:, None]
    return squared


def _nothing_found(count: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    return np.full((count, k), -1, dtype=np.int64), np.full((count, k), np.inf)


def _k_best(count: int, k: int, query: np.ndarray, row: np.ndarray, exact: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return each query's k smallest pairs, by distance and then by row: (count, k) rows and squared distances."""
    rows, squared = _nothing_found(count, k)
    order = np.lexsort((row, exact, query))
    query = query[order]
    rank = np.arange(len(query)) - np.searchsorted(query, query)
    kept = rank < k
    rows[query[kept], rank[kept]] = row[order[kept]]
    squared[query[kept], rank[kept]] = exact[order[kept]]
    return rows, squared


def _merged(
    rows: np.ndarray, squared: np.ndarray, query: np.ndarray, row: np.ndarray, exact: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the k best of what was found and of further pairs."""
    if not len(query):
        return rows, squared
    old, place = np.nonzero(rows >= 0)
    return _k_best(
        rows.shape[0],
        rows.shape[1],
        np.concatenate([old, query]),
        np.concatenate([rows[old, place], row]),
        np.concatenate([squared[old, place], exact]),
    )


def _distances(squared: np.ndarray) -> np.ndarray:
    return np.where(np.isinf(squared), np.nan, np.sqrt(squared)).astype(np.float32)


# --- the stage -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EdgeTile:
    """The cells of one tile of a query group against one target group: one chunk, one writer."""

    query: int
    tile: int
    target: int


@dataclass(frozen=True)
class Unit:
    """What one task does: edge tiles that share a target group."""

    target: int
    shards: tuple[Shard, ...]
    distances: int


@dataclass(frozen=True)
class Matches:
    """Reader of matches.zarr.

    Layout: `<query group>/row` (cells of the group, groups, k) int32, the packed row of each neighbour, and
    `<query group>/distance` float32, -1 and NaN where a target group has fewer cells.
    """

    storage: Storage

    def edge(
        self, query_group: int, target_group: int, start: int = 0, stop: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return rows and distances of the cells `start:stop` of a group in a target group: (cells, k) each.

        Raises
        ------
        StoreError
            The edge was not searched, or a chunk is missing or damaged.
        """
        part = (slice(start, stop), slice(target_group, target_group + 1), slice(None))
        rows, distances = (
            read_array(self.storage, f"{keys.block_name(query_group)}/{name}", part)[:, 0]
            for name in (keys.MATCH_ROW, keys.MATCH_DISTANCE)
        )
        return rows, distances


def run_match(run: RunDirectory, settings: Settings, design: Design, runtime: Runtime, key: str) -> None:
    """Find the nearest neighbours along every needed edge and write matches.zarr (METHOD section 6).

    Raises
    ------
    StoreError
        The embedding is missing, damaged or not finite.
    """
    shards = list(_shards(settings, design))
    todo = run.pending(keys.STAGE_MATCH, key, shards)
    if not todo:
        return
    if len(todo) == len(shards):
        run.unmark(keys.STAGE_MATCH)
        run.storage.delete(keys.MATCHES)
    _make_arrays(run.storage / keys.MATCHES, settings, design)
    gpus = 1.0 if runtime.gpus and has_gpu() else 0.0
    done = runtime.map(
        _search_unit, _units(todo, settings, design), run, settings, design, key, title="match", num_gpus=gpus
    )
    widened, queries = (sum(numbers) for numbers in zip(*done, strict=True))
    logger.info("match: %d of %d searches had to look beyond their first candidates", widened, queries)


def _make_arrays(storage: Storage, settings: Settings, design: Design) -> None:
    k, groups = settings.match.neighbours, len(design.groups)
    for group in design.groups:
        layout = {
            "shape": (group.cells, groups, k),
            "chunks": (min(settings.match.query_rows, group.cells), 1, k),
        }
        name = keys.block_name(group.code)
        ensure_array(storage, f"{name}/{keys.MATCH_ROW}", dtype=row_dtype(design.n_cells), fill_value=-1, **layout)
        ensure_array(storage, f"{name}/{keys.MATCH_DISTANCE}", dtype="float32", fill_value=np.nan, **layout)


def row_dtype(cells: int) -> str:
    """Return the integer type that holds row numbers."""
    return "int32" if cells <= np.iinfo(np.int32).max else "int64"


def _shards(settings: Settings, design: Design) -> Iterator[Shard]:
    for query, target in design.needed_edges(settings.match.edges):
        for tile in range(-(-design.groups[query].cells // settings.match.query_rows)):
            files = tuple(
                f"{keys.MATCHES}/{shard_files(f'{keys.block_name(query)}/{name}', tile, target, 0)}"
                for name in (keys.MATCH_ROW, keys.MATCH_DISTANCE)
            )
            yield Shard(f"{query:05d}-{tile:05d}-{target:05d}", files, EdgeTile(query, tile, target))


def _units(todo: Sequence[Shard], settings: Settings, design: Design) -> list[Unit]:
    """Gather the edge tiles of each target group into units of bounded work, the largest first."""
    units: list[Unit] = []
    for target in sorted({shard.task.target for shard in todo}):
        gathered: list[Shard] = []
        total = 0
        for shard in (shard for shard in todo if shard.task.target == target):
            start, stop = _tile_range(shard.task, settings, design)
            distances = (stop - start) * design.groups[target].cells
            if gathered and total + distances > UNIT_DISTANCES:
                units.append(Unit(target, tuple(gathered), total))
                gathered, total = [], 0
            gathered.append(shard)
            total += distances
        units.append(Unit(target, tuple(gathered), total))
    return sorted(units, key=lambda unit: (-unit.distances, unit.target))


def _tile_range(edge: EdgeTile, settings: Settings, design: Design) -> tuple[int, int]:
    """Return the rows of a tile, counted from the start of its group."""
    start = edge.tile * settings.match.query_rows
    return start, min(start + settings.match.query_rows, design.groups[edge.query].cells)


def _search_unit(unit: Unit, run: RunDirectory, settings: Settings, design: Design, key: str) -> tuple[int, int]:
    """Search a unit's edge tiles; return how many queries were widened, and how many there were."""
    group = design.groups[unit.target]
    targets = _coordinates(run, group.start, group.stop)
    widened = queries = 0
    for shard in unit.shards:
        start, stop = _tile_range(shard.task, settings, design)
        widened += _search_edge(shard.task, start, stop, targets, run, settings, design)
        queries += stop - start
        run.mark(keys.STAGE_MATCH, key, shard)
    return widened, queries


def _search_edge(
    edge: EdgeTile, start: int, stop: int, targets: np.ndarray, run: RunDirectory, settings: Settings, design: Design
) -> int:
    query, target = design.groups[edge.query], design.groups[edge.target]
    points = _coordinates(run, query.start + start, query.start + stop)
    itself = np.arange(start, stop) if edge.query == edge.target else None
    rows, distances, widened = nearest(points, targets, settings.match.neighbours, exclude=itself)
    packed = np.where(rows < 0, -1, rows + target.start)
    storage, name = run.storage / keys.MATCHES, keys.block_name(edge.query)
    part = (slice(start, stop), slice(edge.target, edge.target + 1), slice(None))
    write_part(storage, f"{name}/{keys.MATCH_ROW}", part, packed[:, None, :])
    write_part(storage, f"{name}/{keys.MATCH_DISTANCE}", part, distances[:, None, :])
    return widened


def _coordinates(run: RunDirectory, start: int, stop: int) -> np.ndarray:
    points = read_array(run.storage / keys.EMBEDDING, keys.PCA, slice(start, stop))
    if not np.isfinite(points).all():
        row = start + int(np.flatnonzero(~np.isfinite(points).all(axis=1))[0])
        msg = f"{run.url}/{keys.EMBEDDING}: '{keys.PCA}' is not finite in row {row}; training has diverged"
        raise StoreError(msg)
    return points
