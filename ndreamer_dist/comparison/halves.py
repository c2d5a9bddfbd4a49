"""Split-half effects: the mean effects from two disjoint halves of the donors, to measure their agreement.

Input: the matches and expression of a run, a population per cell, a donor per group. Output: the mean effect of a
condition in every population, from each half of several splits. A half uses only the cells and the groups of its own
donors, treated and control, so the two halves share no cell.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy import sparse

from ndreamer_dist.cohort.design import Group
from ndreamer_dist.effects.averages import kernel_weights
from ndreamer_dist.stats.cate_table import StatisticsInput
from ndreamer_dist.stats.populations import READ_ROWS, Replicates
from ndreamer_dist.summaries.cells import population_count

SPLITS = 5
"""Random splits of the donors; correlations are averaged over them."""
LEAST_IN_HALF = 10
"""Treated cells of a population that each half needs."""
SPLIT_SEED = 0x5B117
"""Distinguishes these random draws from others with the same seed."""


def donor_halves(replicates: Replicates, seed: int) -> np.ndarray | None:
    """Split the donors into random halves, balanced among donors seen under the same conditions.

    Returns
    -------
    The half, 0 or 1, of every group in every split: (splits, groups). None if a group holds cells of several donors,
    whose matches cannot be separated.
    """
    design = replicates.design
    if len(replicates.pieces) != len(design.groups):
        return None
    donor_of_group = [replicates.donors[piece.replicate] for piece in replicates.pieces]
    conditions: dict[str, set[int]] = {}
    for donor, group in zip(donor_of_group, design.groups, strict=True):
        conditions.setdefault(donor, set()).add(group.condition)
    strata: dict[tuple[int, ...], list[str]] = {}
    for donor in sorted(conditions):
        strata.setdefault(tuple(sorted(conditions[donor])), []).append(donor)
    generator = np.random.default_rng(np.random.SeedSequence((seed, SPLIT_SEED)))
    splits = np.zeros((SPLITS, len(design.groups)), dtype=np.int64)
    for split in splits:
        half = {
            str(donor): place % 2
            for _, donors in sorted(strata.items())
            for place, donor in enumerate(generator.permutation(donors))
        }
        split[:] = [half[donor] for donor in donor_of_group]
    return splits


def half_effects(run: StatisticsInput, codes: np.ndarray, halves: np.ndarray, condition: int) -> np.ndarray:
    """Return the mean effect of a condition in every population, from each half: (splits, 2, populations, genes).

    It is NaN where a half has fewer than 10 treated cells of the population, or no treated or no control donor.

    Parameters
    ----------
    codes
        (cells,) population of every packed row, -1 for none.
    halves
        (splits, groups) half of every group, from `donor_halves`.
    """
    averages = _HalfEffects(run, codes, halves, condition)
    cells = averages.cells()
    effects = (averages.means(condition) - averages.means(0)).reshape(*cells.shape, -1)
    effects[cells < LEAST_IN_HALF] = np.nan
    return effects


@dataclass(frozen=True)
class _HalfEffects:
    """Averages over the treated cells of each half; the fields are the arguments of `half_effects`."""

    run: StatisticsInput
    codes: np.ndarray
    halves: np.ndarray
    condition: int

    @cached_property
    def number(self) -> int:
        """Number of populations."""
        return population_count(self.codes)

    def cells(self) -> np.ndarray:
        """Return the number of treated cells: (splits, 2, populations)."""
        cells = np.zeros((len(self.halves), 2, self.number), dtype=np.int64)
        for group in self.run.design.with_condition(self.condition):
            own = self.codes[group.start : group.stop]
            counts = np.bincount(own[own >= 0], minlength=self.number)
            for split, half in enumerate(self.halves[:, group.code]):
                cells[split, half] += counts
        return cells

    def means(self, side: int) -> np.ndarray:
        """Return the treated cells' mean expected expression under condition `side`: (splits * 2 * populations, genes).

        Matches come from groups of the same half. The mean is NaN where no cell has one.
        """
        count = len(self.halves) * 2 * self.number
        total, weight = np.zeros((count, len(self.run.columns))), np.zeros((count, 1))
        for target in self.run.design.with_condition(side):
            weights = self.weights(target)
            weight += weights.sum(axis=1)  # if groups are sampled, the number of matches in a half varies between cells
            for start in range(target.start, target.stop, READ_ROWS):
                rows = np.arange(start, min(start + READ_ROWS, target.stop))
                total += (weights[:, rows - target.start] @ self.run.expression.read(rows, self.run.columns)).toarray()
        return np.divide(total, weight, out=np.full_like(total, np.nan), where=weight > 0)

    def weights(self, target: Group) -> sparse.csr_matrix:
        """Return the total match weight of a target group's cells: (splits * 2 * populations, cells of the target)."""
        shape = (len(self.halves) * 2 * self.number, target.cells)
        total = sparse.csr_matrix(shape)
        for query in self.run.design.with_condition(self.condition):
            together = self.halves[:, query.code] == self.halves[:, target.code]
            rows = query.start + np.flatnonzero(self.codes[query.start : query.stop] >= 0)
            if not (together.any() and len(rows) and target in self.run.design.counted(target.condition, query)):
                continue
            near, weight = self._matches(rows, query, target)
            cell, place = np.nonzero(near >= 0)
            splits = np.flatnonzero(together)
            first = (splits * 2 + self.halves[splits, query.code]) * self.number
            places = (first[:, None] + self.codes[rows[cell]]).ravel()
            matched = np.tile(near[cell, place] - target.start, len(splits))
            each = np.tile(weight[cell, place], len(splits))
            total = total + sparse.coo_matrix((each, (places, matched)), shape=shape).tocsr()
        return total

    def _matches(self, rows: np.ndarray, query: Group, target: Group) -> tuple[np.ndarray, np.ndarray]:
        """Return the matches of cells in a target group and their weights in the effects: (cells, k) each."""
        if query == target:
            return rows[:, None], np.ones((len(rows), 1))
        counterparts, pair = self.run.counterparts, (query.code, target.code)
        near, distance = counterparts.edges(rows, [pair], distances=counterparts.neighbours > 1)[pair]
        most, stands_for = counterparts.neighbours, self.run.design.stands_for(target.condition, query)
        return near[:, :most].astype(np.int64), stands_for * kernel_weights(distance[:, :most], counterparts.bandwidth)
