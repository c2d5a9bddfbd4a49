"""Axes from sums equal the axes of the whole matrix, computed at once."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from scipy import sparse

from ndreamer_dist.embedding.axes import Moments, ProductSum, moments_of, principal_axes, signed_axes, within_covariance

CELLS, GENES, GROUPS = 300, 12, 5


@pytest.fixture(scope="module")
def cells() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    groups = np.sort(rng.integers(0, GROUPS, CELLS))
    x = rng.poisson(1.0, (CELLS, GENES)) * rng.uniform(0.2, 2.0, GENES) + groups[:, None] * 0.3
    return x.astype(np.float32), groups


def summed(x: np.ndarray, groups: np.ndarray, inner: np.ndarray, step: int) -> Moments:
    parts = [
        moments_of(sparse.csr_matrix(x[i : i + step]), groups[i : i + step], GROUPS, inner)
        for i in range(0, CELLS, step)
    ]
    return functools.reduce(Moments.plus, parts)


@pytest.mark.parametrize("step", [7, 128, CELLS])
def test_components_are_those_of_the_centred_matrix(cells, step):
    x, groups = cells
    found = summed(x, groups, np.ones(GROUPS, bool), step)
    mean, components, variance = principal_axes(CELLS, found.sums.sum(axis=0), found.outer, 4)
    exact = x.astype(np.float64)
    _, values, axes = np.linalg.svd(exact - exact.mean(axis=0), full_matrices=False)
    np.testing.assert_allclose(mean, exact.mean(axis=0))
    np.testing.assert_allclose(variance, values[:4] ** 2 / (CELLS - 1))
    np.testing.assert_allclose(np.abs(components), np.abs(axes[:4].T), atol=1e-9)


def test_the_largest_loading_of_an_axis_is_positive():
    matrix = np.diag([1.0, 5.0, 3.0])
    axes, values = signed_axes(matrix, 2)
    np.testing.assert_allclose(axes, [[0, 0], [1, 0], [0, 1]], atol=1e-12)
    np.testing.assert_allclose(values, [5, 3])


@pytest.mark.parametrize("inner", [(1, 1, 1, 1, 1), (1, 0, 1, 0, 0)])
def test_covariance_inside_groups_is_that_of_the_groups_centred_one_by_one(cells, inner):
    x, groups = cells
    chosen = np.array(inner, dtype=bool)
    exact = x.astype(np.float64)
    centred = np.concatenate([exact[groups == g] - exact[groups == g].mean(axis=0) for g in np.flatnonzero(chosen)])
    found = within_covariance(summed(x, groups, chosen, 50))
    np.testing.assert_allclose(found, centred.T @ centred / len(centred), atol=1e-12)


def test_products_in_float32_give_the_covariance_inside_groups_to_its_rounding():
    """Use more genes than a strip holds, and two blocks, so that the scratch space is overwritten."""
    rng = np.random.default_rng(1)
    x = sparse.random_array((200, 300), density=0.3, rng=rng, data_sampler=rng.uniform, dtype=np.float32).tocsr()
    groups, inner = np.repeat([0, 1, 2], [80, 60, 60]), np.array([True, False, True])
    without, products = Moments.none(3, 300), ProductSum(300)
    buffer, exact = np.empty((300, 300), dtype=np.float32), []
    for rows in (slice(0, 90), slice(90, 200)):
        exact.append(moments_of(x[rows], groups[rows], 3, inner))
        without.plus(moments_of(x[rows], groups[rows], 3, inner, products=False))
        products.add(x[rows][inner[groups[rows]]], buffer)
    every = functools.reduce(Moments.plus, exact)
    np.testing.assert_array_equal(without.sums, every.sums)
    found = products.covariance(without)
    np.testing.assert_array_equal(found, found.T)
    np.testing.assert_allclose(found, within_covariance(every), atol=2e-6)


def test_variance_inside_groups_is_of_all_cells(cells):
    x, groups = cells
    exact = x.astype(np.float64)
    centred = exact - np.stack([exact[groups == g].mean(axis=0) for g in range(GROUPS)])[groups]
    found = summed(x, groups, np.array([True, False, False, False, False]), 50)
    np.testing.assert_allclose(found.within_variance, (centred**2).mean(axis=0))


def test_the_mean_is_of_all_cells_whichever_enter_the_products(cells):
    x, groups = cells
    found = summed(x, groups, np.array([True, False, False, False, False]), 50)
    np.testing.assert_allclose(found.mean, x.astype(np.float64).mean(axis=0))
