"""Read a remote file by blocks, for HDF5, which reads a few bytes in many places and then long stretches.

Whole blocks are fetched, and the last used ones are cached. Adjacent missing blocks are fetched in one request.
"""

from __future__ import annotations

import io
from collections import OrderedDict
from collections.abc import Callable


class RangedFile(io.RawIOBase):
    """A read-only file whose blocks are fetched on demand and cached.

    Parameters
    ----------
    fetch
        Returns the bytes `start:stop` of the file.
    size
        Bytes of the file.
    block, blocks
        Bytes of a block, and the number of blocks that are cached.
    """

    def __init__(self, fetch: Callable[[int, int], bytes], size: int, block: int, blocks: int) -> None:
        self._fetch, self._size, self._block, self._most = fetch, size, block, blocks
        self._kept: OrderedDict[int, memoryview] = OrderedDict()
        self._place = 0

    def readable(self) -> bool:
        """Return True: the file can be read."""
        return True

    def seekable(self) -> bool:
        """Return True: the file can be read at any position."""
        return True

    def tell(self) -> int:
        """Return the position of the next read."""
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Set the position of the next read and return it."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        self._place = max(0, base + offset)
        return self._place

    def readinto(self, buffer: object) -> int:
        """Fill a buffer from the current position and return the number of bytes read; fewer at the file's end."""
        out = memoryview(buffer).cast("B")  # type: ignore[arg-type]
        start, stop = self._place, min(self._place + len(out), self._size)
        if stop <= start:
            return 0
        numbers = range(start // self._block, (stop - 1) // self._block + 1)
        held = self._held(numbers)
        for number in numbers:
            first = number * self._block
            low, high = max(start, first), min(stop, first + self._block)
            out[low - start : high - start] = held[number][low - first : high - first]
        self._place = stop
        return stop - start

    def _held(self, numbers: range) -> dict[int, memoryview]:
        """Return blocks by number; fetch those that are not cached."""
        held = {number: self._kept[number] for number in numbers if number in self._kept}
        for first, last in _runs([number for number in numbers if number not in held]):
            data = memoryview(self._fetch(first * self._block, min((last + 1) * self._block, self._size)))
            for number in range(first, last + 1):
                place = (number - first) * self._block
                held[number] = data[place : place + self._block]
        for number in numbers[-self._most :]:
            if number not in self._kept:
                self._kept[number] = memoryview(bytes(held[number]))  # a copy, so that the rest of the run is freed
            self._kept.move_to_end(number)
        while len(self._kept) > self._most:
            self._kept.popitem(last=False)
        return held


def _runs(numbers: list[int]) -> list[tuple[int, int]]:
    """Return the first and last number of each run of consecutive numbers."""
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], number)
        else:
            runs.append((number, number))
    return runs
