"""The response of single cells: which treated cells show the effect of their population, and which escaped it.

Input: the matches and expression of a run, and a population and a donor per cell. Output: one number per treated cell.
A cell's effect is its expression minus that of its control matches. It is projected on the mean effect on the cells of
the *other* donors, so no cell contributes to its own reference; each gene is divided by its placebo variance. The
placebo is the same projection of control cells minus their matches in other control groups; its standard deviation is
the unit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from ndreamer_dist.results.on_demand import Question, Term, compute
from ndreamer_dist.stats.cate_table import StatisticsInput
from ndreamer_dist.stats.populations import Replicates
from ndreamer_dist.summaries.cells import parts, rows_of_condition

ESCAPED = 0.95
"""Quantile of the placebo up to which a cell counts as within it."""
CLEAR = 2.0
"""Standard errors that a gene's mean effect must exceed for the gene to have weight."""
PLACEBO_CELLS = 2000
"""Approximate most control cells of a population in the placebo."""


@dataclass
class Means:
    """Sums of cells' effects in one population and condition, by donor code."""

    cells: dict[int, int] = field(default_factory=dict)
    sums: dict[int, np.ndarray] = field(default_factory=dict)

    def add(self, donor: int, values: np.ndarray) -> None:
        """Add the effects of a donor's cells: (cells, genes)."""
        self.cells[donor] = self.cells.get(donor, 0) + len(values)
        self.sums[donor] = self.sums.get(donor, 0.0) + values.sum(axis=0)

    def others(self, donor: int) -> tuple[np.ndarray, int]:
        """Return the mean effect over the cells of all other donors, (genes,), and the number of these cells."""
        cells = sum(number for one, number in self.cells.items() if one != donor)
        total = sum(part for one, part in self.sums.items() if one != donor)
        return np.asarray(total / max(cells, 1)), cells


@dataclass(frozen=True)
class ResponseInput:
    """Input of `response_table`; `populations` is (cells,), a code per packed row and -1 for none."""

    sample: StatisticsInput
    replicates: Replicates
    populations: np.ndarray
    names: Sequence[str]


def response_table(source: ResponseInput, conditions: Sequence[int]) -> pd.DataFrame:
    """Return the table that `Results.response` documents."""
    tables = []
    design = source.sample.design
    for code in range(len(source.names)):
        control = _control_rows(source, code)
        if len(control) < 2:
            continue
        spread = _spread(source, control)
        for condition in conditions:
            rows = _rows_of(source, code, condition)
            if len(rows) > 1:
                name = design.conditions[condition]
                tables.append(
                    _responses(source, rows, control, spread).assign(population=source.names[code], condition=name)
                )
    columns = ["cell", "population", "condition", "placebo", "response", "within_placebo"]
    return pd.concat(tables, ignore_index=True)[columns] if tables else pd.DataFrame(columns=columns)


def _responses(source: ResponseInput, rows: np.ndarray, control: np.ndarray, spread: np.ndarray) -> pd.DataFrame:
    """Return the responses of one population and condition, followed by those of its placebo cells."""
    donor = source.replicates.of_cell[rows]
    if len(np.unique(donor)) == 1:
        donor = np.arange(len(rows)) % 2  # each half of the donor's cells is the reference of the other half
    means = Means()
    for part, values in _own_effects(source, rows):
        for one in np.unique(donor[part]):
            means.add(int(one), values[donor[part] == one])
    response = np.empty(len(rows))
    weights = {int(one): _weights(*means.others(int(one)), spread) for one in np.unique(donor)}
    everyone = np.stack(list(weights.values())).mean(axis=0)
    scaled = {one: weight / max(_size(source, control, weight), 1e-12) for one, weight in weights.items()}
    for part, values in _own_effects(source, rows):
        response[part] = [row @ scaled[int(one)] for row, one in zip(values, donor[part], strict=True)]
    unit = max(_size(source, control, everyone), 1e-12)
    placebo = [values @ everyone / unit for _, values in _own_effects(source, control)]
    value = np.concatenate([response, *placebo])
    is_placebo = np.arange(len(value)) >= len(rows)
    limit = np.quantile(value[is_placebo], ESCAPED)
    return pd.DataFrame(
        {
            "cell": source.sample.cells.index[np.concatenate([rows, control])], "placebo": is_placebo, "response": value,
            "within_placebo": value <= limit,
        }
    )  # fmt: skip


def _weights(mean: np.ndarray, cells: int, spread: np.ndarray) -> np.ndarray:
    """Return gene weights: mean effect over placebo variance, 0 where the effect is within `CLEAR` standard errors.

    If no gene exceeds its error, all genes that vary keep their weight.
    """
    varying = spread > 0
    clear = varying & (np.abs(mean) > CLEAR * spread / np.sqrt(max(cells, 1)))
    kept = clear if clear.any() else varying
    return np.where(kept, mean / np.where(varying, spread, 1.0) ** 2, 0.0)


def _size(source: ResponseInput, control: np.ndarray, weight: np.ndarray) -> float:
    values = np.concatenate([part @ weight for _, part in _own_effects(source, control)])
    return float(values.std())


def _spread(source: ResponseInput, control: np.ndarray) -> np.ndarray:
    """Return the standard deviation of the placebo, (genes,)."""
    total, squares = np.zeros((2, len(source.sample.columns)))
    for _, values in _own_effects(source, control):
        total, squares = total + values.sum(axis=0), squares + (values**2).sum(axis=0)
    return np.asarray(np.sqrt(np.maximum(squares / len(control) - (total / len(control)) ** 2, 0.0)))


def _rows_of(source: ResponseInput, code: int, condition: int) -> np.ndarray:
    rows = rows_of_condition(source.sample.design, condition)
    return rows[source.populations[rows] == code]


def _control_rows(source: ResponseInput, code: int) -> np.ndarray:
    """Return packed rows of evenly spaced control cells of a population, about `PLACEBO_CELLS` at most."""
    rows = _rows_of(source, code, 0)
    return rows[:: max(1, -(-len(rows) // PLACEBO_CELLS))]


def _own_effects(source: ResponseInput, rows: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Yield parts of `rows`, as slices, with the cells' expression minus that of their control matches.

    The matches of a control cell are those in other control groups, or in its own group if there is no other.
    """
    place = 0
    for part in parts(rows, len(source.sample.columns)):
        yield slice(place, place + len(part)), control_differences(source.sample, part)
        place += len(part)


def control_differences(source: StatisticsInput, rows: np.ndarray) -> np.ndarray:
    """Return the cells' expression minus that of their control matches, (rows, genes); see `_own_effects`."""
    design = source.design
    groups = design.group_of(rows)
    is_control = design.group_conditions[groups] == 0
    controls = np.array([design.number(0, group) for group in design.groups])[groups]
    alone = is_control & (controls == 1)
    differences = np.empty((len(rows), len(source.columns)))
    for code in np.unique(groups[alone]).tolist():
        here = alone & (groups == code)
        differences[here] = _differences_inside(source, rows[here], code)
    if not alone.all():
        question = Question((Term(0),), lambda own, sums: (own.toarray() - sums[0]).astype(np.float32), expression=True)
        # In its own group a control cell is its own counterpart, with difference 0: rescale to the mean over others.
        scale = np.where(is_control, controls / np.maximum(controls - 1, 1), 1.0)[~alone, None]
        effects = compute(question, source.counterparts, source.expression, rows[~alone], source.columns)
        differences[~alone] = effects.astype(np.float64) * scale
    return differences


def _differences_inside(source: StatisticsInput, rows: np.ndarray, code: int) -> np.ndarray:
    """Return the cells' expression minus that of their nearest other cell in their own group: (rows, genes)."""
    near = source.counterparts.edges(rows, [(code, code)], distances=False)[code, code][0][:, 0].astype(np.int64)
    held, back = np.unique(np.concatenate([rows, near]), return_inverse=True)
    values = source.expression.read(held, source.columns).toarray().astype(np.float64)[back]
    return values[: len(rows)] - values[len(rows) :]
