"""The design says which group each cell is in, by names and in order of appearance."""

from __future__ import annotations

import json
import logging

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ndreamer_dist.cohort.design import Design, build_design, group_name, group_sizes, report_design
from ndreamer_dist.errors import CohortError

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
        design, codes, reasons = build_design(
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
        build_design(obs, condition_key="condition", control="ctrl", batch_keys=["donor"], keep=keep)
    obs.loc[0, "condition"] = "a"
    design, codes, _ = build_design(obs, condition_key="condition", control="ctrl", batch_keys=["donor"], keep=keep)
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
    design, codes, _ = build_design(pd.DataFrame({"c": values}), condition_key="c", control=control)
    assert design.conditions == names
    assert codes.tolist() == [1, 0, 1]
    assert design.batches == ("",)
    assert [group.name for group in design.groups] == list(names)


def test_small_groups_are_dropped_kept_or_refused_and_always_reported(caplog: pytest.LogCaptureFixture) -> None:
    obs = pd.DataFrame({"c": ["k"] * 5 + ["x"] * 6, "d": ["A"] * 3 + ["B"] * 2 + ["A"] * 1 + ["B"] * 5})
    arguments = {"condition_key": "c", "control": "k", "batch_keys": ["d"], "min_group_cells": 2}
    dropped, codes, reasons = build_design(obs, **arguments, small_groups="drop")
    assert [group.name for group in dropped.groups] == ["A|k", "B|k", "B|x"]
    assert codes[5] == -1
    assert reasons[5] == "group of fewer than 2 cells"
    kept, _, _ = build_design(obs, **arguments, small_groups="keep")
    assert "A|x" in [group.name for group in kept.groups]
    with pytest.raises(CohortError, match=r"1 group hold.*A\|x \(1\)"):
        build_design(obs, **arguments, small_groups="error")
    sizes = group_sizes(obs, "c", ["d"], np.ones(11, dtype=bool))
    small = {name: cells for name, cells in sizes.items() if cells < 2}
    with caplog.at_level(logging.INFO):
        notes = report_design(dropped, small, 2, "drop")
    assert notes == ["1 group of fewer than 2 cells left out: A|x (1)"]
    assert notes[0] in caplog.text


def test_batches_without_controls_are_ordinary_and_said() -> None:
    obs = pd.DataFrame({"c": ["k", "x", "x"], "d": ["A", "B", "C"]})
    design, _, _ = build_design(obs, condition_key="c", control="k", batch_keys=["d"])
    assert report_design(design, {}, 1, "drop") == [
        "2 of 3 batches hold no control: their controls come from the other batches"
    ]


@pytest.mark.parametrize(
    ("values", "control"),
    [([0, 1] * 20, "0.0"), ([0.0, 1.0] * 20, "0"), ([False, True] * 20, "false"), (pd.Categorical([0, 1] * 20), "0.0")],
)
def test_a_control_that_is_a_number_is_found_by_its_value(values: object, control: str) -> None:
    obs = pd.DataFrame({"condition": values})
    design, _, _ = build_design(obs, condition_key="condition", control=control)
    assert design.control in ("0", "0.0", "False")


def test_text_is_no_number() -> None:
    obs = pd.DataFrame({"condition": ["0", "1"] * 20})
    with pytest.raises(CohortError, match=r"no cell has the control '0\.0'"):
        build_design(obs, condition_key="condition", control="0.0")


def screen() -> pd.DataFrame:
    """Return a screen: a control, two knock-outs of many cells, three of few."""
    sizes = {"ctrl": 60, "KO A": 40, "KO B": 40, "KO rare": 5, "KO once": 1, "KO two": 2}
    return pd.DataFrame({"condition": np.repeat(list(sizes), list(sizes.values()))})


def test_conditions_of_few_cells_are_named_all_at_once() -> None:
    words = "--exclude-condition 'KO rare' --exclude-condition 'KO once' --exclude-condition 'KO two'"
    with pytest.raises(CohortError, match=f"^3 conditions, 'KO rare', 'KO once', 'KO two', would vanish: .*{words}"):
        build_design(screen(), condition_key="condition", control="ctrl", min_group_cells=20)


def test_excluded_conditions_are_left_out_and_say_why() -> None:
    gone = ("KO rare", "KO once", "KO two")
    design, groups, reasons = build_design(
        screen(), condition_key="condition", control="ctrl", min_group_cells=20, exclude=gone
    )
    assert design.conditions == ("ctrl", "KO A", "KO B")
    assert (groups >= 0).sum() == 140
    assert set(reasons[groups < 0]) == {"excluded condition"}
    with pytest.raises(CohortError, match="'condition' holds one condition, 'ctrl'"):
        build_design(screen(), condition_key="condition", control="ctrl", exclude=("KO A", "KO B", *gone))
