"""Read packed.zarr: the selected genes of the kept cells, sorted by group, in sparse row blocks.

Layout below `DIR/packed.zarr`: `X/<block>/{data,indices,indptr}` (float32, int32, int64; one CSR per `block_rows`
rows), `input_row` (rows,) int64, and per group `cluster_low/<group>` and `cluster_high/<group>` (cells of the group,)
int32. `indptr` also holds the number of stored values of a block. Rows are sorted by group, so the position of a row
determines its condition, batch and group. Inside a group the order is a seeded random permutation.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
from scipy import sparse

from ndreamer_dist import keys
from ndreamer_dist.cohort.design import Design
from ndreamer_dist.rundir.directory import RunDirectory
from ndreamer_dist.storage.arrays import array_files, read_array, write_array
from ndreamer_dist.storage.checksums import check_digest, digest
from ndreamer_dist.storage.files import Storage

COHORT_MARKER = f"{keys.DONE}/{keys.STAGE_COHORT}/all.json"
"""The one marker of the cohort stage."""


@dataclass(frozen=True)
class Packed:
    """The packed cohort of a run. Each method reads only what it returns.

    Attributes
    ----------
    genes
        Names of the modelled genes, in the order of the columns.
    block_rows
        Rows per block; the last block may have fewer.
    before
        Of a mapped cohort: the packed cohorts that it is mapped onto, whose rows come first in the design. Rows and
        blocks are numbered without these, unless a method says otherwise.
    """

    run: RunDirectory
    design: Design
    genes: tuple[str, ...]
    block_rows: int
    before: tuple[Packed, ...] = ()

    @classmethod
    def open(cls, run: RunDirectory, block_rows: int, sampled: int | None = None) -> Packed:
        """Open the packed cohort of a run by the output of its cohort stage; for `sampled` see `Design.sampling`."""
        design = Design.from_json(run.read_json(keys.DESIGN_JSON)).sampling(sampled)
        genes = read_table(run, keys.GENES_TABLE)
        return cls(run, design, tuple(genes.loc[genes["selected"], "name"]), block_rows)

    @property
    def storage(self) -> Storage:
        """Location of packed.zarr."""
        return self.run.storage / keys.PACKED

    @property
    def n_rows(self) -> int:
        """Number of cells."""
        return self.design.own_cells

    @property
    def n_genes(self) -> int:
        """Number of modelled genes."""
        return len(self.genes)

    @property
    def n_blocks(self) -> int:
        """Number of row blocks."""
        return -(-self.n_rows // self.block_rows)

    def block_range(self, block: int) -> tuple[int, int]:
        """Return the first row of a block and the row after its last."""
        return block * self.block_rows, min((block + 1) * self.block_rows, self.n_rows)

    def rows_of(self, block: int) -> np.ndarray:
        """Return the row numbers of a block in the design, which also counts the rows of `before`."""
        return self.design.first_row + np.arange(*self.block_range(block))

    @cached_property
    def all_starts(self) -> np.ndarray:
        """First row in the design of each block, including those of `before`, then the number of cells: int64."""
        starts = [
            part.design.first_row + start
            for part in (*self.before, self)
            for start in range(0, part.n_rows, part.block_rows)
        ]
        return np.array([*starts, self.design.n_cells], dtype=np.int64)

    def place(self, block: int) -> int:
        """Return the number of a block among all blocks, including those of `before`."""
        return len(self.all_starts) - 1 - self.n_blocks + block

    def any_block(self, place: int) -> sparse.csr_matrix:
        """Return a block by its number among all blocks (see `place`)."""
        for part in self.before:
            if place < part.n_blocks:
                return part.block(place)
            place -= part.n_blocks
        return self.block(place)

    def block(self, block: int) -> sparse.csr_matrix:
        """Return one block: (rows, genes) CSR float32 with sorted indices."""
        name = f"{keys.PACKED_X}/{keys.block_name(block)}"
        data, indices, indptr = (
            read_array(self.storage, f"{name}/{part}") for part in (keys.DATA, keys.INDICES, keys.INDPTR)
        )
        start, stop = self.block_range(block)
        entries = int(indptr[-1])  # without the placeholder that `write_csr` stores in an empty array
        return sparse.csr_matrix(
            (data[:entries], indices[:entries], indptr), shape=(stop - start, self.n_genes), copy=False
        )

    def rows(self, start: int, stop: int) -> sparse.csr_matrix:
        """Return the rows `start:stop`, from one or more blocks: (rows, genes) CSR float32."""
        if stop <= start:
            return sparse.csr_matrix((0, self.n_genes), dtype=np.float32)
        parts = []
        for block in range(start // self.block_rows, (stop - 1) // self.block_rows + 1):
            first, last = self.block_range(block)
            parts.append(self.block(block)[max(start, first) - first : min(stop, last) - first])
        return parts[0] if len(parts) == 1 else sparse.vstack(parts, format="csr")

    @cached_property
    def input_row(self) -> np.ndarray:
        """Input row of each packed row: (rows,) int64."""
        return read_array(self.storage, keys.PACKED_INPUT_ROW)

    def clusters(self, level: str) -> np.ndarray:
        """Return the cluster labels of all rows at a level, `keys.PACKED_LOW` or `keys.PACKED_HIGH`: (rows,) int32."""
        parts = [read_array(self.storage, f"{level}/{keys.block_name(g.code)}") for g in self.design.own_groups]
        return np.concatenate(parts)


def read_table(run: RunDirectory, name: str) -> pd.DataFrame:
    """Read a parquet table of the cohort stage; `DamagedError` if its checksum differs from the stage's marker."""
    digests = run.read_json(COHORT_MARKER).get("facts", {}) if run.storage.exists(COHORT_MARKER) else {}
    data = check_digest(run.storage.read(name), digests.get(name), f"{run.url}/{name}")
    return pq.read_table(io.BytesIO(data)).to_pandas()


def cell_totals(packed: Packed) -> np.ndarray:
    """Return the total by which each cell's counts were scaled: (cells,) float64, in packed order."""
    cells = read_table(packed.run, keys.CELLS_TABLE)
    places = np.searchsorted(cells["input_row"].to_numpy(), packed.input_row)
    return cells["total"].to_numpy(dtype=np.float64)[places]


def write_tables(run: RunDirectory, tables: Mapping[str, pd.DataFrame]) -> dict[str, str]:
    """Write the parquet tables of the cohort stage, by name; return their checksums, for the `facts` of its marker."""
    digests = {}
    for name, table in tables.items():
        data = table_bytes(table)
        run.storage.write_atomic(name, data)
        digests[name] = digest(data)
    return digests


def table_bytes(table: pd.DataFrame) -> bytes:
    """Encode a table as parquet."""
    buffer = io.BytesIO()
    table.to_parquet(buffer, index=False)
    return buffer.getvalue()


def write_csr(storage: Storage, name: str, rows: sparse.csr_matrix, *, chunk: int | None = None) -> None:
    """Write a CSR matrix as the three arrays `data`, `indices` and `indptr`.

    An empty array is stored with one placeholder, because a chunk cannot be empty.

    Parameters
    ----------
    chunk
        Values per chunk of `data` and `indices`; None for one chunk each.
    """
    parts = {
        keys.DATA: rows.data.astype(np.float32, copy=False),
        keys.INDICES: rows.indices.astype(np.int32, copy=False),
        keys.INDPTR: rows.indptr.astype(np.int64),
    }
    for part, values in parts.items():
        stored = values if values.size else np.zeros(1, dtype=values.dtype)
        size = stored.size if chunk is None or part == keys.INDPTR else min(chunk, stored.size)
        write_array(storage, f"{name}/{part}", stored, chunks=(size,))


def csr_files(name: str) -> tuple[str, ...]:
    """Return the files that `write_csr` writes with one chunk per array."""
    return array_files(*(f"{name}/{part}" for part in (keys.DATA, keys.INDICES, keys.INDPTR)))
