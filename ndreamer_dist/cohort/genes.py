"""The cohort stage: define the groups, select the cells and select the genes (METHOD sections 1.1 and 1.2).

Input: a source. Output: the design and the tables of cells, dropped cells and genes, below `DIR/cohort`. The stage
passes over the matrix once (twice with `min_cells`) and sums expression per group and gene. From these sums it selects
the same genes that scanpy's `seurat` flavour selects in memory with `batch_key=group` (`hvg.by`: by batch, or over all
cells).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from ndreamer_dist import keys
from ndreamer_dist.cohort.design import (
    EXCLUDED,
    Design,
    GroupedCells,
    build_design,
    excluded,
    pair_codes,
    report_design,
)
from ndreamer_dist.cohort.packed import write_tables
from ndreamer_dist.cohort.source import Source
from ndreamer_dist.cohort.statistics import Recipe, Scan, frame_of_cells, scan
from ndreamer_dist.cohort.tables import gene_places
from ndreamer_dist.cohort.values import Decision, decide_values
from ndreamer_dist.compute.executor import Runtime
from ndreamer_dist.errors import CohortError, listing, suggest
from ndreamer_dist.grouping.small_groups import SmallGroupsReport, first_reason, report_small_groups, why_left_out
from ndreamer_dist.rundir.directory import RunDirectory, Shard
from ndreamer_dist.rundir.stage import StageRun
from ndreamer_dist.settings import CohortSettings, HvgSettings, Settings

logger = logging.getLogger(__name__)

BINS = 20
"""Number of bins of mean expression inside which dispersions are normalised."""
LEAST_MEAN = 1e-12
"""Value that replaces a mean of 0, as in scanpy."""
NO_COUNTS = "no counts"
"""Reason for which a cell without a single count is left out."""
FILES = (keys.DESIGN_JSON, keys.GENES_TABLE, keys.CELLS_TABLE, keys.DROPPED, keys.COHORT_SUMMARY)


def run_cohort(run: RunDirectory, settings: Settings, source: Source, runtime: Runtime, key: str) -> Design:
    """Check the cohort, select its cells and genes, and write and return the design; a finished stage is only read.

    Raises
    ------
    CohortError
        The cohort cannot be used. Errors in names and shapes are raised before the matrix is read.
    """
    stage, shard = StageRun(run, keys.STAGE_COHORT, key), Shard("all", FILES)
    if not stage.begin([shard]):
        return Design.from_json(run.read_json(keys.DESIGN_JSON))
    cohort = settings.cohort
    check_cohort(source, cohort)
    kept_genes = check_genes(source, settings.hvg)
    decision = decide_values(source, cohort.normalise, cohort.log_base)
    source = source.in_natural_logs(decision.base)
    for note in (decision.seen, *source.notes):
        logger.info(note)
    pairs = pair_codes(source.cells, str(cohort.condition_column), cohort.batch_key)
    sums = _scanned(source, cohort, runtime, pairs, decision, kept_genes)
    keep, filtered = kept_cells(sums, cohort)
    grouped = build_design(source.cells, cohort, keep)
    grouped = replace(grouped, reasons=first_reason(filtered, grouped.reasons))
    genes = _selected(source, sums, grouped, kept_genes, settings)
    notes = [decision.seen, *source.notes, *_report(source, cohort, grouped, keep & (grouped.reasons != EXCLUDED))]
    if sums.repeated:
        notes.append(f"{sums.repeated} duplicate entries of a cell and gene were added to the first")
        logger.warning(notes[-1])
    summary = summary_of(cohort, decision, grouped, genes, notes)
    stage.mark(shard, write_cohort(run, source, grouped, sums, genes, summary))
    return grouped.design


def check_cohort(source: Source, cohort: CohortSettings) -> Design:
    """Check the names in obs without reading the matrix; return the design for the case that every cell is kept."""
    return build_design(source.cells, cohort).design


def input_groups(source: Source, cohort: CohortSettings) -> SmallGroupsReport:
    """Return the sizes of all groups of the input, and what happens to small ones."""
    every = ~excluded(source.cells, str(cohort.condition_column), cohort.exclude_conditions)
    return report_small_groups(source.cells, cohort, every)


def check_genes(source: Source, hvg: HvgSettings) -> np.ndarray:
    """Return which input genes `hvg.keep` names, which are always modelled: (genes,) bool.

    A gene may be named by its id, with or without its version, or by its symbol.

    Raises
    ------
    CohortError
        A name matches no gene, or several.
    """
    places = gene_places(source.gene_names, source.var, hvg.keep)
    absent = [name for name, rows in places.items() if not rows]
    if absent:
        near = suggest(absent[0], source.gene_names)
        msg = f"hvg.keep names {listing(absent)}, not among the {source.n_genes} genes of the cohort.{near}"
        raise CohortError(msg)
    several = [name for name, rows in places.items() if len(rows) > 1]
    if several:
        meant = listing(source.gene_names[places[several[0]]])
        msg = f"hvg.keep names {listing(several)}, which several genes are called; name one of them: {meant}"
        raise CohortError(msg)
    kept = np.zeros(source.n_genes, dtype=bool)
    kept[[rows[0] for rows in places.values()]] = True
    return kept


def seurat_hvg(
    groups: Iterable[tuple[np.ndarray, np.ndarray, int]],
    names: np.ndarray,
    num_hvg: int,
    *,
    keep: np.ndarray | None = None,
    unexpressed: bool = False,
) -> pd.DataFrame:
    """Select the most variable genes as scanpy's `seurat` flavour does with `batch_key=group` (METHOD section 1.2).

    Parameters
    ----------
    groups
        For each group: the sums over its cells of the expression without the log, (genes,) float64, the sums of its
        squares, (genes,) float64, and the number of cells.
    names
        (genes,) gene names; they break ties, as in scanpy.
    num_hvg
        Number of genes to select; all genes if there are no more.
    keep
        (genes,) bool, genes to select before any other; they count toward `num_hvg`.
    unexpressed
        Whether to include in the bins genes that no cell of a group expresses, as scanpy does without a `batch_key`.
        There scanpy selects every gene that ties with the last; here the names break ties.

    Returns
    -------
    One row per gene: `name`, `selected`, `mean` and `dispersion` (logarithms, averaged over groups), `dispersion_norm`
    (averaged) and `n_groups_variable`, the number of groups in which the gene is among the most variable.
    """
    averages = {name: _Average(len(names)) for name in ("mean", "dispersion", "norm")}
    times = np.zeros(len(names), dtype=np.int64)
    for sums, squares, cells in groups:
        statistics, variable = _group_statistics(sums, squares, cells, num_hvg, unexpressed)
        times += variable
        for name, average in averages.items():
            average.add(statistics[name])
    norm = averages["norm"].value()
    by_name = np.argsort(np.argsort(names, kind="stable"), kind="stable")
    first = np.zeros(len(names), dtype=bool) if keep is None else keep
    order = np.lexsort((by_name, np.where(np.isnan(norm), np.inf, -norm), -times, ~first))
    selected = np.zeros(len(names), dtype=bool)
    selected[order[:num_hvg]] = True
    return pd.DataFrame(
        {
            "name": names,
            "selected": selected,
            "mean": averages["mean"].value(),
            "dispersion": averages["dispersion"].value(),
            "dispersion_norm": norm,
            "n_groups_variable": times,
        }
    )


class _Average:
    """Running mean over groups of each gene's values that are not NaN; NaN for a gene without any."""

    def __init__(self, n_genes: int) -> None:
        self._sum, self._known = np.zeros(n_genes), np.zeros(n_genes)

    def add(self, values: np.ndarray) -> None:
        known = ~np.isnan(values)
        self._sum += np.where(known, values, 0.0)
        self._known += known

    def value(self) -> np.ndarray:
        with np.errstate(invalid="ignore"):
            return self._sum / self._known


def _group_statistics(
    sums: np.ndarray, squares: np.ndarray, cells: int, num_hvg: int, unexpressed: bool
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Return one group's `mean`, `dispersion` (logarithms) and `norm`, and which genes are most variable: (genes,)."""
    expressed = (sums > 0) | unexpressed
    mean = sums[expressed] / cells
    variance = squares[expressed] / cells - mean**2
    if cells > 1:
        variance = variance * (cells / (cells - 1))
    mean[mean == 0] = LEAST_MEAN
    with np.errstate(invalid="ignore", divide="ignore"):
        dispersion = variance / mean
        dispersion[dispersion == 0] = np.nan
        dispersion = np.log(dispersion)
    mean = np.log1p(mean)
    norm = _normalised_dispersion(mean, dispersion)
    # Genes that no cell of the group expresses get 0 in all columns, as in scanpy.
    table = {name: np.zeros(len(sums)) for name in ("mean", "dispersion", "norm")}
    for name, values in (("mean", mean), ("dispersion", dispersion), ("norm", norm)):
        table[name][expressed] = values
    variable = np.zeros(len(sums), dtype=bool)
    variable[expressed] = _top(norm, num_hvg)
    return table, variable


def _normalised_dispersion(mean: np.ndarray, dispersion: np.ndarray) -> np.ndarray:
    """Centre and scale log dispersions inside 20 bins of the log mean; a gene alone in its bin gets 1."""
    frame = pd.DataFrame({"bin": pd.cut(pd.Series(mean), bins=BINS), "dispersion": dispersion})
    inside = frame.groupby("bin", observed=True)["dispersion"]
    average, deviation = inside.transform("mean").to_numpy(), inside.transform("std").to_numpy()
    alone = np.isnan(deviation)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (dispersion - np.where(alone, 0.0, average)) / np.where(alone, average, deviation)


def _top(norm: np.ndarray, count: int) -> np.ndarray:
    """Return which values are at least the `count`-th highest, so ties with it are included; NaN never is."""
    known = np.sort(norm[~np.isnan(norm)])[::-1]
    if not known.size:
        return np.zeros(len(norm), dtype=bool)
    return np.nan_to_num(norm, nan=-np.inf) >= known[min(count, known.size) - 1]


# --- the stage's steps -------------------------------------------------------------------------------------------


def _scanned(
    source: Source,
    cohort: CohortSettings,
    runtime: Runtime,
    pairs: np.ndarray,
    decision: Decision,
    kept_genes: np.ndarray,
) -> Scan:
    """Pass over the matrix and return the sums; if `min_cells` removes genes, pass again without them."""
    matrix = source.task_matrix(runtime)
    sums = scan(source, matrix, pairs, Recipe.of(decision, cohort), runtime, title="cohort: values")
    left = _genes_left(sums, cohort, kept_genes)
    if left.all():
        return sums
    if not left.any():
        msg = f"no gene is expressed in {cohort.min_cells} cells (min_cells); lower it"
        raise CohortError(msg)
    return scan(source, matrix, pairs, Recipe.of(decision, cohort, left), runtime, title="cohort: genes left")


def _genes_left(sums: Scan, cohort: CohortSettings, kept_genes: np.ndarray) -> np.ndarray:
    """Return which genes pass `min_cells` or are always kept: (genes,) bool."""
    return np.asarray((sums.expressed >= cohort.min_cells) | kept_genes)


def kept_cells(sums: Scan, cohort: CohortSettings) -> tuple[np.ndarray, pd.Categorical[Any]]:
    """Return which cells have counts and pass `min_genes`, (cells,) bool, and why the others are left out."""
    few = f"fewer than {cohort.min_genes} genes"
    reasons = why_left_out(
        {
            NO_COUNTS: (sums.detected == 0) | ((sums.totals == 0) & (sums.detected >= cohort.min_genes)),
            few: sums.detected < cohort.min_genes,
        }
    )
    return reasons.codes == 0, reasons


def _selected(source: Source, sums: Scan, grouped: GroupedCells, keep: np.ndarray, settings: Settings) -> pd.DataFrame:
    """Select the modelled genes; return the table of all input genes, in input order."""
    hvg, left = settings.hvg, _genes_left(sums, settings.cohort, keep)
    sizes = np.array([group.cells for group in grouped.design.groups])
    names = source.gene_names.to_numpy(dtype=object)
    # Filter the genes group by group: a filtered copy of the sums would double the driver's largest tables.
    groups = (
        (sums.sums[rows].sum(axis=0)[left], sums.squares[rows].sum(axis=0)[left], int(sizes[members].sum()))
        for members, rows in _hvg_groups(grouped, sums.pairs, hvg)
    )
    table = seurat_hvg(groups, names[left], hvg.num_hvg, keep=keep[left], unexpressed=hvg.by == "none")
    full = table.set_index(np.flatnonzero(left)).reindex(np.arange(len(names)))
    full["name"] = names
    full["selected"] = full["selected"].eq(True)  # NaN for genes that were filtered out
    full["n_groups_variable"] = full["n_groups_variable"].fillna(0).astype(np.int32)
    full["cells"] = sums.expressed
    return full


def _hvg_groups(grouped: GroupedCells, pairs: np.ndarray, hvg: HvgSettings) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the sets of cells that `hvg.by` compares genes in, each as group codes and as rows of the sums (pairs)."""
    groups, kept, rows = grouped.groups, grouped.groups >= 0, int(pairs.max()) + 1
    together = pd.unique(groups[kept].astype(np.int64) * rows + pairs[kept])
    group, row = np.divmod(np.sort(together), rows)  # a group of merged batches has several rows
    batches = np.array([group.batch for group in grouped.design.groups])
    labels = {"group": np.arange(len(batches)), "batch": batches, "none": np.zeros(len(batches), np.int64)}[hvg.by]
    order = np.argsort(labels[group], kind="stable")
    starts = np.searchsorted(labels[group][order], np.unique(labels))
    members = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    return list(zip(members, np.split(row[order], starts[1:]), strict=True))


def _report(source: Source, cohort: CohortSettings, grouped: GroupedCells, keep: np.ndarray) -> list[str]:
    notes = report_design(grouped.design, report_small_groups(source.cells, cohort, keep))
    empty = grouped.reasons == NO_COUNTS
    if empty.any():
        first = source.cell_name(int(empty.argmax()))
        notes.append(f"{int(empty.sum())} cells without a single count left out, {first!r} first")
        logger.warning(notes[-1])
    return notes


def summary_of(
    cohort: CohortSettings, decision: Decision, grouped: GroupedCells, genes: pd.DataFrame, notes: list[str]
) -> dict[str, Any]:
    """Return the decisions of the cohort stage, for cohort/summary.json."""
    counts = grouped.reasons[grouped.reasons.codes > 0].value_counts()
    return {
        "normalise": decision.normalise,
        "normalise_asked": cohort.normalise,
        "values": decision.seen,
        **({"log_base": decision.base} if decision.base else {}),
        **({keys.UNS_SCALED: True} if decision.scaled else {}),
        "input_cells": len(grouped.reasons),
        "cells": grouped.design.n_cells,
        "input_genes": len(genes),
        "genes": int(genes["selected"].sum()),
        "dropped": {name: int(counts[name]) for name in sorted(counts.index) if counts[name]},
        "notes": notes,
    }


def write_cohort(
    run: RunDirectory,
    source: Source,
    grouped: GroupedCells,
    sums: Scan,
    genes: pd.DataFrame,
    summary: dict[str, Any],
) -> dict[str, str]:
    """Write the design, the summary and the tables of the stage; return the checksums of the tables."""
    rows, gone = np.flatnonzero(grouped.groups >= 0), np.flatnonzero(grouped.groups < 0)
    cells = frame_of_cells(rows, grouped.groups[rows], sums.totals[rows])
    dropped = pd.DataFrame({"input_row": gone, "name": source.names_of(gone), "reason": grouped.reasons[gone]}).astype(
        {"input_row": "int64", "name": "string", "reason": "string"}
    )
    run.write_json(keys.DESIGN_JSON, grouped.design.to_json())
    run.write_json(keys.COHORT_SUMMARY, summary)
    return write_tables(run, {keys.GENES_TABLE: genes, keys.CELLS_TABLE: cells, keys.DROPPED: dropped})
