"""Figures of a finished run, with the conventions of scanpy: `nd.pl.embedding(results, color="cell_type")`.

Every function takes `Results` first, draws on `ax` or on a new figure, saves it to the path `save` (the suffix is the
format), shows it with `show=True`, and returns the axes. Figures of cells draw a sample. Rows of a group are stored in
random order, so the first rows of each group are a random sample that lies in few chunks.
"""

from __future__ import annotations

import io
import math
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import anndata
import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.transforms import Bbox
from scipy.cluster import hierarchy

from ndreamer_dist import keys
from ndreamer_dist.cohort.design import Design
from ndreamer_dist.cohort.graph import neighbour_graph, scanpy_pca
from ndreamer_dist.comparison.advice import MEASURES
from ndreamer_dist.comparison.screen import Screen, most_different, own_effects
from ndreamer_dist.comparison.screen import screen as screen_of
from ndreamer_dist.comparison.table import Comparison
from ndreamer_dist.errors import QueryError, StoreError, listing, suggest
from ndreamer_dist.figures.style import (
    DOWN,
    INK,
    MOST_NAMED,
    PALETTE,
    QUIET,
    UP,
    Palette,
    Save,
    categories,
    colours,
    finish,
    gene_labels,
    halo,
    label_points,
    legend_outside,
    panels,
    shortened,
    styled,
)
from ndreamer_dist.results.reader import PopulationLabels
from ndreamer_dist.stats.cate_table import column
from ndreamer_dist.stats.donor_tests import LEAST_DONORS
from ndreamer_dist.stats.results import MIN_CELLS, Results
from ndreamer_dist.storage.files import Storage, open_storage

__all__ = [
    "conditions", "decomposition", "effect_sizes", "embedding", "heatmap", "ite_distribution", "ite_embedding", "losses", "ma",
    "null_calibration", "overlap", "response", "spaces", "volcano",
]  # fmt: skip

CELLS = 10_000
"""Default number of cells in a UMAP."""
ITE_VALUES = 2**24
"""Most values (cells times genes) of effects in a UMAP."""
ITE_COMPONENTS = 10
"""Principal components of effects in a UMAP; later ones are noise of single cells."""
VIOLIN_CELLS = 50_000
"""Default number of cells in violin plots."""
MOST_DOUBLINGS = 8.0
"""Largest |log2 fold change| that sets axis limits; larger ones, e.g. of unexpressed genes, are drawn at the edge."""
SIGNIFICANT, SMALLEST = 0.05, 1e-300
"""Adjusted p below which a gene is significant, and the smallest p that is drawn."""
FEWEST_ON_PANEL = 9
"""Categories from which on names are also drawn on a UMAP, because so many colours are hard to distinguish."""
FEWEST_LAID_OUT = 16
"""Cells below which the first two coordinates are drawn instead of a UMAP."""


def __dir__() -> list[str]:
    """Return the names of the figures alone, for completion of `nd.pl.`."""
    return sorted(__all__)


# --- cells -----------------------------------------------------------------------------------------------------------


@styled
def embedding(
    results: Results,
    color: str | Sequence[str] | None = None,
    *,
    cells: int = CELLS,
    seed: int = 0,
    palette: Palette = None,
    size: float | None = None,
    legend: bool = True,
    ax: Axes | None = None,
    show: bool = False,
    save: Save = None,
) -> list[Axes]:
    """Draw a UMAP of the matching space: what cells are, regardless of condition and batch.

    Conditions and batches should mix, and cell types should separate.

    Parameters
    ----------
    color
        Columns of `obs` or modelled genes, one panel each; by default the condition, and the batch if there is one.
    cells
        Approximate number of cells to draw; the sample takes the same share of every group.
    seed
        Seed of the UMAP.
    palette
        Colours of categories: a mapping from name to colour, a list, or the name of a colour map; for numbers, the name
        of a colour map.
    size
        Area of a dot in square points; by default it depends on the number of cells.
    legend
        Whether to draw a legend of the categories.

    Raises
    ------
    QueryError
        There is neither a column nor a gene of this name.
    """
    rows = sampled_rows(results.design, cells)
    table = results.packed_obs.iloc[rows]
    points = umap(results.embedding(list(table.index), pca=True).to_numpy(), seed)
    shading = _shading(results, table, color or _grouping(results))
    return finish(_scatter(points, shading, "UMAP", ax, Dots(palette, size, legend)), show=show, save=save)


@styled
def ite_embedding(
    results: Results,
    color: str | Sequence[str] | None = None,
    *,
    cells: int = CELLS,
    seed: int = 0,
    palette: Palette = None,
    size: float | None = None,
    legend: bool = True,
    ax: Axes | None = None,
    show: bool = False,
    save: Save = None,
) -> list[Axes]:
    """Draw a UMAP of the individual treatment effects of treated cells: similar responses are near each other.

    The UMAP uses the first ten principal components of the effects on all modelled genes. The effect on a single cell
    is mostly noise, so only compact groups are types of response.

    Parameters
    ----------
    cells
        Approximate number of cells to draw; fewer if there are many genes.
    color, seed, palette, size, legend
        As in `embedding`.
    """
    rows = sampled_rows(results.design, min(cells, ITE_VALUES // len(results.var_names)), treated=True)
    table = results.packed_obs.iloc[rows]
    effects = results.ite(list(table.index)).X
    points = umap(scanpy_pca(effects, ITE_COMPONENTS, seed)[0], seed)
    shading = _shading(results, table, color or _grouping(results))
    return finish(_scatter(points, shading, "UMAP of effects", ax, Dots(palette, size, legend)), show=show, save=save)


@styled
def ite_distribution(
    results: Results,
    genes: str | Sequence[str],
    by: PopulationLabels = None,
    *,
    condition: str | None = None,
    cells: int = VIOLIN_CELLS,
    ax: Axes | None = None,
    show: bool = False,
    save: Save = None,
) -> list[Axes]:
    """Draw the distribution of individual treatment effects: a panel per gene, a violin per population.

    The dot is the mean, the bar the interquartile range; populations of fewer than ten cells have no violin. Most of
    the spread is noise of single cells, so the violins do not show how certain the effects are.

    Parameters
    ----------
    genes
        Modelled genes.
    by
        Column of `obs` that names populations, or a Series of labels by cell; by default all cells form one population.
    condition
        The condition whose cells are drawn; by default the first one besides the control.
    cells
        Approximate number of cells in the sample.
    """
    results, by = results.labelled(by)
    genes = [genes] if isinstance(genes, str) else list(genes)
    condition = condition or results.conditions[1]
    rows = sampled_rows(results.design, cells, conditions=[results.design.condition_code(condition)])
    part = results.ite(list(results.packed_obs.index[rows]), genes)
    names = categories(column(part.obs, by) if by else pd.Series(condition, index=part.obs.index))
    kinds = list(names.categories)
    axes = panels(len(genes), ax, size=(3.6, 0.9 + 0.34 * len(kinds)))
    for place, (gene, panel) in enumerate(zip(_symbols(results, genes), axes, strict=True)):
        values = np.asarray(part.X[:, place], dtype=np.float64)
        _violins(panel, [values[names == kind] for kind in kinds], colours(kinds))
        panel.set_title(shortened(gene), style="italic")
        panel.set_yticks(range(len(kinds)), [shortened(kind) for kind in kinds] if place % 3 == 0 else [])
        panel.set_xlabel(f"effect of {shortened(condition, 20)}\n{effect_units(results)}")
    return finish(axes, show=show, save=save)


def sampled_rows(
    design: Design, number: int, *, treated: bool = False, conditions: Sequence[int] | None = None
) -> np.ndarray:
    """Return a sample of about `number` of the cohort's own cells: rows of `packed_obs`, ascending.

    The sample takes the same share of every group.

    Parameters
    ----------
    treated
        Whether to leave out the control.
    conditions
        Condition codes to draw from, instead of all.

    Raises
    ------
    QueryError
        There is no such cell: a cohort that was mapped onto a run may lack some of its conditions.
    """
    chosen = range(int(treated), len(design.conditions)) if conditions is None else conditions
    groups = [group for group in design.own_groups if group.condition in chosen]
    if not groups:
        msg = f"there is no cell of {listing([design.conditions[code] for code in chosen])}"
        raise QueryError(msg)
    share = min(1.0, number / sum(group.cells for group in groups))
    rows = [group.start + np.arange(math.ceil(share * group.cells)) for group in groups]
    return np.concatenate(rows) - design.first_row


def umap(points: np.ndarray, seed: int = 0) -> np.ndarray:
    """Return scanpy's UMAP of points, (cells, 2), on a graph of 15 neighbours, scanpy's default."""
    if len(points) < FEWEST_LAID_OUT:
        return np.pad(points, ((0, 0), (0, 2)))[:, :2]
    import scanpy as sc

    adata = anndata.AnnData(obs=pd.DataFrame(index=np.arange(len(points)).astype(str)), obsm={keys.PCA: points})
    adata.obsp["connectivities"] = neighbour_graph(points, 15)
    adata.uns["neighbors"] = {"params": {"method": "umap", "use_rep": keys.PCA}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # spectral initialisation may not converge; umap then starts at random
        sc.tl.umap(adata, random_state=seed)
    return np.asarray(adata.obsm["X_umap"])


def _grouping(results: Results) -> list[str]:
    batch = [keys.OBS_BATCH] if len(results.design.batches) > 1 else []
    return [keys.OBS_CONDITION, *batch]


def _shading(results: Results, table: pd.DataFrame, color: str | Sequence[str]) -> dict[str, pd.Series]:
    """Return the values that colour the cells, by title of the panel."""
    shading: dict[str, pd.Series] = {}
    titles = {keys.OBS_CONDITION: results.design.condition_key, keys.OBS_BATCH: " + ".join(results.design.batch_keys)}
    for name in [color] if isinstance(color, str) else color:
        if name not in table and name in results.var_names:
            values = results.expression(list(table.index), [name]).X.toarray()[:, 0]
            shading[name] = pd.Series(values, index=table.index)
        elif name in table:
            shading[titles.get(name, name)] = column(table, name)
        else:
            names = [*map(str, table.columns), *map(str, results.var_names)]
            msg = f"there is neither a column of obs nor a modelled gene {name!r}.{suggest(name, names)}"
            raise QueryError(msg)
    return shading


@dataclass(frozen=True)
class Dots:
    """Style of the dots of cells; see `embedding`."""

    palette: Palette = None
    size: float | None = None
    legend: bool = True


def _scatter(points: np.ndarray, shading: Mapping[str, pd.Series], name: str, ax: Axes | None, how: Dots) -> list[Axes]:
    axes = panels(len(shading), ax, size=(5.4, 4.1) if len(shading) == 1 else (4.0, 3.2))
    named: list[tuple[Axes, np.ndarray, pd.Categorical]] = []
    order = np.random.default_rng(len(points)).permutation(len(points))  # no category covers the others
    dots: dict[str, Any] = {
        "s": how.size or float(np.clip(70_000 / len(points), 1.5, 26)),
        "linewidths": 0,
        "rasterized": True,
        "alpha": 0.85,
    }
    for panel, (title, values) in zip(axes, shading.items(), strict=True):
        numbers = pd.api.types.is_numeric_dtype(values) and not pd.api.types.is_bool_dtype(values)
        # High values are drawn last, so that the few cells that express a gene are visible.
        place = np.argsort(values.to_numpy(dtype=np.float64, na_value=-np.inf), kind="stable") if numbers else order
        x, y, shown = points[place, 0], points[place, 1], values.iloc[place]
        if numbers:
            scale = how.palette if isinstance(how.palette, str) else "viridis"
            drawn = panel.scatter(x, y, c=shown.to_numpy(dtype=np.float64, na_value=np.nan), cmap=scale, **dots)
            figure = panel.get_figure()
            assert figure is not None  # noqa: S101 - `panels` made it
            figure.colorbar(drawn, ax=panel, shrink=0.6, aspect=18, pad=0.02).outline.set_visible(b=False)
        else:
            kinds = categories(shown)
            shades = colours(list(kinds.categories), how.palette)
            panel.scatter(x, y, c=np.array(shades)[kinds.codes], **dots)
            if how.legend:
                named.append((panel, np.column_stack([x, y]), kinds))
                _name_kinds(panel, kinds, shades)
        panel.set_title(shortened(title, 40))
        panel.set(xticks=[], yticks=[])
        panel.set_xlabel(f"{name} 1", loc="left", fontsize=8.5)
        panel.set_ylabel(f"{name} 2", loc="bottom", fontsize=8.5)
        panel.spines[["left", "bottom"]].set_visible(False)
        panel.set_aspect("equal", adjustable="datalim")
    for panel, places, kinds in named:
        _name_on_panel(panel, places, kinds)
    return axes


def _name_kinds(panel: Axes, kinds: pd.Categorical, shades: Sequence[str]) -> None:
    """Draw a legend beside the panel, or the number of categories if they are too many."""
    levels = list(kinds.categories)
    if len(levels) > MOST_NAMED:
        panel.annotate(f"{len(levels)} values, no legend", (1, 0), xycoords="axes fraction", ha="right", fontsize=8.5)
        return
    legend_outside(panel, levels, shades)


def _name_on_panel(panel: Axes, points: np.ndarray, kinds: pd.Categorical) -> None:
    """Draw the names of many categories at their medians on the panel, larger categories first.

    A name that would overlap another is left out.
    """
    levels, sizes = list(kinds.categories), np.bincount(kinds.codes, minlength=len(kinds.categories))
    figure = panel.get_figure(root=True)
    if figure is None or not FEWEST_ON_PANEL <= len(levels) <= MOST_NAMED:
        return
    figure.canvas.draw()  # fixes the layout
    placed: list[Bbox] = []
    for code in np.argsort(-sizes, kind="stable"):
        middle = np.median(points[kinds.codes == code], axis=0)
        text = panel.text(
            middle[0], middle[1], shortened(levels[code], 18), ha="center", fontsize=8, path_effects=halo()
        )
        text.set_in_layout(False)
        box = text.get_window_extent()
        if any(box.overlaps(other) for other in placed):
            text.remove()
        else:
            placed.append(box)


def _violins(
    panel: Axes, values: Sequence[np.ndarray], shades: Sequence[str], side: Literal["both", "low", "high"] = "both"
) -> None:
    """Draw a violin, or half of one, per row, the first on top; a dot is the mean, a bar the interquartile range."""
    panel.axvline(0, color="#8A9099", linewidth=0.8, zorder=0)
    beside = {"both": 0.0, "low": -0.12, "high": 0.12}[side]
    for place, (part, shade) in enumerate(zip(values, shades, strict=True)):
        if not len(part):
            continue
        if len(part) >= MIN_CELLS:  # with fewer cells, a density would mislead
            for body in panel.violinplot([part], [place], orientation="horizontal", widths=0.85, showextrema=False, side=side)["bodies"]:  # type: ignore[attr-defined]  # fmt: skip
                body.set(facecolor=shade, edgecolor="none", alpha=0.75)
        panel.hlines(place + beside, *np.quantile(part, [0.25, 0.75]), color=INK, linewidth=3)
        panel.plot(part.mean(), place + beside, "o", markersize=5, markerfacecolor="white", markeredgecolor=INK)
    panel.set_ylim(len(values) - 0.4, -0.6)
    panel.tick_params(axis="y", length=0)
    panel.spines["left"].set_visible(False)


@styled
def response(
    results: Results,
    by: PopulationLabels = None,
    *,
    condition: str | None = None,
    table: pd.DataFrame | None = None,
    ax: Axes | None = None,
    show: bool = False,
    save: Save = None,
) -> Axes:
    """Draw the distributions of the response scores of treated cells and of the placebo, per population.

    Treated cells are the upper half-violins, in colour; the placebo, control cells, the lower ones, in grey. The labels
    give the share of treated cells that are within the placebo.

    Parameters
    ----------
    by, condition
        As in `results.response`.
    table
        The table of `results.response`, if it was computed before.

    Raises
    ------
    QueryError
        No treated cell of the condition has a response.
    """
    condition = condition or results.conditions[1]
    table = results.response(by, condition=condition) if table is None else table
    part = table[(table["condition"] == condition) & table["response"].notna()]
    part = part.assign(population=part["population"].astype(str))
    treated = part[~part["placebo"]]
    if treated.empty:
        msg = f"no cell of condition {condition!r} has a response"
        raise QueryError(msg)
    kinds = list(categories(treated["population"]).categories)
    (ax,) = panels(1, ax, size=(5.2, 1.2 + 0.5 * len(kinds)))
    control, own = (
        [cells.loc[cells["population"] == kind, "response"].to_numpy() for kind in kinds]
        for cells in (part[part["placebo"]], treated)
    )
    _violins(ax, control, ["#B4B9C0"] * len(kinds), "high")
    _violins(ax, own, colours(kinds), "low")
    shares = treated.groupby("population")["within_placebo"].mean()
    ax.set_yticks(range(len(kinds)), [f"{shortened(kind)} ({shares[kind]:.0%} within)" for kind in kinds])
    ax.set_xlabel(f"response to {shortened(condition, 24)}, in SD of the placebo (grey: control cells)")
    return finish(ax, show=show, save=save)


# --- effects ---------------------------------------------------------------------------------------------------------


@styled
def volcano(
    results: Results,
    population: str,
    by: PopulationLabels = None,
    *,
    condition: str | None = None,
    table: pd.DataFrame | None = None,
    names: int = 14,
    ax: Axes | None = None,
    show: bool = False,
    save: Save = None,
) -> Axes:
    """Draw every gene's effect in a population against the donor-level p-value.

    Coloured genes have a Benjamini-Hochberg adjusted p below 0.05. The dashed line is the smallest p-value that a
    permutation test of these donors can give.

    Parameters
    ----------
    population
        Name of the population.
    by
        Column of `obs` that names populations, or a Series of labels by cell; by default the only population is
        `all cells`.
    condition
        The condition to compare with the control; by default the first one besides the control.
    table
        The table of `results.cate(by)`, if it was computed before.
    names
        Most genes to name, by p-value.

    Raises
    ------
    QueryError
        There is no such population, or it has no p-values because a condition has fewer than three donors.
    """
    condition, part = _of_condition(results, by, condition, table)
    part = _population(part, population, condition)
    if part["p"].isna().all():
        msg = f"population {population!r} has no p-values under {condition!r}: too few donors"
        raise QueryError(msg)
    part = part[part["p"].notna()].sort_values(["p", "effect"], key=lambda c: -c.abs() if c.name == "effect" else c)
    x, y = part["effect"].to_numpy(), -np.log10(np.maximum(part["p"].to_numpy(), SMALLEST))
    called = (part["p_adjusted"] < SIGNIFICANT).to_numpy()
    (ax,) = panels(1, ax, size=(5.6, 4.6))
    shades = np.where(called, np.where(x > 0, UP, DOWN), QUIET)
    ax.scatter(x, y, c=shades, s=np.where(called, 22, 12), linewidths=0, rasterized=len(x) > 5000)
    ax.axvline(0, color="#8A9099", linewidth=0.8, zorder=0)
    reach = float(np.abs(x).max(initial=0.1)) * 1.25
    ax.set(xlim=(-reach, reach), ylim=(0, float(y.max(initial=0.1)) * 1.1))
    _floor(ax, float(part["p_floor"].iloc[0]))
    ax.set_xlabel(effect_label(results, condition))
    ax.set_ylabel("−log10 p, donors as replicates")
    ax.set_title(shortened(population, 40), pad=22)
    ax.text(0, 1.025, _counted(part.iloc[0], int(called.sum())), transform=ax.transAxes, fontsize=8.5, color="#5B616A")
    named = np.flatnonzero(called) if called.any() else np.arange(min(5, len(x)))
    label_points(ax, x[named], y[named], _symbols(results, part["gene"].iloc[named].astype(str)), names)
    return finish(ax, show=show, save=save)


@styled
def effect_sizes(
    results: Results,
    population: str,
    by: PopulationLabels = None,
    *,
    condition: str | None = None,
    table: pd.DataFrame | None = None,
    names: int = 14,
    ax: Axes | None = None,
    show: bool = False,
    save: Save = None,
) -> Axes:
    """Draw every gene's mean effect over cells against the share of cells that express it, where no test is possible.

    The largest effects are named. The figure does not show how certain they are.

    Parameters
    ----------
    population, by, condition, table
        As in `volcano`.
    names
        Most genes to name, by size of the effect.

    Raises
    ------
    QueryError
        There is no such population.
    """
    condition, part = _of_condition(results, by, condition, table)
    part = _population(part, population, condition)
    part = part.sort_values("mean_ite", key=lambda effect: -effect.abs(), kind="stable")
    x = part[["expressing", "expressing_control"]].max(axis=1).to_numpy(dtype=np.float64)
    y = part["mean_ite"].to_numpy(dtype=np.float64)
    (ax,) = panels(1, ax, size=(5.6, 4.6))
    ax.scatter(x, y, c=np.where(y > 0, UP, DOWN), s=12, linewidths=0, rasterized=len(x) > 5000)
    ax.axhline(0, color="#8A9099", linewidth=0.8, zorder=0)
    ax.set(xlim=(-0.03, 1.08), ylim=(1.2 * float(y.min(initial=-0.1)), 1.2 * float(y.max(initial=0.1))))
    ax.set_xlabel("share of cells that express the gene, larger of both conditions")
    ax.set_ylabel(f"mean effect of {shortened(condition, 24)} over cells\n{effect_units(results)}")
    ax.set_title(f"{shortened(population, 40)}: not tested")
    largest = _symbols(results, part["gene"].astype(str)[: 3 * names])
    label_points(ax, x[: 3 * names], y[: 3 * names], largest, names)
    return finish(ax, show=show, save=save)


READINGS = {
    "within": ("within states", UP), "state": ("change of state", DOWN), "both": ("both", PALETTE[4]),
    "neither": ("neither significant", QUIET),
}  # fmt: skip
"""Label and colour of every reading of an effect."""


@styled
def decomposition(
    results: Results,
    population: str,
    by: PopulationLabels = None,
    *,
    condition: str | None = None,
    table: pd.DataFrame | None = None,
    names: int = 14,
    ax: Axes | None = None,
    show: bool = False,
    save: Save = None,
) -> Axes:
    """Draw the decomposition of every gene's effect: the within-state effect against the total (METHOD section 10).

    On the diagonal the effect is within states; on the horizontal line it is a change of state. Colours show the column
    `reading` of `results.cate`: the parts with an adjusted p of at most 0.05.

    Parameters
    ----------
    population, by, condition, table
        As in `volcano`.
    names
        Most genes to name: the largest effects with a significant part.

    Raises
    ------
    QueryError
        There is no such population, or it has no state coordinates.
    """
    condition, part = _of_condition(results, by, condition, table)
    part = part[(part["population"] == population) & part["within_state"].notna()]
    if part.empty:
        msg = (
            f"population {population!r} has no effects within states under {condition!r}: there is no such population, "
            "or it has too few control cells"
        )
        raise QueryError(msg)
    part = part.iloc[np.argsort(-part["total"].abs().to_numpy(), kind="stable")]
    x, y = part["total"].to_numpy(), part["within_state"].to_numpy()
    (ax,) = panels(1, ax, size=(5.6, 5.0))
    reach = float(max(np.abs(x).max(), np.abs(y).max(), 0.1)) * 1.2
    for line in ([-reach, reach], [0, 0]):
        ax.plot([-reach, reach], line, color="#8A9099", linewidth=0.8, linestyle="--", zorder=0)
    _draw_readings(ax, part)
    ax.text(reach, reach * 0.97, "all within states ", ha="right", va="top", fontsize=8, color="#5B616A")
    ax.text(reach, 0, "all change of state ", ha="right", va="bottom", fontsize=8, color="#5B616A")
    ax.set(xlim=(-reach, reach), ylim=(-reach, reach))
    ax.set_xlabel(f"total effect of {shortened(condition, 24)} (donors' means)")
    ax.set_ylabel("effect within states")
    ax.set_title(shortened(population, 40))
    ax.legend(loc="upper left", frameon=False, fontsize=8.5)
    named = np.flatnonzero(part["reading"].isin(["within", "state", "both"]).to_numpy())
    label_points(ax, x[named], y[named], _symbols(results, part["gene"].iloc[named].astype(str)), names)
    return finish(ax, show=show, save=save)


def _draw_readings(ax: Axes, part: pd.DataFrame) -> None:
    """Draw a point per gene, genes with a significant part on top."""
    for word in reversed(READINGS):
        label, shade = READINGS[word]
        here = part[part["reading"] == word]
        if len(here):
            size = 12 if word == "neither" else 24
            ax.scatter(
                here["total"], here["within_state"], c=shade, s=size, linewidths=0, label=f"{label} ({len(here)})"
            )


@styled
def ma(
    results: Results,
    population: str,
    by: PopulationLabels = None,
    *,
    condition: str | None = None,
    table: pd.DataFrame | None = None,
    names: int = 14,
    ax: Axes | None = None,
    show: bool = False,
    save: Save = None,
) -> Axes:
    """Draw every gene's fold change in a population against its mean expression (an MA plot).

    Coloured genes have a Benjamini-Hochberg adjusted donor-level p below 0.05.

    Parameters
    ----------
    population, by, condition, table, names
        As in `volcano`.

    Raises
    ------
    QueryError
        There is no such population, or it expresses no gene.
    """
    condition, part = _of_condition(results, by, condition, table)
    part = part[(part["population"] == population) & (part["mean_counts"] > 0)]
    if part.empty:
        msg = f"population {population!r} expresses no gene under {condition!r}, or there is no such population"
        raise QueryError(msg)
    part = part.sort_values("p", kind="stable")
    x = np.log10(part["mean_counts"].to_numpy())
    y = part["log2_fold_change"].to_numpy()
    most = 1.1 * float(np.abs(y[np.abs(y) < MOST_DOUBLINGS]).max(initial=1.0))
    y = np.clip(y, -most, most)
    called = (part["p_adjusted"] < SIGNIFICANT).to_numpy()
    (ax,) = panels(1, ax, size=(5.6, 4.6))
    ax.axhline(0, color="#8A9099", linewidth=0.8, zorder=0)
    ax.scatter(x, y, c=np.where(called, np.where(y > 0, UP, DOWN), QUIET), s=np.where(called, 22, 12), linewidths=0)
    ax.set_xlabel("log10 mean normalised counts per cell")
    ax.set_ylabel(f"log2 fold change, {shortened(condition, 20)} vs {shortened(results.control, 20)}")
    ax.set_title(shortened(population, 40))
    named = np.flatnonzero(called)
    label_points(ax, x[named], y[named], _symbols(results, part["gene"].iloc[named].astype(str)), names)
    return finish(ax, show=show, save=save)


@styled
def heatmap(
    results: Results,
    by: PopulationLabels = None,
    *,
    condition: str | Sequence[str] | None = None,
    genes: Sequence[str] | None = None,
    table: pd.DataFrame | None = None,
    most: int = 36,
    ax: Axes | None = None,
    show: bool = False,
    save: Save = None,
) -> Axes:
    """Draw the effects of the top genes in every population; a dot marks an adjusted donor-level p below 0.05.

    Genes with similar effects are adjacent. With p-values the effect is the donor-level one, else the mean over cells.
    Rows with grey names have too few donors or cells in a condition to be reliable.

    Parameters
    ----------
    by
        Column of `obs` that names populations, or a Series of labels by cell; by default all cells form one population.
    condition
        The condition to compare with the control, by default the first one besides it; or several, which share one
        colour scale and have at most 60 rows.
    genes
        The genes to draw; by default the top genes of every population, by p-value or, without, by size of the effect.
    table
        The table of `results.cate(by)`, if it was computed before.
    most
        Most genes to draw, if `genes` is not given.

    Raises
    ------
    QueryError
        A gene is not in the table.
    """
    results, by = results.labelled(by)
    condition = condition or results.conditions[1]
    conditions = [condition] if isinstance(condition, str) else list(condition)
    part = results.cate(by) if table is None else table
    part = _in_rows(part[part["condition"].isin(conditions)])
    value = effect_column(part)
    chosen = top_genes(relied_on(part), most) if genes is None else _chosen_genes(genes, part["gene"].unique())
    drawn_part = part[part["gene"].isin(chosen)]
    wide, adjusted = (
        drawn_part.pivot(index="row", columns="gene", values=column_name) for column_name in (value, "p_adjusted")
    )
    wide = wide.loc[list(categories(pd.Series(wide.index)).categories), :]
    wide = wide[by_likeness(wide)] if genes is None else wide[chosen]
    adjusted = adjusted.reindex(index=wide.index, columns=wide.columns)
    (ax,) = panels(1, ax, size=(2.6 + 0.23 * wide.shape[1], 1.9 + 0.29 * len(wide)))
    drawn = _tiles(ax, wide, adjusted)
    names = [shortened(gene, 16) for gene in _symbols(results, wide.columns)]
    ax.set_xticks(range(len(names)), names, rotation=90, style="italic", fontsize=8.5)
    ax.set_yticks(range(len(wide)), [shortened(name, 40) for name in wide.index])
    weak = set(part.loc[~well_founded(part), "row"])
    for text, name in zip(ax.get_yticklabels(), wide.index, strict=True):
        if name in weak:
            text.set(color="#8A9099", style="italic")
    what = shortened(conditions[0], 30) if len(conditions) == 1 else f"{len(conditions)} conditions"
    ax.set_title(f"Effect of {what} against {shortened(results.control, 30)}")
    _colour_bar(ax, drawn, f"{'effect' if value == 'effect' else 'mean effect over cells'}\n{effect_units(results)}")
    return finish(ax, show=show, save=save)


@styled
def conditions(
    results: Results,
    by: PopulationLabels = None,
    *,
    screen: Screen | None = None,
    genes: Sequence[str] | None = None,
    most: int = 80,
    ax: Axes | None = None,
    show: bool = False,
    save: Save = None,
) -> Axes:
    """Draw the specific effect of every condition of a screen: conditions by genes, on one colour scale.

    The specific effect is the mean effect minus the mean over all conditions. It removes what all conditions share:
    above all the noise of the control, which would give every row the same stripes. Similar conditions are adjacent,
    and so are similar genes. If there is no room for all names, the table of `nd.screen` gives the position of every
    condition.

    Parameters
    ----------
    by
        As in `nd.screen`; the effects are means over all cells of a condition.
    screen
        The summary `nd.screen(results)`, if it was computed before.
    genes
        The genes to draw; by default those whose effects differ most between conditions.
    most
        Most genes to draw, if `genes` is not given.

    Raises
    ------
    QueryError
        A gene is not in the summary.
    """
    summary = screen_of(results, by) if screen is None else screen
    own = own_effects(summary.effects.to_numpy())
    columns = summary.effects.columns
    chosen = list(columns[most_different(own, most)]) if genes is None else _chosen_genes(genes, columns)
    wide = pd.DataFrame(own, index=summary.effects.index, columns=summary.effects.columns)[chosen]
    wide = wide[by_likeness(wide)] if genes is None else wide
    height = min(MAP_INCHES, 1.9 + 0.16 * len(wide))
    (ax,) = panels(1, ax, size=(2.6 + 0.16 * wide.shape[1], height))
    limit = float(np.nanquantile(np.abs(wide.to_numpy()), 0.99)) or 1.0
    drawn = ax.imshow(
        wide.to_numpy(), aspect="auto", interpolation="nearest", cmap="RdBu_r", vmin=-limit, vmax=limit, rasterized=True
    )
    names = [shortened(gene, 16) for gene in _symbols(results, wide.columns)]
    ax.set_xticks(range(len(names)), names, rotation=90, style="italic", fontsize=7.5)
    step = max(1, round(len(wide) / (height * NAMES_AN_INCH)))
    ax.set_yticks(range(0, len(wide), step), [shortened(str(name), 24) for name in wide.index[::step]], fontsize=7)
    ax.tick_params(length=2 if step > 1 else 0)
    ax.set_ylabel(f"{len(wide)} conditions" + (f"; every {step}th is named" if step > 1 else ""))
    ax.set_title(
        f"Effect of each condition against {shortened(results.control, 30)}, minus the mean over all conditions"
    )
    _colour_bar(ax, drawn, f"mean effect over cells, minus that of all conditions\n{effect_units(results)}")
    return finish(ax, show=show, save=save)


MAP_INCHES = 14.0
"""Most height of the heat map of a screen."""
NAMES_AN_INCH = 7.0
"""Names of rows per inch of its height, at most."""
COLOUR_BAR_INCHES = 3.6
"""Most height of a colour bar."""
MOST_ROWS = 60
"""Most rows of a heat map of several conditions."""


def _chosen_genes(genes: Sequence[str], names: Iterable[str]) -> list[str]:
    """Return the genes to draw; the `QueryError` for a missing one has similar names."""
    there = list(dict.fromkeys(names))
    for gene in genes:
        if gene not in there:
            msg = f"there is no gene {gene!r} among the {len(there)} of the table.{suggest(gene, there)}"
            raise QueryError(msg)
    return list(genes)


def _in_rows(part: pd.DataFrame) -> pd.DataFrame:
    """Return the table with a column `row`, the row of the heat map; of many rows, only the most reliable ones."""
    populations, conditions = (part[name].astype(str) for name in ("population", "condition"))
    if conditions.nunique() == 1:
        row = populations
    elif populations.nunique() == 1:
        row = conditions
    else:
        row = conditions + " · " + populations
    part = part.assign(row=row)
    ranking = part.assign(
        _sure=well_founded(part), _called=part["p_adjusted"] < SIGNIFICANT, _size=part[effect_column(part)].abs()
    )
    facts = ["_sure", "_called", "_size"]
    ranked = ranking.groupby("row")[facts].sum().sort_values(facts, ascending=False, kind="stable")
    return part[part["row"].isin(ranked.index[:MOST_ROWS])]


def _tiles(ax: Axes, wide: pd.DataFrame, adjusted: pd.DataFrame) -> Any:
    """Draw the tiles of a heat map, with a dot on the significant ones."""
    top = float(np.nanquantile(np.abs(wide.to_numpy()), 0.99)) or 1.0
    ax.set_facecolor("#ECEEF0")
    drawn = ax.imshow(wide.to_numpy(), cmap="RdBu_r", vmin=-top, vmax=top, aspect="auto")
    ax.plot(*np.argwhere((adjusted < SIGNIFICANT).to_numpy()).T[::-1], "o", markersize=4, color=INK, markeredgecolor="white",
            markeredgewidth=0.7)  # fmt: skip
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    ax.set_xticks(np.arange(wide.shape[1] + 1) - 0.5, minor=True)
    ax.set_yticks(np.arange(len(wide) + 1) - 0.5, minor=True)
    ax.grid(which="minor", color="white", linewidth=1.2)
    ax.tick_params(which="minor", length=0)
    return drawn


# --- quality control -------------------------------------------------------------------------------------------------

TESTS = {
    "main": "donor-level test", "pseudobulk": "pseudobulk", "within_state": "within states", "state_shift": "change of "
    "state",
    "sign": "sign test over cells",
}  # fmt: skip
"""The tests in the figure of the calibration, with their labels."""


@styled
def null_calibration(
    results: Results,
    by: PopulationLabels = None,
    *,
    condition: str | None = None,
    donor_key: str | None = None,
    table: pd.DataFrame | None = None,
    ax: Axes | None = None,
    show: bool = False,
    save: Save = None,
) -> Axes:
    """Draw the calibration: the share of genes with p below each level under permuted donor labels, without any effect.

    The curve of a test that holds its level is on the diagonal or below. Bands contain 80 % of the labellings. The
    donor-level permutation test is calibrated by construction; the figure shows how far the other tests are off.

    Parameters
    ----------
    by, condition, donor_key
        As in `Results.null`.
    table
        The table of `results.null(by)`, if it was computed before.

    Raises
    ------
    QueryError
        No population has three donors per condition.
    """
    results, by = results.labelled(by)
    table = results.null(by, condition=condition, donor_key=donor_key) if table is None else table
    (ax,) = panels(1, ax, size=(5.0, 4.4))
    low = 10.0 ** math.floor(math.log10(float(table["level"].min())))
    ax.plot([low, 1], [low, 1], color="#8A9099", linewidth=1, linestyle=(0, (4, 3)), zorder=1, label="calibrated")
    for (test, label), shade in zip(TESTS.items(), (*PALETTE[:1], *PALETTE[2:5], UP), strict=True):
        part = table[table["test"] == test]
        if part.empty:  # too few donors or labellings for this test
            continue
        counts = part.groupby(["labelling", "level"])[["below", "tests"]].sum()
        each = (counts["below"] / counts["tests"]).unstack("level").to_numpy()
        pooled = counts.groupby("level").sum()
        share = (pooled["below"] / pooled["tests"]).to_numpy()
        levels = pooled.index.to_numpy()
        band = np.maximum(np.nanquantile(each, [0.1, 0.9], axis=0), low / 10)
        ax.fill_between(levels, *band, color=shade, alpha=0.14, linewidth=0)
        ax.plot(
            levels, np.where(share > 0, share, np.nan), "o-", color=shade, markersize=3.5, linewidth=1.6, label=label
        )
    ax.set(xscale="log", yscale="log", xlim=(low, 1.15), ylim=(low / 2, 1.15))
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(ticker.NullFormatter())
    ax.set_xlabel("level")
    ax.set_ylabel("share of genes with p below it, donors' labels permuted")
    ax.legend(loc="lower right")
    return finish(ax, show=show, save=save)


@styled
def overlap(
    results: Results,
    by: PopulationLabels = None,
    *,
    ax: Axes | None = None,
    show: bool = False,
    save: Save = None,
) -> Axes:
    """Draw the distance of treated cells to their control matches, a box per population, and the share with a near one.

    Boxes are quartiles, whiskers the 5 % and 95 % quantiles. Cells beyond the line have no near match: they are farther
    from it than 99 % of cells are from the nearest other cell of their own group.

    Parameters
    ----------
    by
        Column of `obs` that names populations, or a Series of labels by cell; by default a box per condition.

    Raises
    ------
    StoreError
        The results, of an earlier version, do not say which cells have a near match.
    """
    results, by = results.labelled(by)
    cells = results.packed_obs
    if keys.OBS_OVERLAP not in cells:
        msg = (
            f"{results.url} does not say which cells have a near control match; run the same command again with --redo"
        )
        raise StoreError(msg)
    cells = cells[cells[keys.OBS_MATCH_DISTANCE].notna() & (cells[keys.OBS_CONDITION] != results.control)]
    kinds = categories(column(cells, by or keys.OBS_CONDITION))
    distance, near = (cells[name].to_numpy() for name in (keys.OBS_MATCH_DISTANCE, keys.OBS_OVERLAP))
    groups = [np.flatnonzero(kinds.codes == code) for code in range(len(kinds.categories))]
    (ax,) = panels(1, ax, size=(6.2, 1.2 + 0.32 * len(groups)))
    boxes = ax.boxplot(
        [distance[group] for group in groups], orientation="horizontal", whis=(5, 95), showfliers=False,
        patch_artist=True, widths=0.6, positions=range(len(groups)), medianprops={"color": INK, "linewidth": 1.4},
        whiskerprops={"color": "#8A9099"}, capprops={"linewidth": 0},
    )  # fmt: skip
    for box, shade in zip(boxes["boxes"], colours(list(kinds.categories)), strict=True):
        box.set(facecolor=shade, edgecolor="none", alpha=0.75)
    if near.any() and not near.all():
        ax.axvline(float(distance[near].max()), color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
    for place, group in enumerate(groups):
        label = f"{100 * near[group].mean():.0f} % near"
        ax.text(1.01, place, label, transform=ax.get_yaxis_transform(), va="center", fontsize=9)
    ax.set_yticks(range(len(groups)), [shortened(name) for name in kinds.categories])
    ax.set_xlim(left=0)
    ax.invert_yaxis()
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    ax.set_xlabel("distance to the control matches in the matching space")
    return finish(ax, show=show, save=save)


@styled
def spaces(comparison: Comparison, *, show: bool = False, save: Save = None) -> list[Axes]:
    """Draw the measures of every matching space, a panel per measure, with the advised space in colour.

    An arrow shows which direction is better; a dot marks the best space and those tied with it.

    Parameters
    ----------
    comparison
        The comparison from `nd.compare`.
    """
    table = comparison.table
    names = [shortened(str(name)) for name in table["space"]]
    measured = [m for m in MEASURES if table[m.name].notna().any()]
    axes = panels(len(measured), None, size=(2.5, 0.75 + 0.3 * len(names)), columns=4)
    shades = [DOWN if name == comparison.advice.space else QUIET for name in table["space"]]
    for panel, measure in zip(axes, measured, strict=True):
        values = table[measure.name].to_numpy(dtype=float)
        panel.barh(range(len(names)), np.nan_to_num(values), color=shades, height=0.66)
        best = np.isfinite(values) & ~measure.beaten(values)
        for place, value in enumerate(values):
            label = "not measured" if math.isnan(value) else f"{value:.3g}" + " \N{BULLET}" * int(best[place])
            panel.text(1.02, place, label, transform=panel.get_yaxis_transform(), va="center", fontsize=8.5)
        if measure.better == "one":
            panel.axvline(1, color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
        way = {"high": "\N{RIGHTWARDS ARROW}", "low": "\N{LEFTWARDS ARROW}", "one": "near 1"}[measure.better]
        panel.set_title(f"{measure.title} {way}", fontsize=10)
        panel.set_yticks(range(len(names)), names)
        panel.set_xlim(min(0.0, float(np.nanmin(values))), max(float(np.nanmax(values)), 1e-9) * 1.02)
        panel.invert_yaxis()
        panel.tick_params(axis="y", length=0)
        panel.tick_params(axis="x", labelsize=8)
        panel.xaxis.set_major_locator(ticker.MaxNLocator(3))
    return finish(axes, show=show, save=save)


def _population(part: pd.DataFrame, population: str, condition: str) -> pd.DataFrame:
    """Return a population's rows; the `QueryError` for a missing one lists the populations and similar names."""
    there = [str(name) for name in part["population"].unique()]
    if population not in there:
        near = suggest(population, there)
        msg = f"there is no population {population!r} under {condition!r}; there are {listing(there)}.{near}"
        raise QueryError(msg)
    return part[part["population"] == population]


def well_founded(table: pd.DataFrame) -> pd.Series:
    """Return which rows of a CATE table belong to populations with enough cells and donors in both conditions.

    Enough donors are three, or, if no population has three in both conditions, the most that any population has.
    """
    donors = table[["treated_donors", "control_donors"]].min(axis=1)
    least = max(1, min(LEAST_DONORS, int(donors.max())))
    cells = table[["cells", "effective_control_cells"]].min(axis=1)
    return (donors >= least) & (cells >= MIN_CELLS)


def relied_on(table: pd.DataFrame) -> pd.DataFrame:
    """Return the well-founded rows, or all rows if there are none."""
    kept = table[well_founded(table)]
    return kept if len(kept) else table


def _of_condition(
    results: Results, by: PopulationLabels, condition: str | None, table: pd.DataFrame | None
) -> tuple[str, pd.DataFrame]:
    """Return a condition, by default the first one besides the control, and its rows of the CATE table."""
    condition = condition or results.conditions[1]
    table = results.cate(by, condition=condition) if table is None else table
    return condition, table[table["condition"] == condition]


def _symbols(results: Results, genes: Iterable[str]) -> list[str]:
    """Return the symbols of genes that are named by Ensembl IDs, else their names."""
    labels = gene_labels(results.var)
    return [labels.get(gene, gene) for gene in genes]


def effect_column(table: pd.DataFrame) -> str:
    """Return the column of a CATE table with the effect to show: that over donors, or over cells without p-values."""
    return "effect" if table["p"].notna().any() else "mean_ite"


def top_genes(table: pd.DataFrame, most: int) -> list[str]:
    """Return at most `most` top genes by p-value and size of the effect, taken from all populations in rotation.

    Significant genes come first. Others are added up to a third of `most`, or up to `most` if no gene is significant.
    """
    size = table[effect_column(table)].abs().fillna(0)
    called = table["p_adjusted"] < SIGNIFICANT
    ranked = table.assign(_quiet=~called, _p=table["p"].fillna(1), _size=-size).sort_values(
        ["_p", "_size"], kind="stable"
    )
    ranked["_turn"] = ranked.groupby("population", sort=True).cumcount()
    genes = list(dict.fromkeys(ranked.sort_values(["_quiet", "_turn"], kind="stable")["gene"]))
    number = table.loc[called, "gene"].nunique()
    return genes[: min(most, max(number, most // 3) if number else most)]


def by_likeness(wide: pd.DataFrame) -> list[str]:
    """Return the columns in an order that places similar ones next to each other."""
    values = np.nan_to_num(wide.to_numpy(dtype=np.float64)).T
    if len(values) < 3:
        return list(wide.columns)
    tree = hierarchy.linkage(values, "average", optimal_ordering=True)
    return list(wide.columns[hierarchy.leaves_list(tree)])


def effect_units(results: Results) -> str:
    """Return the unit of effects."""
    counts = str(results.uns.get("normalise", "")) == "counts"
    return "ln(1 + counts per 10,000)" if counts else "log-normalised expression"


def effect_label(results: Results, condition: str) -> str:
    """Return the label of an axis of effects."""
    return f"effect of {shortened(condition, 24)} against {shortened(results.control, 24)}, {effect_units(results)}"


def _counted(row: pd.Series, called: int) -> str:
    kind = "paired donors" if row["p_method"] in ("sign flips", "paired t") else "donors"
    number = row["treated_donors"] if kind == "paired donors" else f"{row['treated_donors']} vs {row['control_donors']}"
    return f"{number} {kind}; {row['p_method']}; {called} genes with adjusted p < {SIGNIFICANT}"


def _floor(ax: Axes, floor: float) -> None:
    """Draw a line at the smallest possible p-value, if there is one: parametric p-values have none."""
    if floor > 0:
        ax.axhline(-math.log10(floor), color="#8A9099", linewidth=0.8, linestyle=(0, (4, 3)), zorder=0)
        ax.set_ylim(top=max(ax.get_ylim()[1], -math.log10(floor) * 1.1))
        ax.annotate(
            "smallest p possible", (0.995, -math.log10(floor)), xycoords=ax.get_yaxis_transform(), xytext=(0, 4),
            textcoords="offset points", ha="right", va="bottom", fontsize=8, color="#5B616A",
        )  # fmt: skip


def _colour_bar(ax: Axes, drawn: mpl.cm.ScalarMappable, label: str) -> None:
    figure = ax.get_figure()
    if figure is not None:
        shrink = min(0.9, COLOUR_BAR_INCHES / figure.get_figure(root=True).get_size_inches()[1])
        bar = figure.colorbar(drawn, ax=ax, shrink=shrink, aspect=14, pad=0.015, label=label, extend="both")
        bar.outline.set_visible(b=False)


# --- training --------------------------------------------------------------------------------------------------------

LOSSES = {
    "total": "total",
    "reconstruction": "squared error",
    "cosine": "1 − cosine",
    "kl": "KL and correlation",
    "independence_condition": "NMI with condition",
    "independence_batch": "NMI with batch",
    "independence_batch_within": "NMI with batch, within",
    "dependence": "NMI with clusters (rises)",
    "triplet": "triplet",
    "neighbourhood": "neighbourhood",
    "commitment": "commitment",
    "perplexity": "codes in use",
}
"""The losses and measures of training in the figure, with their titles."""
MOST_STEPS = 2000
"""Approximate most steps that are drawn."""


@styled
def losses(
    results: Results | str | os.PathLike[str],
    *,
    ax: Axes | None = None,
    show: bool = False,
    save: Save = None,
) -> list[Axes]:
    """Draw the unweighted losses of training, a panel each: pale per step, strong the mean per epoch.

    Parameters
    ----------
    results
        Results, or the address of a run directory, finished or not.
    ax
        Axes on which to draw the total loss alone.

    Raises
    ------
    StoreError
        There are no logs: nothing was trained yet, or results.zarr is not in its run directory.
    """
    steps, epochs = training_log(results)
    names = [name for name in (LOSSES if ax is None else ["total"]) if name in steps]
    axes = panels(len(names), ax, size=(2.7, 2.1), columns=5)
    thin = max(1, len(steps) // MOST_STEPS)
    for panel, name in zip(axes, names, strict=True):
        panel.plot(steps["step"][::thin], steps[name][::thin], color=QUIET, linewidth=0.9, rasterized=True)
        panel.plot(epochs["step"], epochs[name], color=DOWN, linewidth=1.7)
        _scaled(panel, steps[name].to_numpy())
        panel.set_title(LOSSES[name], fontsize=10)
        panel.set_xlabel("step", fontsize=9)
    return finish(axes, show=show, save=save)


def training_log(results: Results | str | os.PathLike[str]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the logs of training: a row per step, and a row per epoch."""
    run = run_of(results) if isinstance(results, Results) else open_storage(results)
    if run is None or not (run.exists(keys.METRICS) and run.exists(keys.EPOCHS)):
        where = results.url if isinstance(results, Results) else os.fspath(results)
        msg = f"there is no {keys.METRICS} beside {where}; open the run directory itself, once it has been trained"
        raise StoreError(msg)
    steps, epochs = (pd.read_csv(io.BytesIO(run.read(name))) for name in (keys.METRICS, keys.EPOCHS))
    return steps, epochs


def run_of(results: Results) -> Storage | None:
    """Return the directory of the run that results belong to; None if they were moved away from it."""
    folder, _, name = results.url.rpartition("/")
    return open_storage(folder) if name == keys.RESULTS else None


def _scaled(panel: Axes, values: np.ndarray) -> None:
    """Use a logarithmic scale if the values span more than a factor of 30."""
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    if low > 0 and high / low > 30:
        panel.set_yscale("log")
        panel.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
        panel.yaxis.set_minor_formatter(ticker.NullFormatter())
