"""The report: one HTML page with the effects of a run, their quality control, and how they were computed.

Input: results. Output: one self-contained file with embedded figures and sortable tables, which needs no network. The
page says what cannot be shown (without donors or logs) and why. The template engine escapes names from the data, and
the page's content security policy forbids every script but its own.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from importlib import resources
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from ndreamer_dist import keys
from ndreamer_dist.comparison.screen import Screen
from ndreamer_dist.comparison.screen import screen as screen_of
from ndreamer_dist.comparison.table import kept_comparison
from ndreamer_dist.compute.monitors import last_call
from ndreamer_dist.errors import NDreamerError, StoreError
from ndreamer_dist.figures import plots
from ndreamer_dist.figures.style import DPI, categories, figure_bytes, gene_labels, write_file
from ndreamer_dist.matching.labels import remedy
from ndreamer_dist.report.tables import (
    Table,
    comparison_table,
    conditions_table,
    decomposition_table,
    diagnostics_tables,
    donors_or_conditions,
    effects,
    genes_table,
    groups_table,
    likely_populations,
    percent,
    populations_table,
    settings_table,
    timings_table,
    whole,
)
from ndreamer_dist.results.reader import PopulationLabels
from ndreamer_dist.rundir.directory import RunDirectory
from ndreamer_dist.stats.diagnostics import Diagnostics
from ndreamer_dist.stats.donor_tests import LEAST_DONORS, TOO_FEW_DONORS
from ndreamer_dist.stats.null import rates
from ndreamer_dist.stats.results import MIN_CELLS, Results, open_results
from ndreamer_dist.storage.shards import counting

logger = logging.getLogger(__name__)

TOP_GENES = 30
"""Genes in a table of top genes."""
MOST_VOLCANOES = 6
"""Most volcano plots."""
MOST_SUMMARISED = 6
"""Most conditions in the summary."""
MOST_IN_TITLE = 3
"""Most conditions that a title names."""
MOST_SPREADS = 6
"""Genes with violin plots."""
MOST_DECOMPOSED = 4
"""Most populations with a plot and a table of the decomposition."""
MOST_GENE_TABLES = 12
"""Most tables of top genes for a screen."""
MOST_POOR_GROUPS = 30
"""Groups in the diagnostics of a screen: those with the least overlap."""
SHOWN_DPI = 110
"""Resolution at which figures are displayed; the images have `style.DPI`, for sharp screens and for print."""


@dataclass(frozen=True)
class Picture:
    """A figure of the page: a PNG in base64 and its displayed size in pixels, or the reason why it is `missing`."""

    title: str
    caption: str
    alt: str
    image: str = ""
    width: int = 0
    height: int = 0
    missing: str = ""


@dataclass(frozen=True)
class PageData:
    """Input of the page.

    Attributes
    ----------
    by, donor_key
        Columns of `obs` that name populations and donors, if any.
    chosen
        Whether `by` was chosen automatically.
    table
        The CATE table; for a screen, of the conditions with the largest effects.
    cells
        Approximate number of cells to draw in a UMAP.
    screen
        Summary of all conditions, if the run is a screen.
    """

    results: Results
    by: str | None
    chosen: bool
    donor_key: str | None
    table: pd.DataFrame
    diagnostics: Diagnostics
    cells: int
    screen: Screen | None = None

    @property
    def donors(self) -> bool:
        """Whether the donors are known."""
        return bool(self.donor_key or self.results.design.batch_keys)

    @property
    def tested(self) -> bool:
        """Whether there is any p-value."""
        return bool(self.table["p"].notna().any())

    @cached_property
    def labels(self) -> dict[str, str]:
        """Symbols of genes by name, where they differ."""
        return gene_labels(self.results.var)

    @property
    def conditions(self) -> list[str]:
        """The conditions of the table."""
        return list(dict.fromkeys(self.table["condition"]))

    @property
    def compared(self) -> list[str]:
        """All conditions that are compared with the control."""
        return self.conditions if self.screen is None else list(self.screen.conditions.index)

    def populations(self, condition: str) -> list[tuple[str, pd.DataFrame]]:
        """Return the populations of a condition in natural order, with their rows of the CATE table."""
        part = self.table[self.table["condition"] == condition]
        names = categories(part["population"].drop_duplicates()).categories
        return [(str(name), part[part["population"] == name]) for name in names]


def report(
    results: Results | str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    by: PopulationLabels = None,
    condition: str | None = None,
    donor_key: str | None = None,
    cells: int = plots.CELLS,
) -> str:
    """Write a self-contained HTML page about the results of a run, and return its address.

    Parameters
    ----------
    results
        Results, or an address that `open_results` accepts.
    out
        The file to write; by default `report/report.html` in the run directory.
    by
        Column of `obs` that names populations, or a Series of labels by cell; by default the column that looks most
        like cell types, else all cells form one population.
    condition
        The condition to compare with the control; by default every condition.
    donor_key
        Column of `obs` that names the donor; by default the batch. Without either, the page shows effects without
        tests.
    cells
        Approximate number of cells to draw in a UMAP.

    Raises
    ------
    QueryError
        A name is unknown.
    StoreError
        There are no results, or they are not in a run directory and `out` is missing.
    """
    opened = results if isinstance(results, Results) else open_results(results)
    address = out if out is not None else _default(opened)
    chosen = by is None
    opened, by = opened.labelled(by)
    by = by or likely_populations(opened.packed_obs, opened.design)
    logger.info("report: effects by %s", by or "condition alone")
    with counting() as reads:
        screen = _screen(opened, by, condition, donor_key)
        table = effects(opened, by, condition, donor_key) if screen is None else screen.detailed
        diagnostics = opened.diagnostics(by, donor_key=donor_key)
        data = PageData(opened, by, chosen, donor_key, table, diagnostics, cells, screen)
        html = page(data)
    logger.debug("report: read %s", reads)
    return write_file(address, html.encode())


def _screen(results: Results, by: str | None, condition: str | None, donor_key: str | None) -> Screen | None:
    """Return the summary of a screen; None if the conditions are few enough for sections of their own."""
    if condition is not None or not results.design.is_screen:
        return None
    return screen_of(results, by, donor_key=donors_or_conditions(results, donor_key))


def page(data: PageData) -> str:
    """Return the page's HTML."""
    folder = resources.files("ndreamer_dist.report")
    script = (folder / "report.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    engine = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = engine.from_string((folder / "report.html.j2").read_text(encoding="utf-8"))
    return template.render(**_content(data), script=Markup(script), script_hash=f"sha256-{digest}")  # noqa: S704 - ours


def _default(results: Results) -> str:
    run = plots.run_of(results)
    if run is None:
        msg = f"{results.url} is not in a run directory; say where to write the report (--out FILE.html)"
        raise StoreError(msg)
    return f"{run.url}/{keys.REPORT}"


def _content(data: PageData) -> dict[str, Any]:
    """Return the values of the template's variables."""
    results, design = data.results, data.results.design
    return {
        "title": f"NDreamer: {_named(data.compared)} against {design.control}",
        "subtitle": f"Effects of the condition on {_cell_count(results)}, and how reliable they are.",
        "control": design.control,
        "tiles": _tiles(data),
        "summary": list(_summary(data)),
        "warnings": list(_warnings(data)),
        "design": list(_design(data)),
        "groups": None if data.screen else groups_table(results),
        "screen": None
        if data.screen is None
        else (_map(data, data.screen), conditions_table(data.screen, data.labels)),
        "cells": list(_cell_pictures(data)),
        "decomposition": list(_decomposition(data)),
        "decomposition_parts": list(_decomposed(data)),
        "populations_note": _populations_note(data),
        "populations": populations_table(data.table, donors=data.donors),
        "effects": list(_effect_pictures(data)),
        "volcanoes": list(_volcanoes(data)),
        "spreads": list(_spreads(data)),
        "genes_note": _genes_note(data),
        "genes": list(_genes(data)),
        "trust": list(_trust(data)),
        "trust_figures": list(_trust_pictures(data)),
        "diagnostics": diagnostics_tables(_shown_diagnostics(data)),
        **_spaces(results),
        "matching_limit": _matching_limit(data),
        "modelled": whole(len(results.var_names)),
        "training": _training(data),
        "timings": timings_table(results),
        "settings": settings_table(results),
        "origin": list(_origin(results)),
        "versions": "Versions: " + ", ".join(f"{k} {v}" for k, v in json.loads(results.uns["versions"]).items()) + ".",
        "version": str(results.uns["version"]),
    }


def _map(data: PageData, screen: Screen) -> Picture:
    return _picture(
        "All conditions",
        "Mean effect over the cells of each condition, minus the mean over all conditions: the specific effect of the "
        "condition. Similar conditions are adjacent; the table below gives the position of each. The genes are those "
        "whose effects differ most between conditions.",
        f"Heat map of effects, {len(screen.effects)} conditions by genes",
        lambda: plots.conditions(data.results, data.by, screen=screen),
    )


def _shown_diagnostics(data: PageData) -> Diagnostics:
    """Return the diagnostics; for a screen, only of the groups with the least overlap."""
    if data.screen is None:
        return data.diagnostics
    groups = data.diagnostics.groups.sort_values("overlap", kind="stable").head(MOST_POOR_GROUPS)
    return replace(data.diagnostics, groups=groups)


def _origin(results: Results) -> Iterator[str]:
    """Yield the input and the date of the run, if its log has them, and how to cite it."""
    run = plots.run_of(results)
    call = last_call(run) if run is not None else None
    if call:
        day = time.strftime("%Y-%m-%d", time.gmtime(call[1]))
        yield f"Input: {call[0]}. Last run: {day}."
    yield (
        f"To cite: NDreamer (Xiao et al., bioRxiv 2025.03.05.641743), run with ndreamer-dist {results.uns['version']} "
        "and the settings and versions on this page."
    )


def _cell_count(results: Results) -> str:
    """Return the number of cells in words, for mapped cells with that of the run that they were mapped onto."""
    own, run = results.design.own_cells, results.design.first_row
    return f"{whole(own)} cells, mapped onto a run of {whole(run)} cells" if run else f"{whole(own)} cells"


# --- text ------------------------------------------------------------------------------------------------------------


def _tiles(data: PageData) -> list[tuple[str, str]]:
    design = data.results.design
    batches = len(design.batches) if design.batch_keys else 0
    populations = data.table["population"].nunique()
    called = int((data.table["p_adjusted"] < plots.SIGNIFICANT).sum())
    return [
        ("mapped cells" if data.results.mapped else "cells", whole(design.own_cells)),
        ("modelled genes", whole(len(data.results.var_names))),
        ("conditions", whole(len(design.conditions))),
        *([(_plural(batches, "batch", "batches"), whole(batches))] if batches else []),
        (_plural(populations, "population"), whole(populations)),
        *([(f"significant effects, adjusted p < {plots.SIGNIFICANT}", whole(called))] if data.tested else []),
    ]


def _summary(data: PageData) -> Iterator[str]:
    """Yield a sentence or two per condition; of many conditions, for those with most significant genes."""
    called_genes = (data.table["p_adjusted"] < plots.SIGNIFICANT).groupby(data.table["condition"]).sum()
    chosen = sorted(data.conditions, key=lambda name: -int(called_genes[name]))[:MOST_SUMMARISED]
    if data.screen is not None:
        yield _of_screen(data.screen)
    elif len(chosen) < len(data.conditions):
        yield (
            f"There are {len(data.conditions)} conditions. This summary covers the {len(chosen)} with most significant "
            "genes; the tables below cover all."
        )
    for condition in chosen:
        parts = data.populations(condition)
        tested = [(name, part) for name, part in parts if part["p"].notna().any()]
        called = [(int((part["p_adjusted"] < plots.SIGNIFICANT).sum()), name) for name, part in tested]
        effect = plots.effect_column(data.table)
        if not tested:
            reason = f", because {_why_untested(data)}" if condition == chosen[0] or data.tested else ""
            named = f"{_strongest(parts, effect, data.labels)} {_steady(parts, data.labels)}".strip()
            yield f"{condition}: effects but no p-values{reason}. {named}"
            continue
        most_called = sorted((pair for pair in called if pair[0]), reverse=True)
        most = ", ".join(f"{name} ({number})" for number, name in most_called[:3])
        yield (
            f"{condition}: {len(tested)} of {len(parts)} populations have enough donors for a test. "
            + (
                f"{len(most_called)} of them {_plural(len(most_called), 'has', 'have')} significant genes "
                f"(most: {most}). "
                if most_called
                else "No gene is significant in any of them, which does not prove that there is no effect. "
            )
            + _strongest(tested, effect, data.labels)
        )


def _of_screen(screen: Screen) -> str:
    """Return how many conditions of a screen have significant genes, and which conditions the page covers."""
    genes, number = screen.conditions["genes"], screen.detailed["condition"].nunique()
    how = "donor-level tests" if screen.tested else "the sign test over cells, which describes and does not test"
    return (
        f"There are {len(genes)} conditions; {int((genes > 0).sum())} have significant genes by {how} (median "
        f"{genes.median():.0f} genes per condition). The heat map and the table of conditions cover all of them. The "
        f"rest of this page, including the following sentences, covers the {number} with the largest effects."
    )


def _why_untested(data: PageData) -> str:
    return TOO_FEW_DONORS if data.donors else "the donors are unknown"


def _strongest(parts: Sequence[tuple[str, pd.DataFrame]], effect: str, labels: Mapping[str, str]) -> str:
    """Return a sentence with the largest effects in well-founded populations, of significant genes if there are any."""
    rows = pd.concat([part for _, part in parts])
    rows = rows[plots.well_founded(rows)]
    called = rows[rows["p_adjusted"] < plots.SIGNIFICANT]
    rows = (called if len(called) else rows).dropna(subset=[effect])
    rows = rows.iloc[np.argsort(-rows[effect].abs().to_numpy(), kind="stable")[:4]]
    names = [
        f"{labels.get(row['gene'], row['gene'])} in {row['population']} ({row[effect]:+.2f})"
        for _, row in rows.iterrows()
    ]
    if not names:
        return f"No population has enough donors and {MIN_CELLS} cells in both conditions, so no effect is named here."
    return f"Largest {'significant ' if len(called) else ''}effects: {', '.join(names)}."


def _steady(parts: Sequence[tuple[str, pd.DataFrame]], labels: Mapping[str, str]) -> str:
    """Return a sentence with the differences of donors' means that keep their sign whichever donor is left out.

    With two donors per condition no test is possible, and this is the strongest evidence there is.
    """
    rows = pd.concat([part for _, part in parts])
    rows = rows[plots.well_founded(rows) & (rows[["treated_donors", "control_donors"]].min(axis=1) > 1)]
    stable = rows[rows["total_loo_low"] * rows["total_loo_high"] > 0]
    if stable.empty:
        return ""
    weaker = stable[["total_loo_low", "total_loo_high"]].abs().min(axis=1).to_numpy()
    named = [
        f"{labels.get(row['gene'], row['gene'])} in {row['population']} ({row['total_loo_low']:+.2f} to "
        f"{row['total_loo_high']:+.2f})"
        for _, row in stable.iloc[np.argsort(-weaker, kind="stable")[:3]].iterrows()
    ]
    return (
        f"{whole(len(stable))} of {whole(len(rows))} differences of donors' means keep their sign whichever donor is "
        f"left out. This is no test, since noise alone keeps many signs. The most stable are {', '.join(named)}."
    )


def _warnings(data: PageData) -> Iterator[str]:
    mapped = data.results.mapped
    if mapped is not None and mapped.is_notable:
        yield _sentence(str(mapped))
    table = data.table.drop_duplicates(["population", "condition"])
    flags = {
        "few_donors": "with at most four donors in a condition, so that p-values are coarse or missing",
        "few_cells": "with fewer than 20 cells per donor, where effects within states and changes of state are "
        "unreliable",
        "impure": "whose matches are often in another population, so that effects mix cell types "
        f"({remedy(data.results.matched_inside, data.by)})",
    }
    for flag in flags if data.donors else ["impure"]:
        names = list(dict.fromkeys(table.loc[table[flag].astype(bool), "population"].astype(str)))
        if names:
            shown = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
            yield f"{_plural(len(names), 'Population')} {flags[flag]}: {shown}."
    if data.chosen:
        yield (
            f"Populations are taken from obs column “{data.by}”, which looks most like cell types; choose another with "
            "--by."
            if data.by
            else "No column of obs looks like cell types, so all cells form one population; choose a column with --by. "
            "An average over cell types can hide what happens in each."
        )


def _design(data: PageData) -> Iterator[str]:
    results = data.results
    if results.mapped is not None:
        yield (
            f"These cells were mapped onto {results.mapped.url}. Figures of cells show only them; effects, tests and "
            "diagnostics also use the donors of that run."
        )
        yield _sentence(str(results.mapped))
    yield data.diagnostics.donors
    yield {
        "no donors": "Without replicates there is no test: effects describe these cells alone.",
        "nested": "Only several donors per condition can separate the effect of the condition from differences between "
        "donors.",
        "crossed": "Every donor is its own control.",
        "partly crossed": "Donors seen in both conditions are tested as pairs, and the others are left out. If fewer "
        f"than {LEAST_DONORS} are seen in both and there are enough others, the others are tested instead. The tables "
        "name the test and the donors that were left out.",
    }[data.diagnostics.layout]
    if data.donor_key:
        yield f"Donors are taken from obs column “{data.donor_key}”."
    dropped = json.loads(str(results.uns.get("dropped", "{}")))
    if dropped:
        yield "Left out: " + "; ".join(f"{whole(n)} cells ({reason})" for reason, n in dropped.items()) + "."
    yield from (f"Note: {note}." for note in (*_notes(results), *data.diagnostics.notes))


def _notes(results: Results) -> list[str]:
    notes = results.uns.get("notes", [])
    return [str(note) for note in (json.loads(notes) if isinstance(notes, str) else notes)]


def _populations_note(data: PageData) -> str:
    if not data.by:
        return "All cells form one population."
    missing = int(data.results.packed_obs[data.by].isna().sum())
    left = (
        f" {whole(missing)} {_plural(missing, 'cell has', 'cells have')} no label there and are left out."
        if missing
        else ""
    )
    return f"Populations are the values of obs column “{data.by}”.{left}"


def _genes_note(data: PageData) -> str:
    if data.tested:
        return (
            "The p-values treat donors as replicates. A donor's value is the mean expression of the matches that all "
            "donors' cells have among the donor's cells. The test permutes the donors' labels or, where there are too "
            "few permutations, is a t-test (see column “test” above). The same test on plain pseudobulk means is "
            "shown for comparison."
        )
    return f"There are no p-values, because {_why_untested(data)}. The tables show effects alone."


def _genes(data: PageData) -> Iterator[tuple[str, str, Table]]:
    several = len(data.conditions) > 1
    yield from itertools.islice(_gene_tables(data, several=several), MOST_GENE_TABLES if data.screen else None)


def _gene_tables(data: PageData, *, several: bool) -> Iterator[tuple[str, str, Table]]:
    for condition in data.conditions:
        for name, part in data.populations(condition):
            row = part.iloc[0]
            donors = f", {row['treated_donors']} vs {row['control_donors']} donors" if data.tested else ""
            method = "not tested" if row["p_method"] == "none" else row["p_method"]
            words = f"{whole(row['cells'])} cells{donors}, {method}"
            yield f"{name}: {condition}" if several else name, words, genes_table(part, TOP_GENES, data.labels)


def _trust(data: PageData) -> Iterator[str]:
    table = data.table
    both = table[["effect", "pseudobulk_effect"]].dropna()
    if data.tested and len(both) > 2:
        yield (
            "Correlation of the effects through the matches with plain pseudobulk differences, over all genes and "
            f"populations: {both['effect'].corr(both['pseudobulk_effect']):.2f}. If it is low, matching changed the "
            "comparison: check whether it should have."
        )
    ratios = (table["sd_ite"] / table["sd_placebo"].where(table["sd_placebo"] > 0)).dropna()
    if len(ratios):
        yield (
            f"The standard deviation of single-cell effects is {ratios.median():.2f} times that of a placebo (control "
            "donors against other control donors; median over genes). Near 1, nearly all of this spread is noise."
        )
    far = table.drop_duplicates(["population", "condition"])
    measured = far.dropna(subset=["without_overlap"])
    if measured.empty:
        yield "The share of cells without a near control match is unknown."
        return
    share = float(np.average(measured["without_overlap"], weights=measured["cells"]))
    unknown = int(far["cells"].sum() - measured["cells"].sum())
    yield (
        f"{percent(share)} of the cells have no near control match; their effects rest on cells that are unlike them."
        + (f" For {whole(unknown)} further cells it is unknown." if unknown else "")
    )


def _sentence(words: str) -> str:
    return f"{words[0].upper()}{words[1:]}."


def _plural(number: int, one: str, many: str | None = None) -> str:
    return one if number == 1 else many or f"{one}s"


# --- figures ---------------------------------------------------------------------------------------------------------


def _picture(title: str, caption: str, alt: str, draw: Callable[[], Axes | Sequence[Axes]]) -> Picture:
    """Draw a figure; on an error of this package, return its message as the reason why the figure is missing."""
    try:
        axes = draw()
    except NDreamerError as error:
        return Picture(title, caption, alt, missing=str(error))
    figure = (axes if isinstance(axes, Axes) else axes[0]).get_figure(root=True)
    assert figure is not None  # noqa: S101 - it was drawn on
    data = figure_bytes(figure)
    plt.close(figure)
    width, height = (int.from_bytes(data[place : place + 4], "big") for place in (16, 20))  # from the PNG's header
    scale = SHOWN_DPI / DPI
    return Picture(title, caption, alt, base64.b64encode(data).decode(), round(width * scale), round(height * scale))


def _cell_pictures(data: PageData) -> Iterator[Picture]:
    results, design = data.results, data.results.design
    drawn = min(data.cells, design.own_cells)
    panels = {
        **({keys.OBS_BATCH: " + ".join(design.batch_keys)} if len(design.batches) > 1 else {}),
        **({data.by: data.by} if data.by else {}),
    }
    if data.screen is None or not panels:  # a panel of many conditions shows little
        panels = {keys.OBS_CONDITION: design.condition_key, **panels}
    yield _picture(
        "The embedding",
        f"UMAP of about {whole(drawn)} of {whole(design.own_cells)} cells in the matching space, {results.space}. It "
        "shows what cells are regardless of condition and batch: conditions and batches should mix, cell types "
        "should not. Distances in a UMAP mean little.",
        f"UMAP of the matching space, one panel each for {', '.join(panels.values())}",
        lambda: plots.embedding(results, list(panels), cells=data.cells),
    )


def _effect_pictures(data: PageData) -> Iterator[Picture]:
    top = [data.labels.get(gene, gene) for gene in plots.top_genes(plots.relied_on(data.table), 8)]
    yield _picture(
        f"Effects of {_named(data.conditions)} by population",
        "Top genes of every population on one colour scale; genes with similar effects are adjacent. "
        + ("A dot marks an adjusted donor-level p below 0.05. " if data.tested else "There are no p-values. ")
        + "Grey names: too few donors or cells in a condition for reliable effects."
        + (
            f" {plots.MOST_ROWS} of {_rows(data)} rows are drawn, the most reliable first."
            if _rows(data) > plots.MOST_ROWS
            else ""
        ),
        f"Heat map of effects of {_named(data.conditions)}, populations by genes, among them {', '.join(top)}",
        partial(plots.heatmap, data.results, data.by, condition=data.conditions, table=data.table),
    )


def _rows(data: PageData) -> int:
    return len(data.table[["population", "condition"]].drop_duplicates())


def _named(conditions: Sequence[str]) -> str:
    """Return the conditions' names, or their number if they are many."""
    return ", ".join(conditions) if len(conditions) <= MOST_IN_TITLE else f"{len(conditions)} conditions"


def _shows_decomposition(data: PageData) -> bool:
    """Return whether the page shows the decomposition: donors are nested, maybe partly, and both parts are tested."""
    return data.diagnostics.layout in ("nested", "partly crossed") and bool(data.table["within_state_p"].notna().any())


def _decomposition(data: PageData) -> Iterator[str]:
    """Yield sentences on how many effects are within states and how many are changes of state."""
    if not _shows_decomposition(data):
        return
    for condition in data.conditions:
        words = data.table.loc[data.table["condition"] == condition, "reading"].value_counts()
        within, moved, both = (int(words.get(word, 0)) for word in ("within", "state", "both"))
        yield (
            f"{condition}: in {whole(within)} {_plural(within, 'case')} (a case is a gene in a population), expression "
            f"differs between cells of the same state; in {whole(moved)}, it differs because cells are in other "
            f"states; in {whole(both)}, both."
        )
    yield (
        "A gene of the second kind shows which state cells are in, not what the condition does to a cell of a given "
        "state: follow up the state, not the gene."
    )


def _decomposed(data: PageData) -> Iterator[tuple[Picture, Table]]:
    """Draw the populations with most genes of which a part is significant, each with its table."""
    if not _shows_decomposition(data):
        return
    pairs = data.table[data.table["within_state_p"].notna()].groupby(["condition", "population"], sort=False)
    stands = pairs["reading"].agg(lambda words: words.isin(["within", "state", "both"]).sum())
    for pair in stands.sort_values(ascending=False, kind="stable").head(MOST_DECOMPOSED).index:
        condition, name = map(str, pair)
        picture = _picture(
            f"{name}, {condition}: within states or a change of state",
            "A point per gene. On the diagonal the effect is within states; on the horizontal line it is a change of "
            "state.",
            f"Scatter plot of effects within states against total effects in {name} under {condition}",
            partial(plots.decomposition, data.results, name, data.by, condition=condition, table=data.table),
        )
        yield picture, decomposition_table(pairs.get_group(pair), TOP_GENES, data.labels)


def _volcanoes(data: PageData) -> Iterator[Picture]:
    """Draw the populations with most significant genes; without tests, the effects in the largest populations."""
    if not data.tested:
        yield from _untested_effects(data)
        return
    pairs = data.table.groupby(["condition", "population"])
    called = pairs["p_adjusted"].agg(lambda p: (p < plots.SIGNIFICANT).sum())
    testable = called[pairs["p"].count() > 0].sort_values(ascending=False, kind="stable")
    some = f" {MOST_VOLCANOES} of {len(testable)} are drawn, those with most significant genes."
    some = some if len(testable) > MOST_VOLCANOES else ""
    for pair, number in testable.head(MOST_VOLCANOES).items():
        condition, name = map(str, pair)  # type: ignore[call-overload]
        yield _picture(
            f"{name}, {condition}",
            f"Effect against donor-level p-value, a point per gene.{some}",
            f"Volcano plot of {name} under {condition}: {int(number)} genes with adjusted p below 0.05",
            partial(plots.volcano, data.results, name, data.by, condition=condition, table=data.table),
        )


def _untested_effects(data: PageData) -> Iterator[Picture]:
    pairs = data.table[plots.well_founded(data.table)].drop_duplicates(["population", "condition"])
    for _, row in pairs.sort_values("cells", ascending=False, kind="stable").head(MOST_VOLCANOES).iterrows():
        name, condition = str(row["population"]), str(row["condition"])
        yield _picture(
            f"{name}, {condition}: effects without a test",
            "Mean effect over cells against the share of cells that express the gene, a point per gene; the largest "
            "effects are named.",
            f"Scatter plot of mean effects in {name} under {condition}",
            partial(plots.effect_sizes, data.results, name, data.by, condition=condition, table=data.table),
        )


def _spreads(data: PageData) -> Iterator[Picture]:
    results, condition = data.results, data.conditions[0]
    genes = plots.top_genes(plots.relied_on(data.table[data.table["condition"] == condition]), MOST_SPREADS)
    yield _picture(
        f"Distribution of single-cell effects of {condition}",
        "A violin per population; the dot is the mean, the bar the interquartile range. Most of the spread is noise of "
        "single cells.",
        f"Violin plots of individual treatment effects of {', '.join(data.labels.get(gene, gene) for gene in genes)}",
        lambda: plots.ite_distribution(results, genes, data.by, condition=condition),
    )
    if len(results.var_names) > 2:
        yield _picture(
            "Cells by their effects",
            "UMAP of the individual effects on all modelled genes: cells with similar responses are near each other.",
            "UMAP of individual treatment effects",
            lambda: plots.ite_embedding(results, [data.by] if data.by else None, cells=data.cells),
        )


def _trust_pictures(data: PageData) -> Iterator[Picture]:
    results, by = data.results, data.by
    yield _picture(
        "Overlap", "Distance of treated cells to their control matches. Cells beyond the line are farther from their "
        "matches than 99 % of cells are from the nearest other cell of their own group: their effects are "
        "extrapolations.",
        "Box plots of match distances by population", lambda: plots.overlap(results, by),
    )  # fmt: skip
    try:
        condition = data.conditions[0] if data.screen else None
        null = results.null(by, condition=condition, donor_key=data.donor_key)
    except NDreamerError as error:
        yield Picture("Calibration", "P-values under permuted donor labels.", "", missing=str(error))
        return
    shares = rates(null, levels=(plots.SIGNIFICANT,))[plots.SIGNIFICANT]
    listed = ", ".join(f"{plots.TESTS[test]} {percent(shares[test])}" for test in plots.TESTS if test in shares.index)
    yield _picture(
        "Calibration", f"Share of genes with p below each level under permuted donor labels, where there is no effect. "
        f"At 0.05: {listed}. A permutation test of donors holds its level by construction; only a model retrained on "
        "permuted labels would test the training, too.",
        "Line plot of the share of p-values below each level under permuted donor labels, by test",
        lambda: plots.null_calibration(results, by, table=null),
    )  # fmt: skip


def _spaces(results: Results) -> dict[str, Any]:
    """Return the stored comparison of matching spaces, if there is one and the results have not changed since."""
    run = plots.run_of(results)
    comparison = None if run is None else kept_comparison(RunDirectory.at(keys.run_folder(run.url)), results)
    if comparison is None:
        return {"spaces": None}
    picture = _picture(
        "Matching spaces", "Measures of each space. The advised one is in colour; a dot marks the best and those tied "
        "with it.",
        "Bar charts of the measures of every matching space", lambda: plots.spaces(comparison),
    )  # fmt: skip
    by = f"Populations: {comparison.populations}."
    return {"spaces": ([*comparison.sentences(), by], picture, comparison_table(comparison))}


def _matching_limit(data: PageData) -> tuple[str, str]:
    """Return the limitation of the run's matching space, and whether it applies to these donors."""
    space = data.results.space
    if space == keys.HARMONY or keys.is_trained(space):
        origin = "corrected by Harmony for" if space == keys.HARMONY else "trained to be independent of"
        limit = (
            f"Cells are matched in an embedding that was {origin} batch and condition. Where donors are nested in "
            "conditions, it may have lost real differences of cell state between donors, which then appear as "
            "donor-level effects, as they do in plain means."
        )
        applies = {
            "nested": "The donors here are nested, so this applies.",
            "partly crossed": "Some donors here are in one condition only, so this applies in part.",
        }
        return limit, applies.get(data.diagnostics.layout, "")
    if space == keys.STATE:
        return (
            "Cells are matched on the variation between cells of the same control donor. A state that only treated "
            "cells have is not represented there; such cells are matched with the nearest control state."
        ), ""
    return (
        f"Cells are matched in {space}, which is not corrected for batch and condition. Where these shift cells far, "
        "the nearest cell may be in another state, and an effect may then be a difference of states."
    ), ""


def _training(data: PageData) -> Picture:
    if not keys.is_trained(data.results.space):
        why = f"Cells were matched in {data.results.space}, which is not trained."
        return Picture("Training", "", "", missing=why)
    return _picture(
        "Training", "Unweighted losses: pale per step, strong the mean per epoch. They should fall, except that the "
        "information of the codes on clusters should rise, and many codes should stay in use.",
        "Line plots of the training losses by step", lambda: plots.losses(data.results),
    )  # fmt: skip
