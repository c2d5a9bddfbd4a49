"""The input cohort: opened, checked, and read by ranges of rows.

An AnnData in memory, backed, or stored as h5ad or zarr (a path or a URL) comes in; a `Source` goes out: the tables of
cells and genes, and a `Matrix` that hands out row ranges as CSR float32 and is cheap to send to a task. The matrix is
never read whole, and nothing of the caller's is changed. Whatever can be refused by names and shapes is refused here.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache
from typing import Any, Literal, Protocol

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import zarr
from anndata.io import read_elem
from scipy import sparse

from ndreamer_dist import keys
from ndreamer_dist.compute.executor import Runtime, fetch
from ndreamer_dist.errors import CohortError, StoreError, has_controls, is_unicode, listing, quoted, suggest
from ndreamer_dist.storage.arrays import touched_shards
from ndreamer_dist.storage.files import Storage, open_storage
from ndreamer_dist.storage.shards import CONCURRENT_SHARDS

Kind = Literal["csr", "csc", "dense"]
SAMPLES = 64
"""Row chunks that the fingerprint and the look at the values take, evenly spaced."""
SAMPLE_ROWS = 16
"""Rows of one of them."""
COLUMN_ENTRIES = 2**23
"""Stored values of a column-compressed matrix that are read at a time."""
REMOTE_BLOCK, REMOTE_BLOCKS = 2**22, 32
"""Bytes of a block of a remote h5ad file, and how many blocks a process keeps: HDF5 jumps, and what is near is wanted next."""
HDF5_SECONDS = 60.0
"""How long HDF5 may take to read the attributes of a local file."""
WALK = """
import sys, h5py
with h5py.File(sys.argv[1], "r") as file:
    dict(file.attrs)
    file.visititems(lambda name, item: dict(item.attrs) and None)
"""
TWICE = "the matrix is damaged: a cell holds the same gene twice"
LONGEST_COLUMN = 200
"""Bytes of a column's name, which is a folder's name in a store."""


class Matrix(Protocol):
    """A cells x genes matrix that is read by ranges of rows; it can be sent to a task."""

    @property
    def shape(self) -> tuple[int, int]:
        """Cells and genes."""
        ...

    @property
    def kind(self) -> Kind:
        """How the matrix is stored."""
        ...

    @property
    def nnz(self) -> int:
        """Stored values; of a dense matrix all of them."""
        ...

    def read_rows(self, start: int, stop: int) -> sparse.csr_matrix:
        """Return the rows `start:stop`: (rows, genes) CSR float32 with sorted indices."""
        ...


@dataclass(frozen=True)
class StoredMatrix:
    """A matrix in an h5ad file or a zarr store; every process opens it for itself."""

    url: str
    container: Literal["h5ad", "zarr"]
    name: str  # "X" or "layers/..."
    kind: Kind
    shape: tuple[int, int]
    nnz: int
    dtype: str

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}  # the open file stays where it is

    @cached_property
    def _element(self) -> Any:
        return open_root(self.url, self.container)[self.name]

    def read_rows(self, start: int, stop: int) -> sparse.csr_matrix:
        """See `Matrix.read_rows`; of a column-compressed matrix this passes over all of it."""
        with self._reading(f"rows {start} to {stop}"):
            return self._read_rows(start, min(stop, self.shape[0]))

    @contextmanager
    def _reading(self, what: str) -> Iterator[None]:
        """Say of any error what was being read."""
        try:
            yield
        except (CohortError, StoreError):
            raise
        except Exception as error:
            msg = f"{self.url}: {what} of {self.name} cannot be read ({_one_line(error)})"
            raise CohortError(msg) from error

    def _read_rows(self, start: int, stop: int) -> sparse.csr_matrix:
        if self.kind == "dense":
            return as_rows(np.asarray(self._element[start:stop]))
        if self.kind == "csc":
            return self.pick_rows(np.arange(start, stop))
        indptr = np.asarray(self._element["indptr"][start : stop + 1]).astype(np.int64)
        first, last = (int(indptr[0]), int(indptr[-1])) if indptr.size else (0, 0)
        indices = np.asarray(self._element["indices"][first:last])
        self._check_inside(indices, self.shape[1], f"rows {start} to {stop} name genes")
        data = np.asarray(self._element["data"][first:last])
        rows = sparse.csr_matrix((data, indices, indptr - first), shape=(stop - start, self.shape[1]))
        return as_rows(rows)

    def _check_inside(self, indices: np.ndarray, limit: int, what: str) -> None:
        if indices.size and not 0 <= int(indices.min()) <= int(indices.max()) < limit:
            msg = f"{self.url}: {self.name} is damaged: {what} that are not there"
            raise CohortError(msg)

    def column_ranges(self, entries: int = COLUMN_ENTRIES) -> list[tuple[int, int]]:
        """Return ranges of columns of about `entries` stored values each, for a column-compressed matrix."""
        indptr = np.asarray(self._element["indptr"][:]).astype(np.int64)
        cuts = np.searchsorted(indptr, np.arange(entries, self.nnz, entries), side="left")
        edges = np.unique(np.concatenate([[0], cuts, [self.shape[1]]]))
        return [(int(a), int(b)) for a, b in itertools.pairwise(edges)]

    def read_columns(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the stored values of the columns `start:stop`: row, column and value of each, by column."""
        with self._reading(f"columns {start} to {stop}"):
            indptr = np.asarray(self._element["indptr"][start : stop + 1]).astype(np.int64)
            part = slice(int(indptr[0]), int(indptr[-1]))
            rows = np.asarray(self._element["indices"][part])
            self._check_inside(rows, self.shape[0], f"columns {start} to {stop} name cells")
            columns = np.repeat(np.arange(start, stop, dtype=np.int32), np.diff(indptr))
            return rows, columns, np.asarray(self._element["data"][part]).astype(np.float32, copy=False)

    def pick_rows(self, rows: np.ndarray) -> sparse.csr_matrix:
        """Return some rows (ascending) of a column-compressed matrix in one pass over its columns."""
        wanted, place = np.zeros(self.shape[0], dtype=bool), np.zeros(self.shape[0], dtype=np.int64)
        wanted[rows], place[rows] = True, np.arange(len(rows))
        parts = []
        for start, stop in self.column_ranges():
            found, columns, data = self.read_columns(start, stop)
            kept = wanted[found]
            parts.append((place[found[kept]], columns[kept], data[kept]))
        row, column, data = (np.concatenate([part[i] for part in parts]) for i in range(3))
        made = sparse.coo_matrix((data, (row, column)), shape=(len(rows), self.shape[1])).tocsr()
        if made.nnz < len(data):  # scipy adds them up
            raise CohortError(TWICE)
        return as_rows(made)


@dataclass(frozen=True)
class MemoryMatrix:
    """A matrix in memory: the caller's own, or a handle to the one copy that tasks share."""

    values: Any  # csr_matrix, csr_array or 2-d array; or a handle to one
    kind: Kind
    shape: tuple[int, int]
    nnz: int
    dtype: str
    shared: bool = False

    def read_rows(self, start: int, stop: int) -> sparse.csr_matrix:
        """See `Matrix.read_rows`."""
        values = fetch(self.values) if self.shared else self.values
        return as_rows(values[start:stop])

    def share(self, runtime: Runtime) -> MemoryMatrix:
        """Return the same matrix with its values put once where tasks can see them."""
        return MemoryMatrix(runtime.put(self.values), self.kind, self.shape, self.nnz, self.dtype, shared=True)


@dataclass(frozen=True)
class Source:
    """An opened and checked cohort.

    Attributes
    ----------
    obs, var
        Tables of cells and genes, as anndata reads them.
    matrix
        The values of `X`, or of the layer asked for.
    obsm
        Coordinates that an AnnData in memory brings along; of a stored one they are read where they are asked for.
    """

    name: str
    obs: pd.DataFrame
    var: pd.DataFrame
    matrix: StoredMatrix | MemoryMatrix
    obsm: Mapping[str, Any] | None = None

    @property
    def n_cells(self) -> int:
        """Number of cells."""
        return self.matrix.shape[0]

    @property
    def n_genes(self) -> int:
        """Number of genes."""
        return self.matrix.shape[1]

    @property
    def kind(self) -> Kind:
        """How the matrix is stored."""
        return self.matrix.kind

    @property
    def nnz(self) -> int:
        """Stored values; of a dense matrix all of them."""
        return self.matrix.nnz

    @property
    def cell_names(self) -> pd.Index:
        """Names of the cells, as text."""
        return self.obs.index.astype(str)

    @property
    def gene_names(self) -> pd.Index:
        """Names of the genes, as text."""
        return self.var.index.astype(str)

    def read_rows(self, start: int, stop: int) -> sparse.csr_matrix:
        """Return the rows `start:stop`: (rows, genes) CSR float32 with sorted indices."""
        return self.matrix.read_rows(start, stop)

    def __getstate__(self) -> dict[str, Any]:
        # The sample is read where it is asked for, and no task asks for coordinates.
        return {field.name: getattr(self, field.name) for field in fields(self)} | {"obsm": None}

    @cached_property
    def sample(self) -> sparse.csr_matrix:
        """64 evenly spaced chunks of 16 rows (all rows of a small cohort) on top of each other; not to be changed.

        It is read once and kept. Of a column-compressed matrix that takes a pass over all of it.
        """
        starts = np.linspace(0, max(0, self.n_cells - SAMPLE_ROWS), SAMPLES).astype(np.int64)
        rows = np.unique((starts[:, None] + np.arange(SAMPLE_ROWS)).ravel())
        rows = rows[rows < self.n_cells]
        if isinstance(self.matrix, StoredMatrix) and self.kind == "csc":
            return self.matrix.pick_rows(rows)
        runs = np.split(rows, np.flatnonzero(np.diff(rows) > 1) + 1)
        return sparse.vstack([self.read_rows(int(run[0]), int(run[-1]) + 1) for run in runs], format="csr")


def open_source(source: str | os.PathLike[str] | ad.AnnData | Source, *, layer: str | None = None) -> Source:
    """Open a cohort and check its names and shapes.

    Parameters
    ----------
    source
        Path or URL of an h5ad file or a zarr store (format 2 or 3), or an AnnData, in memory or backed.
    layer
        Layer to read instead of `X`.

    Raises
    ------
    CohortError
        The store is missing, truncated or not AnnData; there is no such layer; names of cells or genes repeat; columns
        have names that are ours or that cannot be written.
    """
    if isinstance(source, Source):
        return source
    opened = _open_memory(source, layer) if isinstance(source, ad.AnnData) else _open_stored(source, layer)
    _check_names(opened)
    return opened


def fingerprint(source: Source, condition_key: str | None, batch_keys: Sequence[str] = ()) -> dict[str, Any]:
    """Return what tells this cohort from another: plain values for the first stage's key.

    The same data as h5ad and as zarr have the same fingerprint; path, dates and layout on disk are no part of it.
    """
    rows = source.sample
    wanted = [name for name in (condition_key, *batch_keys) if name in source.obs]
    parts = (rows.indptr.astype("<i8"), rows.indices.astype("<i8"), rows.data.astype("<f4"))
    return {
        "cells": source.n_cells,
        "genes": source.n_genes,
        "dtype": np.dtype(source.matrix.dtype).name,
        "nonzeros": source.nnz,
        "cell_names": _digest(source.cell_names),
        "gene_names": _digest(source.gene_names),
        "columns": {str(name): _digest(source.obs[name].astype(str)) for name in wanted},
        "rows": hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest(),
    }


def as_rows(values: Any) -> sparse.csr_matrix:
    """Return values as CSR float32 with sorted indices and no stored zeros; the input is not changed."""
    rows = sparse.csr_matrix(values)
    changed = sparse.csr_matrix(
        (rows.data.astype(np.float32, copy=False), rows.indices, rows.indptr), shape=rows.shape, copy=False
    )
    if not changed.has_sorted_indices:
        changed = changed.sorted_indices()
    if not changed.data.all():
        changed = changed.copy()
        changed.eliminate_zeros()
    if not changed.has_canonical_format:
        raise CohortError(TWICE)
    return changed


def open_root(url: str, container: str) -> Any:
    """Open the root group of a stored AnnData, read-only; a remote h5ad is read by ranges through a file object."""
    storage = Storage(url)
    if container == "zarr":
        return zarr.open_group(storage.store(read_only=True), mode="r")
    if storage.is_local:
        return h5py.File(storage.root, "r")
    return _remote_h5ad(url, storage.version())


@lru_cache(maxsize=1)
def _remote_h5ad(url: str, version: str) -> h5py.File:  # noqa: ARG001 - a file that has changed is opened anew
    """Open an h5ad file on a server; a process keeps the last, with the blocks it has read, from one task to the next."""
    return h5py.File(Storage(url).open_file(REMOTE_BLOCK, REMOTE_BLOCKS), "r")


# --- opening -----------------------------------------------------------------------------------------------------


def _open_memory(adata: ad.AnnData, layer: str | None) -> Source:
    if layer is not None and layer not in adata.layers:
        raise CohortError(_no_layer("the AnnData", layer, adata.layers))
    if adata.isbacked and layer is None:
        if adata.is_view:
            msg = "the AnnData is a view of a backed one; pass its .to_memory(), or write it to a file of its own"
            raise CohortError(msg)
        matrix = _open_stored(str(adata.filename), None).matrix
        return Source(str(adata.filename), adata.obs.copy(), adata.var.copy(), matrix, adata.obsm)
    values = adata.X if layer is None else adata.layers[layer]
    return Source("the AnnData", adata.obs.copy(), adata.var.copy(), _memory_matrix(values), adata.obsm)


def _memory_matrix(values: Any) -> MemoryMatrix:
    if sparse.issparse(values) or isinstance(values, np.ndarray):
        _check_numbers(values.dtype, "the AnnData: the matrix")
    if sparse.issparse(values):
        kind: Kind = "csc" if values.format == "csc" else "csr"
        rows = values.tocsr()
        return MemoryMatrix(rows, kind, rows.shape, int(rows.nnz), str(rows.dtype))
    if isinstance(values, np.ndarray) and values.ndim == 2:
        return MemoryMatrix(values, "dense", values.shape, int(values.size), str(values.dtype))
    if type(values).__module__.startswith("dask."):
        msg = (
            "the AnnData's matrix holds a dask array; give the path of the store it is read from (which is read in pieces "
            "too), or the AnnData's .to_memory()"
        )
        raise CohortError(msg)
    found = "nothing" if values is None else type(values).__name__
    msg = f"the AnnData's matrix holds {found}; expected a sparse matrix or an array (or name a layer)"
    raise CohortError(msg)


def _let_another_read(path: str, url: str) -> None:
    """Have another process read a file's attributes first: in some damaged ones HDF5 loops or crashes, which none survives.

    Raises
    ------
    CohortError
        The other process did not come to an end. What it found beside that is found again, and said better.
    """
    command = [sys.executable, "-P", "-c", WALK, path]
    quiet: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
    try:
        crashed = subprocess.run(command, **quiet, timeout=HDF5_SECONDS, check=False).returncode < 0
    except subprocess.TimeoutExpired:
        how = f"after {HDF5_SECONDS:.0f} s HDF5 still reads its attributes"
    else:
        if not crashed:
            return
        how = "HDF5 crashes when it reads its attributes"
    msg = f"{url} cannot be opened as an h5ad file: it is damaged ({how})"
    raise CohortError(msg)


def _open_stored(address: str | os.PathLike[str], layer: str | None) -> Source:
    storage = open_storage(address)
    container = _container(storage)
    url = storage.url
    if container == "h5ad" and storage.is_local:
        _let_another_read(storage.root, url)
    try:
        root = open_root(url, container)
        missing = [name for name in ("obs", "var") if name not in root]
        holds = listing(root) if missing else ""
    except StoreError:
        raise
    except PermissionError as error:
        msg = f"{url} may not be read ({_one_line(error)})"
        raise CohortError(msg) from error
    except Exception as error:
        what = "an h5ad file" if container == "h5ad" else "a zarr store"
        msg = f"{url} cannot be opened as {what}: it is truncated, or something else ({_one_line(error)})"
        raise CohortError(msg) from error
    if missing:
        msg = f"{url} is not an AnnData store: it holds no {' and no '.join(missing)}; it holds {holds}"
        raise CohortError(msg)
    try:
        matrix = _stored_matrix(root, url, container, layer)
    except (CohortError, StoreError):
        raise
    except Exception as error:
        msg = f"{url}: the matrix cannot be read; the store is truncated or damaged ({_one_line(error)})"
        raise CohortError(msg) from error
    try:
        obs, var = read_elem(root["obs"]), read_elem(root["var"])
    except StoreError:
        raise
    except Exception as error:
        msg = f"{url}: obs or var cannot be read; the store is truncated or damaged ({_one_line(error)})"
        raise CohortError(msg) from error
    for name, table in (("obs", obs), ("var", var)):
        if not isinstance(table, pd.DataFrame):
            msg = f"{url}: {name} is no table that anndata reads ({type(table).__name__}); write it by anndata >= 0.8"
            raise CohortError(msg)
    if (len(obs), len(var)) != matrix.shape:
        msg = f"{url}: {matrix.name} is {matrix.shape}, but obs and var have {len(obs)} and {len(var)} rows"
        raise CohortError(msg)
    return Source(url, obs, var, matrix)


def _container(storage: Storage) -> Literal["h5ad", "zarr"]:
    url = storage.url.split("?")[0]
    if not storage.is_local and url.endswith((".h5ad", ".h5", ".zarr")):
        return "zarr" if url.endswith(".zarr") else "h5ad"
    if not storage.exists():
        msg = f"{storage.url} does not exist"
        raise CohortError(msg)
    return "h5ad" if storage.is_file() else "zarr"


def _stored_matrix(root: Any, url: str, container: Literal["h5ad", "zarr"], layer: str | None) -> StoredMatrix:
    if layer is not None and layer not in root.get("layers", {}):
        raise CohortError(_no_layer(url, layer, root.get("layers", {})))
    name = "X" if layer is None else f"layers/{layer}"
    if name not in root:
        layers = listing(root.get("layers", {})) or "none"
        msg = f"{url} holds no X; name a layer to read instead (layers there: {layers})"
        raise CohortError(msg)
    element: Any = root[name]
    kind = str(element.attrs.get("encoding-type", element.attrs.get("h5sparse_format", "array")))
    if not _is_group(element):
        _check_numbers(element.dtype, f"{url}: {name}")
        return StoredMatrix(
            url, container, name, "dense", element.shape, int(np.prod(element.shape)), str(element.dtype)
        )
    if kind[:3] not in ("csr", "csc"):
        msg = f"{url}: {name} is stored as {kind!r}; expected csr_matrix, csc_matrix or array"
        raise CohortError(msg)
    shape = tuple(int(n) for n in element.attrs.get("shape", element.attrs.get("h5sparse_shape", (0, 0))))
    major, minor = shape if kind.startswith("csr") else shape[::-1]
    _check_sparse(element, url, name, major, minor)
    data = element["data"]
    stored: Kind = "csr" if kind.startswith("csr") else "csc"
    return StoredMatrix(url, container, name, stored, (shape[0], shape[1]), int(data.shape[0]), str(data.dtype))


def _is_group(element: Any) -> bool:
    return isinstance(element, h5py.Group | zarr.Group)


def _check_numbers(dtype: Any, where: str) -> None:
    """Refuse what is not whole or real numbers: an imaginary part, say, would be lost without a word."""
    if np.dtype(dtype).kind not in "iuf":
        msg = f"{where} holds {np.dtype(dtype).name} values; expected counts or log-normalised expression"
        raise CohortError(msg)


def _check_sparse(element: Any, url: str, name: str, major: int, minor: int) -> None:
    """Refuse a sparse matrix whose parts do not fit together, or a zarr one with chunks missing."""
    lacking = [part for part in ("data", "indices", "indptr") if part not in element]
    if lacking:
        msg = f"{url}: {name} is truncated: it has no {', '.join(lacking)}"
        raise CohortError(msg)
    _check_numbers(element["data"].dtype, f"{url}: {name}")
    if not _fits(element, major, minor):
        msg = f"{url}: {name} is truncated or damaged: indptr does not fit data and indices"
        raise CohortError(msg)
    for part in ("data", "indices"):
        values = element[part]
        if isinstance(values, zarr.Array) and (lost := _missing_chunks(url, values)):
            open_storage(url).list(values.path)  # raises where they are not missing but may not be listed
            msg = f"{url}: {name} is truncated: {lost} of {values.nchunks} chunks of {name}/{part} are missing"
            raise CohortError(msg)


def _fits(element: Any, major: int, minor: int) -> bool:
    """Return whether the parts of a sparse matrix fit together, as far as indptr and shapes tell."""
    shapes = {part: tuple(element[part].shape) for part in ("data", "indices", "indptr")}
    if shapes["indptr"] != (major + 1,) or any(element[part].dtype.kind not in "iu" for part in ("indices", "indptr")):
        return False
    indptr = np.asarray(element["indptr"][:]).astype(np.int64)
    lengths = np.diff(indptr)
    if not indptr.size or indptr[0] != 0 or not ((lengths >= 0) & (lengths <= minor)).all():
        return False
    return shapes["data"] == shapes["indices"] == (int(indptr[-1]),)


def _missing_chunks(url: str, array: Any) -> int:
    """Return how many chunks a zarr array lacks; a web server lists none, so it is asked for each file, side by side."""
    storage = Storage(f"{url}/{array.path}")
    if storage.is_read_only:
        files = [array.metadata.encode_chunk_key(position) for position in touched_shards(array, ...)]
        with ThreadPoolExecutor(CONCURRENT_SHARDS) as pool:
            return sum(not there for there in pool.map(storage.is_file, files))
    try:
        return max(0, int(array.nchunks) - int(array.nchunks_initialized))
    except Exception:  # noqa: BLE001 - a store that may not be listed cannot be checked this way
        return 0


def _check_names(source: Source) -> None:
    for what, names in (("cell", source.cell_names), ("gene", source.gene_names)):
        repeated = names[names.duplicated()].unique()
        if len(repeated):
            table = "obs" if what == "cell" else "var"
            msg = f"{what} names are used more than once: {listing(repeated)}; adata.{table}_names_make_unique() helps"
            raise CohortError(msg)
        odd = [] if all(map(str.isascii, names)) else [name for name in names if not is_unicode(name)]
        if odd:
            msg = f"{what} names {listing(odd)} are not Unicode text; rename them"
            raise CohortError(msg)
    for table, columns in (("obs", source.obs.columns), ("var", source.var.columns)):
        ours = [name for name in columns if str(name).startswith(keys.OBS_PREFIX)]
        if ours:
            msg = (
                f"{table} columns {listing(ours)} start with {keys.OBS_PREFIX!r}, which names our results; rename them"
            )
            raise CohortError(msg)
        if twice := list(columns[columns.duplicated()].unique()):
            msg = f"{table} has more than one column {listing(twice)}; rename them"
            raise CohortError(msg)
        if unfit := [name for name in columns if not _is_folder_name(str(name))]:
            msg = (
                f"{table} columns {listing(unfit)} cannot be stored: a name is at most {LONGEST_COLUMN} bytes, without "
                "slashes or control characters; rename them"
            )
            raise CohortError(msg)
    if not source.n_cells or not source.n_genes:
        msg = f"{source.name} is empty: {source.n_cells} cells x {source.n_genes} genes"
        raise CohortError(msg)


def _is_folder_name(name: str) -> bool:
    """Return whether a column's name can name a folder, on a disk and on an object store alike."""
    if name in ("", ".", "..", "zarr.json") or not is_unicode(name) or len(name.encode()) > LONGEST_COLUMN:
        return False
    return not (has_controls(name) or "/" in name or "\\" in name)


def _no_layer(where: str, layer: str, present: Iterable[str]) -> str:
    names = list(present)
    return f"{where} has no layer {quoted(layer)}; there are {listing(names) or 'none'}.{suggest(layer, names)}"


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:160]}"


def _digest(values: Iterable[object]) -> str:
    return hashlib.sha256("\0".join(map(str, values)).encode()).hexdigest()
