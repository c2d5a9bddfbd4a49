"""The CATE table finds planted effects, and every column follows its definition."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from scipy.spatial.distance import cdist

import ndreamer_dist as nd
from ndreamer_dist import keys
from ndreamer_dist.compute.executor import SerialRuntime
from ndreamer_dist.errors import CohortError, QueryError
from ndreamer_dist.matching.stage import add_edges
from ndreamer_dist.matching.store import Matches
from ndreamer_dist.stats.cate_table import MatchedNeighbours
from ndreamer_dist.stats.results import Results, open_results
from tests.results.conftest import finish
from tests.results.fabricate import fabricate
from tests.tiny import SETTINGS, as_memory, dense, tiny_cohort


@pytest.fixture(scope="module")
def table(results: Results) -> pd.DataFrame:
    return results.cate("cell_type", min_cells=5)


def test_a_row_for_every_population_condition_and_gene(results: Results, table: pd.DataFrame) -> None:
    kinds = results.obs["cell_type"].astype(str).unique()
    assert len(table) == len(kinds) * len(results.var_names)
    assert set(table["population"]) == set(kinds)
    assert not table.duplicated(["population", "condition", "gene"]).any()


def test_cells_and_effects_are_those_of_the_ite(results: Results, table: pd.DataFrame) -> None:
    for name, part in table.groupby("population"):
        ite = results.ite(cells=f"cell_type == {name!r}")
        values = np.asarray(ite.X, dtype=np.float64)
        assert (part["cells"] == len(values)).all()
        np.testing.assert_allclose(part["mean_ite"], values.mean(0), atol=1e-6)
        np.testing.assert_allclose(part["sd_ite"], values.std(0, ddof=1), atol=1e-5)
        s = (values > 0).sum(0) + (values == 0).sum(0) / 2
        np.testing.assert_allclose(part["sign_z"], (s - len(values) / 2) / np.sqrt(len(values) / 4))
        raw = {
            c: dense(results.expression(cells=f"cell_type == {name!r} and condition == {c!r}").X).astype(np.float64)
            for c in results.conditions
        }
        treated, control = (np.expm1(raw[c]).mean(0) for c in reversed(results.conditions))
        np.testing.assert_allclose(
            part["log2_fold_change"], np.log2((treated + 1e-9) / (control + 1e-9)), atol=1e-4
        )  # fmt: skip
        np.testing.assert_allclose(part["expressing"], (raw[results.conditions[1]] > 0).mean(0), atol=1e-9)


def test_pseudobulk_is_tested_as_scipy_does(results: Results, table: pd.DataFrame) -> None:
    name = table["population"].iloc[0]
    part = table[table["population"] == name]
    x = results.expression(cells=f"cell_type == {name!r}")
    donors = pd.Series(list(zip(x.obs["donor"].astype(str), x.obs["condition"].astype(str), strict=True)))
    means = {key: dense(x.X)[donors.index[donors == key]].astype(float).mean(0) for key in donors.unique()}
    counts = donors.value_counts()
    kept = [key for key in means if counts[key] >= 5]
    treated = np.array([means[key] for key in kept if key[1] != results.control])
    control = np.array([means[key] for key in kept if key[1] == results.control])
    assert part["treated_donors"].iloc[0] == len(treated)
    assert part["control_donors"].iloc[0] == len(control)
    np.testing.assert_allclose(part["pseudobulk_effect"], treated.mean(0) - control.mean(0), atol=1e-6)
    varied = np.r_[treated, control].std(0) > 0
    known = stats.ttest_ind(treated, control, equal_var=False).pvalue
    if part["p_method"].iloc[0] == "welch":
        np.testing.assert_allclose(part["pseudobulk_p"][varied], known[varied], atol=1e-6)


def test_planted_effects_lead_and_have_their_sign(results: Results, table: pd.DataFrame) -> None:
    strongest = table.reindex(table["mean_ite"].abs().sort_values(ascending=False).index).head(5)
    assert (np.sign(strongest["effect"]) == np.sign(strongest["mean_ite"])).all()
    both = table.dropna(subset=["effect", "mean_ite"])
    assert np.corrcoef(both["effect"], both["mean_ite"])[0, 1] > 0.7


def test_adjusted_p_is_within_a_population_and_over_all(table: pd.DataFrame) -> None:
    for _, part in table.groupby(["population", "condition"]):
        tested = part["p"].notna()
        np.testing.assert_allclose(
            part.loc[tested, "p_adjusted"], stats.false_discovery_control(part.loc[tested, "p"]), atol=1e-12
        )
    tested = table["p"].notna()
    assert tested.any()
    np.testing.assert_allclose(
        table.loc[tested, "p_adjusted_all"], stats.false_discovery_control(table.loc[tested, "p"])
    )


def test_matches_are_described(results: Results, table: pd.DataFrame) -> None:
    one = table.drop_duplicates("population")
    assert one["match_purity"].between(0, 1).all()
    assert (one["impure"] == (one["match_purity"] < 0.7)).all()
    assert one["without_overlap"].between(0, 1).all()
    assert (one["effective_control_cells"] >= 1).all()
    assert (table["sd_placebo"] >= 0).all()


def test_any_gene_and_any_donor_column_will_do(results: Results, table: pd.DataFrame) -> None:
    genes = list(results.var_names[:3])
    fewer = results.cate("cell_type", genes=genes, donor_key="donor", min_cells=5)
    same = table[table["gene"].isin(genes)].reset_index(drop=True)
    columns = ["population", "gene", "effect", "p", "mean_ite", "pseudobulk_p"]
    pd.testing.assert_frame_equal(fewer[columns], same[columns])
    asked = results.cate("cell_type", genes=genes, min_cells=5, population="treated")
    assert set(asked["p_method"]) <= {"permutation", "none"}
    np.testing.assert_allclose(asked["mean_ite"], fewer["mean_ite"])


def test_donor_means_are_what_is_tested(results: Results, table: pd.DataFrame) -> None:
    means = results.donor_means("cell_type", min_cells=5)
    name = table["population"].iloc[0]
    part = means[means.obs["cell_type"] == name]
    treated = (part.obs["condition"] != results.control).to_numpy()
    effect = part.X[treated].mean(0) - part.X[~treated].mean(0)
    np.testing.assert_allclose(effect, table.loc[table["population"] == name, "effect"], atol=1e-9)
    assert set(part.obs["donor"]) <= set(results.obs["donor"].astype(str))
    assert part.layers["pseudobulk"].shape == part.shape


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        pytest.param({"by": "celltype"}, "Did you mean 'cell_type'", id="misspelt_column"),
        pytest.param({"by": "cell_type", "condition": "control"}, "is the control", id="control"),
        pytest.param({"by": "cell_type", "covariates": ["cell_type"]}, "not a covariate of donors", id="not_of_donors"),
        pytest.param({"by": "cell_type", "donor_key": "doner"}, "Did you mean 'donor'", id="misspelt_donor"),
    ],
)
def test_what_cannot_be_asked_is_refused(results: Results, asked: dict, message: str) -> None:
    with pytest.raises(QueryError, match=message):
        results.cate(**asked)


def test_donors_and_covariates_that_are_not_known_are_refused_by_name(results: Results) -> None:
    donors = results.obs["donor"].astype(str)
    known = donors.where(np.arange(len(donors)) % 7 > 0).rename("genotype")
    with pytest.raises(CohortError, match=rf"'genotype' has {int(known.isna().sum())} missing values"):
        results.labelled(known)[0].cate(donor_key="genotype")
    for values in ([60.0, np.nan], ["f", None]):
        covariate = donors.map(dict.fromkeys(donors, values[0]) | {"donor_03": values[1]}).rename("covariate")
        with pytest.raises(QueryError, match="'covariate' is not known of the donors 'donor_03'"):
            results.labelled(covariate)[0].cate(covariates=["covariate"])


def test_labels_of_control_cells_alone_and_donors_of_too_few_cells_are_refused(results: Results) -> None:
    cells = results.obs
    labels = cells["cell_type"].astype(object).where(cells["condition"] == "control").rename("control_type")
    with pytest.raises(QueryError, match="no cell of 'treated' is in a population"):
        results.cate(labels)
    with pytest.raises(QueryError, match="no donor has 100000 cells in a population"):
        results.donor_means("cell_type", min_cells=100_000)


def test_a_covariate_of_huge_numbers_is_the_same_as_one_of_small_ones(results: Results) -> None:
    donors = results.obs["donor"].astype(str)
    age = donors.map({name: float(number % 5) for number, name in enumerate(sorted(set(donors)))}).rename("age")
    found = [
        results.labelled(values)[0].cate(covariates=["age"], genes=list(results.var_names[:5]))
        for values in (age, age * 1e14 + 1e18)
    ]
    np.testing.assert_allclose(found[1]["p"], found[0]["p"], rtol=1e-6)


def test_without_batches_donors_are_named_and_searched_one_by_one(tmp_path: Path) -> None:
    cohort = tiny_cohort(tmp_path, cells=600, batches=6, design="nested")
    results = nd.run(
        cohort, out=tmp_path / "run", condition_key="condition", control="control", preset="small", settings=SETTINGS
    ).results
    with pytest.raises(QueryError, match=r"name their column with donor_key \(--donor-key\)$"):
        results.cate("cell_type")
    table = results.cate("cell_type", genes=list(results.var_names[:4]), donor_key="donor", min_cells=5)
    assert (table["treated_donors"] + table["control_donors"]).max() == 6
    name = table["population"].iloc[0]
    packed = results.packed_obs  # its order settles ties
    cells = packed[packed["cell_type"] == name]
    donors = {key: part.index for key, part in cells.groupby(["donor", "condition"], observed=True) if len(part) >= 5}
    everyone = {key: part.index for key, part in packed.groupby(["donor", "condition"], observed=True)}
    points, values = results.embedding(pca=True), results.expression(genes=list(results.var_names[:4])).to_df()
    m = {}
    for target in donors:
        means = []
        for asking in donors:
            far = cdist(points.loc[donors[asking]], points.loc[everyone[target]])
            far[donors[asking].to_numpy()[:, None] == everyone[target].to_numpy()[None]] = np.inf
            means.append(values.loc[everyone[target]].to_numpy()[far.argmin(1)].mean(0))
        m[target] = np.mean(means, axis=0)
    sides = [np.mean([m[key] for key in m if (key[1] == "control") == side], axis=0) for side in (False, True)]
    np.testing.assert_allclose(table.loc[table["population"] == name, "effect"], sides[0] - sides[1], atol=1e-6)


def test_donors_in_both_conditions_are_paired_and_the_others_are_listed(tmp_path: Path) -> None:
    cohort = as_memory(tiny_cohort(tmp_path, cells=1000, batches=5))
    alone = (cohort.obs["donor"] == "donor_05") & (cohort.obs["condition"] == "treated")
    results = nd.run(
        cohort[~alone.to_numpy()].copy(), out=tmp_path / "run", condition_key="condition", control="control",
        batch_key="donor", preset="small", settings=SETTINGS,
    ).results  # fmt: skip
    table = results.cate("cell_type", min_cells=3)
    assert set(table["p_method"]) == {"paired t"}
    assert (table["treated_donors"] == 4).all()
    assert (table["control_donors"] == 4).all()
    assert set(table["donors_left_out"]) == {"donor_05"}
    name = table["population"].iloc[0]
    cells = results.expression(cells=f"cell_type == {name!r}")
    means = pd.DataFrame(dense(cells.X).astype(float), columns=cells.var_names)
    means = means.groupby(
        [cells.obs["donor"].astype(str).to_numpy(), cells.obs["condition"].astype(str).to_numpy()]
    ).mean()
    means = means.drop(index="donor_05", level=0)
    pairs = (means.xs(condition, level=1).to_numpy() for condition in ("treated", "control"))
    known = stats.ttest_rel(*pairs)
    part = table[table["population"] == name]
    tested = part["pseudobulk_p"].notna().to_numpy()
    assert tested.any()
    np.testing.assert_allclose(part["pseudobulk_p"][tested], known.pvalue[tested], atol=1e-6)
    for asked in ({"population": "treated"}, {"covariates": ["donor"]}):
        with pytest.raises(QueryError, match="are paired"):
            results.cate("cell_type", min_cells=3, **asked)


def test_three_paired_donors_are_tested_and_marked_as_few(paired: Results) -> None:
    table = paired.cate("cell_type", min_cells=3)
    assert (table[["treated_donors", "control_donors"]] == 3).all(axis=None)
    assert set(table["p_method"]) == {"paired t"}
    assert table["few_donors"].all()
    assert table.groupby("population")["p"].count().min() > 0
    means = paired.donor_means("cell_type", min_cells=3).to_df()
    obs = paired.donor_means("cell_type", min_cells=3).obs
    name = table["population"].iloc[0]
    pairs = [
        means[(obs["cell_type"] == name) & (obs["condition"] == condition)].to_numpy()
        for condition in ("treated", "control")
    ]
    known = stats.ttest_rel(*pairs)
    part = table[table["population"] == name]
    tested = part["p"].notna().to_numpy()
    np.testing.assert_allclose(part["p"][tested], known.pvalue[tested], rtol=1e-6)


def test_donors_in_both_conditions_who_are_too_few_for_pairs_leave_the_others_their_test(results: Results) -> None:
    obs = results.obs
    ill, well = (sorted(set(obs.loc[obs["condition"] == name, "donor"])) for name in ("treated", "control"))
    for crossing in (1, 2):
        people = {name: name for name in (*ill, *well)} | dict(zip(well[:crossing], ill[:crossing], strict=True))
        labels = obs["donor"].astype(str).map(people).rename("person")
        table = results.labelled(labels)[0].cate(donor_key="person", genes=list(results.var_names[:3]))
        method, donors, left_out = ("welch", 3, ill[:1]) if crossing == 1 else ("none", 2, [*ill[2:], *well[2:]])
        assert set(table["p_method"]) == {method}
        assert (table[["treated_donors", "control_donors"]] == donors).all(axis=None)
        assert set(table["donors_left_out"].iloc[0].split(", ")) == set(left_out)
        assert (
            table["effect"].notna().all()
        )  # with two a condition left nobody is tested: effects are those of the pairs


@pytest.mark.parametrize("hubs", ["none", "csls"])
def test_matches_searched_now_are_those_that_would_be_stored(tmp_path: Path, hubs: str) -> None:
    made = finish(fabricate(tmp_path, {(0, 0): 90, (0, 1): 70, (1, 1): 50}, overrides={"match.hubs": hubs}))
    given = open_results(tmp_path)._statistics_input(None, None)
    rows = [np.arange(group.start, group.stop) for group in made.design.groups]
    # From controls to treated: not needed by effects.
    searched = MatchedNeighbours(given)(rows[0][::3], rows[1], rows[0])
    add_edges(made.run, made.settings, made.design, SerialRuntime(made.settings.run), "key of match", "all")
    stored = Matches(made.run.storage / keys.MATCHES).rows(0, 1)[::3, 0]
    np.testing.assert_array_equal(searched, stored)
    own = MatchedNeighbours(given)(rows[1], rows[1], rows[1])
    np.testing.assert_array_equal(own, Matches(made.run.storage / keys.MATCHES).rows(1, 1)[:, 0])
