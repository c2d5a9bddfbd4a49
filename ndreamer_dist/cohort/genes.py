"""The cohort stage: define the groups, select the cells and select the genes (METHOD sections 1.1 and 1.2).

Input: a source. Output: the design and the tables of cells, dropped cells and genes, below `DIR/cohort`. The stage
passes over the matrix once (twice with `min_cells`). It selects the genes that scanpy's `seurat` flavour selects in
memory with `batch_key=group` (`hvg.by`: by batch, or over all cells), and computes them from sums per group and gene.
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
"""Bins of mean expression in which dispersions are compared."""
LEAST_MEAN = 1e-12
"""Mean of a gene that no cell expresses, as in scanpy."""
NO_COUNTS = "no counts"
FILES = (keys.DESIGN_JSON, keys.GENES_TABLE, keys.CELLS_TABLE, keys.DROPPED, keys.COHORT_SUMMARY)


def run_cohort(run: RunDirectory, settings: Settings, source: Source, runtime: Runtime, key: str) -> Design:
    """Check the cohort, choose its cells and genes, and write the design; nothing is redone that is there.

    Raises
    ------
    CohortError
        The cohort cannot be used; whatever the names and shapes tell is told before the matrix is read.
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
    found = _scanned(source, cohort, runtime, pairs, decision, kept_genes)
    keep, dropped_for = kept_cells(found, cohort)
    made = build_design(source.cells, cohort, keep)
    made = replace(made, reasons=first_reason(dropped_for, made.reasons))
    genes = _selected(source, found, made, kept_genes, settings)
    notes = [decision.seen, *source.notes, *_report(source, cohort, made, keep & (made.reasons != EXCLUDED))]
    if found.repeated:
        notes.append(f"{found.repeated} values stood beside another of the same cell and gene; they were added up")
        logger.warning(notes[-1])
    summary = summary_of(cohort, decision, made, genes, notes)
    stage.mark(shard, write_cohort(run, source, made, found, genes, summary))
    return made.design


def check_cohort(source: Source, cohort: CohortSettings) -> Design:
    """Refuse what the names in obs tell, before the matrix is read; return the design if every cell were kept."""
    return build_design(source.cells, cohort).design


def input_groups(source: Source, cohort: CohortSettings) -> SmallGroupsReport:
    """Return the number of cells of every group of the input, whatever its size, and what is done with small ones."""
    every = ~excluded(source.cells, str(cohort.condition_column), cohort.exclude_conditions)
    return report_small_groups(source.cells, cohort, every)


def check_genes(source: Source, hvg: HvgSettings) -> np.ndarray:
    """Return which input genes are always modelled, (genes,) bool; `CohortError` names those that are not there.

    A gene may be named by its id, with or without its version, or by its symbol.
    """
    places = gene_places(source.gene_names, source.var, hvg.keep)
    absent = [name for name, found in places.items() if not found]
    if absent:
        near = suggest(absent[0], source.gene_names)
        msg = f"hvg.keep names {listing(absent)}, not among the {source.n_genes} genes of the cohort.{near}"
        raise CohortError(msg)
    several = [name for name, found in places.items() if len(found) > 1]
    if several:
        meant = listing(source.gene_names[places[several[0]]])
        msg = f"hvg.keep names {listing(several)}, which several genes are called; name one of them: {meant}"
        raise CohortError(msg)
    kept = np.zeros(source.n_genes, dtype=bool)
    kept[[found[0] for found in places.values()]] = True
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
        For each the sums over its cells of the expression, and of its square, without the log, (genes,) float64, and the number
        of cells.
    names
        (genes,) gene names; they break ties, as in scanpy.
    num_hvg
        How many genes to select; all, where there are no more.
    keep
        (genes,) bool, genes that are selected before any other; they count toward `num_hvg`.
    unexpressed
        Whether genes that no cell of a group expresses stand with the others in the bins, as in scanpy without a
        `batch_key`. There scanpy takes every gene that ties with the last; here the names decide.

    Returns
    -------
    A row per gene: `selected`, `mean` and `dispersion` (logarithms, averaged over groups), `dispersion_norm` and
    `n_groups_variable`, the number of groups in which the gene is among the most variable.
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
    """The mean over groups, gene by gene, of the values that are known; NaN where none is."""

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
    """Return one group's log mean, log dispersion and normalised dispersion, and its most variable genes: (genes,)."""
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
    # A gene that no cell of the group expresses counts as 0 everywhere, as in scanpy.
    table = {name: np.zeros(len(sums)) for name in ("mean", "dispersion", "norm")}
    for name, values in (("mean", mean), ("dispersion", dispersion), ("norm", norm)):
        table[name][expressed] = values
    variable = np.zeros(len(sums), dtype=bool)
    variable[expressed] = _top(norm, num_hvg)
    return table, variable


def _normalised_dispersion(mean: np.ndarray, dispersion: np.ndarray) -> np.ndarray:
    """Centre and scale dispersions inside 20 bins of the mean; a gene alone in its bin gets 1."""
    frame = pd.DataFrame({"bin": pd.cut(pd.Series(mean), bins=BINS), "dispersion": dispersion})
    inside = frame.groupby("bin", observed=True)["dispersion"]
    average, deviation = inside.transform("mean").to_numpy(), inside.transform("std").to_numpy()
    alone = np.isnan(deviation)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (dispersion - np.where(alone, 0.0, average)) / np.where(alone, average, deviation)


def _top(norm: np.ndarray, count: int) -> np.ndarray:
    """Return which values reach the `count`-th highest; ties with it included."""
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
    """Pass over the matrix, twice where genes are filtered first; return the sums over the genes left."""
    matrix = source.task_matrix(runtime)
    found = scan(source, matrix, pairs, Recipe.of(decision, cohort), runtime, title="cohort: values")
    left = _genes_left(found, cohort, kept_genes)
    if left.all():
        return found
    if not left.any():
        msg = f"no gene is expressed in {cohort.min_cells} cells (min_cells); lower it"
        raise CohortError(msg)
    return scan(source, matrix, pairs, Recipe.of(decision, cohort, left), runtime, title="cohort: genes left")


def _genes_left(found: Scan, cohort: CohortSettings, kept_genes: np.ndarray) -> np.ndarray:
    """Return which genes enough cells express, and those that are always kept: (genes,) bool."""
    return np.asarray((found.expressed >= cohort.min_cells) | kept_genes)


def kept_cells(found: Scan, cohort: CohortSettings) -> tuple[np.ndarray, pd.Categorical[Any]]:
    """Return which cells are kept before groups are looked at, and why the others are not (see `why_left_out`)."""
    few = f"fewer than {cohort.min_genes} genes"
    reasons = why_left_out(
        {
            NO_COUNTS: (found.detected == 0) | ((found.totals == 0) & (found.detected >= cohort.min_genes)),
            few: found.detected < cohort.min_genes,
        }
    )
    return reasons.codes == 0, reasons


def _selected(source: Source, found: Scan, made: GroupedCells, keep: np.ndarray, settings: Settings) -> pd.DataFrame:
    """Return the table of all input genes, in input order, with those selected among the genes left."""
    hvg, left = settings.hvg, _genes_left(found, settings.cohort, keep)
    sizes = np.array([group.cells for group in made.design.groups])
    names = source.gene_names.to_numpy(dtype=object)
    # Columns are cut group by group: these tables are the largest thing that the driver holds here.
    groups = (
        (found.sums[rows].sum(axis=0)[left], found.squares[rows].sum(axis=0)[left], int(sizes[members].sum()))
        for members, rows in _rows_looked_at(made, found.pairs, hvg)
    )
    table = seurat_hvg(groups, names[left], hvg.num_hvg, keep=keep[left], unexpressed=hvg.by == "none")
    full = table.set_index(np.flatnonzero(left)).reindex(np.arange(len(names)))
    full["name"] = names
    full["selected"] = full["selected"].eq(True)  # a gene filtered out holds NaN here
    full["n_groups_variable"] = full["n_groups_variable"].fillna(0).astype(np.int32)
    full["cells"] = found.expressed
    return full


def _rows_looked_at(made: GroupedCells, pairs: np.ndarray, hvg: HvgSettings) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the sets of cells inside which variability is looked at: codes of their groups, and rows of their sums."""
    groups, kept, rows = made.groups, made.groups >= 0, int(pairs.max()) + 1
    together = pd.unique(groups[kept].astype(np.int64) * rows + pairs[kept])
    found = np.stack(np.divmod(np.sort(together), rows))  # a group of merged batches has several rows
    batches = np.array([group.batch for group in made.design.groups])
    labels = {"group": np.arange(len(batches)), "batch": batches, "none": np.zeros(len(batches), np.int64)}[hvg.by]
    order = np.argsort(labels[found[0]], kind="stable")
    starts = np.searchsorted(labels[found[0]][order], np.unique(labels))
    members = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    return list(zip(members, np.split(found[1][order], starts[1:]), strict=True))


def _report(source: Source, cohort: CohortSettings, made: GroupedCells, keep: np.ndarray) -> list[str]:
    notes = report_design(made.design, report_small_groups(source.cells, cohort, keep))
    empty = made.reasons == NO_COUNTS
    if empty.any():
        first = source.cell_name(int(empty.argmax()))
        notes.append(f"{int(empty.sum())} cells without a single count left out, {first!r} first")
        logger.warning(notes[-1])
    return notes


def summary_of(
    cohort: CohortSettings, decision: Decision, made: GroupedCells, genes: pd.DataFrame, notes: list[str]
) -> dict[str, Any]:
    """Return what the cohort stage has decided, for cohort/summary.json."""
    counts = made.reasons[made.reasons.codes > 0].value_counts()
    return {
        "normalise": decision.normalise,
        "normalise_asked": cohort.normalise,
        "values": decision.seen,
        **({"log_base": decision.base} if decision.base else {}),
        **({keys.UNS_SCALED: True} if decision.scaled else {}),
        "input_cells": len(made.reasons),
        "cells": made.design.n_cells,
        "input_genes": len(genes),
        "genes": int(genes["selected"].sum()),
        "dropped": {name: int(counts[name]) for name in sorted(counts.index) if counts[name]},
        "notes": notes,
    }


def write_cohort(
    run: RunDirectory,
    source: Source,
    made: GroupedCells,
    found: Scan,
    genes: pd.DataFrame,
    summary: dict[str, Any],
) -> dict[str, str]:
    """Write what the stage has found; return the checksums of its tables."""
    rows, gone = np.flatnonzero(made.groups >= 0), np.flatnonzero(made.groups < 0)
    cells = frame_of_cells(rows, made.groups[rows], found.totals[rows])
    dropped = pd.DataFrame({"input_row": gone, "name": source.names_of(gone), "reason": made.reasons[gone]}).astype(
        {"input_row": "int64", "name": "string", "reason": "string"}
    )
    run.write_json(keys.DESIGN_JSON, made.design.to_json())
    run.write_json(keys.COHORT_SUMMARY, summary)
    return write_tables(run, {keys.GENES_TABLE: genes, keys.CELLS_TABLE: cells, keys.DROPPED: dropped})
