"""The stage `cohort` for cells that are mapped onto a finished run: their groups, their totals and the run's genes.

Input: a source and the run. Output: the same files as the cohort stage of a run. Values are normalised as in the run.
"""

from __future__ import annotations

import itertools
import logging
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from ndreamer_dist import keys
from ndreamer_dist.cohort.design import Design
from ndreamer_dist.cohort.genes import FILES, NO_COUNTS, kept_cells, summary_of, write_cohort
from ndreamer_dist.cohort.packed import read_table
from ndreamer_dist.cohort.source import Source
from ndreamer_dist.cohort.statistics import Recipe, scan
from ndreamer_dist.cohort.tables import gene_places
from ndreamer_dist.cohort.values import Decision, decide_values
from ndreamer_dist.compute.executor import Runtime
from ndreamer_dist.errors import CohortError, listing
from ndreamer_dist.grouping.small_groups import first_reason
from ndreamer_dist.mapping.design import mapped_design
from ndreamer_dist.mapping.reference import Reference
from ndreamer_dist.rundir.directory import RunDirectory, Shard
from ndreamer_dist.rundir.stage import StageRun
from ndreamer_dist.settings import CohortSettings

logger = logging.getLogger(__name__)

NAMED_GENES = 20
"""Most missing genes that a message names."""


@dataclass(frozen=True)
class Genes:
    """The run's modelled genes in a cohort.

    Attributes
    ----------
    names
        (input genes,) the run's name of each gene of the cohort; None for a gene that the run does not model.
    missing
        Modelled genes that the cohort lacks.
    """

    names: np.ndarray
    missing: tuple[str, ...]


@dataclass(frozen=True)
class NewCells:
    """A cohort to map.

    Attributes
    ----------
    source
        The input.
    genes
        The run's genes in it.
    controls_first
        Whether its control groups come before its other groups, which are then matched with them too.
    """

    source: Source
    genes: Genes
    controls_first: bool


def genes_of(source: Source, modelled: tuple[str, ...], fill: float) -> Genes:
    """Find the run's genes in a cohort, by name, id or symbol.

    Parameters
    ----------
    modelled
        Names of the genes that the run models.
    fill
        Largest share of these genes that may be missing; missing genes count as zeros.

    Raises
    ------
    CohortError
        More genes are missing; a name is ambiguous in the cohort; or two names mean one gene.
    """
    places = gene_places(source.gene_names, source.var, modelled)
    missing = tuple(name for name in modelled if not places[name])
    several = [name for name in modelled if len(places[name]) > 1]
    if several:
        meant = listing(source.gene_names[places[several[0]]])
        msg = (
            f"{listing(several[:1])} of the run's genes may be several of {source.name}: {meant}; leave one of them in"
        )
        raise CohortError(msg)
    share = len(missing) / len(modelled)
    named = listing(missing, limit=NAMED_GENES)
    if share > fill:
        msg = (
            f"{source.name} lacks {len(missing)} of the {len(modelled)} genes that the run models ({share:.2%}): "
            f"{named}; --fill-missing-genes {np.ceil(share * 1000) / 1000:g} takes them as zeros (or name genes by "
            "another column: --gene-names)"
        )
        raise CohortError(msg)
    if missing:
        logger.warning(
            "map: %d of the run's %d genes are missing and count as zeros: %s", len(missing), len(modelled), named
        )
    names = np.full(source.n_genes, None, dtype=object)
    for name, place in ((name, found[0]) for name, found in places.items() if found):
        if names[place] is not None:
            msg = (
                f"{names[place]!r} and {name!r} of the run's genes are the same gene of {source.name}, "
                f"{source.gene_names[place]!r}; name the genes as the run's cohort does"
            )
            raise CohortError(msg)
        names[place] = name
    return Genes(names, missing)


def values_of(source: Source, reference: Reference, cohort: CohortSettings) -> Decision:
    """Return how to normalise the values, as in the run; raise `CohortError` if the input does not allow that."""
    normalise = reference.home.read_json(keys.COHORT_SUMMARY)["normalise"]
    try:
        return decide_values(source, normalise, cohort.log_base)
    except CohortError as error:
        what = "counts" if normalise == "counts" else "log-normalised values"
        msg = f"the run was made of {what}, and cells are mapped onto it by the same: {error}"
        raise CohortError(msg) from error


def refuse_known_cells(source: Source, reference: Reference) -> None:
    """Raise `CohortError` if a cell has the name of a cell of the run."""
    twice = source.cell_names[source.cell_names.isin(reference.cell_names)]
    if len(twice):
        msg = (
            f"{len(twice)} cells are in the run already, {str(twice[0])!r} first; leave them out, or rename cells that "
            "only share a name"
        )
        raise CohortError(msg)


def run_mapped_cohort(
    stage: StageRun, cohort: CohortSettings, new: NewCells, reference: Reference, runtime: Runtime
) -> Design:
    """Check the new cells, assign their groups, write the tables and return the design; skip all if already done."""
    run, shard, source, genes = stage.run, Shard("all", FILES), new.source, new.genes
    if not stage.begin([shard]):
        return Design.from_json(run.read_json(keys.DESIGN_JSON))
    decision = values_of(source, reference, cohort)
    source = source.in_natural_logs(decision.base)
    recipe = Recipe.of(decision, cohort, counted_genes(reference.home, source, cohort))
    one = np.zeros(source.n_cells, dtype=np.int64)
    found = scan(source, source.task_matrix(runtime), one, recipe, runtime, title="cohort: values")
    keep, dropped_for = kept_cells(found, cohort)
    grouped = mapped_design(source.cells, reference.design, cohort, keep, controls_first=new.controls_first)
    grouped = replace(grouped, reasons=first_reason(dropped_for, grouped.reasons))
    selected = np.array([name is not None for name in genes.names])
    named = np.where(selected, genes.names, source.gene_names.to_numpy(dtype=object))
    table = pd.DataFrame({"name": named, "selected": selected, "cells": found.expressed})
    notes = [decision.seen, *source.notes]
    if genes.missing:
        notes.append(f"{len(genes.missing)} genes of the run are missing and count as zeros: {listing(genes.missing)}")
    for reason in sorted(set(grouped.reasons[grouped.reasons != ""])):
        notes.append(f"{int((grouped.reasons == reason).sum())} cells left out: {reason}")
        logger.warning("map: %s", notes[-1]) if reason != NO_COUNTS else logger.info("map: %s", notes[-1])
    summary = summary_of(cohort, decision, grouped, table, notes) | {"cells": grouped.design.own_cells}
    stage.mark(shard, write_cohort(run, source, grouped, found, table, summary))
    return grouped.design


def counted_genes(home: RunDirectory, source: Source, cohort: CohortSettings) -> np.ndarray | None:
    """Return the genes that count for a cell's total, (input genes,) bool; None, for all, if the run kept all genes.

    They are the genes that `cohort.min_cells` kept in the run, found by name, id or symbol like the modelled ones.
    """
    if not cohort.min_cells:
        return None
    table = read_table(home, keys.GENES_TABLE)
    names = table.loc[(table["cells"] >= cohort.min_cells) | table["selected"], "name"]
    places = gene_places(source.gene_names, source.var, names)
    counted = np.zeros(source.n_genes, dtype=bool)
    counted[list(itertools.chain.from_iterable(places.values()))] = True
    return counted
