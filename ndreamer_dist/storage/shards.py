"""Read chunks of arrays by the byte ranges that hold them: each chunk once, and nothing else.

Input: an open array and positions in its grid of chunks. Output: the chunks, decoded and checked, one by one. The index of
a shard is one request; adjacent chunks of a shard are one more; a whole shard is one in all. Shards are read in parallel.
`counting` counts the bytes where the store returns them.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import sys
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import zarr
from numcodecs import Blosc
from numcodecs.checksum32 import crc32c_checksum
from zarr.abc.buffer import Buffer, BufferPrototype
from zarr.abc.codec import Codec
from zarr.abc.store import ByteRequest, RangeByteRequest, Store, SuffixByteRequest
from zarr.buffer import cpu, default_buffer_prototype
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, ShardingCodec
from zarr.core.array_spec import ArraySpec  # what zarr's codecs take has no public name
from zarr.core.sync import sync  # zarr has no public way to wait for its event loop
from zarr.dtype import UInt64

from ndreamer_dist.errors import DamagedError, StoreError
from ndreamer_dist.storage.retries import RemoteStore

GAP_BYTES = 16_384
"""Widest gap between two ranges of a shard that is read along rather than starting another request."""
SPARE_SHARE = 0.05
"""Share of the wanted bytes of a shard that its gaps may add."""
CONCURRENT_SHARDS = 32
"""Shards that are read side by side."""
DECODED_BYTES = 128 * 2**20
"""Decoded values of the shards that are read side by side."""
NOT_WRITTEN = 2**64 - 1
"""What a shard's index says of a chunk that holds nothing but the fill value and was not written."""
BLOSC_BYTES = slice(4, 8)
"""Where blosc's header says how many bytes a chunk decodes to."""
SMALL_BYTES = 2**18
"""A chunk of so few bytes is decoded in less time than another thread takes to begin."""

Position = tuple[int, ...]
ByteRange = tuple[int, int]


@dataclass
class Reads:
    """What was read from stores.

    Attributes
    ----------
    requests, bytes
        Requests made, and bytes that came back.
    chunks, touched
        Chunks that were needed, and the bytes that they and the indexes of their shards take in the store.
    """

    requests: int = 0
    bytes: int = 0
    chunks: int = 0
    touched: int = 0

    def add(self, other: Reads) -> None:
        """Add another count to this one."""
        self.requests += other.requests
        self.bytes += other.bytes
        self.chunks += other.chunks
        self.touched += other.touched

    def __str__(self) -> str:
        return f"{self.bytes / 1e6:.3g} MB in {self.requests} requests ({self.chunks} chunks)"


_counters: ContextVar[tuple[Reads, ...]] = ContextVar("counters", default=())


@contextmanager
def counting() -> Iterator[Reads]:
    """Count what this thread reads, inside the `with` block, of the stores that `Storage` and `read_array` read."""
    reads = Reads()
    token = _counters.set((*_counters.get(), reads))
    try:
        yield reads
    finally:
        _counters.reset(token)


def count(reads: Reads) -> None:
    """Add to the counts under way in this thread."""
    for counter in _counters.get():
        counter.add(reads)


@dataclass(frozen=True)
class Place:
    """Which array an error is about: the address of its store, and its name there."""

    store: str
    array: str

    def __str__(self) -> str:
        return f"{self.store}: array '{self.array}'"

    def damaged(self, what: str, file: str) -> DamagedError:
        """Return the error that a file of the array, by its name below the array, is damaged or missing."""
        return DamagedError(f"{self}{what}", f"{self.store}/{self.array}/{file}")


class HttpStore(RemoteStore):
    """A store behind a web server, which may ignore that only a part of a file is asked for and send all of it."""

    async def sent(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        """Return what the server sends: the range asked for, or the whole file."""
        return await super().get(key, prototype, byte_range)

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        """Return a file's bytes, or the range asked for."""
        found = await self.sent(key, prototype, byte_range)
        if found is None:
            return found
        if isinstance(byte_range, RangeByteRequest):
            return _cut(found, byte_range.start, byte_range.end)
        if isinstance(byte_range, SuffixByteRequest):
            return found[-byte_range.suffix :] if len(found) > byte_range.suffix else found
        return found


def _cut(sent: Buffer, start: int, stop: int) -> Buffer:
    return sent if len(sent) <= stop - start else sent[start:stop]


def read_chunks(
    array: zarr.Array[Any], where: Place, positions: Iterable[Position], place: Callable[[Position, np.ndarray], None]
) -> None:
    """Read chunks by their positions in the array's grid of chunks.

    Parameters
    ----------
    where
        What an error calls the array.
    place
        Takes a position and its chunk, of the full chunk shape; called for each, in any order, one at a time.

    Raises
    ------
    StoreError
        A shard is missing, truncated or fails a checksum: the message names it by its position.
    """
    reading = _Reading(array, where, place)
    try:
        sync(reading.run(reading.shards_of(positions)))
    finally:
        count(reading.reads)


async def fetch_chunks(
    array: zarr.AsyncArray[Any],
    where: Place,
    positions: Iterable[Position],
    place: Callable[[Position, np.ndarray], None],
) -> None:
    """Do what `read_chunks` does, uncounted, inside zarr's event loop: for those who read many arrays at once."""
    reading = _Reading(array, where, place)
    await reading.run(reading.shards_of(positions))


def chunks_in(array: zarr.Array[Any] | zarr.AsyncArray[Any], shard: Position) -> list[Position]:
    """Return the positions of the chunks of a shard that lie inside the array."""
    grid = [-(-n // c) for n, c in zip(array.shape, array.chunks, strict=True)]
    spans = (range(s * k, min((s + 1) * k, n)) for s, k, n in zip(shard, chunks_of_shard(array), grid, strict=True))
    return list(itertools.product(*spans))


def chunks_of_shard(array: zarr.Array[Any] | zarr.AsyncArray[Any]) -> tuple[int, ...]:
    """Return how many chunks a shard has along each axis; 1 where a chunk is a file of its own."""
    return tuple(u // c for u, c in zip(array.shards or array.chunks, array.chunks, strict=True))


def read_files(store: Store, where: str, names: Sequence[str]) -> list[bytes | None]:
    """Read whole files, each one chunk of an array, side by side; none where there is no such file."""
    reads = Reads(chunks=len(names))

    async def read(turn: asyncio.Semaphore, name: str) -> bytes | None:
        async with turn:
            sent = await _ask(store, name, f"{where}/{name}", reads)
        return None if sent is None else sent.to_bytes()

    async def read_all() -> list[bytes | None]:
        turn = asyncio.Semaphore(CONCURRENT_SHARDS)
        return await asyncio.gather(*(read(turn, name) for name in names))

    try:
        return sync(read_all())
    finally:
        reads.touched = reads.bytes
        count(reads)


async def _ask(store: Store, key: str, where: str, reads: Reads, part: ByteRequest | None = None) -> Buffer | None:
    """Return what a store sends of a file, counted; none where there is no such file."""
    get = store.sent if isinstance(store, HttpStore) else store.get
    try:
        sent = await get(key, default_buffer_prototype(), part)
    except StoreError:
        raise
    except Exception as error:
        msg = f"{where} cannot be fetched ({type(error).__name__}: {error})"
        raise StoreError(msg) from error
    reads.requests += 1
    reads.bytes += 0 if sent is None else len(sent)
    return sent


def merged(spans: Iterable[ByteRange], spare: float) -> list[ByteRange]:
    """Join byte ranges over the smallest gaps between them, as long as these add up to at most `spare` bytes."""
    spans = sorted(spans)
    gaps = [max(0, later[0] - earlier[1]) for earlier, later in itertools.pairwise(spans)]
    joined = set()
    for place in sorted(range(len(gaps)), key=gaps.__getitem__):
        spare -= gaps[place]
        if spare < 0 or gaps[place] > GAP_BYTES:
            break
        joined.add(place)
    runs = spans[:1]
    for place, span in enumerate(spans[1:]):
        if place in joined:
            runs[-1] = (runs[-1][0], max(runs[-1][1], span[1]))
        else:
            runs.append(span)
    return runs


@dataclass
class _Room:
    """Lets shards in while what they decode to fits and they are not too many; one always may."""

    shards: int = 0
    bytes: int = 0
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)

    @asynccontextmanager
    async def take(self, size: int) -> AsyncIterator[None]:
        async with self.changed:
            await self.changed.wait_for(lambda: self._fits(size))
            self.shards, self.bytes = self.shards + 1, self.bytes + size
        try:
            yield
        finally:
            async with self.changed:
                self.shards, self.bytes = self.shards - 1, self.bytes - size
                self.changed.notify_all()

    def _fits(self, size: int) -> bool:
        return not self.shards or (self.shards < CONCURRENT_SHARDS and self.bytes + size <= DECODED_BYTES)


@dataclass
class _Reading:
    """One call of `read_chunks`: what it reads from, and what it counted."""

    array: zarr.Array[Any] | zarr.AsyncArray[Any]
    where: Place
    place: Callable[[Position, np.ndarray], None]
    reads: Reads = field(default_factory=Reads)

    @property
    def _metadata(self) -> Any:
        return self.array.metadata

    @cached_property
    def sharding(self) -> ShardingCodec | None:
        """The codec that puts chunks into shards; none where a chunk is a file of its own."""
        first = self._metadata.codecs[0]
        return first if isinstance(first, ShardingCodec) else None

    @cached_property
    def per_shard(self) -> tuple[int, ...]:
        """Chunks of a shard along each axis."""
        return chunks_of_shard(self.array)

    @cached_property
    def _spec(self) -> Any:
        return _chunk_spec(self.array)

    @property
    def _index_codecs(self) -> tuple[Codec, ...]:
        return self.sharding.index_codecs if self.sharding else ()

    def shards_of(self, positions: Iterable[Position]) -> dict[Position, list[Position]]:
        """Return the positions by the shard that holds them."""
        shards: dict[Position, list[Position]] = {}
        for position in positions:
            shard = tuple(p // n for p, n in zip(position, self.per_shard, strict=True))
            shards.setdefault(shard, []).append(position)
        return shards

    async def run(self, shards: dict[Position, list[Position]]) -> None:
        room, size = _Room(), math.prod(self.array.chunks) * self.array.dtype.itemsize
        try:
            async with asyncio.TaskGroup() as tasks:
                for shard, wanted in shards.items():
                    tasks.create_task(self._admitted(room, size * len(wanted), shard, wanted))
        except* StoreError as errors:
            first: BaseException = errors
            while isinstance(first, BaseExceptionGroup):
                first = first.exceptions[0]
            raise first from first.__cause__

    async def _admitted(self, room: _Room, size: int, shard: Position, wanted: list[Position]) -> None:
        async with room.take(size):
            try:
                found = await self._read(shard, wanted)
            except (StoreError, AttributeError):  # the latter is of code, never of bytes
                raise
            except Exception as cause:
                raise self._damaged(shard, f"is damaged ({cause})") from cause
            for position, values in zip(wanted, found, strict=True):
                self.place(position, values)

    async def _read(self, shard: Position, wanted: list[Position]) -> list[np.ndarray]:
        """Fetch and decode the wanted chunks of one shard."""
        encoded = await self._pieces(shard, wanted) if self.sharding else [await self._get(shard)]
        self.reads.chunks += len(wanted)
        self.reads.touched += sum(len(data) for data in encoded if data is not None)
        return [self._empty() if data is None else await self._chunk(data) for data in encoded]

    @cached_property
    def _codecs(self) -> tuple[Codec, ...]:
        """The codecs of a chunk."""
        return self.sharding.codecs if self.sharding else self._metadata.codecs

    @cached_property
    def _ours(self) -> bool:
        """Whether chunks are encoded as this package's are (`arrays.COMPRESSORS`)."""
        first, *others = self._codecs
        native = isinstance(first, BytesCodec) and self.array.dtype.isnative and _little(first)
        return native and [type(codec) for codec in others] == [BloscCodec, Crc32cCodec]

    async def _chunk(self, data: Buffer) -> np.ndarray:
        """Decode a chunk; one of this package's straight into an array, a small one without a change of thread."""
        if not self._ours:
            return await _decoded(self._codecs, data, self._spec)
        encoded, chunk = data.as_numpy_array(), np.empty(self.array.chunks, dtype=self.array.dtype)
        if chunk.nbytes <= SMALL_BYTES:
            _decode_into(chunk, encoded)
        else:
            await asyncio.to_thread(_decode_into, chunk, encoded)
        return chunk

    def _empty(self) -> np.ndarray:
        """Return a chunk that was not written, since it holds nothing but the fill value."""
        return np.full(self.array.chunks, self._metadata.fill_value, dtype=self.array.dtype)

    async def _pieces(self, shard: Position, wanted: list[Position]) -> list[Buffer | None]:
        """Return the encoded chunks of a shard; none for one that its index says is absent."""
        size = 16 * math.prod(self.per_shard)
        for codec in self._index_codecs:
            size = codec.compute_encoded_size(size, self._spec)
        tail = SuffixByteRequest(size)
        whole = len(wanted) == len(chunks_in(self.array, shard))
        sent = await self._get(shard, None if whole else tail)
        index = await self._index(sent[-tail.suffix :])
        self.reads.touched += tail.suffix
        spans = [self._span(index, position) for position in wanted]
        if whole or len(sent) > tail.suffix:  # a server that ignores ranges has sent all there is
            return [None if span is None else sent[span[0] : span[1]] for span in spans]
        known = [span for span in spans if span is not None]
        runs = merged(known, SPARE_SHARE * sum(stop - start for start, stop in known))
        bodies = await asyncio.gather(*(self._range(shard, run) for run in runs))
        return [None if span is None else _within(runs, bodies, span) for span in spans]

    async def _index(self, data: Buffer) -> np.ndarray:
        """Return a shard's index, checked: (chunks along each axis, offset and length) uint64."""
        spec = replace(
            self._spec, shape=(*self.per_shard, 2), dtype=UInt64(endianness="little"), fill_value=NOT_WRITTEN
        )
        return await _decoded(self._index_codecs, data, spec)

    def _span(self, index: np.ndarray, position: Position) -> ByteRange | None:
        offset, length = index[tuple(p % n for p, n in zip(position, self.per_shard, strict=True))].tolist()
        return None if offset == NOT_WRITTEN else (offset, offset + length)

    async def _range(self, shard: Position, run: ByteRange) -> Buffer:
        return _cut(await self._get(shard, RangeByteRequest(*run)), *run)

    async def _get(self, shard: Position, part: ByteRequest | None = None) -> Buffer:
        """Return what the store sends of a shard's file, counted."""
        key = f"{self.array.path}/{self.array.metadata.encode_chunk_key(shard)}".lstrip("/")
        sent = await _ask(self.array.store, key, f"{self.where}, chunk {shard}", self.reads, part)
        if sent is None:
            raise self._damaged(shard, "is missing")
        return sent

    def _damaged(self, shard: Position, how: str) -> DamagedError:
        return self.where.damaged(f", chunk {shard} {how}", self.array.metadata.encode_chunk_key(shard))


def _little(codec: BytesCodec) -> bool:
    """Return whether numbers are stored as this processor holds them, and that is by their last byte first."""
    order = getattr(codec.endian, "value", codec.endian)  # a string since zarr 3.4, a member of an Enum before
    return sys.byteorder == "little" and order in (None, "little")


def crc32c(data: Any) -> bytes:
    """Return the checksum that ends every chunk."""
    return int(crc32c_checksum(data, 0)).to_bytes(4, "little")


def _decode_into(chunk: np.ndarray, data: np.ndarray) -> None:
    """Undo `arrays.COMPRESSORS`; `ValueError` where the bytes are not those of such a chunk."""
    body = data[:-4]
    if crc32c(body) != data[-4:].tobytes():
        msg = "the checksum is that of another content"
        raise ValueError(msg)
    if int.from_bytes(body[BLOSC_BYTES].tobytes(), "little") != chunk.nbytes:
        msg = f"it does not hold the {chunk.nbytes} bytes of a chunk"
        raise ValueError(msg)
    Blosc().decode(body, out=chunk)


async def _decoded(codecs: Sequence[Codec], data: Buffer, spec: Any) -> np.ndarray:
    """Undo the codecs of a chunk one by one: by zarr's own ones, whatever pipeline a user has chosen for them."""
    specs = list(itertools.accumulate(codecs, lambda spec, codec: codec.resolve_metadata(spec), initial=spec))
    values: Any = data
    for codec, own in zip(reversed(codecs), reversed(specs[:-1]), strict=True):
        (values,) = await codec.decode([(values, own)])
    return np.asarray(values.as_numpy_array())


def uncompressed(array: zarr.Array[Any], data: bytes) -> np.ndarray:
    """Return a chunk that is a file of its own as it was before it was compressed, after the first codec: (bytes,) uint8."""
    metadata: Any = array.metadata
    if metadata.zarr_format == 2:
        plain = data if metadata.compressor is None else metadata.compressor.decode(data)
        return np.frombuffer(plain, np.uint8)
    return sync(_decoded(metadata.codecs[1:], cpu.Buffer.from_bytes(data), _chunk_spec(array))).view(np.uint8)


def _chunk_spec(array: zarr.Array[Any] | zarr.AsyncArray[Any]) -> Any:
    """Return the description of a chunk that zarr's codecs take; zarr's own is of a whole shard."""
    metadata: Any = array.metadata
    return ArraySpec(array.chunks, metadata.dtype, metadata.fill_value, array.config, default_buffer_prototype())


def _within(runs: Sequence[ByteRange], bodies: Sequence[Buffer], span: ByteRange) -> Buffer:
    """Return the bytes of a range from the run that holds it."""
    for (start, stop), body in zip(runs, bodies, strict=True):
        if start <= span[0] and span[1] <= stop:
            return body[span[0] - start : span[1] - start]
    msg = f"no run holds the bytes {span}"
    raise AssertionError(msg)
