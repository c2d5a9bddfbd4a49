"""Donor means through the matches agree with a brute-force computation of their definition."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from ndreamer_dist.stats import populations as module
from ndreamer_dist.stats.populations import Replicates, population_means, query_means
from tests.cohorts import design_of


@dataclass(frozen=True)
class InMemory:
    x: sparse.csr_matrix

    @property
    def density(self) -> float:
        return 0.5

    def read(self, rows: np.ndarray, columns: np.ndarray) -> sparse.csr_matrix:
        assert (np.diff(rows) > 0).all()
        return self.x[rows][:, columns]


class Made:
    """A cohort of six groups with coordinates, and brute-force values for it."""

    def __init__(self, sizes: list[int], conditions: int = 2, seed: int = 0) -> None:
        generator = np.random.default_rng(seed)
        self.design = design_of(sizes, conditions)
        n = self.design.n_cells
        self.points = generator.normal(size=(n, 3))
        self.x = sparse.random(n, 9, 0.5, format="csr", random_state=seed)
        self.populations = generator.integers(-1, 3, size=n)
        self.conditions = self.design.group_conditions[self.design.group_of(np.arange(n))]

    def nearest(self, queries: np.ndarray, targets: np.ndarray, asking: np.ndarray | None = None) -> np.ndarray:
        del asking  # who else asks bears on matches corrected for hubs alone
        far = ((self.points[queries, None] - self.points[targets][None]) ** 2).sum(-1)
        far[queries[:, None] == targets[None]] = np.inf
        best = far.argmin(axis=1)
        return np.where(np.isinf(far[np.arange(len(queries)), best]), -1, targets[best])

    def asked(self, e: list[np.ndarray], d: list[np.ndarray], population: int) -> np.ndarray:
        """Return A[e, d]; the pieces of a replicate have equal weights."""
        answers = []
        for target in d:
            parts = [piece[self.populations[piece] == population] for piece in e]
            means = [self.x.toarray()[self.nearest(part, target)].mean(0) for part in parts if len(part)]
            answers.append(np.mean(means, axis=0))
        return np.mean(answers, axis=0)

    def means(self, donors: pd.Series, min_cells: int, condition: int = 1):
        self.replicates = Replicates.of(donors, self.design).against(0, condition)
        return population_means(
            self.populations, self.replicates, [self.nearest], InMemory(self.x), np.array([7, 1, 2]), min_cells
        )

    def pieces(self, replicate: int) -> list[np.ndarray]:
        return [piece.rows for piece in self.replicates.pieces if piece.replicate == replicate]


def by_group(design) -> pd.Series:
    return pd.Series(np.repeat([f"d{group.batch}" for group in design.groups], [g.cells for g in design.groups]))


@pytest.mark.parametrize("donors", ["batches", "pooled_batches", "inside_groups"])
def test_matched_means_are_those_of_brute_force(donors: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "READ_ROWS", 7)
    made = Made([30, 25, 40, 20, 35, 28])
    names = by_group(made.design)
    if donors == "pooled_batches":
        names = names.replace("d2", "d0")
    if donors == "inside_groups":
        names = pd.Series(np.random.default_rng(1).choice(["a", "b", "c"], size=made.design.n_cells))
    found = made.means(names, min_cells=6)
    assert found.included.any()
    assert not found.included.all()
    dense = made.x.toarray()[:, [7, 1, 2]]
    for p in range(3):
        kept = np.flatnonzero(found.included[p])
        for d in range(len(made.replicates)):
            if d not in kept:
                assert np.isnan(found.matched[p, d]).all()
                continue
            expected = np.mean([made.asked(made.pieces(e), made.pieces(d), p) for e in kept], axis=0)
            np.testing.assert_allclose(found.matched[p, d], expected[[7, 1, 2]], atol=1e-12)
            own = [dense[piece[made.populations[piece] == p]] for piece in made.pieces(d)]
            np.testing.assert_allclose(found.own[p, d], np.mean([o.mean(0) for o in own if len(o)], axis=0))


def test_each_condition_is_compared_with_the_control_alone() -> None:
    made = Made([30, 25, 28, 40, 20, 33], conditions=3)
    for condition in (1, 2):
        found = made.means(by_group(made.design), min_cells=3, condition=condition)
        assert set(made.replicates.conditions) == {0, condition}
        everyone = np.flatnonzero(found.included[0])
        for target in everyone:
            expected = np.mean([made.asked(made.pieces(e), made.pieces(target), 0) for e in everyone], axis=0)
            np.testing.assert_allclose(found.matched[0, target], expected[[7, 1, 2]], atol=1e-12)


def test_means_over_who_asks_are_kept_apart_where_asked() -> None:
    made = Made([30, 25, 40, 20])
    found = made.means(by_group(made.design), min_cells=4)
    kept = found.included[1]
    each = query_means(
        made.populations == 1, kept, made.replicates, made.nearest, InMemory(made.x), np.array([7, 1, 2])
    )
    assert each.shape == (kept.sum(), kept.sum(), 3)
    np.testing.assert_allclose(each.mean(axis=0), found.matched[1, kept], atol=1e-12)
    e, d = np.flatnonzero(kept)[[0, -1]]
    np.testing.assert_allclose(each[0, -1], made.asked(made.pieces(e), made.pieces(d), 1)[[7, 1, 2]], atol=1e-12)


def test_a_group_of_one_cell_has_no_neighbour_in_itself() -> None:
    made = Made([1, 25, 40, 20])
    made.populations[:] = 0
    found = made.means(by_group(made.design), min_cells=1)
    # The lone cell asks all others, and is found by all others, but never by itself.
    assert np.isfinite(found.matched[0]).all()
    lone = made.x.toarray()[0, [7, 1, 2]]
    np.testing.assert_allclose(found.matched[0, 0], lone)
