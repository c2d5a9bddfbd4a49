"""Summarise populations over their cells in streamed parts: effects and their spread, expression, quality of matches.

Input: a population code per cell (-1 for none), and the matches and expression of a finished run. Output: sums, means
and shares per population, and per gene or condition. Cells are not replicates, so nothing here tests a difference.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import sparse

from ndreamer_dist.cohort.design import Design
from ndreamer_dist.effects.averages import Average, average_through, segments
from ndreamer_dist.results.on_demand import Counterparts, Expression

PART_VALUES = 2**22
"""Most values, cells times genes, of one part."""


@dataclass
class EffectMoments:
    """Counts and sums of effects per population and gene: (populations, genes) float64.

    Attributes
    ----------
    number
        (populations,) number of cells.
    total, squares
        Sums of the effects and of their squares.
    positive, zero
        Numbers of cells with an effect above 0 and of 0, for the sign test.
    """

    number: np.ndarray
    total: np.ndarray
    squares: np.ndarray
    positive: np.ndarray
    zero: np.ndarray

    @classmethod
    def empty(cls, populations: int, genes: int) -> EffectMoments:
        """Return moments without any cell."""
        return cls(np.zeros(populations), *(np.zeros((populations, genes)) for _ in range(4)))

    def add(self, values: np.ndarray, population: np.ndarray) -> None:
        """Add the effects of cells, (cells, genes), with their population codes; cells with code -1 are ignored."""
        for place in np.unique(population[population >= 0]):
            part = values[population == place].astype(np.float64)
            self.number[place] += len(part)
            self.total[place] += part.sum(axis=0)
            self.squares[place] += (part**2).sum(axis=0)
            self.positive[place] += (part > 0).sum(axis=0)
            self.zero[place] += (part == 0).sum(axis=0)

    @property
    def mean(self) -> np.ndarray:
        """Means over cells; NaN without a cell."""
        with np.errstate(invalid="ignore"):
            return np.asarray(self.total / self.number[..., None])

    @property
    def spread(self) -> np.ndarray:
        """Standard deviations over cells; NaN for fewer than two cells."""
        n = self.number[..., None]
        with np.errstate(invalid="ignore", divide="ignore"):
            variance = (self.squares - self.total**2 / n) / (n - 1)
        return np.sqrt(np.where(n > 1, np.maximum(variance, 0), np.nan))


@dataclass(frozen=True)
class MatchQuality:
    """Quality of the control matches of the cells of each population, per condition: (populations, conditions) each.

    Attributes
    ----------
    purity
        Share of matches with a cell of the same population.
    effective_cells
        Effective number of control cells, `(sum w)^2 / sum w^2`, where w counts how often a cell is a match.
    without_overlap
        Share of cells without a near control match.
    """

    purity: np.ndarray
    effective_cells: np.ndarray
    without_overlap: np.ndarray


def population_count(populations: np.ndarray) -> int:
    """Return the number of populations in some codes; -1 means none, and each population has at least one cell."""
    return int(populations.max()) + 1


def parts(rows: np.ndarray, genes: int) -> Iterator[np.ndarray]:
    """Cut packed rows into parts of at most `PART_VALUES` values."""
    step = max(1, PART_VALUES // max(genes, 1))
    for start in range(0, len(rows), step):
        yield rows[start : start + step]


def rows_of_condition(design: Design, condition: int) -> np.ndarray:
    """Return the packed rows of a condition's cells, ascending."""
    return np.concatenate([np.arange(group.start, group.stop) for group in design.with_condition(condition)])


def placebo_halves(design: Design, baseline: int = 0) -> tuple[list[int], list[int]]:
    """Return the group codes of the control, or another baseline, in two alternating halves, for the placebo effect."""
    controls = [group.code for group in design.stored(baseline)]
    return controls[::2], controls[1::2]


def placebo_average(design: Design, counterparts: Counterparts, rows: np.ndarray, baseline: int = 0) -> Average:
    """Return the sparse average of the placebo effect: F over one half of the baseline's groups minus F over the other.

    Both halves have the baseline's condition, so the placebo effect is noise. A cell without a match in one of the
    halves has no placebo effect.

    Parameters
    ----------
    rows
        Packed rows of cells of the baseline, ascending.
    """
    halves = placebo_halves(design, baseline)
    side = {code: place for place, half in enumerate(halves) for code in half}
    pairs = {
        (group.code, target.code) for group, _ in segments(design, rows) for target in design.counted(baseline, group)
        if target.code in side
    }  # fmt: skip
    edges = counterparts.edges(rows, [(query, target) for query, target in pairs if query != target], distances=False)
    cells, matches, sides = [], [], []
    for group, here in segments(design, rows):
        for target in sorted(target for query, target in pairs if query == group.code):
            taking = design.taking(group, design.groups[target], rows[here] - group.start)
            near = rows[here] if target == group.code else edges[group.code, target][0][:, 0]
            matched = np.flatnonzero(taking & (near >= 0))
            cells.append(matched + here.start)
            matches.append(near[matched].astype(np.int64))
            sides.append(np.full(len(matched), side[target]))
    cell, half = np.concatenate(cells), np.concatenate(sides)
    number = np.bincount(2 * cell + half, minlength=2 * len(rows)).reshape(-1, 2)  # groups per cell and half
    both = (number.min(axis=1) > 0).astype(np.int64)
    weights = np.where(half == 0, 1.0, -1.0) / number[cell, half]
    return Average(cell, np.concatenate(matches), weights * both[cell], both)


def placebo_moments(
    populations: np.ndarray, counterparts: Counterparts, expression: Expression, columns: np.ndarray, baseline: int = 0
) -> EffectMoments | None:
    """Return the moments of the placebo effect over the baseline cells of each population.

    None if the baseline has fewer than two groups.
    """
    design = counterparts.design
    if len(design.stored(baseline)) < 2:
        return None
    moments = EffectMoments.empty(population_count(populations), len(columns))
    control = rows_of_condition(design, baseline)
    for rows in parts(control[populations[control] >= 0], len(columns)):
        average = placebo_average(design, counterparts, rows, baseline)
        needed = np.unique(average.row)
        (values,) = average_through([average], [(needed, expression.read(needed, columns))], len(columns))
        moments.add(values, np.where(average.groups > 0, populations[rows], -1))
    return moments


@dataclass(frozen=True)
class PlainExpression:
    """Measured expression of some cells, per population and gene: (populations, genes).

    Attributes
    ----------
    counts
        Mean normalised counts, `exp(x) - 1`.
    expressing
        Share of cells with a value above 0.
    """

    counts: np.ndarray
    expressing: np.ndarray


def plain_expression(
    populations: np.ndarray, rows: np.ndarray, expression: Expression, columns: np.ndarray
) -> PlainExpression:
    """Return the mean normalised counts and the share of expressing cells of some packed rows, per population."""
    chosen, number = rows[populations[rows] >= 0], population_count(populations)
    cells = np.bincount(populations[chosen], minlength=number).astype(np.float64)
    counts, expressing = (np.zeros((number, len(columns))) for _ in range(2))
    for part in parts(chosen, len(columns)):
        values = expression.read(part, columns)
        indicator = sparse.csr_matrix(
            (np.ones(len(part)), (populations[part], np.arange(len(part)))), shape=(number, len(part))
        )
        counts += (indicator @ values.astype(np.float64).expm1()).toarray()
        expressing += (indicator @ (values > 0).astype(np.float64)).toarray()
    with np.errstate(invalid="ignore"):
        return PlainExpression(counts / cells[:, None], expressing / cells[:, None])


def match_quality(
    populations: np.ndarray, near: np.ndarray, counterparts: Counterparts, conditions: Sequence[int], baseline: int = 0
) -> MatchQuality:
    """Return the quality of the matches with the control, or with another baseline.

    Parameters
    ----------
    populations
        (cells,) population code of each packed row; -1 for none.
    near
        (cells,) bool, whether a packed row has a near control match.
    conditions
        Codes of the conditions to summarise; the others have NaN.
    """
    design, number = counterparts.design, population_count(populations)
    shape = (number, len(design.conditions))
    pure, matched, used, squares, cells, far = (np.zeros(shape) for _ in range(6))
    control_rows = rows_of_condition(design, baseline)
    for condition in conditions:
        weight = np.zeros((number, len(control_rows)), dtype=np.float32)
        for group in design.with_condition(condition):
            rows = np.arange(group.start, group.stop)[populations[group.start : group.stop] >= 0]
            if not len(rows):
                continue
            code = populations[rows]
            cells[:, condition] += np.bincount(code, minlength=number)
            far[:, condition] += np.bincount(code[~near[rows]], minlength=number)
            pairs = [(group.code, control.code) for control in design.counted(baseline, group)]
            edges = counterparts.edges(rows, pairs, distances=False)
            for neighbours, _ in edges.values():
                first = neighbours[:, 0]
                has_match = first >= 0
                matched[:, condition] += np.bincount(code[has_match], minlength=number)
                same = has_match & (populations[np.maximum(first, 0)] == code)
                pure[:, condition] += np.bincount(code[same], minlength=number)
                np.add.at(weight, (code[has_match], np.searchsorted(control_rows, first[has_match])), 1.0)
        used[:, condition], squares[:, condition] = weight.sum(axis=1), (weight.astype(np.float64) ** 2).sum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return MatchQuality(pure / matched, used**2 / squares, far / cells)
