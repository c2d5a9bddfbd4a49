"""The difference of two contrasts is tested on donors, whether they are paired or not."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from ndreamer_dist.comparison.interaction import SIGNS, difference_of_differences


def sides_of(sizes: tuple[int, ...], *, shared: bool, seed: int = 0) -> list[pd.DataFrame]:
    rng, start, made = np.random.default_rng(seed), 0, []
    for size in sizes:
        names = [f"d{start + i}" for i in range(size)]
        made.append(pd.DataFrame(rng.normal(size=(size, 40)), index=names).add_prefix("g"))
        start += 0 if shared else size
    return made


def test_four_sets_of_donors_are_tested_by_welchs_t_of_four_means() -> None:
    sides = sides_of((4, 6, 3, 5), shared=False)
    found = difference_of_differences(sides)
    parts = np.array([side.var(ddof=1) / len(side) for side in sides])
    freedom = parts.sum(axis=0) ** 2 / (parts**2 / np.array([[3], [5], [2], [4]])).sum(axis=0)
    effect = sum(sign * side.mean().to_numpy() for sign, side in zip(SIGNS, sides, strict=True))
    np.testing.assert_allclose(found["interaction"], effect)
    np.testing.assert_allclose(found["p"], 2 * stats.t.sf(np.abs(effect) / np.sqrt(parts.sum(axis=0)), freedom))
    assert set(found["donors"]) == {18}


def test_donors_under_all_four_conditions_are_tested_by_their_own_differences() -> None:
    sides = sides_of((5, 5, 5, 5), shared=True)
    own = sum(sign * side.to_numpy() for sign, side in zip(SIGNS, sides, strict=True))
    expected = stats.ttest_1samp(own, 0)
    found = difference_of_differences(sides)
    np.testing.assert_allclose(found["statistic"], expected.statistic)
    np.testing.assert_allclose(found["p"], expected.pvalue)


def test_donors_that_are_paired_inside_a_contrast_are_compared_between_the_two() -> None:
    wild, mutant = sides_of((4, 4), shared=True), sides_of((6, 6), shared=True, seed=1)
    wild = [side.set_axis([f"w{i}" for i in range(4)]) for side in wild]
    expected = stats.ttest_ind(mutant[0] - mutant[1], (wild[0] - wild[1]).to_numpy(), equal_var=False)
    np.testing.assert_allclose(difference_of_differences([*mutant, *wild])["p"], expected.pvalue)


@pytest.mark.parametrize("shared", [False, True], ids=["apart", "paired"])
def test_without_an_interaction_p_values_are_even(shared: bool) -> None:
    p = np.concatenate(
        [difference_of_differences(sides_of((5, 5, 5, 5), shared=shared, seed=s))["p"] for s in range(50)]
    )
    assert 0.03 < (p <= 0.05).mean() < 0.07
