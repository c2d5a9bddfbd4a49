"""The stage `match`: search the nearest neighbours along every needed edge (METHOD section 6).

Input: the coordinates of the matching space and the edges of the design. An edge is a (query group, target group) pair.
Output: matches.zarr, which all effects and statistics read, and match/summary.json, which describes the search. The
search is exact: `exact` runs on the CPU and `gpu` on a GPU, with the same bits. With `match.hubs`, `hubs` measures the
remoteness of targets from the query group and searches by corrected distances. The edge from a group to itself, which
finds the nearest other cell, is never corrected. With `match.within`, `labels` restricts matches to cells of the same
label. Edges can be added to a finished run; stored matches are neither searched again nor changed.
"""

from __future__ import annotations

import itertools
import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from threadpoolctl import threadpool_limits

from ndreamer_dist import keys
from ndreamer_dist.cohort.design import Design
from ndreamer_dist.cohort.obsm import CellLabels
from ndreamer_dist.compute.engines import chosen_device
from ndreamer_dist.compute.executor import Runtime, fetch
from ndreamer_dist.errors import RunError, StoreError, shown
from ndreamer_dist.matching.exact import Neighbours, nearest
from ndreamer_dist.matching.hubs import MOST_QUERIES, Remoteness, nearest_corrected
from ndreamer_dist.matching.labels import (
    WHOLE,
    Placed,
    Stratum,
    inside_labels,
    nearest_by_stratum,
    places_among,
    strata_of,
)
from ndreamer_dist.matching.partition import Index, build_index
from ndreamer_dist.matching.store import row_dtype
from ndreamer_dist.rundir.directory import RunDirectory, Shard
from ndreamer_dist.rundir.stage import StageRun
from ndreamer_dist.settings import Settings
from ndreamer_dist.storage.arrays import ensure_array, read_array, shard_files, write_array, write_chunk
from ndreamer_dist.storage.files import Storage

if TYPE_CHECKING:
    from ndreamer_dist.matching.gpu import GpuIndex

logger = logging.getLogger(__name__)

Pairs = Sequence[tuple[int, int]]
"""Edges: (query group, target group)."""

UNIT_DISTANCES = 20_000_000_000
"""Most query-target pairs of a unit, some tens of seconds of work; a single edge tile may have more."""
LEAST_DISTANCES = 200_000_000
"""Query-target pairs, some tenths of a second of work, below which a unit is not cut to balance workers."""
EDGE_DISTANCES = 2_000_000
"""Fixed cost of an edge tile, mostly of writing files, in units of one query-target pair."""
CROWDED = 0.04
"""Share of a group's cells; we warn if effects average more neighbours than this."""
WRITING_THREADS = 8
"""Threads that write the results of a GPU; on object storage, a file takes several round trips."""
BATCH_QUERIES = 65_536
"""Most queries that are searched together in a target group."""
BATCH_CORRECTED, BATCH_GROUPS = 16_384, 8
"""Most queries, and most query groups, of a batch of several query groups whose distances are corrected for hubs."""
FEW_INSIDE = 0.8
"""Share of control matches inside the cells' labels below which we warn."""


@dataclass(frozen=True)
class EdgeTile:
    """One tile of a query group's cells, matched in one target group. It is one chunk with one writer.

    Attributes
    ----------
    query, target
        Group codes.
    tile
        Number of the tile in its group; tiles have `match.query_rows` cells.
    """

    query: int
    tile: int
    target: int


@dataclass(frozen=True)
class Unit:
    """The work of one task: edge tiles, sorted by target group, and their cost in query-target pairs."""

    shards: tuple[Shard, ...]
    distances: int


def run_match(
    run: RunDirectory, settings: Settings, design: Design, runtime: Runtime, key: str, labels: CellLabels | None = None
) -> None:
    """Find the nearest neighbours along every edge and write matches.zarr (METHOD section 6).

    Parameters
    ----------
    labels
        Labels of the packed rows if `match.within` is set, else None.

    Raises
    ------
    StoreError
        The embedding is missing, damaged or not finite.
    """
    shards = [*label_shards(settings), *edge_shards(settings, design, design.needed_edges(settings.match.edges))]
    warn_of_crowding(settings, design)
    todo = StageRun(run, keys.STAGE_MATCH, key).begin(shards, (keys.MATCHES,))
    for shard in label_shards(settings):
        if labels is not None and shard in todo:
            write_array(run.storage / keys.MATCHES, keys.MATCH_LABEL, labels.codes)
            run.mark(keys.STAGE_MATCH, key, shard)
    found = _search(run, settings, design, runtime, key, [shard for shard in todo if shard.task is not None])
    if todo or _summary_key(run) != key:
        extra = {} if labels is None else _label_summary(labels, settings, design)
        write_summary(run, settings, design, key, found, extra)


def _label_summary(labels: CellLabels, settings: Settings, design: Design) -> dict[str, Any]:
    """Log and return the share of matches inside the cells' labels, as an entry of the summary."""
    inside = inside_labels(labels, design, str(settings.match.within), settings.match.within_cells)
    logger.info("match: %s; the others are among all cells of a group with fewer than %d", inside, inside.cells)
    if inside.share < FEW_INSIDE:
        logger.warning(
            "match: few matches are inside the labels of match.within=%s: are they cell types, found in both "
            "conditions?",
            shown(inside.column),
        )
    if inside.uneven:
        logger.warning("match: %s", inside.warning)
    return {"within": asdict(inside)}


def warn_of_crowding(settings: Settings, design: Design) -> None:
    """Warn if effects average so many neighbours that these span several states of a group (METHOD section 9)."""
    k, cells = settings.match.neighbours, np.array([group.cells for group in design.groups])
    few = np.flatnonzero(k > CROWDED * cells)
    if k > 1 and len(few):
        smallest = design.groups[int(cells.argmin())]
        logger.warning(
            "match: match.neighbours (%d) is more than %.0f %% of the cells of %d of %d groups (%s: %d): their effects "
            "take in cells of other states", k, CROWDED * 100, len(few), len(cells), smallest.name, smallest.cells,
        )  # fmt: skip


def add_edges(run: RunDirectory, settings: Settings, design: Design, runtime: Runtime, key: str, edges: str) -> int:
    """Search more edges of a finished run and add them to its matches.zarr; results.zarr does not change.

    Parameters
    ----------
    key
        Key of the run's match stage.
    edges
        `all`, or the name of a condition: the edges from every group to the groups of that condition.

    Returns
    -------
    Number of edges that were searched; stored ones are skipped.

    Raises
    ------
    QueryError
        There is no such condition.
    RunError
        The run has not finished its own matches.
    """
    pairs = asked_edges(design, edges)
    needed = [*label_shards(settings), *edge_shards(settings, design, design.needed_edges("needed"))]
    if run.pending(keys.STAGE_MATCH, key, needed):
        msg = f"{run.url} has not finished matching; give its `run` command again first"
        raise RunError(msg)
    todo = run.pending(keys.STAGE_MATCH, key, edge_shards(settings, design, pairs))
    _search(run, settings, design, runtime, key, todo)
    return len({(shard.task.query, shard.task.target) for shard in todo})


def asked_edges(design: Design, edges: str) -> Pairs:
    """Return the edges that a word names: `needed`, `all`, or a condition, for all edges to its groups."""
    if edges == "needed":
        return design.needed_edges("needed")
    if edges == "all":
        design.refuse_all_edges()
        return design.needed_edges("all")
    code = design.condition_code(edges)
    return [(query.code, target.code) for query in design.groups for target in design.counted(code, query)]


# --- the summary -----------------------------------------------------------------------------------------------------


def write_summary(
    run: RunDirectory, settings: Settings, design: Design, key: str,
    found: Mapping[str, Mapping[str, int]], extra: Mapping[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """Write match/summary.json, which covers the needed edges, and return its contents.

    Parameters
    ----------
    found
        Counts of the edge tiles that were just searched, by shard name; the counts of others are in their markers.
    extra
        Further entries of the summary.
    """
    shards = edge_shards(settings, design, design.needed_edges("needed"))
    counts = [found.get(shard.name) or run.facts(keys.STAGE_MATCH, shard) for shard in shards]
    total = {name: sum(count[name] for count in counts) for name in ("queries", "widened")}
    summary = {
        "key": key,
        "searches": total["queries"],
        "widened": total["widened"],
        "widened_share": total["widened"] / max(total["queries"], 1),
        **extra,
    }
    run.write_json(keys.MATCH_SUMMARY, summary)
    logger.info(
        "match: %d of %d searches had to look beyond their first candidates", total["widened"], total["queries"]
    )
    return summary


def _summary_key(run: RunDirectory) -> str | None:
    return run.read_json(keys.MATCH_SUMMARY)["key"] if run.storage.exists(keys.MATCH_SUMMARY) else None


# --- the work and its cuts -------------------------------------------------------------------------------------------


def edge_shards(settings: Settings, design: Design, pairs: Pairs) -> list[Shard]:
    """Return one shard per edge tile of some edges."""
    shards = []
    for query, target in pairs:
        for tile in range(-(-design.groups[query].cells // settings.match.query_rows)):
            files = tuple(
                f"{keys.MATCHES}/{shard_files(f'{keys.block_name(query)}/{name}', tile, target, 0)}"
                for name in (keys.MATCH_ROW, keys.MATCH_DISTANCE)
            )
            shards.append(Shard(f"{query:05d}-{tile:05d}-{target:05d}", files, EdgeTile(query, tile, target)))
    return shards


def label_shards(settings: Settings) -> list[Shard]:
    """Return the shard of all cells' labels, which the driver writes; no shard without `match.within`."""
    files = (f"{keys.MATCHES}/{shard_files(keys.MATCH_LABEL, 0)}",)
    return [] if settings.match.within is None else [Shard(keys.MATCH_LABEL, files)]


def is_corrected(edge: EdgeTile, settings: Settings) -> bool:
    """Return whether distances along an edge are corrected for hubs; distances inside a group never are."""
    return settings.match.hubs == "csls" and edge.query != edge.target


def edge_neighbours(edge: EdgeTile, settings: Settings, design: Design) -> int:
    """Return the number of neighbours to search along an edge; `denoised` needs more of the own condition."""
    query, target = design.groups[edge.query], design.groups[edge.target]
    if query.condition == target.condition and query != target:
        return most_neighbours(settings, design)
    return settings.match.neighbours


def most_neighbours(settings: Settings, design: Design) -> int:
    """Return the largest number of neighbours of a cell in a group."""
    return max(settings.match.neighbours, settings.denoise.counted(design.fewest_groups))


def units(todo: Sequence[Shard], settings: Settings, design: Design, workers: int) -> list[Unit]:
    """Pack edge tiles into units of bounded work, about four per worker, largest first.

    Tiles of one target group stay adjacent, so few units build its index. Tiny edges share a unit.
    """
    ordered = sorted(todo, key=lambda shard: (shard.task.target, shard.task.query, shard.task.tile))
    costs = [_cost(shard.task, settings, design) for shard in ordered]
    even = sum(costs) // (4 * workers) if workers > 1 else UNIT_DISTANCES  # one worker has nothing to balance
    limit = min(UNIT_DISTANCES, max(LEAST_DISTANCES, even))
    result: list[Unit] = []
    gathered: list[Shard] = []
    total = 0
    for shard, cost in zip(ordered, costs, strict=True):
        if gathered and total + cost > limit:
            result.append(Unit(tuple(gathered), total))
            gathered, total = [], 0
        gathered.append(shard)
        total += cost
    result.append(Unit(tuple(gathered), total))
    return sorted(result, key=lambda unit: -unit.distances)


def _cost(edge: EdgeTile, settings: Settings, design: Design) -> int:
    start, stop = _tile_range(edge, settings, design)
    asking = len(_asking(edge, settings, design)) if design.sampled else stop - start
    targets = design.groups[edge.target].cells
    corrected = is_corrected(edge, settings) and not design.sampled  # with sampling, a target group is measured once
    measured = min(design.groups[edge.query].cells, MOST_QUERIES) if corrected else 0
    return (asking + measured) * targets + EDGE_DISTANCES


def _asking(edge: EdgeTile, settings: Settings, design: Design) -> np.ndarray:
    """Return the cells of a tile that are matched along its edge: row numbers inside their group."""
    cells = np.arange(*_tile_range(edge, settings, design))
    return cells[design.taking(design.groups[edge.query], design.groups[edge.target], cells)]


def _tile_range(edge: EdgeTile, settings: Settings, design: Design) -> tuple[int, int]:
    """Return the first row of a tile, and the one after its last, counted from the start of its group."""
    start = edge.tile * settings.match.query_rows
    return start, min(start + settings.match.query_rows, design.groups[edge.query].cells)


def _make_arrays(storage: Storage, settings: Settings, design: Design) -> None:
    k, groups = most_neighbours(settings, design), len(design.groups)
    for group in design.own_groups:
        layout = {
            "shape": (group.cells, groups, k),
            "chunks": (min(settings.match.query_rows, group.cells), 1, k),
        }
        name = keys.block_name(group.code)
        ensure_array(storage, f"{name}/{keys.MATCH_ROW}", dtype=row_dtype(design.n_cells), fill_value=-1, **layout)
        ensure_array(storage, f"{name}/{keys.MATCH_DISTANCE}", dtype="float32", fill_value=np.nan, **layout)


# --- the search ------------------------------------------------------------------------------------------------------


def _search(
    run: RunDirectory, settings: Settings, design: Design, runtime: Runtime, key: str, todo: Sequence[Shard]
) -> dict[str, dict[str, int]]:
    """Search edge tiles and return their counts, by shard name."""
    if not todo:
        return {}
    _make_arrays(run.storage / keys.MATCHES, settings, design)
    labels = None if settings.match.within is None else read_array(run.storage / keys.MATCHES, keys.MATCH_LABEL)
    settings = _with_device(settings, runtime)
    on_gpus = settings.match.device == "cuda"
    cells = _shared_cells(run, settings.embed.method, labels, runtime, on_gpus=on_gpus)
    parts = units(todo, settings, design, workers=runtime.gpus if on_gpus else runtime.cpus)
    counts: dict[str, dict[str, int]] = {}
    for found in runtime.map(
        search_unit, parts, run, settings, design, key, cells, title="match", num_gpus=float(on_gpus)
    ):
        counts |= found
    return counts


@dataclass(frozen=True)
class StoredPlaces:
    """A handle of the cells in Ray's object store. A task put them there, so they did not pass through the driver."""

    handle: Any


def _shared_cells(
    run: RunDirectory, method: str, labels: np.ndarray | None, runtime: Runtime, *, on_gpus: bool
) -> Placed | StoredPlaces:
    """Return the cells that all tasks share.

    On GPUs these are the cells themselves, not a handle: a process caches the copy on its GPU by the object's identity.
    """
    if runtime.serial or on_gpus:
        return _read_cells(run, method, labels)
    return StoredPlaces(runtime.submit(_read_cells, run, method, labels)[0])


def _read_cells(run: RunDirectory, method: str, labels: np.ndarray | None) -> Placed:
    return Placed(coordinates(run, method), labels)


def _with_device(settings: Settings, runtime: Runtime) -> Settings:
    """Return the settings with the device of the search."""
    from ndreamer_dist.matching.gpu import faiss_finding

    device = chosen_device(settings.match.device, "match.device", runtime, faiss_finding)
    return settings.model_copy(update={"match": settings.match.model_copy(update={"device": device})})


def coordinates(run: RunDirectory, method: str = keys.NDREAMER) -> np.ndarray:
    """Return the coordinates of all cells in a matching space: (cells, d) float32, in packed order.

    For mapped cells, the coordinates of the cells they are mapped onto come first.

    Raises
    ------
    StoreError
        The coordinates are missing, damaged or not finite.
    """
    if run.onto:
        return np.concatenate([coordinates(part, method) for part in (*run.onto, replace(run, onto=()))])
    name = keys.embedding_key(method)
    storage = run.embedding(name)
    points = read_array(storage, name)
    finite = np.isfinite(points).all(axis=1)
    if not finite.all():
        row = int(np.flatnonzero(~finite)[0])
        why = "; training has diverged" if keys.is_trained(method) else ""
        msg = f"{storage.url}: '{name}' is not finite in row {row}{why}"
        raise StoreError(msg)
    return points


def search_unit(
    unit: Unit, run: RunDirectory, settings: Settings, design: Design, key: str, cells: Placed | StoredPlaces
) -> dict[str, dict[str, int]]:
    """Search a unit's edge tiles, write and mark them, and return their counts, by shard name; a task.

    Threads write the results of a GPU while it searches on.
    """
    cells = fetch(cells.handle) if isinstance(cells, StoredPlaces) else cells
    counts: dict[str, dict[str, int]] = {}
    pooled = design.sampled > 0
    starts = design.stored_starts() if pooled else design.starts
    edges = list(dict.fromkeys((s.task.target, s.task.query) for s in unit.shards if is_corrected(s.task, settings)))
    on_device, measuring = _on_device(cells, settings.match.device)
    remote_from = measuring(
        on_device.points, starts, cells.labels, edges=edges, pooled=pooled, threads=settings.run.task_threads
    )

    def finish(shard: Shard, found: Found) -> None:
        _write(shard.task, found, run, settings, design)
        counts[shard.name] = found.counts
        run.mark(keys.STAGE_MATCH, key, shard, found.counts)

    # One BLAS thread: the same partitions, and so counts of widened queries, for any `run.task_threads`.
    with threadpool_limits(1), _written_by(WRITING_THREADS if settings.match.device == "cuda" else 0) as write:
        for target, shards in itertools.groupby(unit.shards, key=lambda shard: shard.task.target):
            group = design.groups[target]
            whole = partial(remote_from.whole, target) if edges else None
            search = Searcher(on_device.of(slice(group.start, group.stop)), settings, whole)
            for batch in alike(list(shards), settings, design):
                searched = _search_batch(batch, search, on_device, settings, design, remote_from)
                for shard, found in zip(batch, searched, strict=True):
                    write(finish, shard, found)
    return counts


def _on_device(cells: Placed, device: str) -> tuple[Placed, type[Remoteness]]:
    """Return the cells with their coordinates on the device of the search, and what measures remoteness there."""
    if device != "cuda":
        return cells, Remoteness
    from ndreamer_dist.matching.gpu import GpuRemoteness, resident

    return resident(cells, device), GpuRemoteness


@contextmanager
def _written_by(threads: int) -> Iterator[Callable[..., object]]:
    """Yield a function that runs calls on a pool of threads, or at once if `threads` is 0; on exit, all have ended.

    It blocks while many calls are pending, which bounds the memory of unwritten results. Errors of calls are raised.
    """
    if not threads:
        yield lambda function, *args: function(*args)
        return
    waiting: deque[Future[object]] = deque()
    with ThreadPoolExecutor(threads) as pool:

        def call(function: Callable[..., object], *args: object) -> None:
            waiting.append(pool.submit(function, *args))
            while len(waiting) > 4 * threads:
                waiting.popleft().result()

        yield call
        for future in waiting:
            future.result()


@dataclass(frozen=True)
class Found:
    """Neighbours of an edge tile's cells, with rows counted from the start of the target group, and search counts."""

    rows: np.ndarray
    distances: np.ndarray
    counts: dict[str, int]


@dataclass(frozen=True, eq=False)
class Correction:
    """The hub correction of a batch of queries.

    Attributes
    ----------
    groups
        (q,) position of each query's group among the batch's query groups.
    of
        Function of a label, or `WHOLE`, that returns the remoteness of its targets from each query group: (groups, t).
    """

    groups: np.ndarray
    of: Callable[[int], np.ndarray]


class Searcher:
    """Search one target group as the settings say. Indexes, of all cells or of one label's, are built once.

    Parameters
    ----------
    whole
        Function of a label, or `WHOLE`, that returns an existing index of its cells, or None.
    """

    def __init__(self, targets: Placed, settings: Settings, whole: Callable[[int], Index | None] | None = None) -> None:
        self._targets, self._settings, self._whole = targets, settings, whole
        self._indexes: dict[int, Index] = {}
        self._on_gpu: dict[int, GpuIndex] = {}

    def search(
        self, queries: Placed, k: int, *, exclude: np.ndarray, corrected: Correction | None = None
    ) -> Neighbours:
        """Return the k nearest targets of every query.

        Parameters
        ----------
        exclude
            (q,) target row that cannot match the query, or -1.
        corrected
            Hub correction of the distances; by default there is none.
        """

        def inside(stratum: Stratum) -> Neighbours:
            asking = queries.points[stratum.queries]
            return self._search(stratum, asking, k, places_among(stratum.targets, exclude[stratum.queries]), corrected)

        if queries.labels is None or self._targets.labels is None:
            return self._search(
                Stratum(WHOLE, np.arange(len(queries.points)), None), queries.points, k, exclude, corrected
            )
        least = self._settings.match.within_cells
        strata = strata_of(queries.labels, self._targets.labels, exclude >= 0, least)
        return nearest_by_stratum(strata, len(queries.points), k, inside)

    def _search(
        self, stratum: Stratum, queries: Any, k: int, exclude: np.ndarray, corrected: Correction | None
    ) -> Neighbours:
        """Return the neighbours of a stratum's queries; rows are positions among the stratum's targets."""
        on_gpu, threads = self._settings.match.device == "cuda", self._settings.run.task_threads
        if corrected is None:
            if on_gpu:
                return self._group_on_gpu(stratum).nearest(queries, k, exclude=exclude)
            return nearest(queries, self._index(stratum), k, exclude=exclude, threads=threads)
        remote, groups = corrected.of(stratum.label), corrected.groups[stratum.queries]
        if on_gpu:
            return self._group_on_gpu(stratum).nearest(queries, k, remote=remote, groups=groups)
        return nearest_corrected(queries, self._index(stratum), remote, k, groups=groups, threads=threads)

    def _index(self, stratum: Stratum) -> Index:
        if stratum.label not in self._indexes:
            existing = self._whole(stratum.label) if self._whole is not None else None
            self._indexes[stratum.label] = build_index(self._points(stratum)) if existing is None else existing
        return self._indexes[stratum.label]

    def _group_on_gpu(self, stratum: Stratum) -> GpuIndex:
        from ndreamer_dist.matching.gpu import ENGINES, GpuIndex

        if stratum.label not in self._on_gpu:
            self._on_gpu[stratum.label] = GpuIndex(self._points(stratum), ENGINES["cuda"])
        return self._on_gpu[stratum.label]

    def _points(self, stratum: Stratum) -> Any:
        return self._targets.points if stratum.targets is None else self._targets.points[stratum.targets]


def batches(shards: Sequence[Shard], settings: Settings, design: Design) -> Iterator[list[Shard]]:
    """Cut the edge tiles of one target group into batches with few enough queries and, if corrected, query groups."""
    corrected = is_corrected(shards[0].task, settings) and not design.sampled
    batch: list[Shard] = []
    total, groups = 0, set[int]()
    for shard in shards:
        start, stop = _tile_range(shard.task, settings, design)
        groups.add(shard.task.query)
        several = corrected and len(groups) > 1
        most = BATCH_CORRECTED if several else BATCH_QUERIES
        if batch and (total + stop - start > most or (several and len(groups) > BATCH_GROUPS)):
            yield batch
            batch, total, groups = [], 0, {shard.task.query}
        batch.append(shard)
        total += stop - start
    yield batch


def alike(shards: Sequence[Shard], settings: Settings, design: Design) -> Iterator[list[Shard]]:
    """Cut the edge tiles of one target group into batches of equal k and equal correction, for one search each."""

    def kind(shard: Shard) -> tuple[int, bool]:
        return edge_neighbours(shard.task, settings, design), is_corrected(shard.task, settings)

    for _, same in itertools.groupby(sorted(shards, key=kind), key=kind):
        yield from batches(list(same), settings, design)


def correction(batch: Sequence[Shard], sizes: Sequence[int], remote_from: Remoteness, *, pooled: bool) -> Correction:
    """Return the hub correction of a batch's queries; `sizes` are the numbers of queries of its edge tiles."""
    target, asking = batch[0].task.target, [shard.task.query for shard in batch]
    queries = asking[:1] if pooled else list(dict.fromkeys(asking))
    places = np.zeros(len(batch), dtype=np.int64) if pooled else np.searchsorted(queries, asking)

    def of(label: int) -> np.ndarray:
        return np.stack([remote_from.of(target, query, label) for query in queries])

    return Correction(np.repeat(places, sizes), of)


def _rows_of(batch: Sequence[Shard], settings: Settings, design: Design) -> tuple[np.ndarray, list[slice]]:
    """Return the packed rows of a batch's queries, and the slice of them that belongs to each tile."""
    rows = [design.groups[shard.task.query].start + _asking(shard.task, settings, design) for shard in batch]
    cuts = np.cumsum([0, *(len(part) for part in rows)])
    return np.concatenate(rows), [slice(first, last) for first, last in itertools.pairwise(cuts.tolist())]


def _search_batch(
    batch: Sequence[Shard], search: Searcher, cells: Placed, settings: Settings, design: Design,
    remote_from: Remoteness,
) -> Iterator[Found]:  # fmt: skip
    """Search edge tiles of one target group together, and yield the result of each."""
    rows, parts = _rows_of(batch, settings, design)
    target = design.groups[batch[0].task.target]
    exclude = np.where((rows >= target.start) & (rows < target.stop), rows - target.start, -1)
    k, corrected = edge_neighbours(batch[0].task, settings, design), None
    if is_corrected(batch[0].task, settings):
        sizes = [part.stop - part.start for part in parts]
        corrected = correction(batch, sizes, remote_from, pooled=design.sampled > 0)
    found = search.search(cells.of(rows), k, exclude=exclude, corrected=corrected)
    for part in parts:
        counts = {"queries": part.stop - part.start, "widened": int(found.widened[part].sum())}
        yield Found(found.rows[part], found.distances[part], counts)


def _write(edge: EdgeTile, found: Found, run: RunDirectory, settings: Settings, design: Design) -> None:
    """Write an edge tile: one chunk of rows and one of distances, padded beyond the end of the group."""
    start, _ = _tile_range(edge, settings, design)
    chunk = (min(settings.match.query_rows, design.groups[edge.query].cells), 1, most_neighbours(settings, design))
    rows = np.full(chunk, -1, dtype=row_dtype(design.n_cells))
    distances = np.full(chunk, np.nan, dtype=np.float32)
    asking, k = _asking(edge, settings, design) - start, found.rows.shape[1]
    rows[asking, 0, :k] = np.where(found.rows < 0, -1, found.rows + design.groups[edge.target].start)
    distances[asking, 0, :k] = found.distances
    for array, values in ((keys.MATCH_ROW, rows), (keys.MATCH_DISTANCE, distances)):
        path = f"{keys.block_name(edge.query)}/{array}"
        write_chunk(run.storage / keys.MATCHES, path, (edge.tile, edge.target, 0), values)
