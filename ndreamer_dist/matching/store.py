"""Read matches.zarr: the nearest neighbours of each cell along every searched edge, and their distances.

The stage `match` writes `DIR/matches.zarr`. Effects, virtual layers and statistics read it here. Layout:
`<query group>/row` (cells of the group, groups, k) int32, the packed row of each neighbour, and
`<query group>/distance` float32, best first. An entry is -1 and NaN if the target group has fewer cells, or if fewer
neighbours were searched: edges between groups of one condition have all k, other edges have `match.neighbours`. An edge
that was not searched has no chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import zarr

from ndreamer_dist import keys
from ndreamer_dist.storage.arrays import open_array, touched_shards
from ndreamer_dist.storage.files import Storage
from ndreamer_dist.storage.shards import Place, Position, read_chunks

MOST_OPEN = 512
"""Largest number of open arrays; each query group has two."""


def row_dtype(cells: int) -> str:
    """Return the smaller of int32 and int64 that can hold the row numbers of so many cells."""
    return "int32" if cells <= np.iinfo(np.int32).max else "int64"


@dataclass(frozen=True)
class Matches:
    """Reader of a matches.zarr. It keeps arrays open between calls."""

    storage: Storage
    _opened: dict[str, zarr.Array[Any]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def edge(
        self, query_group: int, target_group: int, start: int = 0, stop: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return rows and distances of the cells `start:stop` of a group in a target group: (cells, k) each.

        Raises
        ------
        StoreError
            The edge was not searched, or a chunk is missing or damaged.
        """
        return self.edges(query_group, [target_group], start, stop)[target_group]

    def edges(
        self, query_group: int, target_groups: Sequence[int], start: int = 0, stop: int | None = None
    ) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        """Return the result of `edge` for several target groups, by target group; they are read together."""
        rows, distances = (
            self._read(what, query_group, target_groups, start, stop) for what in (keys.MATCH_ROW, keys.MATCH_DISTANCE)
        )
        return {target: (rows[place], distances[place]) for place, target in enumerate(target_groups)}

    def rows(self, query_group: int, target_group: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Return only the rows of `edge`: (cells, k)."""
        return self._read(keys.MATCH_ROW, query_group, [target_group], start, stop)[0]

    def distances(
        self, query_group: int, target_groups: Sequence[int], start: int = 0, stop: int | None = None
    ) -> np.ndarray:
        """Return only the distances of `edges`: (target groups, cells, k)."""
        return self._read(keys.MATCH_DISTANCE, query_group, target_groups, start, stop)

    def _read(self, what: str, query: int, targets: Sequence[int], start: int, stop: int | None) -> np.ndarray:
        name = f"{keys.block_name(query)}/{what}"
        array = self._array(name)
        size, stop = array.chunks[0], array.shape[0] if stop is None else stop
        values = np.empty((len(targets), stop - start, array.shape[2]), dtype=array.dtype)
        places = {target: place for place, target in enumerate(targets)}
        numbers = range(start // size, -(-stop // size))

        def put(position: Position, chunk: np.ndarray) -> None:
            first = position[0] * size
            low, high = max(start, first), min(stop, first + size)
            values[places[position[1]], low - start : high - start] = chunk[low - first : high - first, 0]

        positions = [(number, target, 0) for target in targets for number in numbers]
        read_chunks(array, Place(self.storage.url, name), positions, put)
        return values

    def _array(self, name: str) -> zarr.Array[Any]:
        if name not in self._opened:
            if len(self._opened) >= MOST_OPEN:
                self._opened.clear()
            self._opened[name] = open_array(self.storage, name)
        return self._opened[name]

    def holds(self, query_group: int, target_group: int) -> bool:
        """Return whether an edge was searched, which is true if any of its chunks exists."""
        name = f"{keys.block_name(query_group)}/{keys.MATCH_ROW}"
        array = self._array(name)
        part = (slice(None), slice(target_group, target_group + 1), slice(None))
        chunks = (array.metadata.encode_chunk_key(position) for position in touched_shards(array, part))
        return any(self.storage.exists(f"{name}/{chunk}") for chunk in chunks)
