"""Runs in spaces that need no network: from input to results, interrupted or not, beside other spaces."""

from __future__ import annotations

import functools
import logging
import re
import shutil
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest

import ndreamer_dist as nd
from ndreamer_dist import keys
from ndreamer_dist.cohort.obsm import coordinates_of
from ndreamer_dist.cohort.source import open_source
from ndreamer_dist.errors import CohortError, SettingsError
from ndreamer_dist.storage.arrays import read_array
from ndreamer_dist.storage.files import open_storage
from tests.embedding.spaces import GIVEN, QUICK, SPACES, folder, run, written
from tests.tiny import NAMES, assert_same_bits, dense


def expression(results: nd.Results) -> np.ndarray:
    return dense(results.expression(order="packed").X).astype(np.float64)


@pytest.mark.parametrize("name", SPACES)
def test_results_say_which_space_cells_were_matched_in_and_hold_its_coordinates(finished, name):
    results = nd.open_results(finished, embedding=name)
    stored = anndata.read_zarr(results.url)
    key = keys.embedding_key(name)
    assert (results.space, results.embedding_key) == (name, key)
    assert stored.uns["ndreamer"]["embedding"] == name
    assert stored.uns["ndreamer"]["embedding_key"] == key
    assert set(stored.obsm) == {key, keys.OBSM_MATCH, keys.OBSM_MATCH_DISTANCE}
    points = read_array(open_storage(folder(finished, name) / keys.EMBEDDING), key)
    np.testing.assert_array_equal(stored.obsm[key], points)
    for pca in (False, True):
        np.testing.assert_array_equal(results.embedding(order="packed", pca=pca), points)


@pytest.mark.parametrize("name", SPACES)
def test_matches_are_the_nearest_cells_in_the_space(finished, name):
    results = nd.open_results(finished, embedding=name)
    stored = anndata.read_zarr(results.url)
    points = stored.obsm[results.embedding_key].astype(np.float64)
    groups = results.design.groups
    query, target = groups[1], groups[0]
    near = points[query.start : query.stop, None] - points[None, target.start : target.stop]
    expected = (near**2).sum(axis=2).argmin(axis=1) + target.start
    np.testing.assert_array_equal(stored.obsm[keys.OBSM_MATCH][query.start : query.stop, target.code], expected)


@pytest.mark.parametrize("name", SPACES)
def test_everything_after_the_space_works_in_it(finished, name):
    results = nd.open_results(finished, embedding=name)
    assert len(results.cate("cell_type"))
    assert results.diagnostics("cell_type", donor_key="donor").mixing["embedding"].notna().all()
    assert results.denoised(genes=list(results.var_names[:2])).shape == (900, 2)
    part = results.ite(genes=list(results.var_names[:2]))
    results.add_embedding(part)
    assert part.obsm[keys.embedding_key(name)].shape[0] == part.n_obs


def test_stages_that_train_are_not_run(finished):
    done = {path.name for path in (finished / keys.DONE).iterdir()}
    assert done == {keys.STAGE_COHORT, keys.STAGE_PACK, keys.STAGE_SPACE, keys.STAGE_MATCH, keys.STAGE_EFFECTS}
    for name in SPACES[1:]:
        own = {path.name for path in (folder(finished, name) / keys.DONE).iterdir()}
        assert own == {keys.STAGE_SPACE, keys.STAGE_MATCH, keys.STAGE_EFFECTS}
    assert not (finished / keys.MODEL_DIR).exists()
    assert not any(column in nd.open_results(finished).obs for column in (keys.OBS_LOW, keys.OBS_HIGH))


def test_sums_are_gone_once_there_are_axes(finished):
    for name in SPACES:
        assert not (folder(finished, name) / keys.EMBEDDING / keys.SPACE_SUMS).exists()


def test_principal_components_are_those_of_all_cells_at_once(finished):
    results = nd.open_results(finished)
    x = expression(results)
    scores, values, _ = np.linalg.svd(x - x.mean(axis=0), full_matrices=False)
    found = results.embedding(order="packed").to_numpy()
    np.testing.assert_allclose(np.abs(found), np.abs(scores[:, :10] * values[:10]), atol=2e-4)


def test_given_coordinates_are_those_of_the_input(finished, cohort):
    results = nd.open_results(finished, embedding=GIVEN)
    np.testing.assert_array_equal(results.embedding(), cohort.obsm["X_mine"].astype(np.float32))


def test_harmony_moves_cells_and_repeats_itself(finished):
    first = read_array(open_storage(folder(finished, keys.HARMONY) / keys.EMBEDDING), keys.HARMONY_INPUT)
    own = read_array(open_storage(finished / keys.EMBEDDING), "X_pca")
    assert first.shape[1] < own.shape[1]  # components of noise are left out
    np.testing.assert_array_equal(first, own[:, : first.shape[1]])  # the same components
    found = nd.open_results(finished, embedding=keys.HARMONY).embedding(order="packed").to_numpy()
    assert np.abs(found - first).max() > 0.1


def test_unshrunk_state_is_the_projection_on_what_varies_inside_control_donors(cohort, tmp_path):
    results = run(cohort, tmp_path / "run", keys.STATE, **{"state.k": 3, "state.shrink": False}).results
    x, obs = expression(results), results.packed_obs
    inner = [x[obs[keys.OBS_GROUP] == g] for g in obs.loc[obs["condition"] == "control", keys.OBS_GROUP].unique()]
    centred = np.concatenate([part - part.mean(axis=0) for part in inner])
    axes = np.linalg.eigh(centred.T @ centred)[1][:, ::-1][:, :3]
    expected = (x - x.mean(axis=0)) @ axes
    found = results.embedding(order="packed").to_numpy()
    np.testing.assert_allclose(np.abs(found), np.abs(expected), atol=1e-4)


def test_shrunk_state_keeps_the_groups_means_and_draws_cells_towards_them(cohort, finished, tmp_path):
    k = nd.open_results(finished, embedding=keys.STATE).embedding().shape[1]
    plain, own = (
        run(cohort, tmp_path / form, keys.STATE, **{"state.k": k, "state.shrink": form}).results
        for form in ("none", "own")
    )
    points = [results.embedding(order="packed").to_numpy().astype(np.float64) for results in (own, plain)]
    groups = plain.packed_obs[keys.OBS_GROUP].to_numpy()
    means = [pd.DataFrame(p).groupby(groups).transform("mean").to_numpy() for p in points]
    np.testing.assert_allclose(means[0], means[1], atol=1e-5)
    inside = [float(((p - m) ** 2).sum()) for p, m in zip(points, means, strict=True)]
    assert 0.2 * inside[1] < inside[0] < 0.99 * inside[1]


def test_cells_are_matched_inside_their_population_which_the_log_names(cohort, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        results = run(cohort, tmp_path / "run", keys.STATE, **{"state.by": "cell_type"}).results
    logged = set(re.findall("state: population ([^,]+),", caplog.text))
    assert logged
    assert logged <= {*results.obs["cell_type"], "others"}
    stored = anndata.read_zarr(results.url)
    types = stored.obs["cell_type"].to_numpy()
    rows = stored.obsm[keys.OBSM_MATCH]
    for query, target in zip(*np.nonzero(rows >= 0), strict=True):
        group = results.design.groups[target]
        if types[query] in types[group.start : group.stop]:
            assert types[rows[query, target]] == types[query]


@pytest.mark.parametrize("name", SPACES)
def test_a_chunk_that_is_lost_is_made_again_and_nothing_else(cohort, finished, name, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    here = folder(tmp_path / "run", name)
    lost = [keys.embedding_key(name) + "/c/1/0"]
    if name == keys.HARMONY:
        lost += [keys.HARMONY_CELLS + "/c/0", keys.HARMONY_SUMS + "/c/0/0"]  # what cells that are mapped later need
    for file in lost:
        (here / keys.EMBEDDING / file).unlink()
    kept = {path: path.stat().st_mtime_ns for path in (here / keys.EMBEDDING).rglob("c/*") if path.is_file()}
    run(cohort, tmp_path / "run", name)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert_same_bits(folder(finished, name), here, (keys.EMBEDDING, keys.MATCHES, keys.RESULTS)[name == GIVEN :])


def test_an_interrupted_sum_goes_on_with_the_same_bits(cohort, finished, tmp_path, monkeypatch):
    from ndreamer_dist.embedding import population

    def stop(*_: Any) -> None:
        msg = "stopped"
        raise KeyboardInterrupt(msg)

    with monkeypatch.context() as broken:
        broken.setattr(population, "_make_reliability", stop)
        with pytest.raises(KeyboardInterrupt):
            run(cohort, tmp_path / "run", keys.STATE)
    run(cohort, tmp_path / "run", keys.STATE)
    assert_same_bits(folder(finished, keys.STATE), tmp_path / "run", (keys.EMBEDDING, keys.MATCHES))


@pytest.mark.slow
@pytest.mark.ray
def test_tasks_on_ray_write_the_same_bits(cohort, finished, tmp_path, local_ray):
    run(cohort, tmp_path / "run", keys.STATE, **{"run.serial": False})
    assert_same_bits(folder(finished, keys.STATE), tmp_path / "run", (keys.EMBEDDING, keys.MATCHES, keys.RESULTS))


REFUSED = [
    pytest.param("obsm:X_mien", {}, CohortError, "no 'X_mien'.*Did you mean 'X_mine'", id="misspelt_key"),
    pytest.param("obsm:counts", {}, CohortError, "int64 values; expected floats", id="integers"),
    pytest.param("obsm:mixed", {}, CohortError, "columns that are no floats: 'name'", id="text"),
    pytest.param("obsm:holes", {}, CohortError, r"not finite in cell .* \(row 17\)", id="not_finite"),
    pytest.param("scvi", {}, SettingsError, "there are ndreamer, pca, harmony", id="unknown_space"),
    pytest.param("obsm:", {}, SettingsError, "obsm:KEY", id="no_key"),
    pytest.param("state", {"state.by": "celltype"}, CohortError, "Did you mean 'cell_type'", id="no_column"),
    pytest.param("harmony", {"embed.harmony_keys": "donr"}, CohortError, "Did you mean 'donor'", id="no_harmony_key"),
    pytest.param(
        "state", {"state.by": keys.OBS_LOW, "clusters.within": "group"}, SettingsError, "inside each group", id="groups"
    ),
]  # fmt: skip


@pytest.mark.parametrize(("embedding", "settings", "error", "match"), REFUSED)
def test_what_cannot_be_matched_in_is_refused_before_anything_is_written(
    cohort, tmp_path, embedding, settings, error, match
):
    with pytest.raises(error, match=match) as told:
        run(cohort, tmp_path / "run", embedding, **settings)
    assert "\n" not in str(told.value)
    assert not (tmp_path / "run").exists()


def test_coordinates_of_another_length_are_refused(cohort, tmp_path):
    path = tmp_path / "cohort.h5ad"
    written(cohort, path)
    with h5py.File(path, "a") as file:
        del file["obsm/X_mine"]
        file["obsm/X_mine"] = np.zeros((5, 7))
    with pytest.raises(CohortError, match=r"shape \(5, 7\); expected \(900, d\)"):
        run(path, tmp_path / "run", GIVEN)


@pytest.mark.parametrize("container", ["zarr", "h5ad"])
def test_given_coordinates_are_read_from_stored_cohorts(cohort, finished, tmp_path, container):
    path = tmp_path / f"cohort.{container}"
    written(cohort, path)
    for key in ("X_mine", "frame"):
        results = run(path, tmp_path / key, f"{keys.OBSM_PREFIX}{key}").results
        np.testing.assert_array_equal(results.embedding(), nd.open_results(finished, embedding=GIVEN).embedding())


OPENED = {
    "lazy_zarr": ("zarr", anndata.experimental.read_lazy),
    "lazy_h5ad": ("h5ad", anndata.experimental.read_lazy),
    "backed": ("h5ad", functools.partial(anndata.read_h5ad, backed="r")),
}


@pytest.mark.parametrize("kind", OPENED)
def test_given_coordinates_are_read_from_an_anndata_that_leaves_them_in_its_file(cohort, tmp_path, kind):
    container, opened = OPENED[kind]
    path = tmp_path / f"cohort.{container}"
    written(cohort, path)
    source = open_source(opened(path))
    for key in ("X_mine", "frame"):
        np.testing.assert_array_equal(coordinates_of(source, key), np.asarray(cohort.obsm[key], dtype=np.float32))
    with pytest.raises(CohortError, match=r"no 'X_mien'.*Did you mean 'X_mine'"):
        coordinates_of(source, "X_mien")
    with pytest.raises(CohortError, match="int64 values; expected floats"):
        coordinates_of(source, "counts")


@pytest.mark.parametrize("name", [*SPACES, keys.NDREAMER])
def test_the_plan_says_which_stages_a_space_does_without(cohort, name):
    plan = nd.plan(cohort, preset="small", embedding=name, settings=QUICK, **NAMES)
    text = str(plan)
    assert plan.embedding == name
    if name == keys.NDREAMER:
        assert plan.left_out == ()
        assert tuple(stage.name for stage in plan.stages) == keys.STAGES
    else:
        assert f"clusters, train, embed, pca: {name} needs none" in text
        assert "train" not in {stage.name for stage in plan.stages}


@pytest.mark.parametrize("values", ["logarithms", "proportions"])
def test_input_without_counts_is_not_shrunk_and_the_log_says_so(cohort, tmp_path, caplog, values):
    made = cohort.copy()
    counts = dense(cohort.X).astype(np.float64)
    shares = counts / counts.sum(axis=1, keepdims=True)
    made.X = (np.log1p(shares * 1e4) if values == "logarithms" else shares).astype(np.float32)
    asked = {"cohort.normalise": "auto" if values == "logarithms" else "counts"}
    results = run(made, tmp_path / "run", keys.STATE, **asked).results
    assert "no counts that could be halved" in caplog.text
    assert bool(results.uns.get(keys.UNS_SCALED)) == (values == "proportions")
    told = results.cate("cell_type", donor_key="donor", min_cells=1)["state_reliability"]
    assert set(told.dropna()) <= {1.0}
    share = read_array(open_storage(tmp_path / "run" / keys.EMBEDDING), keys.STATE_RELIABILITY)[0]
    k = results.embedding().shape[1]
    np.testing.assert_array_equal(share[:k, :k], np.eye(k))
