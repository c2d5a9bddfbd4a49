"""Read matches.zarr: the nearest neighbours of each cell along every searched edge, and their distances.

The stage `match` writes `DIR/matches.zarr`; effects, virtual layers and statistics read it here. Layout:
`<query group>/row` (cells of the group, groups, k) int32, the packed row of each neighbour, and
`<query group>/distance` float32, best first. An entry is -1 and NaN where the target group has fewer cells, or where
fewer neighbours were searched: groups of the same condition need k, other groups have the first `match.neighbours`. An
edge that was not searched has no chunks.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import zarr

from ndreamer_dist import keys
from ndreamer_dist.storage.arrays import open_array, read_array, touched_shards
from ndreamer_dist.storage.files import Storage

MOST_OPEN = 512
"""Arrays that are kept open, two a group."""


@dataclass(frozen=True)
class Matches:
    """Reader of a matches.zarr; an array is opened once."""

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
        span = (query_group, target_group, start, stop)
        return self.rows(*span), self.distances(*span)

    def rows(self, query_group: int, target_group: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Return the rows of `edge` alone."""
        return self._read(keys.MATCH_ROW, query_group, target_group, start, stop)

    def distances(self, query_group: int, target_group: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Return the distances of `edge` alone."""
        return self._read(keys.MATCH_DISTANCE, query_group, target_group, start, stop)

    def _read(self, what: str, query: int, target: int, start: int, stop: int | None) -> np.ndarray:
        name, part = f"{keys.block_name(query)}/{what}", (slice(start, stop), slice(target, target + 1), slice(None))
        return read_array(self.storage, name, part, opened=self._array(name))[:, 0]

    def _array(self, name: str) -> zarr.Array[Any]:
        if name not in self._opened:
            if len(self._opened) >= MOST_OPEN:
                self._opened.clear()
            self._opened[name] = open_array(self.storage, name)
        return self._opened[name]

    def holds(self, query_group: int, target_group: int) -> bool:
        """Return whether an edge was searched; an edge of which some chunks are there counts as searched."""
        name = f"{keys.block_name(query_group)}/{keys.MATCH_ROW}"
        array = self._array(name)
        part = (slice(None), slice(target_group, target_group + 1), slice(None))
        chunks = (array.metadata.encode_chunk_key(position) for position in touched_shards(array, part))
        return any(self.storage.exists(f"{name}/{chunk}") for chunk in chunks)
