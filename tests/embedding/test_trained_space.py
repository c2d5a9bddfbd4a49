"""The space `ndreamer+state`, which joins trained and state coordinates, and the trained space in the same run."""

from __future__ import annotations

from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest

import ndreamer_dist as nd
from ndreamer_dist import keys
from ndreamer_dist.storage.arrays import read_array
from ndreamer_dist.storage.files import open_storage
from tests.embedding.spaces import run


@pytest.fixture(scope="module")
def both(cohort: anndata.AnnData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("both") / "run"
    run(cohort, out, keys.NDREAMER_STATE)
    return out


def spread_inside(points: np.ndarray, groups: pd.Series) -> float:
    """Return the sum of the variances inside groups."""
    exact = pd.DataFrame(points.astype(np.float64))
    return float(((exact - exact.groupby(groups.to_numpy()).transform("mean")) ** 2).sum().sum() / len(points))


def test_both_stand_side_by_side_and_spread_alike_inside_groups(both):
    results = nd.open_results(both)
    points = results.embedding(order="packed").to_numpy()
    trained = read_array(open_storage(both / keys.EMBEDDING), keys.PCA)
    width = trained.shape[1]
    assert points.shape[1] > width
    np.testing.assert_array_equal(points[:, :width], trained)
    groups = results.packed_obs[keys.OBS_GROUP]
    spreads = [spread_inside(part, groups) for part in (points[:, :width], points[:, width:])]
    assert spreads[0] == pytest.approx(spreads[1], rel=1e-3)
    assert keys.OBS_LOW in results.obs


def test_the_trained_space_is_added_without_training_again(cohort, both):
    weights = (both / keys.MODEL_WEIGHTS).stat().st_mtime_ns
    run(cohort, both, keys.NDREAMER)
    assert (both / keys.MODEL_WEIGHTS).stat().st_mtime_ns == weights
    results = nd.open_results(both, embedding=keys.NDREAMER)
    stored = [read_array(open_storage(both / keys.EMBEDDING), name) for name in (keys.MU, keys.PCA)]
    for pca, expected in enumerate(stored):
        np.testing.assert_array_equal(results.embedding(order="packed", pca=bool(pca)), expected)
    own = {path.name for path in (both / keys.space_folder(keys.NDREAMER) / keys.DONE).iterdir()}
    assert own == {keys.STAGE_MATCH, keys.STAGE_EFFECTS}
    assert nd.check(both, settings={"run.serial": True}).damage == ()


def test_a_weight_that_is_given_is_taken(cohort, both):
    before = nd.open_results(both).embedding(order="packed").to_numpy()
    run(cohort, both, keys.NDREAMER_STATE, redo=True, **{"embed.state_weight": 3.0})
    after = nd.open_results(both).embedding(order="packed").to_numpy()
    store = open_storage(both / keys.EMBEDDING)
    assert read_array(store, keys.STATE_WEIGHT)[0] == 3.0
    width = read_array(store, keys.PCA).shape[1]
    ratio = after[:, width:] / before[:, width:]
    np.testing.assert_allclose(ratio, np.median(ratio), rtol=1e-3)
