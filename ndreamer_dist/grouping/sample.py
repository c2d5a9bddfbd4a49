"""Sample the groups of a condition that each cell is matched with (METHOD section 6).

The groups of a condition are placed on a circle in a random order. The arc of a query group starts at the group's own
place and is five times as long as the number m of groups that one cell is matched with. The first cell of the group is
matched with the first m groups of the arc, the second cell with the next m, and so on round the arc. So all groups are
used equally often, and the cells of a query group, which are in random order, use its whole arc.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

ARC = 5
"""Length of an arc, as a multiple of the number of groups that one cell is matched with."""
SEED = 0x5A3D1E
"""Seed of the orders on the circles."""


def arc(groups: int, most: int, place: int, *, inside: bool) -> list[int]:
    """Return the arc of a query group: positions of groups among the condition's groups, in the order of the arc.

    Parameters
    ----------
    groups
        Number of groups of the condition.
    most
        Number of groups that one cell is matched with. The arc holds at most five times as many.
    place
        Position of the query group among the condition's groups; any number if it is not one of them.
    inside
        Whether the query group is one of the condition's groups; the arc then leaves it out.
    """
    order = _order(groups)
    start = int(np.flatnonzero(order == place % groups)[0])
    length = min(ARC * most, groups - inside)
    return order[(start + inside + np.arange(length)) % groups].tolist()


def takes(position: int, length: int, most: int, cells: np.ndarray) -> np.ndarray:
    """Return which cells of a query group are matched with the group at a position of its arc: (cells,) bool.

    Parameters
    ----------
    length
        Number of groups of the arc.
    most
        Number of groups that one cell is matched with.
    cells
        (cells,) positions of the cells in their group.
    """
    return (position - cells * most) % length < most


@lru_cache(maxsize=256)
def _order(groups: int) -> np.ndarray:
    """Return the random order of a condition's groups on the circle: (groups,)."""
    return np.random.default_rng([SEED, groups]).permutation(groups)
