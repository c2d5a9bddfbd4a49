"""Nearest neighbours between any two sets of cells, found when they are asked for, as the match stage finds them.

Input: the coordinates that cells were matched in, read by packed row, and the labels that they are matched inside.
Output: packed rows and distances. Nothing is stored. Coordinates of state are searched here as well, inside populations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from threadpoolctl import threadpool_limits

from ndreamer_dist.cohort.design import Design, Group
from ndreamer_dist.matching.exact import nearest
from ndreamer_dist.matching.hubs import nearest_inside, pool
from ndreamer_dist.matching.labels import Placed
from ndreamer_dist.matching.partition import build_index


@dataclass(frozen=True)
class SearchBetween:
    """A search between sets of packed rows.

    Attributes
    ----------
    points
        Reads the coordinates of packed rows (ascending): (rows, d) float32.
    labels
        (cells,) codes of the labels that cells are matched inside, -1 for none; or there are none.
    least
        Targets of a label that are enough: `match.within_cells`.
    corrected
        Whether distances are corrected for hubs: `match.hubs`.
    """

    points: Callable[[np.ndarray], np.ndarray]
    labels: np.ndarray | None
    least: int
    corrected: bool

    def __call__(
        self, queries: np.ndarray, targets: np.ndarray, asking: np.ndarray, k: int = 1
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the k nearest targets of every query, itself left out, and their distances: (queries, k) each.

        Parameters
        ----------
        queries, targets
            Packed rows, ascending.
        asking
            Packed rows of all cells that a target's remoteness is measured from, where it corrects distances.
        """
        place = np.searchsorted(targets, queries)
        own = np.where(targets[np.minimum(place, len(targets) - 1)] == queries, place, -1)
        corrected = self.corrected and not np.array_equal(asking, targets)
        rows, distances = np.full((len(queries), k), -1), np.full((len(queries), k), np.nan, dtype=np.float32)
        inside = (own >= 0) & corrected  # a query's own group is as the stage searches it: never corrected
        for part, asked in ((~inside, self._placed(asking) if corrected else None), (inside, None)):
            if part.any():
                near = nearest_inside(
                    self._placed(queries[part]), self._placed(targets), own[part], self.least, asked, k
                )
                rows[part], distances[part] = np.where(near.rows < 0, -1, targets[near.rows]), near.distances
        return rows, distances

    def edge(self, design: Design, query: Group, target: Group, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Return what the match stage would find for all cells of a group in another: packed rows and distances."""
        queries, targets = (np.arange(group.start, group.stop) for group in (query, target))
        taking = design.taking(query, target, queries - query.start)
        asking = pool(design.stored_starts(query.code), target.code) if design.sampled else queries
        rows, distances = np.full((len(queries), k), -1), np.full((len(queries), k), np.nan, dtype=np.float32)
        rows[taking], distances[taking] = self(queries[taking], targets, asking, k)
        return rows, distances

    def _placed(self, rows: np.ndarray) -> Placed:
        return Placed(self.points(rows), None if self.labels is None else self.labels[rows])


@dataclass(frozen=True)
class StateSpace:
    """Coordinates inside populations.

    Attributes
    ----------
    points
        (cells, k) float32.
    populations
        (cells,) population of every packed row that has coordinates, else -1.
    dimensions
        (populations,) how many coordinates each uses; 0 where it has none.
    reliability
        (populations,) mean share of a cell's coordinates that is signal; NaN where it has none.
    """

    points: np.ndarray
    populations: np.ndarray
    dimensions: np.ndarray
    reliability: np.ndarray


class StateNeighbours:
    """Nearest neighbours in state coordinates, inside populations: a `Nearest`.

    All cells that may ask are looked up in one piece at once, and kept until another piece is asked for.

    Parameters
    ----------
    rows
        Packed rows of the cells that may ask, ascending; by default all.
    """

    def __init__(self, space: StateSpace, rows: np.ndarray | None = None) -> None:
        self._space = space
        self._rows = np.arange(len(space.populations)) if rows is None else rows
        self._targets = np.empty(0, dtype=np.int64)
        self._found = np.empty(0, dtype=np.int64)

    def __call__(self, queries: np.ndarray, targets: np.ndarray, asking: np.ndarray) -> np.ndarray:  # noqa: ARG002
        """Return the nearest target of every query in its population, itself left out; -1 for none."""
        if not np.array_equal(targets, self._targets):
            with threadpool_limits(1):
                self._targets, self._found = targets, self._searched(targets)
        return self._found[np.searchsorted(self._rows, queries)]

    def _searched(self, targets: np.ndarray) -> np.ndarray:
        populations, points = self._space.populations, self._space.points
        found = np.full(len(self._rows), -1, dtype=np.int64)
        for code in np.unique(populations[targets]):
            if code < 0:
                continue
            asking = np.flatnonzero(populations[self._rows] == code)
            rows, near = self._rows[asking], targets[populations[targets] == code]
            k = self._space.dimensions[code]
            place = np.minimum(np.searchsorted(near, rows), len(near) - 1)
            own = np.where(near[place] == rows, place, -1)
            places = nearest(points[rows, :k], build_index(points[near, :k]), 1, exclude=own).rows[:, 0]
            found[asking] = np.where(places < 0, -1, near[places])
        return found
