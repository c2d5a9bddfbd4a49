"""Create, read and write zarr arrays.

Every array is created here, so every chunk ends in a `crc32c`. Every array is read here, so a damaged or missing chunk is
an error that names store, array and chunk, never a wrong number.
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
"""Attribute of arrays that are ours alone: the checksum of their metadata."""
COMPRESSORS = (BloscCodec(cname="lz4", clevel=5, shuffle="shuffle"), Crc32cCodec())
"""Codec chain of our arrays. The checksum comes last, so it covers the very bytes that are stored.

They are read and written by zarr's own codec pipeline: zarrs 0.2.3 lets flipped bits through when it decodes a whole
shard, and leaves empty chunks out whatever the setting.
"""


MOST_CHUNKS = 2**31
"""Most chunks of an array; a damaged one that claims more would be walked through for ever."""


class ArrayLayout(TypedDict):
    """What an array is created with.

    Attributes
    ----------
    chunks, shards
        Shapes of the unit of reading and of the unit of writing (whole chunks; none: a chunk is its own shard).
    fill_value
        0 by default.
    attributes
        Of an array that other tools read or change too; none: it is ours alone, and its metadata carries a checksum.
    """

    shape: Sequence[int]
    dtype: Any
    chunks: Sequence[int]
    shards: NotRequired[Sequence[int] | None]
    fill_value: NotRequired[Any]
    attributes: NotRequired[dict[str, Any] | None]


def create_array(storage: Storage, name: str, **layout: Unpack[ArrayLayout]) -> None:
    """Write an array's metadata over whatever stood there; its shards are written by their owners, each whole.

    Parameters
    ----------
    storage, name
        The store and the array's path in it. No parent's metadata is touched, so the root stays unmade until the end.
    """
    if storage.is_local:  # on object storage, where each look costs, what stood there is written over or not read
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
    told = json.loads(files["zarr.json"].to_bytes())
    told["attributes"][METADATA_SEAL] = metadata_digest(told)
    return json.dumps(told, indent=2).encode()


def metadata_digest(told: Mapping[str, Any]) -> str:
    """Return the checksum of an array's metadata, itself left out."""
    own = {name: value for name, value in told.get("attributes", {}).items() if name != METADATA_SEAL}
    text = json.dumps({**told, "attributes": own}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def opened_with(told: Mapping[str, Any], where: StorePath) -> zarr.AsyncArray[Any]:
    """Open an array by its metadata, which must be what was written; `ValueError` where it is not."""
    if told.get("attributes", {}).get(METADATA_SEAL, "") not in ("", metadata_digest(told)):
        msg = "the metadata's checksum is that of another content"
        raise ValueError(msg)
    metadata: Any = dict(told)
    return zarr.AsyncArray(metadata, where)


def ensure_array(storage: Storage, name: str, **layout: Any) -> None:
    """Write the metadata of an array unless it is there already; its chunks stay.

    So a stage that was interrupted, or lost a shard, goes on without disturbing what is done.
    """
    wanted = _metadata(**layout)
    path = f"{name}/zarr.json"
    if storage.read_if_there(path) != wanted:
        storage.write_atomic(path, wanted)


class _Unseen(WrapperStore[Store]):
    """A store that shows metadata and no chunks: zarr reads a shard before it writes it, and it may be damaged."""

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        """See zarr's `Store.get`."""
        return await super().get(key, prototype, byte_range) if key.endswith("zarr.json") else None


def write_part(storage: Storage, name: str, selection: Any, values: np.ndarray[Any, Any]) -> None:
    """Write the whole shards of a selection by slices, whatever, damaged or not, stood there before."""
    array = open_array(storage, name, mode="w")
    with _writing(storage, name):
        array[selection] = values


def write_chunk(storage: Storage, name: str, position: Position, chunk: np.ndarray[Any, Any]) -> None:
    """Write one whole chunk, in its full shape, of an array without shards; several times faster than `write_part`."""
    storage.write_atomic(shard_files(name, *position), *_encoded(np.ascontiguousarray(chunk)))


def write_shard(storage: Storage, name: str, shard: Position, chunks: Iterable[np.ndarray[Any, Any]]) -> None:
    """Write one whole shard, chunk by chunk, whatever stood there before.

    Nothing but the encoded chunks is held, and nothing is copied on the way: several times faster than `write_part`,
    where a shard is many chunks.

    Parameters
    ----------
    shard
        Its position in the array's grid of shards.
    chunks
        The chunks of the shard, in the order of the grid, less what of them lies outside the array.
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
    """Return a chunk in its full shape: beyond the array's end it holds the fill value."""
    missing = [(0, size - length) for size, length in zip(array.chunks, values.shape, strict=True)]
    if not any(after for _, after in missing):
        return np.ascontiguousarray(values, dtype=array.dtype)
    return np.pad(values.astype(array.dtype, copy=False), missing, constant_values=array.fill_value)


def _encoded(chunk: np.ndarray[Any, Any]) -> tuple[bytes, bytes]:
    """Return a chunk as `COMPRESSORS` encodes it, its checksum apart."""
    body = Blosc(cname="lz4", clevel=5, shuffle=Blosc.SHUFFLE, typesize=chunk.itemsize).encode(chunk)
    return body, crc32c(body)


@contextmanager
def _writing(storage: Storage, name: str) -> Iterator[None]:
    """Name the array that was being written in an error of the system."""
    try:
        yield
    except OSError as error:
        msg = f"{storage.url}: array '{name}' cannot be written ({reason(error)})"
        raise StoreError(msg) from error


def open_array(storage: Storage, name: str, *, mode: str = "r") -> zarr.Array[Any]:
    """Open an array by its path; `StoreError` names it where it is missing or its metadata cannot be read.

    Parameters
    ----------
    mode
        `r`, `r+`, or `w` to write whole shards only, without a look at what stands there.
    """
    try:
        store = _Unseen(storage.store(name)) if mode == "w" else storage.store(name, read_only=mode == "r")
        known = storage.node(name) if mode == "r" else None
        if known is None:
            known = storage.metadata(name)
        array = sensible(zarr.Array(opened_with(known, StorePath(store))))
        return array if mode == "r" else _writable(array)
    except StoreError:
        raise
    except Exception as error:
        raise unopened(Place(storage.url, name), error) from error


def unopened(where: Place, error: Exception) -> StoreError:
    """Return what to raise where an array cannot be opened: its metadata is damaged, or may not be read."""
    what = f" cannot be opened ({type(error).__name__}: {error})"
    if isinstance(error, OSError) and not isinstance(error, ABSENT):
        return StoreError(f"{where}{what}")
    return where.damaged(what, "zarr.json")


def sensible(array: zarr.Array[Any]) -> zarr.Array[Any]:
    """Refuse an array whose metadata cannot be true: it comes from a file."""
    if min((*array.chunks, *(array.shards or ())), default=1) < 1:
        msg = f"its chunks are {array.chunks}"
        raise ValueError(msg)
    if array.nchunks > MOST_CHUNKS:
        msg = f"it claims {array.nchunks} chunks"
        raise ValueError(msg)
    return array


def _writable(array: zarr.Array[Any]) -> zarr.Array[Any]:
    """Return an array that stores empty chunks too, so that a missing one can be told from one full of zeros."""
    return array.with_config({"write_empty_chunks": True})


def shard_files(name: str, *positions: int) -> str:
    """Return the path, below the store, of the shard (or unsharded chunk) at a position of an array."""
    return f"{name}/c/{'/'.join(str(p) for p in positions)}" if positions else f"{name}/c"


def array_files(*names: str, axes: int = 1) -> tuple[str, ...]:
    """Return the paths, below the store, of arrays of one shard each: their metadata and their values."""
    return tuple(path for name in names for path in (f"{name}/zarr.json", shard_files(name, *[0] * axes)))


def read_array(
    storage: Storage, name: str, selection: Any = ..., *, opened: zarr.Array[Any] | None = None
) -> np.ndarray[Any, Any]:
    """Read a part of an array, or all of it, from the chunks that hold it.

    Parameters
    ----------
    selection
        Slices, one per axis (a single slice for the first), or `...` for everything.
    opened
        The array, where the caller has opened it before; opening takes a request.

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
        if len(touched) == 1 and chunk.shape == values.shape and chunk.flags.owndata:  # it is all that is wanted
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
    """Create an array and write all of it: for what is small and has one writer."""
    chunks = kwargs.pop("chunks", values.shape)
    layout: ArrayLayout = {"shape": values.shape, "dtype": values.dtype, "chunks": chunks, **kwargs}  # type: ignore[typeddict-item]
    create_array(storage, name, **layout)
    known = json.loads(_metadata(**layout))  # written just now, so it need not be read
    array = _writable(zarr.Array(opened_with(known, StorePath(storage.store(name)))))
    with _writing(storage, name):
        array[...] = values


def touched_shards(array: zarr.Array[Any], selection: Any) -> list[Position]:
    """Return the positions of the shards (chunks where there are none) that a selection by slices touches."""
    return _touched(_spans(array, selection), array.shards or array.chunks)


def _touched(spans: Sequence[range], unit: Sequence[int]) -> list[Position]:
    touched = (
        range(span.start // size, -(-span.stop // size) if span.stop > span.start else span.start // size)
        for span, size in zip(spans, unit, strict=True)
    )
    return list(itertools.product(*touched))


def _spans(array: zarr.Array[Any], selection: Any) -> list[range]:
    """Return the first place and the one after the last that a selection by slices means on each axis."""
    given = [] if selection is ... else list(selection if isinstance(selection, tuple) else (selection,))
    given += [slice(None)] * (array.ndim - len(given))
    spans = [range(*part.indices(length)) for part, length in zip(given, array.shape, strict=True)]
    if any(span.step != 1 for span in spans):
        msg = f"a selection is slices without steps, found {selection!r}"
        raise ValueError(msg)
    return [range(span.start, max(span.start, span.stop)) for span in spans]
