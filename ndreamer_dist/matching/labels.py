"""Matching inside labels: which of a target group's cells a cell is matched among (METHOD section 6).

In: the labels of queries and targets. Out: the queries in strata that look among the same targets. A cell is matched among
the target group's cells of its own label where there are enough of them, itself not counted; a cell without a label,
and one whose label is too rare there, is matched among all. Inside a label everything is as if the two groups had no
other cells, the correction for hubs included.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ndreamer_dist.cohort.design import Design
from ndreamer_dist.cohort.obsm import CellLabels
from ndreamer_dist.errors import StoreError, listing, shown
from ndreamer_dist.matching.exact import Neighbours

WHOLE = -1
"""In place of a label: all cells of the group. Also the code of a cell without a label."""
NAMED_LABELS = 3
"""Labels that are named in a message."""
UNEVEN = 5
"""A label that is so many times as frequent among treated cells as among controls, or the other way round, is warned of."""


@dataclass(frozen=True, eq=False)
class Placed:
    """What cells are matched by, in packed order.

    Attributes
    ----------
    points
        (cells, d) float32 coordinates in the matching space; an array, or a tensor on the device that searches.
    labels
        (cells,) codes of the labels that cells are matched inside, -1 for none; without `match.within` there are none.
    """

    points: Any
    labels: np.ndarray | None = None

    @property
    def codes(self) -> np.ndarray:
        """Codes of the labels, -1 for all cells where there are none."""
        return np.full(len(self.points), WHOLE) if self.labels is None else self.labels

    def of(self, rows: slice | np.ndarray) -> Placed:
        """Return some of the cells."""
        return Placed(self.points[rows], None if self.labels is None else self.labels[rows])


@dataclass(frozen=True)
class Stratum:
    """Queries that look among the same targets.

    Attributes
    ----------
    label
        Code of their label, or `WHOLE`.
    queries
        (q,) their places, ascending.
    targets
        (t,) places of the targets that they look among, ascending; none for all.
    """

    label: int
    queries: np.ndarray
    targets: np.ndarray | None


def strata_of(queries: np.ndarray, targets: np.ndarray, own: np.ndarray, least: int) -> Iterator[Stratum]:
    """Give queries by what they look among: their label, where the targets have enough of it, else all targets.

    Parameters
    ----------
    queries, targets
        (q,) and (t,) codes of labels, -1 for none.
    own
        (q,) whether a query is one of the targets, and is not to be counted.
    least
        Fewest targets of a label.
    """
    counts = np.bincount(targets + 1, minlength=max(queries.max(initial=-1), targets.max(initial=-1)) + 2)
    enough = (queries >= 0) & (counts[queries + 1] - own >= least)
    chosen = np.where(enough, queries, WHOLE)
    for label in np.unique(chosen).tolist():
        yield Stratum(
            label, np.flatnonzero(chosen == label), None if label == WHOLE else np.flatnonzero(targets == label)
        )


def nearest_by_stratum(
    strata: Iterable[Stratum], queries: int, k: int, search: Callable[[Stratum], Neighbours]
) -> Neighbours:
    """Return the neighbours of all queries, each stratum searched by itself.

    Parameters
    ----------
    queries, k
        Number of queries, and of neighbours of each.
    search
        Gives the neighbours of a stratum's queries among its targets, rows counted among these.
    """
    rows, distances = np.full((queries, k), -1, dtype=np.int64), np.full((queries, k), np.nan, dtype=np.float32)
    widened = np.zeros(queries, dtype=bool)
    for stratum in strata:
        near = search(stratum)
        places = near.rows if stratum.targets is None else np.where(near.rows < 0, -1, stratum.targets[near.rows])
        rows[stratum.queries], distances[stratum.queries] = places, near.distances
        widened[stratum.queries] = near.widened
    return Neighbours(rows, distances, widened)


def places_among(targets: np.ndarray | None, places: np.ndarray) -> np.ndarray:
    """Return places in a group as places among some of its cells (ascending); -1 stays."""
    return places if targets is None else np.where(places < 0, -1, np.searchsorted(targets, places))


@dataclass(frozen=True)
class Inside:
    """How far the treated cells' control matches are inside the cells' labels.

    Attributes
    ----------
    column
        Of `obs`, with the labels.
    cells
        Fewest cells of a label in a group for a match inside it.
    share
        Of all control matches of treated cells, those inside their label.
    missing
        Cells, of any condition, without a label.
    labels, shares
        Names, in the order of their codes, and the share of each.
    uneven
        Names of labels that are much more frequent on one side: the few cells on the other are each the match of many.
    """

    column: str
    cells: int
    share: float
    missing: int
    labels: tuple[str, ...]
    shares: tuple[float, ...]
    uneven: tuple[str, ...]

    def __str__(self) -> str:
        rarest = sorted(zip(self.shares, self.labels, strict=True))[:NAMED_LABELS]
        least = ", ".join(f"{shown(name)} {share:.0%}" for share, name in rarest if share < 1)
        named = f" (least: {least})" if least else ""
        return f"{self.share:.1%} of the treated cells' control matches are inside their {shown(self.column)}{named}"

    @classmethod
    def read(cls, text: str, where: str) -> Inside | None:
        """Read what `to_json` gave, none of `null`; `StoreError` where it was anything else: it comes from a file."""
        try:
            told = json.loads(text)
            if told is None:
                return None
            names = {name: tuple(map(str, told[name])) for name in ("labels", "uneven")}
            return cls(**told | names | {"share": float(told["share"]), "shares": tuple(map(float, told["shares"]))})
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            msg = f"{where}: what it tells of the labels that cells were matched inside is damaged ({type(error).__name__})"
            raise StoreError(msg) from error

    @property
    def warning(self) -> str:
        """What there is to say of the uneven labels."""
        names = listing(self.uneven, limit=NAMED_LABELS)
        return (
            f"{self.column} {names}: more than {UNEVEN} times as frequent under one condition as under the other, so that the few "
            "cells of the other are matched again and again; do not match inside labels that a treatment changes, as clusters may be"
        )


def remedy(inside: Inside | None, by: str | None) -> str:
    """Say what to do about matches in another population than the cell's own, of those that a column names."""
    if inside is None:
        return f"`run --match-within {by or 'COLUMN'} --redo` matches inside it wherever a group has enough cells of it"
    return (
        f"cells were matched inside {inside.column}: some groups have fewer than {inside.cells} cells of the population, or "
        "it is of other labels"
    )


def inside_labels(labels: CellLabels, design: Design, column: str, least: int) -> Inside:
    """Return how far matches are inside labels, from the numbers of cells alone."""
    counts = np.stack(
        [np.bincount(labels.codes[g.start : g.stop] + 1, minlength=len(labels.names) + 1) for g in design.groups]
    )
    control = design.group_conditions == 0
    treated, untreated = counts[~control].sum(axis=0), counts[control].sum(axis=0)
    enough = (counts[control, 1:] >= least).mean(axis=0)  # over control groups, by label
    share = float((treated[1:] * enough).sum() / treated.sum())
    one, other = treated[1:] / treated.sum(), untreated[1:] / untreated.sum()
    uneven = np.flatnonzero(np.maximum(one, other) > UNEVEN * np.minimum(one, other))
    return Inside(
        column, least, share, int(counts[:, 0].sum()), labels.names, tuple(enough.tolist()),
        tuple(labels.names[code] for code in uneven),
    )  # fmt: skip
