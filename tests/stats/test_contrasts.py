"""Any two conditions can be compared: effects follow the donors' means, and change sign with the contrast's direction.

The cohort has two factors, a drug and a genotype, whose combinations are the conditions.
"""

from __future__ import annotations

from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy.spatial.distance import cdist

import ndreamer_dist as nd
from ndreamer_dist import keys
from ndreamer_dist.errors import CohortError, QueryError
from ndreamer_dist.stats.results import Results
from tests.tiny import SETTINGS, as_memory, dense, tiny_cohort

FACTORS = {
    "control": ("none", "wt"), "treated": ("drugA", "wt"), "treated_2": ("none", "mut"),
    "treated_3": ("drugA", "mut"),
}  # fmt: skip
ANTISYMMETRIC = ("effect", "statistic", "pseudobulk_effect", "total", "within_state", "state_shift")
SAME = ("p", "pseudobulk_p", "total_p", "within_state_p", "p_adjusted", "state_reliability")


def two_factors(folder: Path) -> anndata.AnnData:
    """Return a cohort of 3 donors under every combination of a drug and a genotype."""
    made = as_memory(tiny_cohort(folder, cells=1080, batches=3, conditions=4, cell_types=2))
    names = made.obs["condition"].astype(str).map(FACTORS)
    made.obs["drug"], made.obs["genotype"] = [name[0] for name in names], [name[1] for name in names]
    del made.obs["condition"]
    return made


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> anndata.AnnData:
    return two_factors(tmp_path_factory.mktemp("factors"))


@pytest.fixture(scope="module")
def results(cohort: anndata.AnnData, tmp_path_factory: pytest.TempPathFactory) -> Results:
    folder = tmp_path_factory.mktemp("contrasts")
    cohort.write_h5ad(folder / "cohort.h5ad")
    run = nd.run(
        folder / "cohort.h5ad", out=folder / "run", condition_key=["drug", "genotype"], control="none:wt",
        batch_key="donor", embedding="pca", settings={**SETTINGS, "match.hubs": "csls"},
    )  # fmt: skip
    return run.results


@pytest.fixture(scope="module")
def table(results: Results) -> pd.DataFrame:
    return contrast(results, "drugA:mut", "none:mut")


def contrast(results: Results, condition: str, baseline: str | None, genes: int = 150) -> pd.DataFrame:
    names = list(results.var_names[:genes])
    return results.cate("cell_type", condition=condition, baseline=baseline, min_cells=5, genes=names)


def test_conditions_are_the_combinations_by_name(results: Results) -> None:
    assert results.conditions[0] == "none:wt"
    assert set(results.conditions) == {"none:wt", "drugA:wt", "none:mut", "drugA:mut"}
    obs = results.obs
    joined = obs["drug"].astype(str) + ":" + obs["genotype"].astype(str)
    assert (obs[keys.OBS_CONDITION].astype(str) == joined).all()


def test_the_control_as_baseline_changes_nothing(results: Results) -> None:
    pd.testing.assert_frame_equal(
        contrast(results, "drugA:wt", "none:wt", 8), contrast(results, "drugA:wt", None, 8), check_exact=True
    )


def test_a_contrast_turned_round_has_the_other_sign(results: Results, table: pd.DataFrame) -> None:
    one, other = table, contrast(results, "none:mut", "drugA:mut")
    assert (one["baseline"] == "none:mut").all()
    assert (other["condition"] == "none:mut").all()
    assert one["within_state"].notna().any()
    for name in ANTISYMMETRIC:
        np.testing.assert_allclose(one[name], -other[name], rtol=0, atol=1e-12, err_msg=name)
    for name in SAME:
        np.testing.assert_allclose(one[name], other[name], rtol=1e-9, err_msg=name)


def test_donors_under_both_conditions_are_paired(table: pd.DataFrame) -> None:
    assert set(table["p_method"]) <= {"paired t", "none"}
    assert (table["treated_donors"] == table["control_donors"]).all()


def test_pseudobulk_is_that_of_the_donors_means(results: Results, table: pd.DataFrame) -> None:
    for name, part in table.groupby("population"):
        x = results.expression(cells=f"cell_type == {name!r}")
        values = pd.DataFrame(dense(x.X).astype(np.float64)).groupby(
            [x.obs["donor"].astype(str).to_numpy(), x.obs[keys.OBS_CONDITION].astype(str).to_numpy()]
        )
        means, cells = values.mean(), values.size()
        donors = [
            d for d in x.obs["donor"].astype(str).unique()
            if all(cells.get((d, c), 0) >= 5 for c in ("drugA:mut", "none:mut"))
        ]  # fmt: skip
        assert part["treated_donors"].iloc[0] == len(donors)
        known = np.mean([means.loc[d, "drugA:mut"] - means.loc[d, "none:mut"] for d in donors], axis=0)
        np.testing.assert_allclose(part["pseudobulk_effect"], known, atol=1e-6)


def test_effects_on_cells_and_through_matches_are_brute_force(results: Results, table: pd.DataFrame) -> None:
    """The brute force searches every cell's nearest neighbour among each donor's cells of the other conditions."""
    obs, x = results.packed_obs, dense(results.expression(order="packed").X).astype(np.float64)
    points = results.embedding(order="packed", pca=True).to_numpy(dtype=np.float64)
    groups = {
        group.code: np.arange(group.start, group.stop) for group in results.design.groups
    }  # fmt: skip
    code = {name: results.design.condition_code(name) for name in ("drugA:mut", "none:mut")}
    assert results.counterparts.hubs == "csls"

    def nearest(queries: np.ndarray, targets: np.ndarray) -> np.ndarray:
        if np.array_equal(queries, targets):
            return queries
        d = cdist(points[queries], points[targets])
        return targets[(2 * d - np.sort(d, axis=0)[:10].mean(0)).argmin(1)]

    population = table["population"].iloc[0]
    inside = (obs["cell_type"].astype(str) == population).to_numpy()
    effects, cells = [], []
    for query in results.design.with_condition(code["drugA:mut"]):
        rows = groups[query.code]
        by = {
            name: np.mean([x[nearest(rows, groups[t.code])] for t in results.design.with_condition(c)], axis=0)
            for name, c in code.items()
        }
        effects.append((by["drugA:mut"] - by["none:mut"])[inside[rows]])
        cells.append(inside[rows].sum())
    part = table[table["population"] == population]
    assert part["cells"].iloc[0] == sum(cells)
    np.testing.assert_allclose(part["mean_ite"], np.concatenate(effects).mean(0), atol=1e-5)


def test_every_condition_is_compared_with_a_baseline(results: Results) -> None:
    table = results.cate(baseline="drugA:mut", genes=list(results.var_names[:2]))
    assert set(table["condition"]) == {"none:wt", "drugA:wt", "none:mut"}
    assert table["without_overlap"].isna().all()
    assert table["match_purity"].notna().all()
    means = results.donor_means("cell_type", condition="drugA:wt", baseline="drugA:mut", min_cells=5)
    assert set(means.obs["condition"]) == {"drugA:wt", "drugA:mut"}


def test_an_interaction_is_the_difference_of_two_contrasts(results: Results) -> None:
    first, second = ("drugA:mut", "none:mut"), ("drugA:wt", "none:wt")
    found = nd.interaction(results, "cell_type", first, second).set_index(["cell_type", "gene"])
    means = [results.donor_means("cell_type", condition=a, baseline=b) for a, b in (first, second)]
    groups = [side.to_df().groupby([side.obs["cell_type"], side.obs["condition"]]).mean() for side in means]
    for kind in results.obs["cell_type"].unique():
        one, other = (
            side.loc[kind, a] - side.loc[kind, b] for side, (a, b) in zip(groups, (first, second), strict=True)
        )
        np.testing.assert_allclose(found.loc[kind, "interaction"], one - other, atol=1e-6)
    assert found["p"].dropna().between(0, 1).all()
    assert found["p"].notna().mean() > 0.9
    swapped = nd.interaction(results, "cell_type", second, first).set_index(["cell_type", "gene"])
    np.testing.assert_allclose(swapped["interaction"], -found["interaction"], atol=1e-9)


def test_a_condition_against_itself_is_refused(results: Results) -> None:
    with pytest.raises(QueryError, match="is the baseline"):
        results.cate(condition="none:mut", baseline="none:mut")


def test_a_factor_that_is_not_there_is_refused(cohort: anndata.AnnData, tmp_path: Path) -> None:
    names = {"control": "none:wt", "batch_key": "donor", "embedding": "pca", "settings": SETTINGS}
    with pytest.raises(CohortError, match="Did you mean 'genotype'"):
        nd.run(cohort, out=tmp_path / "run", condition_key=["drug", "genotyp"], **names)
    with pytest.raises(CohortError, match="Did you mean 'none:wt'"):
        nd.run(cohort, out=tmp_path / "run", condition_key=["drug", "genotype"], **names | {"control": "none:WT"})
    planned = nd.plan(cohort, condition_key=["drug", "genotype"], **names)
    assert "drugA:mut" in str(planned)
