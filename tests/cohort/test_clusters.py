"""Clusters equal those of scanpy's graph and Leiden, 0 is the largest, and groups of any size have labels."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pytest
import scanpy as sc
from scipy import sparse

from ndreamer_dist import keys
from ndreamer_dist.cohort.clusters import clustered_by, run_clusters
from ndreamer_dist.cohort.graph import (
    cluster_cells,
    largest_first,
    leiden,
    nearest_with_self,
    neighbour_graph,
    scanpy_pca,
)
from ndreamer_dist.cohort.packed import Packed
from ndreamer_dist.compute.executor import RayRuntime
from ndreamer_dist.planning.stages import stage_keys
from ndreamer_dist.settings import ClustersSettings, Settings
from tests.cohort.inputs import SERIAL, counts, files_below, settings_of
from tests.cohorts import packed_cohort

SCANPY_GRAPH = """
import sys, numpy as np, anndata as ad, scanpy as sc
from scipy import sparse
for cells, points in np.load(sys.argv[1] + "/points.npz").items():
    adata = ad.AnnData(sparse.csr_matrix((len(points), 1), dtype=np.float32), obsm={"X_pca": points})
    sc.pp.neighbors(adata, use_rep="X_pca")
    sparse.save_npz(f"{sys.argv[1]}/{cells}.npz", adata.obsp["connectivities"])
"""


def clusters(folder: Path, settings: Settings, runtime: Any = SERIAL, cells: tuple[int, ...] = (70, 60, 50)) -> Packed:
    packed = Packed.open(packed_cohort(folder, cells=cells, genes=30, block_rows=64).run, 64)
    for level in (keys.PACKED_LOW, keys.PACKED_HIGH):
        packed.storage.delete(level)
    run_clusters(packed.run, settings, packed, runtime, _key(settings))
    return packed


def _key(settings: Settings) -> str:
    return stage_keys(settings, {})[keys.STAGE_CLUSTERS]


def test_the_graph_is_scanpys_own(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    clouds = {cells: rng.normal(size=(cells, 10)).astype(np.float32) for cells in (150, 9)}
    np.savez(tmp_path / "points.npz", **{str(cells): points for cells, points in clouds.items()})
    # Without its compiler, numba runs slowly but starts at once.
    environment = {**os.environ, "NUMBA_DISABLE_JIT": "1"}
    subprocess.run([sys.executable, "-c", SCANPY_GRAPH, tmp_path], check=True, env=environment, capture_output=True)
    for cells, points in clouds.items():
        expected = sparse.load_npz(tmp_path / f"{cells}.npz").toarray()
        np.testing.assert_allclose(neighbour_graph(points, 15).toarray(), expected, atol=2e-4)


@pytest.mark.parametrize(("flavor", "iterations"), [("leidenalg", -1), ("igraph", 2)])
def test_leiden_is_scanpys_own(flavor: str, iterations: int) -> None:
    points = np.random.default_rng(1).normal(size=(150, 5)).astype(np.float32)
    graph = neighbour_graph(points, 10)
    adata = ad.AnnData(np.zeros((150, 1), dtype=np.float32))
    how: dict[str, Any] = {"flavor": flavor, "directed": flavor == "leidenalg", "n_iterations": iterations}
    for resolution in (0.5, 7.0):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # scanpy recommends the other flavour
            sc.tl.leiden(adata, resolution, adjacency=graph, random_state=3, **how)
        expected = largest_first(adata.obs["leiden"].astype(int).to_numpy())
        np.testing.assert_array_equal(leiden(graph, resolution, iterations, 3, flavor), expected)


def test_neighbours_are_exact_and_ties_go_to_the_smaller_row() -> None:
    points = np.random.default_rng(2).integers(0, 3, size=(200, 3)).astype(np.float32)
    indices, distances = nearest_with_self(points, 12)
    exact = np.linalg.norm(points[:, None].astype(np.float64) - points[None], axis=2)
    np.testing.assert_allclose(distances, np.sort(exact, axis=1)[:, :12])
    np.testing.assert_array_equal(indices[:, 0], np.arange(200))


def test_a_cell_with_many_copies_is_still_its_own_first_neighbour() -> None:
    indices, distances = nearest_with_self(np.zeros((300, 4), dtype=np.float32), 15)
    np.testing.assert_array_equal(indices[:, 0], np.arange(300))
    assert (distances == 0).all()
    assert all(len(set(row)) == 15 for row in indices)


def test_principal_components_are_scanpys() -> None:
    x = counts(120, 60).X
    expected = sc.pp.pca(x, n_comps=20, svd_solver="arpack", random_state=1)
    np.testing.assert_array_equal(scanpy_pca(x, 20, 1)[0], expected)
    assert scanpy_pca(x[:8], 50, 1)[0].shape == (8, 7)


@pytest.mark.parametrize("cells", [1, 2, 3, 4, 5, 10, 16])
def test_small_groups_have_labels(cells: int) -> None:
    low, high = cluster_cells(counts(16, 20).X[:cells], ClustersSettings(), 0)
    assert low.shape == high.shape == (cells,)
    assert low.dtype == np.int32
    assert low.min() == 0
    if cells < 4:
        assert not low.any()
        assert not high.any()


@pytest.mark.parametrize("value", [0.0, 2.0])
def test_cells_that_do_not_differ_are_one_cluster(value: float) -> None:
    low, high = cluster_cells(sparse.csr_matrix(np.full((50, 6), value, dtype=np.float32)), ClustersSettings(), 0)
    assert not low.any()
    assert not high.any()


def test_the_largest_cluster_is_0_and_ties_go_by_appearance() -> None:
    assert largest_first(np.array([7, 3, 3, 9, 9, 5])).tolist() == [2, 0, 0, 1, 1, 3]


@pytest.mark.parametrize(
    ("within", "cells", "groups", "way"),
    [
        pytest.param("auto", 4000, 2, "group", id="large_groups"),
        pytest.param("auto", 3999, 2, "all", id="small_groups"),
        pytest.param("auto", 250_000, 200, "sketch", id="too_many_for_one_graph"),
        pytest.param("all", 250_000, 2, "all", id="asked_for_together"),
        pytest.param("group", 10, 2, "group", id="asked_for_apart"),
        pytest.param("sketch", 10, 2, "sketch", id="asked_for_by_a_sketch"),
    ],
)
def test_groups_are_clustered_apart_where_they_are_large(within: str, cells: int, groups: int, way: str) -> None:
    assert clustered_by(ClustersSettings(within=within), cells, groups) == way


@pytest.mark.parametrize("within", ["group", "all", "sketch"])
def test_a_lost_group_is_written_again_with_the_same_bits(within: str, tmp_path: Path) -> None:
    settings = settings_of(clusters__within=within, clusters__sketch_cells=90)
    packed = clusters(tmp_path, settings)
    assert len(packed.clusters(keys.PACKED_HIGH)) == 180
    assert packed.clusters(keys.PACKED_HIGH).max() > packed.clusters(keys.PACKED_LOW).max()
    before = files_below(tmp_path)
    (tmp_path / keys.PACKED / keys.PACKED_LOW / "00001" / "c" / "0").unlink()
    run_clusters(packed.run, settings, packed, SERIAL, _key(settings))
    after = files_below(tmp_path)
    assert {name: content for name, (_, content) in after.items()} == {n: content for n, (_, content) in before.items()}
    assert all(before[name] == after[name] for name in before if "00001" not in name)


def test_labels_mean_something_in_their_own_group_only_when_clustered_apart(tmp_path: Path) -> None:
    packed = clusters(tmp_path, settings_of(clusters__within="group"))
    labels = packed.clusters(keys.PACKED_HIGH)
    for group in packed.design.groups:
        sizes = np.bincount(labels[group.start : group.stop])
        assert sizes[0] == sizes.max()


@pytest.mark.ray
@pytest.mark.slow
def test_ray_finds_the_same_clusters(local_ray: None, tmp_path: Path) -> None:
    settings = settings_of(clusters__within="group")
    a = clusters(tmp_path / "serial", settings)
    b = clusters(tmp_path / "ray", settings, RayRuntime(settings.run))
    for level in (keys.PACKED_LOW, keys.PACKED_HIGH):
        np.testing.assert_array_equal(a.clusters(level), b.clusters(level))
