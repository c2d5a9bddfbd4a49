"""Which matching space to take: the rule, and what it says in words. Pure.

A table of measures comes in, a row per space; advice goes out. The rule:

1. A space is set aside whose matches are of the wrong kind or whose effects are others than what is plain to see: purity
   more than .05 below the best space's; or, where donors are not nested in conditions, correlation with differences of means
   more than .05 below the best; or, where they are nested, state held more than .15 below the best. If that would leave
   no space, none is set aside.
2. Of the others, each gets a point for every criterion in which it is the best of these, or within a tie of the best. Criteria
   are purity, overlap and state held; where donors are not nested, also correlation and slope with differences of means,
   and, where halves of the donors agree at all in some space, how well they do.
3. Most points win. Of equals, where donors are nested, `state`; where they are not, the one whose halves of donors agree
   better, beyond a tie; then the faster; then the first in the table.

Where donors are nested, a change of state between conditions is in the differences of means, and in both halves of the donors:
a space that takes it for an effect agrees better with either. So neither counts, and the space that was made for this
wins of equals (METHOD section 10).

Purity counts where populations are labels: clusters of the expression are themselves the view of one space, most like `pca`.
Mixing is no criterion: effects were not better where it was (METHOD section 9). Separation and the silhouette rate how labels
lie apart, which purity says of the matches themselves. All are shown, and the words name every column, criterion or not, in
which the advised space is beaten by any other, set aside or not.
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


@dataclass(frozen=True)
class Measure:
    """A column of the table.

    Attributes
    ----------
    better
        Whether high or low values are better, or those near one.
    tie
        Difference up to which two spaces are equal; of `seconds` and `peak_gb` a share of the best.
    criterion
        Whether it counts: always, never, unless donors are nested in conditions, or unless populations are clusters.
    least
        It counts only where the best space has this much.
    """

    name: str
    title: str
    meaning: str
    better: Better = "high"
    tie: float = 0.02
    criterion: Literal["always", "unless nested", "unless clustered", "never"] = "never"
    least: float = -math.inf

    def loss(self, values: np.ndarray) -> np.ndarray:
        """Return how far values are from what is best: 0 for the best, NaN stays."""
        if not np.isfinite(values).any():
            return values
        worth = {"high": values, "low": -values, "one": -np.abs(values - 1)}[self.better]
        behind = np.nanmax(worth) - worth
        return behind / max(-np.nanmax(worth), 1e-12) if self.better == "low" else behind

    def beaten(self, values: np.ndarray) -> np.ndarray:
        """Return which values are worse than the best by more than a tie; a missing one is not."""
        with np.errstate(invalid="ignore"):
            return self.loss(values) > self.tie + TIE_ROUNDING


MEASURES: tuple[Measure, ...] = (
    Measure("purity", "purity", "share of control matches of the cell's own population", tie=0.01, criterion="unless clustered"),
    Measure("overlap", "overlap", "share of treated cells with a near control match", tie=0.05, criterion="always"),
    Measure("mixing", "iLISI", "how mixed batches and conditions are around a cell, 0 to 1"),
    Measure("separation", "cLISI", "how far populations are apart around a cell, 0 to 1"),
    Measure("silhouette", "silhouette", "silhouette of the populations, -1 to 1"),
    Measure(
        "agreement", "r", "correlation of mean effects with differences of population means, over genes",
        tie=0.01, criterion="unless nested",
    ),
    Measure(
        "slope", "slope", "slope of mean effects on these differences", better="one", tie=0.05, criterion="unless nested"
    ),
    Measure(
        "split_half", "split-half r", "correlation of the effects of two disjoint halves of the donors",
        criterion="unless nested", least=0.1,
    ),
    Measure(
        "state_held", "state held", "share of a cell's state that its match has, corrected for noise", tie=0.05,
        criterion="always",
    ),
    Measure("seconds", "seconds", "from input to effects, shared stages counted in each", better="low", tie=0.1),
    Measure("peak_gb", "peak GB", "most memory of any of these stages", better="low", tie=0.1),
)  # fmt: skip
BEHIND = {"purity": 0.05, "agreement": 0.05, "state_held": 0.15}
"""How far behind the best space a space is set aside."""
SHIFT_OR_EFFECT = (
    "Where donors are nested, a higher r can be a change of state that is taken for an effect, a lower one an effect that is taken "
    "for a change of state, and no column here says which; `cate` tests both parts, within_state and state_shift."
)
GUARDS, GUARDS_NESTED = ("purity", "agreement"), ("purity", "state_held")


@dataclass(frozen=True)
class Advice:
    """Which space to take.

    Attributes
    ----------
    space
        Its name.
    why, losses, aside
        Sentences: what speaks for it, the columns in which another space is better, and the spaces that were set aside.
    """

    space: str
    why: tuple[str, ...]
    losses: tuple[str, ...] = ()
    aside: tuple[str, ...] = ()

    def sentences(self) -> list[str]:
        """Return all of it, the advice first."""
        return [*self.why, *self.aside, *self.losses]


def advise(table: pd.DataFrame, *, nested: bool, clustered: bool) -> Advice:
    """Return which space to take, by the rule at the head of this module.

    Parameters
    ----------
    table
        A row per space, with a column `space` and one per measure; NaN where it could not be had.
    nested
        Whether donors are nested in conditions.
    clustered
        Whether populations are clusters of the expression.
    """
    names = [str(name) for name in table["space"]]
    if len(names) == 1:
        return Advice(names[0], (f"There is one space alone, {names[0]}: nothing to choose from.",))
    counts = {"always": True, "unless nested": not nested, "unless clustered": not clustered, "never": False}
    criteria = [m for m in MEASURES if counts[m.criterion] and table[m.name].max() >= m.least]
    aside, note = _set_aside(table, [m for m in criteria if m.name in (GUARDS_NESTED if nested else GUARDS)])
    left = np.array([name not in aside for name in names])
    won = {m.name: _won(m, table[m.name].to_numpy(dtype=float), left) for m in criteria}
    points = np.sum([*won.values(), np.zeros(len(names))], axis=0)
    points[~left] = -1
    first, how = _first(table, points, nested=nested)
    why = _why(names, points, first, how, [m.title for m in criteria if won[m.name][first]], len(criteria))
    losses = _losses(table, first, {m.name for m in criteria})
    if nested and _shifted(table, first):
        losses.append(SHIFT_OR_EFFECT)
    return Advice(names[first], (why,), tuple(losses), (*note, *aside.values()))


def differing_settings(settings: Mapping[str, Mapping[str, Any]]) -> tuple[str, ...]:
    """Return a sentence for every setting that spaces were matched with otherwise: their rows then differ by it as well.

    Parameters
    ----------
    settings
        By space, the values by the names of the settings.
    """
    names = list(dict.fromkeys(name for values in settings.values() for name in values))
    by_name = {name: {space: values.get(name) for space, values in settings.items()} for name in names}
    return tuple(
        f"The spaces differ in {name} as well ({', '.join(f'{space} {value}' for space, value in values.items())}), so the "
        "table does not compare the spaces alone; `run --redo` matches one again."
        for name, values in by_name.items()
        if any(value != next(iter(values.values())) for value in values.values())
    )


def _why(names: list[str], points: np.ndarray, first: int, how: str, best_in: list[str], criteria: int) -> str:
    """Return the sentence that names the space to take."""
    if not criteria:
        return f"No criterion could be measured: nothing speaks for a space, and {names[first]} is named since one must be."
    others = [
        f"{name} {int(n)}"
        for place, (name, n) in enumerate(zip(names, points, strict=True))
        if n >= 0 and place != first
    ]
    where = f" ({', '.join(best_in)})" if best_in else ""
    rest = f"points of the others left: {', '.join(others)}" if others else "no other space is left"
    return (
        f"Take {names[first]}: {how or 'it is'} the best, or within a tie of the best, in {int(points[first])} of {criteria} "
        f"criteria{where}; {rest}."
    )


def _set_aside(table: pd.DataFrame, guards: list[Measure]) -> tuple[dict[str, str], list[str]]:
    """Return the spaces that are not fit, with a sentence each; and a note where that would be all."""
    aside: dict[str, str] = {}
    for measure in guards:
        values = table[measure.name].to_numpy(dtype=float)
        best = int(np.nanargmax(values))
        for place in np.flatnonzero(np.nan_to_num(measure.loss(values)) > BEHIND[measure.name] + TIE_ROUNDING):
            name = str(table["space"].iloc[place])
            aside.setdefault(name, (
                f"{name} is set aside: its {measure.title} is {_shown(measure, values[place])}, that of "
                f"{table['space'].iloc[best]} {_shown(measure, values[best])}."
            ))  # fmt: skip
    if len(aside) == len(table):
        return {}, ["Every space is far behind another in purity, r or state held, so none is set aside for it."]
    return aside, []


def _won(measure: Measure, values: np.ndarray, left: np.ndarray) -> np.ndarray:
    """Return which of the spaces left are best, or within a tie of the best of these."""
    among = np.where(left, values, np.nan)
    return np.isfinite(among) & ~measure.beaten(among)


def _shifted(table: pd.DataFrame, first: int) -> bool:
    """Return whether another space's effects hold more of the differences of means, as a change of state's do."""
    r = table["agreement"].to_numpy(dtype=float)
    return bool(np.nanmax([*r, -math.inf]) - r[first] > BEHIND["agreement"])


def _first(table: pd.DataFrame, points: np.ndarray, *, nested: bool) -> tuple[int, str]:
    """Return the place of the space with most points, and how it was told from its equals."""
    equal = np.flatnonzero(points == points.max())
    if len(equal) == 1:
        return int(equal[0]), ""
    made_for_it = equal[(table["space"].to_numpy()[equal] == keys.STATE) & nested]
    if len(made_for_it):
        return int(made_for_it[0]), "with as many points as another, and made for donors that are nested, it is"
    halves = next(m for m in MEASURES if m.name == "split_half")
    agreement = table["split_half"].to_numpy(dtype=float)[equal]
    if not nested and np.nanmax([*agreement, -math.inf]) >= halves.least:
        kept = equal[_won(halves, agreement, np.ones(len(equal), dtype=bool))]
        if len(kept) == 1:
            return int(kept[0]), "with as many points as another, and halves of donors that agree better, it is"
        equal = kept
    seconds = table["seconds"].to_numpy(dtype=float)[equal]
    if np.isfinite(seconds).any():
        return int(equal[np.nanargmin(seconds)]), "with as many points as another, and in less time, it is"
    return int(equal[0]), "with as many points as another, and before it in the table, it is"


def _losses(table: pd.DataFrame, first: int, criteria: set[str]) -> list[str]:
    """Return a sentence for every column in which the advised space is beaten, or was not measured while others were."""
    sentences = []
    for measure in MEASURES:
        values = table[measure.name].to_numpy(dtype=float)
        if not np.isfinite(values).any():
            continue
        best = int(np.nanargmin(measure.loss(values)))
        there = f"{table['space'].iloc[best]} {_shown(measure, values[best])}"
        if math.isnan(values[first]):
            sentences.append(f"It has no {measure.title}, which others have ({there}).")
        elif measure.beaten(values)[first]:
            note = "" if measure.name in criteria else ", which is no criterion here"
            sentences.append(f"It loses in {measure.title}{note}: {_shown(measure, values[first])}, {there}.")
    return sentences


def _shown(measure: Measure, value: float) -> str:
    return f"{value:.3g}" if measure.better == "low" else f"{value:.3f}"
