"""With samples of groups, a cell averages over its sample; groups are used equally, and nothing else changes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import sparse

import ndreamer_dist as nd
from ndreamer_dist import keys
from ndreamer_dist.comparison.halves import donor_halves, half_effects
from ndreamer_dist.comparison.state import StateQuestion
from ndreamer_dist.grouping.sample import ARC, arc, takes
from ndreamer_dist.matching.between import SearchBetween
from ndreamer_dist.matching.hubs import pool
from ndreamer_dist.matching.stage import asked_edges
from ndreamer_dist.stats.cate_table import MatchedNeighbours, replicates_of
from ndreamer_dist.stats.results import Results
from ndreamer_dist.storage.arrays import read_array
from tests.cohort.inputs import designed
from tests.results.brute_force import mean_nearest

SETTINGS = {
    "embed.method": "pca", "embed.dimensions": 5, "cohort.min_group_cells": 5, "embed.tile_rows": 64, "run.serial": True, "pack.block_rows": 64, "match.query_rows": 16,
}  # fmt: skip
DONORS, MOST = 16, 1


@pytest.mark.parametrize(("groups", "most"), [(8, 1), (12, 2), (7, 3), (3, 1), (40, 8)])
@pytest.mark.parametrize("inside", [False, True])
def test_every_cell_takes_as_many_groups_and_every_group_as_many_cells(groups: int, most: int, inside: bool) -> None:
    cells, taken = np.arange(groups * 60), np.zeros(groups, dtype=int)
    for place in range(groups):
        targets = arc(groups, most, place, inside=inside)
        assert len({*targets}) == len(targets) == min(ARC * most, groups - inside)
        assert not (inside and place in targets)
        mine = np.stack([takes(position, len(targets), most, cells) for position in range(len(targets))])
        assert (mine.sum(axis=0) == min(most, len(targets))).all()
        assert np.ptp(mine.sum(axis=1)) <= most
        taken[targets] += mine.sum(axis=1)
    assert np.ptp(taken) <= groups


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run with matches in a sample of the groups, and a run with matches in all groups."""
    folder = tmp_path_factory.mktemp("sample")
    nd.simulate(folder / "cohort.h5ad", cells=640, genes=60, batches=DONORS, design="nested", seed=3)
    common = {"condition_key": "condition", "control": "control", "batch_key": "donor"}
    for name, groups in (("sample", MOST), ("all", None)):
        settings = {**SETTINGS, "match.groups": groups, "match.hubs": "csls"}
        nd.run(folder / "cohort.h5ad", out=folder / name, **common, settings=settings)
    return folder / "sample", folder / "all"


def expected(results: Results, code: int, rows: np.ndarray) -> np.ndarray:
    """Return F of a group's cells, (cells, genes), in plain numpy."""
    design, points = results.design, results.embedding(order="packed").to_numpy()
    values = results.expression(order="packed").X.toarray().astype(np.float64)
    group = design.groups[int(design.group_of(rows[:1])[0])]
    members = design.with_condition(code)
    total, number = np.zeros((len(rows), values.shape[1])), np.zeros(len(rows))
    for target in design.counted(code, group):
        if target == group:
            continue
        taking = np.flatnonzero(design.taking(group, target, rows - group.start))
        far = points[target.start : target.stop]
        remote = mean_nearest(far, points[pool(design.starts, target.code)], 10)
        distance = np.sqrt(((points[rows[taking], None].astype(float) - far[None]) ** 2).sum(axis=2))
        total[taking] += values[target.start + (2 * distance - remote).argmin(axis=1)]
        number[taking] += 1
    assert (number == MOST).all()
    if group not in members:
        return total / MOST
    return (values[rows] + total * (len(members) - 1) / MOST) / len(members)


def test_effects_are_means_over_the_groups_that_a_cell_is_matched_in(runs: tuple[Path, Path]) -> None:
    results = nd.open_results(runs[0])
    group = results.design.with_condition(1)[2]
    rows = np.arange(group.start, group.stop)
    names = list(results.packed_obs.index[rows])
    ite = np.asarray(results.ite(cells=names).X)
    np.testing.assert_allclose(ite, expected(results, 1, rows) - expected(results, 0, rows), atol=1e-5)
    on_demand = np.asarray(results.effect("treated", cells=names).X)
    np.testing.assert_array_equal(ite, on_demand)


def test_no_other_group_is_searched(runs: tuple[Path, Path]) -> None:
    results, design = nd.open_results(runs[0]), nd.open_results(runs[0]).design
    matched = read_array(results.storage, f"obsm/{keys.OBSM_MATCH}") >= 0
    per_cell = np.stack([matched[:, [g.code for g in design.with_condition(c)]].sum(axis=1) for c in (0, 1)], axis=1)
    condition = design.group_conditions[design.group_of(np.arange(design.n_cells))]
    assert (per_cell[condition == 1] == (MOST, MOST + 1)).all()  # its nearest other cell is in its own group
    assert (per_cell[condition == 0] == (MOST + 1, 0)).all()


def test_donors_are_compared_through_all_groups(runs: tuple[Path, Path]) -> None:
    sample, every = (nd.open_results(folder).cate(genes=["GENE00001", "GENE00002"]) for folder in runs)
    assert sample["p"].notna().any()
    assert np.abs(sample["mean_ite"] - every["mean_ite"]).max() < 0.5
    assert (sample["mean_ite"] != every["mean_ite"]).any()


def test_a_run_goes_on_with_more_groups_from_its_matches(runs: tuple[Path, Path]) -> None:
    told = nd.open_results(runs[0]).design
    assert told.sampled == MOST
    assert nd.open_results(runs[1]).design.sampled == 0


def test_conditions_of_one_group_each_are_spread_over_the_control() -> None:
    """Use a screen of small conditions, each of which starts at its own place on the circle of groups."""
    conditions = ["control"] * 40 + [f"guide{number:02d}" for number in range(20)]
    obs = pd.DataFrame({"condition": conditions, "batch": [f"batch{number}" for number in range(40)] + ["batch0"] * 20})
    full, *_ = designed(obs, condition_key="condition", control="control", batch_keys=["batch"], small_groups="keep")
    design = full.sampling(MOST)
    asked = [target.code for query in design.groups if query.condition for target in design.counted(0, query)]
    times = np.bincount(asked, minlength=len(design.groups))[design.group_conditions == 0]
    assert 0 < times.min() <= times.max() <= 2 * times.mean()


def test_layers_of_all_genes_are_those_of_the_run(runs: tuple[Path, Path], tmp_path: Path) -> None:
    results = nd.open_results(runs[0])
    wide = nd.all_genes(
        runs[0], cohort=runs[0].parent / "cohort.h5ad", out=tmp_path / "wide", settings={"run.serial": True}
    )
    assert wide.design.sampled == MOST
    genes = list(results.var_names)
    np.testing.assert_array_equal(wide.layer("ite", genes=genes).X, results.layer("ite").X)
    np.testing.assert_array_equal(wide.denoised(genes=genes).X, results.denoised().X)


def test_the_nearest_other_cell_is_found_where_donors_share_a_group(runs: tuple[Path, Path]) -> None:
    given = nd.open_results(runs[0])._statistics_input(None, None)
    group = given.design.groups[2]
    every = np.arange(group.start, group.stop)
    for neighbours in (MatchedNeighbours(given), MatchedNeighbours(given, np.arange(given.design.n_cells))):
        donor = every[::2]
        assert (neighbours(donor, donor, donor) != donor).all()
    stored = given.counterparts.edges(every, [(group.code, group.code)])[group.code, group.code]
    searched = given.counterparts.between(given.embedding).edge(given.design, group, group, 1)
    for kept, now in zip(stored, searched, strict=True):
        np.testing.assert_array_equal(kept[:, :1], now)


@dataclass(frozen=True)
class Alike:
    """Expression of 1 in every cell."""

    density: float = 1.0

    def read(self, rows: np.ndarray, columns: np.ndarray) -> sparse.csr_matrix:
        """Return ones."""
        return sparse.csr_matrix(np.ones((len(rows), len(columns))))


def test_halves_of_the_donors_see_no_effect_on_what_all_cells_express_alike(runs: tuple[Path, Path]) -> None:
    given = nd.open_results(runs[0])._statistics_input(["GENE00001"], None)
    halves = donor_halves(replicates_of(given, None), given.seed)
    assert halves is not None
    codes = np.zeros(given.design.n_cells, dtype=np.int64)
    effects = half_effects(replace(given, expression=Alike()), codes, halves, 1)
    np.testing.assert_allclose(effects, 0, atol=1e-12)


def test_matches_of_a_cell_tell_what_they_weigh(runs: tuple[Path, Path]) -> None:
    results = nd.open_results(runs[0])
    name = results.packed_obs.index[results.design.with_condition(1)[3].start]
    x, table = results.expression().to_df(), results.matches(name)
    for condition in results.conditions:
        told = table[table["condition"] == condition]
        groups = len(results.design.with_condition(results.design.condition_code(condition)))
        mean = told["weight"].to_numpy() @ x.loc[told["cell"]].to_numpy() / groups
        np.testing.assert_allclose(results.counterfactual(condition, cells=[name]).X[0], mean, atol=1e-5)


def test_spaces_of_other_samples_are_asked_in_the_groups_of_their_own(runs: tuple[Path, Path]) -> None:
    sample, every = (nd.open_results(folder) for folder in runs)
    design, no_values = every.design, np.zeros(0)
    cells = np.concatenate([np.arange(group.start, group.start + 10) for group in design.with_condition(0)])
    question = StateQuestion(every.expression, no_values, no_values, cells, no_values, design)
    matched = question._matches(sample.counterparts)
    assert (matched >= 0).all()
    assert (design.group_of(matched) != design.group_of(cells)).all()


def test_edges_that_are_added_are_those_of_the_sample(runs: tuple[Path, Path]) -> None:
    design = nd.open_results(runs[0]).design
    added = asked_edges(design, "treated")
    assert added == [(q.code, target.code) for q in design.groups for target in design.counted(1, q)]
    assert len(added) < len(asked_edges(design.sampling(None), "treated"))
    assert {*asked_edges(design, "all")} == {*added, *asked_edges(design, "control"), *((g, g) for g in range(DONORS))}


def test_cells_mapped_later_change_no_match_of_the_run(runs: tuple[Path, Path]) -> None:
    """For cells of the run, a search in the results of mapped cells measures remoteness from groups of the run only."""
    design, points = nd.open_results(runs[0]).design, np.random.default_rng(0).normal(size=(640, 5)).astype(np.float32)
    search = SearchBetween(points.__getitem__, None, 1, corrected=True)
    run = replace(design, groups=design.groups[:6])
    later = replace(design, mappings=(6, 12))
    for query in run.groups:
        for target in run.targets(query, "all"):
            before, after = (search.edge(told, query, target, 1)[0] for told in (run, later))
            np.testing.assert_array_equal(before, after)
