"""Find matrices in h5ad files and zarr stores, check their shapes, and read them by ranges of rows.

Input: a root group. Output: a `StoredMatrix`; each process opens the store on its own. Only the elements that a run
needs are opened, so damage or an unknown encoding in other elements of the store does not matter.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache
from typing import Any, Literal

import h5py
import numpy as np
import zarr
from scipy import sparse

from ndreamer_dist.cohort.matrix import Kind, check_numbers, widened
from ndreamer_dist.errors import CohortError, NDreamerError, listing, quoted, suggest
from ndreamer_dist.storage.arrays import touched_shards
from ndreamer_dist.storage.files import Storage, open_storage
from ndreamer_dist.storage.hdf5 import missing_filter, open_file, use_plugins
from ndreamer_dist.storage.shards import CONCURRENT_SHARDS

Container = Literal["h5ad", "zarr"]
COLUMN_ENTRIES = 2**23
"""Stored values of a column-compressed matrix (CSC) that are read at once."""
MOST_REPEATS = 8
"""Longest sound row, in multiples of the number of genes; a longer one means a damaged `indptr`."""
REMOTE_BLOCK, REMOTE_BLOCKS = 2**22, 32
"""Bytes of a block of a remote h5ad file, and blocks that a process caches, since HDF5 returns to earlier places."""
MATRIX = "X"
NULL = "null"
"""Encoding of an element that is there and holds nothing."""
RAW = "raw"
RAW_PLACES = (("raw/X", "raw/var"), ("raw.X", "raw.var"))
"""Paths of the matrix and the gene table of `AnnData.raw`: now, and before anndata 0.7."""
RAW_NAMES = (RAW, "raw/X", "raw.X")
"""Values of the setting `layer` that mean `AnnData.raw`."""


@dataclass(frozen=True)
class StoredMatrix:
    """A matrix in an h5ad file or a zarr store. Each process opens the store on its own.

    Attributes
    ----------
    name
        Path in the store: `X`, `raw/X` or `layers/...`, behind `mod/rna/` in a MuData.
    nnz
        Number of stored values; of a dense matrix, all values.
    factor
        Factor of every value; it turns logarithms to another base into natural ones, else it is 1.
    """

    url: str
    container: Container
    name: str
    kind: Kind
    shape: tuple[int, int]
    nnz: int
    dtype: str
    factor: float = 1.0

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}  # without the cached open file

    @property
    def folder(self) -> str:
        """Path of the AnnData in the store, with a slash: `mod/rna/` in a MuData, else empty."""
        return "/".join(self.name.split("/")[:2]) + "/" if self.name.startswith("mod/") else ""

    @cached_property
    def _element(self) -> Any:
        return open_root(self.url, self.container)[self.name]

    def raw_rows(self, start: int, stop: int) -> Any:
        """See `Matrix.raw_rows`."""
        with refusing_damage(f"{self.url}: rows {start} to {stop} of {self.name}"):
            return self._read_rows(start, min(stop, self.shape[0]))

    def _read_rows(self, start: int, stop: int) -> Any:
        if self.kind == "dense":
            return np.asarray(self._element[start:stop])
        indptr = np.asarray(self._element["indptr"][start : stop + 1]).astype(np.int64)
        first, last = (int(indptr[0]), int(indptr[-1])) if indptr.size else (0, 0)
        indices = np.asarray(self._element["indices"][first:last])
        self._check_inside(indices, self.shape[1], f"rows {start} to {stop} name genes")
        data = widened(np.asarray(self._element["data"][first:last]))
        return sparse.csr_matrix((data, indices, indptr - first), shape=(stop - start, self.shape[1]))

    def _check_inside(self, indices: np.ndarray, limit: int, what: str) -> None:
        if indices.size and not 0 <= int(indices.min()) <= int(indices.max()) < limit:
            msg = f"{self.url}: {self.name} is damaged: {what} that are not there"
            raise CohortError(msg)

    def column_ranges(self, entries: int = COLUMN_ENTRIES) -> list[tuple[int, int]]:
        """Cut the columns of a column-compressed matrix into ranges of about `entries` stored values each."""
        indptr = np.asarray(self._element["indptr"][:]).astype(np.int64)
        cuts = np.searchsorted(indptr, np.arange(entries, self.nnz, entries), side="left")
        edges = np.unique(np.concatenate([[0], cuts, [self.shape[1]]]))
        return [(int(a), int(b)) for a, b in itertools.pairwise(edges)]

    def read_columns(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return row, column and value of each stored value of the columns `start:stop`, in order of columns."""
        with refusing_damage(f"{self.url}: columns {start} to {stop} of {self.name}"):
            indptr = np.asarray(self._element["indptr"][start : stop + 1]).astype(np.int64)
            part = slice(int(indptr[0]), int(indptr[-1]))
            rows = np.asarray(self._element["indices"][part])
            self._check_inside(rows, self.shape[0], f"columns {start} to {stop} name cells")
            columns = np.repeat(np.arange(start, stop, dtype=np.int32), np.diff(indptr))
            return rows, columns, np.asarray(self._element["data"][part]).astype(np.float32, copy=False)


@contextmanager
def refusing_damage(what: str) -> Iterator[None]:
    """Turn any error in the `with` block into a `CohortError` that says that `what` cannot be read."""
    try:
        yield
    except NDreamerError:
        raise
    except Exception as error:
        msg = f"{what} cannot be read; the store is truncated or damaged ({one_line(error)})"
        raise CohortError(msg) from error


def open_root(url: str, container: str) -> Any:
    """Open the root group of a stored AnnData read-only; a remote h5ad file is read by ranges of bytes."""
    storage = Storage(url)
    if container == "zarr":
        return _open_zarr(storage)
    if storage.is_local:
        return open_file(storage.root, url)
    return _remote_h5ad(url, storage.version())


def _open_zarr(storage: Storage) -> zarr.Group:
    """Open a zarr group, without its consolidated metadata if that describes an array this zarr version cannot read.

    Usually such an array is in `uns` (`rank_genes_groups` is a structured array), which a run does not read.
    """
    try:
        return zarr.open_group(storage.store(read_only=True), mode="r")
    except (ValueError, TypeError, KeyError, NotImplementedError):
        return zarr.open_group(storage.store(read_only=True), mode="r", use_consolidated=False)


@lru_cache(maxsize=1)
def _remote_h5ad(url: str, version: str) -> h5py.File:  # noqa: ARG001 - part of the cache key: reopens a changed file
    """Open a remote h5ad file; each process keeps its last one open, with the cached blocks, for the next task."""
    use_plugins()
    return h5py.File(Storage(url).open_file(REMOTE_BLOCK, REMOTE_BLOCKS), "r")


def holds_x(root: Any) -> bool:
    """Return whether a store has an `X`, even a damaged one; an element of the encoding `null` stands for none."""
    if MATRIX not in root:
        return False
    with suppress(KeyError, RuntimeError, OSError):  # reading a damaged one is refused with more to say
        return bool(text_of(root[MATRIX].attrs.get("encoding-type", "")) != NULL)
    return True


def layer_names(root: Any) -> list[str]:
    """Return the names of the layers of a store."""
    return list(root["layers"]) if "layers" in root and is_group(root["layers"]) else []


def place_of(root: Any, url: str, layer: str | None) -> str:
    """Return the path of the matrix to read: `X`, a layer, or that of `raw`; `CohortError` if it does not exist."""
    layers = layer_names(root)
    if layer is None:
        if holds_x(root):
            return MATRIX
        instead = " --layer raw reads the counts in .raw;" if raw_place(root) else ""
        msg = f"{url} holds no X;{instead} name a layer to read instead (layers there: {listing(layers) or 'none'})"
        raise CohortError(msg)
    if layer in layers:
        return f"layers/{layer}"
    if layer in RAW_NAMES and (place := raw_place(root)) is not None:
        return place[0]
    if layer == MATRIX and holds_x(root):
        return MATRIX
    raise CohortError(no_layer(url, layer, layers, raw=raw_place(root) is not None))


def raw_place(root: Any) -> tuple[str, str] | None:
    """Return the paths of the matrix and the gene table of `AnnData.raw`, or None if the store has no raw."""
    for matrix, table in RAW_PLACES:
        if "/" in matrix and not ("raw" in root and is_group(root["raw"])):
            continue
        if matrix in root and table in root:
            return matrix, table
    return None


def no_layer(where: str, layer: str, present: Iterable[str], *, raw: bool) -> str:
    """Return the error message for a missing layer."""
    names = list(present)
    more = "" if raw else "; there is no .raw either" if layer in RAW_NAMES else ""
    return f"{where} has no layer {quoted(layer)}; there are {listing(names) or 'none'}{more}.{suggest(layer, names)}"


def stored_matrix(root: Any, url: str, container: Container, name: str) -> StoredMatrix:
    """Return the matrix at path `name` of a root group; `CohortError` if its dtype, encoding or shapes are wrong."""
    element: Any = root[name]
    refuse_missing_filter(element, f"{url}: {name}")
    kind = text_of(element.attrs.get("encoding-type", element.attrs.get("h5sparse_format", "array")))
    if not is_group(element):
        check_numbers(element.dtype, f"{url}: {name}")
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


def text_of(value: Any) -> str:
    """Return an attribute as text; R and Julia write fixed-length strings, which h5py returns as bytes."""
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def refuse_missing_filter(element: Any, where: str) -> None:
    """Refuse an HDF5 element that is compressed with a filter that is not installed; elements of zarr pass."""
    name = missing_filter(element) if isinstance(element, h5py.Dataset | h5py.Group) else None
    if name is not None:
        msg = f"{where} is compressed by {quoted(name)}, which HDF5 does not have by itself; pip install hdf5plugin"
        raise CohortError(msg)


def is_group(element: Any) -> bool:
    """Return whether an element of a store is a group."""
    return isinstance(element, h5py.Group | zarr.Group)


def _check_sparse(element: Any, url: str, name: str, major: int, minor: int) -> None:
    """Refuse a sparse matrix with a missing array, with arrays that do not fit, or (zarr) with missing chunks."""
    lacking = [part for part in ("data", "indices", "indptr") if part not in element]
    if lacking:
        msg = f"{url}: {name} is truncated: it has no {', '.join(lacking)}"
        raise CohortError(msg)
    check_numbers(element["data"].dtype, f"{url}: {name}")
    if not _fits(element, major, minor):
        msg = f"{url}: {name} is truncated or damaged: indptr does not fit data and indices"
        raise CohortError(msg)
    for part in ("data", "indices"):
        values = element[part]
        if isinstance(values, zarr.Array) and (lost := _missing_chunks(url, values)):
            open_storage(url).list(values.path)  # raises if the chunks only look missing because listing is forbidden
            msg = f"{url}: {name} is truncated: {lost} of {values.nchunks} chunks of {name}/{part} are missing"
            raise CohortError(msg)


def _fits(element: Any, major: int, minor: int) -> bool:
    """Return whether `indptr` and the shapes of a sparse matrix agree; `indices` are checked when they are read."""
    shapes = {part: tuple(element[part].shape) for part in ("data", "indices", "indptr")}
    if shapes["indptr"] != (major + 1,) or any(element[part].dtype.kind not in "iu" for part in ("indices", "indptr")):
        return False
    indptr = np.asarray(element["indptr"][:]).astype(np.int64)
    lengths = np.diff(indptr)
    if not indptr.size or indptr[0] != 0 or not ((lengths >= 0) & (lengths <= MOST_REPEATS * minor)).all():
        return False
    return shapes["data"] == shapes["indices"] == (int(indptr[-1]),)


def _missing_chunks(url: str, array: Any) -> int:
    """Count the missing chunks of a zarr array; a web server cannot list files, so it is asked for each chunk."""
    storage = Storage(f"{url}/{array.path}")
    if storage.is_read_only:
        files = [array.metadata.encode_chunk_key(position) for position in touched_shards(array, ...)]
        with ThreadPoolExecutor(CONCURRENT_SHARDS) as pool:
            return sum(not there for there in pool.map(storage.is_file, files))
    try:
        return max(0, int(array.nchunks) - int(array.nchunks_initialized))
    except Exception:  # noqa: BLE001 - a store that may not be listed cannot be checked this way
        return 0


def one_line(error: BaseException) -> str:
    """Return the class and the first 160 characters of an error as one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:160]}"
