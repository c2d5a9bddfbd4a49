"""State coordinates inside populations agree with a brute-force computation (METHOD section 10)."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from ndreamer_dist.cohort.statistics import normalised
from ndreamer_dist.embedding import state
from ndreamer_dist.matching.between import StateNeighbours
from ndreamer_dist.stats import state_space as module
from ndreamer_dist.stats.populations import Replicates
from ndreamer_dist.stats.state_space import StateSource, state_space
from tests.cohorts import design_of
from tests.stats.test_populations import InMemory

GENES, SIZES = 25, [150, 130, 170, 120]


class Made:
    """Two populations, and cells in neither, in four donors; the counts follow one state."""

    def __init__(self) -> None:
        rng = np.random.default_rng(3)
        self.design = design_of(SIZES, 2)
        n = self.design.n_cells
        groups = self.design.group_of(np.arange(n))
        self.score = rng.normal(size=n) + 0.3 * groups
        rates = np.exp(rng.normal(0.8, 0.5, GENES) + np.outer(self.score, rng.normal(0, 0.4, GENES)))
        counts = rng.poisson(rates)
        self.totals = counts.sum(axis=1).astype(np.float64)
        self.x = normalised(sparse.csr_matrix(counts.astype(np.float32)), self.totals)
        self.populations = rng.choice([-1, 0, 1], p=[0.1, 0.5, 0.4], size=n)
        donors = pd.Series([f"d{g}" for g in groups])
        self.replicates = Replicates.of(donors, self.design)
        self.donors = groups  # a piece is a group
        self.control = self.design.group_conditions[groups] == 0

    def space(self, *, counts: bool = True, populations: np.ndarray | None = None, typed: bool = True):
        source = StateSource(InMemory(self.x), np.arange(GENES), self.totals if counts else None, seed=4)
        codes = self.populations if populations is None else populations
        return state_space(source, codes, 2, self.replicates, typed=typed)


@pytest.fixture(scope="module")
def made() -> Made:
    return Made()


def inside(z: np.ndarray, d: np.ndarray) -> np.ndarray:
    return z - pd.DataFrame(z).groupby(d).transform("mean").to_numpy()


def test_coordinates_are_those_of_the_definition_at_once(made: Made) -> None:
    found = made.space()
    rows = np.flatnonzero(made.populations >= 0)
    generator = np.random.default_rng(np.random.SeedSequence((4, module.STATE_SEED, 0)))
    pair = state.halves(made.x[rows].astype(float), made.totals[rows], generator)
    halves = [half[np.arange(len(rows))].toarray() for half in pair]
    z = made.x.toarray().astype(np.float64)
    for p in range(2):
        cells, here = np.flatnonzero(made.populations == p), made.populations[rows] == p
        x, d, k = z[cells], made.donors[cells], found.dimensions[p]
        control = made.control[cells]
        W = np.linalg.eigh(np.cov(inside(x[control], d[control]).T))[1][:, ::-1][:, :k]
        W = W * np.sign(W[np.abs(W).argmax(0), np.arange(k)])
        e = (x - x.mean(0)) @ W
        own = e - inside(e, d)
        a, b = (inside(half[here] @ W, d) for half in halves)
        share = state.reliability((a.T @ b + b.T @ a) / 2 / len(d), inside(e, d).T @ inside(e, d) / len(d))
        n = np.bincount(d)
        means = np.stack([x[d == j].mean(0) for j in range(len(n))]) - x.mean(0)
        place = state.fitted_positions(means, W, (inside(x, d) ** 2).mean(0), n)
        np.testing.assert_allclose(found.points[cells, :k], place[d] + (e - own) @ share.T, atol=2e-5)
        assert found.reliability[p] == pytest.approx(np.trace(share) / k)
        assert np.abs(np.corrcoef(found.points[cells, 0], made.score[cells])[0, 1]) > 0.8


def test_log_normalised_cells_are_not_regressed_and_have_the_most_dimensions(made: Made) -> None:
    found = made.space(counts=False)
    assert (found.dimensions == state.MOST_IN_A_TYPE).all()
    np.testing.assert_allclose(found.reliability, 1.0)


def test_a_population_with_few_control_cells_has_no_coordinates(made: Made) -> None:
    populations = made.populations.copy()
    populations[np.flatnonzero((populations == 1) & made.control)[99:]] = 0
    found = made.space(populations=populations)
    assert found.dimensions[0] > 0
    assert found.dimensions[1] == 0
    assert (found.populations[populations == 1] == -1).all()
    assert np.isnan(found.reliability[1])


@pytest.mark.parametrize("counted", [True, False])
@pytest.mark.parametrize("varying", [0, 1])
def test_a_population_whose_cells_are_alike_has_no_coordinates(counted: bool, varying: int) -> None:
    made = Made()
    x, alike = made.x.toarray(), made.populations == 1
    x[alike] = x[np.flatnonzero(alike)[0]]
    x[alike, :varying] = np.random.default_rng(0).random((alike.sum(), varying))
    made.x = sparse.csr_matrix(x)
    found = made.space(counts=counted)
    assert found.dimensions[0] > 0
    assert found.dimensions[1] == varying
    assert np.isfinite(found.points).all()
    assert (found.populations[alike] == (1 if varying else -1)).all()


def test_neighbours_are_the_nearest_of_the_same_population(made: Made) -> None:
    space = made.space()
    near = StateNeighbours(space)
    rows = [piece.rows for piece in made.replicates.pieces]
    for queries, targets in ((rows[0], rows[1]), (rows[1], rows[1]), (rows[3], rows[0])):
        found = near(queries, targets, queries)
        for query, target in zip(queries, found, strict=True):
            code = made.populations[query]
            if code < 0:
                assert target == -1
                continue
            same = targets[(made.populations[targets] == code) & (targets != query)]
            k = space.dimensions[code]
            far = ((space.points[same, :k].astype(float) - space.points[query, :k]) ** 2).sum(axis=1)
            assert target == same[far.argmin()]


def test_few_populations_at_a_time_give_the_same_bits(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = made.space().points
    monkeypatch.setattr(module, "MATRIX_VALUES", 1)
    np.testing.assert_array_equal(made.space().points, whole)
