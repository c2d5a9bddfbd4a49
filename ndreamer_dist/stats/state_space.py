"""State coordinates of every cell in its population: axes of the variation between a donor's cells (METHOD section 10).

Input: the expression of the modelled genes, and a population and a piece (the cells of one donor in one group) per
cell. Output: a few coordinates per cell. The steps are those of the matching space `state`. The first pass over the
expression accumulates sums, which give the axes and the position of every piece. The second pass projects every cell
and two halves of its counts. Memory grows with populations, pieces and genes, and by a few numbers per cell.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy import sparse
from scipy.sparse.linalg import eigsh
from threadpoolctl import threadpool_limits

from ndreamer_dist.embedding import state
from ndreamer_dist.embedding.axes import Moments, ProductSum, moments_of
from ndreamer_dist.matching.between import StateSpace
from ndreamer_dist.results.on_demand import Expression
from ndreamer_dist.stats.populations import Replicates

logger = logging.getLogger(__name__)

LEAST_CONTROL_CELLS = 100
"""Control cells that a population needs to have axes."""
CANDIDATE_AXES = 12
"""Axes computed per population; a permutation decides how many of them are used."""
PASS_ROWS = 16384
"""Rows of expression in memory at a time."""
MATRIX_VALUES = 2**26
"""Values of genes-by-genes matrices in memory at a time: one matrix per population."""
CONVERGED, LANCZOS = 1e-4, 40
"""Tolerance of the eigenvectors, relative to the eigenvalue, and number of Lanczos vectors."""
STATE_SEED = 0x57A7E
"""Distinguishes these random draws from others with the same seed."""


@dataclass(frozen=True)
class StateSource:
    """Input of the state coordinates.

    Attributes
    ----------
    expression, columns
        Log-normalised expression, and the columns of the modelled genes in it.
    totals
        (cells,) total counts that each cell was normalised by. None if the input was log-normalised: without counts
        there is no reliability, and coordinates are not shrunk.
    """

    expression: Expression
    columns: np.ndarray
    totals: np.ndarray | None
    seed: int = 0


def state_space(
    source: StateSource, populations: np.ndarray, number: int, replicates: Replicates, *, typed: bool
) -> StateSpace:
    """Return the state coordinates of every cell that is in a population.

    Parameters
    ----------
    populations, number
        (cells,) population of every packed row, -1 for none; and the number of populations.
    typed
        Whether populations are cell types (not all cells together); a type has fewer coordinates at most.
    """
    strata, control = _strata(replicates)
    codes = populations.astype(np.int64)
    control_cells = np.bincount(codes[(codes >= 0) & control[strata]], minlength=number)
    codes = np.where((codes >= 0) & (control_cells >= LEAST_CONTROL_CELLS)[codes], codes, -1)
    builder = _StateBuilder(source, codes, number, strata, control, typed)
    with threadpool_limits(1):
        builder.make_axes()
        builder.make_coordinates()
    return StateSpace(builder.points, codes, builder.dimensions, builder.reliability)


def _strata(replicates: Replicates) -> tuple[np.ndarray, np.ndarray]:
    """Return the piece of every packed row, (cells,), and whether each piece is of the control, (pieces,)."""
    strata = np.zeros(len(replicates.of_cell), dtype=np.int64)
    for number, piece in enumerate(replicates.pieces):
        strata[piece.rows] = number
    return strata, np.array([replicates.conditions[piece.replicate] == 0 for piece in replicates.pieces])


class _StateBuilder:
    """Accumulator of the state coordinates: the axes of every population first, then the coordinates."""

    def __init__(
        self, source: StateSource, codes: np.ndarray, number: int, strata: np.ndarray, control: np.ndarray, typed: bool
    ) -> None:
        self.source, self.codes, self.strata, self.control, self.typed = source, codes, strata, control, typed
        genes = len(source.columns)
        self.keep = min(CANDIDATE_AXES, genes - 1)
        self.axes = np.zeros((number, genes, self.keep))
        self.mean = np.zeros((number, genes))
        self.group_cells = np.zeros((number, len(control)), dtype=np.int64)
        self.group_means = np.zeros((number, len(control), genes))
        self.variance = np.zeros((number, genes))
        self.points = np.zeros((len(codes), self.keep), dtype=np.float32)
        self.dimensions = np.zeros(number, dtype=np.int64)
        self.reliability = np.full(number, np.nan)

    def make_axes(self) -> None:
        """Compute means and axes of all populations, a few at a time; axes span the variation inside control pieces."""
        genes, count = len(self.source.columns), len(self.control)
        step, product = max(1, MATRIX_VALUES // genes**2), np.empty((genes, genes), dtype=np.float32)
        present = np.unique(self.codes[self.codes >= 0])
        for start in range(0, len(present), step):
            several = present[start : start + step]
            sums = {code: (Moments.none(count, genes), ProductSum(genes)) for code in several}
            for rows, x in self._parts(np.isin(self.codes, several)):
                for code, here in _by_population(self.codes[rows]):
                    part, strata = x[here], self.strata[rows[here]]
                    sums[code][0].plus(moments_of(part, strata, count, self.control, products=False))
                    sums[code][1].add(part[self.control[strata]], product)
            for code, (moments, products) in sums.items():
                self._keep(code, moments, products.covariance(moments))

    def _keep(self, code: int, moments: Moments, covariance: np.ndarray) -> None:
        there = moments.cells > 0
        self.mean[code], self.variance[code] = moments.mean, moments.within_variance
        self.group_cells[code] = moments.cells
        self.group_means[code, there] = moments.sums[there] / moments.cells[there, None] - moments.mean
        self.axes[code] = _leading(covariance, self.keep)

    def make_coordinates(self) -> None:
        """Project every cell, choose the number of dimensions, and shrink cells towards the position of their piece."""
        sums: dict[int, state.HalfSums] = {}
        for number, (rows, x) in enumerate(self._parts(self.codes >= 0)):
            generator = np.random.default_rng(np.random.SeedSequence((self.source.seed, STATE_SEED, number)))
            pair = (x, x) if self.source.totals is None else state.halves(x, self.source.totals[rows], generator)
            moved = state.shuffled_inside(self.strata[rows] * len(self.dimensions) + self.codes[rows], generator)
            for code, here in _by_population(self.codes[rows]):
                e, a, b = (state.scores(half, here, self.axes[code]) for half in (x, *pair))
                centre = self.mean[code] @ self.axes[code]
                strata, inside = self.strata[rows[here]], np.searchsorted(here, moved[here])
                part = state.half_sums(e - centre, (a - centre, b - centre), strata, len(self.control), inside)
                sums[code] = sums[code].plus(part) if code in sums else part
                self.points[rows[here]] = e - centre
        for code, half_sums in sums.items():
            self._place(code, half_sums)

    def _place(self, code: int, half_sums: state.HalfSums) -> None:
        k = self.dimensions[code] = min(self._chosen(half_sums), state.varying(half_sums.covariance("spread")))
        if not k:  # the population's cells do not vary
            self.codes[self.codes == code] = -1
            return
        signal, spread = (half_sums.covariance(name)[:k, :k] for name in ("signal", "spread"))
        share = np.eye(k) if self.source.totals is None else state.reliability(signal, spread)
        self.reliability[code] = np.trace(share) / k
        there = self.group_cells[code] > 0
        positions = np.zeros((len(there), k))
        positions[there] = state.fitted_positions(
            self.group_means[code, there], self.axes[code][:, :k], self.variance[code], self.group_cells[code, there]
        )
        for rows in _stretches(np.flatnonzero(self.codes == code)):
            strata = self.strata[rows]
            e = self.points[rows, :k].astype(np.float64)
            self.points[rows, :k] = state.shrunk(e, half_sums.group_means[strata, :k], positions[strata], share)

    def _chosen(self, half_sums: state.HalfSums) -> int:
        """Return a population's number of dimensions: those that both halves of the counts confirm, up to a limit."""
        most = state.MOST_IN_A_TYPE if self.typed else self.keep
        if self.source.totals is None:
            return min(self.keep, most)
        return min(state.beyond_noise(half_sums.covariance("signal"), half_sums.covariance("noise")), most)

    def _parts(self, chosen: np.ndarray) -> Iterator[tuple[np.ndarray, sparse.csr_matrix]]:
        for rows in _stretches(np.flatnonzero(chosen)):
            yield rows, self.source.expression.read(rows, self.source.columns)


def _stretches(rows: np.ndarray) -> Iterator[np.ndarray]:
    return (rows[start : start + PASS_ROWS] for start in range(0, len(rows), PASS_ROWS))


def _by_population(codes: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    for code in np.unique(codes[codes >= 0]):
        yield int(code), np.flatnonzero(codes == code)


def _leading(covariance: np.ndarray, keep: int) -> np.ndarray:
    """Return the leading eigenvectors of a covariance, (genes, keep), each with its largest loading positive."""
    if not covariance.any():
        return np.zeros((len(covariance), keep))
    first, spanning = np.ones(len(covariance)) / np.sqrt(len(covariance)), min(LANCZOS, len(covariance))
    values, vectors = eigsh(covariance, k=keep, v0=first, which="LA", tol=CONVERGED, ncv=spanning)
    axes = vectors[:, np.argsort(-values, kind="stable")].astype(np.float64)
    largest = axes[np.abs(axes).argmax(axis=0), np.arange(keep)]
    return np.asarray(axes * np.where(largest < 0, -1.0, 1.0))
