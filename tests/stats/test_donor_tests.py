"""Donor-level tests agree with scipy where it has them, count labellings as documented, and hold their level."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from ndreamer_dist.stats import donor_tests
from ndreamer_dist.stats.donor_tests import labellings, linear_test, paired_test, sign_flips, welch_test


def drawn(rows: int, genes: int = 7, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).gamma(2.0, size=(rows, genes)) + 3


def split(treated: int, control: int) -> np.ndarray:
    return np.arange(treated + control) < treated


@pytest.mark.parametrize(("treated", "control"), [(3, 3), (4, 5), (6, 9)])
def test_welch_and_its_permutation_are_scipys(treated: int, control: int) -> None:
    means, labels = drawn(treated + control), split(treated, control)
    test = welch_test(means, labels)
    known = stats.ttest_ind(means[labels], means[~labels], equal_var=False)
    np.testing.assert_allclose(test.statistic, known.statistic)
    np.testing.assert_allclose(test.p_parametric, known.pvalue)
    np.testing.assert_allclose(test.effect, means[labels].mean(0) - means[~labels].mean(0))
    permuted = stats.permutation_test(
        (means[labels], means[~labels]), lambda x, y, axis: np.abs(stats.ttest_ind(x, y, axis=axis, equal_var=False)[0]),
        vectorized=True, n_resamples=np.inf, alternative="greater",
    )  # fmt: skip
    np.testing.assert_allclose(test.p_permutation, permuted.pvalue)


def test_the_main_p_is_the_permutations_from_a_thousand_labellings_on() -> None:
    few = welch_test(drawn(9), split(4, 5))
    assert math.comb(9, 4) < 1000 < math.comb(15, 6)
    assert few.method == "welch"
    np.testing.assert_array_equal(few.p, few.p_parametric)
    many = welch_test(drawn(15), split(6, 9))
    assert many.method == "permutation"
    np.testing.assert_array_equal(many.p, many.p_permutation)
    assert (few.few_donors, many.few_donors) == (True, False)


@pytest.mark.parametrize(
    ("treated", "control", "floor"),
    [
        pytest.param(7, 7, 2 / math.comb(14, 7), id="equal_numbers_count_twice"),
        pytest.param(6, 8, 1 / math.comb(14, 6), id="all_labellings"),
        pytest.param(9, 42, 1 / 10_001, id="drawn_labellings"),
    ],
)
def test_the_smallest_p_is_reached_by_a_perfect_difference(treated: int, control: int, floor: float) -> None:
    means = np.where(split(treated, control)[:, None], 100.0, 0.0) + drawn(treated + control, 2)
    test = welch_test(means, split(treated, control))
    assert test.p_floor == pytest.approx(floor)
    np.testing.assert_allclose(test.p_permutation, floor)


@pytest.mark.parametrize(("treated", "control"), [(7, 7), (6, 8)])
@pytest.mark.parametrize("noise", [1e-2, 1e-4, 1e-5])
def test_rounding_loses_no_labelling_of_an_effect_almost_without_noise(
    treated: int, control: int, noise: float
) -> None:
    labels = split(treated, control)
    means = np.where(labels[:, None], 5.0, 0.0) + noise * drawn(treated + control, 20)
    np.testing.assert_allclose(welch_test(means, labels).p_permutation, welch_test(means, labels).p_floor)


def test_every_labelling_reaches_no_difference_at_all() -> None:
    labels = np.repeat([True, False], 10)
    means = np.random.default_rng(0).integers(-1, 2, (20, 60)).astype(np.float64)
    equal = means[labels].sum(axis=0) == means[~labels].sum(axis=0)
    assert equal.sum() > 3
    np.testing.assert_array_equal(welch_test(means, labels).p_permutation[equal], 1.0)


def test_drawn_labellings_agree_with_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    means, labels = drawn(15), split(6, 9)
    whole = welch_test(means, labels)
    monkeypatch.setattr(donor_tests, "MOST_LABELLINGS", 10)
    part = welch_test(means, labels)
    np.testing.assert_allclose(part.p, whole.p, atol=5 * 0.5 / math.sqrt(10_000))
    again = welch_test(means, labels)
    np.testing.assert_array_equal(part.p, again.p)


def test_draws_grow_with_the_genes_and_keep_the_numbers_of_donors() -> None:
    labels = labellings(40, 9, genes=700)
    assert labels.shape == (14_000, 40)
    assert (labels.sum(1) == 9).all()
    assert abs(labels.mean(0) - 9 / 40).max() < 0.02
    assert len(labellings(6, 3, genes=700)) == 20


def test_small_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = welch_test(drawn(15), split(6, 9))
    monkeypatch.setattr(donor_tests, "CHUNK", 50)
    np.testing.assert_array_equal(welch_test(drawn(15), split(6, 9)).p, whole.p)


@pytest.mark.parametrize("pairs", [3, 4, 5, 6, 10])
def test_paired_donors_are_tested_as_scipy_does(pairs: int) -> None:
    differences = np.random.default_rng(3).normal(0.4, 1, size=(pairs, 5))
    test = paired_test(differences)
    known = stats.ttest_1samp(differences, 0)
    np.testing.assert_allclose(test.statistic, known.statistic)
    np.testing.assert_allclose(test.p_parametric, known.pvalue)
    assert test.method == ("sign flips" if pairs >= 10 else "paired t")
    assert test.few_donors == (pairs <= 4)
    if pairs < 6:
        assert np.isnan(test.p_permutation).all()
        return
    flips = sign_flips(pairs, genes=5)
    t = np.array([stats.ttest_1samp(differences * signs[:, None], 0).statistic for signs in flips])
    expected = (np.abs(t) >= np.abs(test.statistic) * (1 - 1e-9)).mean(0)
    np.testing.assert_allclose(test.p_permutation, expected)


def test_covariates_are_taken_out_as_least_squares_does() -> None:
    labels = split(6, 7)
    age = np.random.default_rng(1).normal(size=(13, 2))
    means = drawn(13, 3) + age @ np.ones((2, 3))
    test = linear_test(means, labels, age)
    design = np.column_stack([np.ones(13), labels, age])
    inverse = np.linalg.inv(design.T @ design)
    coefficients = inverse @ design.T @ means
    variance = ((means - design @ coefficients) ** 2).sum(0) / (13 - 4)
    t = coefficients[1] / np.sqrt(variance * inverse[1, 1])
    np.testing.assert_allclose(test.effect, coefficients[1])
    np.testing.assert_allclose(test.statistic, t)
    np.testing.assert_allclose(test.p, 2 * stats.t.sf(np.abs(t), 9))
    with pytest.raises(ValueError, match="determine the condition"):
        linear_test(means, labels, labels[:, None].astype(float))


@pytest.mark.parametrize(
    ("treated", "columns"), [pytest.param(2, 2, id="few_donors"), pytest.param(4, 7, id="no_freedom_left")]
)
def test_a_model_of_too_few_donors_has_no_p_value(treated: int, columns: int) -> None:
    labels = split(treated, 5)
    test = linear_test(drawn(len(labels)), labels, np.random.default_rng(0).normal(size=(len(labels), columns)))
    assert test.method == "none"
    assert np.isnan(test.p).all()
    assert np.isfinite(test.effect).all()


def test_without_spread_there_is_no_p_value() -> None:
    means = drawn(12, 3)
    means[:, 0] = 5.0
    means[:, 1] = np.where(split(6, 6), 2.0, 1.0)
    test = welch_test(means, split(6, 6))
    assert np.isnan(test.p[:2]).all()
    assert np.isfinite(test.p[2])
    assert test.effect[1] == pytest.approx(1)
    assert np.isnan(paired_test(np.zeros((7, 1))).p).all()


def test_below_three_donors_there_are_only_effects() -> None:
    test = welch_test(drawn(7), split(2, 5))
    assert test.method == "none"
    assert np.isnan(test.p).all()
    assert np.isfinite(test.effect).all()
    assert np.isnan(paired_test(drawn(2)).p).all()
    with pytest.raises(ValueError, match="found 0 treated and 5 control"):
        welch_test(drawn(5), split(0, 5))


@pytest.mark.parametrize(("treated", "control"), [(42, 9), (5, 11), (16, 32)])
def test_unequal_numbers_of_donors_and_skewed_genes_keep_the_level(treated: int, control: int) -> None:
    p = np.concatenate(
        [
            welch_test(np.random.default_rng(seed).gamma(0.5, size=(treated + control, 500)), split(treated, control)).p
            for seed in range(3)
        ]
    )
    assert 0.035 < (p < 0.05).mean() < 0.065
    assert (p < 0.001).mean() < 0.004
