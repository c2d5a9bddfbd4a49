"""The stage `effects`: compute denoised expression, batch effect and treatment effect (METHOD section 6).

Input: packed.zarr, embedding.zarr and matches.zarr. Output: results.zarr, with one task per row block and gene span. A
task never holds the expression of all counterparts of its cells. It takes one packed block at a time from Ray's object
store, and adds the rows it needs to the dense sums of its own shard. If there are many genes, spans of genes are
processed one after the other, so neither a task nor the object store holds all genes.
"""

from __future__ import annotations

import itertools
import logging
import uuid
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Any, Protocol

import numpy as np
import pandas as pd
from scipy import sparse

from ndreamer_dist import keys
from ndreamer_dist.cohort.design import Design, Group
from ndreamer_dist.cohort.packed import Packed, cell_totals
from ndreamer_dist.compute.executor import Runtime, fetch
from ndreamer_dist.effects import tables
from ndreamer_dist.effects.averages import (
    Average,
    Edges,
    average_over,
    average_through,
    control_distance,
    effective_number,
    layer_terms,
    layer_values,
    near_control,
    own_distance,
    segments,
)
from ndreamer_dist.effects.cells import cell_table
from ndreamer_dist.effects.tables import Layout, RowPart
from ndreamer_dist.matching.store import Matches
from ndreamer_dist.rundir.directory import RunDirectory, Shard
from ndreamer_dist.rundir.stage import StageRun
from ndreamer_dist.settings import Settings
from ndreamer_dist.storage.arrays import read_array
from ndreamer_dist.storage.files import Storage

logger = logging.getLogger(__name__)

RUN_CELLS = 16_384
"""Cells after which a run of small groups, whose matches one task counts, is cut."""
COUNTED_ROWS = 65_536
"""Number of query cells whose matches are counted at a time."""


class Origin(Protocol):
    """Protocol of the source of matches and of the arrays of `obsm`."""

    @property
    def stored(self) -> Collection[tuple[int, int]]:
        """Edges that `obsm` needs."""
        ...

    def edges(self, rows: np.ndarray, pairs: Iterable[tuple[int, int]]) -> Edges:
        """Return the matches of some packed rows (ascending) along pairs of groups."""
        ...

    def obsm(self, name: str, rows: np.ndarray, edges: Edges) -> np.ndarray:
        """Return contiguous rows of an array of `obsm`.

        Parameters
        ----------
        edges
            Matches of these rows along the edges in `stored`.
        """
        ...


@dataclass(frozen=True)
class RunOrigin:
    """Read matches and `obsm` from the run's embedding.zarr and matches.zarr; implements `Origin`.

    Attributes
    ----------
    stored
        Edges whose nearest neighbours `obsm` holds: the edges of the match stage.
    row_dtype
        Integer type of the matched rows in `obsm`.
    key
        Stage key. It tells cached readers of these matches from those of earlier ones in the same place.
    """

    run: RunDirectory
    design: Design
    stored: tuple[tuple[int, int], ...]
    row_dtype: str
    key: str = ""

    def edges(self, rows: np.ndarray, pairs: Iterable[tuple[int, int]]) -> dict[tuple[int, int], Any]:
        """See `Origin.edges`; the rows must be contiguous."""
        matches, spans = matches_of(self.run.storage / keys.MATCHES, self.key), group_spans(self.design, rows)
        return {
            (query, target): edge
            for query, targets in _by_query(pairs).items()
            if query in spans
            for target, edge in matches.edges(query, targets, *spans[query]).items()
        }

    def obsm(self, name: str, rows: np.ndarray, edges: Edges) -> np.ndarray:
        """See `Origin.obsm`."""
        if name not in (keys.OBSM_MATCH, keys.OBSM_MATCH_DISTANCE):
            first = int(rows[0]) - self.design.first_row
            return read_array(self.run.embedding(name), name, slice(first, first + len(rows)))
        found, distances = nearest_per_group(self.design, edges, rows, self.row_dtype)
        return found if name == keys.OBSM_MATCH else distances


def run_effects(
    run: RunDirectory,
    settings: Settings,
    packed: Packed,
    source: Any,
    runtime: Runtime,
    key: str,
    summary: Mapping[str, Any] | None = None,
) -> None:
    """Write results.zarr: effects, expression, embeddings, matches and the cells' and genes' tables.

    Parameters
    ----------
    source
        The input cohort: `.cells`, `.var` (input order), `.gene_names`.
    summary
        JSON-compatible facts for `uns`, such as fingerprints and counts of dropped cells.
    """
    stage, layout = StageRun(run, keys.STAGE_EFFECTS, key), tables.layout_of(run, settings, packed)
    todo = tables.begin(stage, layout)
    if not todo:
        return
    stored = packed.design.needed_edges(settings.match.edges) if layout.matches else []
    origin = RunOrigin(run, packed.design, tuple(stored), layout.row_dtype, key)
    write_shards(stage, Target(run, packed, layout, settings, origin), runtime, todo)
    distances, times = _matches_counted(run, packed, runtime, key, settings.match.neighbours)
    controls = controls_by_group(run, packed.design, runtime, key, settings.match.neighbours)
    facts = {**(summary or {}), "effective_controls": controls}
    near = near_control(distances[0], distances[1], settings.effects.near_quantile)
    if keys.UNS_ONTO in facts:
        onto = facts[keys.UNS_ONTO].measured(packed.design, distances[0])
        near, facts[keys.UNS_ONTO] = ~(distances[0] > onto.near), onto.to_json()
    columns: dict[str, Any] = {
        keys.OBS_MATCH_DISTANCE: distances[0],
        keys.OBS_OVERLAP: near,
        keys.OBS_TIMES_MATCHED: times,
    }
    if facts.get("normalise") == "counts":
        columns[keys.OBS_TOTAL] = partial(cell_totals, packed)
    if settings.match.within is not None:
        columns[keys.OBS_MATCH_LABEL] = _match_labels(run, packed, facts[keys.UNS_WITHIN]["labels"])
    clustered = keys.is_clustered(settings.embed.method, settings.state.by) or settings.match.within == keys.OBS_LOW
    clustered = clustered and not packed.before  # mapped cells have no clusters
    cells = cell_table(source, packed, columns, clustered=clustered).files()
    genes = tables.gene_table(source, packed)
    tables.finish_store(stage, packed, layout, cells, genes, tables.facts(settings, packed, layout, key, facts))


@lru_cache(maxsize=1)
def _sums(name: str, averages: int, cells: int, genes: int) -> np.ndarray:
    """Return an uninitialised buffer for the sums of a row part, reused by the next part of this process.

    Mapping new memory would cost as much as the sums. The name is that of the shared blocks: it keeps runs in other
    threads of the process from sharing the buffer.
    """
    del name
    return np.empty((averages, cells, genes))


@dataclass(frozen=True)
class SharedBlocks:
    """Packed blocks of one span of genes, shared by all tasks: handles by block, and a unique name.

    A process fetches a block once, since fetching takes longer than adding. It drops all blocks when it needs those of
    another span.
    """

    handles: Mapping[int, Any]
    name: str = field(default_factory=lambda: uuid.uuid4().hex)

    def __getitem__(self, block: int) -> sparse.csr_matrix:
        fetched = _fetched(self.name)
        if block not in fetched:
            fetched[block] = fetch(self.handles[block])
        return fetched[block]


@lru_cache(maxsize=1)
def _fetched(name: str) -> dict[int, sparse.csr_matrix]:
    """Return this process's cache of the shared blocks with this name."""
    del name
    return {}


@dataclass(frozen=True)
class Target:
    """A results.zarr to write, and its inputs."""

    run: RunDirectory
    packed: Packed
    layout: Layout
    settings: Settings
    origin: Origin


def write_shards(stage: StageRun, target: Target, runtime: Runtime, todo: Sequence[Shard]) -> None:
    """Write the pending shards of row parts and of expression, one span of genes after the other."""
    packed, layout = target.packed, target.layout
    others = [shard for shard in todo if isinstance(shard.task, tuple)]
    for span in tables.gene_spans(layout):
        rows = [shard for shard in todo if isinstance(shard.task, RowPart) and shard.task.genes == span]
        if rows or others:
            blocks = _target_blocks(runtime, packed, [shard.task.block for shard in rows], layout, span)
            title = "effects" if span[1] - span[0] == layout.genes else f"effects: genes {span[0]} to {span[1]}"
            try:
                stage.map(runtime, _write_part, [*rows, *others], target, blocks, title=title)
            finally:
                # With the serial runtime, this process holds the blocks and the buffer.
                _fetched.cache_clear()
                _sums.cache_clear()
                del blocks  # the object store can drop this span before it takes the next
            others = []


def _write_part(part: RowPart | tuple[int, int], target: Target, blocks: SharedBlocks) -> None:
    """Write one shard, of a row part or of expression; a task."""
    if isinstance(part, RowPart):
        write_rows(part, target, blocks)
    else:
        tables.write_expression(part, target.run, target.packed, target.layout)


def write_rows(part: RowPart, target: Target, blocks: SharedBlocks) -> None:
    """Write the layers of one row block and span of genes; with the first span, write `obsm` too.

    Parameters
    ----------
    blocks
        Packed blocks with the counterparts of the cells.
    """
    run, packed, layout, origin = target.run, target.packed, target.layout, target.origin
    design, settings = packed.design, target.settings
    effects, denoised = settings.match.neighbours, settings.denoise.counted(design.fewest_groups)
    rows, start = packed.rows_of(part.block), packed.block_range(part.block)[0]
    first = part.genes[0] == 0
    edges = origin.edges(rows, {*_pairs(design, rows), *(origin.stored if first else ())})
    if first:
        for name in layout.obsm:
            tables.write_obsm(run, name, start, origin.obsm(name, rows, edges))
    if not layout.layers:
        return
    terms = list(dict.fromkeys(term for name in layout.layers for term in layer_terms(name)))
    averages = [
        average_over(design, edges, rows, term, settings.match.bandwidth, denoised if term.denoised else effects)
        for term in terms
    ]
    genes = part.genes[1] - part.genes[0]
    room = list(_sums(blocks.name, len(terms), layout.block_rows, genes)[:, : len(rows)])
    sums = dict(zip(terms, average_through(averages, _needed(blocks, packed, averages), genes, room), strict=True))
    values = load_block(packed, packed.place(part.block), part.genes).toarray()
    for name in layout.layers:
        own, *control = (sums[term] for term in layer_terms(name))
        values_of = partial(_layer_part, name, values, own, control[0] if control else None, layout.keep_bits)
        tables.write_layer(run, name, part, layout, values_of)


def _layer_part(
    name: str, values: np.ndarray, own: np.ndarray, control: np.ndarray | None, keep_bits: int | None, genes: slice
) -> np.ndarray:
    """Return a layer for a slice of genes. A slice is one chunk, written while it is in the CPU cache."""
    of = None if control is None else control[:, genes]
    return layer_values(name, values[:, genes], own[:, genes], of, keep_bits)


def _by_query(pairs: Iterable[tuple[int, int]]) -> dict[int, list[int]]:
    """Return the target groups of every query group."""
    targets: dict[int, list[int]] = {}
    for query, target in sorted(pairs):
        targets.setdefault(query, []).append(target)
    return targets


def _pairs(design: Design, rows: np.ndarray) -> list[tuple[int, int]]:
    """Return the edges that the effects of a row block need."""
    return [
        (query.code, target.code) for query, _ in segments(design, rows) for target in design.targets(query, "needed")
    ]


def group_spans(design: Design, rows: np.ndarray) -> dict[int, tuple[int, int]]:
    """Return the range of cells of each group in a row block, counted from the start of the group, by group code."""
    return {
        group.code: (int(rows[here.start]) - group.start, int(rows[here.stop - 1]) + 1 - group.start)
        for group, here in segments(design, rows)
    }


def nearest_per_group(design: Design, edges: Edges, rows: np.ndarray, row_dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Return row and distance of the nearest neighbour in every group: (rows, groups), -1 and NaN if not searched."""
    found = np.full((len(rows), len(design.groups)), -1, dtype=row_dtype)
    distances = np.full(found.shape, np.nan, dtype=np.float32)
    for group, here in segments(design, rows):
        for (query, target), (nearest, near) in edges.items():
            if query == group.code:
                found[here, target], distances[here, target] = nearest[:, 0], near[:, 0]
    return found, distances


def load_block(packed: Packed, block: int, genes: tuple[int, int]) -> sparse.csr_matrix:
    """Return a span of genes of one packed block."""
    values = packed.any_block(block)
    return values if genes == (0, packed.n_genes) else values[:, slice(*genes)]


def _load_shared(packed: Packed, block: int, genes: tuple[int, int], name: str) -> sparse.csr_matrix:
    """Load a shared block; a task. First, its process drops the blocks of the span before.

    The arrays of fetched blocks lie in Ray's object store. As long as a process holds them, the store has to hold two
    spans, and writes blocks to disk.
    """
    _fetched(name)
    return load_block(packed, block, genes)


def _target_blocks(
    runtime: Runtime, packed: Packed, blocks: Sequence[int], layout: Layout, genes: tuple[int, int]
) -> SharedBlocks:
    """Start to load every packed block with counterparts of the cells of some row blocks."""
    shared = SharedBlocks({})
    if not layout.layers:
        return shared
    design = packed.design
    queries = {group.code for block in blocks for group, _ in segments(design, packed.rows_of(block))}
    groups = {target for query, target in design.needed_edges("needed") if query in queries}
    wanted = {block for code in groups for block in range(*_blocks_of(packed, design.groups[code]))}
    load = partial(runtime.submit, _load_shared)
    return replace(shared, handles={block: load(packed, block, genes, shared.name)[0] for block in sorted(wanted)})


def _blocks_of(packed: Packed, group: Group) -> tuple[int, int]:
    """Return the first block with cells of a group, and the one after the last, among the blocks of all cells."""
    first, last = np.searchsorted(packed.all_starts, [group.start, group.stop - 1], side="right") - 1
    return int(first), int(last) + 1


def _needed(
    blocks: SharedBlocks, packed: Packed, averages: Sequence[Average]
) -> Iterator[tuple[np.ndarray, sparse.csr_matrix]]:
    """Fetch, one at a time, the blocks with rows to average; yield their rows and values."""
    starts = packed.all_starts
    wanted = np.zeros(len(starts) - 1, dtype=bool)
    for average in averages:
        wanted[np.searchsorted(starts, average.row, side="right") - 1] = True
    for block in np.flatnonzero(wanted).tolist():
        yield np.arange(starts[block], starts[block + 1]), blocks[block]


# --- columns of obs about the matches ---------------------------------------------------------------------------------


def runs_of_groups(groups: Sequence[Group]) -> list[tuple[Group, ...]]:
    """Cut groups into runs of consecutive groups, each of about `RUN_CELLS` cells or of one large group."""
    number = np.cumsum([group.cells for group in groups]) // RUN_CELLS
    cuts = [0, *(np.flatnonzero(np.diff(number)) + 1).tolist(), len(groups)]
    return [tuple(groups[first:last]) for first, last in itertools.pairwise(cuts)]


def _matches_counted(
    run: RunDirectory, packed: Packed, runtime: Runtime, key: str, neighbours: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the distances of all cells (`block_distances`), (2, rows), and how often each is matched, (rows,)."""
    distances, times = np.empty((2, packed.n_rows), dtype=np.float32), np.empty(packed.n_rows, dtype=np.int64)
    parts: list[int | tuple[Group, ...]] = [*range(packed.n_blocks), *runs_of_groups(packed.design.own_groups)]
    for part, values in runtime.map(_count, parts, run, packed, key, neighbours, title="effects: matches counted"):
        (times if values.ndim == 1 else distances)[..., part] = values
    return distances, times


def _match_labels(run: RunDirectory, packed: Packed, labels: Sequence[str]) -> Any:
    """Return the label of each cell for matching inside labels: (rows,) categorical."""
    codes = read_array(run.storage / keys.MATCHES, keys.MATCH_LABEL)[packed.design.first_row :]
    return pd.Categorical.from_codes(codes.astype(np.int32), pd.Index(labels))


def _count(
    item: int | tuple[Group, ...], run: RunDirectory, packed: Packed, key: str, neighbours: int
) -> tuple[slice, np.ndarray]:
    """Return a slice of rows and its values: distances of a row block, or match counts of some groups; a task."""
    matches = matches_of(run.storage / keys.MATCHES, key)
    if isinstance(item, int):
        return slice(*packed.block_range(item)), block_distances(item, matches, packed)
    times = [times_matched(group, matches, packed.design, neighbours) for group in item]
    first = packed.design.first_row
    return slice(item[0].start - first, item[-1].stop - first), np.concatenate(times)


@lru_cache(maxsize=2)
def matches_of(storage: Storage, key: str) -> Matches:  # noqa: ARG001 - under another key there may be others
    """Return a reader of a run's matches, cached per process so that arrays stay open between tasks."""
    return Matches(storage)


def block_distances(block: int, matches: Matches, packed: Packed) -> np.ndarray:
    """Return `control_distance` and `own_distance` of a row block's cells: (2, rows) float32."""
    controls = {group.code for group in packed.design.with_condition(0)}
    rows, unread = packed.rows_of(block), np.empty((0, 0), dtype=np.int64)
    spans = group_spans(packed.design, rows)
    pairs = [(query, target) for query, target in _pairs(packed.design, rows) if target in controls or target == query]
    edges = {
        (query, target): (unread, found)
        for query, targets in _by_query(pairs).items()
        for target, found in zip(targets, matches.distances(query, targets, *spans[query]), strict=True)
    }
    return np.stack([control_distance(packed.design, edges, rows), own_distance(packed.design, edges, rows)])


def times_matched(
    target: Group, matches: Matches, design: Design, neighbours: int, only: Group | None = None
) -> np.ndarray:
    """Return how often each cell of a group serves as a match in effects: (cells,) int64.

    Parameters
    ----------
    neighbours
        Number of nearest neighbours of a query that count.
    only
        Query group to count; by default all other groups.
    """
    times = np.zeros(target.cells, dtype=np.int64)
    for query in design.queries(target) if only is None else [only]:
        for start in range(0, query.cells if query != target else 0, COUNTED_ROWS):
            stop = min(start + COUNTED_ROWS, query.cells)
            found = matches.rows(query.code, target.code, start, stop)[:, :neighbours]
            times += np.bincount(found[found >= 0] - target.start, minlength=target.cells)
    return times


def controls_by_group(
    run: RunDirectory, design: Design, runtime: Runtime, key: str, neighbours: int
) -> dict[str, float]:
    """Return and log the effective number of control cells that each treated group is matched with, by group name."""
    treated = [group for group in design.own_groups if group.condition]
    if not treated:  # cells of controls alone, mapped onto a run
        return {}
    title = "effects: controls"
    parts = runtime.map(_effective_controls, runs_of_groups(treated), run, design, key, neighbours, title=title)
    found = dict(itertools.chain.from_iterable(parts))
    numbers = [found[group.name] for group in treated]  # tasks return in order of completion
    available = sum(group.cells for group in design.counted(0, treated[0]))
    least = int(np.argmin(numbers))
    logger.info(
        "effects: of %d control cells, the matches of a group are worth %.0f used alike (median), "
        "%.0f at the least (%s)",
        available, np.median(numbers), numbers[least], treated[least].name,
    )  # fmt: skip
    return {group.name: round(number, 1) for group, number in zip(treated, numbers, strict=True)}


def _effective_controls(
    queries: Sequence[Group], run: RunDirectory, design: Design, key: str, neighbours: int
) -> list[tuple[str, float]]:
    """Return the effective number of control cells of some groups, with their names; a task."""
    matches = matches_of(run.storage / keys.MATCHES, key)
    found = []
    for query in queries:
        times = [times_matched(target, matches, design, neighbours, query) for target in design.counted(0, query)]
        found.append((query.name, effective_number(np.concatenate(times))))
    return found
