"""How like mapped cells are to those of the run: whether they are of the same kind of sample at all.

A space of few dimensions sees of a cell what varies in the run, and nothing else: cells of another tissue may well lie amid
it. So their whole expression of the modelled genes is compared with that of the cells that they are matched with, and that
with what the run's own cells have: a share of cells, of a bounded number of each of some groups.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import sparse

from ndreamer_dist import keys
from ndreamer_dist.cohort.design import Group
from ndreamer_dist.cohort.packed import Packed
from ndreamer_dist.compute.executor import Runtime
from ndreamer_dist.matching.store import Matches
from ndreamer_dist.rundir.directory import RunDirectory

COMPARED_GROUPS = 8
"""Groups of the run that are looked at, and control groups that a cell is compared with."""
COMPARED_CELLS = 250
"""Cells of a group that are looked at; they lie in random order."""


def likenesses(
    run: RunDirectory, packed: Packed, groups: Sequence[Group], runtime: Runtime, title: str
) -> dict[str, np.ndarray]:
    """Return how like cells of some groups are to their nearest cells in other control groups, by the groups' names.

    That is the correlation, over the modelled genes, of a cell's expression with the mean of its nearest cells'.

    Parameters
    ----------
    run
        Directory of the matches.
    """
    return dict(runtime.map(_likeness, list(groups), run, packed, title=title))


def some(groups: Sequence[Group], most: int = COMPARED_GROUPS) -> list[Group]:
    """Return some of the groups, evenly spaced."""
    places = np.unique(np.linspace(0, len(groups) - 1, min(most, len(groups))).astype(int))
    return [groups[place] for place in places.tolist()]


def _likeness(group: Group, run: RunDirectory, packed: Packed) -> tuple[str, np.ndarray]:
    """Return a group's name and the likeness of its first cells; a task."""
    controls = packed.design.stored(0)
    counted = packed.design.counted(0, group)
    others = [other for other in controls if other != group and other in counted]
    targets = some(others, max(1, min(COMPARED_GROUPS, len(controls) - 1)))
    count = min(COMPARED_CELLS, group.cells)
    if not targets:
        return group.name, np.empty(0)
    matches = Matches(run.storage / keys.MATCHES)
    near = np.stack([matches.rows(group.code, target.code, 0, count)[:, 0].astype(np.int64) for target in targets])
    own = np.arange(group.start, group.start + count)
    wanted = np.unique(np.concatenate([own, near[near >= 0]]))
    values = _gathered(packed, wanted).toarray().astype(np.float64)
    known = near >= 0  # a cell may be matched in some of the groups alone
    total = sum(values[np.searchsorted(wanted, rows)] * there[:, None] for rows, there in zip(near, known, strict=True))
    seen = known.any(axis=0)
    mean = (total / np.maximum(known.sum(axis=0), 1)[:, None])[seen]
    return group.name, _correlation(values[np.searchsorted(wanted, own)][seen], mean)


def _gathered(packed: Packed, rows: np.ndarray) -> sparse.csr_matrix:
    """Return rows (ascending, as the design counts them) from the blocks that hold them."""
    starts = packed.all_starts
    places = np.searchsorted(starts, rows, side="right") - 1
    parts = [packed.any_block(int(place))[rows[places == place] - starts[place]] for place in np.unique(places)]
    return sparse.vstack(parts, format="csr")


def _correlation(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return the correlation of rows with rows: (rows,); 0 where one does not vary."""
    one, other = (values - values.mean(axis=1, keepdims=True) for values in (one, other))
    scale = np.sqrt((one**2).sum(axis=1) * (other**2).sum(axis=1))
    return np.asarray((one * other).sum(axis=1) / np.where(scale > 0, scale, 1.0))
