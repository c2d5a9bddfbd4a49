"""The score of single cells' effects is near 1 for a space that represents the state, and about 0 without it."""

from __future__ import annotations

import numpy as np
import pytest

from ndreamer_dist.datasets import Truth, simulate
from ndreamer_dist.datasets.local_score import centred_correlation, local_scores, smoothed
from ndreamer_dist.datasets.score import Recovery
from ndreamer_dist.errors import QueryError


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> Truth:
    return simulate(tmp_path_factory.mktemp("l") / "c.zarr", cells=4000, genes=300, seed=3, state_effects=1.0)


def noisy(truth: Truth, positions: np.ndarray, seed: int = 0):
    """Return a reader of the true effects plus noise per cell that is much larger than their variation."""
    noise = np.random.default_rng(seed).normal(0, 1, (len(positions), len(truth.genes))).astype(np.float32)

    def read(start: int, stop: int) -> np.ndarray:
        return truth.ite(positions[start:stop]) + noise[start:stop]

    return read


def test_a_space_that_holds_the_state_shows_its_effects_and_one_that_does_not_shows_none(truth: Truth) -> None:
    positions = np.random.default_rng(1).permutation(4000)[:3600]  # cells may be dropped and come in any order
    obs = truth.obs(positions)
    spaces = {"state": obs["state"][:, None], "nothing": np.random.default_rng(2).normal(size=(3600, 2))}
    found = {
        name: local_scores(
            truth, noisy(truth, positions), positions=positions, points=points, genes=truth.genes, chunk_rows=700
        )
        for name, points in spaces.items()
    }
    for scores in found.values():
        assert [(s.cell_type, s.condition) for s in scores] == [(f"type_{n}", "treated") for n in (1, 2, 3, 4)]
        kinds = [((obs["cell_type"] == s.cell_type) & (obs["condition"] == "treated")).sum() for s in scores]
        assert [s.cells for s in scores] == kinds
        assert [s.genes for s in scores] == [(truth.mean_ite(s.cell_type, "treated") != 0).sum() for s in scores]
    assert min(s.correlation for s in found["state"]) > 0.8
    assert max(abs(s.correlation) for s in found["nothing"]) < 0.15
    lines = Recovery((), (), 300, 0.25, found["state"]).table()
    assert "Mean local correlation 0." in lines
    assert "local" not in Recovery((), (), 300, 0.25).table()


def test_a_score_is_the_correlation_of_means_over_the_nearest_cells() -> None:
    rng = np.random.default_rng(0)
    values, points = rng.normal(size=(90, 3)), rng.normal(size=(90, 2))
    order = np.argsort(((points[:, None] - points[None]) ** 2).sum(-1), axis=1)
    expected = np.stack([values[order[i, :7]].mean(0) for i in range(90)])
    np.testing.assert_allclose(smoothed(values, points, neighbours=7), expected)
    true = expected + rng.normal(0, 0.3, (90, 3)) + [5, -5, 0]
    centred = [(a - a.mean(0)).ravel() for a in (expected, true)]
    assert centred_correlation(expected, true) == pytest.approx(np.corrcoef(*centred)[0, 1])
    assert centred_correlation(np.ones((9, 2)), true[:9, :2]) == 0
    assert np.isnan(centred_correlation(expected, np.ones((90, 3))))


def test_nothing_is_read_where_effects_do_not_depend_on_the_state(tmp_path) -> None:
    truth = simulate(tmp_path / "c.zarr", cells=200, genes=100)

    def read(start: int, stop: int) -> np.ndarray:
        raise AssertionError

    assert local_scores(truth, read, positions=np.arange(200), points=np.zeros((200, 2)), genes=truth.genes) == ()
    with pytest.raises(QueryError, match="200 positions and 199 points"):
        local_scores(truth, read, positions=np.arange(200), points=np.zeros((199, 2)), genes=truth.genes)


def test_cells_are_found_by_the_names_they_were_given(truth: Truth) -> None:
    assert truth.positions(["cell_0000007", "cell_0003999"]).tolist() == [7, 3999]
    with pytest.raises(QueryError, match="no cell 'AACT-1'"):
        truth.positions(["cell_0000007", "AACT-1"])
