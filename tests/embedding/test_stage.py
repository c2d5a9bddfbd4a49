"""The embedding of a cell depends on this cell only, and its PCA is exact."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from ndreamer_dist import keys
from ndreamer_dist.cohort.packed import Packed
from ndreamer_dist.compute.executor import Runtime, choose_runtime
from ndreamer_dist.embedding.stage import principal_axes, run_embed, run_pca
from ndreamer_dist.settings import RunSettings, Settings
from ndreamer_dist.storage.arrays import read_array
from ndreamer_dist.training.loop import TrainState
from ndreamer_dist.training.model_file import TrainedModel, save_model
from tests.cohorts import packed_cohort

SETTINGS = Settings.build(
    preset="small",
    overrides={
        "model.encoder": [32, 16], "model.codebooks": 3, "model.codes": 8, "model.latent": 12, "model.decoder": [16],
        "embed.tile_rows": 64, "embed.dimensions": 5, "pack.block_rows": 128, "run.serial": True,
    },
)  # fmt: skip


def embedded(folder: Path, runtime: Runtime, settings: Settings = SETTINGS) -> Packed:
    packed = packed_cohort(folder, cells=(150, 101), genes=40, block_rows=128)
    state = TrainState.fresh(settings, genes=40, conditions=2, batch_levels=(1,))
    save_model(packed.run.storage, state.network, packed, settings)
    run_embed(packed.run, settings, packed, runtime, "key")
    run_pca(packed.run, settings, packed, runtime, "key")
    return packed


def arrays(packed: Packed) -> dict[str, np.ndarray]:
    store = packed.run.storage / keys.EMBEDDING
    return {name: read_array(store, name) for name in (keys.MU, keys.PCA, keys.PCA_COMPONENTS, keys.PCA_VARIANCE)}


def test_every_cell_is_placed_and_the_pca_is_that_of_all_cells(tmp_path: Path) -> None:
    found = arrays(embedded(tmp_path, choose_runtime(SETTINGS.run)))
    mu = found[keys.MU].astype(np.float64)
    assert mu.shape == (251, 12)
    _, singular, axes = np.linalg.svd(mu - mu.mean(0), full_matrices=False)
    scores = (mu - mu.mean(0)) @ axes[:5].T
    assert np.allclose(np.abs(found[keys.PCA]), np.abs(scores), atol=1e-5)
    assert np.allclose(found[keys.PCA_VARIANCE], singular[:5] ** 2 / 250)
    components = found[keys.PCA_COMPONENTS]
    assert (components[np.abs(components).argmax(0), range(5)] > 0).all()


def test_a_cells_embedding_does_not_depend_on_its_neighbours(tmp_path: Path) -> None:
    packed = embedded(tmp_path, choose_runtime(SETTINGS.run))
    model = TrainedModel.load(packed.run.storage)
    x = packed.rows(0, packed.n_rows)
    together = model.embed(x, 64)
    assert np.array_equal(together, arrays(packed)[keys.MU])
    assert np.array_equal(model.embed(x[100:101], 64)[0], together[100])


def test_the_model_alone_says_what_it_reads(tmp_path: Path) -> None:
    packed = embedded(tmp_path, choose_runtime(SETTINGS.run))
    model = TrainedModel.load(packed.run.storage)
    assert model.genes == packed.genes
    assert model.conditions == ("control", "treated")
    assert model.batch_levels == (("donor0",),)


@pytest.mark.parametrize("harmed", ["embed", "pca"])
def test_a_lost_shard_is_made_again_with_the_same_bits(tmp_path: Path, harmed: str) -> None:
    runtime = choose_runtime(SETTINGS.run)
    packed = embedded(tmp_path, runtime)
    before = arrays(packed)
    store = {"embed": keys.MU, "pca": keys.PCA}[harmed]
    (tmp_path / keys.EMBEDDING / store / "c/1/0").unlink()
    kept = (tmp_path / keys.EMBEDDING / store / "c/0/0").stat().st_mtime_ns
    run_embed(packed.run, SETTINGS, packed, runtime, "key")
    run_pca(packed.run, SETTINGS, packed, runtime, "key")
    after = arrays(packed)
    assert all(np.array_equal(before[name], after[name]) for name in before)
    assert (tmp_path / keys.EMBEDDING / store / "c/0/0").stat().st_mtime_ns == kept


@pytest.mark.parametrize("array", [keys.MU, keys.PCA])
def test_a_lost_array_is_made_again_with_the_same_bits(tmp_path: Path, array: str) -> None:
    runtime = choose_runtime(SETTINGS.run)
    packed = embedded(tmp_path, runtime)
    before = arrays(packed)
    shutil.rmtree(tmp_path / keys.EMBEDDING / array)
    run_embed(packed.run, SETTINGS, packed, runtime, "key")
    run_pca(packed.run, SETTINGS, packed, runtime, "key")
    assert all(np.array_equal(before[name], values) for name, values in arrays(packed).items())


@pytest.mark.parametrize("codes", ["expected", "sampled"])
def test_codes_are_chosen_as_asked_and_a_lost_block_has_the_same_ones(tmp_path: Path, codes: str) -> None:
    runtime = choose_runtime(SETTINGS.run)
    chosen = Settings.build(config=SETTINGS.model_dump(), overrides={"embed.codes": codes})
    packed = embedded(tmp_path / codes, runtime, chosen)
    before = arrays(packed)[keys.MU]
    assert not np.array_equal(before, arrays(embedded(tmp_path / "probable", runtime))[keys.MU])
    (tmp_path / codes / keys.EMBEDDING / keys.MU / "c/1/0").unlink()
    run_embed(packed.run, chosen, packed, runtime, "key")
    assert np.array_equal(before, arrays(packed)[keys.MU])


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_ray_gives_the_same_bits_as_one_process(tmp_path: Path) -> None:
    serial = arrays(embedded(tmp_path / "serial", choose_runtime(SETTINGS.run)))
    on_ray = arrays(embedded(tmp_path / "ray", choose_runtime(RunSettings())))
    assert all(np.array_equal(serial[name], on_ray[name]) for name in serial)


@hypothesis_settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(2, 9), st.integers(1, 12), st.integers(0, 99))
def test_axes_from_moments_are_those_of_the_points(cells: int, width: int, dimensions: int, seed: int) -> None:
    points = np.random.default_rng(seed).normal(size=(cells, width)) * np.arange(1, width + 1) + 3
    mean, components, variance = principal_axes(cells, points.sum(0), points.T @ points, dimensions)
    assert components.shape == (width, min(dimensions, width, cells))
    assert np.allclose(mean, points.mean(0))
    assert np.allclose(components.T @ components, np.eye(components.shape[1]))
    scores = (points - mean) @ components
    assert np.allclose(scores.var(0, ddof=1) if cells > 1 else 0.0, variance, atol=1e-6)
    total = points.var(0, ddof=1).sum() if cells > 1 else 0.0
    assert variance.sum() <= total + 1e-6
