"""Without an effect the main p-value keeps its level, and the other tests have the rates that the tables report."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from ndreamer_dist.cli import main
from ndreamer_dist.errors import QueryError
from ndreamer_dist.stats.cate_table import MatchedNeighbours, means_of, replicates_of
from ndreamer_dist.stats.donor_tests import paired_test, welch_test, welch_tests
from ndreamer_dist.stats.null import LEVELS, donor_p, permuted_labels, rates, sampled, sign_p
from ndreamer_dist.stats.results import Results

JOB = Path(__file__).parents[2] / "jobs" / "benchmark_null.py"


@pytest.fixture(scope="module")
def job() -> ModuleType:
    """The benchmark job, whose simulations these tests run on a small scale."""
    spec = importlib.util.spec_from_file_location("benchmark_null", JOB)
    module = importlib.util.module_from_spec(spec)
    sys.modules["benchmark_null"] = module
    spec.loader.exec_module(module)
    return module


# --- simulated cohorts: the bounds lie at least four binomial deviations away --------------------------------------------


@pytest.mark.parametrize(
    ("treated", "control", "sign"),
    [
        pytest.param(42, 9, 0.6, id="42v9"),
        pytest.param(11, 5, 0.3, id="11v5", marks=pytest.mark.slow),
        pytest.param(16, 32, 0.4, id="16v32", marks=pytest.mark.slow),
    ],
)
def test_without_an_effect_the_main_p_keeps_its_level_and_the_sign_test_does_not(
    job: ModuleType, treated: int, control: int, sign: float
) -> None:
    found = rates(job.null(job.Law(treated, control, genes=150, cells=24), cohorts=3, labellings=10))
    assert 0.03 <= found.loc["main", 0.05] <= 0.07
    assert found.loc["main", 0.001] <= 0.003
    assert 0.03 <= found.loc["pseudobulk", 0.05] <= 0.07
    assert found.loc["sign", 0.05] > sign


@pytest.mark.slow
@pytest.mark.parametrize(("treated", "control"), [(4, 4), (3, 3)])
def test_few_donors_are_tested_conservatively(job: ModuleType, treated: int, control: int) -> None:
    found = rates(job.null(job.Law(treated, control, genes=200, cells=40), cohorts=6, labellings=10))
    assert found.loc["main", 0.05] <= 0.07
    assert found.loc["main", 0.001] <= 0.003


@pytest.mark.slow
def test_planted_effects_are_found_and_little_else(job: ModuleType) -> None:
    found = job.planted(job.Law(16, 32, genes=200, cells=40, fold=1.2), cohorts=2)
    assert found.loc["main", "power"] > 0.6
    assert found.loc["main", "FDR"] < 0.15
    assert found.loc["main", "power"] > found.loc["pseudobulk", "power"] - 0.15


@pytest.mark.slow
def test_a_shifted_state_misleads_pseudobulk_and_an_embedding_that_lost_it(job: ModuleType) -> None:
    found = job.limit(job.Law(16, 32, genes=200, cells=40, shift=1.0, zeros=0.7), cohorts=3)
    assert found["pseudobulk"] > 0.15
    assert found["matched on the state, centred per donor"] > 0.15
    assert found["matched on the true state"] < 0.1


@pytest.mark.slow
def test_a_model_trained_on_permuted_labels_finds_nothing(job: ModuleType, tmp_path: Path) -> None:
    found = job.trained_null(job.Law(5, 5, genes=80, cells=40, zeros=0.7), 0, tmp_path, {"train.epochs": 4})
    assert found["main"] <= 0.15
    assert found["main at 0.001"] <= 0.02


@pytest.mark.slow
def test_every_column_of_p_values_is_looked_at_with_and_without_a_shifted_state(
    job: ModuleType, tmp_path: Path
) -> None:
    law = job.Law(16, 32, zeros=0.7)
    nothing = job.decomposed(law, 0, tmp_path, permuted=True)
    assert list(nothing) == list(job.P_COLUMNS)
    assert all(rate <= 0.2 for rate in nothing.values())
    shifted = job.decomposed(replace(law, shift=1.0), 0, tmp_path, permuted=False)
    assert shifted["within_state_p"] < shifted["total_p"] / 2
    assert shifted["state_shift_p"] > 0.2


# --- what the tables are made of -----------------------------------------------------------------------------------------


def test_each_labelling_is_tested_as_if_it_were_the_only_one() -> None:
    means = np.random.default_rng(0).gamma(2.0, size=(15, 6))
    truth = np.arange(15) < 6
    labels = permuted_labels(truth, 5, np.random.default_rng(1))
    every = welch_tests(means, labels)
    for number, treated in enumerate(labels):
        alone = welch_test(means, treated)
        for name in ("effect", "statistic", "p", "p_permutation", "p_parametric"):
            np.testing.assert_allclose(getattr(every, name)[number], getattr(alone, name), rtol=1e-12)
    pairs = np.arange(0, 14, 2), np.arange(1, 14, 2)
    crossed = permuted_labels(np.arange(14) % 2 == 0, 4, np.random.default_rng(1), pairs)
    assert (crossed[:, pairs[0]] != crossed[:, pairs[1]]).all()
    found = donor_p(means[:14], means[:14] ** 2, crossed, pairs)
    for number, treated in enumerate(crossed):
        ups = np.where(treated[pairs[0]], *pairs)
        downs = np.where(treated[pairs[0]], *pairs[::-1])
        np.testing.assert_allclose(found["main"][number], paired_test(means[ups] - means[downs]).p)
        plain = paired_test(means[ups] ** 2 - means[downs] ** 2)
        np.testing.assert_allclose(found["pseudobulk"][number], plain.p)


def test_labellings_differ_from_the_truth_and_from_each_other_whichever_side_is_called_treated() -> None:
    truth = np.arange(6) < 3
    labels = permuted_labels(truth, 50, np.random.default_rng(0))
    assert labels.shape == (9, 6)  # of the ten ways to halve six donors, all but the true one
    assert (labels.sum(1) == 3).all()
    sides = {frozenset({one.tobytes(), (~one).tobytes()}) for one in [truth, *labels]}
    assert len(sides) == 10


def test_the_sign_test_is_that_of_each_labellings_effects(job: ModuleType) -> None:
    cohort = job.simulate(job.Law(4, 5, genes=12, cells=30), seed=3)
    replicates, nearest = cohort.replicates, job.Nearest(job.embeddings(cohort, 3)["true state"])
    kept = np.array([0, 1, 3, 4, 6, 7, 8])
    labels = permuted_labels(replicates.conditions[kept] != 0, 3, np.random.default_rng(0))
    asked = sampled(cohort.types, replicates, nearest).of(1, kept, replicates)
    found = sign_p(asked, labels, cohort, cohort.columns)
    x = cohort.x.toarray()
    rows = [np.flatnonzero(replicates.of_cell == r) for r in kept]
    for number, treated in enumerate(labels):
        effects = []
        for here in np.flatnonzero(treated):
            cells = rows[here][cohort.types[rows[here]] == 1]
            of = [
                x[cells] if there == here else x[nearest(cells, rows[there], rows[here])] for there in range(len(kept))
            ]
            effects.append(np.mean([of[d] for d in np.flatnonzero(treated)], axis=0))
            effects[-1] -= np.mean([of[d] for d in np.flatnonzero(~treated)], axis=0)
        ite = np.concatenate(effects)
        signs = (ite > 1e-9).sum(0) - (ite < -1e-9).sum(0)
        np.testing.assert_allclose(found[number], 2 * stats.norm.sf(np.abs(signs) / np.sqrt(len(ite))), rtol=1e-9)


def test_a_sample_takes_the_same_share_of_every_donor(job: ModuleType) -> None:
    cohort = job.simulate(job.Law(4, 5, genes=12, cells=60), seed=3)
    nearest = job.Nearest(cohort.state)
    part = sampled(cohort.types, cohort.replicates, nearest, most=60)
    assert (np.diff(part.rows) > 0).all()
    for kind in range(2):
        share = 60 / (cohort.types == kind).sum()
        for donor in range(9):
            there = (cohort.replicates.of_cell == donor) & (cohort.types == kind)
            taken = (cohort.replicates.of_cell[part.rows] == donor) & (part.populations == kind)
            assert taken.sum() == np.ceil(share * there.sum())


# --- of a finished run -----------------------------------------------------------------------------------------------


def test_under_the_true_labels_the_tests_are_those_of_the_cate_table(results: Results) -> None:
    table, given = results.cate("cell_type", min_cells=1), results._statistics_input(None, None)
    name = table["population"].iloc[0]
    codes = np.where(results.packed_obs["cell_type"].astype(str) == name, 0, -1)
    replicates, nearest = replicates_of(given, None), MatchedNeighbours(given)
    means = means_of(given, codes, replicates, 1)
    assert means.included.all()
    labels, every = (replicates.conditions != 0)[None], np.arange(len(replicates))
    found = donor_p(means.matched[0], means.own[0], labels, seed=given.seed)
    asked = sampled(codes, replicates, nearest).of(0, every, replicates)
    found["sign"] = sign_p(asked, labels, given.expression, given.columns)
    part = table[table["population"] == name]
    columns = {"main": "p", "permutation": "p_permutation", "welch": "p_parametric", "pseudobulk": "pseudobulk_p"}
    for test, column in (columns | {"sign": "sign_p"}).items():
        np.testing.assert_allclose(found[test][0], part[column], rtol=1e-6, err_msg=test)


def test_the_table_counts_p_values_below_each_level(results: Results) -> None:
    table = results.null("cell_type", labellings=4, min_cells=5, seed=2)
    assert set(table["test"]) == {"main", "permutation", "welch", "pseudobulk", "sign", "within_state", "state_shift"}
    assert set(table["labelling"]) == set(range(4))
    assert sorted(set(table["level"])) == sorted(LEVELS)
    assert not table.duplicated(["population", "condition", "labelling", "test", "level"]).any()
    assert (table.loc[table["level"] == 1, "share"] == 1).all()
    np.testing.assert_allclose(table["share"], table["below"] / table["tests"])
    by_labelling = table.groupby(["test", "labelling"])["below"].agg(tuple).groupby("test").nunique()
    assert (by_labelling == 4).all()  # no labelling was tested in place of another
    grown = table.groupby(["population", "labelling", "test"])["below"].diff().dropna()
    assert (grown >= 0).all()
    assert (table["tests"] <= len(results.var_names)).all()
    pd.testing.assert_frame_equal(table, results.null("cell_type", labellings=4, min_cells=5, seed=2))
    pooled = rates(table, by=("population", "test"), levels=(0.05,))
    one = table[(table["test"] == "main") & (table["level"] == 0.05)].groupby("population")[["below", "tests"]].sum()
    np.testing.assert_allclose(
        pooled.xs("main", level="test")[0.05], (one["below"] / one["tests"])[pooled.index.levels[0]]
    )


def test_without_donors_there_is_nothing_to_permute(results: Results) -> None:
    with pytest.raises(QueryError, match="no population has 3 donors per condition with enough cells"):
        results.null("cell_type", min_cells=10_000)


def test_three_pairs_have_a_null_of_the_exchanges_inside_them(paired: Results) -> None:
    table = paired.null("cell_type", min_cells=3)
    assert set(table["labelling"]) == {0, 1, 2}  # of the 4 ways to exchange labels in 3 pairs, all but the true one
    assert (table[["treated_donors", "control_donors"]] == 3).all(axis=None)
    assert {"main", "welch", "pseudobulk", "sign"} <= set(table["test"])


def test_the_command_writes_the_table_and_says_the_rates(
    results: Results, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["null", results.url, "--out", str(tmp_path / "null.csv"), "--labellings", "3", "--seed", "1"]
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert not ended.value.code
    table = pd.read_csv(tmp_path / "null.csv")
    pd.testing.assert_frame_equal(table, results.null(labellings=3, seed=1), check_dtype=False)
    told = capsys.readouterr().out
    for test, share in rates(table)[0.05].items():
        assert f"{test} " in told
        assert str(round(share, 4)) in told


def test_the_benchmark_prints_its_tables_and_ends_with_its_verdict(
    job: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(job, "DESIGNS", ((8, 6),))
    monkeypatch.setattr(job, "SMALL_DESIGNS", ((3, 3),))
    monkeypatch.setattr(
        job, "limit", lambda law, cohorts, limit=job.limit: limit(replace(law, treated=5, control=5), 1)
    )
    options = ["--cohorts", "3", "--labellings", "10", "--genes", "100", "--cells", "24", "--trained", "0"]
    monkeypatch.setattr(sys, "argv", ["benchmark_null.py", *options])
    for p_values, verdict in ((job.donor_p, "holds"), (too_small(job), "DOES NOT HOLD")):
        monkeypatch.setattr(job, "donor_p", p_values)
        with pytest.raises(SystemExit) as ended:
            job.main()
        told = capsys.readouterr().out
        assert f"8 v 6 donors: {verdict}" in told
        assert told.count("| sign |") == 2
        assert "| matched on the true state |" in told
        assert ended.value.code == int(verdict != "holds")


def too_small(job: ModuleType):
    def squared(*args, inner=job.donor_p, **kwargs):
        return {name: p**2 for name, p in inner(*args, **kwargs).items()}

    return squared
