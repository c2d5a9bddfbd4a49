"""Read parts of a results store: rows and columns of dense arrays, rows of sparse expression, whole tables.

Only the chunks of these parts are read, from disk or object storage. A chunk that is missing or fails its checksum
raises an error that names it.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

import anndata
import numpy as np
import pandas as pd
import zarr
from scipy import sparse
from zarr.codecs import Crc32cCodec

from ndreamer_dist import keys
from ndreamer_dist.effects.tables import ROOT, memory_store
from ndreamer_dist.errors import StoreError
from ndreamer_dist.storage.arrays import open_array, sensible, touched_shards
from ndreamer_dist.storage.files import ConsolidatedStorage, Storage
from ndreamer_dist.storage.shards import Place, Position, read_chunks, read_files

MOST_OF_TABLE = 2**22
"""Largest number of chunks of a table, far above real ones; damaged metadata may claim more."""


def read_dense(
    storage: Storage, name: str, rows: np.ndarray, columns: np.ndarray, *, out: np.ndarray | None = None
) -> np.ndarray:
    """Read rows and columns of a two-dimensional array: (rows, columns), in the order of the arguments.

    Every chunk that holds some of them is read once.

    Parameters
    ----------
    out
        Array (rows, columns) for the values, for example a `numpy.memmap`; by default a new one.

    Raises
    ------
    StoreError
        A chunk is missing or damaged, or the array is too small for the rows and columns.
    """
    array = open_array(storage, name)
    _check_holds(array, f"{storage.url}: array '{name}'", rows, columns)
    values = np.empty((len(rows), len(columns)), dtype=array.dtype) if out is None else out
    down, across = (_wanted(places, size) for places, size in zip((rows, columns), array.chunks, strict=True))

    def place(position: Position, chunk: np.ndarray) -> None:
        (there, inner), (beside, within) = down[position[0]], across[position[1]]
        values[_crossed(there, beside)] = chunk[_crossed(inner, within)]

    read_chunks(array, Place(storage.url, name), itertools.product(down, across), place)
    return values


def _check_holds(array: zarr.Array[Any], where: str, *places: np.ndarray) -> None:
    """Raise `StoreError` if an array is too small for the wanted positions: then it does not fit the tables."""
    ends = tuple(int(wanted.max(initial=-1)) + 1 for wanted in places)
    if array.ndim != len(ends) or any(end > size for end, size in zip(ends, array.shape, strict=True)):
        msg = f"{where} is of shape {array.shape}, too small for the cells and genes of the store; it is damaged"
        raise StoreError(msg)


Places = slice | np.ndarray


def _wanted(places: np.ndarray, size: int) -> dict[int, tuple[Places, Places]]:
    """Group positions on an axis by chunk: for each chunk, positions in the answer and positions in the chunk."""
    order = np.argsort(places, kind="stable")
    numbers, starts = np.unique(places[order] // size, return_index=True)
    parts = np.split(order, starts)[1:]
    return {
        number: (_sliced(part), _sliced(places[part] - number * size))
        for number, part in zip(numbers.tolist(), parts, strict=True)
    }


def _sliced(places: np.ndarray) -> Places:
    """Return consecutive positions as a slice, which is faster to copy with."""
    if len(places) and (np.diff(places) == 1).all():
        return slice(int(places[0]), int(places[-1]) + 1)
    return places


def _crossed(rows: Places, columns: Places) -> tuple[Any, Any]:
    """Return an index of all pairs of rows and columns."""
    if isinstance(rows, np.ndarray) and isinstance(columns, np.ndarray):
        return rows[:, None], columns[None, :]
    return rows, columns


def read_sparse(storage: Storage, rows: np.ndarray, pointers: np.ndarray, genes: int) -> sparse.csr_matrix:
    """Read rows of the expression `X`: (rows, genes) CSR float32, in the order of the argument.

    Parameters
    ----------
    pointers
        `indptr` of `X`, (all rows + 1,).
    """
    wanted = np.unique(rows)
    starts, stops = pointers[wanted], pointers[wanted + 1]
    data, indices = (_read_stretches(storage, f"X/{part}", starts, stops) for part in (keys.DATA, keys.INDICES))
    if indices.size and not 0 <= indices.min() <= indices.max() < genes:
        msg = f"{storage.url}: array 'X/{keys.INDICES}' names genes that are not there; it is damaged"
        raise StoreError(msg)
    found = sparse.csr_matrix((data, indices, _ends(stops - starts)), shape=(len(wanted), genes))
    return found if np.array_equal(wanted, rows) else found[np.searchsorted(wanted, rows)]


def _read_stretches(storage: Storage, name: str, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
    """Read ascending stretches `starts[i]:stops[i]` of a one-dimensional array and concatenate them."""
    array = open_array(storage, name)
    _check_holds(array, f"{storage.url}: array '{name}'", stops - 1)
    (size,), offsets = array.chunks, _ends(stops - starts)
    values = np.empty(int(offsets[-1]), dtype=array.dtype)

    def place(position: Position, chunk: np.ndarray) -> None:
        low, high = position[0] * size, (position[0] + 1) * size
        here = slice(np.searchsorted(stops, low, side="right"), np.searchsorted(starts, high))
        first, last = np.maximum(starts[here], low), np.minimum(stops[here], high)
        ends = _ends(last - first)
        begin = int(offsets[here.start] + first[0] - starts[here.start])
        inner = np.repeat(first - low - ends[:-1], last - first) + np.arange(ends[-1])
        values[begin : begin + len(inner)] = chunk[inner]

    read_chunks(array, Place(storage.url, name), _held(starts, stops, size), place)
    return values


def _ends(lengths: np.ndarray) -> np.ndarray:
    """Return the offsets of concatenated stretches: the start of each, and the end of the last."""
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def _held(starts: np.ndarray, stops: np.ndarray, size: int) -> list[Position]:
    """Return the chunks that hold a part of a stretch."""
    filled = stops > starts
    first, last = starts[filled] // size, (stops[filled] - 1) // size
    longest = int((last - first).max(initial=0))
    numbers = [np.minimum(first + step, last) for step in range(longest + 1)]
    return [(number,) for number in np.unique(np.concatenate(numbers)).tolist()]


def read_cells(storage: ConsolidatedStorage) -> tuple[pd.DataFrame, bool]:
    """Read `obs`; on a local disk also columns that another program has added to it.

    Such a program may not have updated the consolidated metadata of the root. The metadata files of the table itself
    are then used.

    Returns
    -------
    The table, and whether another program changed it.
    """
    if storage.is_local and _written_since(storage):
        with suppress(StoreError):  # if the table's own metadata is damaged, the root's is used
            return read_element(storage, "obs", _own_nodes(storage, "obs")), True
    return read_element(storage, "obs"), False


def _written_since(storage: ConsolidatedStorage) -> bool:
    """Return whether `obs` has other columns than the root's metadata says, or an index of another program."""
    files = Storage(storage.url)

    def columns_and_index(nodes: Callable[[str], Mapping[str, Any]]) -> tuple[Any, Any]:
        return nodes("obs")["attributes"]["column-order"], nodes("obs/_index").get("codecs")

    try:
        return columns_and_index(files.metadata) != columns_and_index(storage.nodes.__getitem__)
    except (OSError, StoreError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False


def _own_nodes(storage: Storage, name: str) -> dict[str, dict[str, Any]]:
    """Read the metadata files of the arrays and groups of an element; raise `StoreError` if one is damaged."""
    files = storage.read_all([file for file in storage.list(name) if file.endswith(f"/{ROOT}")])
    try:
        return {file.removesuffix(f"/{ROOT}"): dict(json.loads(data)) for file, data in files.items()}
    except (ValueError, TypeError, RecursionError) as error:
        msg = f"{storage.url}: the metadata of '{name}' is damaged ({error})"
        raise StoreError(msg) from error


def read_element(storage: Storage, name: str, nodes: Mapping[str, Mapping[str, Any]] | None = None) -> Any:
    """Read `obs`, `var`, `uns` or a part of them with anndata, after a check that all chunks exist.

    Parameters
    ----------
    nodes
        Metadata of the arrays and groups by path; by default the consolidated metadata of the root.

    Raises
    ------
    StoreError
        A chunk is missing or fails its checksum; the message names array and chunk.
    """
    files = _metadata(storage, name, nodes)
    chunks = _chunks_below(storage, name, files)
    for file, data in zip(chunks, read_files(storage.store(read_only=True), storage.url, list(chunks)), strict=True):
        if data is not None:
            files[file] = data
        elif (chunk := chunks[file]).ours:  # other programs do not store chunks of fill values
            how = f", chunk {chunk.position} is missing"
            raise Place(storage.url, chunk.array).damaged(how, file.removeprefix(f"{chunk.array}/"))
    root = zarr.open_group(memory_store(files), mode="r", zarr_format=3)
    try:
        return anndata.io.read_elem(root[name])
    except Exception as error:
        raise _named_damage(storage, name, root, error) from error


class _Chunk(NamedTuple):
    """A chunk of an array, and whether this package wrote the array, with a checksum in every chunk."""

    array: str
    position: Position
    ours: bool


def _chunks_below(storage: Storage, name: str, files: dict[str, bytes]) -> dict[str, _Chunk]:
    """Return all chunks of an element by file; raise `StoreError` if the metadata, which may be damaged, is absurd."""
    try:
        root = zarr.open_group(memory_store(files), mode="r", zarr_format=3)
        arrays = [sensible(member) for _, member in root.members(max_depth=None) if isinstance(member, zarr.Array)]
    except Exception as error:
        msg = f"{storage.url}: the metadata of '{name}' is damaged ({type(error).__name__}: {error})"
        raise StoreError(msg) from error
    if (claimed := sum(array.nchunks for array in arrays)) > MOST_OF_TABLE:
        msg = f"{storage.url}: '{name}' claims {claimed} chunks; it is damaged"
        raise StoreError(msg)
    return {
        f"{array.path}/{array.metadata.encode_chunk_key(position)}": _Chunk(array.path, position, _is_ours(array))
        for array in arrays
        for position in touched_shards(array, ...)
    }


def _is_ours(array: zarr.Array) -> bool:
    return any(isinstance(codec, Crc32cCodec) for codec in array.compressors)


def _metadata(storage: Storage, name: str, nodes: Mapping[str, Mapping[str, Any]] | None) -> dict[str, bytes]:
    """Return the metadata of an element, of its parents and of all below it as zarr.json files, by path."""
    if nodes is None:
        nodes = (storage if isinstance(storage, ConsolidatedStorage) else ConsolidatedStorage(storage.url)).nodes
    found = {
        path: dict(node)
        for path, node in nodes.items()
        if path == name or path.startswith(f"{name}/") or name.startswith(f"{path}/")
    }
    if name not in found:
        msg = f"{storage.url} has no '{name}'; it is not a results.zarr"
        raise StoreError(msg)
    for node in found.values():
        node.pop("consolidated_metadata", None)  # that of an inner group is empty and would hide its members
    plain = {"zarr_format": 3, "node_type": "group", "attributes": {}}
    return {ROOT: json.dumps(plain).encode()} | {
        f"{path}/{ROOT}": json.dumps(node).encode() for path, node in found.items()
    }


def _named_damage(storage: Storage, name: str, root: zarr.Group, error: Exception) -> StoreError:
    """Return an error that names the damaged chunk of an element, found by reading its chunks one by one."""
    for _, member in root.members(max_depth=None):
        if isinstance(member, zarr.Array):
            for position in touched_shards(member, ...):
                part = tuple(slice(p * u, (p + 1) * u) for p, u in zip(position, member.chunks, strict=True))
                try:
                    member[part]
                except Exception as cause:  # noqa: BLE001 - any error of a codec means damage
                    file = member.metadata.encode_chunk_key(position)
                    return Place(storage.url, member.path).damaged(f", chunk {position} is damaged ({cause})", file)
    return StoreError(f"{storage.url}: '{name}' cannot be read ({type(error).__name__}: {error})")
