"""Figures show the values of the results, and do not change matplotlib's settings."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.text import Text

import ndreamer_dist as nd
from ndreamer_dist import keys
from ndreamer_dist.errors import QueryError, StoreError
from ndreamer_dist.figures import plots, style
from ndreamer_dist.report.tables import decomposition_table
from ndreamer_dist.stats.results import Results
from tests.report.conftest import GENE, KINDS, TREATED


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def table(results: Results) -> pd.DataFrame:
    return results.cate("cell_type")


def dots(ax: Axes, number: int = 0) -> np.ndarray:
    return np.asarray(ax.collections[number].get_offsets())


def inked(ax: Axes) -> float:
    """Return how much the drawn figure's pixels differ."""
    figure = ax.get_figure(root=True)
    figure.canvas.draw()
    return float(np.asarray(figure.canvas.buffer_rgba())[..., :3].std())


def test_the_package_is_imported_without_matplotlib() -> None:
    code = "import sys, ndreamer_dist as nd; assert 'matplotlib' not in sys.modules; assert nd.pl.volcano and callable(nd.report)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_sample_is_of_all_groups_in_proportion(results: Results) -> None:
    design = results.design
    rows = plots.sampled_rows(design, 400)
    counts = np.bincount(design.group_of(rows))
    assert counts.tolist() == [-(-group.cells * 400 // design.n_cells) for group in design.groups]
    treated = plots.sampled_rows(design, 10**9, treated=True)
    assert len(treated) == sum(group.cells for group in design.groups if group.condition)


def test_an_embedding_draws_every_sampled_cell_in_every_panel(results: Results) -> None:
    axes = nd.pl.embedding(results, [keys.OBS_CONDITION, "cell_type", "age", GENE], cells=300)
    assert [ax.get_title(loc="left") for ax in axes] == ["condition", "cell_type", "age", GENE]
    sampled = plots.sampled_rows(results.design, 300)
    assert all(dots(ax).shape == (len(sampled), 2) for ax in axes)
    assert [text.get_text() for text in axes[1].get_legend().get_texts()] == sorted(set(results.obs["cell_type"]))
    assert inked(axes[0]) > 5
    assert axes[0].collections[0].get_rasterized()


def test_the_same_seed_gives_the_same_umap(results: Results) -> None:
    points = results.embedding(pca=True).to_numpy()[:200]
    assert np.array_equal(plots.umap(points, 1), plots.umap(points, 1))
    assert not np.array_equal(plots.umap(points, 1), plots.umap(points, 2))


def test_effects_are_laid_out_for_cells_that_have_them(results: Results) -> None:
    (ax,) = nd.pl.ite_embedding(results, "cell_type")
    assert len(dots(ax)) == (results.obs["condition"] == TREATED).sum()
    assert inked(ax) > 5


def test_violins_stand_at_the_mean_effects(results: Results) -> None:
    genes = [GENE, str(results.var_names[3])]
    axes = nd.pl.ite_distribution(results, genes, "cell_type")
    for place, ax in enumerate(axes):
        means = [line.get_xdata()[0] for line in ax.lines if line.get_marker() == "o"]
        part = results.ite(genes=genes)
        kinds = sorted(set(part.obs["cell_type"]))
        expected = [part.X[(part.obs["cell_type"] == kind).to_numpy(), place].mean() for kind in kinds]
        np.testing.assert_allclose(means, expected, rtol=1e-5)
    assert axes[0].get_yticklabels()[0].get_text() == style.shortened(sorted(KINDS.values())[0])


def test_a_volcano_holds_every_tested_gene_and_colours_those_called(results: Results, table: pd.DataFrame) -> None:
    part = table[(table["population"] == "plain") & table["p"].notna()]
    ax = nd.pl.volcano(results, "plain", "cell_type", table=table)
    drawn = pd.Series(dots(ax)[:, 1], index=dots(ax)[:, 0]).sort_index()
    expected = pd.Series(-np.log10(part["p"].to_numpy()), index=part["effect"]).sort_index()
    np.testing.assert_allclose(drawn.index, expected.index, atol=1e-9)
    np.testing.assert_allclose(np.sort(drawn), np.sort(expected), atol=1e-9)
    grey = mpl.colors.to_rgba(style.QUIET)
    coloured = [tuple(shade) != grey for shade in ax.collections[0].get_facecolors()]
    assert sum(coloured) == (part["p_adjusted"] < plots.SIGNIFICANT).sum()
    with pytest.raises(QueryError, match="there is no population 'unheard of'"):
        nd.pl.volcano(results, "unheard of", "cell_type", table=table)


def test_the_decomposition_holds_every_gene_by_its_reading(results: Results, table: pd.DataFrame) -> None:
    part = table[(table["population"] == "plain") & table["within_state"].notna()]
    ax = nd.pl.decomposition(results, "plain", "cell_type", table=table)
    drawn = np.concatenate([np.asarray(points.get_offsets()) for points in ax.collections])
    expected = part[["total", "within_state"]].to_numpy()
    order = [np.lexsort(points.T) for points in (drawn, expected)]
    np.testing.assert_allclose(drawn[order[0]], expected[order[1]], atol=1e-9)
    words = {
        label: int(number)
        for text in ax.get_legend().get_texts()
        for label, number in [text.get_text()[:-1].rsplit(" (", 1)]
    }
    counts = part["reading"].value_counts()
    assert words == {plots.READINGS[word][0]: counts[word] for word in counts.index}
    with pytest.raises(QueryError, match="no effects within states"):
        nd.pl.decomposition(results, "unheard of", "cell_type", table=table)


def test_an_ma_plot_holds_every_expressed_gene(results: Results, table: pd.DataFrame) -> None:
    part = table[(table["population"] == "plain") & (table["mean_counts"] > 0)]
    ax = nd.pl.ma(results, "plain", "cell_type", table=table)
    drawn = np.asarray(ax.collections[0].get_offsets())
    np.testing.assert_allclose(np.sort(drawn[:, 0]), np.sort(np.log10(part["mean_counts"])))
    assert np.abs(drawn[:, 1]).max() <= 1.1 * plots.MOST_DOUBLINGS
    with pytest.raises(QueryError, match="expresses no gene"):
        nd.pl.ma(results, "unheard of", "cell_type", table=table)


def test_a_heat_map_holds_the_effects(results: Results, table: pd.DataFrame) -> None:
    ax = nd.pl.heatmap(results, "cell_type", table=table, most=12)
    image = np.asarray(ax.images[0].get_array())
    genes = [label.get_text() for label in ax.get_xticklabels()]
    assert len(genes) == 12
    for row, kind in enumerate(sorted(KINDS.values())):
        part = table[table["population"] == kind].set_index("gene")["effect"]
        named = {style.shortened(str(name), 16): value for name, value in part.items()}
        np.testing.assert_allclose(image[row], [named[gene] for gene in genes], equal_nan=True)
    with pytest.raises(
        QueryError, match=f"there is no gene 'unheard of' among the {table['gene'].nunique()} of the table"
    ):
        nd.pl.heatmap(results, "cell_type", table=table, genes=["unheard of"])


def test_the_overlap_is_that_of_the_cells_with_an_effect(results: Results) -> None:
    ax = nd.pl.overlap(results, "cell_type")
    cells = results.obs[results.obs["condition"] == TREATED]
    medians = cells.groupby("cell_type")[keys.OBS_MATCH_DISTANCE].median()
    drawn = [line.get_xdata()[0] for line in ax.lines if line.get_color() == style.INK and len(line.get_xdata()) == 2]
    np.testing.assert_allclose(drawn[: len(medians)], medians.sort_index())
    shares = cells.groupby("cell_type")[keys.OBS_OVERLAP].mean().sort_index()
    assert [text.get_text() for text in ax.texts] == [f"{100 * share:.0f} % near" for share in shares]
    by_itself = nd.pl.overlap(results, keys.OBS_OVERLAP)
    assert [text.get_text() for text in by_itself.texts] == ["0 % near", "100 % near"]


def test_the_calibration_shows_the_shares_of_the_null(results: Results) -> None:
    null = results.null("cell_type", labellings=4)
    ax = nd.pl.null_calibration(results, table=null)
    drawn = {line.get_label(): line for line in ax.lines}
    for test, label in plots.TESTS.items():
        sums = null[null["test"] == test].groupby("level")[["below", "tests"]].sum()
        share = sums["below"] / sums["tests"]
        np.testing.assert_array_equal(drawn[label].get_xdata(), share.index)
        np.testing.assert_allclose(drawn[label].get_ydata(), share.where(share > 0))
    assert len({line.get_color() for line in drawn.values()}) == 1 + len(plots.TESTS)
    assert np.ptp(drawn["calibrated"].get_xdata() - drawn["calibrated"].get_ydata()) == 0


def test_the_calibration_leaves_out_a_test_that_the_donors_did_not_allow(results: Results) -> None:
    null = results.null("cell_type", labellings=4)
    ax = nd.pl.null_calibration(results, table=null[~null["test"].isin(["within_state", "state_shift"])])
    drawn = {line.get_label() for line in ax.lines}
    assert {"donor-level test", "pseudobulk", "sign test over cells"} <= drawn
    assert not {"within states", "change of state"} & drawn


def test_top_genes_are_taken_from_every_population_by_turns_those_called_first() -> None:
    table = pd.DataFrame(
        {
            "population": list("aaabbb"), "gene": list("uvwxyz"), "p": [0.01, 0.02, 0.03, 0.5, 0.4, 0.3],
            "effect": 1.0, "mean_ite": 0.0, "p_adjusted": 1.0,
        }
    )  # fmt: skip
    assert plots.top_genes(table, 4) == ["u", "z", "v", "y"]
    assert plots.top_genes(table.assign(p_adjusted=[0.01, 0.04, 1, 1, 1, 1]), 6) == ["u", "v"]
    assert plots.top_genes(table.assign(p_adjusted=[0.01, 1, 1, 1, 1, 1]), 6) == ["u", "z"]
    assert plots.top_genes(table.assign(p=np.nan, mean_ite=[1, -3, 2, 0, 1, 9]), 2) == ["z", "v"]


def test_losses_are_those_of_the_log(results: Results, finished: Path) -> None:
    epochs = pd.read_csv(finished / keys.EPOCHS)
    for given in (results, finished):
        axes = nd.pl.losses(given)
        assert len(axes) == len(plots.LOSSES)
        for name, ax in zip(plots.LOSSES, axes, strict=True):
            np.testing.assert_array_equal(ax.lines[1].get_ydata(), epochs[name])
    with pytest.raises(StoreError, match="no logs/metrics"):
        nd.pl.losses(finished / keys.PACKED)


def test_an_axis_given_is_drawn_on_and_one_for_several_panels_refused(results: Results) -> None:
    _, ax = plt.subplots()
    assert nd.pl.losses(results, ax=ax) == [ax]
    with pytest.raises(ValueError, match="2 panels"):
        nd.pl.ite_distribution(results, list(results.var_names[:2]), ax=ax)


@pytest.mark.parametrize(("suffix", "start"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_a_figure_is_saved_as_its_suffix_says_and_the_style_outside_stays(
    results: Results, tmp_path: Path, suffix: str, start: bytes
) -> None:
    before = dict(mpl.rcParams)
    nd.pl.losses(results, save=tmp_path / f"losses.{suffix}")
    assert (tmp_path / f"losses.{suffix}").read_bytes().startswith(start)
    assert dict(mpl.rcParams) == before


def test_names_that_would_be_formulas_are_drawn_as_they_are(results: Results) -> None:
    (ax,) = nd.pl.embedding(results, "cell_type", cells=100)
    assert "$\\frac$" in " ".join(text.get_text() for text in ax.get_legend().get_texts())
    assert inked(ax) > 5


def test_many_categories_keep_to_their_colours() -> None:
    assert style.colours(["a", "b", style.UNKNOWN]) == [*style.PALETTE[:2], style.QUIET]
    for number in (8, 20, 28, 102):
        assert len(set(style.colours([str(n) for n in range(number)]))) == number
    named = style.categories(pd.Series(["type_10", "type_2", None, "type_1"]))
    assert list(named.categories) == ["type_1", "type_2", "type_10", style.UNKNOWN]


# --- what a first week showed ------------------------------------------------------------------------------------------


def test_dir_shows_the_figures_alone() -> None:
    assert dir(nd.pl) == sorted(plots.__all__)
    drawing = {
        name for name, thing in vars(plots).items() if hasattr(thing, "__wrapped__") and not name.startswith("_")
    }
    assert {name for name in drawing if getattr(plots, name).__module__ == plots.__name__} == set(plots.__all__)
    assert all(callable(getattr(nd.pl, name)) for name in dir(nd.pl))


def test_cells_that_express_a_gene_are_drawn_on_top(results: Results) -> None:
    (ax,) = plots.embedding(results, results.var_names[0], cells=300)
    values = np.asarray(ax.collections[0].get_array())
    assert (np.diff(values) >= 0).all()
    assert values[-1] > values[0]


def test_colours_size_and_legend_are_the_callers(results: Results) -> None:
    palette = {"plain": "#000000"}
    (ax,) = plots.embedding(results, "cell_type", cells=300, palette=palette, size=3.0, legend=False)
    assert ax.get_legend() is None
    assert set(ax.collections[0].get_sizes()) == {3.0}
    black = (ax.collections[0].get_facecolors()[:, :3] == 0).all(axis=1).sum()
    rows = plots.sampled_rows(results.design, 300)
    assert black == (results.packed_obs["cell_type"].iloc[rows] == "plain").sum()
    assert len(set(style.colours(["a", "b", "c"], "viridis"))) == 3


def test_misspelt_colours_and_populations_are_met_with_what_was_meant(results: Results, table: pd.DataFrame) -> None:
    with pytest.raises(QueryError, match="Did you mean 'cell_type'"):
        plots.embedding(results, "cel_type", cells=100)
    with pytest.raises(QueryError, match="Did you mean 'plain'"):
        plots.volcano(results, "plian", "cell_type", table=table)


def test_several_conditions_are_one_heat_map_on_one_scale(without_donors: Results) -> None:
    told = without_donors.cate(donor_key=keys.OBS_CONDITION)
    ax = plots.heatmap(without_donors, condition=["stim", "sick"], table=told)
    assert [text.get_text() for text in ax.get_yticklabels()] == ["sick", "stim"]
    assert len(ax.images) == 1
    assert "2 conditions" in ax.get_title(loc="left")


def test_rows_with_too_few_donors_are_grey(results: Results, table: pd.DataFrame) -> None:
    weak = table["population"] == "plain"
    changed = table.assign(control_donors=table["control_donors"].where(~weak, 0))
    ax = plots.heatmap(results, "cell_type", table=changed)
    shades = {text.get_text(): text.get_color() for text in ax.get_yticklabels()}
    assert shades["plain"] == "#8A9099"
    assert "#8A9099" not in {shade for name, shade in shades.items() if name != "plain"}


def test_without_a_test_the_effects_are_drawn_a_dot_per_gene(without_donors: Results) -> None:
    ax = plots.effect_sizes(
        without_donors, "all cells", condition="sick", table=without_donors.cate(donor_key=keys.OBS_CONDITION)
    )
    assert len(dots(ax)) == len(without_donors.var_names)
    assert "not tested" in ax.get_title(loc="left")


def test_ensembl_names_are_shown_as_symbols() -> None:
    names = [f"ENSG{number:011d}" for number in range(4)]
    var = pd.DataFrame({"gene_symbols": ["ISG15", "MX1", "MX1", None]}, index=names)
    assert style.gene_labels(var) == {
        names[0]: "ISG15", names[1]: f"MX1 ({names[1]})", names[2]: f"MX1 ({names[2]})"
    }  # fmt: skip
    assert style.gene_labels(var.set_axis(["a", "b", "c", "d"])) == {}
    assert style.gene_labels(var.drop(columns="gene_symbols")) == {}


def test_symbols_name_the_genes_of_every_figure_and_table_of_a_population(
    results: Results, table: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = table[(table["population"] == "plain") & (table["mean_counts"] > 0) & table["within_state"].notna()].head(30)
    names = [f"ENSG{number:011d}" for number in range(len(part))]
    symbols = [f"SYM{number}" for number in range(len(part))]
    part = part.assign(gene=names, p_adjusted=0.01, reading="both")
    monkeypatch.setattr(Results, "var", pd.DataFrame({"gene_symbols": symbols}, index=names))
    for figure in (plots.volcano, plots.effect_sizes, plots.decomposition, plots.ma):
        drawn = [text.get_text() for text in figure(results, "plain", table=part, condition=TREATED).texts]
        assert any(text in symbols for text in drawn), figure.__name__
        assert not any(text.startswith("ENSG") for text in drawn), figure.__name__
    table = decomposition_table(part, 5, style.gene_labels(results.var))
    assert table.caption.endswith("genes; those with a significant part come first")
    rows = table.rows
    assert {row[0].text for row in rows} <= set(symbols)


def test_names_on_a_umap_never_cover_each_other(results: Results) -> None:
    labels = pd.Series([f"kind of cells {number % 12}" for number in range(len(results.obs))], index=results.obs.index)
    view, name = results.labelled(labels.rename("many"))
    (ax,) = plots.embedding(view, name, cells=300)
    ax.get_figure(root=True).canvas.draw()
    boxes = [text.get_window_extent() for text in ax.texts]
    assert 0 < len(boxes) < 12  # twelve kinds, all over the place
    assert not any(one.overlaps(other) for place, one in enumerate(boxes) for other in boxes[:place])
    assert len(ax.get_legend().get_texts()) == 12


@pytest.mark.parametrize(
    "cloud",
    [
        pytest.param(lambda x: x.normal(size=(60, 2)), id="a_cloud"),
        pytest.param(lambda x: np.column_stack([x.normal(size=60), np.full(60, 1.0)]), id="a_row_at_the_smallest_p"),
        pytest.param(lambda x: x.normal(size=(60, 2)) * 0.02 + np.eye(2)[0], id="crowded"),
    ],
)
def test_names_of_points_cover_nothing_and_belong_to_one_point(
    cloud: Callable[[np.random.Generator], np.ndarray],
) -> None:
    points = cloud(np.random.default_rng(1))
    _, ax = plt.subplots(figsize=(5.6, 4.6))
    ax.scatter(*points.T, s=22)
    ax.set(xlim=(-3, 3), ylim=(-3, 3))
    floor = ax.text(2.9, 1, "smallest p possible", ha="right", va="bottom")
    style.label_points(ax, *points.T, [f"GENE{number:05d}" for number in range(60)], 14)
    figure = ax.get_figure(root=True)
    figure.canvas.draw()
    names = [text for text in ax.texts if text is not floor]
    boxes = [text.get_window_extent() if text is floor else Text.get_window_extent(text) for text in ax.texts]
    assert 4 <= len(names) <= 14
    assert not any(one.overlaps(other) for place, one in enumerate(boxes) for other in boxes[:place])
    pixels = ax.transData.transform(points)
    for text in names:
        box = Text.get_window_extent(text)
        away = np.hypot(*(pixels - np.clip(pixels, box.min, box.max)).T)
        assert away.min() > 0
        if text.arrow_patch is None:
            own = away[int(text.get_text()[4:])]
            assert own <= away.min() + 0.5


def test_of_many_rows_those_with_donors_and_cells_on_both_sides_are_drawn_first() -> None:
    rows = pd.DataFrame({"population": "all", "condition": [f"drug {number:02d}" for number in range(80)], "gene": "G"})
    sure = np.arange(80) % 8 == 0
    rows = rows.assign(
        p=np.nan, p_adjusted=np.nan, effect=np.nan, mean_ite=np.where(sure, 0.1, 5.0), treated_donors=3,
        control_donors=3, cells=np.where(sure, 50, 2), effective_control_cells=50.0,
    )  # fmt: skip
    kept = plots._in_rows(rows)
    assert kept["row"].nunique() == plots.MOST_ROWS
    assert set(rows["condition"][sure]) <= set(kept["row"])


def test_responses_are_drawn_beside_those_of_control_cells(results: Results) -> None:
    table = results.response("cell_type")
    axes = nd.pl.response(results, table=table)
    treated = table[~table["placebo"]]
    kinds = sorted(treated["population"].unique())
    labels = [label.get_text() for label in axes.get_yticklabels()]
    for kind, label in zip(kinds, labels, strict=True):
        part = treated[treated["population"] == kind]
        assert label == f"{kind} ({part['within_placebo'].mean():.0%} within)"
    dots = [line.get_xydata()[0] for line in axes.get_lines() if line.get_marker() == "o"]
    means = [treated.loc[treated["population"] == kind, "response"].mean() for kind in kinds]
    assert np.allclose(sorted(x for x, _ in dots[len(kinds) :]), sorted(means))
    low, high = axes.get_ylim()
    assert low > high  # the first population is on top


def test_a_notebook_that_shows_figures_from_the_first_on_shows_all() -> None:
    before = mpl.is_interactive()
    mpl.interactive(False)
    try:
        style.styled(lambda: mpl.interactive(True))()  # as a notebook's back end does when it is first drawn by
        assert mpl.is_interactive()
    finally:
        mpl.interactive(before)
