"""Packing: the selected genes of the selected cells, normalised, sorted by group and shuffled inside each group.

Input: the tables of the cohort stage and the source. Output: packed.zarr (`packed.py` describes its layout). The matrix
is read in row order only. A task per span deals its rows to partitions of whole blocks; these pieces stay in the
object store of the runtime. A task per partition then fetches its pieces one at a time and writes its blocks. No
process holds more than a chunk and its own pieces. Only partitions with a missing block are written.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse

from ndreamer_dist import keys
from ndreamer_dist.cohort.design import Design
from ndreamer_dist.cohort.matrix import Matrix, csr_rows
from ndreamer_dist.cohort.packed import Packed, csr_files, read_table, write_csr
from ndreamer_dist.cohort.source import Source
from ndreamer_dist.cohort.statistics import Span, chunks_of, normalised, spans_of
from ndreamer_dist.cohort.values import Values
from ndreamer_dist.compute.executor import Runtime, fetch
from ndreamer_dist.rundir.directory import RunDirectory, Shard
from ndreamer_dist.rundir.stage import StageRun
from ndreamer_dist.settings import Settings
from ndreamer_dist.storage.arrays import array_files, write_array

PIECE_BYTES = 2**20
"""A piece should be about as large, so that the object store keeps it and is not flooded with small ones."""
MOST_SMALL = 8
"""Partitions made even of a small cohort, so that there is work for several processors."""


@dataclass(frozen=True)
class DealtRows:
    """Rows of one span that belong to one partition, in packed order."""

    rows: np.ndarray  # (rows,) int64 packed rows, ascending
    values: sparse.csr_matrix  # (rows, modelled genes)


@dataclass(frozen=True)
class SpanTask:
    """A span, where its rows go, and handles of what all spans share."""

    span: Span
    position: np.ndarray  # (rows,) int64 packed row of each input row; -1 where the cell is left out
    totals: np.ndarray  # (rows,) float64
    dealing: Any
    matrix: Any


@dataclass(frozen=True)
class Dealing:
    """What all spans' tasks need to know."""

    columns: np.ndarray  # (input genes,) int32 place among the modelled genes, or -1
    n_columns: int
    normalise: Values
    edges: tuple[tuple[int, int], ...]  # packed rows start:stop of the wanted partitions
    chunk_rows: int


@dataclass(frozen=True)
class PartitionTask:
    """The missing blocks of a partition, and the handles of its pieces, one per span."""

    shards: tuple[Shard, ...]
    pieces: tuple[Any, ...]


def run_pack(
    run: RunDirectory, settings: Settings, source: Source, runtime: Runtime, key: str, packed: Packed | None = None
) -> Packed:
    """Write packed.zarr, or what is missing of it, and return it opened.

    Parameters
    ----------
    packed
        What is packed, where its genes are not those selected in the cohort's table, in its order.
    """
    packed = packed or Packed.open(run, settings.pack.block_rows, settings.match.groups)
    head = _head_shard()
    blocks = [_block_shard(block) for block in range(packed.n_blocks)]
    stage = StageRun(run, keys.STAGE_PACK, key)
    todo = stage.begin([head, *blocks], [f"{keys.PACKED}/{name}" for name in (keys.PACKED_X, keys.PACKED_INPUT_ROW)])
    if not todo:
        return packed
    cells = read_table(run, keys.CELLS_TABLE)
    order = packed_order(packed.design, cells["group"].to_numpy(), settings.seed)
    if head in todo:
        write_array(packed.storage, keys.PACKED_INPUT_ROW, cells["input_row"].to_numpy(dtype=np.int64)[order])
        stage.mark(head)
    missing = [shard for shard in todo if shard != head]
    if missing:
        parts = _span_parts(source.n_cells, cells, order)
        tasks = _start_dealing(settings, source, runtime, packed, parts, missing)
        for _ in runtime.map(write_partition, tasks, stage, packed, title="pack"):
            pass
    return packed


def packed_order(design: Design, groups: np.ndarray, seed: int) -> np.ndarray:
    """Return which kept cell stands at every packed row: groups in order, each in a seeded permutation.

    Parameters
    ----------
    groups
        (cells,) group code of every kept cell, in input order.
    """
    sorted_cells = np.argsort(groups, kind="stable")
    order = np.empty(len(groups), dtype=np.int64)
    for group in design.own_groups:
        # Cells that are mapped onto a run lie alike whatever other groups come with them.
        key = stable_number(group.name) if design.onto else group.code
        generator = np.random.default_rng(np.random.SeedSequence((seed, keys.STREAMS[keys.STAGE_PACK], key)))
        here = slice(group.start - design.first_row, group.stop - design.first_row)
        order[here] = sorted_cells[here][generator.permutation(group.cells)]
    return order


def stable_number(name: str) -> int:
    """Return a number that stands for a name in the seeds of generators."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def partitions_of(n_blocks: int, nnz: int, n_spans: int) -> list[range]:
    """Cut the blocks into partitions, so that a span's piece for one of them holds about a megabyte."""
    edges = np.linspace(0, n_blocks, partition_count(n_blocks, nnz, n_spans) + 1).astype(int)
    return [range(a, b) for a, b in itertools.pairwise(edges)]


def partition_count(n_blocks: int, nnz: int, n_spans: int) -> int:
    """Return how many partitions the blocks are cut into."""
    wanted = -(-nnz * 8 // (n_spans * PIECE_BYTES))
    return max(min(n_blocks, MOST_SMALL), min(wanted, n_blocks))


def _start_dealing(
    settings: Settings,
    source: Source,
    runtime: Runtime,
    packed: Packed,
    parts: Sequence[tuple[Span, np.ndarray, np.ndarray]],
    missing: Sequence[Shard],
) -> list[PartitionTask]:
    """Start a task per span and return a task per partition that waits for the spans' pieces; see `_span_parts`."""
    lost = {shard.task for shard in missing}
    partitions = [p for p in partitions_of(packed.n_blocks, source.nnz, len(parts)) if lost.intersection(p)]
    table, summary = read_table(packed.run, keys.GENES_TABLE), packed.run.read_json(keys.COHORT_SUMMARY)
    dealing = Dealing(
        columns=pd.Index(packed.genes).get_indexer(pd.Index(table["name"].where(table["selected"]))).astype(np.int32),
        n_columns=packed.n_genes,
        normalise=summary["normalise"],
        edges=tuple((packed.block_range(p[0])[0], packed.block_range(p[-1])[1]) for p in partitions),
        chunk_rows=settings.cohort.chunk_rows,
    )
    source = source.in_natural_logs(summary.get("log_base"))
    shared = runtime.put(dealing), runtime.put(source.task_matrix(runtime))
    handles = [runtime.submit(deal_span, SpanTask(*part, *shared), returns=len(partitions)) for part in parts]
    return [
        PartitionTask(tuple(s for s in missing if s.task in partition), tuple(span[i] for span in handles))
        for i, partition in enumerate(partitions)
    ]


def _span_parts(n_cells: int, cells: pd.DataFrame, order: np.ndarray) -> list[tuple[Span, np.ndarray, np.ndarray]]:
    """Return each span of input rows with the packed rows and the totals of its cells."""
    rows = cells["input_row"].to_numpy()
    position, totals = np.full(n_cells, -1, dtype=np.int64), np.zeros(n_cells)
    position[rows[order]] = np.arange(len(order))
    totals[rows] = cells["total"].to_numpy()
    # Copies: a view would take the whole array along to the task.
    return [(s, position[s.start : s.stop].copy(), totals[s.start : s.stop].copy()) for s in spans_of(n_cells)]


def deal_span(task: SpanTask) -> Any:
    """Read a span's rows, normalise them, take the modelled genes and deal them to partitions; a task.

    Returns a `DealtRows` per wanted partition: a tuple of them, or the one.
    """
    dealing: Dealing = fetch(task.dealing)
    matrix: Matrix = fetch(task.matrix)
    dealt: list[list[DealtRows]] = [[] for _ in dealing.edges]
    for start, stop in chunks_of(task.span, dealing.chunk_rows):
        here = slice(start - task.span.start, stop - task.span.start)
        rows = take_columns(csr_rows(matrix, start, stop), dealing.columns, dealing.n_columns)
        if dealing.normalise == "counts":
            rows = normalised(rows, task.totals[here])
        for pieces, (first, last) in zip(dealt, dealing.edges, strict=True):
            inside = np.flatnonzero((task.position[here] >= first) & (task.position[here] < last))
            pieces.append(DealtRows(task.position[here][inside], rows[inside]))
    pieces_out = tuple(_joined(pieces) for pieces in dealt)
    return pieces_out[0] if len(pieces_out) == 1 else pieces_out


def write_partition(task: PartitionTask, stage: StageRun, packed: Packed) -> int:
    """Put a partition's pieces together and write its missing blocks, each with its marker; a task."""
    parts: dict[str, list[DealtRows]] = {shard.name: [] for shard in task.shards}
    for handle in task.pieces:
        piece = fetch(handle)
        for shard in task.shards:
            first, last = np.searchsorted(piece.rows, packed.block_range(shard.task))
            parts[shard.name].append(DealtRows(piece.rows[first:last].copy(), piece.values[first:last]))
        del piece
    for shard in task.shards:
        block = _joined(parts.pop(shard.name)).values
        write_csr(packed.storage, f"{keys.PACKED_X}/{keys.block_name(shard.task)}", block)
        stage.mark(shard)
    return len(task.shards)


def take_columns(rows: sparse.csr_matrix, columns: np.ndarray, n_columns: int) -> sparse.csr_matrix:
    """Return the modelled genes of some rows, in input order."""
    taken = columns[rows.indices]
    kept = taken >= 0
    indptr = np.concatenate([[0], np.cumsum(kept)])[rows.indptr]
    shape = (rows.shape[0], n_columns)
    found = sparse.csr_matrix((rows.data[kept], taken[kept], indptr), shape=shape, copy=False)
    found.sort_indices()  # genes that come in the order of the run, as they do in a run itself, are in order
    return found


def _joined(pieces: Sequence[DealtRows]) -> DealtRows:
    """Return pieces as one, its rows in packed order."""
    rows = np.concatenate([piece.rows for piece in pieces])
    values = sparse.vstack([piece.values for piece in pieces], format="csr")
    order = np.argsort(rows, kind="stable")
    return DealtRows(rows[order], values[order])


def _head_shard() -> Shard:
    return Shard("input_row", array_files(f"{keys.PACKED}/{keys.PACKED_INPUT_ROW}"))


def _block_shard(block: int) -> Shard:
    name = f"{keys.PACKED}/{keys.PACKED_X}/{keys.block_name(block)}"
    return Shard(keys.block_name(block), csr_files(name), block)
