"""Measure how similar mapped cells are to their matches in the run, to detect samples of another kind.

A low-dimensional space only shows what varies in the run, so cells of another tissue can lie in the midst of it.
Therefore the expression of all modelled genes is compared: of a mapped cell with its control matches, and, as a
reference, of the run's own cells with theirs. A bounded sample of cells and groups is enough.
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
"""Most groups of the run that are sampled, and most control groups that a cell is compared with."""
COMPARED_CELLS = 250
"""Most cells of a group that are compared: the first ones, whose order is random."""


def likenesses(
    run: RunDirectory, packed: Packed, groups: Sequence[Group], runtime: Runtime, title: str
) -> dict[str, np.ndarray]:
    """Return the likeness of some cells of each group to their matches in other control groups, by group name.

    The likeness of a cell is the correlation, over the modelled genes, of its expression with the mean expression of
    its nearest neighbours in those groups.

    Parameters
    ----------
    run
        Run directory that holds the matches.
    """
    return dict(runtime.map(_likeness, list(groups), run, packed, title=title))


def some(groups: Sequence[Group], most: int = COMPARED_GROUPS) -> list[Group]:
    """Return at most `most` of the groups, evenly spaced."""
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
    matched = near >= 0  # with sampled groups, a cell is matched in some of them only
    total = sum(
        values[np.searchsorted(wanted, rows)] * matched_here[:, None]
        for rows, matched_here in zip(near, matched, strict=True)
    )
    seen = matched.any(axis=0)
    mean = (total / np.maximum(matched.sum(axis=0), 1)[:, None])[seen]
    return group.name, _correlation(values[np.searchsorted(wanted, own)][seen], mean)


def _gathered(packed: Packed, rows: np.ndarray) -> sparse.csr_matrix:
    """Return the expression of ascending packed rows, which may be rows of the run or of mapped cells."""
    starts = packed.all_starts
    places = np.searchsorted(starts, rows, side="right") - 1
    parts = [packed.any_block(int(place))[rows[places == place] - starts[place]] for place in np.unique(places)]
    return sparse.vstack(parts, format="csr")


def _correlation(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return the Pearson correlation of each row of `one` with that of `other`: (rows,); 0 if either is constant."""
    one, other = (values - values.mean(axis=1, keepdims=True) for values in (one, other))
    scale = np.sqrt((one**2).sum(axis=1) * (other**2).sum(axis=1))
    return np.asarray((one * other).sum(axis=1) / np.where(scale > 0, scale, 1.0))
