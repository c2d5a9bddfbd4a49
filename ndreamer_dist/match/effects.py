"""Denoised expression, batch effect and treatment effect: sparse averages through the matches (METHOD section 6).

In: packed.zarr, embedding.zarr and matches.zarr. Out: results.zarr, one task per row block. A task never holds the
expression of its cells' counterparts: it takes one packed block at a time, from Ray's object store, and adds the rows
it needs into the dense sums of its own block, in the order of the counterparts' rows, in float64.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import sparse

from ndreamer_dist import keys
from ndreamer_dist.cohort.design import Design, Group
from ndreamer_dist.cohort.packed import Packed
from ndreamer_dist.match.search import Matches
from ndreamer_dist.results import store
from ndreamer_dist.results.store import Layout
from ndreamer_dist.rundir import RunDirectory, Shard, run_task
from ndreamer_dist.runtime import Runtime, fetch
from ndreamer_dist.settings import Settings
from ndreamer_dist.storage import read_array

logger = logging.getLogger(__name__)

ENTRIES = 2048
"""Counterparts' rows added at once; it bounds the memory of their gathered values."""

Edges = dict[tuple[int, int], tuple[np.ndarray, np.ndarray]]
"""Rows and distances, (cells, k) each, by (query group, target group)."""


@dataclass(frozen=True)
class Average:
    """Which rows are averaged for each cell: the sum over entries of weight times row, divided by `groups`.

    Attributes
    ----------
    cell, row, weight
        (entries,) place of the cell among its block's, packed row of its counterpart, float64 weight.
    groups
        (cells,) number of groups averaged over; 0 where the average is not wanted.
    """

    cell: np.ndarray
    row: np.ndarray
    weight: np.ndarray
    groups: np.ndarray


def kernel_weights(distances: np.ndarray, bandwidth: float) -> np.ndarray:
    """Return `softmax(-(d - min d) / bandwidth)` along the neighbours (METHOD section 6).

    Parameters
    ----------
    distances
        (cells, k); NaN where a target group has fewer cells, which gets weight 0.
    """
    near = np.where(np.isnan(distances), np.inf, distances).astype(np.float64)
    nearest = near.min(axis=1, keepdims=True)
    kernel = np.exp(-(near - np.where(np.isinf(nearest), 0.0, nearest)) / bandwidth)
    total = kernel.sum(axis=1, keepdims=True)
    return kernel / np.where(total == 0, 1.0, total)


def average_through(
    averages: Sequence[Average], blocks: Iterable[tuple[int, sparse.csr_matrix]], genes: int
) -> list[np.ndarray]:
    """Return the averages of expression that the entries ask for: one (cells, genes) float64 each.

    Parameters
    ----------
    averages
        What to average; NaN comes out for cells with `groups` 0.
    blocks
        (first row, CSR) of row blocks in ascending order; together they hold every row asked for. One is used at a
        time, so this may load them as it goes.
    """
    sums = [np.zeros((len(average.groups), genes)) for average in averages]
    for start, block in blocks:
        for total, average in zip(sums, averages, strict=True):
            _add_rows(total, average, start, block)
    for total, average in zip(sums, averages, strict=True):
        with np.errstate(invalid="ignore"):  # nothing, divided by no group, is NaN
            total /= average.groups[:, None]
    return sums


def _add_rows(total: np.ndarray, average: Average, start: int, block: sparse.csr_matrix) -> None:
    """Add one block's share; each cell sums its counterparts in the order of their rows."""
    inside = np.flatnonzero((average.row >= start) & (average.row < start + block.shape[0]))
    inside = inside[np.lexsort((average.row[inside], average.cell[inside]))]
    flat = total.reshape(-1)
    for first in range(0, len(inside), ENTRIES):
        part = inside[first : first + ENTRIES]
        gathered = block[average.row[part] - start]
        stored = np.diff(gathered.indptr)
        places = np.repeat(average.cell[part] * total.shape[1], stored) + gathered.indices
        # add.at goes through its arguments one by one, which is what fixes the order of the sums.
        np.add.at(flat, places, gathered.data * np.repeat(average.weight[part], stored))


def segments(design: Design, start: int, stop: int) -> Iterator[tuple[Group, int, int]]:
    """Give the groups among the packed rows `start:stop`, with the rows of each."""
    for group in design.groups:
        first, last = max(start, group.start), min(stop, group.stop)
        if first < last:
            yield group, first, last


def read_edges(matches: Matches, design: Design, pairs: Iterable[tuple[int, int]], start: int, stop: int) -> Edges:
    """Read the matches of the packed rows `start:stop` along the pairs whose query group is among them."""
    spans = {
        group.code: (first - group.start, last - group.start) for group, first, last in segments(design, start, stop)
    }
    return {(query, target): matches.edge(query, target, *spans[query]) for query, target in pairs if query in spans}


def average_over(
    design: Design, edges: Edges, start: int, stop: int, bandwidth: float, *, condition: int | None
) -> Average:
    """Return what F is an average of: the counterparts of the rows `start:stop` in a condition's groups.

    Parameters
    ----------
    condition
        Its code, which leaves out the condition's own cells; none: each cell's own condition. In its own group a cell
        is its own counterpart.
    """
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    groups = np.zeros(stop - start, dtype=np.int64)
    for group, first, last in segments(design, start, stop):
        if group.condition == condition:
            continue
        targets = design.with_condition(group.condition if condition is None else condition)
        groups[first - start : last - start] = len(targets)
        rows = np.arange(first, last)
        for target in targets:
            if target.code == group.code:
                parts.append((rows - start, rows, np.ones(len(rows))))
                continue
            found, distances = edges[group.code, target.code]
            weights = kernel_weights(distances, bandwidth)
            cell, place = np.nonzero(found >= 0)
            parts.append((cell + (first - start), found[cell, place].astype(np.int64), weights[cell, place]))
    if not parts:
        parts = [(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))]
    cell, row, weight = (np.concatenate(column) for column in zip(*parts, strict=True))
    return Average(cell, row, weight, groups)


def control_distance(design: Design, edges: Edges, start: int, stop: int) -> np.ndarray:
    """Return each cell's mean distance to its nearest neighbours in the control groups: (rows,) float32.

    A cell's own group is left out; NaN where no other control group is.
    """
    means = np.full(stop - start, np.nan, dtype=np.float32)
    for group, first, last in segments(design, start, stop):
        others = [target for target in design.with_condition(0) if target.code != group.code]
        if others:
            total = sum(edges[group.code, target.code][1][:, 0].astype(np.float64) for target in others)
            means[first - start : last - start] = total / len(others)
    return means


def layer_values(
    names: Iterable[str], values: sparse.csr_matrix, own: np.ndarray, control: np.ndarray | None
) -> Iterator[tuple[str, np.ndarray]]:
    """Give the layers one by one, (cells, genes) float32 (METHOD section 6).

    `batch_effect` is taken from the stored, rounded `denoised`, so that the two add up to the expression.
    """
    for name in names:
        if name == keys.LAYER_DENOISED:
            yield name, own.astype(np.float32)
        elif name == keys.LAYER_BATCH_EFFECT:
            yield name, values.toarray() - own.astype(np.float32)
        elif control is not None:
            yield name, (own - control).astype(np.float32)


# --- the stage -------------------------------------------------------------------------------------------------------


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
        The input cohort: `.obs`, `.var` (input order), `.cell_names`, `.gene_names`.
    summary
        Facts for `uns`, as JSON can hold them: fingerprints, counts of dropped cells and the like.
    """
    layout = store.layout_of(run, settings, packed)
    rows = store.row_shards(layout)
    shards = [*rows, *store.expression_shards(layout), store.annotation_shard(run)]
    todo = run.pending(keys.STAGE_EFFECTS, key, shards)
    if not todo:
        return
    store.prepare(run, layout, fresh=len(todo) == len(shards))
    targets = _target_blocks(runtime, packed, [shard.task for shard in rows if shard in todo], settings)
    items: list[Shard | int] = [shard for shard in todo if shard.name != store.ANNOTATIONS]
    items += range(packed.n_blocks)
    distances = np.empty(packed.n_rows, dtype=np.float32)
    for block, values in filter(
        None, runtime.map(_work, items, run, key, packed, layout, settings, targets, title="effects")
    ):
        distances[slice(*packed.block_range(block))] = values
    store.finish(run, settings, packed, source, layout, key, distances, summary or {})


def _work(
    item: Shard | int,
    run: RunDirectory,
    key: str,
    packed: Packed,
    layout: Layout,
    settings: Settings,
    targets: Mapping[int, Any],
) -> tuple[int, np.ndarray] | None:
    """Do one item of the stage: a shard to write, or a row block whose distances to the control the driver wants."""
    if isinstance(item, int):
        return block_distance(item, run, packed)
    if isinstance(item.task, int):
        run_task(run, keys.STAGE_EFFECTS, key, write_rows, item, run, packed, layout, settings, targets)
    else:
        run_task(run, keys.STAGE_EFFECTS, key, store.write_expression, item, run, packed, layout)
    return None


def write_rows(
    block: int,
    run: RunDirectory,
    packed: Packed,
    layout: Layout,
    settings: Settings,
    targets: Mapping[int, Any],
) -> None:
    """Write what results.zarr holds of one row block: embeddings, matches and layers."""
    start, stop = packed.block_range(block)
    pairs = packed.design.needed_edges("needed")
    stored = packed.design.needed_edges(settings.match.edges) if layout.matches else pairs
    edges = read_edges(Matches(run.storage / keys.MATCHES), packed.design, {*pairs, *stored}, start, stop)
    for name in (keys.MU, keys.PCA):
        store.write_obsm(run, name, start, read_array(run.storage / keys.EMBEDDING, name, slice(start, stop)))
    if layout.matches:
        rows, distances = _nearest_per_group(packed.design, edges, start, stop, layout)
        store.write_obsm(run, keys.OBSM_MATCH, start, rows)
        store.write_obsm(run, keys.OBSM_MATCH_DISTANCE, start, distances)
    if layout.layers:
        averages = [average_over(packed.design, edges, start, stop, settings.match.bandwidth, condition=None)]
        if keys.LAYER_ITE in layout.layers:
            averages.append(average_over(packed.design, edges, start, stop, settings.match.bandwidth, condition=0))
        own, *control = average_through(averages, _needed(targets, packed, averages), packed.n_genes)
        for name, values in layer_values(layout.layers, packed.block(block), own, control[0] if control else None):
            store.write_layer(run, name, start, values)


def block_distance(block: int, run: RunDirectory, packed: Packed) -> tuple[int, np.ndarray]:
    """Return a row block's number and its cells' mean distance to the control."""
    start, stop = packed.block_range(block)
    controls = {group.code for group in packed.design.with_condition(0)}
    pairs = [
        (query, target)
        for query, target in packed.design.needed_edges("needed")
        if target in controls and target != query
    ]
    edges = read_edges(Matches(run.storage / keys.MATCHES), packed.design, pairs, start, stop)
    return block, control_distance(packed.design, edges, start, stop)


def load_block(packed: Packed, block: int) -> sparse.csr_matrix:
    """Return one packed block; as a task, this puts it into the object store without passing the driver."""
    return packed.block(block)


def _target_blocks(runtime: Runtime, packed: Packed, blocks: Sequence[int], settings: Settings) -> dict[int, Any]:
    """Start loading every packed block that holds a counterpart of the blocks' cells: a handle per block."""
    if not settings.effects.store:
        return {}
    design = packed.design
    queries = {group.code for block in blocks for group, _, _ in segments(design, *packed.block_range(block))}
    groups = {target for query, target in design.needed_edges("needed") if query in queries}
    wanted = {
        block
        for code in groups
        for block in range(
            design.groups[code].start // packed.block_rows, (design.groups[code].stop - 1) // packed.block_rows + 1
        )
    }
    return {block: runtime.submit(load_block, packed, block)[0] for block in sorted(wanted)}


def _needed(
    targets: Mapping[int, Any], packed: Packed, averages: Sequence[Average]
) -> Iterator[tuple[int, sparse.csr_matrix]]:
    """Fetch, one at a time, the blocks that hold a row to be averaged."""
    wanted = np.unique(np.concatenate([average.row for average in averages]) // packed.block_rows)
    for block in wanted.tolist():
        yield packed.block_range(block)[0], fetch(targets[block])


def _nearest_per_group(
    design: Design, edges: Edges, start: int, stop: int, layout: Layout
) -> tuple[np.ndarray, np.ndarray]:
    """Return row and distance of the nearest neighbour in every group: (rows, groups), -1 and NaN where not asked."""
    rows = np.full((stop - start, len(design.groups)), -1, dtype=layout.row_dtype)
    distances = np.full(rows.shape, np.nan, dtype=np.float32)
    for group, first, last in segments(design, start, stop):
        here = slice(first - start, last - start)
        for (query, target), (found, near) in edges.items():
            if query == group.code:
                rows[here, target], distances[here, target] = found[:, 0], near[:, 0]
    return rows, distances
