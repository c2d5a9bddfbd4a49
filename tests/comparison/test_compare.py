"""`compare` measures the spaces of a run, advises one, and stores the comparison for the report."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt

import ndreamer_dist as nd
from ndreamer_dist import keys
from ndreamer_dist.cli import run_command
from ndreamer_dist.comparison.halves import SPLITS, donor_halves, half_effects
from ndreamer_dist.comparison.labels import chosen_populations
from ndreamer_dist.comparison.state import StateQuestion
from ndreamer_dist.comparison.table import Comparison, compare_spaces, kept_comparison
from ndreamer_dist.errors import NDreamerError
from ndreamer_dist.report import page
from ndreamer_dist.rundir.directory import RunDirectory
from ndreamer_dist.stats.cate_table import populations_of, replicates_of
from ndreamer_dist.stats.results import Results
from tests.tiny import NAMES, SETTINGS

SPACES = ("ndreamer", "pca")


@pytest.fixture(scope="module")
def run(tiny: Path, tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the trained space, to which `compare` adds another."""
    out = tmp_path_factory.mktemp("compare") / "run"
    shutil.copytree(tiny_run, out)
    nd.compare(tiny, out=out, embedding="ndreamer,pca", by="cell_type", preset="small", settings=SETTINGS, **NAMES)
    return out


@pytest.fixture(scope="module")
def found(run: Path) -> Comparison:
    return nd.compare(run, by="cell_type")


@pytest.fixture(scope="module")
def results(run: Path) -> dict[str, Results]:
    return {space: nd.open_results(run, embedding=space) for space in SPACES}


def nearest(results: Results, rows: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Return the nearest target of every packed row by brute force, the row itself excluded."""
    points = results.embedding(pca=True, order="packed").to_numpy().astype(float)
    distance = np.linalg.norm(points[rows][:, None] - points[targets][None], axis=2)
    distance[rows[:, None] == targets[None]] = np.inf
    return targets[distance.argmin(axis=1)]


def measured(run: Path, by: str | pd.Series | None, donor_key: str | None = None) -> Comparison:
    """Return the comparison of `compare`, without its figure and files."""
    spaces = {space: nd.open_results(run, embedding=space) for space in SPACES}
    populations = chosen_populations(spaces, by, 4000)
    return compare_spaces(RunDirectory.at(run), spaces, populations, donor_key, None)


def value(found: Comparison, space: str, column: str) -> float:
    return float(found.table.set_index("space").loc[space, column])


def test_a_space_that_is_not_there_is_added_and_both_have_a_row(run: Path, found: Comparison) -> None:
    assert list(found.table["space"]) == list(SPACES)
    assert (run / keys.space_folder("pca") / keys.RESULTS).is_dir()
    assert found.table.drop(columns=["space", "state_held"]).notna().all(axis=None)
    assert "column 'cell_type'" in found.populations


def test_the_numbers_are_the_same_however_often(run: Path, found: Comparison) -> None:
    again = measured(run, "cell_type")
    pd.testing.assert_frame_equal(again.table, found.table, check_exact=True)
    assert Comparison.of(json.loads(found.to_json())).to_json() == found.to_json()


@pytest.mark.parametrize("space", SPACES)
def test_purity_overlap_agreement_and_slope_are_those_of_brute_force(
    found: Comparison, results: dict[str, Results], space: str
) -> None:
    told = results[space]
    obs, design = told.packed_obs, told.design
    kind, treated = obs["cell_type"].to_numpy(), (obs["condition"] == "treated").to_numpy()
    pure = [
        kind[nearest(told, np.flatnonzero(treated), np.arange(group.start, group.stop))] == kind[treated]
        for group in design.with_condition(0)
    ]
    assert value(found, space, "purity") == pytest.approx(
        np.mean(pure), abs=0.003
    )  # float32 distances may tie otherwise
    assert value(found, space, "overlap") == pytest.approx(obs.loc[treated, keys.OBS_OVERLAP].mean())
    effects, plain = told.ite(order="packed"), told.expression(order="packed").X.toarray().astype(float)
    pairs = []
    for name in np.unique(kind):
        difference = plain[treated & (kind == name)].mean(0) - plain[~treated & (kind == name)].mean(0)
        effect = effects.X[(effects.obs["cell_type"] == name).to_numpy()].astype(float).mean(0)
        pairs.append((np.corrcoef(difference, effect)[0, 1], np.polyfit(difference, effect, 1)[0]))
    assert value(found, space, "agreement") == pytest.approx(np.mean(pairs, axis=0)[0], abs=1e-6)
    assert value(found, space, "slope") == pytest.approx(np.mean(pairs, axis=0)[1], abs=1e-6)


def test_effects_of_two_halves_of_donors_have_no_cell_in_common(results: dict[str, Results]) -> None:
    """The brute force uses the cells of the half's donors, through the groups of the same donors."""
    told = results["pca"]
    given, design = told._statistics_input(None, None), told.design
    _, codes = populations_of(told.packed_obs, "cell_type")
    halves = donor_halves(replicates_of(given, None), 0)
    assert halves is not None
    assert halves.shape == (SPLITS, 6)
    donors = told.packed_obs["donor"].to_numpy()[[group.start for group in design.groups]]
    for split in halves:
        assert pd.Series(split).groupby(donors).nunique().eq(1).all()  # a donor is in one half
        assert sorted(np.bincount(split)) == [2, 4]
    effects = half_effects(given, codes, halves, 1)
    x = told.expression(order="packed").X.toarray().astype(float)
    for half in (0, 1):
        own = [group for group in design.groups if halves[0, group.code] == half]
        cells = np.concatenate([np.arange(g.start, g.stop) for g in own if g.condition == 1])
        cells = cells[codes[cells] == 1]
        sides = []
        for condition in (1, 0):
            through = []
            for group in (g for g in own if g.condition == condition):
                inside = (cells >= group.start) & (cells < group.stop)
                near = np.where(inside, cells, nearest(told, cells, np.arange(group.start, group.stop)))
                through.append(x[near])
            sides.append(np.mean(through, axis=0).mean(0))
        assert (
            np.abs(effects[0, half, 1] - (sides[0] - sides[1])).max() < 0.02
        )  # a match in a hundred may tie otherwise


def test_split_half_is_the_mean_correlation_of_the_halves(found: Comparison, results: dict[str, Results]) -> None:
    told = results["pca"]
    given = told._statistics_input(None, None)
    names, codes = populations_of(told.packed_obs, "cell_type")
    halves = donor_halves(replicates_of(given, None), given.seed)
    assert halves is not None
    effects = half_effects(given, codes, halves, 1)
    each = [np.corrcoef(*effects[s, :, p])[0, 1] for s in range(SPLITS) for p in range(len(names))]
    assert value(found, "pca", "split_half") == pytest.approx(np.mean(each))


def test_the_state_held_is_that_of_brute_force(tiny: Path, results: dict[str, Results]) -> None:
    """Modelled genes replace the others here: few genes of this cohort are not modelled, and they show no state."""
    told = results["pca"]
    populations = chosen_populations(results, "cell_type", 900)
    design, codes = told.design, populations.codes
    question, why = StateQuestion.of(told, populations, tiny, 900)
    assert question is None
    assert "a state that can be seen" in why
    given = told.open_cohort(tiny)
    sample = np.concatenate([np.arange(group.start, group.stop) for group in design.with_condition(0)])
    assert given.totals is not None
    bare = StateQuestion(given, codes, np.log(given.totals), sample, np.arange(200), design)
    population = bare._population(0)
    assert population is not None
    x = given.read(np.arange(design.n_cells), np.arange(200)).toarray().astype(float)
    depth = np.log(given.totals)
    for group in design.with_condition(0):
        here = np.flatnonzero((np.arange(len(x)) >= group.start) & (np.arange(len(x)) < group.stop))
        own = here[codes[here] == 0]
        x[here] -= x[own].mean(0)
        depth[here] -= depth[own].mean()
    own = sample[codes[sample] == 0]
    x -= np.outer(depth, [np.polyfit(depth[own], x[own, gene], 1)[0] for gene in range(200)])
    crossed, pairs = 0.0, 0
    controls = design.with_condition(0)
    for number, group in enumerate(controls):
        others = controls[number + 1 :] + controls[:number]
        rows = np.arange(group.start, group.stop)
        near = [nearest(told, rows, np.arange(other.start, other.stop)) for other in others]
        for place, row in enumerate(rows):
            match = near[place % len(others)][place]
            if codes[row] == codes[match] == 0 and row % 2 == match % 2:
                left, right = population.axes.left[row % 2], population.axes.right[row % 2]
                a, b = (np.array([x[cell, ::2] @ left, x[cell, 1::2] @ right]) for cell in (row, match))
                crossed += (a[0] @ b[1] + a[1] @ b[0]) / 2
                pairs += 1
    held = StateQuestion(given, codes, np.log(given.totals), sample, np.arange(200), design, (population,)).held(
        told.counterparts
    )
    assert held == pytest.approx(crossed / pairs / population.axes.own, rel=0.05)


def test_without_labels_the_low_clusters_of_the_run_stand_for_them(run: Path, found: Comparison) -> None:
    clusters = measured(run, None)
    assert "low clusters of the run in ndreamer" in clusters.populations
    assert "purity" not in clusters.advice.why[0].partition("(")[2].partition(")")[0]


def test_where_no_clusters_are_they_are_made_of_a_sample_and_carried_over(results: dict[str, Results]) -> None:
    made = chosen_populations({"pca": results["pca"]}, None, 300)
    assert made.clustered
    assert "clusters of 302 cells, computed for this table" in made.source
    kinds = pd.crosstab(results["pca"].packed_obs["cell_type"], made.codes)
    assert kinds.max().sum() / kinds.sum().sum() > 0.8  # a cluster is of one type, in its larger part


def test_columns_that_cannot_be_had_say_why(run: Path, found: Comparison, results: dict[str, Results]) -> None:
    assert found.missing == {
        "state_held": "it is read from genes that were not modelled; give the input cohort with --cohort"
    }
    assert "state held: not measured, it is read from genes" in str(found)
    one = measured(run, pd.Series("a", index=results["pca"].obs.index, name="one"), "cell_type")
    assert set(one.missing) == {"separation", "silhouette", "split_half", "state_held"}
    assert "several donors" in one.missing["split_half"]


def test_table_and_picture_are_written_beside_each_other_and_json_holds_table_and_words(
    run: Path, tmp_path: Path, found: Comparison, capsys: pytest.CaptureFixture[str]
) -> None:
    table = pd.read_csv(run / keys.COMPARISON_TABLE)
    assert list(table.columns) == list(found.table.columns)
    obey_quietly(
        ["compare", str(run), "--by", "cell_type", "--quiet", "--json", "--table", str(tmp_path / "x.parquet")]
    )
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "x.parquet"), found.table)
    for picture in (run / keys.COMPARISON_PICTURE, tmp_path / "x.png"):
        assert picture.read_bytes().startswith(b"\x89PNG")
    axes = nd.pl.spaces(found)
    assert len(axes) == found.table.drop(columns="space").notna().any().sum()
    plt.close("all")
    told = json.loads(capsys.readouterr().out)
    assert [row["space"] for row in told["table"]] == list(SPACES)
    assert told["table"][0]["state_held"] is None
    assert told["advice"]["space"] == found.advice.space
    assert told["words"] == found.sentences()
    added = nd.open_results(run, embedding="pca")
    assert "/spaces/" in added.url
    assert page._spaces(added)["spaces"][0][: len(found.sentences())] == found.sentences()  # as in the run's own report


def test_what_was_compared_is_kept_for_these_results_alone(run: Path, results: dict[str, Results]) -> None:
    place, told, kept = RunDirectory.at(run), results["ndreamer"], nd.compare(run, embedding="ndreamer", by="cell_type")
    assert str(kept_comparison(place, told)) == str(kept)
    assert kept_comparison(place, results["pca"]) is None  # it was not compared
    data = (run / keys.COMPARISON).read_bytes()
    place.write_json(keys.COMPARISON, {**kept.as_object(), "made_from": {"ndreamer": "a run before"}})
    assert kept_comparison(place, told) is None
    (run / keys.COMPARISON).write_bytes(data.replace(b"no choice to make", b"a choice to make"))
    assert kept_comparison(place, told) is None  # damaged
    (run / keys.COMPARISON).unlink()
    assert kept_comparison(place, told) is None


@pytest.mark.parametrize(
    ("words", "why"),
    [
        pytest.param(["{run}", "--embedding", "harmony"], "no results of 'harmony'; finished are 'ndreamer', 'pca'", id="space"),
        pytest.param(["{run}", "--control", "control"], "is a finished run, and 'control' would be", id="of_a_cohort"),
        pytest.param(["{tiny}", "--control", "control"], "name it with --out", id="no_out"),
        pytest.param(["{tiny}", "--out", "{run}", "--embedding", "pca,nonsense"], "nonsense", id="no_such_space"),
        pytest.param(["{run}", "--table", "x.png"], "unknown suffix '.png'", id="suffix"),
        pytest.param(["{run}", "--by", "cell_typ"], "Did you mean 'cell_type'", id="column"),
    ],
)  # fmt: skip
def test_what_will_not_do_is_refused(run: Path, tiny: Path, words: list[str], why: str) -> None:
    with pytest.raises(NDreamerError, match=why):
        obey_quietly(["compare", *(word.format(run=run, tiny=tiny) for word in words)])


def obey_quietly(words: list[str]) -> None:
    """Run a command line that must succeed."""
    with pytest.raises(SystemExit) as ended:
        run_command(words)
    assert not ended.value.code
