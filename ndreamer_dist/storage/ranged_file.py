"""Read a file on a server as HDF5 reads files: a few bytes in many places, then long stretches.

Whole blocks are fetched, and the last used ones are kept. Adjacent missing blocks are one request.
"""

from __future__ import annotations

import io
from collections import OrderedDict
from collections.abc import Callable


class RangedFile(io.RawIOBase):
    """A file that is only read.

    Parameters
    ----------
    fetch
        Returns the bytes `start:stop`.
    size
        Bytes of the file.
    block, blocks
        Bytes of a block, and how many blocks are kept.
    """

    def __init__(self, fetch: Callable[[int, int], bytes], size: int, block: int, blocks: int) -> None:
        self._fetch, self._size, self._block, self._most = fetch, size, block, blocks
        self._kept: OrderedDict[int, memoryview] = OrderedDict()
        self._place = 0

    def readable(self) -> bool:
        """Return that it can be read."""
        return True

    def seekable(self) -> bool:
        """Return that it can be read at any place."""
        return True

    def tell(self) -> int:
        """Return where the next read begins."""
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a place and return it."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        self._place = max(0, base + offset)
        return self._place

    def readinto(self, buffer: object) -> int:
        """Fill a buffer, as far as the file goes, and return how many bytes that were."""
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
        """Return blocks, those that are missing fetched."""
        held = {number: self._kept[number] for number in numbers if number in self._kept}
        for first, last in _runs([number for number in numbers if number not in held]):
            data = memoryview(self._fetch(first * self._block, min((last + 1) * self._block, self._size)))
            for number in range(first, last + 1):
                place = (number - first) * self._block
                held[number] = data[place : place + self._block]
        for number in numbers[-self._most :]:
            if number not in self._kept:
                self._kept[number] = memoryview(bytes(held[number]))  # a copy, lest it hold on to its neighbours
            self._kept.move_to_end(number)
        while len(self._kept) > self._most:
            self._kept.popitem(last=False)
        return held


def _runs(numbers: list[int]) -> list[tuple[int, int]]:
    """Return the first and last of each run of ascending numbers."""
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], number)
        else:
            runs.append((number, number))
    return runs
