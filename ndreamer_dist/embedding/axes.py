"""Axes of a space from sums over cells: exact principal components, of all variation or of that inside groups. Pure.

Input: sums of expression and of its products, in float64 and in block order. Output: mean, axes and variances (METHOD
sections 9 and 10). The sign of an axis is fixed: its largest absolute loading is positive.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
from scipy import sparse


@dataclass(frozen=True)
class Moments:
    """Sums over some cells.

    Attributes
    ----------
    cells
        (groups,) cells of every group.
    sums
        (groups, genes) sum of the expression of every group's cells.
    inner_cells
        (groups,) those cells of every group that `outer` is of.
    outer
        (genes, genes) sum of the outer products of their expression.
    squares
        (genes,) sum of the squares of all cells' expression.
    """

    cells: np.ndarray
    sums: np.ndarray
    inner_cells: np.ndarray
    outer: np.ndarray
    squares: np.ndarray

    @classmethod
    def none(cls, groups: int, genes: int) -> Moments:
        """Return the sums over no cells."""
        cells, inner = np.zeros((2, groups), dtype=np.int64)
        return cls(cells, np.zeros((groups, genes)), inner, np.zeros((genes, genes)), np.zeros(genes))

    def plus(self, other: Moments) -> Moments:
        """Add the sums over other cells in place, and return all of them."""
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
        """Variance of a cell inside its group, over all groups: (genes,)."""
        between = (self.sums**2 / np.maximum(self.cells, 1)[:, None]).sum(axis=0)
        return np.maximum(self.squares - between, 0.0) / max(int(self.cells.sum()), 1)


def moments_of(
    x: sparse.csr_matrix, groups: np.ndarray, count: int, inner: np.ndarray, precision: type[np.floating] = np.float64
) -> Moments:
    """Return the sums of a row block.

    Parameters
    ----------
    x
        (cells, genes) log-normalised expression.
    groups, count
        (cells,) group of every cell, and how many groups there are.
    inner
        (groups,) whether a group's cells enter the outer product.
    precision
        Of the outer product. In float32 it takes half the time, and errs by about 1e-6 of itself; add it to float64.
    """
    exact = x.astype(np.float64, copy=False)
    cells = np.bincount(groups, minlength=count)
    member = sparse.csr_matrix((np.ones(len(groups)), (groups, np.arange(len(groups)))), shape=(count, len(groups)))
    inside = x[inner[groups]].astype(precision, copy=False).toarray()
    squared = sparse.csr_matrix((exact.data**2, x.indices, x.indptr), shape=x.shape)
    squares = squared.T @ np.ones(len(groups))
    return Moments(cells, (member @ exact).toarray(), np.where(inner, cells, 0), inside.T @ inside, squares)


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
    """Return the exact PCA of n points from their moments.

    Parameters
    ----------
    sums, outer
        Sum of the points (z,), and of their outer products (z, z), float64.

    Returns
    -------
    mean (z,), components (z, dimensions) with the largest absolute loading of each positive, variance (dimensions,).
    `dimensions` is cut to z and to the number of points.
    """
    mean = sums / cells
    covariance = (outer - cells * np.outer(mean, mean)) / max(cells - 1, 1)
    components, variance = signed_axes(covariance, min(dimensions, len(mean), cells))
    return mean, components, variance


def within_covariance(moments: Moments) -> np.ndarray:
    """Return the covariance inside groups, Sigma_w of METHOD section 10: (genes, genes), over the cells of `outer`."""
    cells = moments.inner_cells
    means = moments.sums[cells > 0] / np.sqrt(cells[cells > 0])[:, None]
    return np.asarray((moments.outer - means.T @ means) / max(int(cells.sum()), 1))
