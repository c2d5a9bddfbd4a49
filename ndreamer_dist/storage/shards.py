"""Read chunks of arrays by byte ranges: each chunk once, and little else.

Input: an open array and positions in its grid of chunks. Output: the decoded and verified chunks, one by one. Reading a
shard's index takes one request, and every run of adjacent chunks one more; a whole shard takes one request in all.
Shards are read concurrently. `counting` counts requests and bytes.
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
from zarr.core.array_spec import ArraySpec  # the argument of zarr's codecs, which has no public name
from zarr.core.sync import sync  # there is no public way to wait for zarr's event loop
from zarr.dtype import UInt64

from ndreamer_dist.errors import DamagedError, StoreError
from ndreamer_dist.storage.retries import RemoteStore

GAP_BYTES = 16_384
"""Widest gap between two byte ranges of a shard that is read along to save a request."""
SPARE_SHARE = 0.05
"""Largest total of the gaps that are read along, as a share of the wanted bytes of a shard."""
CONCURRENT_SHARDS = 32
"""Largest number of shards that are read concurrently."""
DECODED_BYTES = 128 * 2**20
"""Largest total of the decoded bytes of shards that are read concurrently."""
NOT_WRITTEN = 2**64 - 1
"""Offset and length, in a shard's index, of a chunk that was not written because it holds only fill values."""
BLOSC_BYTES = slice(4, 8)
"""Position, in blosc's header, of the number of bytes that a chunk decodes to."""
SMALL_BYTES = 2**18
"""Chunks of up to so many decoded bytes are decoded in the event loop: a thread would take longer to start."""

Position = tuple[int, ...]
ByteRange = tuple[int, int]


@dataclass
class Reads:
    """Counts of what was read from stores.

    Attributes
    ----------
    requests, bytes
        Requests made, and bytes received.
    chunks, touched
        Chunks needed, and the stored bytes of these chunks and of the indexes of their shards.
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
    """Count what this thread reads with `Storage` and `read_array` inside the `with` block."""
    reads = Reads()
    token = _counters.set((*_counters.get(), reads))
    try:
        yield reads
    finally:
        _counters.reset(token)


def count(reads: Reads) -> None:
    """Add to all counts that are under way in this thread."""
    for counter in _counters.get():
        counter.add(reads)


@dataclass(frozen=True)
class Place:
    """Address of a store and name of an array in it, for error messages."""

    store: str
    array: str

    def __str__(self) -> str:
        return f"{self.store}: array '{self.array}'"

    def damaged(self, what: str, file: str) -> DamagedError:
        """Return the error for a damaged or missing file of the array; `file` is its path below the array."""
        return DamagedError(f"{self}{what}", f"{self.store}/{self.array}/{file}")


class HttpStore(RemoteStore):
    """A store on a web server, which may ignore a range request and send the whole file."""

    async def sent(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        """Return what the server sends: the requested range, or the whole file."""
        return await super().get(key, prototype, byte_range)

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        """Return a file's bytes, or the requested range of them."""
        found = await self.sent(key, prototype, byte_range)
        if found is None:
            return found
        if isinstance(byte_range, RangeByteRequest):
            return _cut(found, byte_range.start, byte_range.end)
        if isinstance(byte_range, SuffixByteRequest):
            return found[-byte_range.suffix :] if len(found) > byte_range.suffix else found
        return found


def _cut(sent: Buffer, start: int, stop: int) -> Buffer:
    """Return the bytes `start:stop` of a file, given these bytes or the whole file."""
    return sent if len(sent) <= stop - start else sent[start:stop]


def read_chunks(
    array: zarr.Array[Any], where: Place, positions: Iterable[Position], place: Callable[[Position, np.ndarray], None]
) -> None:
    """Read chunks by their positions in the array's grid of chunks.

    Parameters
    ----------
    where
        Name of the array in error messages.
    place
        Called with every position and its chunk, in the full chunk shape; in any order, one call at a time.

    Raises
    ------
    StoreError
        A shard is missing, truncated or fails a checksum; the message gives its position.
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
    """Do what `read_chunks` does, uncounted and inside zarr's event loop, to read many arrays concurrently."""
    reading = _Reading(array, where, place)
    await reading.run(reading.shards_of(positions))


def chunks_in(array: zarr.Array[Any] | zarr.AsyncArray[Any], shard: Position) -> list[Position]:
    """Return the positions of the chunks of a shard that lie inside the array."""
    grid = [-(-n // c) for n, c in zip(array.shape, array.chunks, strict=True)]
    spans = (range(s * k, min((s + 1) * k, n)) for s, k, n in zip(shard, chunks_of_shard(array), grid, strict=True))
    return list(itertools.product(*spans))


def chunks_of_shard(array: zarr.Array[Any] | zarr.AsyncArray[Any]) -> tuple[int, ...]:
    """Return the number of chunks of a shard along each axis; ones for an array without shards."""
    return tuple(u // c for u, c in zip(array.shards or array.chunks, array.chunks, strict=True))


def read_files(store: Store, where: str, names: Sequence[str]) -> list[bytes | None]:
    """Read whole files concurrently, each of them one chunk of an array; `None` for a file that does not exist."""
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
    """Return what a store sends of a file, and count it; `None` if there is no such file."""
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
    """Join byte ranges across the smallest gaps between them, as long as the gaps add up to at most `spare` bytes."""
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
    """Limits the number and the decoded bytes of the shards in work; a single shard is always admitted."""

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
    """One call of `read_chunks`: its array, its receiver of chunks, and its counts."""

    array: zarr.Array[Any] | zarr.AsyncArray[Any]
    where: Place
    place: Callable[[Position, np.ndarray], None]
    reads: Reads = field(default_factory=Reads)

    @property
    def _metadata(self) -> Any:
        return self.array.metadata

    @cached_property
    def sharding(self) -> ShardingCodec | None:
        """The codec that packs chunks into shards; `None` for an array without shards."""
        first = self._metadata.codecs[0]
        return first if isinstance(first, ShardingCodec) else None

    @cached_property
    def per_shard(self) -> tuple[int, ...]:
        """Number of chunks of a shard along each axis."""
        return chunks_of_shard(self.array)

    @cached_property
    def _spec(self) -> Any:
        return _chunk_spec(self.array)

    @property
    def _index_codecs(self) -> tuple[Codec, ...]:
        return self.sharding.index_codecs if self.sharding else ()

    def shards_of(self, positions: Iterable[Position]) -> dict[Position, list[Position]]:
        """Return the positions of chunks, grouped by the position of their shard."""
        shards: dict[Position, list[Position]] = {}
        for position in positions:
            shard = tuple(p // n for p, n in zip(position, self.per_shard, strict=True))
            shards.setdefault(shard, []).append(position)
        return shards

    async def run(self, shards: dict[Position, list[Position]]) -> None:
        """Read the chunks of all shards; raise the first error."""
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
            except (StoreError, AttributeError):  # an AttributeError is a bug, never damage
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
        """Whether chunks have the encoding of this package (`arrays.COMPRESSORS`)."""
        first, *others = self._codecs
        native = isinstance(first, BytesCodec) and self.array.dtype.isnative and _little(first)
        return native and [type(codec) for codec in others] == [BloscCodec, Crc32cCodec]

    async def _chunk(self, data: Buffer) -> np.ndarray:
        """Decode a chunk; with this package's encoding straight into the array, and if small without a thread."""
        if not self._ours:
            return await _decoded(self._codecs, data, self._spec)
        encoded, chunk = data.as_numpy_array(), np.empty(self.array.chunks, dtype=self.array.dtype)
        if chunk.nbytes <= SMALL_BYTES:
            _decode_into(chunk, encoded)
        else:
            await asyncio.to_thread(_decode_into, chunk, encoded)
        return chunk

    def _empty(self) -> np.ndarray:
        """Return a chunk of fill values, for one that was not written."""
        return np.full(self.array.chunks, self._metadata.fill_value, dtype=self.array.dtype)

    async def _pieces(self, shard: Position, wanted: list[Position]) -> list[Buffer | None]:
        """Return the encoded chunks of a shard; `None` for a chunk that was not written."""
        size = 16 * math.prod(self.per_shard)
        for codec in self._index_codecs:
            size = codec.compute_encoded_size(size, self._spec)
        tail = SuffixByteRequest(size)
        whole = len(wanted) == len(chunks_in(self.array, shard))
        sent = await self._get(shard, None if whole else tail)
        index = await self._index(sent[-tail.suffix :])
        self.reads.touched += tail.suffix
        spans = [self._span(index, position) for position in wanted]
        if whole or len(sent) > tail.suffix:  # a server that ignores ranges has sent the whole shard
            return [None if span is None else sent[span[0] : span[1]] for span in spans]
        present = [span for span in spans if span is not None]
        runs = merged(present, SPARE_SHARE * sum(stop - start for start, stop in present))
        bodies = await asyncio.gather(*(self._range(shard, run) for run in runs))
        return [None if span is None else _within(runs, bodies, span) for span in spans]

    async def _index(self, data: Buffer) -> np.ndarray:
        """Decode and verify a shard's index: (chunks along each axis, 2) uint64, offset and length of every chunk."""
        spec = replace(
            self._spec, shape=(*self.per_shard, 2), dtype=UInt64(endianness="little"), fill_value=NOT_WRITTEN
        )
        return await _decoded(self._index_codecs, data, spec)

    def _span(self, index: np.ndarray, position: Position) -> ByteRange | None:
        """Return the byte range of a chunk in its shard; `None` for a chunk that was not written."""
        offset, length = index[tuple(p % n for p, n in zip(position, self.per_shard, strict=True))].tolist()
        return None if offset == NOT_WRITTEN else (offset, offset + length)

    async def _range(self, shard: Position, run: ByteRange) -> Buffer:
        return _cut(await self._get(shard, RangeByteRequest(*run)), *run)

    async def _get(self, shard: Position, part: ByteRequest | None = None) -> Buffer:
        """Return what the store sends of a shard's file, and count it; raise `DamagedError` if the file is missing."""
        key = f"{self.array.path}/{self.array.metadata.encode_chunk_key(shard)}".lstrip("/")
        sent = await _ask(self.array.store, key, f"{self.where}, chunk {shard}", self.reads, part)
        if sent is None:
            raise self._damaged(shard, "is missing")
        return sent

    def _damaged(self, shard: Position, how: str) -> DamagedError:
        return self.where.damaged(f", chunk {shard} {how}", self.array.metadata.encode_chunk_key(shard))


def _little(codec: BytesCodec) -> bool:
    """Return whether both this processor and the stored numbers are little-endian."""
    order = getattr(codec.endian, "value", codec.endian)  # a string since zarr 3.4, an Enum member before
    return sys.byteorder == "little" and order in (None, "little")


def crc32c(data: Any) -> bytes:
    """Return the CRC-32C checksum of data as the four bytes that end every chunk."""
    return int(crc32c_checksum(data, 0)).to_bytes(4, "little")


def _decode_into(chunk: np.ndarray, data: np.ndarray) -> None:
    """Decode bytes of `arrays.COMPRESSORS` into a chunk; raise `ValueError` if they are damaged."""
    body = data[:-4]
    if crc32c(body) != data[-4:].tobytes():
        msg = "the checksum does not match"
        raise ValueError(msg)
    if int.from_bytes(body[BLOSC_BYTES].tobytes(), "little") != chunk.nbytes:
        msg = f"it does not hold the {chunk.nbytes} bytes of a chunk"
        raise ValueError(msg)
    Blosc().decode(body, out=chunk)


async def _decoded(codecs: Sequence[Codec], data: Buffer, spec: Any) -> np.ndarray:
    """Decode a chunk by its codecs, one after another, independently of the codec pipeline in zarr's configuration."""
    specs = list(itertools.accumulate(codecs, lambda spec, codec: codec.resolve_metadata(spec), initial=spec))
    values: Any = data
    for codec, own in zip(reversed(codecs), reversed(specs[:-1]), strict=True):
        (values,) = await codec.decode([(values, own)])
    return np.asarray(values.as_numpy_array())


def uncompressed(array: zarr.Array[Any], data: bytes) -> np.ndarray:
    """Return the bytes that the first codec made of a chunk of an array without shards: (bytes,) uint8.

    Parameters
    ----------
    data
        The chunk's file.
    """
    metadata: Any = array.metadata
    if metadata.zarr_format == 2:
        plain = data if metadata.compressor is None else metadata.compressor.decode(data)
        return np.frombuffer(plain, np.uint8)
    return sync(_decoded(metadata.codecs[1:], cpu.Buffer.from_bytes(data), _chunk_spec(array))).view(np.uint8)


def _chunk_spec(array: zarr.Array[Any] | zarr.AsyncArray[Any]) -> Any:
    """Return the description of a chunk that zarr's codecs need; the array's own describes a whole shard."""
    metadata: Any = array.metadata
    return ArraySpec(array.chunks, metadata.dtype, metadata.fill_value, array.config, default_buffer_prototype())


def _within(runs: Sequence[ByteRange], bodies: Sequence[Buffer], span: ByteRange) -> Buffer:
    """Return the bytes of a range, cut from the run that contains it."""
    for (start, stop), body in zip(runs, bodies, strict=True):
        if start <= span[0] and span[1] <= stop:
            return body[span[0] - start : span[1] - start]
    msg = f"no run holds the bytes {span}"
    raise AssertionError(msg)
