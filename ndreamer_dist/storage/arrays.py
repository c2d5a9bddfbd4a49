"""Create, read and write zarr arrays.

All arrays of this package are created here, so that every chunk ends in a `crc32c` checksum. They are also read here,
so that a damaged or missing chunk raises an error that names the store, the array and the chunk, and never becomes a
wrong number.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NotRequired, TypedDict, Unpack

import numpy as np
import zarr
from numcodecs import Blosc
from zarr.abc.buffer import Buffer, BufferPrototype
from zarr.abc.store import ByteRequest, Store
from zarr.codecs import BloscCodec, Crc32cCodec
from zarr.storage import MemoryStore, StorePath, WrapperStore

from ndreamer_dist.errors import StoreError
from ndreamer_dist.storage.files import Storage
from ndreamer_dist.storage.retries import ABSENT, reason
from ndreamer_dist.storage.shards import NOT_WRITTEN, Place, Position, chunks_in, chunks_of_shard, crc32c, read_chunks

METADATA_SEAL = "ndreamer_sha256"
"""Attribute that holds the checksum of the metadata; only arrays that no other tool changes have it."""
COMPRESSORS = (BloscCodec(cname="lz4", clevel=5, shuffle="shuffle"), Crc32cCodec())
"""Codecs of this package's arrays. The checksum comes last, so that it covers the stored bytes.

zarr's own codec pipeline reads and writes the arrays: zarrs 0.2.3 misses flipped bits when it decodes a whole shard,
and it never writes empty chunks, whatever the setting.
"""
MOST_CHUNKS = 2**31
"""Largest number of chunks of an array. Damaged metadata may claim far more, and a loop over them would not end."""


class ArrayLayout(TypedDict):
    """Properties of a new array.

    Attributes
    ----------
    chunks, shards
        Shapes of the unit of reading and of the unit of writing. A shard holds whole chunks; without `shards`, every
        chunk is a file of its own.
    fill_value
        0 by default.
    attributes
        zarr attributes, for arrays that other tools read or change. `None` means that only this package uses the array;
        its metadata then carries a checksum.
    """

    shape: Sequence[int]
    dtype: Any
    chunks: Sequence[int]
    shards: NotRequired[Sequence[int] | None]
    fill_value: NotRequired[Any]
    attributes: NotRequired[dict[str, Any] | None]


def create_array(storage: Storage, name: str, **layout: Unpack[ArrayLayout]) -> None:
    """Write the metadata of a new array, which replaces any old array; tasks write its shards later.

    Parameters
    ----------
    storage, name
        The store and the array's path in it. The metadata of parent groups is not written, so that the store cannot be
        opened before the driver writes its root.
    """
    if storage.is_local:  # on object storage a listing costs requests; old chunks are overwritten or never read
        storage.delete(name)
    storage.write_atomic(f"{name}/zarr.json", _metadata(**layout))


def _metadata(**layout: Unpack[ArrayLayout]) -> bytes:
    """Return the `zarr.json` of an array."""
    files: dict[str, Any] = {}
    shards, attributes = layout.get("shards"), layout.get("attributes")
    zarr.create_array(
        MemoryStore(files),
        shape=tuple(layout["shape"]),
        dtype=layout["dtype"],
        chunks=tuple(max(1, c) for c in layout["chunks"]),
        shards=None if shards is None else tuple(max(1, s) for s in shards),
        fill_value=layout.get("fill_value", 0),
        compressors=COMPRESSORS,
        attributes=attributes,
        zarr_format=3,
    )
    if attributes is not None:
        return bytes(files["zarr.json"].to_bytes())
    document = json.loads(files["zarr.json"].to_bytes())
    document["attributes"][METADATA_SEAL] = metadata_digest(document)
    return json.dumps(document, indent=2).encode()


def metadata_digest(metadata: Mapping[str, Any]) -> str:
    """Return the checksum of an array's metadata without the checksum attribute itself."""
    attributes = {name: value for name, value in metadata.get("attributes", {}).items() if name != METADATA_SEAL}
    text = json.dumps({**metadata, "attributes": attributes}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def opened_with(metadata: Mapping[str, Any], where: StorePath) -> zarr.AsyncArray[Any]:
    """Open an array by its metadata; raise `ValueError` if the checksum in the metadata does not fit."""
    if metadata.get("attributes", {}).get(METADATA_SEAL, "") not in ("", metadata_digest(metadata)):
        msg = "the checksum of the metadata does not match"
        raise ValueError(msg)
    document: Any = dict(metadata)
    return zarr.AsyncArray(document, where)


def ensure_array(storage: Storage, name: str, **layout: Any) -> None:
    """Write the metadata of an array unless the same metadata is already stored; keep its chunks.

    A stage that was interrupted, or that lost a shard, can thus continue with the shards that it has.
    """
    wanted = _metadata(**layout)
    path = f"{name}/zarr.json"
    if storage.read_if_there(path) != wanted:
        storage.write_atomic(path, wanted)


class _Unseen(WrapperStore[Store]):
    """A store that hides its chunks: zarr reads a shard before it overwrites it, and an old shard may be damaged."""

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        """See zarr's `Store.get`."""
        return await super().get(key, prototype, byte_range) if key.endswith("zarr.json") else None


def write_part(storage: Storage, name: str, selection: Any, values: np.ndarray[Any, Any]) -> None:
    """Write a selection of whole shards, given as slices; old shards, even damaged ones, are replaced."""
    array = open_array(storage, name, mode="w")
    with _writing(storage, name):
        array[selection] = values


def write_chunk(storage: Storage, name: str, position: Position, chunk: np.ndarray[Any, Any]) -> None:
    """Write one chunk, in its full shape, of an array without shards; several times faster than `write_part`."""
    storage.write_atomic(shard_files(name, *position), *_encoded(np.ascontiguousarray(chunk)))


def write_shard(storage: Storage, name: str, shard: Position, chunks: Iterable[np.ndarray[Any, Any]]) -> None:
    """Write one shard, chunk by chunk; an old shard is replaced.

    Only the encoded chunks are held in memory and values are not copied. For a shard of many chunks this is several
    times faster than `write_part`.

    Parameters
    ----------
    shard
        Position of the shard in the array's grid of shards.
    chunks
        The chunks of the shard in C order of the grid. A chunk at the array's end holds only the part inside the array.
    """
    array = open_array(storage, name, mode="w")
    index = np.full([*chunks_of_shard(array), 2], NOT_WRITTEN, dtype="<u8")
    pieces: list[bytes] = []
    offset = 0
    for position, values in zip(chunks_in(array, shard), chunks, strict=True):
        pieces += _encoded(_padded(values, array))
        length = len(pieces[-2]) + len(pieces[-1])
        index[tuple(p % n for p, n in zip(position, index.shape[:-1], strict=True))] = offset, length
        offset += length
    storage.write_atomic(shard_files(name, *shard), *pieces, index.tobytes(), crc32c(index.tobytes()))


def _padded(values: np.ndarray[Any, Any], array: zarr.Array[Any]) -> np.ndarray[Any, Any]:
    """Return a chunk padded to its full shape with the fill value."""
    missing = [(0, size - length) for size, length in zip(array.chunks, values.shape, strict=True)]
    if not any(after for _, after in missing):
        return np.ascontiguousarray(values, dtype=array.dtype)
    return np.pad(values.astype(array.dtype, copy=False), missing, constant_values=array.fill_value)


def _encoded(chunk: np.ndarray[Any, Any]) -> tuple[bytes, bytes]:
    """Return a chunk as `COMPRESSORS` encodes it: the compressed bytes, and their checksum."""
    body = Blosc(cname="lz4", clevel=5, shuffle=Blosc.SHUFFLE, typesize=chunk.itemsize).encode(chunk)
    return body, crc32c(body)


@contextmanager
def _writing(storage: Storage, name: str) -> Iterator[None]:
    """Convert an `OSError` of the block to a `StoreError` that names the array."""
    try:
        yield
    except OSError as error:
        msg = f"{storage.url}: array '{name}' cannot be written ({reason(error)})"
        raise StoreError(msg) from error


def open_array(storage: Storage, name: str, *, mode: str = "r") -> zarr.Array[Any]:
    """Open an array by its path.

    Parameters
    ----------
    mode
        `r` to read, `r+` to read and write, `w` to write whole shards without reading the old ones.

    Raises
    ------
    StoreError
        The array is missing, or its metadata cannot be read.
    """
    try:
        store = _Unseen(storage.store(name)) if mode == "w" else storage.store(name, read_only=mode == "r")
        cached = storage.node(name) if mode == "r" else None
        metadata = storage.metadata(name) if cached is None else cached
        array = sensible(zarr.Array(opened_with(metadata, StorePath(store))))
        return array if mode == "r" else _writable(array)
    except StoreError:
        raise
    except Exception as error:
        raise unopened(Place(storage.url, name), error) from error


def unopened(where: Place, error: Exception) -> StoreError:
    """Return the error to raise for an array that cannot be opened: a damaged one, or one that cannot be reached."""
    what = f" cannot be opened ({type(error).__name__}: {error})"
    if isinstance(error, OSError) and not isinstance(error, ABSENT):
        return StoreError(f"{where}{what}")
    return where.damaged(what, "zarr.json")


def sensible(array: zarr.Array[Any]) -> zarr.Array[Any]:
    """Return an array; raise `ValueError` if its metadata, which may be damaged, cannot be true."""
    if min((*array.chunks, *(array.shards or ())), default=1) < 1:
        msg = f"its chunks are {array.chunks}"
        raise ValueError(msg)
    if array.nchunks > MOST_CHUNKS:
        msg = f"it claims {array.nchunks} chunks"
        raise ValueError(msg)
    return array


def _writable(array: zarr.Array[Any]) -> zarr.Array[Any]:
    """Return an array that also stores chunks of fill values, so that a missing chunk is always an error."""
    return array.with_config({"write_empty_chunks": True})


def shard_files(name: str, *positions: int) -> str:
    """Return the path, below the store, of the shard at a position; of the chunk where an array has no shards."""
    return f"{name}/c/{'/'.join(str(p) for p in positions)}" if positions else f"{name}/c"


def array_files(*names: str, axes: int = 1) -> tuple[str, ...]:
    """Return the files, below the store, of arrays of one shard each: metadata and values of every array."""
    return tuple(path for name in names for path in (f"{name}/zarr.json", shard_files(name, *[0] * axes)))


def read_array(
    storage: Storage, name: str, selection: Any = ..., *, opened: zarr.Array[Any] | None = None
) -> np.ndarray[Any, Any]:
    """Read an array, or a part of it; only the chunks of that part are read.

    Parameters
    ----------
    selection
        One slice per axis, a single slice for the first axis, or `...` for the whole array.
    opened
        The array, if the caller has already opened it; opening it takes a request.

    Raises
    ------
    StoreError
        A chunk is missing, truncated or fails its checksum: the message names store, array and chunk.
    """
    array = open_array(storage, name) if opened is None else opened
    spans = _spans(array, selection)
    values = np.empty([span.stop - span.start for span in spans], dtype=array.dtype)
    touched, whole = _touched(spans, array.chunks), [values]

    def place(position: Position, chunk: np.ndarray[Any, Any]) -> None:
        if len(touched) == 1 and chunk.shape == values.shape and chunk.flags.owndata:  # no copy is needed
            whole[0] = chunk
            return
        cuts = [
            (max(p * size, span.start), min((p + 1) * size, span.stop))
            for p, size, span in zip(position, array.chunks, spans, strict=True)
        ]
        there = tuple(slice(a - span.start, b - span.start) for (a, b), span in zip(cuts, spans, strict=True))
        here = tuple(slice(a - p * n, b - p * n) for (a, b), p, n in zip(cuts, position, array.chunks, strict=True))
        values[there] = chunk[here]

    read_chunks(array, Place(storage.url, name), touched, place)
    return whole[0]


def write_array(storage: Storage, name: str, values: np.ndarray[Any, Any], **kwargs: Any) -> None:
    """Create an array and write all its values; meant for small arrays with one writer."""
    chunks = kwargs.pop("chunks", values.shape)
    layout: ArrayLayout = {"shape": values.shape, "dtype": values.dtype, "chunks": chunks, **kwargs}  # type: ignore[typeddict-item]
    create_array(storage, name, **layout)
    metadata = json.loads(_metadata(**layout))  # just written, so it need not be read back
    array = _writable(zarr.Array(opened_with(metadata, StorePath(storage.store(name)))))
    with _writing(storage, name):
        array[...] = values


def touched_shards(array: zarr.Array[Any], selection: Any) -> list[Position]:
    """Return the positions of the shards that a selection of slices touches; of chunks if there are no shards."""
    return _touched(_spans(array, selection), array.shards or array.chunks)


def _touched(spans: Sequence[range], unit: Sequence[int]) -> list[Position]:
    """Return the positions, in the grid of a unit's shape, that ranges of places touch."""
    touched = (
        range(span.start // size, -(-span.stop // size) if span.stop > span.start else span.start // size)
        for span, size in zip(spans, unit, strict=True)
    )
    return list(itertools.product(*touched))


def _spans(array: zarr.Array[Any], selection: Any) -> list[range]:
    """Return the range of places that a selection of slices covers on each axis."""
    parts = [] if selection is ... else list(selection if isinstance(selection, tuple) else (selection,))
    parts += [slice(None)] * (array.ndim - len(parts))
    spans = [range(*part.indices(length)) for part, length in zip(parts, array.shape, strict=True)]
    if any(span.step != 1 for span in spans):
        msg = f"expected a selection of slices without steps, found {selection!r}"
        raise ValueError(msg)
    return [range(span.start, max(span.start, span.stop)) for span in spans]
