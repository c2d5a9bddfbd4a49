"""The tables of the report. Each table cell has a text to show and a value to sort by; names from data stay as is."""

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
"""Text of a missing value."""
LIKELY = ("celltype", "cellclass", "subclass", "annot", "cluster", "leiden", "louvain")
"""Parts of the names of columns with cell types, in letters only, the most likely first."""
MOST_KINDS = 60
"""Most values of a column with cell types."""
LITTLE_OVERLAP = 0.1
"""Share of cells without a near control match above which a population is flagged."""
CELLS_ONLY = "over cells: it describes, it does not test"

Show = Callable[[Any], str]


@dataclass(frozen=True)
class Cell:
    """A table cell: the text to show, and the value to sort by."""

    text: str
    value: str = ""


@dataclass(frozen=True)
class Head:
    """A column's title, its meaning, and whether it holds numbers."""

    title: str
    hint: str = ""
    number: bool = True


@dataclass(frozen=True)
class Table:
    """A table with a caption; every row has one cell per head."""

    caption: str
    heads: tuple[Head, ...]
    rows: tuple[tuple[Cell, ...], ...]


@dataclass(frozen=True)
class Column:
    """A column of a table: its name in the data frame, its head, and the function that formats its values."""

    name: str
    head: Head
    show: Show = str


def table_of(frame: pd.DataFrame, caption: str, columns: Sequence[Column]) -> Table:
    """Return a data frame as a table, without columns that the frame lacks or that are all NaN."""
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
    """Return a count with thousands separators."""
    return f"{int(value):,}"


def signed(value: float) -> str:
    """Return an effect with its sign and three decimals."""
    return f"{value:+.3f}".replace("-", "−")


def plain(value: float) -> str:
    """Return a number with three significant digits."""
    return f"{value:.3g}".replace("-", "−")


def small(value: float) -> str:
    """Return a p-value with two significant digits."""
    if value < SMALLEST:
        return f"< {SMALLEST:.0e}"
    return f"{value:.2g}" if value >= 1e-4 else f"{value:.1e}"


def percent(value: float) -> str:
    """Return a share in percent."""
    return f"{100 * value:.1f} %" if value < 0.1 else f"{100 * value:.0f} %"


def text(name: str, title: str, hint: str = "") -> Column:
    """Return a column of names."""
    return Column(name, Head(title, hint, number=False))


def number(name: str, title: str, show: Show, hint: str = "") -> Column:
    """Return a column of numbers."""
    return Column(name, Head(title, hint), show)


# --- results ---------------------------------------------------------------------------------------------------------


def likely_populations(cells: pd.DataFrame, design: Design) -> str | None:
    """Return the column of obs that looks most like cell types, or None.

    It is also None for a screen in which most conditions have too few cells per cell type.
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
    """Return the CATE table; without known donors it has effects but no p-values."""
    return results.cate(by, condition=condition, donor_key=donors_or_conditions(results, donor_key))


def donors_or_conditions(results: Results, donor_key: str | None) -> str | None:
    """Return the column of donors; without one, the condition column, so that each condition is a single replicate."""
    unknown = donor_key is None and not results.design.batch_keys
    return keys.OBS_CONDITION if unknown else donor_key


def conditions_table(screen: Screen, labels: Mapping[str, str]) -> Table:
    """Return the table of a screen, a row per condition."""
    frame = screen.conditions.rename_axis("condition").reset_index()
    frame["strongest"] = strongest(screen.effects, labels)
    how = "donor-level test" if screen.tested else f"sign test {CELLS_ONLY}"
    columns = [
        text("condition", "condition"), number("place", "position", whole, "row of the heat map, from the top"),
        number("cells", "cells", whole), number("donors", "donors", whole, "in the population with most donors"),
        number("size", "effect size", plain, "norm of the specific effect over genes, corrected for noise of cells"),
        number("genes", "significant genes", whole, f"in any population, by the {how}"),
        text("strongest", "largest specific effects", "mean effect minus the mean over all conditions"),
    ]  # fmt: skip
    return table_of(frame, "Conditions: size of the effect of each", columns)


def groups_table(results: Results) -> Table:
    """Return the table of groups: batch and condition, cells, and distance to the control matches.

    For mapped cells it has their own groups, and how far these are from the cells of the run.
    """
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
    return table_of(frame, "Groups: one per batch and condition", columns)


def populations_table(table: pd.DataFrame, *, donors: bool) -> Table:
    """Return the table of populations: donors, test, significant genes, and quality of the matches.

    Parameters
    ----------
    table
        The CATE table.
    donors
        Whether the donors are known.
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
        number("effective_control_cells", "effective controls", whole, "effective number of matched control cells"),
        number("without_overlap", "without overlap", percent, "share of cells without a near control match"),
        text("flags", "caution", "what weakens the result"),
    ]  # fmt: skip
    return table_of(frame, "Populations: the donors compared, and the quality of the matches", columns)


def _flags(row: pd.Series, donors: bool) -> list[str]:
    flags = {
        "few donors": donors and bool(row["few_donors"]),
        "impure matches": bool(row["impure"]),
        "little overlap": bool(row["without_overlap"] > LITTLE_OVERLAP),
        f"left out: {row['donors_left_out']}": donors and bool(row["donors_left_out"]),
    }
    return [flag for flag, raised in flags.items() if raised]


def diagnostics_tables(diagnostics: Diagnostics) -> list[Table]:
    """Return the tables of the diagnostics: groups, and mixing of batches."""
    groups = [
        text("group", "group"), number("cells", "cells", whole),
        number("overlap", "with overlap", percent, "share of cells with a near control match"),
        number("match_distance", "match distance", plain, "median distance to the control matches"),
        number("own_distance", "own distance", plain, "median distance to the nearest other cell of the group"),
        number("times_matched_mean", "times matched", plain, "number of times that a cell is a match, mean over cells"),
        number("times_matched_max", "maximum", whole, "number of times that the most used cell is a match"),
        number("never_matched", "never matched", percent, "share of the group's cells that are the match of no cell"),
        number("effective_cells", "effective cells", whole, "effective number of the group's cells that are matches"),
        number("effective_controls", "effective controls", whole, "effective number of its control matches"),
        number("correlation", "denoised vs raw", plain, "correlation of denoised with raw expression, mean over cells"),
        number("squared_difference", "squared change", plain, "mean squared difference of denoised and raw expression"),
    ]  # fmt: skip
    mixing = [
        text("condition", "condition"), number("batches", "batches", whole), number("cells", "sampled cells", whole),
        number("expected", "mixed at random", percent, "share expected if batches were mixed at random"),
        number("input", "input", percent, "in principal components of the input expression"),
        number("embedding", "embedding", percent, "in the matching space"),
    ]  # fmt: skip
    tables = [
        table_of(diagnostics.groups, "Groups: overlap, reuse of cells as matches, and what denoising changed", groups)
    ]
    if diagnostics.mixing["embedding"].notna().any():
        caption = (
            "Mixing: share of the 15 nearest neighbours that are of other batches, within condition and population"
        )
        tables.append(table_of(diagnostics.mixing, caption, mixing))
    return tables


def genes_table(part: pd.DataFrame, most: int, labels: Mapping[str, str]) -> Table:
    """Return the table of top genes of one population and condition, by donor-level p-value or, without, by effect.

    Parameters
    ----------
    part
        Rows of the CATE table.
    most
        Most genes in the table.
    labels
        Symbols of genes by name, where they differ.
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
        number(
            "sd_ite", "SD", plain, "standard deviation of the cells' individual effects; mostly noise of single cells"
        ),
        number("sd_placebo", "placebo SD", plain, "the same for control donors against other control donors"),
        number("log2_fold_change", "log2 fold change", signed, "of the mean measured counts"),
        number("expressing", "expressing", percent, "share of treated cells that express the gene"),
        number("expressing_control", "in control", percent, "share of control cells that express the gene"),
        *(_PSEUDOBULK if tested else []),
        number("sign_z", "sign z", lambda z: signed(z)[:-2], f"sign test {CELLS_ONLY}"),
        number("sign_p", "sign p", small, f"sign test {CELLS_ONLY}"),
    ]
    return table_of(_first_genes(order, most, labels), caption, columns)


def _first_genes(part: pd.DataFrame, most: int, labels: Mapping[str, str]) -> pd.DataFrame:
    """Return the first rows, with the genes by their symbols."""
    top = part.head(most)
    return top.assign(gene=[labels.get(gene, gene) for gene in top["gene"]])


def decomposition_table(part: pd.DataFrame, most: int, labels: Mapping[str, str]) -> Table:
    """Return the table of decomposed effects, for the arguments of `genes_table`; genes with a significant part come first."""
    stands = part["reading"].isin(["within", "state", "both"])
    order = part.assign(_stands=~stands, _size=-part["total"].abs()).sort_values(["_stands", "_size"], kind="stable")
    caption = (
        f"Effects in two parts: the first {min(most, len(part))} of {len(part)} genes; those with a significant part "
        "come first"
    )
    parts = (
        ("total", "total", "difference of donors' plain means"),
        ("within_state", "within states", "difference between cells of the same state"),
        ("state_shift", "by change of state", "difference because cells are in other states"),
    )
    columns = [text("gene", "gene"), text("reading", "reading", "the parts with an adjusted p of at most 0.05")]
    for name, title, hint in parts:
        columns += [
            number(name, title, signed, hint),
            number(f"{name}_p_adjusted", "adjusted p", small, f"adjusted p of the {hint}"),
        ]
    columns += [
        number("within_state_loo_low", "lowest", signed, "lowest effect within states when one donor is left out"),
        number("within_state_loo_high", "highest", signed, "highest effect within states when one donor is left out"),
    ]  # fmt: skip
    return table_of(_first_genes(order, most, labels), caption, columns)


_DONORS = (
    number("effect", "effect", signed, "treated minus control donors, means through the matches"),
    number("p", "p (donors)", small, "p-value with donors as replicates: the test to report"),
    number("p_adjusted", "adjusted p", small, "Benjamini-Hochberg over the genes of this population"),
)
_TESTED = (
    number("treated_donors", "donors", whole, "treated donors with enough cells of the population"),
    number("control_donors", "control donors", whole, "control donors with enough cells of the population"),
    text("p_method", "test", "the test behind the p-values"),
    number(
        "p_floor",
        "smallest p",
        lambda p: small(p) if p else EMPTY,
        "smallest p-value that this number of donors allows",
    ),
    number("called", "significant genes", whole, f"genes with an adjusted donor-level p below {SIGNIFICANT}"),
)
_BELONGING = (
    number("far", "far", percent, "share of cells farther from the run's controls than 99 % of the run's own cells"),
    number(
        "unlike", "unlike", percent, "share of cells less like their control matches than 99 % of the run's own cells"
    ),
)
_PSEUDOBULK = (
    number(
        "pseudobulk_effect", "pseudobulk effect", signed, "treated minus control donors, plain means without matching"
    ),
    number("pseudobulk_p", "pseudobulk p", small, "the same donor-level test on plain means"),
)


# --- how it was made -------------------------------------------------------------------------------------------------


def settings_table(results: Results) -> Table:
    """Return the table of settings that affect the results; those that differ from the default are marked."""
    lines = [("seed", str(results.uns["seed"]), "", "seed of all random numbers")]
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
        text("meaning", "meaning"),
    ]
    return table_of(frame, "Settings that affect the results", columns)


def _setting(value: Any) -> str:
    return ", ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)


def timings_table(results: Results) -> Table | None:
    """Return the table of the stages' times and memory from the run's log; None without a log."""
    run = run_of(results)
    if run is None:
        return None
    frame = stage_costs(run)
    if frame.empty:
        return None
    columns = [
        text("stage", "stage"),
        number("seconds", "seconds", lambda value: f"{value:.1f}", "run time of the call that finished the stage"),
        number("peak_gb", "peak memory", lambda value: f"{value:.2f} GB", "all processes on the driver's machine"),
        text("engine", "runtime"),
    ]
    return table_of(frame, "Run time and memory of the stages", columns)


def comparison_table(comparison: Comparison) -> Table:
    """Return the table of measures, a row per matching space."""
    columns = [number(measure.name, measure.title, plain, measure.meaning) for measure in MEASURES]
    return table_of(comparison.table, "Matching spaces", [text("space", "space"), *columns])
