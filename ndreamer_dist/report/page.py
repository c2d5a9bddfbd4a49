"""One HTML page with the findings of a run, how far to trust them, and how they were made.

Input: results. Output: one self-contained file, with figures inside, no network, and tables that sort. Where something
cannot be shown (no donors, no logs), the page says so. The template engine escapes names from data, and the page forbids
every script but its own.
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
MOST_VOLCANOES = 6
MOST_SUMMARISED = 6
"""Conditions that the summary tells of."""
MOST_IN_TITLE = 3
"""Conditions that a title names."""
MOST_SPREADS = 6
MOST_DECOMPOSED = 4
MOST_GENE_TABLES = 12
"""Tables of genes of a screen."""
MOST_POOR_GROUPS = 30
"""Groups of a screen whose diagnostics are shown."""
SHOWN_DPI = 110
"""Pixels of the page per inch of a figure; it is drawn finer, for sharp screens and for paper."""


@dataclass(frozen=True)
class Picture:
    """A figure of the page: base64 of a PNG and its size on the page, or why there is none."""

    title: str
    caption: str
    alt: str
    image: str = ""
    width: int = 0
    height: int = 0
    missing: str = ""


@dataclass(frozen=True)
class PageData:
    """What the page is made from: results, their CATE table, and by what populations and donors it was made.

    Of a screen of many conditions the table has those with the largest effects, and `screen` says what there is of all.
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
        """Whether it is known who the donors are."""
        return bool(self.donor_key or self.results.design.batch_keys)

    @property
    def tested(self) -> bool:
        """Whether there is any p-value."""
        return bool(self.table["p"].notna().any())

    @cached_property
    def labels(self) -> dict[str, str]:
        """What genes are called, by name, where that is not their name."""
        return gene_labels(self.results.var)

    @property
    def conditions(self) -> list[str]:
        """The conditions of the table."""
        return list(dict.fromkeys(self.table["condition"]))

    @property
    def compared(self) -> list[str]:
        """The conditions that are compared with the control."""
        return self.conditions if self.screen is None else list(self.screen.conditions.index)

    def populations(self, condition: str) -> list[tuple[str, pd.DataFrame]]:
        """Return the populations of a condition in natural order, with their rows of the table."""
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
    """Write one self-contained HTML page of what a run found, and return its address.

    Parameters
    ----------
    results
        Results, or what `open_results` takes.
    out
        The file; by default `report/report.html` in the run directory.
    by
        Column of `obs` that names populations, or a Series of labels by cell; by default the column that looks most like cell types, else all cells together.
    condition
        Which to compare with the control; by default every one.
    donor_key
        Column of `obs` that names the donor; by default the batch. Where there is neither, there are effects and no tests.
    cells
        Cells drawn in a UMAP, about.

    Raises
    ------
    QueryError
        A name is unknown.
    StoreError
        There are no results, or `out` is needed: they lie apart from a run directory.
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
    """Return what there is of all conditions together, where they are too many for a section each."""
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
        msg = f"{results.url} lies apart from its run directory; say where to write the report (--out FILE.html)"
        raise StoreError(msg)
    return f"{run.url}/{keys.REPORT}"


def _content(data: PageData) -> dict[str, Any]:
    """Return what the template is filled with."""
    results, design = data.results, data.results.design
    return {
        "title": f"NDreamer: {_named(data.compared)} against {design.control}",
        "subtitle": f"What the condition does to {_cell_count(results)}, and how far the numbers can be trusted.",
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
        "Mean effect over the cells of each condition, less the mean of all conditions: what it does of its own. Conditions "
        "that act alike lie next to each other; the table below says where each lies. Genes are those whose effects differ most between conditions.",
        f"Heat map of effects, {len(screen.effects)} conditions by genes",
        lambda: plots.conditions(data.results, data.by, screen=screen),
    )


def _shown_diagnostics(data: PageData) -> Diagnostics:
    """Return the diagnostics; of a screen, the groups with the least overlap alone."""
    if data.screen is None:
        return data.diagnostics
    groups = data.diagnostics.groups.sort_values("overlap", kind="stable").head(MOST_POOR_GROUPS)
    return replace(data.diagnostics, groups=groups)


def _origin(results: Results) -> Iterator[str]:
    """Say what the results were made from and when, as far as the run's log tells, and how to cite them."""
    run = plots.run_of(results)
    call = last_call(run) if run is not None else None
    if call:
        day = time.strftime("%Y-%m-%d", time.gmtime(call[1]))
        yield f"Input: {call[0]}. Last worked on: {day}."
    yield (
        f"To cite: the method is NDreamer (Xiao et al., bioRxiv 2025.03.05.641743); it was run by ndreamer-dist "
        f"{results.uns['version']}, with the settings and versions below."
    )


def _cell_count(results: Results) -> str:
    """Say how many cells there are; of mapped ones, beside how many of the run."""
    own, run = results.design.own_cells, results.design.first_row
    return f"{whole(own)} mapped cells, beside {whole(run)} of the run" if run else f"{whole(own)} cells"


# --- words -----------------------------------------------------------------------------------------------------------


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
        *([(f"calls at adjusted p < {plots.SIGNIFICANT}", whole(called))] if data.tested else []),
    ]


def _summary(data: PageData) -> Iterator[str]:
    """Say what was found, a sentence or two per condition; of many conditions, of those with most called genes."""
    called_genes = (data.table["p_adjusted"] < plots.SIGNIFICANT).groupby(data.table["condition"]).sum()
    chosen = sorted(data.conditions, key=lambda name: -int(called_genes[name]))[:MOST_SUMMARISED]
    if data.screen is not None:
        yield _of_screen(data.screen)
    elif len(chosen) < len(data.conditions):
        yield (
            f"There are {len(data.conditions)} conditions; these sentences are of the {len(chosen)} with most called genes, "
            "the tables below of all."
        )
    for condition in chosen:
        parts = data.populations(condition)
        tested = [(name, part) for name, part in parts if part["p"].notna().any()]
        called = [(int((part["p_adjusted"] < plots.SIGNIFICANT).sum()), name) for name, part in tested]
        effect = plots.effect_column(data.table)
        if not tested:
            reason = f", since {_why_untested(data)}" if condition == chosen[0] or data.tested else ""
            named = f"{_strongest(parts, effect, data.labels)} {_steady(parts, data.labels)}".strip()
            yield f"{condition}: there are effects but no p-values{reason}. {named}"
            continue
        most_called = sorted((pair for pair in called if pair[0]), reverse=True)
        most = ", ".join(f"{name} ({number})" for number, name in most_called[:3])
        yield (
            f"{condition}: {len(tested)} of {len(parts)} populations could be tested with donors as replicates; "
            + (
                f"{len(most_called)} {'has' if len(most_called) == 1 else 'have'} genes that differ (most: {most}). "
                if most_called
                else "no gene's difference is significant in any of them, which does not show that there is none. "
            )
            + _strongest(tested, effect, data.labels)
        )


def _of_screen(screen: Screen) -> str:
    """Say how many conditions of a screen do anything, and what the rest of the page is of."""
    genes, number = screen.conditions["genes"], screen.detailed["condition"].nunique()
    how = "tests on donors" if screen.tested else "the sign test over cells, which describes and does not test"
    return (
        f"There are {len(genes)} conditions; {int((genes > 0).sum())} have genes that are called by {how} (median "
        f"{genes.median():.0f} genes a condition). One heat map and one table are of all; everything else on this page, these "
        f"sentences among it, is of the {number} with the largest effects."
    )


def _why_untested(data: PageData) -> str:
    return TOO_FEW_DONORS if data.donors else "nothing says who the donors are"


def _strongest(parts: Sequence[tuple[str, pd.DataFrame]], effect: str, labels: Mapping[str, str]) -> str:
    """Name the largest effects, of populations with enough on both sides, and of called genes where there are any."""
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
        return f"No population has {MIN_CELLS} cells on both sides, so no effect is named here."
    return f"Largest {'called ' if len(called) else ''}effects: {', '.join(names)}."


def _steady(parts: Sequence[tuple[str, pd.DataFrame]], labels: Mapping[str, str]) -> str:
    """Say which differences of donors' means keep their sign without any one donor: the most that two donors can show."""
    rows = pd.concat([part for _, part in parts])
    rows = rows[plots.well_founded(rows) & (rows[["treated_donors", "control_donors"]].min(axis=1) > 1)]
    stable = rows[rows["total_loo_low"] * rows["total_loo_high"] > 0]
    if stable.empty:
        return ""
    weaker = stable[["total_loo_low", "total_loo_high"]].abs().min(axis=1).to_numpy()
    named = [
        f"{labels.get(row['gene'], row['gene'])} in {row['population']} ({row['total_loo_low']:+.2f} to {row['total_loo_high']:+.2f})"
        for _, row in stable.iloc[np.argsort(-weaker, kind="stable")[:3]].iterrows()
    ]
    return (
        f"{whole(len(stable))} of {whole(len(rows))} differences of donors' means keep their sign whichever donor is left out, "
        f"which is no test: noise alone keeps many; the surest are {', '.join(named)}."
    )


def _warnings(data: PageData) -> Iterator[str]:
    mapped = data.results.mapped
    if mapped is not None and mapped.is_notable:
        yield _sentence(str(mapped))
    table = data.table.drop_duplicates(["population", "condition"])
    flags = {
        "few_donors": "with few donors (four a condition, or fewer), so that p-values are coarse or absent",
        "few_cells": "with fewer than 20 cells a donor, where effects within states and changes of state cannot be trusted",
        "impure": f"whose matches often lie in another population, so that effects mix kinds of cells ({remedy(data.results.matched_inside, data.by)})",
    }
    for flag in flags if data.donors else ["impure"]:
        names = list(dict.fromkeys(table.loc[table[flag].astype(bool), "population"].astype(str)))
        if names:
            shown = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
            yield f"{_plural(len(names), 'Population')} {flags[flag]}: {shown}."
    if data.chosen:
        yield (
            f"Populations are those of obs column “{data.by}”, which looked most like cell types; name another by --by."
            if data.by
            else "No column of obs looks like cell types, so all cells are one population; name one by --by. "
            "An average over kinds of cells can hide what happens in each."
        )


def _design(data: PageData) -> Iterator[str]:
    results = data.results
    if results.mapped is not None:
        yield (
            f"These cells were mapped onto {results.mapped.url}. Pictures of cells show them alone; effects, tests and diagnostics take the "
            "donors of that run in."
        )
        yield _sentence(str(results.mapped))
    yield data.diagnostics.donors
    yield {
        "no donors": "So there is no replicate to test with: effects describe these cells.",
        "nested": "Differences between donors and the effect of the condition can be told apart only by having several "
        "donors a condition.",
        "crossed": "Donors are their own controls.",
        "partly crossed": "Donors seen in both conditions are paired and the others left out of the test, or, where fewer than "
        f"{LEAST_DONORS} are seen in both and there are enough others, the others are compared and those left out: the "
        "tables name the test and who was left out.",
    }[data.diagnostics.layout]
    if data.donor_key:
        yield f"Donors are named by obs column “{data.donor_key}”."
    dropped = json.loads(str(results.uns.get("dropped", "{}")))
    if dropped:
        yield "Left out: " + "; ".join(f"{whole(n)} cells ({reason})" for reason, n in dropped.items()) + "."
    yield from (f"Note: {note}." for note in (*_notes(results), *data.diagnostics.notes))


def _notes(results: Results) -> list[str]:
    notes = results.uns.get("notes", [])
    return [str(note) for note in (json.loads(notes) if isinstance(notes, str) else notes)]


def _populations_note(data: PageData) -> str:
    if not data.by:
        return "All cells of a condition are one population."
    missing = int(data.results.packed_obs[data.by].isna().sum())
    left = f" {whole(missing)} cells have none and are left out." if missing else ""
    return f"Populations are the levels of obs column “{data.by}”.{left}"


def _genes_note(data: PageData) -> str:
    if data.tested:
        return (
            "The p-values compare donors: every donor's cells are asked the same questions through the matches, and the "
            "donors' labels are permuted, or, where these have too few permutations, a t-test compares donor means (the "
            "column “test” above says which). Beside them stand plain pseudobulk means."
        )
    return f"There are no p-values, since {_why_untested(data)}. What follows are effects alone."


def _genes(data: PageData) -> Iterator[tuple[str, str, Table]]:
    several = len(data.conditions) > 1
    yield from itertools.islice(_gene_tables(data, several=several), MOST_GENE_TABLES if data.screen else None)


def _gene_tables(data: PageData, *, several: bool) -> Iterator[tuple[str, str, Table]]:
    for condition in data.conditions:
        for name, part in data.populations(condition):
            row = part.iloc[0]
            donors = f", {row['treated_donors']} v {row['control_donors']} donors" if data.tested else ""
            method = "not tested" if row["p_method"] == "none" else row["p_method"]
            words = f"{whole(row['cells'])} cells{donors}, {method}"
            yield f"{name}: {condition}" if several else name, words, genes_table(part, TOP_GENES, data.labels)


def _trust(data: PageData) -> Iterator[str]:
    table = data.table
    both = table[["effect", "pseudobulk_effect"]].dropna()
    if data.tested and len(both) > 2:
        yield (
            f"Correlation of the effects through the matches with plain pseudobulk differences, over all genes and populations: "
            f"{both['effect'].corr(both['pseudobulk_effect']):.2f}. A low value means that matching changed the comparison: look whether it should have."
        )
    ratios = (table["sd_ite"] / table["sd_placebo"].where(table["sd_placebo"] > 0)).dropna()
    if len(ratios):
        yield (
            f"The spread of single cells' effects is {ratios.median():.2f} times that of a placebo (control donors against control "
            "donors; median over genes): near 1, nearly all of it is noise."
        )
    far = table.drop_duplicates(["population", "condition"])
    measured = far.dropna(subset=["without_overlap"])
    if measured.empty:
        yield "How many cells have no near control match is unknown."
        return
    share = float(np.average(measured["without_overlap"], weights=measured["cells"]))
    unknown = int(far["cells"].sum() - measured["cells"].sum())
    yield (
        f"{percent(share)} of the cells have no near control match; their effects lean on cells that are unlike them."
        + (f" Of {whole(unknown)} cells more it is unknown." if unknown else "")
    )


def _sentence(words: str) -> str:
    return f"{words[0].upper()}{words[1:]}."


def _plural(number: int, one: str, many: str | None = None) -> str:
    return one if number == 1 else many or f"{one}s"


# --- pictures --------------------------------------------------------------------------------------------------------


def _picture(title: str, caption: str, alt: str, draw: Callable[[], Axes | Sequence[Axes]]) -> Picture:
    """Draw a figure, or say why there is none."""
    try:
        axes = draw()
    except NDreamerError as error:
        return Picture(title, caption, alt, missing=str(error))
    figure = (axes if isinstance(axes, Axes) else axes[0]).get_figure(root=True)
    assert figure is not None  # noqa: S101 - it was drawn on
    data = figure_bytes(figure)
    plt.close(figure)
    width, height = (int.from_bytes(data[place : place + 4], "big") for place in (16, 20))  # of the PNG's header
    scale = SHOWN_DPI / DPI
    return Picture(title, caption, alt, base64.b64encode(data).decode(), round(width * scale), round(height * scale))


def _cell_pictures(data: PageData) -> Iterator[Picture]:
    results, design = data.results, data.results.design
    drawn = min(data.cells, design.own_cells)
    color = [
        *([keys.OBS_CONDITION] if data.screen is None else []),
        *([keys.OBS_BATCH] if len(design.batches) > 1 else []),
        *([data.by] if data.by else []),
    ]
    names = ", ".join(
        [
            *([design.condition_key] if data.screen is None else []),
            *(design.batch_keys if len(design.batches) > 1 else ()),
            *([data.by] if data.by else []),
        ]
    )
    yield _picture(
        "The embedding",
        f"What cells are, whatever their condition and batch, in the space that they were matched in, {results.space} "
        f"(UMAP of about {whole(drawn)} of {whole(design.own_cells)} cells). Conditions and batches should mix; kinds of cells should not. Distances in a UMAP mean little.",
        f"UMAP of the matching space, one panel each for {names}",
        lambda: plots.embedding(results, color, cells=data.cells),
    )


def _effect_pictures(data: PageData) -> Iterator[Picture]:
    top = [data.labels.get(gene, gene) for gene in plots.top_genes(plots.relied_on(data.table), 8)]
    yield _picture(
        f"Effects of {_named(data.conditions)} by population",
        "Top genes of every population, all on one scale; genes that behave alike stand together. "
        + ("A dot marks an adjusted donor-level p below 0.05. " if data.tested else "There are no p-values. ")
        + "Grey names: too few donors or cells on one side to rely on."
        + (
            f" {plots.MOST_ROWS} of {_rows(data)} rows are drawn, well-founded ones first."
            if _rows(data) > plots.MOST_ROWS
            else ""
        ),
        f"Heat map of effects of {_named(data.conditions)}, populations by genes, among them {', '.join(top)}",
        partial(plots.heatmap, data.results, data.by, condition=data.conditions, table=data.table),
    )


def _rows(data: PageData) -> int:
    return len(data.table[["population", "condition"]].drop_duplicates())


def _named(conditions: Sequence[str]) -> str:
    """Return the conditions' names, or how many there are."""
    return ", ".join(conditions) if len(conditions) <= MOST_IN_TITLE else f"{len(conditions)} conditions"


def _shows_decomposition(data: PageData) -> bool:
    """Return whether the page begins with effects in two parts: donors are nested, and there are tests of both."""
    return data.diagnostics.layout in ("nested", "partly crossed") and bool(data.table["within_state_p"].notna().any())


def _decomposition(data: PageData) -> Iterator[str]:
    """Say in plain words how many of the effects are changes of state."""
    if not _shows_decomposition(data):
        return
    for condition in data.conditions:
        words = data.table.loc[data.table["condition"] == condition, "reading"].value_counts()
        within, moved, both = (int(words.get(word, 0)) for word in ("within", "state", "both"))
        yield (
            f"{condition}: in {whole(within)} {_plural(within, 'case', 'cases')} (a gene in a population) cells of the same state "
            f"express a gene differently; in {whole(moved)} the gene differs because cells are in other states; in {whole(both)} both."
        )
    yield (
        "A gene of the second kind says what cells have become, not what the condition does to a cell of a given state: "
        "look for the state, not for the gene."
    )


def _decomposed(data: PageData) -> Iterator[tuple[Picture, Table]]:
    """Draw the populations with most genes of which a part stands, each with its table."""
    if not _shows_decomposition(data):
        return
    pairs = data.table[data.table["within_state_p"].notna()].groupby(["condition", "population"], sort=False)
    stands = pairs["reading"].agg(lambda words: words.isin(["within", "state", "both"]).sum())
    for pair in stands.sort_values(ascending=False, kind="stable").head(MOST_DECOMPOSED).index:
        condition, name = map(str, pair)
        picture = _picture(
            f"{name}, {condition}: within states or a change of state",
            "On the diagonal an effect lies within states, on the horizontal line it is a change of state. A point per gene.",
            f"Scatter plot of effects within states against total effects in {name} under {condition}",
            partial(plots.decomposition, data.results, name, data.by, condition=condition, table=data.table),
        )
        yield picture, decomposition_table(pairs.get_group(pair), TOP_GENES)


def _volcanoes(data: PageData) -> Iterator[Picture]:
    """Draw the populations with most called genes; where nothing was tested, effects alone of the largest ones."""
    if not data.tested:
        yield from _untested_effects(data)
        return
    pairs = data.table.groupby(["condition", "population"])
    called = pairs["p_adjusted"].agg(lambda p: (p < plots.SIGNIFICANT).sum())
    testable = called[pairs["p"].count() > 0].sort_values(ascending=False, kind="stable")
    for pair, number in testable.head(MOST_VOLCANOES).items():
        condition, name = map(str, pair)  # type: ignore[call-overload]
        yield _picture(
            f"{name}, {condition}",
            "Effect against donor-level p-value, a point per gene"
            + (f"; of {len(testable)}, the {MOST_VOLCANOES} with most called genes are drawn." if len(testable) > MOST_VOLCANOES else "."),
            f"Volcano plot of {name} under {condition}: {int(number)} genes with adjusted p below 0.05",
            partial(plots.volcano, data.results, name, data.by, condition=condition, table=data.table),
        )  # fmt: skip


def _untested_effects(data: PageData) -> Iterator[Picture]:
    pairs = data.table[plots.well_founded(data.table)].drop_duplicates(["population", "condition"])
    for _, row in pairs.sort_values("cells", ascending=False, kind="stable").head(MOST_VOLCANOES).iterrows():
        name, condition = str(row["population"]), str(row["condition"])
        yield _picture(
            f"{name}, {condition}: effects without a test",
            "Mean effect over cells against the share of cells that express the gene, a point per gene; the largest are named.",
            f"Scatter plot of mean effects in {name} under {condition}",
            partial(plots.effect_sizes, data.results, name, data.by, condition=condition, table=data.table),
        )


def _spreads(data: PageData) -> Iterator[Picture]:
    results, condition = data.results, data.conditions[0]
    genes = plots.top_genes(plots.relied_on(data.table[data.table["condition"] == condition]), MOST_SPREADS)
    yield _picture(
        f"How single cells' effects of {condition} are spread",
        "A violin per population, the dot its mean, the bar its middle half. Most of the spread is noise of single cells.",
        f"Violin plots of individual treatment effects of {', '.join(genes)}",
        lambda: plots.ite_distribution(results, genes, data.by, condition=condition),
    )
    if len(results.var_names) > 2:
        yield _picture(
            "Cells by their effects",
            "UMAP of the individual effects of all modelled genes: cells that respond alike are near each other.",
            "UMAP of individual treatment effects",
            lambda: plots.ite_embedding(results, [data.by] if data.by else None, cells=data.cells),
        )


def _trust_pictures(data: PageData) -> Iterator[Picture]:
    results, by = data.results, data.by
    yield _picture(
        "Overlap", "Distance of treated cells to their control matches; beyond the line a match is farther than 99 % of "
        "cells are from the nearest other cell of their own group. Effects of such cells are extrapolation.",
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
        "Calibration", f"Share of genes below each level with the donors' labels permuted, so that nothing is to be found. "
        f"At 0.05: {listed}. A permutation of donors holds its level by construction; only a model retrained on "
        "permuted labels would test the training, too.",
        "Line plot of the share of p-values below each level under permuted donor labels, by test",
        lambda: plots.null_calibration(results, by, table=null),
    )  # fmt: skip


def _spaces(results: Results) -> dict[str, Any]:
    """Return what `compare` found of the run's matching spaces, if it was asked and the results are still those."""
    run = plots.run_of(results)
    comparison = None if run is None else kept_comparison(RunDirectory(run), results)
    if comparison is None:
        return {"spaces": None}
    picture = _picture(
        "Matching spaces", "What was measured of each; the advised one in colour, a dot where a space is best or within a tie.",
        "Bar charts of the measures of every matching space", lambda: plots.spaces(comparison),
    )  # fmt: skip
    by = f"Populations: {comparison.populations}."
    return {"spaces": ([*comparison.sentences(), by], picture, comparison_table(comparison))}


def _matching_limit(data: PageData) -> tuple[str, str]:
    """Say what matching can lose in the space of the run, and whether these donors are of the kind that it concerns."""
    space = data.results.space
    if space == "harmony" or keys.is_trained(space):
        made = "that Harmony corrected for" if space == "harmony" else "that was trained to hold nothing of"
        says = (
            f"Cells are matched in an embedding {made} batch and condition. Where donors are nested in conditions, it may "
            "also have lost real differences of cell state between them, which then appear in the donor-level effects, as "
            "they do in plain means."
        )
        concerned = {
            "nested": "The donors here are nested, so this applies.",
            "partly crossed": "Some donors here are in one condition only, so this applies in part.",
        }
        return says, concerned.get(data.diagnostics.layout, "")
    if space == keys.STATE:
        return (
            "Cells are matched by what varies between cells of one control donor. A state that only treated cells have has no "
            "place of its own there; such cells are matched with the nearest state of control cells."
        ), ""
    return (
        f"Cells are matched in {space}, which is not corrected for batch and condition. Where these move cells far, the "
        "nearest cell may be of another state, and an effect may then be a difference of states."
    ), ""


def _training(data: PageData) -> Picture:
    if not keys.is_trained(data.results.space):
        why = f"Cells were matched in {data.results.space}, which is not trained."
        return Picture("Training", "", "", missing=why)
    return _picture(
        "Training", "Unweighted losses: steps pale, means of epochs strong. They should fall; what the codes tell of the "
        "clusters should rise, and many codes stay in use.",
        "Line plots of the training losses by step", lambda: plots.losses(data.results),
    )  # fmt: skip
