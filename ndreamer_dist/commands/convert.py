"""Convert a cohort stored by columns into one stored by rows: `ndreamer-dist convert IN OUT.zarr`.

Ranges of columns are read in turn, and their values are dealt to files of row blocks. Then each row block is assembled
and appended. The stored values of one range bound the memory.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import zarr
from anndata.io import read_elem, sparse_dataset, write_elem
from scipy import sparse
from tqdm.auto import tqdm

from ndreamer_dist.cohort.matrix import csr_rows, tidied
from ndreamer_dist.cohort.source import container_of, open_group
from ndreamer_dist.cohort.stored import (
    COLUMN_ENTRIES,
    MATRIX,
    StoredMatrix,
    holds_x,
    is_group,
    raw_place,
    stored_matrix,
)
from ndreamer_dist.cohort.tables import read_frame
from ndreamer_dist.errors import StoreError
from ndreamer_dist.results.export import plain_zarr
from ndreamer_dist.storage.files import open_storage

MOST_PIECES = 20_000
"""Files of pieces, about, at the most; a range of columns holds more values where there would be more."""
ROWS = 4096
"""Rows copied at a time from a matrix that is stored by rows."""


def convert(
    source: str | os.PathLike[str], out: str | os.PathLike[str], *, entries: int = COLUMN_ENTRIES
) -> tuple[int, int]:
    """Write a stored AnnData anew, every matrix by rows (CSR float32), and return its cells and genes.

    Copied are `X`, `layers`, `raw`, `obs`, `var`, `obsm` and `uns["log1p"]`. Values of one cell and gene are added up.

    Parameters
    ----------
    source
        Path or URL of an h5ad file or a zarr store, by columns or by rows.
    out
        Path of the zarr store to write; nothing may be there.
    entries
        Stored values held at a time, about.

    Raises
    ------
    CohortError
        The source cannot be read.
    StoreError
        `out` is not a path on this machine, or something is there already.
    """
    address, target = open_storage(source), open_storage(out)
    if not target.is_local or target.exists():
        what = "is there already" if target.is_local else "is no path on this machine"
        msg = f"{target.url} {what}; choose another place for the converted cohort"
        raise StoreError(msg)
    container = container_of(address)
    group = open_group(address, container)
    obs, var = (read_frame(group, name, address.url) for name in ("obs", "var"))
    path = Path(target.root)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".") as folder, plain_zarr():
        made = zarr.open_group(Path(folder) / "made.zarr", mode="w")
        write_elem(made, "/", anndata.AnnData(obs=obs, var=var))
        if raw_place(group) is not None:
            made.require_group("raw", overwrite=True)  # anndata has written that there is none
        for place, name in _matrices(group):
            matrix = stored_matrix(group, address.url, container, place)
            _write_rows(made, name, _blocks(matrix, Path(folder), entries))
        _copy_rest(group, made)
        zarr.consolidate_metadata(made.store)
        (Path(folder) / "made.zarr").rename(path)
    return len(obs), len(var)


def _matrices(group: Any) -> Iterator[tuple[str, str]]:
    """Yield every matrix of an AnnData: where it is stored, and where it is written."""
    if holds_x(group):
        yield MATRIX, MATRIX
    if "layers" in group and is_group(group["layers"]):
        yield from ((f"layers/{name}", f"layers/{name}") for name in group["layers"])
    if (raw := raw_place(group)) is not None:
        yield raw[0], "raw/X"


def _write_rows(made: zarr.Group, name: str, blocks: Iterator[sparse.csr_matrix]) -> None:
    for number, block in enumerate(tqdm(blocks, desc=name, unit="block", disable=None)):
        if number == 0:
            _write(made, name, block)
        else:
            sparse_dataset(made[name]).append(block)


def _write(made: zarr.Group, name: str, value: Any) -> None:
    """Write an element at a place of the store; anndata 0.13 takes no path, only a name in a group."""
    folder, _, last = name.rpartition("/")
    write_elem(made.require_group(folder) if folder else made, last, value)


def _copy_rest(group: Any, made: zarr.Group) -> None:
    """Copy small parts: coordinates, the genes of `raw`, and the base of logarithms."""
    raw = raw_place(group)
    names = [f"obsm/{name}" for name in group["obsm"]] if "obsm" in group and is_group(group["obsm"]) else []
    for name in (*names, "uns/log1p"):
        with suppress(Exception):  # a part that anndata cannot read is not needed for a run
            _write(made, name, read_elem(group[name]))
    if raw is not None:
        _write(made, "raw/var", read_frame(group, raw[1], "raw"))
        made["raw"].attrs.update({"encoding-type": "raw", "encoding-version": "0.1.0"})


def _blocks(matrix: StoredMatrix, folder: Path, entries: int) -> Iterator[sparse.csr_matrix]:
    """Yield the rows of a matrix, block by block."""
    if matrix.kind == "csc":
        yield from row_blocks(matrix, folder, entries)
        return
    for start in range(0, max(1, matrix.shape[0]), ROWS):
        yield csr_rows(matrix, start, start + ROWS)


def row_blocks(matrix: StoredMatrix, folder: Path, entries: int = COLUMN_ENTRIES) -> Iterator[sparse.csr_matrix]:
    """Yield a column-compressed matrix as row blocks: (rows, genes) CSR float32 each.

    Parameters
    ----------
    folder
        Where the pieces go meanwhile: 12 bytes a stored value.
    entries
        Stored values of a range of columns, and of a block, about.
    """
    entries = max(entries, int(matrix.nnz / MOST_PIECES**0.5))
    count = max(1, min(matrix.shape[0], -(-matrix.nnz // entries)))
    rows = max(1, -(-matrix.shape[0] // count))
    count = max(1, -(-matrix.shape[0] // rows))
    ranges = matrix.column_ranges(entries)
    for number, (start, stop) in enumerate(tqdm(ranges, desc=f"{matrix.name}: columns", unit="range", disable=None)):
        _deal(matrix.read_columns(start, stop), rows, folder, number)
    for block in range(count):
        paths = [folder / f"{block}-{number}.npy" for number in range(len(ranges))]
        row, column, bits = np.concatenate(
            [np.load(path) for path in paths if path.exists()] or [np.zeros((3, 0), np.int32)], axis=1
        )
        height = min(rows, matrix.shape[0] - block * rows)
        values = sparse.coo_matrix((bits.view(np.float32), (row, column)), shape=(height, matrix.shape[1]))
        yield tidied(values.tocsr())[0]
        for path in paths:
            path.unlink(missing_ok=True)


def _deal(values: tuple[np.ndarray, np.ndarray, np.ndarray], rows: int, folder: Path, number: int) -> None:
    """Write the values of a range of columns to one piece per row block: row in the block, column, bits of the value."""
    row, column, data = values
    block = row // rows
    order = np.argsort(block, kind="stable")
    edges = np.flatnonzero(np.diff(block[order])) + 1
    for part in np.split(order, edges) if len(order) else ():
        own = int(block[part[0]])
        piece = np.stack(
            [(row[part] - own * rows).astype(np.int32), column[part].astype(np.int32), data[part].view(np.int32)]
        )
        np.save(folder / f"{own}-{number}.npy", piece)
