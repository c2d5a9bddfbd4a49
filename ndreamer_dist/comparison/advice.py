"""The rule that advises a matching space, and the advice in words. Pure.

Input: a table of measures, a row per space. Output: the advice. The rule:

1. A space is excluded if its matches are in the wrong population or its effects contradict differences of means: purity
   more than .05 below the best space; or, unless donors are nested in conditions, correlation with differences of means
   more than .05 below the best; or, if they are nested, state held more than .15 below the best. If this would exclude
   all spaces, none is excluded.
2. Each remaining space gets a point for every criterion in which it is the best of these or tied with the best. The
   criteria are purity, overlap and state held; unless donors are nested, also correlation and slope with differences of
   means, and agreement between halves of the donors, if it reaches .1 in some space.
3. The space with most points wins. If donors are nested, a tie goes to `state`. Otherwise ties are broken by agreement
   between halves of the donors, then by time, then by the order of the table.

With nested donors, the differences of means and both halves of the donors contain changes of state between conditions. A
space that takes such a change for an effect agrees better with either, so neither is a criterion, and the space that was
made for this design wins ties (METHOD section 10).

Purity is a criterion only for labels: clusters of the expression favour the space that they were computed in, which is
most like `pca`. Mixing is no criterion, because better mixing did not give better effects (METHOD section 9).
Separation and silhouette are no criteria, because purity measures the same on the matches themselves. All measures are
shown, and the advice lists every one, criterion or not, in which any space, excluded or not, beats the advised one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd

from ndreamer_dist import keys

Better = Literal["high", "low", "one"]
TIE_ROUNDING = 1e-12
"""Tolerance for rounding when a difference is compared with a tie."""


@dataclass(frozen=True)
class Measure:
    """A measure: a column of the table.

    Attributes
    ----------
    name, title, meaning
        Name of the column, title in tables and figures, and explanation.
    better
        Whether high values, low values, or values near one are better.
    tie
        Difference up to which two spaces are tied; relative to the best where low values are better.
    criterion
        When the measure is a criterion.
    least
        It is a criterion only if the best space reaches this value.
    """

    name: str
    title: str
    meaning: str
    better: Better = "high"
    tie: float = 0.02
    criterion: Literal["always", "unless nested", "unless clustered", "never"] = "never"
    least: float = -math.inf

    def loss(self, values: np.ndarray) -> np.ndarray:
        """Return the distance of each value from the best one, 0 for the best; NaN stays NaN."""
        if not np.isfinite(values).any():
            return values
        worth = {"high": values, "low": -values, "one": -np.abs(values - 1)}[self.better]
        behind = np.nanmax(worth) - worth
        return behind / max(-np.nanmax(worth), 1e-12) if self.better == "low" else behind

    def beaten(self, values: np.ndarray) -> np.ndarray:
        """Return which values are worse than the best by more than a tie; False for NaN."""
        with np.errstate(invalid="ignore"):
            return self.loss(values) > self.tie + TIE_ROUNDING


MEASURES: tuple[Measure, ...] = (
    Measure(
        "purity", "purity", "share of control matches in the cell's own population", tie=0.01,
        criterion="unless clustered",
    ),
    Measure("overlap", "overlap", "share of treated cells with a near control match", tie=0.05, criterion="always"),
    Measure("mixing", "iLISI", "mixing of batches and conditions around a cell, 0 (none) to 1 (full)"),
    Measure("separation", "cLISI", "separation of populations around a cell, 0 (none) to 1 (full)"),
    Measure("silhouette", "silhouette", "silhouette of the populations, -1 to 1"),
    Measure(
        "agreement", "r", "correlation over genes of mean effects with differences of population means",
        tie=0.01, criterion="unless nested",
    ),
    Measure(
        "slope", "slope", "slope of mean effects on differences of population means", better="one", tie=0.05,
        criterion="unless nested",
    ),
    Measure(
        "split_half", "split-half r", "correlation over genes of effects from two disjoint halves of the donors",
        criterion="unless nested", least=0.1,
    ),
    Measure(
        "state_held", "state held", "share of a cell's state that its match has, corrected for noise", tie=0.05,
        criterion="always",
    ),
    Measure("seconds", "seconds", "run time from input to effects, with shared stages", better="low", tie=0.1),
    Measure("peak_gb", "peak GB", "peak memory from input to effects", better="low", tie=0.1),
)  # fmt: skip
BEHIND = {"purity": 0.05, "agreement": 0.05, "state_held": 0.15}
"""Difference from the best space beyond which a space is excluded."""
SHIFT_OR_EFFECT = (
    "With nested donors, a higher r can be a change of state that is taken for an effect, and a lower r an effect that is taken for "
    "a change of state. No column here tells them apart; `cate` tests both parts, within_state and state_shift."
)
GUARDS, GUARDS_NESTED = ("purity", "agreement"), ("purity", "state_held")
"""Measures that can exclude a space: for donors that are not nested in conditions, and for nested ones."""


@dataclass(frozen=True)
class Advice:
    """The advised space and the reasons.

    Attributes
    ----------
    space
        Name of the advised space.
    why, losses, aside
        Sentences: reasons for the space, measures in which another space is better, and excluded spaces.
    """

    space: str
    why: tuple[str, ...]
    losses: tuple[str, ...] = ()
    aside: tuple[str, ...] = ()

    def sentences(self) -> list[str]:
        """Return all sentences, the advice first."""
        return [*self.why, *self.aside, *self.losses]


def advise(table: pd.DataFrame, *, nested: bool, clustered: bool) -> Advice:
    """Return the advised space, by the rule in the module's docstring.

    Parameters
    ----------
    table
        A row per space, with a column `space` and one per measure; NaN where a measure is missing.
    nested
        Whether donors are nested in conditions.
    clustered
        Whether populations are clusters of the expression.
    """
    names = [str(name) for name in table["space"]]
    if len(names) == 1:
        return Advice(names[0], (f"Only one space, {names[0]}, was measured, so there is no choice to make.",))
    counts = {"always": True, "unless nested": not nested, "unless clustered": not clustered, "never": False}
    criteria = [m for m in MEASURES if counts[m.criterion] and table[m.name].max() >= m.least]
    aside, note = _set_aside(table, [m for m in criteria if m.name in (GUARDS_NESTED if nested else GUARDS)])
    left = np.array([name not in aside for name in names])
    won = {m.name: _won(m, table[m.name].to_numpy(dtype=float), left) for m in criteria}
    points = np.sum([*won.values(), np.zeros(len(names))], axis=0)
    points[~left] = -1
    first, tie_break = _first(table, points, nested=nested)
    why = _why(names, points, first, tie_break, [m.title for m in criteria if won[m.name][first]], len(criteria))
    losses = _losses(table, first, {m.name for m in criteria})
    if nested and _shifted(table, first):
        losses.append(SHIFT_OR_EFFECT)
    return Advice(names[first], (why,), tuple(losses), (*note, *aside.values()))


def differing_settings(settings: Mapping[str, Mapping[str, Any]]) -> tuple[str, ...]:
    """Return a sentence for every match setting in which the spaces differ.

    Parameters
    ----------
    settings
        By space, the values by name of the setting.
    """
    names = list(dict.fromkeys(name for values in settings.values() for name in values))
    by_name = {name: {space: values.get(name) for space, values in settings.items()} for name in names}
    return tuple(
        f"The spaces also differ in {name} ({', '.join(f'{space} {value}' for space, value in values.items())}), so the "
        "table does not compare the spaces alone; `run --redo` matches a space again."
        for name, values in by_name.items()
        if any(value != next(iter(values.values())) for value in values.values())
    )


def _why(names: list[str], points: np.ndarray, first: int, tie_break: str, best_in: list[str], criteria: int) -> str:
    """Return the sentences that name the advised space and the points of all."""
    if not criteria:
        return f"No criterion could be measured, so the data favour no space; {names[first]} is named by default."
    others = [
        f"{name} {int(n)}"
        for place, (name, n) in enumerate(zip(names, points, strict=True))
        if n >= 0 and place != first
    ]
    where = f" ({', '.join(best_in)})" if best_in else ""
    rest = f"points of the other spaces: {', '.join(others)}" if others else "all other spaces are excluded"
    return (
        f"Use {names[first]}: it is the best, or tied with the best, in {int(points[first])} of {criteria} "
        f"criteria{where}; {rest}.{tie_break}"
    )


def _set_aside(table: pd.DataFrame, guards: list[Measure]) -> tuple[dict[str, str], list[str]]:
    """Return the excluded spaces with a sentence each; if these would be all, none and a note."""
    aside: dict[str, str] = {}
    for measure in guards:
        values = table[measure.name].to_numpy(dtype=float)
        best = int(np.nanargmax(values))
        for place in np.flatnonzero(np.nan_to_num(measure.loss(values)) > BEHIND[measure.name] + TIE_ROUNDING):
            name = str(table["space"].iloc[place])
            aside.setdefault(name, (
                f"{name} is excluded: its {measure.title} is {_shown(measure, values[place])}, against "
                f"{_shown(measure, values[best])} for {table['space'].iloc[best]}."
            ))  # fmt: skip
    if len(aside) == len(table):
        return {}, ["Every space is far behind another in purity, r or state held, so none is excluded."]
    return aside, []


def _won(measure: Measure, values: np.ndarray, left: np.ndarray) -> np.ndarray:
    """Return which of the spaces in `left` are the best of these, or tied with it."""
    among = np.where(left, values, np.nan)
    return np.isfinite(among) & ~measure.beaten(among)


def _shifted(table: pd.DataFrame, first: int) -> bool:
    """Return whether the effects in another space agree much better with differences of means, as changes of state do."""
    r = table["agreement"].to_numpy(dtype=float)
    return bool(np.nanmax([*r, -math.inf]) - r[first] > BEHIND["agreement"])


def _first(table: pd.DataFrame, points: np.ndarray, *, nested: bool) -> tuple[int, str]:
    """Return the position of the space with most points, and a sentence on how a tie was broken."""
    equal = np.flatnonzero(points == points.max())
    if len(equal) == 1:
        return int(equal[0]), ""
    tie = " Another space has as many points; the tie is broken by"
    for_nested = equal[(table["space"].to_numpy()[equal] == keys.STATE) & nested]
    if len(for_nested):
        return int(for_nested[0]), f"{tie} the design, since the space state is made for nested donors."
    halves = next(m for m in MEASURES if m.name == "split_half")
    agreement = table["split_half"].to_numpy(dtype=float)[equal]
    if not nested and np.nanmax([*agreement, -math.inf]) >= halves.least:
        equal = equal[_won(halves, agreement, np.ones(len(equal), dtype=bool))]
        if len(equal) == 1:
            return int(equal[0]), f"{tie} agreement between halves of the donors."
    seconds = table["seconds"].to_numpy(dtype=float)[equal]
    fastest = equal[seconds == np.min(seconds, initial=np.inf, where=np.isfinite(seconds))]
    if len(fastest) == 1:
        return int(fastest[0]), f"{tie} run time."
    return int((*fastest, *equal)[0]), f"{tie} the order of the table."


def _losses(table: pd.DataFrame, first: int, criteria: set[str]) -> list[str]:
    """Return a sentence for every measure in which the advised space is beaten, or that only other spaces have."""
    sentences = []
    for measure in MEASURES:
        values = table[measure.name].to_numpy(dtype=float)
        if not np.isfinite(values).any():
            continue
        best = int(np.nanargmin(measure.loss(values)))
        other = f"{_shown(measure, values[best])} for {table['space'].iloc[best]}"
        if math.isnan(values[first]):
            sentences.append(f"Its {measure.title} could not be measured, unlike that of other spaces ({other}).")
        elif measure.beaten(values)[first]:
            note = "" if measure.name in criteria else ", which is no criterion here"
            sentences.append(
                f"It is worse in {measure.title}{note}: {_shown(measure, values[first])}, against {other}."
            )
    return sentences


def _shown(measure: Measure, value: float) -> str:
    return f"{value:.3g}" if measure.better == "low" else f"{value:.3f}"
