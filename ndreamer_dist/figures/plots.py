"""Figures of a finished run, in scanpy's manner: `nd.pl.embedding(results, color="cell_type")`.

Every function takes `Results` first, draws on `ax` or on a new figure, saves it under `save` (the suffix is the format),
shows it if `show` is set, and returns axes. Figures of many cells draw a sample. The rows of a group are stored in a
random order that the seed fixed, so the first rows of each group are a sample, in few chunks.
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
"""Cells of a UMAP, unless told otherwise."""
ITE_VALUES = 2**24
"""Cells times genes of effects that are held for a UMAP of them."""
ITE_COMPONENTS = 10
"""Principal components of effects that are laid out: the later ones are noise of single cells."""
VIOLIN_CELLS = 50_000
MOST_DOUBLINGS = 8.0
"""Fold changes beyond 2 to this power are drawn at the edge: a gene that one condition lacks has no finite one."""
SIGNIFICANT, SMALLEST = 0.05, 1e-300
"""Adjusted p below which a gene is called; p-values below the latter are not told apart."""
FEWEST_ON_PANEL = 9
"""Categories from which on their names stand on a UMAP too: colours alone hardly tell so many apart."""
FEWEST_LAID_OUT = 16
"""Cells below which there is no UMAP; they are shown by their first two principal components."""


def __dir__() -> list[str]:
    """Return the figures, and nothing that they are made with."""
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
    """Draw a UMAP of the effect modifiers' principal components: what cells are, whatever their condition and batch.

    Conditions and batches should mix here, and kinds of cells stay apart.

    Parameters
    ----------
    color
        Columns of `obs`, or modelled genes; one panel each. None: the condition, and the batch if there is one.
    cells
        Draw about so many, a sample; of all groups in proportion.
    seed
        Of the UMAP.
    palette
        Colours of categories: by name, or in their order; a colour map's name for numbers.
    size
        Of a dot, in square points; by default by the number of cells.
    legend
        Name the categories beside each panel.

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
    """Draw a UMAP of the individual treatment effects of cells that are not control: who responds alike.

    Of the effects of all modelled genes, the first ten principal components are laid out. One cell's effect is mostly
    noise, so groups here are kinds of responses only where they hold together.

    Parameters
    ----------
    color
        Columns of `obs`, or modelled genes, one panel each. None: as in `embedding`.
    cells
        Draw about so many, a sample; fewer where there are many genes.
    seed
        Of the UMAP.
    palette
        Colours of categories: by name, or in their order; a colour map's name for numbers.
    size
        Of a dot, in square points; by default by the number of cells.
    legend
        Name the categories beside each panel.
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
    """Draw how the individual treatment effects of cells are spread, a panel per gene and a violin per population.

    The dot is the mean, the bar holds the middle half; fewer than ten cells have no violin. Most of the spread is noise of single cells, so the violins say
    where effects are, not how sure they are.

    Parameters
    ----------
    by
        Column of `obs` that names populations, or a Series of labels by cell; by default all cells of the condition.
    condition
        Whose effects; by default the first after the control.
    cells
        Draw the distribution of about so many cells, a sample.
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
    """Return packed rows of a sample of about so many of the cohort's own cells, ascending; every group in proportion.

    Parameters
    ----------
    treated, conditions
        Only of groups that are not control, or of these condition codes.

    Raises
    ------
    QueryError
        There is no such cell: of the conditions a cohort that is mapped onto a run may have some.
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
    """Return scanpy's UMAP of points, (cells, 2), on scanpy's default neighbour graph of them."""
    if len(points) < FEWEST_LAID_OUT:
        return np.pad(points, ((0, 0), (0, 2)))[:, :2]
    import scanpy as sc

    adata = anndata.AnnData(obs=pd.DataFrame(index=np.arange(len(points)).astype(str)), obsm={keys.PCA: points})
    adata.obsp["connectivities"] = neighbour_graph(points, 15)
    adata.uns["neighbors"] = {"params": {"method": "umap", "use_rep": keys.PCA}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of spectral starts that did not converge: a random one is taken
        sc.tl.umap(adata, random_state=seed)
    return np.asarray(adata.obsm["X_umap"])


def _grouping(results: Results) -> list[str]:
    batch = [keys.OBS_BATCH] if len(results.design.batches) > 1 else []
    return [keys.OBS_CONDITION, *batch]


def _shading(results: Results, table: pd.DataFrame, color: str | Sequence[str]) -> dict[str, pd.Series]:
    """Return the values to shade cells by, under the title of each panel."""
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
    """How cells are drawn; see `embedding`."""

    palette: Palette = None
    size: float | None = None
    legend: bool = True


def _scatter(points: np.ndarray, shading: Mapping[str, pd.Series], name: str, ax: Axes | None, how: Dots) -> list[Axes]:
    axes = panels(len(shading), ax, size=(5.4, 4.1) if len(shading) == 1 else (4.0, 3.2))
    named: list[tuple[Axes, np.ndarray, pd.Categorical]] = []
    order = np.random.default_rng(len(points)).permutation(len(points))  # no kind is drawn over all others
    dots: dict[str, Any] = {
        "s": how.size or float(np.clip(70_000 / len(points), 1.5, 26)),
        "linewidths": 0,
        "rasterized": True,
        "alpha": 0.85,
    }
    for panel, (title, values) in zip(axes, shading.items(), strict=True):
        numbers = pd.api.types.is_numeric_dtype(values) and not pd.api.types.is_bool_dtype(values)
        # High values on top: the few cells that express a gene are what one looks for.
        place = np.argsort(values.to_numpy(dtype=np.float64, na_value=-np.inf), kind="stable") if numbers else order
        x, y, shown = points[place, 0], points[place, 1], values.iloc[place]
        if numbers:
            scale = how.palette if isinstance(how.palette, str) else "viridis"
            drawn = panel.scatter(x, y, c=shown.to_numpy(dtype=np.float64, na_value=np.nan), cmap=scale, **dots)
            figure = panel.get_figure()
            assert figure is not None  # noqa: S101 - it was made above
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
    """Name categories beside the panel."""
    levels = list(kinds.categories)
    if len(levels) > MOST_NAMED:
        panel.annotate(f"{len(levels)} of them, not named", (1, 0), xycoords="axes fraction", ha="right", fontsize=8.5)
        return
    legend_outside(panel, levels, shades)


def _name_on_panel(panel: Axes, points: np.ndarray, kinds: pd.Categorical) -> None:
    """Name categories on the panel too, where they are more than colours alone tell apart; no name covers another.

    Of two names at one place that of the larger category stays.
    """
    levels, sizes = list(kinds.categories), np.bincount(kinds.codes, minlength=len(kinds.categories))
    figure = panel.get_figure(root=True)
    if figure is None or not FEWEST_ON_PANEL <= len(levels) <= MOST_NAMED:
        return
    figure.canvas.draw()  # now the layout is known
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
    """Draw a violin per row, the first on top, or half of one; a dot at the mean, a bar over the middle half."""
    panel.axvline(0, color="#8A9099", linewidth=0.8, zorder=0)
    beside = {"both": 0.0, "low": -0.12, "high": 0.12}[side]
    for place, (part, shade) in enumerate(zip(values, shades, strict=True)):
        if not len(part):
            continue
        if len(part) >= MIN_CELLS:  # of fewer there is no distribution to draw
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
    """Draw how far treated cells go along the effect on their population, beside control cells under the same yardstick.

    Treated cells are above, in colour, control cells below, in grey; the label says which share of the treated ones is
    within the placebo.

    Parameters
    ----------
    by, condition
        As for `results.response`.
    table
        What `results.response` returned; computed if there is none.

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
    ax.set_xlabel(f"response to {shortened(condition, 24)}, in spreads of the placebo (grey: control cells)")
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

    Coloured genes have a Benjamini-Hochberg adjusted p below 0.05; the dashed line is the smallest p-value that so
    many donors allow, where the p-values are those of a permutation.

    Parameters
    ----------
    by
        Column of `obs` that names populations, or a Series of labels by cell; by default there is one, `all cells`.
    condition
        Which to compare with the control; by default the first after it.
    table
        What `results.cate(by)` gave, if it is there already.
    names
        Name at most so many genes, the smallest p first.

    Raises
    ------
    QueryError
        There is no such population, or it has no p-values: fewer than three donors a condition.
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
    ax.set(xlim=(-reach, reach), ylim=(0, float(y.max()) * 1.1))
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
    """Draw every gene's mean effect over cells against the share of cells that express it: for where no test is possible.

    The largest effects are named. How sure they are the figure does not say.

    Parameters
    ----------
    by
        Column of `obs` that names populations, or a Series of labels by cell; by default there is one, `all cells`.
    condition
        Which to compare with the control; by default the first after it.
    table
        What `results.cate(by)` gave, if it is there already.
    names
        Name at most so many genes.

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
    ax.set_xlabel("share of cells that express the gene, the larger of both sides")
    ax.set_ylabel(f"mean effect of {shortened(condition, 24)} over cells\n{effect_units(results)}")
    ax.set_title(f"{shortened(population, 40)}: not tested")
    largest = _symbols(results, part["gene"].astype(str)[: 3 * names])
    label_points(ax, x[: 3 * names], y[: 3 * names], largest, names)
    return finish(ax, show=show, save=save)


READINGS = {
    "within": ("within states", UP), "state": ("change of state", DOWN), "both": ("both", PALETTE[4]),
    "neither": ("neither part stands", QUIET),
}  # fmt: skip
"""What the readings of an effect are called in figures, and their colours."""


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
    """Draw how much of every gene's effect lies within states: the total against the effect between cells of the same state.

    On the diagonal nothing comes of a change of state; on the horizontal line everything does. Colours are the readings of
    `results.cate`: parts that stand at an adjusted p of 0.05.

    Parameters
    ----------
    by, condition, table, names
        As for `volcano`; names go to the largest effects of which a part stands.

    Raises
    ------
    QueryError
        There is no such population, or its cells have no coordinates of state.
    """
    condition, part = _of_condition(results, by, condition, table)
    part = part[(part["population"] == population) & part["within_state"].notna()]
    if part.empty:
        msg = f"population {population!r} has no effects within states under {condition!r}: no such one, or too few control cells"
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
    label_points(ax, x[named], y[named], list(part["gene"].iloc[named].astype(str)), names)
    return finish(ax, show=show, save=save)


def _draw_readings(ax: Axes, part: pd.DataFrame) -> None:
    """Draw a point per gene, those on top of which a part stands."""
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
    """Draw every gene's fold change in a population against how much it is expressed (an MA plot).

    Coloured genes have a Benjamini-Hochberg adjusted donor-level p below 0.05.

    Parameters
    ----------
    by, condition, table, names
        As for `volcano`.

    Raises
    ------
    QueryError
        There is no such population.
    """
    condition, part = _of_condition(results, by, condition, table)
    part = part[(part["population"] == population) & (part["mean_counts"] > 0)]
    if part.empty:
        msg = f"population {population!r} has no gene that is expressed under {condition!r}, or there is no such population"
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
    ax.set_xlabel("log10 mean normalised counts a cell")
    ax.set_ylabel(f"log2 fold change, {shortened(condition, 20)} v {shortened(results.control, 20)}")
    ax.set_title(shortened(population, 40))
    named = np.flatnonzero(called)
    label_points(ax, x[named], y[named], list(part["gene"].iloc[named].astype(str)), names)
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
    """Draw the mean effects of the top genes in every population; a dot marks an adjusted donor-level p below 0.05.

    Genes that behave alike stand beside each other. Where there are p-values the effect is the donor-level one, else
    the mean over cells. Grey names have too few donors or cells on one side for their effects to be relied on.

    Parameters
    ----------
    by
        Column of `obs` that names populations, or a Series of labels by cell; by default all cells are one.
    condition
        Which to compare with the control; by default the first after it. Several stand below each other on one scale, at
        most 60 rows.
    genes
        Which to draw; by default the first of every population by p-value, or where there is none by size of the effect.
    table
        What `results.cate(by)` gave, if it is there already.
    most
        Draw at most so many genes of none given.
    """
    results, by = results.labelled(by)
    condition = condition or results.conditions[1]
    conditions = [condition] if isinstance(condition, str) else list(condition)
    part = results.cate(by) if table is None else table
    part = _in_rows(part[part["condition"].isin(conditions)])
    value = effect_column(part)
    chosen = list(genes) if genes is not None else top_genes(relied_on(part), most)
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
    """Draw what every condition of a screen does of its own, conditions by genes, on one scale.

    That is its mean effect less the mean of all conditions, which holds what all share: above all the noise of the control, by which
    every row would have the same stripes. Conditions that act alike lie next to each other, and so do genes. Rows have names where there is room for them; the
    table of `nd.screen` says which place in the map a condition has.

    Parameters
    ----------
    by
        As of `nd.screen`; the means are over all cells of a condition.
    screen
        What `nd.screen(results)` gave, if it is there already.
    genes
        Which to draw; by default those whose effects differ most between conditions.
    most
        Draw at most so many genes of none given.
    """
    summary = screen_of(results, by) if screen is None else screen
    own = own_effects(summary.effects.to_numpy())
    chosen = list(summary.effects.columns[most_different(own, most)] if genes is None else genes)
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
    ax.set_title(f"Effect of each condition against {shortened(results.control, 30)}, less the mean of all conditions")
    _colour_bar(ax, drawn, f"mean effect over cells, less that of all conditions\n{effect_units(results)}")
    return finish(ax, show=show, save=save)


MAP_INCHES = 14.0
NAMES_AN_INCH = 7.0
COLOUR_BAR_INCHES = 3.6
MOST_ROWS = 60
"""Rows of a heat map of several conditions."""


def _in_rows(part: pd.DataFrame) -> pd.DataFrame:
    """Return a table with the row of a heat map that each line belongs to; of many, the well-founded ones that say most."""
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
    """Draw the tiles of a heat map, with a dot on those that were called."""
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


# --- how far to trust them -------------------------------------------------------------------------------------------

TESTS = {
    "main": "donor-level test", "pseudobulk": "pseudobulk", "within_state": "within states", "state_shift": "change of state",
    "sign": "sign test over cells",
}  # fmt: skip
"""Which tests the calibration shows, and what they are called."""


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
    """Draw the share of genes below every level under permuted donor labels, where no gene has an effect.

    A test that holds its level lies on the diagonal or below it; bands hold four of five labellings. That the donor-level
    permutation does is its construction: the figure shows how far the others are off on these cells.

    Parameters
    ----------
    by, condition, donor_key
        As in `Results.null`.
    table
        What `results.null(by)` gave, if it is there already.

    Raises
    ------
    QueryError
        No population has three donors a condition.
    """
    results, by = results.labelled(by)
    table = results.null(by, condition=condition, donor_key=donor_key) if table is None else table
    (ax,) = panels(1, ax, size=(5.0, 4.4))
    low = 10.0 ** math.floor(math.log10(float(table["level"].min())))
    ax.plot([low, 1], [low, 1], color="#8A9099", linewidth=1, linestyle=(0, (4, 3)), zorder=1, label="calibrated")
    for (test, label), shade in zip(TESTS.items(), (*PALETTE[:1], *PALETTE[2:5], UP), strict=True):
        part = table[table["test"] == test]
        if part.empty:  # too few donors or labellings for this one
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
    ax.set_ylabel("share of genes below it, donors' labels permuted")
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
    """Draw how far cells are from their control matches, a box per population, and the share that has a near one.

    Boxes hold the middle half, whiskers nine of ten. Beyond the line a match is not near: farther than 99 % of cells are
    from the nearest other cell of their own group.

    Parameters
    ----------
    by
        Column of `obs` that names populations, or a Series of labels by cell; by default a box per condition.

    Raises
    ------
    StoreError
        The results do not say which cells have a near match.
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
    ax.set_xlabel("distance to the control matches in the embedding")
    return finish(ax, show=show, save=save)


@styled
def spaces(comparison: Comparison, *, show: bool = False, save: Save = None) -> list[Axes]:
    """Draw what was measured of every matching space, a panel per measure: the advised space full, the others pale.

    An arrow says which way is better; a dot stands for a space that is best or within a tie of the best.

    Parameters
    ----------
    comparison
        What `nd.compare` returned.
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
    """Return a population's rows; `QueryError` names those that are there, and the one that was meant."""
    there = [str(name) for name in part["population"].unique()]
    if population not in there:
        near = suggest(population, there)
        msg = f"there is no population {population!r} under {condition!r}; there are {listing(there)}.{near}"
        raise QueryError(msg)
    return part[part["population"] == population]


def well_founded(table: pd.DataFrame) -> pd.Series:
    """Return which rows of a CATE table are of populations with enough cells and donors on both sides.

    Enough donors are as many as a test needs, or where no population has so many, the most that one has on both sides.
    """
    donors = table[["treated_donors", "control_donors"]].min(axis=1)
    least = max(1, min(LEAST_DONORS, int(donors.max())))
    cells = table[["cells", "effective_control_cells"]].min(axis=1)
    return (donors >= least) & (cells >= MIN_CELLS)


def relied_on(table: pd.DataFrame) -> pd.DataFrame:
    """Return the rows that are well founded, or all where none is."""
    kept = table[well_founded(table)]
    return kept if len(kept) else table


def _of_condition(
    results: Results, by: PopulationLabels, condition: str | None, table: pd.DataFrame | None
) -> tuple[str, pd.DataFrame]:
    """Return a condition, by default the first after the control, and its rows of the CATE table."""
    condition = condition or results.conditions[1]
    table = results.cate(by, condition=condition) if table is None else table
    return condition, table[table["condition"] == condition]


def _symbols(results: Results, genes: Iterable[str]) -> list[str]:
    """Return what genes are called: their symbols, where their names are Ensembl's numbers."""
    labels = gene_labels(results.var)
    return [labels.get(gene, gene) for gene in genes]


def effect_column(table: pd.DataFrame) -> str:
    """Return which column of a CATE table is the effect to show: the donors', or without p-values the cells'."""
    return "effect" if table["p"].notna().any() else "mean_ite"


def top_genes(table: pd.DataFrame, most: int) -> list[str]:
    """Return the first genes of every population by p-value and size of the effect, by turns until there are enough.

    Genes that were called somewhere come first; the others fill up to a third of `most`, or all of it where none was.
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
    """Return columns in an order in which those that are alike are neighbours."""
    values = np.nan_to_num(wide.to_numpy(dtype=np.float64)).T
    if len(values) < 3:
        return list(wide.columns)
    tree = hierarchy.linkage(values, "average", optimal_ordering=True)
    return list(wide.columns[hierarchy.leaves_list(tree)])


def effect_units(results: Results) -> str:
    """Return what effects are measured in."""
    counts = str(results.uns.get("normalise", "")) == "counts"
    return "ln(1 + counts per 10,000)" if counts else "log-normalised expression"


def effect_label(results: Results, condition: str) -> str:
    """Return the label of an axis of effects."""
    return f"effect of {shortened(condition, 24)} against {shortened(results.control, 24)}, {effect_units(results)}"


def _counted(row: pd.Series, called: int) -> str:
    kind = "paired donors" if row["p_method"] in ("sign flips", "paired t") else "donors"
    number = row["treated_donors"] if kind == "paired donors" else f"{row['treated_donors']} v {row['control_donors']}"
    return f"{number} {kind}; {row['p_method']}; {called} genes with adjusted p < {SIGNIFICANT}"


def _floor(ax: Axes, floor: float) -> None:
    """Draw the smallest p-value that was possible; a parametric one has none."""
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
    "independence_condition": "codes on condition",
    "independence_batch": "codes on batch",
    "independence_batch_within": "codes on batch within",
    "dependence": "codes on clusters (rises)",
    "triplet": "triplet",
    "neighbourhood": "neighbourhood",
    "commitment": "commitment",
    "perplexity": "codes in use",
}
"""What is drawn of training, and its titles."""
MOST_STEPS = 2000
"""Steps drawn at most."""


@styled
def losses(
    results: Results | str | os.PathLike[str],
    *,
    ax: Axes | None = None,
    show: bool = False,
    save: Save = None,
) -> list[Axes]:
    """Draw the unweighted losses of training, a panel each: steps pale, means of epochs strong.

    Parameters
    ----------
    results
        Results, or the address of a run directory, finished or not.
    ax
        Draw the total alone, here.

    Raises
    ------
    StoreError
        There are no logs: nothing was trained yet, or results.zarr was moved away from its run.
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
    """Return what training measured: a row per step, and a row per epoch."""
    run = run_of(results) if isinstance(results, Results) else open_storage(results)
    if run is None or not (run.exists(keys.METRICS) and run.exists(keys.EPOCHS)):
        where = results.url if isinstance(results, Results) else os.fspath(results)
        msg = f"there is no {keys.METRICS} beside {where}; open the run directory itself, once it has been trained"
        raise StoreError(msg)
    steps, epochs = (pd.read_csv(io.BytesIO(run.read(name))) for name in (keys.METRICS, keys.EPOCHS))
    return steps, epochs


def run_of(results: Results) -> Storage | None:
    """Return the run directory that results lie in; none where they lie alone."""
    folder, _, name = results.url.rpartition("/")
    return open_storage(folder) if name == keys.RESULTS else None


def _scaled(panel: Axes, values: np.ndarray) -> None:
    """Take a logarithmic scale where the values span more than a decade and a half."""
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    if low > 0 and high / low > 30:
        panel.set_yscale("log")
        panel.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
        panel.yaxis.set_minor_formatter(ticker.NullFormatter())
