"""Reading parts of a store: rows and columns of dense layers, rows of sparse expression, whole tables.

Only the chunks that hold the answer are read, wherever the store lives. A chunk that is missing or fails its checksum
is an error that names it, never a wrong number.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import anndata
import numpy as np
import zarr
from scipy import sparse

from ndreamer_dist import keys
from ndreamer_dist.errors import StoreError
from ndreamer_dist.results.store import ROOT, memory_store
from ndreamer_dist.storage import Storage, open_array, read_array, touched_shards

READ_BYTES = 128 * 2**20
"""Dense values decoded by one read; more rows are read in several."""
READ_ENTRIES = 2**24
"""Stored values of the sparse expression decoded by one read."""
GAP_ROWS = 256
"""Unwanted rows of the sparse expression that are read along rather than starting another read."""
CONCURRENT_READS = 16
"""Files of a table that are fetched at the same time."""


def read_dense(storage: Storage, name: str, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Read rows and columns of a two-dimensional array, in the order given, from the chunks that hold them.

    Neighbouring chunks are read together, up to a bounded size.
    """
    array = open_array(storage, name)
    height, width = array.chunks
    values = np.empty((len(rows), len(columns)), dtype=array.dtype)
    order = np.argsort(rows, kind="stable")
    sorted_rows = rows[order]
    for left, right in _runs(columns // width):
        span = slice(left * width, min(right * width, array.shape[1]))
        inside = np.flatnonzero((columns >= span.start) & (columns < span.stop))
        tall = max(1, READ_BYTES // (height * (span.stop - span.start) * array.dtype.itemsize))
        for top, bottom in _runs(rows // height, longest=tall):
            part = slice(top * height, min(bottom * height, array.shape[0]))
            low, high = np.searchsorted(sorted_rows, [part.start, part.stop])
            block = read_array(storage, name, (part, span))
            here = order[low:high]
            values[np.ix_(here, inside)] = block[np.ix_(rows[here] - part.start, columns[inside] - span.start)]
    return values


def read_sparse(storage: Storage, rows: np.ndarray, pointers: np.ndarray, genes: int) -> sparse.csr_matrix:
    """Read rows of the expression, in the order given: (rows, genes) CSR float32.

    Parameters
    ----------
    pointers
        Its `indptr`, (all rows + 1,).
    """
    wanted = np.unique(rows)
    parts = []
    for first, last in _stretches(wanted, pointers):
        low, high = int(pointers[first]), int(pointers[last])
        data, indices = (
            read_array(storage, f"X/{part}", slice(low, high)) if high > low else np.zeros(0, dtype)
            for part, dtype in ((keys.DATA, np.float32), (keys.INDICES, np.int32))
        )
        stretch = sparse.csr_matrix((data, indices, pointers[first : last + 1] - low), shape=(last - first, genes))
        parts.append(stretch[wanted[(wanted >= first) & (wanted < last)] - first])
    return sparse.vstack(parts, format="csr")[np.searchsorted(wanted, rows)]


def read_element(storage: Storage, name: str) -> Any:
    """Read `obs`, `var` or `uns` by anndata, from files that were checked to be all there.

    Raises
    ------
    StoreError
        A chunk is missing or fails its checksum; the message names array and chunk.
    """
    files = _metadata(storage, name)
    root = zarr.open_group(memory_store(files), mode="r", zarr_format=3)
    arrays = [member for _, member in root.members(max_depth=None) if isinstance(member, zarr.Array)]
    chunks = [
        (array.path, position, _chunk_file(array, position))
        for array in arrays
        for position in touched_shards(array, ...)
    ]
    with ThreadPoolExecutor(CONCURRENT_READS) as pool:
        files |= pool.map(lambda chunk: _read_chunk(storage, *chunk), chunks)
    root = zarr.open_group(memory_store(files), mode="r", zarr_format=3)
    try:
        return anndata.io.read_elem(root[name])
    except Exception as error:
        raise _named_damage(storage, name, root, error) from error


def _metadata(storage: Storage, name: str) -> dict[str, bytes]:
    """Return the metadata files of an element, which the store's root holds all of."""
    root = json.loads(storage.read(ROOT))
    nodes = root["consolidated_metadata"]["metadata"]
    found = {path: node for path, node in nodes.items() if path == name or path.startswith(f"{name}/")}
    if not found:
        msg = f"{storage.url} has no '{name}'; it is not a results.zarr"
        raise StoreError(msg)
    for node in found.values():
        node.pop("consolidated_metadata", None)  # an inner group's is empty, and would hide what it holds
    plain = {"zarr_format": 3, "node_type": "group", "attributes": {}}
    return {ROOT: json.dumps(plain).encode()} | {
        f"{path}/{ROOT}": json.dumps(node).encode() for path, node in found.items()
    }


def _chunk_file(array: zarr.Array[Any], position: tuple[int, ...]) -> str:
    return f"{array.path}/{array.metadata.encode_chunk_key(position)}"


def _read_chunk(storage: Storage, array: str, position: tuple[int, ...], file: str) -> tuple[str, bytes]:
    try:
        return file, storage.read(file)
    except StoreError:
        msg = f"{storage.url}: array '{array}', chunk {position} is missing; run the same command again to repair it"
        raise StoreError(msg) from None


def _named_damage(storage: Storage, name: str, root: zarr.Group, error: Exception) -> StoreError:
    """Find which chunk of an element is at fault by reading them one by one."""
    for _, member in root.members(max_depth=None):
        if isinstance(member, zarr.Array):
            for position in touched_shards(member, ...):
                part = tuple(slice(p * u, (p + 1) * u) for p, u in zip(position, member.chunks, strict=True))
                try:
                    member[part]
                except Exception as cause:  # noqa: BLE001 - whatever the codec says of this chunk is the finding
                    return StoreError(
                        f"{storage.url}: array '{member.path}', chunk {position} is damaged ({cause}); "
                        "delete it and run the same command again to repair it"
                    )
    return StoreError(f"{storage.url}: '{name}' cannot be read ({type(error).__name__}: {error})")


def _runs(places: np.ndarray, *, longest: int | None = None) -> Iterator[tuple[int, int]]:
    """Give the stretches of consecutive numbers, `first:last`, that the places fill, none longer than `longest`."""
    numbers = np.unique(places)
    for stretch in np.split(numbers, np.flatnonzero(np.diff(numbers) > 1) + 1):
        if len(stretch):
            first, last = int(stretch[0]), int(stretch[-1]) + 1
            step = longest or last - first
            yield from ((start, min(start + step, last)) for start in range(first, last, step))


def _stretches(rows: np.ndarray, pointers: np.ndarray) -> Iterator[tuple[int, int]]:
    """Give stretches of sparse rows to read at once: neighbours joined over small gaps, entries bounded."""
    first = last = int(rows[0])
    for row in rows.tolist():
        if row - last > GAP_ROWS or pointers[row + 1] - pointers[first] > READ_ENTRIES:
            if last > first:
                yield first, last
            first = row
        last = row + 1
    yield first, last
