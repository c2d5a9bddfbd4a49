"""Cells are matched inside their own label if the target group has enough cells of it."""

import anndata
import numpy as np
import pandas as pd
import pytest

import ndreamer_dist as nd
from ndreamer_dist import keys
from ndreamer_dist.cohort.obsm import CellLabels
from ndreamer_dist.commands.info import describe
from ndreamer_dist.compute.executor import RayRuntime, SerialRuntime
from ndreamer_dist.errors import CohortError, RunError, SettingsError
from ndreamer_dist.matching import hubs
from ndreamer_dist.matching import stage as search
from ndreamer_dist.matching.labels import inside_labels
from ndreamer_dist.matching.stage import add_edges, run_match
from ndreamer_dist.matching.store import Matches
from ndreamer_dist.stats.cate_table import MatchedNeighbours
from ndreamer_dist.storage.arrays import read_array
from tests.results.brute_force import matched_rows
from tests.results.fabricate import fabricate
from tests.tiny import NAMES, SETTINGS, as_memory, assert_same_bits

SIZES = {(0, 0): 130, (0, 1): 70, (1, 0): 40, (1, 2): 50}
LEAST = 12
QUICK = {**SETTINGS, "embed.method": "pca", "effects.store": "ite"}


def matched(folder, runtime=None, **overrides):
    """Match 290 cells of three labels, one of them rare; some cells have no label."""
    asked = {
        "match.query_rows": 64, "match.within": "kind", "match.within_cells": LEAST, "denoise.neighbours": 1, **overrides,
    }  # fmt: skip
    made = fabricate(folder, SIZES, overrides=asked, crowds=3)
    codes = np.random.default_rng(5).choice([-1, 0, 1, 2], p=[0.1, 0.5, 0.3, 0.1], size=290).astype(np.int32)
    labels = CellLabels(codes, ("a", "b", "rare"))
    run_match(made.run, made.settings, made.design, runtime or SerialRuntime(made.settings.run), "key of match", labels)
    return made, labels


def expected(points, codes, query, target, k, distance):
    """Match one group in another by brute force: rows, distances, and which matches are outside the label."""
    there = np.arange(target.start, target.stop)
    rows, far = np.full((query.cells, k), -1), np.full((query.cells, k), np.nan)
    for label in np.unique(codes[query.start : query.stop]):
        asking = np.arange(query.start, query.stop)[codes[query.start : query.stop] == label]
        alike = there[codes[there] == label]
        if label < 0 or len(alike) - (query == target) < LEAST:
            continue
        itself = np.searchsorted(alike, asking) if query == target else None
        found, rows_far = matched_rows(points[asking], points[alike], k, itself, distance)
        rows[asking - query.start], far[asking - query.start] = np.where(found < 0, -1, alike[found]), rows_far
    rest = rows[:, 0] < 0
    itself = np.arange(query.cells) if query == target else None
    found, rows_far = matched_rows(points[query.start : query.stop], points[there], k, itself, distance)
    rows[rest], far[rest] = np.where(found < 0, -1, found + target.start)[rest], rows_far[rest]
    return rows, far, rest


@pytest.mark.parametrize("distance", ["none", "csls"])
@pytest.mark.parametrize(("k", "denoised"), [(1, 1), (15, 5)])
def test_matches_are_the_nearest_of_the_own_label_or_of_all_where_it_is_rare(tmp_path, k, denoised, distance):
    asked = {"match.neighbours": k, "denoise.neighbours": denoised, "match.hubs": distance}
    made, labels = matched(tmp_path, **asked)
    points, matches = read_array(made.run.storage / keys.EMBEDDING, keys.PCA), Matches(made.run.storage / keys.MATCHES)
    outside = []
    for query, target in made.design.needed_edges("needed"):
        one, other = made.design.groups[query], made.design.groups[target]
        sought = max(k, denoised) if one.condition == other.condition and one != other else k
        rows, far, rest = expected(points, labels.codes, one, other, sought, distance)
        found, distances = matches.edge(query, target)
        np.testing.assert_array_equal(found[:, :sought], rows)
        np.testing.assert_array_equal(distances[:, :sought], far.astype(np.float32))
        outside.append(rest)
    assert 0.05 < np.concatenate(outside).mean() < 0.6  # both ways were looked at


def test_tiles_units_and_threads_do_not_change_the_matches(tmp_path, monkeypatch):
    asked = {"match.hubs": "csls", "match.neighbours": 3}
    together, _ = matched(tmp_path / "a", **asked, **{"match.query_rows": 65536})
    for name, value in {"BATCH_QUERIES": 30, "LEAST_DISTANCES": 1, "UNIT_DISTANCES": 2_000_000}.items():
        monkeypatch.setattr(search, name, value)
    monkeypatch.setattr(hubs, "KEPT_INDEXES", 1)
    apart, _ = matched(tmp_path / "b", **asked, **{"match.query_rows": 20, "run.task_threads": 2})
    for query, target in together.design.needed_edges("needed"):
        one, other = (Matches(made.run.storage / keys.MATCHES).edge(query, target) for made in (together, apart))
        np.testing.assert_array_equal(one, other)


@pytest.mark.ray
def test_ray_and_the_serial_way_match_inside_labels_alike(tmp_path, local_ray):
    serial, _ = matched(tmp_path / "a", **{"match.hubs": "csls"})
    matched(tmp_path / "b", RayRuntime(serial.settings.run), **{"match.hubs": "csls"})
    assert_same_bits(tmp_path / "a", tmp_path / "b", (keys.MATCHES,))


def test_edges_that_are_added_later_are_matched_inside_the_same_labels(tmp_path):
    made, labels = matched(tmp_path)
    runtime = SerialRuntime(made.settings.run)
    assert add_edges(made.run, made.settings, made.design, runtime, "key of match", "all")
    points, matches = read_array(made.run.storage / keys.EMBEDDING, keys.PCA), Matches(made.run.storage / keys.MATCHES)
    query, target = made.design.groups[0], made.design.groups[1]
    assert (0, 1) not in made.design.needed_edges("needed")
    rows, _, _ = expected(points, labels.codes, query, target, 1, "none")
    np.testing.assert_array_equal(matches.rows(0, 1), rows)


def test_the_share_inside_is_that_of_the_treated_cells_control_matches(tmp_path):
    made, labels = matched(tmp_path)
    design, codes = made.design, labels.codes
    told = []
    for query in (group for group in design.groups if group.condition):
        for target in design.with_condition(0):
            for label in codes[query.start : query.stop]:
                enough = (codes[target.start : target.stop] == label).sum() >= LEAST
                told.append((label, bool(enough and label >= 0)))
    frame = pd.DataFrame(told, columns=["label", "inside"])
    inside = inside_labels(labels, design, "kind", LEAST)
    assert inside.share == pytest.approx(frame["inside"].mean())
    assert inside.shares == tuple(frame.groupby("label")["inside"].mean()[[0, 1, 2]])
    assert inside.missing == (codes < 0).sum()
    assert made.run.read_json(keys.MATCH_SUMMARY)["within"]["share"] == inside.share
    assert inside.uneven == ()
    assert str(inside).endswith("are inside their kind (least: b 50%, rare 50%)")


def test_a_label_that_belongs_to_one_condition_is_warned_of(tmp_path, caplog):
    made = fabricate(tmp_path, SIZES, overrides={"match.within": "cluster"})
    treated = made.design.group_conditions[made.design.group_of(np.arange(290))] > 0
    codes = np.where(np.arange(290) % 10 == 0, 1 - treated, treated).astype(np.int32)
    labels = CellLabels(codes, ("controls", "stimulated"))
    run_match(made.run, made.settings, made.design, SerialRuntime(made.settings.run), "key of match", labels)
    assert "cluster 'controls', 'stimulated': more than 5 times as frequent under one condition" in caplog.text


@pytest.fixture(scope="module")
def cohort(tiny):
    cohort = as_memory(tiny)
    kinds = cohort.obs["cell_type"].astype(object)
    kinds.iloc[::20] = np.nan
    cohort.obs["kind"] = kinds
    cohort.obs["nothing"] = np.full(cohort.n_obs, np.nan)
    return cohort


def run(cohort, out, redo=False, **settings):
    return nd.run(cohort, out=out, preset="small", settings={**QUICK, **settings}, redo=redo, **NAMES)


@pytest.fixture(scope="module")
def clustered(cohort, tmp_path_factory):
    """A run matched inside the low clusters: its directory and its `obs` at that time."""
    out = tmp_path_factory.mktemp("labels") / "run"
    results = run(
        cohort, out, **{"match.within": keys.OBS_LOW, "clusters.within": "all", "clusters.iterations": 1}
    ).results
    return out, results.packed_obs


@pytest.fixture(scope="module")
def finished(cohort, clustered):
    """The same run, matched again inside a column of the input."""
    out, _ = clustered
    files = [path for stage in (keys.STAGE_PACK, keys.STAGE_SPACE) for path in (out / keys.DONE / stage).iterdir()]
    times = [path.stat().st_mtime_ns for path in files]
    asked = {"match.within": "kind", "match.hubs": "csls", "clusters.within": "all", "clusters.iterations": 1}
    with pytest.raises(RunError, match=r"match.within: ndreamer_cluster_low -> kind.*: match, effects"):
        run(cohort, out, **asked)
    run(cohort, out, redo=True, **asked)
    assert [path.stat().st_mtime_ns for path in files] == times
    return out


def test_low_clusters_are_labels_too_in_a_space_that_needs_none(clustered):
    obs = clustered[1]
    np.testing.assert_array_equal(obs[keys.OBS_MATCH_LABEL].astype(int), obs[keys.OBS_LOW])


def test_results_say_which_labels_cells_were_matched_inside_and_how_far(finished, cohort):
    results, stored = nd.open_results(finished), anndata.read_zarr(finished / keys.RESULTS)
    labels = stored.obs[keys.OBS_MATCH_LABEL].astype(object)
    pd.testing.assert_series_equal(labels, cohort.obs["kind"].loc[stored.obs_names], check_names=False)
    treated = (stored.obs["condition"] != "control").to_numpy()
    inside = results.matched_inside
    assert inside.share == pytest.approx(labels[treated].notna().mean())  # every group has enough of every type
    assert inside.missing == 45
    assert f"{inside.share:.1%} of the treated cells' control matches are inside their kind" in describe(str(finished))
    assert str(inside) in results.uns["notes"]  # which the report prints
    rows = stored.obsm[keys.OBSM_MATCH]
    place = np.nonzero((rows >= 0) & labels.notna().to_numpy()[:, None])
    assert (labels.to_numpy()[rows[place]] == labels.to_numpy()[place[0]]).all()


@pytest.mark.parametrize("pair", [(0, 1), (1, 1), (1, 0)])
def test_statistics_search_inside_the_labels_as_the_run_does(finished, pair):
    results = nd.open_results(finished)
    given = results._statistics_input(None, None)
    one, other = (np.arange(g.start, g.stop) for g in (results.design.groups[code] for code in pair))
    searched = MatchedNeighbours(given)._searched(one[::3], other, one)
    nd.pipeline.add_matches(finished)
    stored = Matches(results.counterparts.searched.storage).rows(*pair)[::3, 0]
    np.testing.assert_array_equal(searched, stored)


def test_other_labels_in_the_input_are_another_result(finished, cohort):
    changed = cohort.copy()
    changed.obs["kind"] = changed.obs["kind"].replace({"type_1": "type_2"})
    with pytest.raises(RunError, match=r"match.within: other values in the input.*: match, effects"):
        run(changed, finished, **{"match.within": "kind", "match.hubs": "csls"})


@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        pytest.param({"match.within": "cell_typ"}, CohortError, "Did you mean 'cell_type'", id="no_column"),
        pytest.param({"match.within": "cell_type", "match.within_cells": 0}, SettingsError, "greater than", id="none"),
        pytest.param({"match.within": "nothing"}, CohortError, "holds no label", id="no_label"),
        pytest.param(
            {"match.within": keys.OBS_LOW, "clusters.within": "group"}, SettingsError, "inside each group", id="groups"
        ),
    ],
)
def test_what_cannot_be_matched_inside_is_refused_before_anything_is_written(cohort, tmp_path, settings, error, match):
    with pytest.raises(error, match=match):
        run(cohort, tmp_path / "run", **settings)
    assert not (tmp_path / "run").exists()


def test_the_plan_says_inside_what_cells_are_matched(cohort):
    planned = nd.plan(cohort, preset="small", settings={**QUICK, "match.within": "kind"}, **NAMES)
    assert "in pca, inside kind" in str(planned)
