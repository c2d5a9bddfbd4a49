"""Means of expression per population and donor: plain, and through the matches.

Input: a population per cell, a donor per cell, and the matches and expression of a finished run. Output: one value per
population, replicate and gene. A test on donors needs no more, so no permutation reads a cell.

**Through the matches.** For a population, `A[e, d]` is the mean over the cells of replicate e, of large populations over the
first of them, of the expression of the nearest neighbour of each cell among the cells of d (other than the cell itself). `m_d` is the mean of `A[e, d]` over all
replicates e of both conditions, with equal weights. So the same cells are compared with every donor, and donors differ in
m because of their expression, not because of the mix of cells that they happen to have. m does not depend on the labels.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import pandas as pd
from scipy import sparse

from ndreamer_dist.cohort.design import Design
from ndreamer_dist.results.on_demand import Expression

logger = logging.getLogger(__name__)

ASKING_CELLS = 20_000
"""Cells of a population that are looked up in every donor, about; from more of them the means hardly change."""
READ_ROWS = 8192
"""Rows of expression held at a time."""

Nearest = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
"""The nearest target of every query, itself left out: (queries,) packed rows, -1 for none.

Takes the packed rows of the queries, of the target piece, and of the whole piece that the queries are of.
"""


@dataclass(frozen=True)
class Piece:
    """The cells of one replicate in one group: `rows`, ascending."""

    replicate: int
    group: int
    rows: np.ndarray


@dataclass(frozen=True)
class Replicates:
    """The replicates of the tests: a donor under one condition, whatever batches it was measured in.

    Attributes
    ----------
    donors, conditions
        Name and condition code of every replicate.
    of_cell
        (cells,) the replicate of every packed row.
    """

    donors: tuple[str, ...]
    conditions: np.ndarray
    of_cell: np.ndarray
    design: Design

    @classmethod
    def of(cls, donors: pd.Series, design: Design) -> Replicates:
        """Return the observed (donor, condition) pairs of the cells, which are in packed order."""
        codes, names = pd.factorize(donors.astype(str), sort=True)
        conditions = design.group_conditions[design.group_of(np.arange(design.n_cells))]
        pairs, of_cell = np.unique(codes * len(design.conditions) + conditions, return_inverse=True)
        donor, condition = np.divmod(pairs, len(design.conditions))
        return cls(tuple(str(names[code]) for code in donor), condition, of_cell, design)

    def __len__(self) -> int:
        return len(self.donors)

    @cached_property
    def pieces(self) -> tuple[Piece, ...]:
        """The cells of every replicate in every group it was measured in."""
        found = []
        for group in self.design.groups:
            inside = self.of_cell[group.start : group.stop]
            found += [Piece(int(r), group.code, group.start + np.flatnonzero(inside == r)) for r in np.unique(inside)]
        return tuple(found)

    def against(self, baseline: int, condition: int) -> Replicates:
        """Return the replicates of two conditions, in their order; cells of others have none (-1)."""
        chosen = np.flatnonzero(np.isin(self.conditions, (baseline, condition)))
        place = np.full(len(self) + 1, -1)
        place[chosen] = np.arange(len(chosen))
        of_cell = np.full(len(self.of_cell), -1, dtype=self.of_cell.dtype)
        pieces = tuple(
            replace(p, replicate=int(place[p.replicate])) for c in (baseline, condition) for p in self._pieces_of[c]
        )
        for piece in pieces:
            of_cell[piece.rows] = piece.replicate
        found = Replicates(tuple(self.donors[r] for r in chosen), self.conditions[chosen], of_cell, self.design)
        found.__dict__["pieces"] = tuple(sorted(pieces, key=lambda piece: (piece.group, piece.replicate)))
        return found

    @cached_property
    def _pieces_of(self) -> dict[int, list[Piece]]:
        """The pieces of every condition."""
        found: dict[int, list[Piece]] = {code: [] for code in range(len(self.design.conditions))}
        for piece in self.pieces:
            found[int(self.conditions[piece.replicate])].append(piece)
        return found

    def counts(self, populations: np.ndarray, number: int) -> np.ndarray:
        """Return the cells of every population and replicate: (populations, replicates); -1 is no population."""
        found = np.zeros((number, len(self)), dtype=np.int64)
        for piece in self.pieces:
            codes = populations[piece.rows]
            found[:, piece.replicate] += np.bincount(codes[codes >= 0], minlength=number)
        return found


@dataclass(frozen=True)
class PopulationMeans:
    """Mean expression per population, replicate and gene; NaN where a replicate has too few cells.

    Attributes
    ----------
    cells
        (populations, replicates) own cells.
    included
        (populations, replicates) whether these are enough.
    own
        (populations, replicates, genes) plain means, pseudobulk.
    matched
        By condition code: m of the replicates of that condition and the baseline, (populations, replicates, genes).
    within
        The same through the neighbours in state, if they were asked for.
    """

    cells: np.ndarray
    included: np.ndarray
    own: np.ndarray
    matched: dict[int, np.ndarray]
    within: dict[int, np.ndarray] = field(default_factory=dict)


def population_means(
    populations: np.ndarray,
    number: int,
    replicates: Replicates,
    nearest: Nearest,
    expression: Expression,
    columns: np.ndarray,
    *,
    conditions: Sequence[int],
    min_cells: int,
    within: Nearest | None = None,
    baseline: int = 0,
) -> PopulationMeans:
    """Return each replicate's mean expression in every population, plain and through the matches.

    Parameters
    ----------
    populations
        (cells,) population of every packed row, -1 for none; there are `number` of them.
    conditions
        Codes to compare with the baseline.
    min_cells
        Own cells that a replicate needs in a population.
    within
        Other neighbours, in state, to be looked through as well; populations without a neighbour are NaN.
    baseline
        Code of the condition to compare with; the control's by default.
    """
    cells = replicates.counts(populations, number)
    included = cells >= min_cells
    questions = {c: included & np.isin(replicates.conditions, (baseline, c)) for c in conditions}
    own = np.zeros((number, len(replicates), len(columns)))
    ways = [nearest] if within is None else [nearest, within]
    through = {(w, c): np.zeros_like(own) for w in range(len(ways)) for c in conditions}
    looked_up = np.zeros((number, len(replicates)), dtype=bool)
    asking = first_cells(replicates.pieces, populations, number)
    for target in replicates.pieces:
        shares = [_shares(target, replicates, populations, number, inside=inside) for inside in (False, True)]
        weights = [_own_weights(target, populations, number, replicates)]
        asked = [(w, c) for w, c in through if questions[c][:, target.replicate].any()]
        found = [_counterparts(target, replicates, way, asking) if asked else [] for way in ways]
        weights += [shares[w] @ _weights(target, found[w], populations, questions[c], replicates) for w, c in asked]
        for _, rows_found, _ in found[-1] if found else []:
            looked_up[np.unique(populations[rows_found]), target.replicate] = True
        for rows, part in _parts(target.rows):
            sums = sparse.vstack([w[:, part] for w in weights], format="csr") @ expression.read(rows, columns)
            sums = sums.toarray().reshape(len(weights), number, len(columns))
            own[:, target.replicate] += sums[0]
            for place, total in zip(asked, sums[1:], strict=True):
                through[place][:, target.replicate] += total
    own[~included] = np.nan
    for (w, c), values in through.items():
        values[~questions[c] if w == 0 else ~(questions[c] & looked_up)] = np.nan
    parts = [{c: through[w, c] for c in conditions} for w in range(len(ways))]
    return PopulationMeans(cells, included, own, *parts)


def query_means(
    population: np.ndarray,
    included: np.ndarray,
    replicates: Replicates,
    nearest: Nearest,
    expression: Expression,
    columns: np.ndarray,
) -> np.ndarray:
    """Return A of one population: (included e, included d, genes), in the order of the replicates.

    Parameters
    ----------
    population
        (cells,) whether a packed row is in it.
    included
        (replicates,) which take part.
    """
    place = np.cumsum(included) - 1
    codes = np.where(population & included[replicates.of_cell], place[replicates.of_cell], -1)
    asking = first_cells(replicates.pieces, np.where(codes >= 0, 0, -1), 1)
    answer = np.zeros((int(included.sum()), int(included.sum()), len(columns)))
    for target in (piece for piece in replicates.pieces if included[piece.replicate]):
        share = 1 / sum(piece.replicate == target.replicate for piece in replicates.pieces)
        found = _counterparts(target, replicates, nearest, asking)
        # With a replicate's number for a population, and each asked by itself alone, the weights are those of A.
        asked = np.zeros((len(answer), len(replicates)), dtype=bool)
        asked[place[included], np.flatnonzero(included)] = True
        weights = share * _weights(target, found, codes, asked, replicates)
        for rows, part in _parts(target.rows):
            answer[:, place[target.replicate]] += (weights[:, part] @ expression.read(rows, columns)).toarray()
    return answer


def first_cells(
    pieces: Sequence[Piece], populations: np.ndarray, number: int, most: int = ASKING_CELLS
) -> list[np.ndarray]:
    """Return about so many cells of every population at most, the same share of each piece: packed rows, ascending, by piece.

    They are the first of a piece, since packed rows are in random order inside a group.
    """
    share = np.minimum(1.0, most / np.maximum(np.bincount(populations[populations >= 0], minlength=number), 1))
    return [_first(piece.rows, populations, share) for piece in pieces]


def _first(rows: np.ndarray, populations: np.ndarray, share: np.ndarray) -> np.ndarray:
    parts = [rows[populations[rows] == code] for code in np.unique(populations[rows]) if code >= 0]
    kept = [part[: int(np.ceil(share[populations[part[0]]] * len(part)))] for part in parts]
    return np.sort(np.concatenate(kept)) if kept else rows[:0]


def _counterparts(
    target: Piece, replicates: Replicates, nearest: Nearest, asking: Sequence[np.ndarray]
) -> list[tuple[Piece, np.ndarray, np.ndarray]]:
    """Return, for every piece, its cells that ask and their places of nearest neighbours in the target."""
    found = []
    for query, rows in zip(replicates.pieces, asking, strict=True):
        if not len(rows):
            continue
        near = nearest(rows, target.rows, query.rows)
        known = near >= 0
        found.append((query, rows[known], np.searchsorted(target.rows, near[known])))
    return found


def _weights(
    target: Piece,
    found: list[tuple[Piece, np.ndarray, np.ndarray]],
    populations: np.ndarray,
    asked: np.ndarray,
    replicates: Replicates,
) -> sparse.csr_matrix:
    """Return how much each of the target's cells counts towards m: (populations, target's cells).

    Cells weigh the same inside a piece, pieces inside a replicate, replicates inside a population.
    """
    number = len(asked)
    pieces = np.zeros((number, len(replicates)))  # of a replicate, with cells in the population
    for query, rows, _ in found:
        pieces[np.unique(populations[rows]), query.replicate] += 1
    asking = (asked & (pieces > 0)).sum(axis=1)
    total = sparse.csr_matrix((number, len(target.rows)))
    for query, rows, place in found:
        code = populations[rows]
        cells = np.bincount(code, minlength=number)
        with np.errstate(divide="ignore", invalid="ignore"):
            each = asked[:, query.replicate] / (cells * pieces[:, query.replicate] * asking)
        total = total + sparse.coo_matrix((each[code], (code, place)), shape=total.shape).tocsr()
    return total


def _shares(
    target: Piece, replicates: Replicates, populations: np.ndarray, number: int, *, inside: bool
) -> sparse.dia_matrix:
    """Return by what a piece's weights are multiplied, by population, as pieces weigh the same inside a replicate.

    Neighbours `inside` a population are found only in pieces that have cells of it.
    """
    there = np.zeros(number)
    for piece in replicates.pieces:
        if piece.replicate == target.replicate:
            codes = populations[piece.rows]
            there[np.unique(codes[codes >= 0]) if inside else slice(None)] += 1
    return sparse.diags(1 / np.maximum(there, 1))


def _own_weights(target: Piece, populations: np.ndarray, number: int, replicates: Replicates) -> sparse.csr_matrix:
    """Return the weights of the plain means: cells alike inside a piece, pieces inside a replicate."""
    code = populations[target.rows]
    inside = np.flatnonzero(code >= 0)
    cells = np.bincount(code[inside], minlength=number)
    pieces = np.zeros(number)
    for piece in replicates.pieces:
        if piece.replicate == target.replicate:
            there = populations[piece.rows]
            pieces[np.unique(there[there >= 0])] += 1
    with np.errstate(divide="ignore"):
        each = 1 / (cells * pieces)
    return sparse.csr_matrix((each[code[inside]], (code[inside], inside)), shape=(number, len(target.rows)))


def _parts(rows: np.ndarray) -> Iterator[tuple[np.ndarray, slice]]:
    for start in range(0, len(rows), READ_ROWS):
        part = slice(start, start + READ_ROWS)
        yield rows[part], part
