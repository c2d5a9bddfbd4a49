"""An effect is a within-state effect plus a state shift, and both are tested with donors as replicates."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

import ndreamer_dist as nd
from ndreamer_dist.stats.decomposition import Decomposition, Part, decomposition_columns, reading
from ndreamer_dist.stats.donor_tests import left_out_differences, left_out_effects, linear_test, untested, welch_test
from ndreamer_dist.stats.null import rates
from ndreamer_dist.stats.results import Results
from tests.tiny import SETTINGS, as_memory, dense, tiny_cohort

PARTS = ("total", "within_state", "state_shift")


@pytest.fixture(scope="module")
def table(results: Results) -> pd.DataFrame:
    return results.cate("cell_type", min_cells=5)


def test_the_parts_add_up_to_the_pseudobulk_effect(table: pd.DataFrame) -> None:
    assert table["within_state"].notna().any()
    np.testing.assert_array_equal(table["total"], table["pseudobulk_effect"])
    np.testing.assert_array_equal(table["total_p"], table["pseudobulk_p"])
    np.testing.assert_allclose(table["total"], table["within_state"] + table["state_shift"], atol=1e-12)
    for part in PARTS:
        assert table[f"{part}_p"].dropna().between(0, 1).all()


def test_within_state_compares_what_all_cells_find_in_the_donors_at_their_state(results: Results, table) -> None:
    space = results._state_spaces["cell_type", None, 5]
    obs, x = results.packed_obs, dense(results.expression(order="packed").X).astype(float)
    donors = (obs["donor"].astype(str) + obs["condition"].astype(str)).to_numpy()
    name = table["population"].iloc[0]
    code = sorted(obs["cell_type"].astype(str).unique()).index(name)
    cells = {d: np.flatnonzero((space.populations == code) & (donors == d)) for d in np.unique(donors)}
    cells = {d: rows for d, rows in cells.items() if len(rows)}
    points = space.points[:, : space.dimensions[code]].astype(float)
    m = {}
    for target, there in cells.items():
        asked = []
        for rows in cells.values():
            far = ((points[rows, None] - points[there][None]) ** 2).sum(-1)
            far[rows[:, None] == there[None]] = np.inf
            asked.append(x[there[far.argmin(1)]].mean(0))
        m[target] = np.mean(asked, axis=0)
    treated = np.array([not d.endswith(results.control) for d in m])
    values = np.array(list(m.values()))
    own = np.array([x[rows].mean(0) for rows in cells.values()])
    part = table[table["population"] == name]
    for column, found in (("within_state", values), ("state_shift", own - values)):
        test = welch_test(found, treated, seed=0)
        np.testing.assert_allclose(part[column], test.effect, atol=1e-6)
        np.testing.assert_allclose(part[f"{column}_p"], test.p, atol=0.02)
        left = [found[treated & kept].mean(0) - found[~treated & kept].mean(0) for kept in ~np.eye(len(m), dtype=bool)]
        np.testing.assert_allclose(part[f"{column}_loo_low"], np.min(left, axis=0), atol=1e-6)
        np.testing.assert_allclose(part[f"{column}_loo_high"], np.max(left, axis=0), atol=1e-6)
    assert (part["few_cells"] == (part["cells_a_donor"] < 20)).all()
    assert part["cells_a_donor"].iloc[0] == np.median([len(rows) for rows in cells.values()])


def test_the_second_table_makes_no_coordinates_again(results: Results, table: pd.DataFrame) -> None:
    before = results._state_spaces["cell_type", None, 5]
    few = results.cate("cell_type", genes=list(results.var_names[:3]), min_cells=5)
    assert results._state_spaces["cell_type", None, 5] is before
    same = table[table["gene"].isin(results.var_names[:3])].reset_index(drop=True)
    np.testing.assert_array_equal(few["within_state"], same["within_state"])


def test_treated_cells_alone_may_ask(results: Results) -> None:
    table = results.cate("cell_type", genes=list(results.var_names[:4]), min_cells=5, population="treated")
    np.testing.assert_allclose(table["total"], table["within_state"] + table["state_shift"], atol=1e-12)
    assert table["within_state_p"].notna().any()


def test_the_null_table_knows_both_parts(results: Results) -> None:
    table = results.null("cell_type", labellings=3, min_cells=5, genes=list(results.var_names[:20]))
    assert {"within_state", "state_shift"} <= set(table["test"])
    assert rates(table).loc[["within_state", "state_shift"], 0.05].between(0, 1).all()


def test_paired_donors_are_compared_pair_by_pair(tmp_path) -> None:
    cohort = as_memory(tiny_cohort(tmp_path, cells=1000, batches=5))
    run = nd.run(
        cohort, out=tmp_path / "run", condition_key="condition", control="control", batch_key="donor", preset="small",
        embedding="pca", settings=SETTINGS,
    )  # fmt: skip
    table = run.results.cate("cell_type", min_cells=3)
    parts = table.dropna(subset=["within_state_p"])
    assert set(parts["p_method"]) == {"paired t"}
    np.testing.assert_allclose(parts["total"], parts["within_state"] + parts["state_shift"], atol=1e-12)
    assert (parts["total_loo_low"] <= parts["total"] + 1e-12).all()
    assert (parts["total_loo_high"] >= parts["total"] - 1e-12).all()


@pytest.mark.parametrize(("cells", "few"), [(10.0, True), (19.5, True), (20.0, False), (50.0, False), (100.0, False)])
def test_parts_of_few_cells_a_donor_are_marked(cells: float, few: bool) -> None:
    """With 10 cells per donor a tenth of the genes without effect has p < 0.05; from 20 cells on the level holds."""
    part = Part(untested(np.zeros(2)), np.zeros(2), np.zeros(2))
    columns = decomposition_columns(Decomposition(part, part, part, cells, 0.5), part, 2)
    assert columns["few_cells"] is few
    assert columns["cells_a_donor"] == cells


def test_a_reading_says_which_parts_stand() -> None:
    nan, yes, no = np.nan, 0.01, 0.2
    within, shift = np.array([yes, no, yes, no, nan]), np.array([no, yes, yes, no, nan])
    assert list(reading(within, shift)) == ["within", "state", "both", "neither", ""]


def test_effects_without_each_donor_are_those_of_the_others() -> None:
    rng = np.random.default_rng(0)
    values, treated, age = rng.normal(size=(9, 4)), np.arange(9) < 4, rng.normal(size=(9, 1))
    others = ~np.eye(9, dtype=bool)
    plain = [welch_test(values[kept], treated[kept]).effect for kept in others]
    np.testing.assert_allclose(left_out_effects(values, treated), plain)
    model = [linear_test(values[kept], treated[kept], age[kept]).effect for kept in others]
    np.testing.assert_allclose(left_out_effects(values, treated, age), model)
    pairs = [values[kept].mean(axis=0) for kept in others]
    np.testing.assert_allclose(left_out_differences(values), pairs)


def test_without_its_only_donor_a_condition_has_no_effect() -> None:
    values = np.arange(8.0).reshape(4, 2)
    found = left_out_effects(values, np.array([True, False, False, False]))
    assert np.isnan(found[0]).all()
    assert np.isfinite(found[1:]).all()
    assert np.isnan(left_out_differences(values[:1])).all()


def test_what_a_table_read_is_said_once(results: Results, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("DEBUG", "ndreamer_dist"):
        results.cate(genes=list(results.var_names[:2]), min_cells=5)
    said = [record.getMessage() for record in caplog.records if ": read " in record.getMessage()]
    assert len(said) == 1
    assert said[0].startswith("cate: read ")
    assert results.last_read.bytes > 0
