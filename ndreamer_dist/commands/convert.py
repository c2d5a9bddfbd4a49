"""Convert a cohort stored by columns (CSC) into one stored by rows (CSR): `ndreamer-dist convert IN OUT.zarr`.

The command reads one range of columns after the other and writes its values to one file (a piece) per row block. Then it
joins the pieces of each row block and appends the block. Memory holds the stored values of one range or one block.
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
from ndreamer_dist.compute.events import bars_disabled
from ndreamer_dist.errors import StoreError
from ndreamer_dist.results.export import plain_zarr
from ndreamer_dist.storage.files import open_storage

MOST_PIECES = 20_000
"""Approximate maximum number of pieces; for very large matrices ranges and blocks grow beyond `entries` instead."""
ROWS = 4096
"""Rows copied at a time from a matrix that is already stored by rows."""


def convert(
    source: str | os.PathLike[str], out: str | os.PathLike[str], *, entries: int = COLUMN_ENTRIES
) -> tuple[int, int]:
    """Copy a stored AnnData with all matrices by rows (CSR float32), and return its numbers of cells and genes.

    The copy holds `X`, `layers`, `raw`, `obs`, `var`, `obsm` and `uns["log1p"]`. Duplicate values of a cell and gene are
    added up.

    Parameters
    ----------
    source
        Path or URL of an h5ad file or a zarr store, with matrices by columns or by rows.
    out
        Path of the zarr store to write; it must not exist.
    entries
        Approximate number of stored values in memory at a time.

    Raises
    ------
    CohortError
        The source cannot be read.
    StoreError
        `out` exists, or is not a path on this machine.
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
        copy = zarr.open_group(Path(folder) / "copy.zarr", mode="w")
        write_elem(copy, "/", anndata.AnnData(obs=obs, var=var))
        if raw_place(group) is not None:
            copy.require_group("raw", overwrite=True)  # replaces the entry that anndata wrote for "no raw"
        for place, name in _matrices(group):
            matrix = stored_matrix(group, address.url, container, place)
            _write_rows(copy, name, _blocks(matrix, Path(folder), entries))
        _copy_rest(group, copy)
        zarr.consolidate_metadata(copy.store)
        (Path(folder) / "copy.zarr").rename(path)
    return len(obs), len(var)


def _matrices(group: Any) -> Iterator[tuple[str, str]]:
    """Yield the place of every matrix of an AnnData in the source and in the copy."""
    if holds_x(group):
        yield MATRIX, MATRIX
    if "layers" in group and is_group(group["layers"]):
        yield from ((f"layers/{name}", f"layers/{name}") for name in group["layers"])
    if (raw := raw_place(group)) is not None:
        yield raw[0], "raw/X"


def _write_rows(copy: zarr.Group, name: str, blocks: Iterator[sparse.csr_matrix]) -> None:
    for number, block in enumerate(tqdm(blocks, desc=name, unit="block", disable=bars_disabled())):
        if number == 0:
            _write(copy, name, block)
        else:
            sparse_dataset(copy[name]).append(block)


def _write(copy: zarr.Group, name: str, value: Any) -> None:
    """Write an element to a path in the store; anndata 0.13 accepts no path, only a name in a group."""
    folder, _, last = name.rpartition("/")
    write_elem(copy.require_group(folder) if folder else copy, last, value)


def _copy_rest(group: Any, copy: zarr.Group) -> None:
    """Copy the small parts: `obsm`, the genes of `raw`, and the base of the logarithm."""
    raw = raw_place(group)
    names = [f"obsm/{name}" for name in group["obsm"]] if "obsm" in group and is_group(group["obsm"]) else []
    for name in (*names, "uns/log1p"):
        with suppress(Exception):  # parts that anndata cannot read, or that are absent, are not needed for a run
            _write(copy, name, read_elem(group[name]))
    if raw is not None:
        _write(copy, "raw/var", read_frame(group, raw[1], "raw"))
        copy["raw"].attrs.update({"encoding-type": "raw", "encoding-version": "0.1.0"})


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
        Folder for the pieces, 12 bytes per stored value; each block deletes its own.
    entries
        Approximate number of stored values of a range of columns, and of a block.
    """
    entries = max(entries, int(matrix.nnz / MOST_PIECES**0.5))
    count = max(1, min(matrix.shape[0], -(-matrix.nnz // entries)))
    rows = max(1, -(-matrix.shape[0] // count))
    count = max(1, -(-matrix.shape[0] // rows))
    ranges = matrix.column_ranges(entries)
    bar = tqdm(ranges, desc=f"{matrix.name}: columns", unit="range", disable=bars_disabled())
    for number, (start, stop) in enumerate(bar):
        _write_pieces(matrix.read_columns(start, stop), rows, folder, number)
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


def _write_pieces(values: tuple[np.ndarray, np.ndarray, np.ndarray], rows: int, folder: Path, number: int) -> None:
    """Write the values of a range of columns as pieces, one per row block: row in the block, column, bits of the value.

    Parameters
    ----------
    values
        Row, column and value (float32) of every entry.
    rows
        Rows of a block.
    number
        Number of the range; part of the file name.
    """
    row, column, data = values
    block = row // rows
    order = np.argsort(block, kind="stable")
    edges = np.flatnonzero(np.diff(block[order])) + 1
    for part in np.split(order, edges) if len(order) else ():
        index = int(block[part[0]])
        piece = np.stack(
            [(row[part] - index * rows).astype(np.int32), column[part].astype(np.int32), data[part].view(np.int32)]
        )
        np.save(folder / f"{index}-{number}.npy", piece)
