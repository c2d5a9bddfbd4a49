"""The parts of the state space equal those of a prototype in plain numpy, computed at once (METHOD section 10)."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from scipy import sparse

from ndreamer_dist.cohort.statistics import normalised
from ndreamer_dist.embedding import state
from ndreamer_dist.embedding.state import HalfSums

CELLS, GENES, GROUPS, K = 600, 30, 6, 3


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.fixture(scope="module")
def counts() -> np.ndarray:
    """Counts whose rates follow one state, with a different mix of states in each group."""
    rng = generator(1)
    groups = group_codes()
    score = rng.normal(size=CELLS) + groups * 0.2
    rates = np.exp(rng.normal(0.5, 0.7, GENES) + np.outer(score, rng.normal(0, 0.5, GENES)))
    return rng.poisson(rates)


def group_codes() -> np.ndarray:
    return np.repeat(np.arange(GROUPS), CELLS // GROUPS)


def logged(counts: np.ndarray, totals: np.ndarray) -> sparse.csr_matrix:
    return normalised(sparse.csr_matrix(counts.astype(np.float32)), totals)


def dense(half: state.Half) -> np.ndarray:
    return half[np.arange(len(half.totals))].toarray()


def donor_means(z: np.ndarray, d: np.ndarray) -> np.ndarray:
    return np.stack([z[d == j].mean(axis=0) for j in range(d.max() + 1)])


def test_counts_are_recovered_from_log_normalised_values_to_the_last_one():
    rng = generator()
    counts = rng.poisson(rng.choice([0.3, 5, 2000, 60_000], (40, 25)))
    totals = counts.sum(axis=1) + rng.integers(0, 50_000, 40)
    x = logged(counts, totals.astype(np.float64))
    np.testing.assert_array_equal(state.recovered_counts(x, totals), counts[counts > 0])


def test_halves_add_up_to_the_counts_and_are_normalised_by_their_own_totals(counts):
    totals = counts.sum(axis=1).astype(np.float64)
    x = logged(counts, totals)
    halves = state.halves(x, totals, generator())
    undone = [np.expm1(dense(half)) for half in halves]
    for half in undone:
        np.testing.assert_allclose(half.sum(axis=1), 1e4)
    drawn = state.thinned(counts[counts > 0], generator())
    first = np.zeros(counts.shape)
    first[counts > 0] = drawn  # in the order of the entries
    for half, part in zip(undone, (first, counts - first), strict=True):
        np.testing.assert_allclose(half, part / part.sum(axis=1, keepdims=True) * 1e4, atol=1e-6)


def test_halves_and_their_scores_are_the_same_however_many_rows_are_worked_on_at_a_time(counts, monkeypatch):
    many = counts * np.where(np.arange(GENES) < 2, 40, 1)  # some counts are beyond 64
    many[7] = 0
    totals = many.sum(axis=1).astype(np.float64) + 5
    x, rows, axes = logged(many, totals), generator().permutation(CELLS)[:400], generator().normal(size=(GENES, K))
    whole = state.halves(x, totals, generator())
    expected = [half[rows] @ axes for half in whole]
    monkeypatch.setattr(state, "PASS_ROWS", 37)
    monkeypatch.setattr(state, "DRAWN_AT_ONCE", 101)
    for half, one, scores in zip(state.halves(x, totals, generator()), whole, expected, strict=True):
        np.testing.assert_array_equal(dense(half), dense(one))
        np.testing.assert_array_equal(state.scores(half, rows, axes), scores)


@pytest.mark.parametrize("count", [0, 1, 3, 64, 65, 1000])
def test_half_of_a_count_is_binomial(count):
    drawn = state.thinned(np.full(20_000, count), generator())
    assert drawn.min() >= 0
    assert drawn.max() <= count
    np.testing.assert_allclose(drawn.mean(), count / 2, atol=4 * np.sqrt(count / 4 / 20_000))
    np.testing.assert_allclose(drawn.var(), count / 4, rtol=0.05)


def test_axes_of_signal_are_told_from_axes_of_noise():
    """Variation beyond Poisson noise is signal: a share near c^2 m / (1 + c^2 m) of the variance m + (c m)^2."""
    rng = generator(2)
    spread = np.repeat([0.0, 0.5], 10)
    rates = 20.0 * np.exp(rng.normal(size=(4000, 20)) * spread - spread**2 / 2)
    counts = rng.poisson(rates)
    others = 10_000 - counts.sum(axis=1)
    totals = (counts.sum(axis=1) + others).astype(np.float64)
    x = logged(counts, totals)
    blocks = [(x[start : start + 1000], totals[start : start + 1000]) for start in range(0, 4000, 1000)]
    shares = state.signal_shares(blocks, np.eye(20), generator())
    np.testing.assert_allclose(shares[:10], 0.0, atol=0.08)
    np.testing.assert_allclose(shares[10:], 0.284 * 20 / (1 + 0.284 * 20), atol=0.1)


def test_counts_of_other_genes_are_halved_as_one(counts):
    others = np.full(CELLS, 1000)
    totals = (counts.sum(axis=1) + others).astype(np.float64)
    halves = state.halves(logged(counts, totals), totals, generator())
    shares = [np.expm1(dense(half)).sum(axis=1) / 1e4 for half in halves]
    expected = counts.sum(axis=1) / totals
    for share in shares:
        np.testing.assert_allclose(share.mean(), expected.mean(), rtol=0.01)
        assert (share < 1).all()


def test_rows_move_inside_their_stratum_and_none_stays_that_has_company():
    strata = np.array([3, 0, 0, 1, 0, 3, 7, 0])
    moved = state.shuffled_inside(strata, generator())
    assert sorted(moved) == list(range(len(strata)))
    np.testing.assert_array_equal(strata[moved], strata)
    stays = moved == np.arange(len(strata))
    np.testing.assert_array_equal(stays, [s in (1, 7) for s in strata])


def test_shrunk_coordinates_are_the_prototypes(counts):
    """The arithmetic of the prototype, on the same halves: S, N, Lambda by `eig`, and coordinates."""
    totals, d = counts.sum(axis=1).astype(np.float64), group_codes()
    x = logged(counts, totals)
    halves = state.halves(x, totals, generator())
    z = x.toarray().astype(np.float64)
    axes = np.linalg.eigh(np.cov((z - donor_means(z, d)[d]).T))[1][:, ::-1][:, :K]
    e = (z - z.mean(axis=0)) @ axes
    parts = [dense(half) @ axes for half in halves]

    ew = e - donor_means(e, d)[d]
    a, b = (part - donor_means(part, d)[d] for part in parts)
    S, N = (a.T @ b + b.T @ a) / 2 / CELLS, ew.T @ ew / CELLS
    w, v = np.linalg.eigh(S)
    S_positive = (v * np.maximum(w, 1e-6)) @ v.T
    w, v = np.linalg.eig(S_positive @ np.linalg.inv(N))
    share = v.real @ np.diag(np.clip(w.real, 0.05, 1)) @ np.linalg.inv(v.real)
    expected = donor_means(e, d)[d] + ew @ share.T

    moved = state.shuffled_inside(d, generator(3))
    sums = []
    for start in range(0, CELLS, 250):
        rows = np.arange(start, min(start + 250, CELLS))
        inside = state.shuffled_inside(d[rows], generator(start))
        sums.append(state.half_sums(e[rows], (parts[0][rows], parts[1][rows]), d[rows], GROUPS, inside))
    found = functools.reduce(HalfSums.plus, sums)
    np.testing.assert_allclose(found.covariance("signal"), S, atol=1e-10)
    np.testing.assert_allclose(found.covariance("spread"), N, atol=1e-10)
    got = state.reliability(found.covariance("signal"), found.covariance("spread"))
    np.testing.assert_allclose(got, share, atol=1e-8)
    own = found.group_means[d]
    np.testing.assert_allclose(state.shrunk(e, own, own, got), expected, atol=1e-7)
    assert moved.shape == (CELLS,)


def test_as_many_dimensions_are_confirmed_as_were_planted():
    rng = generator(4)
    d = np.repeat(np.arange(8), 200)
    score = rng.normal(size=(len(d), 2)) @ np.diag([2.0, 1.0])
    axes = np.linalg.qr(rng.normal(size=(10, 10)))[0]
    signal = score @ axes[:2]
    a, b = (signal + rng.normal(size=(len(d), 10)) for _ in range(2))
    found = state.half_sums(signal, (a, b), d, 8, state.shuffled_inside(d, rng))
    parts = [found.covariance(name) for name in ("signal", "noise", "spread")]
    assert state.confirmed_dimensions(parts[0], parts[1], parts[2] + 1e-6 * np.eye(10)) == 2
    noisy = parts[2] + np.diag([10.0] * 10)  # nothing is mostly signal; one dimension is always kept
    assert state.confirmed_dimensions(parts[0], parts[1], noisy) == 1


def test_a_groups_position_follows_the_state_and_not_what_moves_single_genes():
    rng = generator(7)
    axes = np.linalg.qr(rng.normal(size=(200, 2)))[0]
    truth = rng.normal(size=(12, 2)) * 3
    cells = rng.integers(50, 200, 12)
    noise = rng.normal(size=(12, 200)) * np.sqrt(1 / cells)[:, None]
    means = truth @ axes.T + noise
    moved = means.copy()
    moved[:6, np.argsort(-np.abs(axes[:, 0]))[:5]] += 4.0  # an effect on five genes that load on the axis
    fitted = state.fitted_positions(moved, axes, np.ones(200), cells)
    projected = moved @ axes
    errors = [float(np.abs(found - truth).mean()) for found in (fitted, projected)]
    assert errors[0] < 0.2 < 0.4 < errors[1]
    np.testing.assert_allclose(state.fitted_positions(means, axes, np.ones(200), cells), truth, atol=0.5)


def test_positions_are_those_of_the_prototype():
    rng = generator(8)
    axes, variance = np.linalg.qr(rng.normal(size=(30, 3)))[0], rng.uniform(0.1, 2, 30)
    means, cells = rng.normal(size=(6, 30)), np.array([3, 40, 500, 60, 7, 80])
    rest = means - means @ axes @ axes.T
    psi = np.maximum((rest**2).mean(0) - variance * (1 / cells).mean(), 0)[None] + variance[None] / cells[:, None]
    psi = np.maximum(psi, np.quantile(psi, 0.05))
    expected = [
        np.linalg.solve((axes / p[:, None]).T @ axes, (axes / p[:, None]).T @ m)
        for m, p in zip(means, psi, strict=True)
    ]
    np.testing.assert_allclose(state.fitted_positions(means, axes, variance, cells), expected)


@pytest.mark.parametrize("planted", [0, 1, 3])
def test_as_many_axes_are_beyond_chance_as_genes_share_factors(planted):
    rng = generator(5)
    values = rng.normal(size=(2000, 60)) * rng.uniform(0.3, 3.0, 60)
    values[:, -1] = 0.0  # a gene that does not vary
    factors = rng.normal(size=(2000, planted)) @ rng.normal(0, 1.5, (planted, 60))
    assert state.beyond_chance(np.cov((values + factors).T), 2000) == planted


def test_an_eigenvalue_of_independent_genes_is_beyond_chance_once_in_twenty_times():
    draws = [state.beyond_chance(np.cov(generator(seed).normal(size=(400, 50)).T), 400) for seed in range(200)]
    assert 0 < np.mean(np.array(draws) > 0) < 0.12


@pytest.mark.parametrize("populations", [2, 3, 9])
def test_populations_are_further_apart_than_any_two_cells_of_one(populations):
    corners = state.corners(populations, 4.0)
    gaps = np.abs(corners[:, None] - corners[None]).max(axis=2)[~np.eye(populations, dtype=bool)]
    assert (gaps > 8.0).all()


def test_one_population_needs_no_further_coordinate():
    assert state.corners(1, 4.0).shape == (1, 0)
