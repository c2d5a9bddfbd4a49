"""The pack stage: write the selected genes of the kept cells, normalised, sorted by group and shuffled inside groups.

Input: the tables of the cohort stage and the source. Output: packed.zarr (`packed.py` describes its layout). The matrix
is read in row order only. The row blocks of the output are divided into partitions. One task per span of input rows
sorts its rows into one piece per partition; the pieces stay in the object store of the runtime. One task per partition
then fetches its pieces one at a time and writes its blocks. No process holds more than a chunk and its own pieces. Only
partitions with a missing block are written.
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
"""Target size of a piece: large enough for the object store, which is slow with many small objects."""
MOST_SMALL = 8
"""Number of partitions of a small cohort, so that several processors have work."""


@dataclass(frozen=True)
class DealtRows:
    """A piece: the rows of one span that belong to one partition, in packed order."""

    rows: np.ndarray  # (rows,) int64 packed rows, ascending
    values: sparse.csr_matrix  # (rows, modelled genes)


@dataclass(frozen=True)
class SpanTask:
    """A span, the packed rows of its cells, and handles of the objects that all spans share."""

    span: Span
    position: np.ndarray  # (rows,) int64 packed row of each input row; -1 for a dropped cell
    totals: np.ndarray  # (rows,) float64 sum of each cell, by which counts are scaled
    dealing: Any  # handle of a `Dealing`
    matrix: Any  # handle of a `Matrix`


@dataclass(frozen=True)
class Dealing:
    """What the tasks of all spans share."""

    columns: np.ndarray  # (input genes,) int32 column among the modelled genes, or -1
    n_columns: int
    normalise: Values
    edges: tuple[tuple[int, int], ...]  # packed rows start:stop of the wanted partitions
    chunk_rows: int


@dataclass(frozen=True)
class PartitionTask:
    """The shards of the missing blocks of a partition, and the handles of its pieces, one per span."""

    shards: tuple[Shard, ...]
    pieces: tuple[Any, ...]


def run_pack(
    run: RunDirectory, settings: Settings, source: Source, runtime: Runtime, key: str, packed: Packed | None = None
) -> Packed:
    """Write the missing blocks of packed.zarr and return the opened store.

    Parameters
    ----------
    packed
        The store to write, if its genes or their order differ from the selection in the cohort's table; None opens it
        by that table.
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
    """Return the number of the kept cell in each packed row: groups in order, cells in a seeded permutation.

    Parameters
    ----------
    groups
        (cells,) group code of each kept cell, in input order.

    Returns
    -------
    (cells,) int64.
    """
    sorted_cells = np.argsort(groups, kind="stable")
    order = np.empty(len(groups), dtype=np.int64)
    for group in design.own_groups:
        # The order inside a mapped group must not depend on the other groups that are mapped with it.
        key = stable_number(group.name) if design.onto else group.code
        generator = np.random.default_rng(np.random.SeedSequence((seed, keys.STREAMS[keys.STAGE_PACK], key)))
        here = slice(group.start - design.first_row, group.stop - design.first_row)
        order[here] = sorted_cells[here][generator.permutation(group.cells)]
    return order


def stable_number(name: str) -> int:
    """Return a 64-bit hash of a name, for the seed of a generator."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def partitions_of(n_blocks: int, nnz: int, n_spans: int) -> list[range]:
    """Cut the blocks into partitions such that a piece, one span's rows of one partition, is about a megabyte."""
    edges = np.linspace(0, n_blocks, partition_count(n_blocks, nnz, n_spans) + 1).astype(int)
    return [range(a, b) for a, b in itertools.pairwise(edges)]


def partition_count(n_blocks: int, nnz: int, n_spans: int) -> int:
    """Return the number of partitions (see `partitions_of`): at least 8 and at most one per block."""
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
    """Start one task per span, and return one task per partition with missing blocks, to run on the spans' pieces.

    `parts` is the result of `_span_parts`.
    """
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
    """Return each span of input rows with the packed row and the total of each of its cells."""
    rows = cells["input_row"].to_numpy()
    position, totals = np.full(n_cells, -1, dtype=np.int64), np.zeros(n_cells)
    position[rows[order]] = np.arange(len(order))
    totals[rows] = cells["total"].to_numpy()
    # Copies, because pickling a view sends the whole array to the task.
    return [(s, position[s.start : s.stop].copy(), totals[s.start : s.stop].copy()) for s in spans_of(n_cells)]


def deal_span(task: SpanTask) -> Any:
    """Read a span's rows, select the modelled genes, normalise, and split the rows by partition; a task.

    Returns one `DealtRows` per partition: a tuple, or a single object if there is one partition, as Ray expects.
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
    """Join the pieces of a partition, write its missing blocks with their markers, and return their number; a task."""
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
    """Select and reorder columns of a CSR matrix.

    Parameters
    ----------
    columns
        (input genes,) int32 output column of each input gene, or -1.
    """
    taken = columns[rows.indices]
    kept = taken >= 0
    indptr = np.concatenate([[0], np.cumsum(kept)])[rows.indptr]
    shape = (rows.shape[0], n_columns)
    selected = sparse.csr_matrix((rows.data[kept], taken[kept], indptr), shape=shape, copy=False)
    selected.sort_indices()  # no work in a run, only for a mapped cohort with its genes in another order
    return selected


def _joined(pieces: Sequence[DealtRows]) -> DealtRows:
    """Join pieces into one with its rows in packed order."""
    rows = np.concatenate([piece.rows for piece in pieces])
    values = sparse.vstack([piece.values for piece in pieces], format="csr")
    order = np.argsort(rows, kind="stable")
    return DealtRows(rows[order], values[order])


def _head_shard() -> Shard:
    return Shard("input_row", array_files(f"{keys.PACKED}/{keys.PACKED_INPUT_ROW}"))


def _block_shard(block: int) -> Shard:
    name = f"{keys.PACKED}/{keys.PACKED_X}/{keys.block_name(block)}"
    return Shard(keys.block_name(block), csr_files(name), block)
