"""The design assigns each cell to the group of its names; names are numbered in order of appearance."""

from __future__ import annotations

import json
import logging

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ndreamer_dist.cohort.design import Design, report_design
from ndreamer_dist.errors import CohortError
from ndreamer_dist.grouping.names import nearly_same
from ndreamer_dist.grouping.small_groups import MERGED, SCREEN_CONDITIONS, group_name, report_small_groups
from tests.cohort.inputs import cohort_settings, designed

NAMES = st.sampled_from(["a", "b", "a+b", "a|b", "a\\", "\\+", "|", "1"])


@st.composite
def tables(draw: st.DrawFn) -> pd.DataFrame:
    rows = draw(st.lists(st.tuples(NAMES, NAMES, st.sampled_from(["ctrl", "x", "y"])), min_size=1, max_size=40))
    rows += [("a", "b", "x"), ("a", "b", "ctrl")]
    return pd.DataFrame(rows, columns=["site", "donor", "condition"])


@settings(max_examples=150, deadline=None)
@given(tables(), st.integers(1, 4), st.randoms(use_true_random=False))
def test_every_cell_is_in_the_group_of_its_own_names(obs: pd.DataFrame, least: int, random: object) -> None:
    keep = np.array([random.random() < 0.9 for _ in range(len(obs))])  # type: ignore[attr-defined]
    try:
        design, codes, reasons = designed(
            obs, condition_key="condition", control="ctrl", batch_keys=["site", "donor"], keep=keep,
            min_group_cells=least,
        )  # fmt: skip
    except CohortError:
        kept = obs[keep]
        sizes = kept.groupby(["site", "donor", "condition"]).size()
        left = set(sizes[sizes >= least].index.get_level_values("condition"))
        assert left != set(obs["condition"])
        return
    sizes = obs[keep].groupby(["site", "donor", "condition"]).size()
    for row, (site, donor, condition) in enumerate(obs.itertuples(index=False)):
        expected = keep[row] and sizes[site, donor, condition] >= least
        assert (codes[row] >= 0) == expected
        assert (reasons[row] != "") == (keep[row] and not expected)
        if expected:
            group = design.groups[codes[row]]
            assert group.name == group_name([site, donor], condition)
            assert design.conditions[group.condition] == condition
            levels = tuple(n[c] for n, c in zip(design.batch_levels, group.batch_codes, strict=True))
            assert levels == (site, donor)
    _check_shape(design, codes)


def _check_shape(design: Design, codes: np.ndarray) -> None:
    assert design.conditions[0] == "ctrl"
    assert len({group.name for group in design.groups}) == len(design.groups)
    assert [group.code for group in design.groups] == list(range(len(design.groups)))
    assert [(g.batch, g.condition) for g in design.groups] == sorted((g.batch, g.condition) for g in design.groups)
    assert [group.cells for group in design.groups] == np.bincount(codes[codes >= 0]).tolist()
    assert design.groups[0].start == 0
    assert all(a.stop == b.start for a, b in zip(design.groups, design.groups[1:], strict=False))
    assert Design.from_json(json.loads(json.dumps(design.to_json()))) == design


def test_names_are_numbered_by_appearance_among_the_kept_cells() -> None:
    obs = pd.DataFrame({"condition": ["late", "z", "ctrl", "a", "z"], "donor": ["gone", "D2", "D2", "D1", "D1"]})
    keep = np.array([False, True, True, True, True])
    with pytest.raises(CohortError, match="no cell is left of condition 'late'"):
        designed(obs, condition_key="condition", control="ctrl", batch_keys=["donor"], keep=keep)
    obs.loc[0, "condition"] = "a"
    design, codes, _ = designed(obs, condition_key="condition", control="ctrl", batch_keys=["donor"], keep=keep)
    assert design.conditions == ("ctrl", "z", "a")
    assert design.batches == ("D2", "D1")
    assert [group.name for group in design.groups] == ["D2|ctrl", "D2|z", "D1|z", "D1|a"]
    assert codes.tolist() == [-1, 1, 0, 3, 2]


@pytest.mark.parametrize(
    ("values", "control", "names"),
    [
        pytest.param([1, 0, 1], "0", ("0", "1"), id="integers"),
        pytest.param([True, False, True], "False", ("False", "True"), id="booleans"),
        pytest.param(pd.Categorical(["b", "a", "b"], categories=["c", "b", "a"]), "a", ("a", "b"), id="categorical"),
        pytest.param(pd.Categorical([2, 1, 2]), "1", ("1", "2"), id="integer_categories"),
        pytest.param(pd.array(["b", "a", "b"], dtype="string"), "a", ("a", "b"), id="string_dtype"),
        pytest.param(np.array([1, "0", "1"], dtype=object), "0", ("0", "1"), id="mixed"),
    ],
)
def test_columns_that_are_not_text_are_named_by_str(values: object, control: str, names: tuple[str, ...]) -> None:
    design, codes, _ = designed(pd.DataFrame({"c": values}), condition_key="c", control=control)
    assert design.conditions == names
    assert codes.tolist() == [1, 0, 1]
    assert design.batches == ("",)
    assert [group.name for group in design.groups] == list(names)


def test_small_groups_are_dropped_kept_or_refused_and_always_reported(caplog: pytest.LogCaptureFixture) -> None:
    obs = pd.DataFrame({"c": ["k"] * 5 + ["x"] * 6, "d": ["A"] * 3 + ["B"] * 2 + ["A"] * 1 + ["B"] * 5})
    arguments = {"condition_key": "c", "control": "k", "batch_keys": ["d"], "min_group_cells": 2}
    dropped, codes, reasons = designed(obs, **arguments, small_groups="drop")
    assert [group.name for group in dropped.groups] == ["A|k", "B|k", "B|x"]
    assert codes[5] == -1
    assert reasons[5] == "group of fewer than 2 cells"
    kept, _, _ = designed(obs, **arguments, small_groups="keep")
    assert "A|x" in [group.name for group in kept.groups]
    with pytest.raises(CohortError, match=r"1 group hold.*A\|x \(1\)"):
        designed(obs, **arguments, small_groups="error")
    small = report_small_groups(
        obs, cohort_settings(condition_key="c", batch_keys=["d"], min_group_cells=2), np.ones(11, dtype=bool)
    )
    with caplog.at_level(logging.INFO):
        notes = report_design(dropped, small)
    assert notes == ["1 group of fewer than 2 cells left out: A|x (1)"]
    assert notes[0] in caplog.text


def test_batches_without_controls_are_ordinary_and_said() -> None:
    obs = pd.DataFrame({"c": ["k", "x", "x"], "d": ["A", "B", "C"]})
    design, _, _ = designed(obs, condition_key="c", control="k", batch_keys=["d"])
    small = report_small_groups(obs, cohort_settings(condition_key="c", batch_keys=["d"]), np.ones(3, dtype=bool))
    assert report_design(design, small) == [
        ONE_BATCH.format("'x'"),
        "2 of 3 batches hold no control: their controls come from the other batches",
    ]


ONE_BATCH = (
    "the effect of {} cannot be told from a difference between batches: it has no batch in common with the control, and "
    "one of the two has a single batch"
)
CONFOUNDED = {
    "nested": ([("k", "A"), ("k", "B"), ("x", "C"), ("x", "D")], None),
    "crossed": ([("k", "A"), ("x", "A")], None),
    "no_batch": ([("k", "A"), ("x", "A"), ("x", "B")], None),
    "one_of_two": ([("k", "A"), ("k", "B"), ("x", "B"), ("x", "C"), ("y", "C")], "'y' cannot be told"),
    "without_a_name": ([("k", "A"), ("k", "nan"), ("x", "A")], "'nan' is taken for the name"),
}


@pytest.mark.parametrize("case", CONFOUNDED)
def test_a_condition_that_is_a_batch_and_a_name_that_is_none_are_said(case: str) -> None:
    rows, expected = CONFOUNDED[case]
    obs = pd.DataFrame(rows, columns=["c", "d"])
    keys = {"condition_key": "c", "batch_keys": [] if case == "no_batch" else ["d"]}
    design, _, _ = designed(obs, control="k", **keys)
    notes = report_design(design, report_small_groups(obs, cohort_settings(**keys), np.ones(len(obs), dtype=bool)))
    said = [note for note in notes if "hold no control" not in note]
    assert (len(said), expected is None or expected in said[0]) == (expected is not None, True)


@pytest.mark.parametrize(
    ("values", "control"),
    [([0, 1] * 20, "0.0"), ([0.0, 1.0] * 20, "0"), ([False, True] * 20, "false"), (pd.Categorical([0, 1] * 20), "0.0")],
)
def test_a_control_that_is_a_number_is_found_by_its_value(values: object, control: str) -> None:
    obs = pd.DataFrame({"condition": values})
    design, _, _ = designed(obs, condition_key="condition", control=control)
    assert design.control in ("0", "0.0", "False")


def test_text_is_no_number() -> None:
    obs = pd.DataFrame({"condition": ["0", "1"] * 20})
    with pytest.raises(CohortError, match=r"no cell has the control '0\.0'"):
        designed(obs, condition_key="condition", control="0.0")


def screen() -> pd.DataFrame:
    """Return a screen: a control, two knock-outs with many cells and three with few."""
    sizes = {"ctrl": 60, "KO A": 40, "KO B": 40, "KO rare": 5, "KO once": 1, "KO two": 2}
    return pd.DataFrame({"condition": np.repeat(list(sizes), list(sizes.values()))})


def test_conditions_of_few_cells_are_named_all_at_once() -> None:
    words = "--exclude-condition 'KO rare' --exclude-condition 'KO once' --exclude-condition 'KO two'"
    with pytest.raises(CohortError, match=f"^3 conditions, 'KO rare', 'KO once', 'KO two', would vanish: .*{words}"):
        designed(screen(), condition_key="condition", control="ctrl", min_group_cells=20)


def test_excluded_conditions_are_left_out_and_say_why() -> None:
    gone = ("KO rare", "KO once", "KO two")
    design, groups, reasons = designed(
        screen(), condition_key="condition", control="ctrl", min_group_cells=20, exclude=gone
    )
    assert design.conditions == ("ctrl", "KO A", "KO B")
    assert (groups >= 0).sum() == 140
    assert set(reasons[groups < 0]) == {"excluded condition"}
    with pytest.raises(CohortError, match="'condition' holds one condition, 'ctrl'"):
        designed(screen(), condition_key="condition", control="ctrl", exclude=("KO A", "KO B", *gone))


def test_rare_conditions_are_left_out_where_that_is_asked() -> None:
    design, groups, reasons = designed(
        screen(), condition_key="condition", control="ctrl", min_group_cells=20, rare_conditions="drop"
    )
    assert design.conditions == ("ctrl", "KO A", "KO B")
    assert set(reasons[groups < 0]) == {"group of fewer than 20 cells"}
    with pytest.raises(CohortError, match="the control 'ctrl' would vanish: no group of it has 61 cells"):
        designed(screen(), condition_key="condition", control="ctrl", min_group_cells=61, rare_conditions="drop")
    with pytest.raises(CohortError, match=r"5 conditions, .* would vanish"):
        designed(screen(), condition_key="condition", control="ctrl", min_group_cells=50, rare_conditions="drop")


BY_CONDITION = {"condition_key": "condition", "control": "ctrl", "batch_keys": ["lane"], "min_group_cells": 40}


def lanes(sizes: dict[str, list[int]]) -> pd.DataFrame:
    """Return cells of conditions in lanes L0, L1, ..., with these numbers per condition and lane."""
    cells = [(name, f"L{lane}") for name, counts in sizes.items() for lane, n in enumerate(counts) for _ in range(n)]
    return pd.DataFrame(cells, columns=["condition", "lane"])


KNOCK_OUTS = {f"KO {i}": [22, 20] for i in range(SCREEN_CONDITIONS - 3)}


@pytest.mark.parametrize(
    ("sizes", "groups"),
    [
        pytest.param([60, 60], {"L0|X": 60, "L1|X": 60}, id="large"),
        pytest.param([22, 20], {"L0|X": 22, "L1|X": 20}, id="a_share_of_the_condition_each"),
        pytest.param([4, 3, 2, 40], {"merged|X": 49}, id="small_ones_that_are_too_few_together"),
        pytest.param([4, 3, 4, 40], {"L3|X": 40, "merged|X": 11}, id="small_ones_are_merged"),
        pytest.param([9, 40, 30], {"L1|X": 40, "merged|X": 39}, id="a_small_one_joins_the_next"),
        pytest.param([8] * 6, {"merged|X": 48}, id="all_are_small"),
    ],
)
def test_a_screen_asks_cells_of_a_condition_and_merges_its_small_batches(
    sizes: list[int], groups: dict[str, int]
) -> None:
    obs = lanes({"ctrl": [50, 50, 50, 50, 50, 50], **KNOCK_OUTS, "Y": [30, 30], "X": sizes})
    design, codes, _ = designed(obs, **BY_CONDITION, small_groups="auto")
    assert (codes >= 0).all()
    code = design.condition_code("X")
    assert {group.name: group.cells for group in design.with_condition(code)} == groups
    small = report_small_groups(
        obs, cohort_settings(**BY_CONDITION, small_groups="auto"), np.ones(len(obs), dtype=bool)
    )
    assert small.sizes == {group.name: group.cells for group in design.groups}
    batches = small.merged.get("X", 0)
    assert batches == (len(sizes) - len(groups) + 1 if "merged|X" in groups else 0)
    said = f"batches with fewer than 10 cells of a condition merged, in 1 condition: X ({batches} batches)"
    assert (said in report_design(design, small)) == bool(batches)


def test_few_conditions_are_no_screen() -> None:
    obs = lanes({"ctrl": [50, 50], "X": [42, 20]})
    design, codes, _ = designed(obs, **BY_CONDITION, small_groups="auto")
    assert [group.name for group in design.groups] == ["L0|ctrl", "L0|X", "L1|ctrl"]
    assert (codes < 0).sum() == 20
    merged, _, _ = designed(obs, **BY_CONDITION, small_groups="merge")
    assert merged.n_cells == len(obs)


def test_rare_conditions_of_a_screen_are_refused_or_left_out_by_their_cells() -> None:
    obs = lanes({"ctrl": [50, 50], **KNOCK_OUTS, "X": [20, 19], "Z": [1, 0]})
    words = r"^2 conditions, 'X', 'Z', would vanish: they have fewer than 40 cells each .*rare_conditions=drop"
    with pytest.raises(CohortError, match=words):
        designed(obs, **BY_CONDITION, small_groups="auto")
    design, codes, reasons = designed(obs, **BY_CONDITION, small_groups="auto", rare_conditions="drop")
    assert set(design.conditions) == {"ctrl", *KNOCK_OUTS}
    assert set(reasons[codes < 0]) == {"condition of fewer than 40 cells"}
    small = report_small_groups(
        obs, cohort_settings(**BY_CONDITION, small_groups="auto"), np.ones(len(obs), dtype=bool)
    )
    assert "2 conditions of fewer than 40 cells left out: X (39), Z (1)" in small.notes()


def test_a_lane_that_is_called_merged_stays_what_it_is() -> None:
    obs = lanes({"ctrl": [50, 50], **KNOCK_OUTS, "Y": [30, 30], "X": [8] * 6}).replace({"lane": {"L0": MERGED}})
    design, _, _ = designed(obs, **BY_CONDITION, small_groups="auto")
    assert [group.name for group in design.with_condition(design.condition_code("X"))] == [f"{MERGED}_|X"]


@pytest.mark.parametrize("conditions", [30, 60])
def test_edges_grow_with_conditions_and_not_with_their_square(conditions: int) -> None:
    obs = lanes({"ctrl": [5, 5], **{f"KO {i}": [2, 2] for i in range(conditions)}})
    design, _, _ = designed(obs, condition_key="condition", control="ctrl", batch_keys=["lane"])
    assert len(design.needed_edges("needed")) == 4 + 8 * conditions


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [("ctrl", "Ctrl ", True), ("1", "1.0", True), ("true", "True", True), ("ctrl", "ctrl2", False), ("1", "2", False)],
)
def test_names_that_are_spelt_otherwise_are_nearly_the_same(one: str, other: str, same: bool) -> None:
    assert nearly_same(one, other) == same
