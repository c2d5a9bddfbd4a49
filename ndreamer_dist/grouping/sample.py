"""Which of a condition's groups a cell is matched in, where it is matched in a sample of them (METHOD section 6).

The groups of a condition stand on a circle in a random order. A query group takes an arc of five times as many as a cell is
matched in, from its own place on; its first cell is matched in the first of the arc, the next cell in those after them, and so
on round the arc. So all groups are taken alike often, and the cells of a group, which are in random order, see all of its arc.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

ARC = 5
"""Groups of a condition that the cells of a query group are matched in together, in units of those of one cell."""
SEED = 0x5A3D1E
"""Tells these draws from others."""


def arc(groups: int, most: int, place: int, *, inside: bool) -> list[int]:
    """Return the groups of a condition that a query group's cells are matched in together, in the order of the arc.

    Parameters
    ----------
    groups
        How many the condition has.
    most
        In how many a cell is matched; with no more, or five times as many, the arc is all of them.
    place
        The query group's number among them, or any number.
    inside
        Whether the query group is one of them. It is then not taken.
    """
    order = _order(groups)
    start = int(np.flatnonzero(order == place % groups)[0])
    length = min(ARC * most, groups - inside)
    return order[(start + inside + np.arange(length)) % groups].tolist()


def takes(position: int, length: int, most: int, cells: np.ndarray) -> np.ndarray:
    """Return which cells of a query group are matched in a group at a position of its arc: (cells,) bool.

    Parameters
    ----------
    length
        Of the arc.
    cells
        (cells,) numbers of the cells in their group.
    """
    return (position - cells * most) % length < most


@lru_cache(maxsize=256)
def _order(groups: int) -> np.ndarray:
    """Return the order of groups on the circle."""
    return np.random.default_rng([SEED, groups]).permutation(groups)
