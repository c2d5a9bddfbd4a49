"""The counterparts of a cell have names and weights from which its effect can be recomputed."""

import json
import shutil
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest

from ndreamer_dist import keys
from ndreamer_dist.compute.executor import SerialRuntime
from ndreamer_dist.errors import QueryError, StoreError
from ndreamer_dist.matching.stage import add_edges
from ndreamer_dist.matching.store import Matches
from ndreamer_dist.settings import bearing_settings
from ndreamer_dist.stats.results import open_results

COLUMNS = ["cell", "batch", "condition", "group", "neighbour", "distance", "weight"]


def test_an_ite_is_recomputed_by_hand_from_the_named_matches(every_edge):
    results = open_results(every_edge.run.url)
    stored = anndata.read_zarr(results.url)
    x = pd.DataFrame(stored.X.toarray().astype(np.float64), index=stored.obs_names)
    ite = pd.DataFrame(np.asarray(stored.layers["ite"]), index=stored.obs_names)
    for cell in stored.obs_names[[95, 161, 200, 243]]:
        matches = results.matches(cell)
        own = stored.obs.loc[cell, "ndreamer_condition"]
        expected = {}
        for condition, found in matches.groupby("condition"):
            groups = [x.loc[part["cell"]].T.to_numpy() @ part["weight"] for _, part in found.groupby("group")]
            expected[condition] = np.mean(groups, axis=0)
        np.testing.assert_allclose(ite.loc[cell], expected[own] - expected["ctrl"], atol=1e-5)


def test_matches_name_group_batch_condition_and_distance(every_edge):
    results = open_results(every_edge.run.url)
    stored = anndata.read_zarr(results.url)
    points = pd.DataFrame(np.asarray(stored.obsm["X_ndreamer_pca"], dtype=np.float64), index=stored.obs_names)
    cell = stored.obs_names[120]  # of a|stim
    matches = results.matches(cell)
    assert list(matches.columns) == COLUMNS
    groups = {"a|ctrl", "a|stim", r"b\+c|ctrl", r"b\+c|stim"}
    groups |= {r"b\+c|sick"}
    assert set(matches["group"]) == groups
    there = stored.obs.loc[matches["cell"]]
    for column in ("batch", "condition", "group"):
        assert list(matches[column]) == list(there[f"ndreamer_{column}"].astype(str))
    away = np.sqrt(((points.loc[matches["cell"]].to_numpy() - points.loc[cell].to_numpy()) ** 2).sum(axis=1))
    np.testing.assert_allclose(matches["distance"], away, rtol=1e-5, atol=1e-6)
    itself = matches[matches["neighbour"] == 0]
    assert itself[["cell", "distance", "weight"]].values.tolist() == [[cell, 0.0, 1.0]]
    others = matches[(matches["group"] == "a|stim") & (matches["neighbour"] > 0)]
    assert (others["weight"] == 0).all()
    assert len(others) == every_edge.settings.match.neighbours
    weights = matches.groupby("group")["weight"].sum()
    np.testing.assert_allclose(weights, 1)
    if every_edge.settings.match.hubs == "none":
        assert matches.groupby("group")["distance"].apply(lambda column: column.is_monotonic_increasing).all()


def test_how_often_a_cell_is_matched_is_stored(every_edge):
    stored = anndata.read_zarr(f"{every_edge.run.url}/{keys.RESULTS}")
    matches, counted = Matches(every_edge.run.storage / keys.MATCHES), np.zeros(len(stored), dtype=int)
    for query in every_edge.design.groups:
        for target in every_edge.design.groups:
            if target.condition in (0, query.condition) and target != query:
                found = matches.rows(query.code, target.code)[:, : every_edge.settings.match.neighbours]
                np.add.at(counted, found[found >= 0], 1)
    np.testing.assert_array_equal(stored.obs["ndreamer_times_matched"], counted)
    assert counted.sum() > len(stored)
    least, most = counted.argmin(), counted.argmax()
    assert counted[least] < counted[most]


def test_the_count_is_of_the_named_matches(finished):
    results = open_results(finished.run.url)
    obs = results.packed_obs
    queries = obs.index[(obs["ndreamer_condition"] == "sick").to_numpy()]
    named = pd.concat(results.matches(cell).assign(query=cell) for cell in queries)
    counterparts = named[(named["group"] == r"b\+c|ctrl") & (named["neighbour"] > 0)]
    assert list(counterparts["cell"].unique()) == [obs.index[160]]  # the only cell of the group
    others = (obs["ndreamer_group"] != r"b\+c|ctrl").sum()
    assert len(counterparts) == 33
    assert obs["ndreamer_times_matched"].iloc[160] == others  # every cell is matched with the control


def test_matches_of_the_whole_run_are_named_from_results_alone(finished, tmp_path):
    shutil.copytree(f"{finished.run.url}/{keys.RESULTS}", tmp_path / "alone.zarr")
    cell = open_results(finished.run.url).obs.index[5]
    pd.testing.assert_frame_equal(
        open_results(tmp_path / "alone.zarr").matches(cell), open_results(finished.run.url).matches(cell)
    )
    with pytest.raises(QueryError, match="no cell 'cell-x'"):
        open_results(finished.run.url).matches("cell-x")


def test_several_neighbours_are_in_matches_zarr_alone(every_edge, tmp_path):
    shutil.copytree(f"{every_edge.run.url}/{keys.RESULTS}", tmp_path / "alone.zarr")
    results, whole = open_results(tmp_path / "alone.zarr"), open_results(every_edge.run.url)
    cell = results.obs.index[0]
    if every_edge.settings.match.neighbours == 1:
        pd.testing.assert_frame_equal(results.matches(cell), whole.matches(cell))
        return
    with pytest.raises(StoreError, match=r"nor is a matches\.zarr beside it"):
        results.matches(cell)


def test_edges_added_later_are_named_too(copied, every_edge):
    before = open_results(copied.folder)
    cell = before.obs.query("condition == 'ctrl'").index[0]
    assert set(before.matches(cell)["condition"]) == {"ctrl"}
    add_edges(copied.run, copied.settings, copied.design, SerialRuntime(copied.settings.run), "key of match", "all")
    after = open_results(copied.folder)
    assert set(after.matches(cell)["condition"]) == {"ctrl", "stim", "sick"}
    if every_edge.settings.match.hubs == "none":  # the same hub correction as in the run that edges are added to
        nearest = open_results(every_edge.run.url).matches(cell).query("neighbour <= 1").reset_index(drop=True)
        columns = ["cell", "group", "neighbour", "distance"]
        pd.testing.assert_frame_equal(after.matches(cell)[columns], nearest[columns])
    assert json.loads(after.uns["settings"])["match"]["edges"] == "needed"


@pytest.mark.parametrize(
    ("settings", "absent"),
    [
        pytest.param({"embed": {"method": "pca"}}, {"model", "loss", "train", "clusters"}, id="untrained"),
        pytest.param(
            {"embed": {"method": "pca"}, "match": {"within": keys.OBS_LOW}},
            {"model", "loss", "train"},
            id="in_clusters",
        ),
        pytest.param(
            {"embed": {"method": "state"}, "state": {"by": keys.OBS_LOW}}, {"model", "loss", "train"}, id="by_clusters"
        ),
        pytest.param({"embed": {"method": "ndreamer"}}, set(), id="trained"),
        pytest.param({}, set(), id="of_an_earlier_version"),
    ],
)
def test_settings_that_a_space_has_no_use_for_do_not_bear_on_its_results(
    settings: dict[str, dict[str, Any]], absent: set[str]
) -> None:
    told = {part: {"any": 1} for part in ("cohort", "model", "loss", "train", "clusters")} | settings
    assert set(told) - set(bearing_settings({"settings": json.dumps(told)})) == absent
