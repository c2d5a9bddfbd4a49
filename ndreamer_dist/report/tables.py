"""The tables of the report: cells of text that sort by their values. Names come from data and are not changed."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from natsort import index_natsorted

from ndreamer_dist import keys
from ndreamer_dist.cohort.design import Design
from ndreamer_dist.comparison.advice import MEASURES
from ndreamer_dist.comparison.screen import Screen, strongest
from ndreamer_dist.comparison.table import Comparison
from ndreamer_dist.compute.monitors import stage_costs
from ndreamer_dist.figures.plots import SIGNIFICANT, SMALLEST, effect_column, run_of
from ndreamer_dist.settings import Settings, bearing_settings
from ndreamer_dist.stats.diagnostics import Diagnostics
from ndreamer_dist.stats.results import MIN_CELLS, Results

EMPTY = "–"
LIKELY = ("celltype", "cellclass", "subclass", "annot", "cluster", "leiden", "louvain")
"""What columns that name kinds of cells are called, the likeliest first; letters only."""
MOST_KINDS = 60
LITTLE_OVERLAP = 0.1
"""Share of cells without a near control match from which on a population is flagged."""
CELLS_ONLY = "over cells: it describes, it does not test"

Show = Callable[[Any], str]


@dataclass(frozen=True)
class Cell:
    """What is shown, and what it sorts by."""

    text: str
    value: str = ""


@dataclass(frozen=True)
class Head:
    """A column's title and what it means."""

    title: str
    hint: str = ""
    number: bool = True


@dataclass(frozen=True)
class Table:
    """A table with a caption; every row has a cell per head."""

    caption: str
    heads: tuple[Head, ...]
    rows: tuple[tuple[Cell, ...], ...]


@dataclass(frozen=True)
class Column:
    """A column of a data frame in a table: its name there, its head, and how its values are shown."""

    name: str
    head: Head
    show: Show = str


def table_of(frame: pd.DataFrame, caption: str, columns: Sequence[Column]) -> Table:
    """Return a data frame as a table, with those of the columns that it has and that say something."""
    there = [column for column in columns if column.name in frame and frame[column.name].notna().any()]
    rows = tuple(
        tuple(_cell(value, column) for value, column in zip(row, there, strict=True))
        for row in frame[[column.name for column in there]].itertuples(index=False)
    )
    return Table(caption, tuple(column.head for column in there), rows)


def _cell(value: Any, column: Column) -> Cell:
    if not isinstance(value, str) and pd.isna(value):
        return Cell(EMPTY)
    return Cell(column.show(value), repr(float(value)) if column.head.number else str(value))


def whole(value: float) -> str:
    """Return a number of things, in groups of three digits."""
    return f"{int(value):,}"


def signed(value: float) -> str:
    """Return an effect."""
    return f"{value:+.3f}".replace("-", "−")


def plain(value: float) -> str:
    """Return a number in three digits."""
    return f"{value:.3g}".replace("-", "−")


def small(value: float) -> str:
    """Return a p-value."""
    if value < SMALLEST:
        return f"< {SMALLEST:.0e}"
    return f"{value:.2g}" if value >= 1e-4 else f"{value:.1e}"


def percent(value: float) -> str:
    """Return a share."""
    return f"{100 * value:.1f} %" if value < 0.1 else f"{100 * value:.0f} %"


def text(name: str, title: str, hint: str = "") -> Column:
    """Return a column of names."""
    return Column(name, Head(title, hint, number=False))


def number(name: str, title: str, show: Show, hint: str = "") -> Column:
    """Return a column of numbers."""
    return Column(name, Head(title, hint), show)


# --- what was measured -----------------------------------------------------------------------------------------------


def likely_populations(cells: pd.DataFrame, design: Design) -> str | None:
    """Return the column of obs that looks most like cell types.

    None where none does, or where most conditions of a screen have too few cells of each type to say anything of them.
    """
    name = _like_types(cells, design)
    if name is not None and design.is_screen:
        enough = 2 * MIN_CELLS * cells[name].nunique()
        return name if cells[keys.OBS_CONDITION].value_counts().median() >= enough else None
    return name


def _like_types(cells: pd.DataFrame, design: Design) -> str | None:
    best: tuple[int, str] | None = None
    for name in cells.columns:
        bare = re.sub("[^a-z]", "", str(name).lower())
        rank = next((place for place, likely in enumerate(LIKELY) if likely in bare), None)
        ours = str(name).startswith(keys.OBS_PREFIX) or name in (design.condition_key, *design.batch_keys)
        if rank is None or ours or not 2 <= cells[name].nunique() <= MOST_KINDS:
            continue
        if pd.api.types.is_float_dtype(cells[name]):
            continue
        best = min(best or (rank, str(name)), (rank, str(name)), key=lambda found: found[0])
    return best[1] if best else None


def effects(results: Results, by: str | None, condition: str | None, donor_key: str | None) -> pd.DataFrame:
    """Return the CATE table; where nothing says who the donors are, with effects alone."""
    return results.cate(by, condition=condition, donor_key=donors_or_conditions(results, donor_key))


def donors_or_conditions(results: Results, donor_key: str | None) -> str | None:
    """Return the column that names the donors; where nothing does, a condition is its only replicate, and there is no test."""
    nothing = donor_key is None and not results.design.batch_keys
    return keys.OBS_CONDITION if nothing else donor_key


def conditions_table(found: Screen, labels: Mapping[str, str]) -> Table:
    """Return a row per condition of a screen."""
    frame = found.conditions.rename_axis("condition").reset_index()
    frame["strongest"] = strongest(found.effects, labels)
    how = "donor-level test" if found.tested else f"sign test {CELLS_ONLY}"
    columns = [
        text("condition", "condition"), number("place", "place in the map", whole), number("cells", "cells", whole),
        number("donors", "donors", whole, "of the population with most"),
        number("size", "size of effect", plain, "over all genes, less what all conditions share and what noise of cells adds"),
        number("genes", "genes called", whole, f"in some population, by the {how}"),
        text("strongest", "largest effects of its own", "less the mean of all conditions"),
    ]  # fmt: skip
    return table_of(frame, "Conditions: how much each does", columns)


def groups_table(results: Results) -> Table:
    """Return the groups, a batch under a condition each; of mapped cells their own, and how far these are from the run's."""
    design, distance, mapped = results.design, results.packed_obs[keys.OBS_MATCH_DISTANCE], results.mapped
    groups, first = design.own_groups, design.first_row
    frame = pd.DataFrame(
        {
            "batch": [design.batches[group.batch] or None for group in groups],
            "condition": [design.conditions[group.condition] for group in groups],
            "cells": [group.cells for group in groups],
            "distance": [distance.iloc[group.start - first : group.stop - first].mean() for group in groups],
        }
    )
    if mapped is not None:
        for name, shares in (("far", mapped.far_by_group), ("unlike", mapped.unlike_by_group)):
            frame[name] = [(shares or {}).get(group.name) for group in groups]
    frame = frame.iloc[index_natsorted(frame["batch"].fillna(""))]
    key = " + ".join(design.batch_keys) or "batch"
    columns = [
        text("batch", key), text("condition", design.condition_key), number("cells", "cells", whole),
        number("distance", "distance to control", plain, "mean distance of a cell to its matches in the control groups"),
        *(_BELONGING if mapped is not None else ()),
    ]  # fmt: skip
    return table_of(frame, "Groups: a batch under a condition each", columns)


def populations_table(table: pd.DataFrame, *, donors: bool) -> Table:
    """Return a row per population and condition: who was tested, how, and how good the matches are.

    Parameters
    ----------
    donors
        Whether it is known who the donors are.
    """
    called = table["p_adjusted"].lt(SIGNIFICANT).groupby([table["population"], table["condition"]]).sum()
    frame = table.drop_duplicates(["population", "condition"])
    frame = frame.iloc[index_natsorted(zip(frame["population"], frame["condition"], strict=True))].copy()
    frame["called"] = [called[pair] for pair in zip(frame["population"], frame["condition"], strict=True)]
    frame["called"] = frame["called"].astype(float).where(frame["p_method"] != "none")
    frame["flags"] = [", ".join(_flags(row, donors)) or EMPTY for _, row in frame.iterrows()]
    columns = [
        text("population", "population"), text("condition", "condition"), number("cells", "cells", whole),
        *(_TESTED if donors else ()),
        number("match_purity", "match purity", percent, "share of control matches inside the population"),
        number("effective_control_cells", "control cells used", whole, "effective number of matched control cells"),
        number("without_overlap", "without overlap", percent, "share of cells without a near control match"),
        text("flags", "beware", "what weakens the result"),
    ]  # fmt: skip
    return table_of(frame, "Populations: who was compared, and how good the matches are", columns)


def _flags(row: pd.Series, donors: bool) -> list[str]:
    flags = {
        "few donors": donors and bool(row["few_donors"]),
        "impure matches": bool(row["impure"]),
        "little overlap": bool(row["without_overlap"] > LITTLE_OVERLAP),
        f"left out: {row['donors_left_out']}": donors and bool(row["donors_left_out"]),
    }
    return [flag for flag, raised in flags.items() if raised]


def diagnostics_tables(told: Diagnostics) -> list[Table]:
    """Return the tables of the diagnostics: groups, and how well batches mix."""
    groups = [
        text("group", "group"), number("cells", "cells", whole),
        number("overlap", "with overlap", percent, "share of cells with a near control match"),
        number("match_distance", "match distance", plain, "median distance to the control matches"),
        number("own_distance", "own distance", plain, "median distance to the nearest other cell of the group"),
        number("times_matched_mean", "times used", plain, "how often one of its cells is a match, mean"),
        number("times_matched_max", "at most", whole, "how often its most used cell is a match"),
        number("never_matched", "never used", percent, "share of its cells that are nobody's match"),
        number("effective_cells", "effective cells", whole, "how many cells used alike would carry as much"),
        number("effective_controls", "effective controls", whole, "the same of the control cells that its cells match"),
        number("correlation", "denoised v raw", plain, "correlation of denoised with raw expression, mean over cells"),
        number("squared_difference", "squared change", plain, "mean squared difference of denoised and raw expression"),
    ]  # fmt: skip
    mixing = [
        text("condition", "condition"), number("batches", "batches", whole), number("cells", "cells looked at", whole),
        number("expected", "if mixed at random", percent), number("input", "input", percent),
        number("embedding", "embedding", percent),
    ]  # fmt: skip
    tables = [table_of(told.groups, "Groups: overlap, reuse of cells as matches, and what denoising changed", groups)]
    if told.mixing["embedding"].notna().any():
        caption = (
            "Mixing: share of the 15 nearest neighbours that are of other batches, within condition and population"
        )
        tables.append(table_of(told.mixing, caption, mixing))
    return tables


def genes_table(part: pd.DataFrame, most: int, labels: Mapping[str, str]) -> Table:
    """Return the top genes of one population and condition, the donor-level test first.

    Parameters
    ----------
    labels
        What genes are called, by name, where that is not their name.
    """
    tested = bool(part["p"].notna().any())
    effect = effect_column(part)
    order = part.assign(_p=part["p"].fillna(1), _size=-part[effect].abs()).sort_values(["_p", "_size"], kind="stable")
    caption = f"The first {min(most, len(part))} of {len(part)} genes, by " + (
        "donor-level p-value" if tested else "size of the mean effect; there are no p-values"
    )
    columns = [
        text("gene", "gene"),
        *(_DONORS if tested else []),
        number("mean_ite", "mean effect", signed, "mean of the cells' individual effects"),
        number("sd_ite", "spread", plain, "standard deviation of individual effects; mostly noise of single cells"),
        number("sd_placebo", "placebo spread", plain, "the same of control donors against control donors"),
        number("log2_fold_change", "log2 fold change", signed, "of mean counts, as measured"),
        number("expressing", "expressing", percent, "share of treated cells that express the gene"),
        number("expressing_control", "in control", percent, "share of control cells that express the gene"),
        *(_PSEUDOBULK if tested else []),
        number("sign_z", "sign z", lambda z: signed(z)[:-2], f"sign test {CELLS_ONLY}"),
        number("sign_p", "sign p", small, f"sign test {CELLS_ONLY}"),
    ]
    top = order.head(most)
    return table_of(top.assign(gene=[labels.get(gene, gene) for gene in top["gene"]]), caption, columns)


def decomposition_table(part: pd.DataFrame, most: int) -> Table:
    """Return the genes of one population and condition of which a part of the effect stands, then the largest totals."""
    stands = part["reading"].isin(["within", "state", "both"])
    order = part.assign(_stands=~stands, _size=-part["total"].abs()).sort_values(["_stands", "_size"], kind="stable")
    caption = f"Effects in two parts: the first {min(most, len(part))} of {len(part)} genes, those first of which a part stands"
    parts = (
        ("total", "total", "of donors' plain means"), ("within_state", "within states", "between cells of the same state"),
        ("state_shift", "by change of state", "what comes of cells being in other states"),
    )  # fmt: skip
    columns = [text("gene", "gene"), text("reading", "reading", "which parts stand at an adjusted p of 0.05")]
    for name, title, hint in parts:
        columns += [
            number(name, title, signed, hint),
            number(f"{name}_p_adjusted", "adjusted p", small, f"of it, {hint}"),
        ]
    columns += [
        number("within_state_loo_low", "least without a donor", signed, "effect within states, the least without any one donor"),
        number("within_state_loo_high", "most", signed, "the same, the most"),
    ]  # fmt: skip
    return table_of(order.head(most), caption, columns)


_DONORS = (
    number("effect", "effect", signed, "mean of treated minus control donors, through the matches"),
    number("p", "p (donors)", small, "donors as replicates: the test to report"),
    number("p_adjusted", "adjusted p", small, "Benjamini-Hochberg over the genes of this population"),
)
_TESTED = (
    number("treated_donors", "donors", whole, "treated donors with enough cells of the population"),
    number("control_donors", "control donors", whole, "control donors with enough cells of the population"),
    text("p_method", "test", "where the p-values come from"),
    number("p_floor", "smallest p", lambda p: small(p) if p else EMPTY, "the smallest that so many donors allow"),
    number("called", "genes called", whole, f"adjusted donor-level p below {SIGNIFICANT}"),
)
_BELONGING = (
    number("far", "far", percent, "share of cells farther from the run's controls than 99 % of the run's own cells"),
    number(
        "unlike", "unlike", percent, "share of cells less like their control matches than 99 % of the run's own cells"
    ),
)
_PSEUDOBULK = (
    number("pseudobulk_effect", "pseudobulk effect", signed, "of plain donor means, without matching"),
    number("pseudobulk_p", "pseudobulk p", small, "the same test on plain donor means"),
)


# --- how it was made -------------------------------------------------------------------------------------------------


def settings_table(results: Results) -> Table:
    """Return the settings that bear on the result, with what they mean; those that are not the default are marked."""
    lines = [("seed", str(results.uns["seed"]), "", "seed of everything random")]
    for stage, values in bearing_settings(results.uns).items():
        kind = Settings.model_fields[stage].annotation if stage in Settings.model_fields else None
        for name, value in values.items():
            field = getattr(kind, "model_fields", {}).get(name)
            default = field.get_default() if field else value
            default = list(default) if isinstance(default, tuple) else default
            changed = "" if value == default else "changed"
            lines.append((f"{stage}.{name}", _setting(value), changed, (field.description or "") if field else ""))
    frame = pd.DataFrame(lines, columns=["setting", "value", "changed", "meaning"])
    columns = [
        text("setting", "setting"),
        text("value", "value"),
        text("changed", "default?"),
        text("meaning", "what it is"),
    ]
    return table_of(frame, "Settings that bear on the result", columns)


def _setting(value: Any) -> str:
    return ", ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)


def timings_table(results: Results) -> Table | None:
    """Return what the stages took, from the run's log; none where results lie apart from their run."""
    run = run_of(results)
    if run is None:
        return None
    frame = stage_costs(run)
    if frame.empty:
        return None
    columns = [
        text("stage", "stage"),
        number("seconds", "seconds", lambda value: f"{value:.1f}", "of the call that finished the stage"),
        number("peak_gb", "peak memory", lambda value: f"{value:.2f} GB", "of the driver's machine, all processes"),
        text("engine", "worked on"),
    ]
    return table_of(frame, "What the stages took", columns)


def comparison_table(comparison: Comparison) -> Table:
    """Return what was measured of every matching space."""
    columns = [number(measure.name, measure.title, plain, measure.meaning) for measure in MEASURES]
    return table_of(comparison.table, "Matching spaces", [text("space", "space"), *columns])
