"""Restrict matches to cells of the same label, such as a cell type (METHOD section 6).

Input: labels of queries and targets. Output: strata, which are queries that share their candidate targets. A query is
matched among the targets of its own label if there are enough of them, itself not counted. A query without a label, or
whose label is too rare in the target group, is matched among all targets. Inside a label, the search and its hub
correction run as if the two groups had no other cells.
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
"""Code that stands for all cells of a group in place of a label; also the code of an unlabelled cell."""
NAMED_LABELS = 3
"""Most labels that a message names."""
UNEVEN = 5
"""Ratio of a label's frequencies among treated and control cells, either way round, above which we warn."""


@dataclass(frozen=True, eq=False)
class Placed:
    """Coordinates and labels of cells, in packed order.

    Attributes
    ----------
    points
        (cells, d) float32 coordinates in the matching space; an array, or a tensor on the GPU.
    labels
        (cells,) label codes for matching inside labels, -1 for an unlabelled cell; None without `match.within`.
    """

    points: Any
    labels: np.ndarray | None = None

    @property
    def codes(self) -> np.ndarray:
        """Label codes, all -1 if there are no labels: (cells,)."""
        return np.full(len(self.points), WHOLE) if self.labels is None else self.labels

    def of(self, rows: slice | np.ndarray) -> Placed:
        """Return the cells of some rows."""
        return Placed(self.points[rows], None if self.labels is None else self.labels[rows])


@dataclass(frozen=True)
class Stratum:
    """Queries that share their candidate targets.

    Attributes
    ----------
    label
        Label code, or `WHOLE`.
    queries
        (q,) positions of the queries, ascending.
    targets
        (t,) positions of the candidate targets, ascending; None for all.
    """

    label: int
    queries: np.ndarray
    targets: np.ndarray | None


def strata_of(queries: np.ndarray, targets: np.ndarray, own: np.ndarray, least: int) -> Iterator[Stratum]:
    """Yield the strata of queries: one per label with enough targets, and one, over all targets, for the others.

    Parameters
    ----------
    queries, targets
        (q,) and (t,) label codes, -1 for none.
    own
        (q,) bool, whether a query is one of the targets and so does not count as a target.
    least
        Fewest targets of a label for a match inside it.
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
    """Search each stratum separately, and return the neighbours of all queries.

    Parameters
    ----------
    queries, k
        Number of queries, and of neighbours per query.
    search
        Function that returns the neighbours of a stratum's queries; its rows are positions among the stratum's targets.
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
    """Translate positions in a group to positions among some of its cells (`targets`, ascending); -1 stays -1."""
    return places if targets is None else np.where(places < 0, -1, np.searchsorted(targets, places))


@dataclass(frozen=True)
class Inside:
    """Share of the treated cells' control matches that are inside the cells' labels.

    Attributes
    ----------
    column
        Column of `obs` with the labels.
    cells
        Fewest cells of a label in a group for a match inside it.
    share
        Share of matches inside labels, among all control matches of treated cells.
    missing
        Number of cells without a label, of any condition.
    labels, shares
        Label names, in the order of their codes, and the share of each.
    uneven
        Names of labels that are much more frequent among treated cells than among controls, or the reverse. The few
        cells of the rarer side each match many.
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
        """Read from JSON text of a store, None from `null`; raise `StoreError` if the text is damaged."""
        try:
            fields = json.loads(text)
            if fields is None:
                return None
            names = {name: tuple(map(str, fields[name])) for name in ("labels", "uneven")}
            numbers = {"share": float(fields["share"]), "shares": tuple(map(float, fields["shares"]))}
            return cls(**fields | names | numbers)
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            msg = f"{where}: its record of matches inside labels is damaged ({type(error).__name__})"
            raise StoreError(msg) from error

    @property
    def warning(self) -> str:
        """Warning about the uneven labels."""
        names = listing(self.uneven, limit=NAMED_LABELS)
        return (
            f"{self.column} {names}: more than {UNEVEN} times as frequent under one condition as under the other, so "
            "that the few cells of the other are matched again and again; do not match inside labels that a treatment "
            "changes, as clusters may be"
        )


def remedy(inside: Inside | None, by: str | None) -> str:
    """Return advice on matches outside the cell's own population.

    Parameters
    ----------
    inside
        How the cells were matched inside labels; None if they were not.
    by
        Column of `obs` that names the populations.
    """
    if inside is None:
        return f"`run --match-within {by or 'COLUMN'} --redo` matches inside it wherever a group has enough cells of it"
    return (
        f"cells were matched inside {inside.column}: some groups have fewer than {inside.cells} cells of the "
        "population, or the populations are not those labels"
    )


def inside_labels(labels: CellLabels, design: Design, column: str, least: int) -> Inside:
    """Return the share of matches inside labels, from the numbers of cells alone."""
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
