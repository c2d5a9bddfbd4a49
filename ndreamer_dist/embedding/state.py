"""Estimate and shrink state coordinates, which describe variation between cells of one donor (METHOD section 10). Pure.

The axes W come from the covariance inside the control groups (`axes.within_covariance`). This module estimates the
reliability of a cell's coordinates. Two halves of its counts, drawn by binomial thinning, have independent noise, so
their covariance inside groups is that of the signal. Coordinates are then shrunk towards the position of the group.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields

import numpy as np
from scipy import linalg, sparse

from ndreamer_dist.cohort.statistics import TARGET_SUM

LEAST_RELIABLE = 0.05
"""Smallest eigenvalue of Lambda: deviations in a direction are never shrunk below this share."""
SMALLEST_SIGNAL = 1e-6
"""Smallest eigenvalue of the signal; also the variance below which a gene counts as constant."""
VANISHING = 1e-9
"""Share of the largest variance below which an axis counts as having none."""
LEAST_DOUBT = 0.05
"""Quantile of the variances of groups' means that is the lower limit of a gene's variance, to bound its weight."""
MOSTLY_SIGNAL = 0.5
"""Smallest share of signal of a confirmed dimension."""
MOST_IN_A_TYPE = 4
"""Default limit on the dimensions of one of several populations; more would absorb a strong effect."""
PASS_ROWS, DRAWN_AT_ONCE = 2048, 2**18
"""Rows, and numbers, processed at a time. Memory of this size is reused; larger arrays are newly mapped each time."""
TRACY_WIDOM = 0.9793
"""95 % point of the Tracy-Widom law of order 1."""


def recovered_counts(x: sparse.csr_matrix, totals: np.ndarray) -> np.ndarray:
    """Recover the counts behind log-normalised values: int64, in the order of `x.data`.

    Parameters
    ----------
    x
        (cells, genes) CSR, log1p of counts scaled to 10 000 per cell.
    totals
        (cells,) total counts of every cell over all genes.
    """
    scale = np.repeat(np.where(totals > 0, totals, TARGET_SUM) / TARGET_SUM, np.diff(x.indptr))
    return np.rint(np.expm1(x.data.astype(np.float64)) * scale).astype(np.int64)


@dataclass(frozen=True)
class Half:
    """One half of the counts of some cells; indexing by rows log-normalises them.

    Attributes
    ----------
    counts
        (cells, genes) CSR of integers, some of the entries 0.
    totals
        (cells,) total counts of every cell in this half, over all genes.
    """

    counts: sparse.csr_matrix
    totals: np.ndarray

    def __getitem__(self, rows: np.ndarray) -> sparse.csr_matrix:
        """Return some rows, log-normalised by this half's totals: (rows, genes) float64 CSR without zero entries."""
        part = self.counts[rows]
        part.eliminate_zeros()
        scale = np.repeat(np.maximum(self.totals[rows], 1), np.diff(part.indptr))
        values = np.log1p(part.data / scale * TARGET_SUM)
        return sparse.csr_matrix((values, part.indices, part.indptr), shape=part.shape, copy=False)


def halves(x: sparse.csr_matrix, totals: np.ndarray, generator: np.random.Generator) -> tuple[Half, Half]:
    """Split every cell's counts into two halves by binomial thinning.

    Of the genes that are not modelled only the sum of counts is known, which is split as one number.
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
    """Project some rows of expression, or of a half of it, on axes: (rows, k) float64; in passes of few rows."""
    found = np.empty((len(rows), axes.shape[1]))
    for part in _stretches(len(rows), PASS_ROWS):
        found[part] = x[rows[part]] @ axes
    return found


def thinned(counts: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Draw from Binomial(counts, 1/2) by counting ones among random bits, ten times as fast as numpy's sampler."""
    drawn = np.empty_like(counts)
    for part in _stretches(len(counts), DRAWN_AT_ONCE):
        few = counts[part]
        bits = generator.integers(0, 2**64, size=len(few), dtype=np.uint64)
        drawn[part] = np.bitwise_count(bits >> (64 - np.minimum(few, 64)).astype(np.uint64))
    drawn[counts == 0] = 0  # for 0 the shift would be by 64 bits, which is undefined
    large = np.flatnonzero(counts > 64)
    drawn[large] = generator.binomial(counts[large], 0.5)
    return drawn


def _sums(values: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Return the sum of the entries of each CSR row, of which `starts` is the `indptr`: (cells,) int64."""
    sums, filled = np.zeros(len(starts) - 1, dtype=np.int64), np.flatnonzero(np.diff(starts))
    if len(filled):
        sums[filled] = np.add.reduceat(values, starts[filled], dtype=np.int64)
    return sums


def _stretches(total: int, step: int) -> Iterator[slice]:
    for start in range(0, total, step):
        yield slice(start, min(start + step, total))


def shuffled_inside(strata: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Return a random permutation of rows inside strata: (rows,) int64.

    Inside a stratum the rows form one random cycle, so no row stays in place unless it is the only one.
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
    """Sums over some cells of one population, of coordinates e = W'(x - mean) and those of the two halves, a and b.

    Attributes
    ----------
    cells
        (groups,) number of cells per group.
    whole, first, second
        (groups, k) sums of e, a and b per group.
    spread
        (k, k) sum of e e'.
    signal, noise
        (k, k) sum of a b', and of a b' with the rows of b permuted inside groups.
    reach
        (k,) largest squared norm of the first 1, 2, ... k coordinates of a cell.
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
        """Return the sums over the cells of self and other."""
        names = [field.name for field in fields(self) if field.name != "reach"]
        sums = {name: getattr(self, name) + getattr(other, name) for name in names}
        return HalfSums(**sums, reach=np.maximum(self.reach, other.reach))

    @property
    def group_means(self) -> np.ndarray:
        """Mean coordinates of every group: (groups, k), 0 for a group without cells."""
        return np.asarray(self.whole / np.maximum(self.cells, 1)[:, None])

    def covariance(self, name: str) -> np.ndarray:
        """Return the covariance inside groups from `spread`, `signal` or `noise`: (k, k), symmetric."""
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
        (cells, k) coordinates of the cells, and of the two halves of their counts.
    groups, count
        (cells,) group of every cell, and the number of groups.
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

    The signal of a confirmed dimension exceeds the largest eigenvalue of the noise, and half of the spread. The second
    test excludes variation of single genes beyond Poisson: both halves share it, but it is little of the spread.
    """
    reliable = int((linalg.eigh(signal, spread, eigvals_only=True) >= MOSTLY_SIGNAL).sum())
    return max(1, min(beyond_noise(signal, noise), reliable))


def beyond_noise(signal: np.ndarray, noise: np.ndarray) -> int:
    """Return how many eigenvalues of the signal exceed the largest eigenvalue of the noise, at least 1."""
    return max(1, int((np.linalg.eigvalsh(signal) > float(np.linalg.eigvalsh(noise)[-1])).sum()))


def signal_shares(
    blocks: Iterable[tuple[sparse.csr_matrix, np.ndarray]], axes: np.ndarray, generator: np.random.Generator
) -> np.ndarray:
    """Return the share of signal, as opposed to counting noise, in the variance along every axis: (k,).

    The signal is the covariance of two halves of the counts.

    Parameters
    ----------
    blocks
        Pairs of log-normalised expression, (cells, genes), and total counts of the cells, (cells,).
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
    """Return how many eigenvalues of the genes' correlation exceed those of independent genes.

    The largest eigenvalue of independent genes follows the Tracy-Widom law (Johnstone 2001, Patterson 2006). The limit
    is its 95 % point.
    """
    variance = covariance.diagonal()
    varying = variance > SMALLEST_SIGNAL
    scale = np.sqrt(variance[varying])
    values = np.linalg.eigvalsh(covariance[np.ix_(varying, varying)] / np.outer(scale, scale))
    a, b = np.sqrt(max(cells - 1, 1)), np.sqrt(max(len(scale), 1))
    largest = ((a + b) ** 2 + TRACY_WIDOM * (a + b) * (1 / a + 1 / b) ** (1 / 3)) / max(cells, 1)
    return int((values > largest).sum())


def varying(spread: np.ndarray) -> int:
    """Return how many leading dimensions are linearly independent, judged by their covariance.

    Parameters
    ----------
    spread
        (k, k) covariance of the coordinates.
    """
    least = [float(np.linalg.eigvalsh(spread[:k, :k])[0]) for k in range(1, len(spread) + 1)]
    return int(np.cumprod(np.array(least) > VANISHING * max(float(spread.diagonal().max()), VANISHING)).sum())


def reliability(signal: np.ndarray, spread: np.ndarray) -> np.ndarray:
    """Return Lambda, the share of signal in the spread inside groups: (k, k), eigenvalues in [0.05, 1].

    Parameters
    ----------
    signal, spread
        (k, k) covariances inside groups: between the two halves of the counts, and of the coordinates.
    """
    values, vectors = np.linalg.eigh(signal)
    positive = (vectors * np.maximum(values, SMALLEST_SIGNAL)) @ vectors.T
    shares, directions = linalg.eigh(positive, spread)  # directions' spread directions = I
    return np.asarray(spread @ (directions * np.clip(shares, LEAST_RELIABLE, 1.0)) @ directions.T)


def fitted_positions(means: np.ndarray, axes: np.ndarray, variance: np.ndarray, cells: np.ndarray) -> np.ndarray:
    """Return the positions of groups on the axes, fitted by generalised least squares over genes: (groups, k).

    A change of state moves all genes of an axis in proportion to their loadings; an effect or a batch does not. So the
    mean of a group is not projected on the axes but regressed on them. Genes in which groups differ in ways that the
    axes do not explain get little weight.

    Parameters
    ----------
    means
        (groups, genes) mean expression of every group, minus that of all cells.
    axes
        (genes, k) orthonormal.
    variance
        (genes,) variance between cells of one group.
    cells
        (groups,) number of cells per group, at least 1.
    """
    return doubt_of(means, axes, variance, cells).positions(means, axes, cells)


@dataclass(frozen=True)
class Doubt:
    """Variance model of the genes of a group's mean; genes are weighted by its inverse.

    Attributes
    ----------
    between
        (genes,) variance of the groups' means that the axes do not explain.
    variance
        (genes,) variance between cells of one group.
    least
        Lower limit of a gene's variance.
    """

    between: np.ndarray
    variance: np.ndarray
    least: float

    def position(self, mean: np.ndarray, axes: np.ndarray, cells: float) -> np.ndarray:
        """Return the position of a group from its mean expression minus that of all cells, and its size: (k,)."""
        weighted = axes / np.maximum(self.between + self.variance / cells, self.least)[:, None]
        return np.asarray(np.linalg.solve(weighted.T @ axes, weighted.T @ mean))

    def positions(self, means: np.ndarray, axes: np.ndarray, cells: np.ndarray) -> np.ndarray:
        """Return the positions of several groups: (groups, k)."""
        return np.stack([self.position(mean, axes, count) for mean, count in zip(means, cells, strict=True)])


def doubt_of(means: np.ndarray, axes: np.ndarray, variance: np.ndarray, cells: np.ndarray) -> Doubt:
    """Estimate the variance model of groups' means; see `fitted_positions` for the parameters."""
    unexplained = means - (means @ axes) @ axes.T
    between = np.maximum((unexplained**2).mean(axis=0) - variance * (1 / cells).mean(), 0.0)
    doubt = between + variance / cells[:, None]  # (groups, genes) variance of a group's mean
    positive = doubt[doubt > 0]
    return Doubt(between, variance, float(np.quantile(positive, LEAST_DOUBT)) if len(positive) else 1.0)


def shrunk(e: np.ndarray, own_mean: np.ndarray, position: np.ndarray, share: np.ndarray) -> np.ndarray:
    """Shrink coordinates towards the position of the cell's group: (cells, k).

    Parameters
    ----------
    e, own_mean, position
        (cells, k) coordinates; mean coordinates of each cell's group, and its position, (cells, k) or (k,).
    share
        (k, k) Lambda.
    """
    return np.asarray(position + (e - own_mean) @ share.T)


def corners(populations: int, reach: float) -> np.ndarray:
    """Return extra coordinates that keep populations apart: (populations, bits), with no bits for one population.

    Two populations differ in at least one coordinate by more than `2 * reach`, the largest distance inside one.
    """
    bits = max(populations - 1, 0).bit_length()
    written = (np.arange(populations)[:, None] >> np.arange(bits)) & 1
    return np.asarray((2 * written - 1) * (reach * 1.01 + 1e-3))
