"""The state that matches hold: whether the match of a control cell in another donor is in the same state as the cell.

Input: the input cohort and the matches of a run. The genes of the cohort that were not selected took no part in the
matching. Output: one share. Only a sample of the control cells, their matches and some hundred genes are read, so memory
does not grow with the cohort. The part that the total counts of a cell explain, linear in their logarithm, is removed
first, since cells of the same depth look alike.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ndreamer_dist.cohort.design import Design, Group
from ndreamer_dist.cohort.sketch import sketch_spans
from ndreamer_dist.comparison.labels import CellPopulations
from ndreamer_dist.comparison.measures import StateAxes, state_axes, state_held
from ndreamer_dist.results.on_demand import Counterparts, Expression
from ndreamer_dist.stats.results import Results

MOST_GENES = 1000
"""Genes that a state is read from: those that most cells express."""
LEAST_GENES = 20
LEAST_SAMPLED = 100
"""Sampled control cells of a population without which it is left out."""
LEAST_OF_GROUP = 5
"""Sampled cells of a population in a group without which a mean to centre by is none."""
LEAST_SHARED, CLEAR = 0.1, 3.0
"""A population has a state that could be held where the two scores of a cell correlate by this much, and by as many standard
errors of a correlation of nothing."""
FEWEST_PAIRS = 20
TINY = 1e-12


@dataclass(frozen=True)
class StatePopulation:
    """A population whose state is looked at.

    Attributes
    ----------
    means, depths
        (groups, genes) and (groups,) mean expression and log counts of its sampled cells, NaN where these are few.
    slope
        (genes,) expression by log counts, inside groups.
    """

    code: int
    means: np.ndarray
    depths: np.ndarray
    slope: np.ndarray
    axes: StateAxes

    @property
    def seen(self) -> bool:
        """Whether there is a state that could be held."""
        return bool(self.axes.shared >= max(LEAST_SHARED, CLEAR / np.sqrt(self.axes.cells)))


@dataclass(frozen=True)
class StateQuestion:
    """What is asked of every space alike.

    Attributes
    ----------
    codes
        (cells,) population of every packed row, -1 for none.
    depth
        (cells,) logarithm of the counts; 0 where the input was log-normalised.
    sample
        Packed rows of control cells, ascending; each is looked at with its match in one other control group.
    columns
        Genes that were not modelled, in the order of the cells that express them; every other one is of the first set.
    """

    expression: Expression
    codes: np.ndarray
    depth: np.ndarray
    sample: np.ndarray
    columns: np.ndarray
    design: Design
    populations: tuple[StatePopulation, ...] = ()

    @classmethod
    def of(
        cls, results: Results, populations: CellPopulations, cohort: Any, cells: int
    ) -> tuple[StateQuestion | None, str]:
        """Choose cells and genes and find the states; where there are none, nothing, and why."""
        if cohort is None:
            return None, "it is read from genes that were not modelled; give the input cohort with --cohort"
        expression, design = results.open_cohort(cohort), results.design
        names = np.asarray(expression.source.gene_names, dtype=object)
        unmodelled = np.flatnonzero(~np.isin(names, results.var_names.to_numpy(dtype=object)))
        sample = _sampled(design, cells)
        sample = sample[populations.codes[sample] >= 0]
        seen = expression.read(sample, unmodelled).getnnz(axis=0) if len(sample) else np.zeros(len(unmodelled))
        expressed = np.argsort(-seen, kind="stable")[: min(MOST_GENES, int((seen > 0).sum()))]
        if len(expressed) < LEAST_GENES:
            few = f"it is read from genes that were not modelled, and cells express {len(expressed)} of these"
            return None, f"{few}; hvg.num_hvg below the {len(names)} genes of the cohort leaves some out"
        depth = np.zeros(design.n_cells) if expression.totals is None else np.log(np.maximum(expression.totals, 1.0))
        bare = cls(expression, populations.codes, depth, sample, unmodelled[expressed], design)
        every = (bare._population(int(code)) for code in np.unique(populations.codes[sample]))
        seen_in = tuple(population for population in every if population is not None and population.seen)
        if not seen_in:
            return (
                None,
                f"no population has {LEAST_SAMPLED} control cells in the sample and a state that can be seen in them",
            )
        return replace(
            bare, populations=seen_in
        ), f"no match of {FEWEST_PAIRS} sampled control cells is of their population"

    def held(self, counterparts: Counterparts) -> float:
        """Return the share of the state that a space's matches hold, mean over populations by their pairs; NaN for none."""
        matched = self._matches(counterparts)
        pairs = np.stack([self.sample, matched], axis=1)
        pairs = pairs[(matched >= 0) & (self.sample % 2 == matched % 2)]  # see `_folds`
        shares, weights = [], []
        for population in self.populations:
            inside = pairs[(self.codes[pairs] == population.code).all(axis=1)]
            inside = inside[np.isfinite(population.means[self.design.group_of(inside), 0]).all(axis=1)]
            if len(inside) >= FEWEST_PAIRS:
                cells, matches = (self._centred(rows, population) for rows in inside.T)
                shares.append(state_held(population.axes, cells, matches, _folds(inside[:, 0])))
                weights.append(len(inside))
        return float(np.average(shares, weights=weights)) if shares else float("nan")

    def _population(self, code: int) -> StatePopulation | None:
        """Return a population's axes, from its sampled cells; none where they are few."""
        rows = self.sample[self.codes[self.sample] == code]
        groups = self.design.group_of(rows)
        counts = np.bincount(groups, minlength=len(self.design.groups))
        kept = counts[groups] >= LEAST_OF_GROUP
        rows, groups = rows[kept], groups[kept]
        if len(rows) < LEAST_SAMPLED:
            return None
        values = self.expression.read(rows, self.columns).toarray().astype(np.float64)
        means, depths = np.full((len(counts), len(self.columns)), np.nan), np.full(len(counts), np.nan)
        for group in np.unique(groups):
            means[group], depths[group] = values[groups == group].mean(axis=0), self.depth[rows[groups == group]].mean()
        depth = self.depth[rows] - depths[groups]
        slope = depth @ (values - means[groups]) / max(float(depth @ depth), TINY)
        residual = values - means[groups] - depth[:, None] * slope
        axes = state_axes(residual[:, ::2], residual[:, 1::2], _folds(rows))
        return StatePopulation(code, means, depths, slope, axes)

    def _centred(self, rows: np.ndarray, population: StatePopulation) -> tuple[np.ndarray, np.ndarray]:
        """Return expression of both sets of genes, less the group's mean and what depth explains: (rows, genes) each."""
        wanted, back = np.unique(rows, return_inverse=True)
        groups = self.design.group_of(rows)
        values = self.expression.read(wanted, self.columns).toarray().astype(np.float64)[back]
        values -= population.means[groups] + (self.depth[rows] - population.depths[groups])[:, None] * population.slope
        return values[:, ::2], values[:, 1::2]

    def _matches(self, counterparts: Counterparts) -> np.ndarray:
        """Return the match of every sampled cell in one other control group, in turn over these: (cells,), -1 for none."""
        design = counterparts.design  # spaces may differ in the groups that cells are matched in
        controls = design.with_condition(0)
        matched = np.full(len(self.sample), -1, dtype=np.int64)
        for place, group in enumerate(controls):
            here = np.flatnonzero((self.sample >= group.start) & (self.sample < group.stop))
            counted = design.counted(0, group)
            others = [other for other in (*controls[place + 1 :], *controls[:place]) if other in counted]
            others = others or [group]  # alone, a cell's nearest other cell
            for number, other in enumerate(others):
                taking = design.taking(group, other, self.sample[here] - group.start)
                chosen = here[taking & (matched[here] < 0)] if design.sampled else here[number :: len(others)]
                if len(chosen):
                    matched[chosen] = _nearest(counterparts, self.sample[chosen], group, other)
        return matched


def _nearest(counterparts: Counterparts, rows: np.ndarray, group: Group, other: Group) -> np.ndarray:
    pair = group.code, other.code
    return counterparts.edges(rows, [pair], distances=False)[pair][0][:, 0].astype(np.int64)


def _sampled(design: Design, cells: int) -> np.ndarray:
    """Return packed rows of control cells, about as many as asked for, the same share of every control group."""
    controls = design.with_condition(0)
    share = (
        cells / sum(group.cells for group in controls) * design.n_cells
    )  # of all groups, so that controls get theirs
    spans = sketch_spans(design, int(np.ceil(share)))
    return np.concatenate([np.arange(*spans[group.code]) for group in controls])


def _folds(rows: np.ndarray) -> np.ndarray:
    """Return which half of the cells packed rows are in: every other one, since rows are in random order inside a group."""
    return rows % 2
