"""Cells that responded are distinguished from those that did not, and no cell contributes to its own reference."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse, stats

import ndreamer_dist as nd
from ndreamer_dist.stats.response import Means, control_differences
from ndreamer_dist.stats.results import Results
from tests.tiny import SETTINGS, as_memory, dense, tiny_cohort


def with_escapes(folder: Path, share: float, donors: int = 4) -> anndata.AnnData:
    """Return a cohort in which a share of every donor's treated cells are relabelled control cells of the donor.

    The other treated cells have 20 doubled genes in addition to their simulated effects.
    """
    cohort = as_memory(tiny_cohort(folder, cells=2400, batches=donors, cell_types=2))
    rng, treated = np.random.default_rng(0), (cohort.obs["condition"] == "treated").to_numpy()
    cohort.obs["escaped"] = False
    for donor in cohort.obs["donor"].unique():
        mine = (cohort.obs["donor"] == donor).to_numpy()
        number = int(share * (mine & treated).sum())
        moved = rng.choice(
            np.flatnonzero(mine & ~treated), size=min(number, (mine & ~treated).sum() // 2), replace=False
        )
        cohort.obs.loc[cohort.obs_names[moved], "escaped"] = True
    responding = np.flatnonzero(treated)
    cohort.obs["condition"] = cohort.obs["condition"].astype(str).where(~cohort.obs["escaped"], "treated")
    counts = dense(cohort.X)
    raised = rng.choice(np.flatnonzero(counts.mean(axis=0) > 0.5), 20, replace=False)
    counts[np.ix_(responding, raised)] += rng.poisson(counts[np.ix_(responding, raised)])
    cohort.X = sparse.csr_matrix(counts.astype(np.float32))
    return cohort


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    folder = tmp_path_factory.mktemp("escapes")
    return nd.run(
        with_escapes(folder, 0.4), out=folder / "run", condition_key="condition", control="control", batch_key="donor",
        preset="small", embedding="pca", settings=SETTINGS,
    ).results  # fmt: skip


@pytest.fixture(scope="module")
def table(results: Results) -> pd.DataFrame:
    return results.response("cell_type")


def auc(value: np.ndarray, positive: np.ndarray) -> float:
    statistic = stats.mannwhitneyu(value[positive], value[~positive]).statistic
    return float(statistic / positive.sum() / (~positive).sum())


def test_escaped_cells_are_told_from_those_that_responded(results: Results, table: pd.DataFrame) -> None:
    cells = table[~table["placebo"]]
    escaped = results.obs.loc[cells["cell"], "escaped"].to_numpy(dtype=bool)
    assert 0.2 < escaped.mean() < 0.5
    found = {
        name: auc(cells["response"].to_numpy()[rows], ~escaped[rows])
        for name, rows in cells.reset_index(drop=True).groupby("population").indices.items()
    }
    assert min(found.values()) >= 0.9, found
    assert cells["within_placebo"].to_numpy()[escaped].mean() > 0.8


def test_there_is_a_row_for_every_treated_cell_and_the_placebo_has_spread_1(
    results: Results, table: pd.DataFrame
) -> None:
    cells = table[~table["placebo"]]
    assert set(cells["cell"]) == set(results.obs.index[results.obs["condition"] == "treated"])
    assert not cells["cell"].duplicated().any()
    for _, part in table[table["placebo"]].groupby("population"):
        assert part["response"].std() == pytest.approx(1, rel=0.02)
        assert part["within_placebo"].mean() == pytest.approx(0.95, abs=0.01)


def test_the_yardstick_is_of_the_other_donors() -> None:
    means = Means()
    for donor, value in ((0, 1.0), (1, 3.0), (2, 5.0), (0, 2.0)):
        means.add(donor, np.full((2, 3), value))
    mean, cells = means.others(1)
    np.testing.assert_allclose(mean, (2 * 1 + 2 * 5 + 2 * 2) / 6)
    assert cells == 6


def test_a_control_group_without_others_is_its_own_placebo_beside_groups_with_others(results: Results) -> None:
    """So it is where donors are mapped with controls onto a run with a single control group: here, the first of four."""
    sample = results._statistics_input(None, None)
    first, second = [group for group in sample.design.groups if group.condition == 0][:2]
    rows = np.r_[first.start : first.start + 5, second.start : second.start + 5]
    pair = first.code, first.code
    near = sample.counterparts.edges(rows[:5], [pair], distances=False)[pair][0][:, 0]
    x = dense(results.expression(order="packed").X).astype(np.float64)
    found = control_differences(replace(sample, design=replace(sample.design, mappings=(2,))), rows)
    np.testing.assert_allclose(found[:5], x[rows[:5]] - x[near], atol=1e-6)
    assert np.isfinite(found).all()


def test_one_donor_and_one_control_group_will_do(tmp_path: Path) -> None:
    results = nd.run(
        with_escapes(tmp_path, 0.4, donors=1), out=tmp_path / "run", condition_key="condition", control="control",
        preset="small", embedding="pca", settings=SETTINGS,
    ).results  # fmt: skip
    table = results.response("cell_type")
    cells = table[~table["placebo"]]
    escaped = results.obs.loc[cells["cell"], "escaped"].to_numpy(dtype=bool)
    assert cells.loc[~escaped, "response"].mean() > cells.loc[escaped, "response"].mean() + 0.5
