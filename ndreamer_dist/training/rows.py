"""Read rows of packed.zarr, in any order, as one CSR.

Input: packed row numbers, mostly in contiguous stretches (the runs of the plan). Output: their CSR. Each chunk is read
and decoded once, and its values are copied directly to their places in the result. All arrays of a call are opened and
read by one coroutine on zarr's event loop, since one round trip to the loop per array would take longer than reading.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from scipy import sparse
from zarr.abc.store import Store
from zarr.buffer import default_buffer_prototype
from zarr.storage import StorePath

from ndreamer_dist import keys
from ndreamer_dist.cohort.packed import Packed
from ndreamer_dist.storage.arrays import opened_with, unopened
from ndreamer_dist.storage.files import metadata_of
from ndreamer_dist.storage.shards import Place, Position, fetch_chunks, sync

CONCURRENT_BLOCKS = 8
"""Blocks read at a time: enough to hide the latency of a remote store, few enough for memory."""


@dataclass(frozen=True)
class Stretch:
    """Consecutive rows of one block that are requested one after the other."""

    place: int  # index of the first one among the requested rows
    first: int  # row inside the block
    rows: int


def stretches(rows: np.ndarray, block_rows: int) -> dict[int, list[Stretch]]:
    """Cut rows into stretches; return the stretches of each block, blocks ascending.

    Parameters
    ----------
    rows
        (rows,) packed rows in any order, with repetitions or not.
    """
    blocks = rows // block_rows
    cuts = np.flatnonzero((np.diff(rows) != 1) | (np.diff(blocks) != 0)) + 1
    edges = [0, *cuts.tolist(), len(rows)] if len(rows) else []
    by_block: dict[int, list[Stretch]] = {}
    for start, stop in itertools.pairwise(edges):
        block = int(blocks[start])
        by_block.setdefault(block, []).append(Stretch(start, int(rows[start]) - block * block_rows, stop - start))
    return dict(sorted(by_block.items()))


def read_rows(packed: Packed, rows: np.ndarray) -> sparse.csr_matrix:
    """Read rows in the given order: (rows, genes) CSR float32 with sorted indices.

    Memory: the result, and the chunks of a few blocks.

    Raises
    ------
    StoreError
        A chunk is missing, truncated or fails its checksum: the message names store, array and chunk.
    """
    return sync(_Gathering.of(packed, rows).run())


@dataclass(frozen=True)
class _Gathering:
    """One call of `read_rows`."""

    packed: Packed
    store: Store
    rows: int
    wanted: dict[int, list[Stretch]]
    room: asyncio.Semaphore

    @classmethod
    def of(cls, packed: Packed, rows: np.ndarray) -> _Gathering:
        store = packed.storage.store(keys.PACKED_X, read_only=True)
        return cls(packed, store, len(rows), stretches(rows, packed.block_rows), asyncio.Semaphore(CONCURRENT_BLOCKS))

    async def run(self) -> sparse.csr_matrix:
        indptrs = dict(zip(self.wanted, await self._each(self._indptr), strict=True))
        counts = np.empty(self.rows, dtype=np.int64)
        for block, parts in self.wanted.items():
            per_row = np.diff(indptrs[block])
            for part in parts:
                counts[part.place : part.place + part.rows] = per_row[part.first : part.first + part.rows]
        indptr = np.concatenate([[0], np.cumsum(counts)])
        data, indices = np.empty(indptr[-1], dtype=np.float32), np.empty(indptr[-1], dtype=np.int32)

        async def fill(block: int) -> None:
            moves = _Moves.of(self.wanted[block], indptrs[block], indptr)
            for name, values in ((keys.DATA, data), (keys.INDICES, indices)):
                await self._read(block, name, moves.touched, partial(moves.place, values))

        await self._each(fill)
        return sparse.csr_matrix((data, indices, indptr), shape=(self.rows, self.packed.n_genes), copy=False)

    async def _each(self, function: Callable[[int], Awaitable[Any]]) -> list[Any]:
        """Call a coroutine function for every block, `CONCURRENT_BLOCKS` at a time."""

        async def call(block: int) -> Any:
            async with self.room:
                return await function(block)

        return await asyncio.gather(*map(call, self.wanted))

    async def _indptr(self, block: int) -> np.ndarray:
        start, stop = self.packed.block_range(block)
        indptr = np.empty(stop - start + 1, dtype=np.int64)

        def place(position: Position, chunk: np.ndarray) -> None:
            first = position[0] * len(chunk)
            part = indptr[first : first + len(chunk)]
            part[:] = chunk[: len(part)]

        await self._read(block, keys.INDPTR, lambda size: range(-(-len(indptr) // size)), place)
        return indptr

    async def _read(
        self,
        block: int,
        name: str,
        touched: Callable[[int], Iterable[int]],
        place: Callable[[Position, np.ndarray], None],
    ) -> None:
        """Open an array of a block, and pass its chunks `touched(chunk size)` to `place`."""
        path = f"{keys.block_name(block)}/{name}"
        where = Place(self.packed.storage.url, f"{keys.PACKED_X}/{path}")
        try:
            content = await self.store.get(f"{path}/zarr.json", default_buffer_prototype())
            metadata = metadata_of(None if content is None else content.to_bytes())
            array = opened_with(metadata, StorePath(self.store, path))
        except Exception as error:
            raise unopened(where, error) from error
        await fetch_chunks(array, where, [(chunk,) for chunk in touched(array.chunks[0])], place)


@dataclass(frozen=True)
class _Moves:
    """The copies of stored values from a block to the result, one per stretch."""

    starts: np.ndarray  # (stretches,) first value in the block
    stops: np.ndarray  # (stretches,) end in the block
    places: np.ndarray  # (stretches,) place of the first value in the result

    @classmethod
    def of(cls, parts: list[Stretch], indptr: np.ndarray, places: np.ndarray) -> _Moves:
        first, rows = (np.array([getattr(part, name) for part in parts]) for name in ("first", "rows"))
        return cls(indptr[first], indptr[first + rows], places[[part.place for part in parts]])

    def touched(self, size: int) -> Iterator[int]:
        """Return the numbers of the chunks, of `size` values each, that hold the values to copy."""
        full = self.starts < self.stops
        spans = np.unique(np.stack([self.starts[full] // size, -(-self.stops[full] // size)]), axis=1)
        return iter(sorted(set(itertools.chain.from_iterable(range(a, b) for a, b in spans.T.tolist()))))

    def place(self, out: np.ndarray, position: Position, chunk: np.ndarray) -> None:
        """Copy values of a chunk to their places in `out`."""
        offset = position[0] * len(chunk)
        starts, stops = np.maximum(self.starts, offset), np.minimum(self.stops, offset + len(chunk))
        here = np.flatnonzero(starts < stops)
        places = self.places + (starts - self.starts)
        for start, stop, to in zip(
            (starts[here] - offset).tolist(), (stops[here] - offset).tolist(), places[here].tolist(), strict=True
        ):
            out[to : to + stop - start] = chunk[start:stop]
