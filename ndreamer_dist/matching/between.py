"""Search nearest neighbours between any two sets of cells on demand, with the same result as the match stage.

Input: coordinates of the matching space, read by packed row, and the labels that restrict matches. Output: packed rows
and distances. Nothing is stored. `StateNeighbours` searches the state coordinates inside populations.
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
    """A nearest-neighbour search between sets of packed rows.

    Attributes
    ----------
    points
        Function that reads the coordinates of ascending packed rows: (rows, d) float32.
    labels
        (cells,) label codes for matching inside labels, -1 for an unlabelled cell; None without `match.within`.
    least
        Fewest targets of a label for a match inside it: `match.within_cells`.
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
        """Return packed rows and distances of the k nearest targets of each query: (queries, k) each.

        A query is never its own match. Missing neighbours are -1 and NaN.

        Parameters
        ----------
        queries, targets
            Packed rows, ascending.
        asking
            Packed rows of the query population. The hub correction measures the remoteness of targets from them.
        """
        place = np.searchsorted(targets, queries)
        own = np.where(targets[np.minimum(place, len(targets) - 1)] == queries, place, -1)
        corrected = self.corrected and not np.array_equal(asking, targets)
        rows, distances = np.full((len(queries), k), -1), np.full((len(queries), k), np.nan, dtype=np.float32)
        inside = (own >= 0) & corrected  # like the stage, never correct distances inside a query's own group
        for part, measured_from in ((~inside, self._placed(asking) if corrected else None), (inside, None)):
            if part.any():
                near = nearest_inside(
                    self._placed(queries[part]), self._placed(targets), own[part], self.least, measured_from, k
                )
                rows[part], distances[part] = np.where(near.rows < 0, -1, targets[near.rows]), near.distances
        return rows, distances

    def edge(self, design: Design, query: Group, target: Group, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Return rows and distances of all matches of one group in another, as the match stage finds them."""
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
    """State coordinates of cells, separate for each population (METHOD section 10).

    Attributes
    ----------
    points
        (cells, k) float32 coordinates, in packed order.
    populations
        (cells,) population code of every packed row, -1 for a cell without coordinates.
    dimensions
        (populations,) number of coordinates that each population uses; 0 if it has none.
    reliability
        (populations,) mean share of signal in the coordinates; NaN if the population has none.
    """

    points: np.ndarray
    populations: np.ndarray
    dimensions: np.ndarray
    reliability: np.ndarray


class StateNeighbours:
    """Nearest neighbours in state coordinates, inside populations; implements the protocol `Nearest`.

    The first call for a set of targets searches the neighbours of all possible queries. Later calls with the same
    targets reuse them.

    Parameters
    ----------
    rows
        Packed rows of all possible queries, ascending; by default all cells.
    """

    def __init__(self, space: StateSpace, rows: np.ndarray | None = None) -> None:
        self._space = space
        self._rows = np.arange(len(space.populations)) if rows is None else rows
        self._targets = np.empty(0, dtype=np.int64)
        self._found = np.empty(0, dtype=np.int64)

    def __call__(self, queries: np.ndarray, targets: np.ndarray, asking: np.ndarray) -> np.ndarray:  # noqa: ARG002
        """Return the packed row of each query's nearest other target in its population, -1 for none: (queries,)."""
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
