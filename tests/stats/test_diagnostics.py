"""Diagnostics agree with brute-force computations on the stored results."""

from __future__ import annotations

import json

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse
from scipy.spatial.distance import cdist, pdist

from ndreamer_dist import keys
from ndreamer_dist.errors import QueryError
from ndreamer_dist.stats import diagnostics as module
from ndreamer_dist.stats.diagnostics import Diagnostics, donor_layout, principal_components
from ndreamer_dist.stats.results import Results, open_results
from tests.results.brute_force import nearest_rows
from tests.results.conftest import SIZES, finish
from tests.results.fabricate import fabricate
from tests.tiny import dense


@pytest.fixture(scope="module")
def told(results: Results) -> Diagnostics:
    return results.diagnostics("cell_type")


def test_overlap_and_reuse_are_counted_over_all_cells(results: Results, told: Diagnostics) -> None:
    obs = results.packed_obs
    points = results.embedding(pca=True, order="packed").to_numpy().astype(np.float64)
    assert list(told.groups["group"]) == [group.name for group in results.design.groups]
    for row in told.groups.itertuples():
        here = (obs[keys.OBS_GROUP] == row.group).to_numpy()
        cells = obs[here]
        assert row.cells == len(cells)
        assert row.overlap == cells[keys.OBS_OVERLAP].mean()
        assert row.match_distance == cells[keys.OBS_MATCH_DISTANCE].median()
        own = cdist(points[here], points[here]) + np.diag(np.full(len(cells), np.inf))
        assert row.own_distance == pytest.approx(np.median(own.min(axis=1)), rel=1e-5)
        times = cells[keys.OBS_TIMES_MATCHED].to_numpy()
        assert row.times_matched_max == times.max()
        assert row.times_matched_mean == times.mean()
        assert row.never_matched == (times == 0).mean()
        assert row.effective_cells == pytest.approx(times.sum() ** 2 / (times**2).sum())
    for row in told.populations.itertuples():
        cells = obs[(obs["cell_type"] == row.population) & (obs["condition"] == row.condition)]
        assert row.cells == len(cells)
        assert row.overlap == cells[keys.OBS_OVERLAP].mean()
    assert told.populations["cells"].sum() == len(obs)


def test_effective_controls_are_counted_over_a_treated_group_s_matches(results: Results, told: Diagnostics) -> None:
    obs, near = results.packed_obs, np.asarray(anndata.read_zarr(results.url).obsm["ndreamer_match"])
    controls = [group.code for group in results.design.with_condition(0)]
    facts = json.loads(results.uns["effective_controls"])
    for row in told.groups.itertuples():
        if row.condition == results.control:
            assert np.isnan(row.effective_controls)
            continue
        _, times = np.unique(near[(obs[keys.OBS_GROUP] == row.group).to_numpy()][:, controls], return_counts=True)
        assert row.effective_controls == pytest.approx(times.sum() ** 2 / (times**2).sum())
        assert facts[row.group] == pytest.approx(row.effective_controls, abs=0.06)


def test_neighbours_that_reach_across_a_population_are_noted(results: Results) -> None:
    notes = results.diagnostics("cell_type").notes
    assert [note.split()[0] for note in notes] == ["denoise.neighbours"]
    counts = results.obs.groupby(["cell_type", "donor", "condition"], observed=True).size()
    most = results.counterparts.denoise_neighbours
    assert (
        f"({most}) is more than 4% of a donor's cells in {(counts * 0.04 < most).sum()} of {len(counts)} pairs"
        in notes[0]
    )
    assert f"{counts.min()} cells" in notes[0]


def test_distortion_is_of_each_groups_first_cells(results: Results, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DISTORTION_CELLS", 40)
    groups = results.diagnostics().groups
    for row, group in zip(groups.itertuples(), results.design.groups, strict=True):
        names = list(results.packed_obs.index[group.start : group.stop][:40])
        raw, kept = (dense(part.X).astype(np.float64) for part in (results.expression(names), results.denoised(names)))
        expected = [np.corrcoef(one, other)[0, 1] for one, other in zip(raw, kept, strict=True)]
        assert row.distortion_cells == len(names)
        assert row.correlation == pytest.approx(np.nanmean(expected))
        assert row.squared_difference == pytest.approx(((raw - kept) ** 2).mean())


def test_mixing_counts_neighbours_of_other_batches_inside_condition_and_population(
    results: Results, told: Diagnostics
) -> None:
    obs, x = results.packed_obs, dense(results.expression(order="packed").X).astype(np.float64)
    centred = x - x.mean(0)
    axes = np.linalg.svd(centred, full_matrices=False)[2][:50]
    spaces = {"input": centred @ axes.T, "embedding": results.embedding(pca=True, order="packed").to_numpy()}
    for row in told.mixing.itertuples():
        shares: dict[str, list[float]] = {"expected": [], "input": [], "embedding": []}
        for kind in obs["cell_type"].unique():
            here = np.flatnonzero((obs["condition"] == row.condition) & (obs["cell_type"] == kind))
            batch = obs["donor"].to_numpy()[here]
            shares["expected"] += [(batch != own).sum() / (len(here) - 1) for own in batch]
            for name, points in spaces.items():
                part = points[here].astype(np.float32)
                near, _ = nearest_rows(part, part, 15, np.arange(len(here)))
                shares[name] += (batch[near] != batch[:, None]).mean(axis=1).tolist()
        assert row.cells == len(shares["input"])
        for name, values in shares.items():
            assert getattr(row, name) == pytest.approx(np.mean(values), abs=2e-4)
    assert (told.mixing["embedding"] > told.mixing["input"]).all()


def test_a_sample_keeps_the_proportions_of_the_groups(results: Results) -> None:
    part = results.diagnostics(cells=200).mixing
    sizes = [group.cells for group in results.design.groups]
    expected = sum(int(np.ceil(200 / sum(sizes) * size)) for size in sizes)
    assert part["cells"].sum() == expected
    assert part["expected"].between(0.6, 0.9).all()


def test_donors_are_said_to_be_nested_or_crossed(results: Results, tmp_path_factory: pytest.TempPathFactory) -> None:
    told = results.diagnostics(cells=100)
    assert told.layout == "nested"
    assert told.donors == "Each of the 8 donors is in one condition only (nested): 4 control, 4 treated."
    labels = results.obs["donor"].astype(str).replace({"donor_02": "donor_01"}).rename("person")
    said = donor_layout(results.labelled(labels)[0]._statistics_input(None, None), "person")
    assert said == ("partly crossed", "1 of the 7 donors is in both conditions (partly crossed): 4 control, 4 treated.")
    one = pd.Series("me", index=results.obs.index, name="person")
    said = donor_layout(results.labelled(one)[0]._statistics_input(None, None), "person")
    assert said == ("crossed", "The only donor is in every condition (crossed).")
    layouts = {
        "crossed": ({(0, 0): 30, (0, 1): 25, (1, 0): 28, (1, 1): 30}, ("a", "b"), "in every condition (crossed)"),
        "partly crossed": (
            SIZES,
            ("a", "b+c"),
            "2 of the 2 donors are in several conditions (partly crossed): 2 ctrl,",
        ),
        "no donors": ({(None, 0): 30, (None, 1): 30}, (), "The donors are unknown"),
    }
    for layout, (sizes, levels, words) in layouts.items():
        folder = tmp_path_factory.mktemp("layout")
        finish(fabricate(folder, sizes, levels=levels))
        found = open_results(folder).diagnostics()
        assert found.layout == layout
        assert words in found.donors


def test_what_has_nothing_to_compare_with_is_nan(tmp_path: pytest.TempPathFactory) -> None:
    finish(fabricate(tmp_path, {(None, 0): 30, (None, 1): 20}, levels=(), overrides={"effects.store": ["ite"]}))
    found = open_results(tmp_path).diagnostics()
    control, treated = found.groups.itertuples()
    assert np.isnan(control.overlap)
    assert 0 <= treated.overlap <= 1
    assert found.groups["correlation"].tolist() == pytest.approx([1, 1])  # one batch: denoised, computed, is the input
    assert found.groups["squared_difference"].tolist() == [0, 0]
    assert found.mixing[["expected", "input", "embedding"]].isna().all(axis=None)
    assert found.populations["population"].unique().tolist() == ["all cells"]
    with pytest.raises(QueryError, match="obs has no column 'type'"):
        open_results(tmp_path).diagnostics("type")


def test_principal_components_are_those_of_the_singular_values() -> None:
    x = np.random.default_rng(0).normal(size=(30, 80))
    points = principal_components(x)
    singular = np.linalg.svd(x - x.mean(0), compute_uv=False)
    np.testing.assert_allclose(np.sort((points**2).sum(0))[::-1][:29], singular[:29] ** 2, rtol=1e-8)


# --- the overlap column ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{"pack.block_rows": 128}, {"match.query_rows": 17}], ids=str)
def test_overlap_has_the_same_bits_however_the_work_is_cut(tmp_path: pytest.TempPathFactory, changes: dict) -> None:
    tables = []
    for name, overrides in (("one", {}), ("other", changes)):
        finish(fabricate(tmp_path / name, SIZES, overrides=overrides))
        tables.append(anndata.read_zarr(tmp_path / name / keys.RESULTS).obs)
    columns = [keys.OBS_OVERLAP, keys.OBS_MATCH_DISTANCE]
    pd.testing.assert_frame_equal(*(table[columns] for table in tables), check_exact=True)


def test_overlap_is_lost_where_cells_are_far_from_every_control(tmp_path: pytest.TempPathFactory) -> None:
    """`tests.results.brute_force` tests the definition of overlap; here cells or the setting change."""
    from ndreamer_dist.storage.arrays import open_array

    made = fabricate(tmp_path, SIZES)
    array = open_array(made.run.storage / keys.EMBEDDING, keys.PCA, mode="r+")
    group = made.design.groups[1]
    far = np.asarray(array[...])
    far[group.start : group.start + 3] += 50
    array[...] = far
    finish(made)
    obs = open_results(tmp_path).packed_obs
    lost = ~obs[keys.OBS_OVERLAP].to_numpy()
    assert obs[keys.OBS_OVERLAP].dtype == bool
    assert lost[group.start : group.start + 3].all()
    strict = fabricate(tmp_path / "strict", SIZES, overrides={"effects.near_quantile": 0.5})
    finish(strict)
    assert (~open_results(tmp_path / "strict").packed_obs[keys.OBS_OVERLAP]).sum() > lost.sum()


def test_principal_components_of_more_genes_than_cells_never_hold_genes_by_genes() -> None:
    rows = sparse.random(40, 30_000, density=0.01, random_state=0, format="csr", dtype=np.float32)
    points = principal_components(rows)
    centred = rows.toarray().astype(np.float64)
    centred -= centred.mean(axis=0)
    u, sizes, _ = np.linalg.svd(centred, full_matrices=False)
    np.testing.assert_allclose(pdist(points), pdist(u * sizes), rtol=1e-6)
