"""Turning a column-compressed matrix into row blocks, once, out of core.

Everything after this reads by rows, which a CSC store cannot do. Tasks take ranges of columns and deal their values to
row blocks; then a task per row block puts its pieces together. Both sides are bounded by a number of stored values.
The blocks live below `DIR/cohort/rows.zarr` until the cohort is packed.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import sparse

from ndreamer_dist import keys
from ndreamer_dist.cohort.packed import write_csr
from ndreamer_dist.cohort.source import COLUMN_ENTRIES, StoredMatrix, as_rows
from ndreamer_dist.compute.executor import Runtime
from ndreamer_dist.rundir.directory import RunDirectory, Shard
from ndreamer_dist.rundir.stage import run_task
from ndreamer_dist.storage.arrays import read_array, shard_files, write_array
from ndreamer_dist.storage.files import Storage

logger = logging.getLogger(__name__)

CHUNK_ENTRIES = 2**20
"""Stored values of a chunk of a row block, the least that is read."""
TASK_BYTES_PER_ENTRY = 48
"""What a task of either kind holds for each stored value of its share."""
DISK_BYTES_PER_ENTRY = 20
"""Of the pieces and the row blocks together, before compression; 8 of them until the cohort is packed."""


@dataclass(frozen=True)
class RowBlocks:
    """A matrix as the row blocks of `rows.zarr`; read like any other."""

    storage: Storage
    block_rows: int
    shape: tuple[int, int]
    nnz: int
    dtype: str
    kind: Literal["csr"] = "csr"

    @property
    def n_blocks(self) -> int:
        """Number of row blocks."""
        return -(-self.shape[0] // self.block_rows)

    def read_rows(self, start: int, stop: int) -> sparse.csr_matrix:
        """See `source.Matrix.read_rows`."""
        parts = []
        for block in range(start // self.block_rows, -(-stop // self.block_rows)):
            first = block * self.block_rows
            parts.append(self._read(block, max(start - first, 0), min(stop - first, self.block_rows)))
        return parts[0] if len(parts) == 1 else sparse.vstack(parts, format="csr")

    def _read(self, block: int, start: int, stop: int) -> sparse.csr_matrix:
        name = keys.block_name(block)
        indptr = read_array(self.storage, f"{name}/{keys.INDPTR}", slice(start, stop + 1))
        part = slice(int(indptr[0]), int(indptr[-1]))
        data, indices = (read_array(self.storage, f"{name}/{p}", part) for p in (keys.DATA, keys.INDICES))
        return sparse.csr_matrix((data, indices, indptr - indptr[0]), shape=(len(indptr) - 1, self.shape[1]))


def rows_first(
    run: RunDirectory, matrix: StoredMatrix, runtime: Runtime, key: str, *, entries: int = COLUMN_ENTRIES
) -> RowBlocks:
    """Return the row blocks of a column-compressed matrix, made now where they are not there.

    Parameters
    ----------
    entries
        Stored values that a task holds, about.
    """
    n_blocks = max(1, min(matrix.shape[0], -(-matrix.nnz // entries)))
    block_rows = -(-matrix.shape[0] // n_blocks)
    blocks = RowBlocks(run.storage / keys.ROWS, block_rows, matrix.shape, matrix.nnz, matrix.dtype)
    ranges = matrix.column_ranges(entries)
    columns = [_columns_shard(i, part, blocks.n_blocks) for i, part in enumerate(ranges)]
    rows = [_rows_shard(block, len(ranges)) for block in range(blocks.n_blocks)]
    todo = run.pending(keys.STAGE_ROWS, key, rows)
    if not todo:
        return blocks
    logger.info("the matrix is stored by columns: it is turned into %d row blocks first", blocks.n_blocks)
    left = run.pending(keys.STAGE_ROWS, key, columns)
    if len(todo) == len(rows) and len(left) == len(columns):
        drop_rows(run)
    shared = (run, key, matrix, blocks)
    list(runtime.map(deal_columns, left, *shared, title="cohort: columns"))
    list(runtime.map(gather_rows, todo, *shared, title="cohort: rows"))
    run.storage.delete(f"{keys.ROWS}/pieces")
    return blocks


def drop_rows(run: RunDirectory) -> None:
    """Delete the row blocks; they are made anew where they are wanted again."""
    run.storage.delete(keys.ROWS)
    run.unmark(keys.STAGE_ROWS)


def deal_columns(shard: Shard, run: RunDirectory, key: str, matrix: StoredMatrix, blocks: RowBlocks) -> str:
    """Read a range of columns and write one piece per row block; a task."""
    return run_task(run, keys.STAGE_ROWS, key, _deal_columns, shard, matrix, blocks)


def gather_rows(shard: Shard, run: RunDirectory, key: str, matrix: StoredMatrix, blocks: RowBlocks) -> str:
    """Put the pieces of a row block together and write it; a task."""
    del matrix
    return run_task(run, keys.STAGE_ROWS, key, _gather_rows, shard, blocks)


def _deal_columns(task: tuple[int, tuple[int, int]], matrix: StoredMatrix, blocks: RowBlocks) -> None:
    index, (start, stop) = task
    rows, columns, data = matrix.read_columns(start, stop)
    # Few blocks make small integers, and numpy sorts those of 16 bits by counting.
    block = (rows // blocks.block_rows).astype(np.uint16 if blocks.n_blocks <= 2**16 else np.int32)
    order = np.argsort(block, kind="stable")
    edges = np.concatenate([[0], np.cumsum(np.bincount(block, minlength=blocks.n_blocks))])
    del block
    for b in range(blocks.n_blocks):
        part = order[edges[b] : edges[b + 1]]
        # The leading column of zeros keeps an empty piece from being an empty array.
        piece = np.zeros((3, len(part) + 1), dtype=np.int32)
        piece[:, 1:] = rows[part] - b * blocks.block_rows, columns[part], data[part].view(np.int32)
        write_array(blocks.storage, _piece(b, index), piece)


def _gather_rows(task: tuple[int, int], blocks: RowBlocks) -> None:
    block, pieces = task
    parts = [read_array(blocks.storage, _piece(block, index))[:, 1:] for index in range(pieces)]
    row, column, bits = np.concatenate(parts, axis=1)
    del parts
    height = min(blocks.block_rows, blocks.shape[0] - block * blocks.block_rows)
    values = sparse.coo_matrix((bits.view(np.float32), (row, column)), shape=(height, blocks.shape[1]))
    values.has_canonical_format = True  # a gene that a cell holds twice is for `as_rows` to refuse, not to be added up
    write_csr(blocks.storage, keys.block_name(block), as_rows(values.tocsr()), chunk=CHUNK_ENTRIES)


def _piece(block: int, index: int) -> str:
    return f"pieces/{keys.block_name(block)}/{keys.block_name(index)}"


def _columns_shard(index: int, part: tuple[int, int], n_blocks: int) -> Shard:
    files = tuple(shard_files(f"{keys.ROWS}/{_piece(block, index)}", 0, 0) for block in range(n_blocks))
    return Shard(f"columns-{keys.block_name(index)}", files, (index, part))


def _rows_shard(block: int, pieces: int) -> Shard:
    # How many chunks data and indices have is known only once they are written; indptr is written last.
    return Shard(
        f"rows-{keys.block_name(block)}",
        (shard_files(f"{keys.ROWS}/{keys.block_name(block)}/{keys.INDPTR}", 0),),
        (block, pieces),
    )
