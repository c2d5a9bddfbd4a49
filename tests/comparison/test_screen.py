"""A screen of many conditions: linear work, bounded memory, similar conditions adjacent, one heat map and one table."""

from __future__ import annotations

import itertools
import re
from collections import Counter, deque
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt

import ndreamer_dist as nd
from ndreamer_dist.cohort.design import MOST_STORED_EDGES
from ndreamer_dist.commands.cate import write_cate
from ndreamer_dist.comparison.screen import Screen, order_of_conditions, pooled, strongest
from ndreamer_dist.effects.tables import MATCH_LIMIT, SPARSE_LIMIT, keeps_matches
from ndreamer_dist.errors import QueryError
from ndreamer_dist.report.tables import likely_populations
from ndreamer_dist.stats import cate_table
from ndreamer_dist.stats.results import Results
from tests.cohorts import design_of
from tests.memory import peak_bytes

CONDITIONS, PATHWAYS, CELLS = 21, 5, 3150
NAMES = {"condition_key": "condition", "control": "control", "batch_key": "donor"}
SETTINGS = {"run.serial": True, "cohort.min_group_cells": 60}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("screen")
    nd.simulate(
        folder / "c.zarr", cells=CELLS, genes=600, batches=2, conditions=CONDITIONS, pathways=PATHWAYS,
        cell_types=2, seed=2,
    )  # fmt: skip
    nd.run(folder / "c.zarr", out=folder / "run", embedding="pca", settings=SETTINGS, **NAMES)
    return folder / "run"


@pytest.fixture(scope="module")
def results(run: Path) -> Results:
    return nd.open_results(run)


@pytest.fixture(scope="module")
def found(results: Results) -> Screen:
    return nd.screen(results)


def test_a_screen_is_counted_by_condition_and_keeps_all_its_cells(results: Results, run: Path) -> None:
    assert results.design.n_cells == CELLS
    assert min(group.cells for group in results.design.groups) < 60
    told = nd.plan(run.parent / "c.zarr", embedding="pca", settings=SETTINGS, **NAMES)
    assert any("60 cells are asked of a condition and 15 of each of its batches" in note for note in told.notes)
    assert not told.dropped_groups
    assert "stored     effects of every cell's own condition; of the other 19 " in str(told)
    assert told.edges == 4 + 8 * (CONDITIONS - 1)


def test_knock_outs_of_a_pathway_lie_side_by_side(found: Screen) -> None:
    pathways = np.array([name[:3] for name in found.effects.index])
    share = (pathways[1:] == pathways[:-1]).mean()
    _, counts = np.unique(pathways, return_counts=True)
    chance = (counts * (counts - 1)).sum() / (len(pathways) * (len(pathways) - 1))
    assert chance < 0.2 < 0.5 < share
    assert list(found.conditions["place"]) == list(range(1, CONDITIONS))
    assert list(found.conditions.index) == list(found.effects.index)
    assert not found.tested  # two donors
    assert (found.conditions["genes"] > 0).mean() > 0.5


def test_the_order_says_nothing_of_a_common_shift_or_of_strength() -> None:
    rng = np.random.default_rng(0)
    ways = rng.normal(size=(3, 50))
    kind = np.arange(12) % 3
    effects = ways[kind] * rng.uniform(0.2, 1, size=(12, 1)) + 5 * rng.normal(size=50)
    ordered = kind[order_of_conditions(effects)]
    assert (np.diff(ordered) != 0).sum() == 2
    assert order_of_conditions(effects[:2]).tolist() == [0, 1]


def test_the_map_is_of_means_over_all_cells_whatever_their_populations(results: Results, found: Screen) -> None:
    name = found.effects.index[3]
    parts = list(results.cate_parts("cell_type", condition=name))
    assert len(parts) == 2
    np.testing.assert_allclose(pooled(parts)[0], found.effects.loc[name], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_parts_are_the_table_and_so_is_the_file(results: Results, tmp_path: Path) -> None:
    table = results.cate("cell_type")
    parts = pd.concat(results.cate_parts("cell_type"))
    assert list(parts["condition"].unique()) == list(results.design.conditions[1:])
    ordered = parts.sort_values("population", kind="stable").reset_index(drop=True)
    pd.testing.assert_frame_equal(ordered, table.drop(columns="p_adjusted_all"))
    for suffix, read in ((".parquet", pd.read_parquet), (".csv", pd.read_csv)):
        written = write_cate(results, tmp_path / f"parts{suffix}", condition=None, by="cell_type")
        assert written.rows == len(table)
        again = read(tmp_path / f"parts{suffix}").sort_values("population", kind="stable").reset_index(drop=True)
        assert list(again) == list(table)
        np.testing.assert_allclose(again["mean_ite"], table["mean_ite"])
        np.testing.assert_array_equal(again["p_adjusted_all"], table["p_adjusted_all"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["parts.csv", "parts.parquet"]


def test_pieces_compared_grow_with_conditions_and_not_with_their_square(
    results: Results, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: Counter[str] = Counter()
    searched = cate_table.MatchedNeighbours.__call__

    def counted(self: cate_table.MatchedNeighbours, *rows: np.ndarray) -> np.ndarray:
        calls["pairs"] += 1
        return searched(self, *rows)

    monkeypatch.setattr(cate_table.MatchedNeighbours, "__call__", counted)
    next(results.cate_parts())
    one = calls.total()
    list(results.cate_parts())
    assert one == 16  # two donors of a condition and of the control, with each other
    assert calls.total() - one == one * (CONDITIONS - 1)


@pytest.mark.slow
def test_memory_of_the_table_does_not_grow_with_conditions(results: Results) -> None:
    list(results.cate_parts())  # what is made once is made

    def peak(conditions: int) -> int:
        return peak_bytes(lambda: deque(itertools.islice(results.cate_parts(), conditions), maxlen=0))

    assert peak(CONDITIONS) < 1.3 * peak(3)


def test_any_condition_of_a_control_cell_is_searched_on_demand_as_match_would(results: Results, run: Path) -> None:
    name = results.design.conditions[5]
    cells = results.obs.index[results.obs["condition"] == "control"][:40]
    asked = results.effect(name, cells=list(cells))
    assert np.isfinite(asked.X).all()
    assert nd.add_matches(run, edges=name) == 2 * (len(results.design.groups) - 2)
    kept = nd.open_results(run).effect(name, cells=list(cells))
    np.testing.assert_array_equal(asked.X, kept.X)


def test_obsm_has_no_array_of_cells_by_groups_in_a_large_screen() -> None:
    assert keeps_matches(40_000, 200, 800)  # small
    assert not keeps_matches(400_400, 2002, 8004)  # 6 GB of nothing
    assert keeps_matches(1_000_000, 80, 3200)  # nested donors: every second pair is matched
    assert SPARSE_LIMIT < 400_400 * 2002 < MATCH_LIMIT


def test_all_edges_of_a_screen_are_refused_and_those_of_a_condition_named() -> None:
    groups = int(MOST_STORED_EDGES**0.5) + 1
    design = design_of([1] * groups)
    with pytest.raises(QueryError, match=r"edges 'all' are .* pairs .*`match DIR --edges NAME` adds those of one"):
        design.refuse_all_edges()


def test_the_strongest_genes_are_those_of_a_condition_alone_with_what_it_adds() -> None:
    shared = np.zeros((4, 8))
    shared[:, 0], shared[2, 5] = -2.0, 1.0  # all lower the first gene, as where the control is off by so much
    named = strongest(pd.DataFrame(shared, columns=[f"G{i}" for i in range(8)]), {"G5": "ISG15"})
    assert named[2].startswith("ISG15 +0.75, ")
    assert "G0 -" not in named[2]


def test_the_spread_of_a_population_of_one_cell_is_not_taken_for_none() -> None:
    spreads = ([0.5, 1.0], [np.nan, np.nan], [0.7, 1.0])
    parts = [
        pd.DataFrame({"cells": cells, "mean_ite": [1.0, 2.0], "sd_ite": spread})
        for cells, spread in zip((4, 1, 2), spreads, strict=True)
    ]
    mean, noise = pooled(parts)
    np.testing.assert_allclose(mean, [1.0, 2.0])
    usual = (0.25 + 0.49) / 2
    np.testing.assert_allclose(noise, [(4 * 0.25 + usual + 2 * 0.49) / 49, 7 / 49])


def test_a_screen_of_few_cells_of_each_type_is_looked_at_as_a_whole(results: Results) -> None:
    cells = results.packed_obs
    assert likely_populations(cells, results.design) == "cell_type"
    assert likely_populations(cells.iloc[::10], results.design) is None


def test_a_figure_of_a_thousand_conditions_names_some() -> None:
    rng = np.random.default_rng(0)
    names = pd.Index([f"KO {i}" for i in range(1000)])
    shared = 5 * rng.normal(size=30)  # by the control's noise: it would be all that is seen
    effects = pd.DataFrame(rng.normal(size=(1000, 30)) + shared, index=names, columns=[f"G{i}" for i in range(30)])
    made = Screen(pd.DataFrame(index=names), effects, tested=False, detailed=pd.DataFrame())

    class Told:
        var, control, uns = pd.DataFrame(index=effects.columns), "control", {"normalise": "counts"}

    axes = nd.pl.conditions(Told(), screen=made)  # type: ignore[arg-type]
    assert 50 < len(axes.get_yticks()) <= 100
    assert "every" in axes.get_ylabel()
    assert np.abs(axes.images[0].get_array().mean(axis=0)).max() < 1e-6
    plt.close(axes.figure)


@pytest.mark.slow
def test_the_report_of_a_screen_has_one_map_one_table_and_few_sections(results: Results, tmp_path: Path) -> None:
    nd.report(results, tmp_path / "r.html", by="cell_type", cells=300)
    html = (tmp_path / "r.html").read_text()
    assert f"{CONDITIONS - 1} conditions against control" in html
    assert html.count("All conditions.") == 1
    rows = re.search(r'<table class="sortable" id="conditions">.*?</table>', html, re.DOTALL)
    assert rows is not None
    assert rows[0].count("<tr>") == CONDITIONS
    assert 'id="groups"' not in html
    assert html.count('id="genes-') <= 12
    assert html.count("<figure>") < 25
