"""State held: whether the match of a control cell in another donor is in the same state as the cell.

Input: the input cohort and the matches of a run. State is measured on genes that were not modelled, as these took no
part in the matching. Output: one share. Only a sample of the control cells, their matches and at most 1000 genes are
read, so memory does not grow with the cohort. Expression is first regressed on the logarithm of a cell's total counts,
because cells of similar depth look alike.
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
"""Most genes that state is measured on: those that most cells express."""
LEAST_GENES = 20
"""Genes without which state is not measured."""
LEAST_SAMPLED = 100
"""Sampled control cells that a population needs."""
LEAST_OF_GROUP = 5
"""Sampled cells of a population that a group needs for a mean to centre by."""
LEAST_SHARED, CLEAR = 0.1, 3.0
"""Least correlation of a cell's two scores, absolute and in standard errors, for state to count as measurable."""
FEWEST_PAIRS = 20
"""Pairs of a cell and its match that a population needs."""
TINY = 1e-12


@dataclass(frozen=True)
class StatePopulation:
    """The state of one population.

    Attributes
    ----------
    means, depths
        (groups, genes) mean expression and (groups,) mean log counts of its sampled cells; NaN for groups with few.
    slope
        (genes,) regression slope of expression on log counts within groups.
    axes
        The axes of state.
    """

    code: int
    means: np.ndarray
    depths: np.ndarray
    slope: np.ndarray
    axes: StateAxes

    @property
    def seen(self) -> bool:
        """Whether state can be measured in this population."""
        return bool(self.axes.shared >= max(LEAST_SHARED, CLEAR / np.sqrt(self.axes.cells)))


@dataclass(frozen=True)
class StateQuestion:
    """The sample of cells and genes on which every matching space is measured.

    Attributes
    ----------
    codes
        (cells,) population of every packed row, -1 for none.
    depth
        (cells,) logarithm of the total counts; 0 if the input was log-normalised.
    sample
        Packed rows of control cells, ascending; each is compared with its match in one other control group.
    columns
        (genes,) columns of genes that were not modelled, the most expressed first. Alternate genes form the two sets.
    populations
        The populations with a measurable state.
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
        """Choose cells and genes and fit the axes of state.

        Returns
        -------
        The question, or None if state cannot be measured; and the reason for a missing value.
        """
        if cohort is None:
            return None, "it is read from genes that were not modelled; give the input cohort with --cohort"
        expression, design = results.open_cohort(cohort), results.design
        names = np.asarray(expression.source.gene_names, dtype=object)
        unmodelled = np.flatnonzero(~np.isin(names, results.var_names.to_numpy(dtype=object)))
        sample = _sampled(design, cells)
        sample = sample[populations.codes[sample] >= 0]
        expressing = expression.read(sample, unmodelled).getnnz(axis=0) if len(sample) else np.zeros(len(unmodelled))
        expressed = np.argsort(-expressing, kind="stable")[: min(MOST_GENES, int((expressing > 0).sum()))]
        if len(expressed) < LEAST_GENES:
            few = f"it is read from genes that were not modelled, and cells express {len(expressed)} of these"
            return None, f"{few}; hvg.num_hvg below the {len(names)} genes of the cohort leaves some out"
        depth = np.zeros(design.n_cells) if expression.totals is None else np.log(np.maximum(expression.totals, 1.0))
        bare = cls(expression, populations.codes, depth, sample, unmodelled[expressed], design)
        every = (bare._population(int(code)) for code in np.unique(populations.codes[sample]))
        visible = tuple(population for population in every if population is not None and population.seen)
        if not visible:
            return (
                None,
                f"no population has {LEAST_SAMPLED} control cells in the sample and a state that can be seen in them",
            )
        return replace(
            bare, populations=visible
        ), f"no population has {FEWEST_PAIRS} sampled control cells with a match in it"

    def held(self, counterparts: Counterparts) -> float:
        """Return the share of state held by the matches of a space, mean over populations weighted by pairs; or NaN."""
        matched = self._matches(counterparts)
        pairs = np.stack([self.sample, matched], axis=1)
        pairs = pairs[(matched >= 0) & (_folds(self.sample) == _folds(matched))]
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
        """Fit a population's axes on its sampled cells; None if there are too few."""
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
        """Return the expression of both sets of genes, minus group mean and regression on depth: (rows, genes) each."""
        wanted, back = np.unique(rows, return_inverse=True)
        groups = self.design.group_of(rows)
        values = self.expression.read(wanted, self.columns).toarray().astype(np.float64)[back]
        values -= population.means[groups] + (self.depth[rows] - population.depths[groups])[:, None] * population.slope
        return values[:, ::2], values[:, 1::2]

    def _matches(self, counterparts: Counterparts) -> np.ndarray:
        """Return the match of every sampled cell in one other control group: (cells,), -1 for none.

        The cells of a group are dealt out evenly to the other control groups.
        """
        design = counterparts.design  # spaces may differ in the groups in which cells are matched
        controls = design.with_condition(0)
        matched = np.full(len(self.sample), -1, dtype=np.int64)
        for place, group in enumerate(controls):
            here = np.flatnonzero((self.sample >= group.start) & (self.sample < group.stop))
            counted = design.counted(0, group)
            others = [other for other in (*controls[place + 1 :], *controls[:place]) if other in counted]
            others = others or [group]  # a single control group: the nearest other cell of the group
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
    """Return packed rows of about `cells` control cells, the same share of every control group."""
    controls = design.with_condition(0)
    every = cells / sum(group.cells for group in controls) * design.n_cells  # size of the sample over all groups
    spans = sketch_spans(design, int(np.ceil(every)))
    return np.concatenate([np.arange(*spans[group.code]) for group in controls])


def _folds(rows: np.ndarray) -> np.ndarray:
    """Return the fold, 0 or 1, of packed rows: even or odd, as rows are in random order inside a group."""
    return rows % 2
