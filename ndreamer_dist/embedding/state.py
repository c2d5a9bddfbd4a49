"""State inside a type: variation between cells of the same donor (METHOD section 10). Pure.

The axes W come from the covariance inside the control groups (`axes.within_covariance`). This module estimates how far
the coordinates of a cell can be trusted. Two halves of its counts, drawn by binomial thinning, have independent noise,
so their covariance inside groups is that of the signal. Coordinates are then shrunk to the mean of the cell's group.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields

import numpy as np
from scipy import linalg, sparse

from ndreamer_dist.cohort.statistics import TARGET_SUM

LEAST_RELIABLE = 0.05
"""No direction is shrunk further than to this share."""
SMALLEST_SIGNAL = 1e-6
"""Eigenvalues of the signal are held above this; genes that vary less do not vary."""
VANISHING = 1e-9
"""Directions whose variance is below this share of the largest are no directions."""
LEAST_DOUBT = 0.05
"""No gene counts more than one at this quantile of the variances of groups' means."""
MOSTLY_SIGNAL = 0.5
"""A dimension is confirmed with at least this share of signal."""
MOST_IN_A_TYPE = 4
"""Dimensions of one of several populations, unless another number is asked for: more absorb a strong effect."""
PASS_ROWS, DRAWN_AT_ONCE = 2048, 2**18
"""Rows, and numbers, worked on at a time: memory of this size is used again, larger pieces come from the system each time."""
TRACY_WIDOM = 0.9793
"""95 % point of the Tracy-Widom law of order 1."""


def recovered_counts(x: sparse.csr_matrix, totals: np.ndarray) -> np.ndarray:
    """Return the counts that log-normalised values were made from: int64, in the order of `x.data`.

    Parameters
    ----------
    x
        (cells, genes) log1p of counts scaled to 10 000 a cell.
    totals
        (cells,) counts of every cell over all genes.
    """
    scale = np.repeat(np.where(totals > 0, totals, TARGET_SUM) / TARGET_SUM, np.diff(x.indptr))
    return np.rint(np.expm1(x.data.astype(np.float64)) * scale).astype(np.int64)


@dataclass(frozen=True)
class Half:
    """One half of the counts of some cells, log-normalised where rows of it are asked for.

    Attributes
    ----------
    counts
        (cells, genes) whole numbers; some of the entries are 0.
    totals
        (cells,) counts of every cell in this half, over all genes.
    """

    counts: sparse.csr_matrix
    totals: np.ndarray

    def __getitem__(self, rows: np.ndarray) -> sparse.csr_matrix:
        """Return some rows, log-normalised by their own totals: (rows, genes) float64, without entries of 0."""
        part = self.counts[rows]
        part.eliminate_zeros()
        scale = np.repeat(np.maximum(self.totals[rows], 1), np.diff(part.indptr))
        values = np.log1p(part.data / scale * TARGET_SUM)
        return sparse.csr_matrix((values, part.indices, part.indptr), shape=part.shape, copy=False)


def halves(x: sparse.csr_matrix, totals: np.ndarray, generator: np.random.Generator) -> tuple[Half, Half]:
    """Split every cell's counts in two by binomial thinning; each half is log-normalised by its own total.

    The counts of genes that are not modelled are known as a sum alone, and split as one.
    """
    counts = np.empty(x.nnz, dtype=np.int32)
    for rows in _stretches(x.shape[0], PASS_ROWS):
        counts[x.indptr[rows.start] : x.indptr[rows.stop]] = recovered_counts(x[rows], totals[rows])
    known = _sums(counts, x.indptr)
    rest = np.maximum(np.rint(totals).astype(np.int64) - known, 0)
    first, first_rest = thinned(counts, generator), thinned(rest, generator)
    counts -= first
    own = _sums(first, x.indptr)
    pairs = (first, own + first_rest), (counts, known - own + rest - first_rest)
    one, other = (
        Half(sparse.csr_matrix((part, x.indices, x.indptr), shape=x.shape, copy=False), part_totals)
        for part, part_totals in pairs
    )
    return one, other


def scores(x: sparse.csr_matrix | Half, rows: np.ndarray, axes: np.ndarray) -> np.ndarray:
    """Return some rows of expression, or of a half of it, on axes: (rows, k) float64; few rows are held at a time."""
    found = np.empty((len(rows), axes.shape[1]))
    for part in _stretches(len(rows), PASS_ROWS):
        found[part] = x[rows[part]] @ axes
    return found


def thinned(counts: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Return draws from Binomial(counts, 1/2): the ones among that many random bits, ten times as fast as a sampler."""
    drawn = np.empty_like(counts)
    for part in _stretches(len(counts), DRAWN_AT_ONCE):
        few = counts[part]
        bits = generator.integers(0, 2**64, size=len(few), dtype=np.uint64)
        drawn[part] = np.bitwise_count(bits >> (64 - np.minimum(few, 64)).astype(np.uint64))
    drawn[counts == 0] = 0  # no shift by all 64 bits
    large = np.flatnonzero(counts > 64)
    drawn[large] = generator.binomial(counts[large], 0.5)
    return drawn


def _sums(values: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Return the sum of every cell's entries, those of cell i from `starts[i]` on: (cells,) int64."""
    sums, filled = np.zeros(len(starts) - 1, dtype=np.int64), np.flatnonzero(np.diff(starts))
    if len(filled):
        sums[filled] = np.add.reduceat(values, starts[filled], dtype=np.int64)
    return sums


def _stretches(total: int, step: int) -> Iterator[slice]:
    for start in range(0, total, step):
        yield slice(start, min(start + step, total))


def shuffled_inside(strata: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Return a permutation of rows that moves each only inside its stratum: (rows,) int64.

    Inside a stratum the rows are drawn in random order and each takes the next one's place, so none stays where it is
    that has company.
    """
    order = np.lexsort((generator.random(len(strata)), strata))
    first = np.flatnonzero(np.diff(strata[order], prepend=-1) != 0)
    following = np.roll(order, -1)
    following[np.append(first[1:], len(order)) - 1] = order[first]
    moved = np.empty(len(order), dtype=np.int64)
    moved[order] = following
    return moved


@dataclass(frozen=True)
class HalfSums:
    """Sums over some cells of one population, of their coordinates e = W'(x - mean) and of both halves' (a and b).

    Attributes
    ----------
    cells, whole, first, second
        (groups,) cells, and (groups, k) sums of e, a and b, of every group.
    spread
        (k, k) sum of e e'.
    signal, noise
        (k, k) sum of a b', and of a b' with the rows of b permuted inside groups.
    reach
        (k,) largest squared length of an e cut to its first 1, 2, ... dimensions.
    """

    cells: np.ndarray
    whole: np.ndarray
    first: np.ndarray
    second: np.ndarray
    spread: np.ndarray
    signal: np.ndarray
    noise: np.ndarray
    reach: np.ndarray

    def plus(self, other: HalfSums) -> HalfSums:
        """Return the sums over the cells of both."""
        names = [field.name for field in fields(self) if field.name != "reach"]
        sums = {name: getattr(self, name) + getattr(other, name) for name in names}
        return HalfSums(**sums, reach=np.maximum(self.reach, other.reach))

    @property
    def group_means(self) -> np.ndarray:
        """Mean coordinates of every group: (groups, k); zero where it has no cell."""
        return np.asarray(self.whole / np.maximum(self.cells, 1)[:, None])

    def covariance(self, name: str) -> np.ndarray:
        """Return the covariance inside groups behind `spread`, `signal` or `noise`: (k, k), symmetric."""
        left, right = (self.whole, self.whole) if name == "spread" else (self.first, self.second)
        scaled = left / np.maximum(self.cells, 1)[:, None]
        between = getattr(self, name) - scaled.T @ right
        return np.asarray((between + between.T) / (2 * max(int(self.cells.sum()), 1)))


def half_sums(
    e: np.ndarray, pair: tuple[np.ndarray, np.ndarray], groups: np.ndarray, count: int, moved: np.ndarray
) -> HalfSums:
    """Return the sums of some cells of one population.

    Parameters
    ----------
    e, pair
        (cells, k) coordinates of the cells, and those of either half of their counts.
    groups, count
        (cells,) group of every cell, and how many groups there are.
    moved
        (cells,) permutation inside groups, for the noise.
    """
    a, b = pair
    member = sparse.csr_matrix((np.ones(len(groups)), (groups, np.arange(len(groups)))), shape=(count, len(groups)))
    reach = np.cumsum(e**2, axis=1).max(axis=0, initial=0.0)
    cells = np.bincount(groups, minlength=count)
    return HalfSums(cells, member @ e, member @ a, member @ b, e.T @ e, a.T @ b, a.T @ b[moved], reach)


def confirmed_dimensions(signal: np.ndarray, noise: np.ndarray, spread: np.ndarray) -> int:
    """Return how many dimensions two halves of the counts confirm, at least 1.

    A dimension counts whose signal exceeds the largest of the noise, and half of the spread: what varies in one gene alone
    from cell to cell, as counts beyond Poisson do, is signal to both halves, but little of it for its spread.
    """
    reliable = int((linalg.eigh(signal, spread, eigvals_only=True) >= MOSTLY_SIGNAL).sum())
    return max(1, min(beyond_noise(signal, noise), reliable))


def beyond_noise(signal: np.ndarray, noise: np.ndarray) -> int:
    """Return how many eigenvalues of the signal exceed the largest of the noise, at least 1."""
    return max(1, int((np.linalg.eigvalsh(signal) > float(np.linalg.eigvalsh(noise)[-1])).sum()))


def signal_shares(
    blocks: Iterable[tuple[sparse.csr_matrix, np.ndarray]], axes: np.ndarray, generator: np.random.Generator
) -> np.ndarray:
    """Return the share of the variance along every axis that is signal and no noise of counts: (k,).

    Signal is what two halves of the counts agree in.

    Parameters
    ----------
    blocks
        Log-normalised expression, (cells, genes), and the counts that each cell was scaled by, (cells,).
    axes
        (genes, k) orthonormal.
    """
    cells, sums, products = 0, np.zeros((3, axes.shape[1])), np.zeros((2, axes.shape[1]))
    for x, totals in blocks:
        e, a, b = (scores(part, np.arange(x.shape[0]), axes) for part in (x, *halves(x, totals, generator)))
        cells += len(e)
        sums += [e.sum(axis=0), a.sum(axis=0), b.sum(axis=0)]
        products += [(e * e).sum(axis=0), (a * b).sum(axis=0)]
    mean = sums / cells
    spread, signal = products[0] / cells - mean[0] ** 2, products[1] / cells - mean[1] * mean[2]
    return np.asarray(signal / np.maximum(spread, SMALLEST_SIGNAL))


def beyond_chance(covariance: np.ndarray, cells: int) -> int:
    """Return how many eigenvalues of the genes' correlation independent genes would not have by chance.

    The largest by chance follows the Tracy-Widom law (Patterson 2006, Johnstone 2001); its 95 % point is taken.
    """
    variance = covariance.diagonal()
    varying = variance > SMALLEST_SIGNAL
    scale = np.sqrt(variance[varying])
    values = np.linalg.eigvalsh(covariance[np.ix_(varying, varying)] / np.outer(scale, scale))
    a, b = np.sqrt(max(cells - 1, 1)), np.sqrt(max(len(scale), 1))
    largest = ((a + b) ** 2 + TRACY_WIDOM * (a + b) * (1 / a + 1 / b) ** (1 / 3)) / max(cells, 1)
    return int((values > largest).sum())


def varying(spread: np.ndarray) -> int:
    """Return how many of the first dimensions cells vary along, each beyond those before it.

    Parameters
    ----------
    spread
        (k, k) covariance of the coordinates.
    """
    least = [float(np.linalg.eigvalsh(spread[:k, :k])[0]) for k in range(1, len(spread) + 1)]
    return int(np.cumprod(np.array(least) > VANISHING * max(float(spread.diagonal().max()), VANISHING)).sum())


def reliability(signal: np.ndarray, spread: np.ndarray) -> np.ndarray:
    """Return Lambda, the share of a coordinate's spread inside groups that is signal: (k, k), eigenvalues in [0.05, 1].

    Parameters
    ----------
    signal, spread
        (k, k) covariances inside groups: of one half of the counts with the other, and of the coordinates.
    """
    values, vectors = np.linalg.eigh(signal)
    positive = (vectors * np.maximum(values, SMALLEST_SIGNAL)) @ vectors.T
    shares, directions = linalg.eigh(positive, spread)  # directions' spread directions = I
    return np.asarray(spread @ (directions * np.clip(shares, LEAST_RELIABLE, 1.0)) @ directions.T)


def fitted_positions(means: np.ndarray, axes: np.ndarray, variance: np.ndarray, cells: np.ndarray) -> np.ndarray:
    """Return where groups stand on the axes: (groups, k).

    A change of state moves all genes of an axis in proportion to their loadings; an effect or a batch does not. So a
    group's position is not the projection of its mean but the regression of its mean on the axes over genes, by
    generalised least squares: a gene counts little whose groups differ in ways that the axes do not explain.

    Parameters
    ----------
    means
        (groups, genes) mean expression of every group, minus that of all cells.
    axes
        (genes, k) orthonormal.
    variance
        (genes,) variance of a cell inside its group.
    cells
        (groups,) cells of every group, at least 1.
    """
    return doubt_of(means, axes, variance, cells).positions(means, axes, cells)


@dataclass(frozen=True)
class Doubt:
    """How much a gene of a group's mean is to be doubted.

    Attributes
    ----------
    between
        (genes,) variance of the groups' means that the axes do not explain.
    variance
        (genes,) variance of a cell inside its group.
    least
        No gene is doubted less.
    """

    between: np.ndarray
    variance: np.ndarray
    least: float

    def position(self, mean: np.ndarray, axes: np.ndarray, cells: float) -> np.ndarray:
        """Return where a group of so many cells stands, by its mean expression less that of all cells: (k,)."""
        weighted = axes / np.maximum(self.between + self.variance / cells, self.least)[:, None]
        return np.asarray(np.linalg.solve(weighted.T @ axes, weighted.T @ mean))

    def positions(self, means: np.ndarray, axes: np.ndarray, cells: np.ndarray) -> np.ndarray:
        """Return where several groups stand: (groups, k)."""
        return np.stack([self.position(mean, axes, count) for mean, count in zip(means, cells, strict=True)])


def doubt_of(means: np.ndarray, axes: np.ndarray, variance: np.ndarray, cells: np.ndarray) -> Doubt:
    """Return how much the genes are to be doubted; the arguments are those of `fitted_positions`."""
    unexplained = means - (means @ axes) @ axes.T
    between = np.maximum((unexplained**2).mean(axis=0) - variance * (1 / cells).mean(), 0.0)
    doubt = between + variance / cells[:, None]  # variance of a group's mean of a gene
    positive = doubt[doubt > 0]
    return Doubt(between, variance, float(np.quantile(positive, LEAST_DOUBT)) if len(positive) else 1.0)


def shrunk(e: np.ndarray, own_mean: np.ndarray, position: np.ndarray, share: np.ndarray) -> np.ndarray:
    """Return coordinates regressed to the position of the cell's own group: (cells, k).

    Parameters
    ----------
    e, own_mean, position
        (cells, k) coordinates, the mean of each cell's group, and where that group stands.
    share
        (k, k) Lambda.
    """
    return np.asarray(position + (e - own_mean) @ share.T)


def corners(populations: int, reach: float) -> np.ndarray:
    """Return extra coordinates that keep populations apart: (populations, bits), none for one population.

    Two populations differ in at least one of them by more than `2 * reach`, the largest distance inside one.
    """
    bits = max(populations - 1, 0).bit_length()
    written = (np.arange(populations)[:, None] >> np.arange(bits)) & 1
    return np.asarray((2 * written - 1) * (reach * 1.01 + 1e-3))
