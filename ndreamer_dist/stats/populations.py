"""Mean expression per population and donor: plain means, and means through the matches.

Input: a population per cell, a donor per cell, and the matches and expression of a finished run. Output: one value per
population, replicate and gene. Donor-level tests need nothing else, so permutations read no cells.

**Through the matches.** For a population, `A[e, d]` is the mean, over the cells of replicate e, of the expression of
each cell's nearest neighbour among the cells of replicate d, the cell itself excluded. (Of a large population only the
first cells are queries.) `m_d` is the mean of `A[e, d]` over all replicates e of both conditions, with equal weights.
So every donor is seen through the same query cells: donors differ in m because of their expression, not because of the
mix of cell states that was sampled. m does not depend on the condition labels.
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
from ndreamer_dist.summaries.cells import population_count

logger = logging.getLogger(__name__)

QUERY_CELLS = 20_000
"""Approximate most query cells of a population; with more of them the means hardly change."""
READ_ROWS = 8192
"""Rows of expression held in memory at a time."""

Nearest = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
"""A search for the nearest target of every query, the query itself excluded: (queries,) packed rows, -1 for none.

Its arguments are packed rows: of the queries, of the target piece, and of the whole piece that holds the queries.
"""


@dataclass(frozen=True)
class Piece:
    """The cells of one replicate in one group; `rows` are packed rows, ascending."""

    replicate: int
    group: int
    rows: np.ndarray


Lookup = tuple[Piece, np.ndarray, np.ndarray]
"""A query piece, packed rows of its queries, and the position of each query's nearest neighbour in a target piece."""


@dataclass(frozen=True)
class Replicates:
    """The replicates of the tests: one per donor and condition, across all batches of the donor.

    Attributes
    ----------
    donors, conditions
        Name of the donor and code of the condition of every replicate.
    of_cell
        (cells,) replicate of every packed row, -1 for none.
    """

    donors: tuple[str, ...]
    conditions: np.ndarray
    of_cell: np.ndarray
    design: Design

    @classmethod
    def of(cls, donors: pd.Series, design: Design) -> Replicates:
        """Return the observed (donor, condition) pairs; `donors` holds a donor per cell in packed order."""
        codes, names = pd.factorize(donors.astype(str), sort=True)
        conditions = design.group_conditions[design.group_of(np.arange(design.n_cells))]
        pairs, of_cell = np.unique(codes * len(design.conditions) + conditions, return_inverse=True)
        donor, condition = np.divmod(pairs, len(design.conditions))
        return cls(tuple(str(names[code]) for code in donor), condition, of_cell, design)

    def __len__(self) -> int:
        return len(self.donors)

    @cached_property
    def pieces(self) -> tuple[Piece, ...]:
        """The pieces: the cells of every replicate in every group that holds some of them."""
        pieces = []
        for group in self.design.groups:
            inside = self.of_cell[group.start : group.stop]
            pieces += [Piece(int(r), group.code, group.start + np.flatnonzero(inside == r)) for r in np.unique(inside)]
        return tuple(pieces)

    def against(self, baseline: int, condition: int) -> Replicates:
        """Return the replicates of two conditions, in the same order; cells of other conditions get -1."""
        chosen = np.flatnonzero(np.isin(self.conditions, (baseline, condition)))
        place = np.full(len(self) + 1, -1)
        place[chosen] = np.arange(len(chosen))
        of_cell = np.full(len(self.of_cell), -1, dtype=self.of_cell.dtype)
        pieces = tuple(
            replace(p, replicate=int(place[p.replicate])) for c in (baseline, condition) for p in self._pieces_of[c]
        )
        for piece in pieces:
            of_cell[piece.rows] = piece.replicate
        contrast = Replicates(tuple(self.donors[r] for r in chosen), self.conditions[chosen], of_cell, self.design)
        contrast.__dict__["pieces"] = tuple(sorted(pieces, key=lambda piece: (piece.group, piece.replicate)))
        return contrast

    @cached_property
    def _pieces_of(self) -> dict[int, list[Piece]]:
        """The pieces by condition code."""
        pieces: dict[int, list[Piece]] = {code: [] for code in range(len(self.design.conditions))}
        for piece in self.pieces:
            pieces[int(self.conditions[piece.replicate])].append(piece)
        return pieces

    def counts(self, populations: np.ndarray) -> np.ndarray:
        """Return the number of cells per population and replicate: (populations, replicates).

        Parameters
        ----------
        populations
            (cells,) population of every packed row, -1 for none.
        """
        counts = np.zeros((population_count(populations), len(self)), dtype=np.int64)
        for piece in self.pieces:
            codes = populations[piece.rows]
            counts[:, piece.replicate] += np.bincount(codes[codes >= 0], minlength=len(counts))
        return counts


@dataclass(frozen=True)
class PopulationMeans:
    """Mean expression per population, replicate and gene; NaN where a replicate has too few cells.

    Attributes
    ----------
    cells
        (populations, replicates) number of cells of the replicate.
    included
        (populations, replicates) whether the replicate has enough cells.
    own
        (populations, replicates, genes) plain means (pseudobulk).
    matched
        (populations, replicates, genes) means through the matches: m in the module's docstring.
    within
        (populations, replicates, genes) means through the neighbours in state; empty if there is no state space.
    """

    cells: np.ndarray
    included: np.ndarray
    own: np.ndarray
    matched: np.ndarray
    within: np.ndarray = field(default_factory=lambda: np.empty(0))


def population_means(
    populations: np.ndarray,
    replicates: Replicates,
    ways: Sequence[Nearest],
    expression: Expression,
    columns: np.ndarray,
    min_cells: int,
) -> PopulationMeans:
    """Return each replicate's mean expression in every population: plain, and through nearest neighbours.

    Parameters
    ----------
    populations
        (cells,) population of every packed row, -1 for none.
    replicates
        The replicates of the two conditions that are compared.
    ways
        One or two searches: in the matching space, and in state coordinates. Means in state are NaN for a population
        without state neighbours.
    columns
        (genes,) columns of the expression.
    min_cells
        Cells that a replicate needs in a population to be included.
    """
    cells = replicates.counts(populations)
    included = cells >= min_cells
    own, *through = (np.zeros((*cells.shape, len(columns))) for _ in range(1 + len(ways)))
    looked_up = np.zeros(cells.shape, dtype=bool)
    query_rows = first_cells(replicates.pieces, populations)
    for target in replicates.pieces:
        lookups: list[Lookup] = []
        weights = [_own_weights(target, populations, len(cells), replicates)]
        for way, nearest in enumerate(ways if included[:, target.replicate].any() else ()):
            lookups = _counterparts(target, replicates, nearest, query_rows)
            share = _shares(target, replicates, populations, len(cells), inside=way > 0)
            weights.append(share @ _weights(target, lookups, populations, included, replicates))
        for _, rows_found, _ in lookups:
            looked_up[np.unique(populations[rows_found]), target.replicate] = True
        for rows, part in _parts(target.rows):
            sums = sparse.vstack([w[:, part] for w in weights], format="csr") @ expression.read(rows, columns)
            sums = sums.toarray().reshape(len(weights), *own[:, target.replicate].shape)
            for values, total in zip((own, *through), sums, strict=False):
                values[:, target.replicate] += total
    for values, known in zip((own, *through), (included, included, included & looked_up), strict=False):
        values[~known] = np.nan
    return PopulationMeans(cells, included, own, *through)


def query_means(
    population: np.ndarray,
    included: np.ndarray,
    replicates: Replicates,
    nearest: Nearest,
    expression: Expression,
    columns: np.ndarray,
) -> np.ndarray:
    """Return `A[e, d]` of one population (see the module's docstring): (included e, included d, genes).

    Parameters
    ----------
    population
        (cells,) Boolean, whether a packed row is in the population.
    included
        (replicates,) Boolean, which replicates take part; both axes of A keep their order.
    """
    place = np.cumsum(included) - 1
    codes = np.where(population & included[replicates.of_cell], place[replicates.of_cell], -1)
    query_rows = first_cells(replicates.pieces, np.where(codes >= 0, 0, -1))
    means = np.zeros((int(included.sum()), int(included.sum()), len(columns)))
    for target in (piece for piece in replicates.pieces if included[piece.replicate]):
        share = 1 / sum(piece.replicate == target.replicate for piece in replicates.pieces)
        lookups = _counterparts(target, replicates, nearest, query_rows)
        # A is the case in which every replicate is a population of its own, with itself as the only query replicate.
        included_queries = np.zeros((len(means), len(replicates)), dtype=bool)
        included_queries[place[included], np.flatnonzero(included)] = True
        weights = share * _weights(target, lookups, codes, included_queries, replicates)
        for rows, part in _parts(target.rows):
            means[:, place[target.replicate]] += (weights[:, part] @ expression.read(rows, columns)).toarray()
    return means


def first_cells(pieces: Sequence[Piece], populations: np.ndarray, most: int = QUERY_CELLS) -> list[np.ndarray]:
    """Return a sample of about `most` cells of every population: per piece, packed rows, ascending.

    Every piece gives the same share of a population: its first cells, as packed rows are in random order inside a
    group.
    """
    share = np.minimum(1.0, most / np.maximum(np.bincount(populations[populations >= 0]), 1))
    return [_first(piece.rows, populations, share) for piece in pieces]


def _first(rows: np.ndarray, populations: np.ndarray, share: np.ndarray) -> np.ndarray:
    parts = [rows[populations[rows] == code] for code in np.unique(populations[rows]) if code >= 0]
    chosen = [part[: int(np.ceil(share[populations[part[0]]] * len(part)))] for part in parts]
    return np.sort(np.concatenate(chosen)) if chosen else rows[:0]


def _counterparts(
    target: Piece, replicates: Replicates, nearest: Nearest, query_rows: Sequence[np.ndarray]
) -> list[Lookup]:
    """Return every piece with its queries and the positions of their nearest neighbours in the target."""
    lookups = []
    for query, rows in zip(replicates.pieces, query_rows, strict=True):
        if not len(rows):
            continue
        near = nearest(rows, target.rows, query.rows)
        known = near >= 0
        lookups.append((query, rows[known], np.searchsorted(target.rows, near[known])))
    return lookups


def _weights(
    target: Piece, lookups: Sequence[Lookup], populations: np.ndarray, included: np.ndarray, replicates: Replicates
) -> sparse.csr_matrix:
    """Return the weight of each of the target's cells in m: (populations, target's cells).

    Weights are equal for the queries of a piece, for the pieces of a replicate, and for the replicates of a population.
    """
    number = len(included)
    pieces = np.zeros((number, len(replicates)))  # number of pieces with queries, per population and replicate
    for query, rows, _ in lookups:
        pieces[np.unique(populations[rows]), query.replicate] += 1
    replicate_count = (included & (pieces > 0)).sum(axis=1)
    total = sparse.csr_matrix((number, len(target.rows)))
    for query, rows, place in lookups:
        code = populations[rows]
        cells = np.bincount(code, minlength=number)
        with np.errstate(divide="ignore", invalid="ignore"):
            each = included[:, query.replicate] / (cells * pieces[:, query.replicate] * replicate_count)
        total = total + sparse.coo_matrix((each[code], (code, place)), shape=total.shape).tocsr()
    return total


def _shares(
    target: Piece, replicates: Replicates, populations: np.ndarray, number: int, *, inside: bool
) -> sparse.dia_matrix:
    """Return the share of the target piece in its replicate, per population, on a diagonal: pieces weigh the same.

    With `inside`, neighbours come from the same population, so only pieces with cells of the population count.
    """
    pieces = [piece for piece in replicates.pieces if piece.replicate == target.replicate]
    pieces_with_cells = _pieces_with(pieces, populations, number) if inside else np.full(number, float(len(pieces)))
    return sparse.diags(1 / np.maximum(pieces_with_cells, 1))


def _pieces_with(pieces: Sequence[Piece], populations: np.ndarray, number: int) -> np.ndarray:
    """Return the number of pieces that have cells of each population: (populations,)."""
    counts = np.zeros(number)
    for piece in pieces:
        codes = populations[piece.rows]
        counts[np.unique(codes[codes >= 0])] += 1
    return counts


def _own_weights(target: Piece, populations: np.ndarray, number: int, replicates: Replicates) -> sparse.csr_matrix:
    """Return the weights of the plain means: equal for the cells of a piece, and for the pieces of a replicate."""
    code = populations[target.rows]
    inside = np.flatnonzero(code >= 0)
    cells = np.bincount(code[inside], minlength=number)
    own = [piece for piece in replicates.pieces if piece.replicate == target.replicate]
    with np.errstate(divide="ignore"):
        each = 1 / (cells * _pieces_with(own, populations, number))
    return sparse.csr_matrix((each[code[inside]], (code[inside], inside)), shape=(number, len(target.rows)))


def _parts(rows: np.ndarray) -> Iterator[tuple[np.ndarray, slice]]:
    for start in range(0, len(rows), READ_ROWS):
        part = slice(start, start + READ_ROWS)
        yield rows[part], part
