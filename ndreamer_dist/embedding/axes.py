"""Compute exact principal axes from sums over cells: of all variation, or of variation inside groups. Pure.

Input: sums of expression and of its outer products, added in float64 and in block order. Output: mean, axes and
variances (METHOD sections 9 and 10). The sign of an axis is fixed: its largest absolute loading is positive.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
from scipy import sparse

STRIP = 128
"""Number of rows of a strip in `ProductSum`."""


@dataclass(frozen=True)
class Moments:
    """Sums over some cells.

    Attributes
    ----------
    cells
        (groups,) number of cells per group.
    sums
        (groups, genes) sum of expression per group.
    inner_cells
        (groups,) number of cells per group that enter `outer`.
    outer
        (genes, genes) sum of the outer products of expression over those cells.
    squares
        (genes,) sum of squared expression over all cells.
    """

    cells: np.ndarray
    sums: np.ndarray
    inner_cells: np.ndarray
    outer: np.ndarray
    squares: np.ndarray

    @classmethod
    def none(cls, groups: int, genes: int) -> Moments:
        """Return the sums over no cells, with `outer` left out (1, 1)."""
        cells, inner = np.zeros((2, groups), dtype=np.int64)
        return cls(cells, np.zeros((groups, genes)), inner, np.zeros((1, 1)), np.zeros(genes))

    def plus(self, other: Moments) -> Moments:
        """Add the sums over other cells in place, and return self."""
        for field in fields(self):
            sums = getattr(self, field.name)
            np.add(sums, getattr(other, field.name), out=sums)
        return self

    @property
    def mean(self) -> np.ndarray:
        """Mean expression of all cells: (genes,)."""
        return self.sums.sum(axis=0) / max(int(self.cells.sum()), 1)

    @property
    def within_variance(self) -> np.ndarray:
        """Variance between cells of one group, pooled over groups: (genes,)."""
        between = (self.sums**2 / np.maximum(self.cells, 1)[:, None]).sum(axis=0)
        return np.maximum(self.squares - between, 0.0) / max(int(self.cells.sum()), 1)


def moments_of(
    x: sparse.csr_matrix, groups: np.ndarray, count: int, inner: np.ndarray, *, products: bool = True
) -> Moments:
    """Return the sums over a row block.

    Parameters
    ----------
    x
        (cells, genes) CSR, log-normalised expression.
    groups, count
        (cells,) group of every cell, and the number of groups.
    inner
        (groups,) bool, whether a group's cells enter the outer product.
    products
        Whether to compute the outer product, which is by far the most work.
    """
    exact = x.astype(np.float64, copy=False)
    cells = np.bincount(groups, minlength=count)
    member = sparse.csr_matrix((np.ones(len(groups)), (groups, np.arange(len(groups)))), shape=(count, len(groups)))
    inside = exact[inner[groups]].toarray() if products else np.zeros((1, 1))
    squared = sparse.csr_matrix((exact.data**2, x.indices, x.indptr), shape=x.shape)
    squares = squared.T @ np.ones(len(groups))
    return Moments(cells, (member @ exact).toarray(), np.where(inner, cells, 0), inside.T @ inside, squares)


class ProductSum:
    """Sum of outer products of expression: float32 products of blocks, added in float64.

    A float32 product takes half the time and has a relative error of about 1e-6. Only the upper triangle is stored, in
    strips of rows that fit into the CPU cache.
    """

    def __init__(self, genes: int) -> None:
        self._strips = {start: np.zeros((min(STRIP, genes - start), genes - start)) for start in range(0, genes, STRIP)}

    def add(self, x: sparse.csr_matrix, product: np.ndarray) -> None:
        """Add the products of a block.

        Parameters
        ----------
        x
            (cells, genes) CSR float32.
        product
            (genes, genes) float32 scratch space, overwritten.
        """
        values = x.toarray()
        np.matmul(values.T, values, out=product)
        for start, strip in self._strips.items():
            strip += product[start : start + STRIP, start:].astype(np.float64)

    def covariance(self, moments: Moments) -> np.ndarray:
        """Return `within_covariance` from these products and the other sums of `moments`: (genes, genes) float32."""
        means, cells = _scaled_means(moments), max(int(moments.inner_cells.sum()), 1)
        found = np.empty((means.shape[1], means.shape[1]), dtype=np.float32)
        for start, strip in self._strips.items():
            rows = slice(start, start + STRIP)
            part = ((strip - means[:, rows].T @ means[:, start:]) / cells).astype(np.float32)
            found[rows, start:], found[start:, rows] = part, part.T
        return found


def signed_axes(matrix: np.ndarray, keep: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the leading eigenvectors of a symmetric matrix, (n, keep), largest first, and their eigenvalues, >= 0."""
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    axes = vectors[:, ::-1][:, :keep]
    largest = np.abs(axes).argmax(axis=0)
    signs = np.where(axes[largest, np.arange(axes.shape[1])] < 0, -1.0, 1.0)
    return axes * signs, np.maximum(values[::-1][:keep], 0.0)


def principal_axes(
    cells: int, sums: np.ndarray, outer: np.ndarray, dimensions: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the exact PCA of points from their moments.

    Parameters
    ----------
    cells
        Number of points.
    sums, outer
        Float64 sum of the points (z,), and of their outer products (z, z).
    dimensions
        Number of components, at most z and the number of points.

    Returns
    -------
    mean (z,), components (z, dimensions) with the largest absolute loading of each positive, variance (dimensions,).
    """
    mean = sums / cells
    covariance = (outer - cells * np.outer(mean, mean)) / max(cells - 1, 1)
    components, variance = signed_axes(covariance, min(dimensions, len(mean), cells))
    return mean, components, variance


def within_covariance(moments: Moments) -> np.ndarray:
    """Return the covariance inside groups of the cells in `outer`, Sigma_w of METHOD section 10: (genes, genes)."""
    means = _scaled_means(moments)
    return np.asarray((moments.outer - means.T @ means) / max(int(moments.inner_cells.sum()), 1))


def _scaled_means(moments: Moments) -> np.ndarray:
    """Return sqrt(cells) times the mean of each group with cells in `outer`: (groups with cells, genes)."""
    cells = moments.inner_cells
    return np.asarray(moments.sums[cells > 0] / np.sqrt(cells[cells > 0])[:, None])
