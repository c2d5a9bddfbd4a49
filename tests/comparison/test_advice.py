"""The advice follows its documented rule, and lists every measure in which the advised space is worse."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest

from ndreamer_dist.comparison.advice import MEASURES, Advice, advise, differing_settings

EVEN = {
    "purity": 0.9, "overlap": 0.9, "mixing": 0.5, "separation": 0.9, "silhouette": 0.2, "agreement": 0.9, "slope": 0.9,
    "split_half": 0.5, "state_held": 0.6, "seconds": 100.0, "peak_gb": 1.0,
}  # fmt: skip
NOTHING = dict.fromkeys(EVEN, np.nan)


def advice(*, nested: bool = False, clustered: bool = False, **spaces: dict[str, Any]) -> Advice:
    """Return the advice for spaces with equal measures, except for the given values."""
    table = pd.DataFrame([{"space": name, **EVEN, **values} for name, values in spaces.items()])
    return advise(table, nested=nested, clustered=clustered)


def test_every_measure_has_an_even_value_here() -> None:
    assert [measure.name for measure in MEASURES] == list(EVEN)


def test_most_points_win_and_every_loss_is_named() -> None:
    found = advice(a={"agreement": 0.95, "state_held": 0.7, "mixing": 0.1}, b={"overlap": 0.96, "seconds": 50.0})
    assert found.space == "a"
    assert "Use a: it is the best, or tied with the best, in 5 of 6 criteria" in found.why[0]
    assert found.why[0].endswith("points of the other spaces: b 4.")
    assert found.losses == (
        "It is worse in overlap: 0.900, against 0.960 for b.",
        "It is worse in iLISI, which is no criterion here: 0.100, against 0.500 for b.",
        "It is worse in seconds, which is no criterion here: 100, against 50 for b.",
    )


@pytest.mark.parametrize(
    ("a", "b", "winner", "why"),
    [
        pytest.param({"seconds": 100.0}, {"seconds": 50.0}, "b", "broken by run time", id="equal_but_for_time"),
        pytest.param({}, {}, "a", "broken by the order of the table", id="equal_in_all"),
        pytest.param({"seconds": np.nan}, {"seconds": np.nan}, "a", "by the order of the table", id="no_times"),
        pytest.param(
            {"purity": 0.93}, {"split_half": 0.6, "seconds": 500.0}, "b", "by agreement between halves of the donors",
            id="halves_before_time",
        ),
        pytest.param({"purity": 0.91}, {"seconds": 50.0}, "b", "broken by run time", id="a_difference_within_a_tie"),
        pytest.param({"purity": 0.911}, {"seconds": 50.0}, "a", "other spaces: b 5.", id="a_difference_beyond_a_tie"),
    ],
)  # fmt: skip
def test_ties(a: dict[str, float], b: dict[str, float], winner: str, why: str) -> None:
    found = advice(a=a, b=b)
    assert found.space == winner
    assert why in found.why[0]


@pytest.mark.parametrize(
    ("values", "nested", "clustered", "aside"),
    [
        pytest.param({"purity": 0.84}, False, False, True, id="impure"),
        pytest.param({"purity": 0.86}, False, False, False, id="nearly_as_pure"),
        pytest.param({"purity": 0.84}, False, True, False, id="impure_by_clusters"),
        pytest.param({"agreement": 0.84}, False, False, True, id="other_effects"),
        pytest.param({"agreement": 0.5, "slope": 0.2}, True, False, False, id="other_effects_where_nested"),
        pytest.param({"state_held": 0.44}, True, False, True, id="state_lost_where_nested"),
        pytest.param({"state_held": 0.44}, False, False, False, id="state_lost_where_crossed"),
    ],
)
def test_a_space_that_is_far_behind_is_set_aside(
    values: dict[str, float], nested: bool, clustered: bool, aside: bool
) -> None:
    better = {"overlap": 0.99, "split_half": 0.9}
    found = advice(nested=nested, clustered=clustered, good={}, far={**better, **values})
    assert any(text.startswith("far is excluded: its ") for text in found.aside) == aside
    assert found.space == ("good" if aside else "far")
    if aside:  # where it is better is said all the same
        assert "It is worse in overlap: 0.900, against 0.990 for far." in found.losses


def test_where_donors_are_nested_a_shift_of_state_earns_no_points() -> None:
    """As of a simulated shift without any effect: `harmony` takes it for one, and halves of the donors agree about it."""
    harmony, state = (
        {"overlap": 0.996, "agreement": 0.9, "split_half": 0.15},
        {"overlap": 0.97, "agreement": 0.6, "split_half": -0.07},
    )
    found = advice(nested=True, harmony={**harmony, "seconds": 10.0}, state=state)
    assert found.space == "state"
    assert found.why[0].endswith("the design, since the space state is made for nested donors.")
    assert "It is worse in split-half r, which is no criterion here: -0.070, against 0.150 for harmony." in found.losses
    assert "within_state and state_shift" in found.losses[-1]
    assert advice(nested=False, harmony=harmony, state=state).space == "harmony"


def test_halves_that_do_not_agree_say_nothing() -> None:
    found = advice(a={"split_half": -0.1, "purity": 0.92}, b={"split_half": 0.09})
    assert found.space == "a"
    assert "It is worse in split-half r, which is no criterion here: -0.100, against 0.090 for b." in found.losses
    assert "run time" in advice(a={"split_half": 0.09}, b={"split_half": -0.1, "seconds": 50.0}).why[0]


def test_where_all_would_be_set_aside_none_is() -> None:
    found = advice(a={"purity": 0.7}, b={"agreement": 0.7, "slope": 0.5})
    assert "none is excluded" in found.aside[0]
    assert found.space == "a"


def test_a_slope_is_best_near_1() -> None:
    assert advice(over={"slope": 1.3}, near={"slope": 0.96}).space == "near"


def test_columns_that_cannot_be_had_do_not_count() -> None:
    nothing = {"split_half": np.nan, "state_held": np.nan}
    found = advice(a={**nothing, "overlap": 0.95}, b=nothing)
    assert "4 of 4 criteria" not in found.why[0].replace("4 of 4 criteria (purity, overlap, r, slope)", "")
    assert found.space == "a"
    one = advice(a={"state_held": np.nan, "overlap": 0.95, "purity": 0.92}, b={})
    assert "Its state held could not be measured, unlike that of other spaces (0.600 for b)." in one.losses
    none = advice(a=NOTHING, b=NOTHING)
    assert none.space == "a"
    assert "No criterion could be measured" in none.why[0]


def test_spaces_that_were_matched_otherwise_are_named() -> None:
    one, three = {"match.neighbours": 1, "match.within": None}, {"match.neighbours": 3, "match.within": None}
    assert not differing_settings({"pca": one, "state": one})
    (said,) = differing_settings({"pca": one, "state": three})
    assert "also differ in match.neighbours (pca 1, state 3)" in said


def test_one_space_alone_is_no_choice() -> None:
    assert "Only one space, only, was measured" in advice(only={}).why[0]
