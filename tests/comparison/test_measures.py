"""Measures of a matching space agree with brute-force computations of their definitions."""

from __future__ import annotations

import numpy as np
import pytest

from ndreamer_dist.comparison.measures import agreement, scaled_lisi, silhouette, state_axes, state_held

SCALE = 2.0
"""Standard deviation of the state in the tests below; that of the noise is 1."""


def points_and_labels(cells: int = 150) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 3, cells)
    return (rng.normal(size=(cells, 4)) + codes[:, None]).astype(np.float32), codes


def test_lisi_is_that_of_its_definition() -> None:
    """Return the inverse Simpson index, with Gaussian weights on the nearest 90 cells, of perplexity 30."""
    points, codes = points_and_labels()
    found = []
    for row in range(len(points)):
        distance = np.linalg.norm(points.astype(float) - points[row], axis=1)
        near = np.argsort(distance, kind="stable")[1:90]
        low, high = 0.0, 1e6
        for _ in range(200):
            beta = (low + high) / 2
            weight = np.exp(-beta * (distance[near] - distance[near].min()))
            weight /= weight.sum()
            entropy = -(weight * np.log(np.maximum(weight, 1e-300))).sum()
            low, high = (beta, high) if entropy > np.log(30) else (low, beta)
        found.append(1 / sum(weight[codes[near] == code].sum() ** 2 for code in range(3)))
    assert scaled_lisi(points, codes) == pytest.approx((np.median(found) - 1) / 2, abs=0.02)


def test_lisi_is_0_for_labels_apart_and_1_for_labels_alike() -> None:
    points, codes = points_and_labels(600)
    assert scaled_lisi(points + 100 * codes[:, None], codes) == pytest.approx(0, abs=1e-9)
    assert scaled_lisi(points - codes[:, None], codes) > 0.8
    assert np.isnan(scaled_lisi(points, np.zeros(len(points))))


def test_the_silhouette_is_that_of_brute_force() -> None:
    points, codes = points_and_labels(60)
    distance = np.linalg.norm(points[:, None].astype(float) - points[None], axis=2)
    values = []
    for row, code in enumerate(codes):
        own = distance[row, (codes == code) & (np.arange(60) != row)].mean()
        other = min(distance[row, codes == c].mean() for c in range(3) if c != code)
        values.append((other - own) / max(own, other))
    assert silhouette(points, codes) == pytest.approx(np.mean(values), abs=1e-6)
    alone = np.append(codes, 3)  # a label of one cell is left out
    assert silhouette(np.concatenate([points, points[:1]]), alone) == pytest.approx(np.mean(values), abs=1e-6)


def test_agreement_leaves_out_what_is_not_known() -> None:
    rng = np.random.default_rng(0)
    difference = rng.normal(size=(3, 50))
    effect = 0.8 * difference + 0.1 * rng.normal(size=(3, 50))
    r = np.mean([np.corrcoef(difference[p], effect[p])[0, 1] for p in (0, 1)])
    slope = np.mean([np.cov(difference[p], effect[p])[0, 1] / difference[p].var(ddof=1) for p in (0, 1)])
    effect[2, 7] = np.nan
    assert agreement(effect, difference) == pytest.approx((r, slope))
    assert np.isnan(agreement(effect[2:], difference[2:])).all()
    assert np.isnan(agreement(np.zeros((1, 50)), difference[:1])).all()


def stateful(state: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return two sets of genes that follow a state, with independent noise in every cell."""
    rng = np.random.default_rng(seed)
    loadings = np.random.default_rng(99).normal(size=80) / 3
    values = np.outer(state, loadings) + rng.normal(size=(len(state), 80))
    return values[:, ::2], values[:, 1::2]


@pytest.mark.parametrize("share", [pytest.param(s, id=f"share_{s}") for s in (0.0, 0.4, 1.0)])
def test_the_state_held_is_the_true_share_whatever_the_noise_of_a_cell(share: float) -> None:
    rng = np.random.default_rng(1)
    state = SCALE * rng.normal(size=2000)
    folds = np.arange(2000) % 2
    cells = stateful(state, 2)
    axes = state_axes(*cells, folds)
    other = share * state + np.sqrt(1 - share**2) * SCALE * rng.normal(size=2000)
    assert axes.shared > 0.5
    assert axes.shared < 0.95  # noise is there, and does not bias what follows
    assert state_held(axes, cells, stateful(other, 3), folds) == pytest.approx(share, abs=0.05)


def test_cells_without_a_state_have_none_to_hold() -> None:
    axes = state_axes(*stateful(np.zeros(400), 2), np.arange(400) % 2)
    assert abs(axes.shared) < 0.1


def test_a_cell_is_scored_by_axes_of_other_cells() -> None:
    rng = np.random.default_rng(0)
    folds = np.arange(100) % 2
    first, second = rng.normal(size=(2, 100, 30))
    axes = state_axes(first, second, folds)
    changed = first.copy()
    changed[folds == 0] = rng.normal(size=(50, 30))
    assert np.array_equal(state_axes(changed, second, folds).left[0], axes.left[0])
    assert not np.allclose(state_axes(changed, second, folds).left[1], axes.left[1])
