"""The summary of a screen: a row per condition, and a matrix of conditions by genes with similar conditions adjacent.

Input: the results of a run of many conditions. Output: a `Screen`. The CATE table is streamed, never held as a whole;
memory holds a few numbers per condition, one effect per condition and gene, and the table's rows of some conditions.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.cluster import hierarchy

from ndreamer_dist.results.reader import PopulationLabels
from ndreamer_dist.stats.results import Results
from ndreamer_dist.stats.sign_test import benjamini_hochberg

CALLED = 0.05
"""Adjusted p-value below which a gene is significant."""
STRONGEST = 5
"""Genes named per condition."""
ORDERING_GENES = 200
"""Genes by which conditions are ordered: those whose effects differ most between conditions."""
MOST_OPTIMAL = 1500
"""Most conditions for the optimal ordering of the tree's leaves, which is slow for many."""


@dataclass(frozen=True)
class Screen:
    """The summary of a screen.

    A condition's *specific* effect is its mean effect minus the mean over all conditions, which removes what all
    conditions share: above all the noise of the control.

    Attributes
    ----------
    conditions
        A row per condition, indexed by name, with similar conditions adjacent. `place` is the position in this order;
        `cells`; `donors`, of the population with most; `size`, the norm over genes of the specific effect, corrected
        for the noise of cells; `genes`, significant in some population; `strongest`, the largest specific effects as
        text.
    effects
        (conditions, genes) mean effect over all cells of a condition, in the same order.
    tested
        Whether significance is that of donor-level tests; else of the sign test over cells, which is descriptive.
    detailed
        The rows of the CATE table for the conditions with the largest `size`.
    """

    conditions: pd.DataFrame
    effects: pd.DataFrame
    tested: bool
    detailed: pd.DataFrame


def screen(results: Results, by: PopulationLabels = None, *, donor_key: str | None = None, detailed: int = 6) -> Screen:
    """Summarise all conditions of a run, each against the control; see `Screen`.

    Parameters
    ----------
    by
        Column of `obs` that names populations, or a Series of labels by cell; by default all cells are one population.
    donor_key
        Column of `obs` that names the donor; by default the batch.
    detailed
        Number of conditions whose rows of the CATE table are kept.

    Raises
    ------
    QueryError
        A name is unknown, there is neither a donor column nor a batch key, or no treated cell is in a population.
    """
    rows: list[dict[str, object]] = []
    effects: list[np.ndarray] = []
    for name, parts in by_condition(results.cate_parts(by, donor_key=donor_key)):
        mean, noise = pooled(parts)
        genes = parts[0]["gene"].to_numpy()
        rows.append({"condition": name, "noise": float(noise.sum()), **_facts(parts)})
        effects.append(mean.astype(np.float32))
    matrix = pd.DataFrame(np.stack(effects), index=[row["condition"] for row in rows], columns=pd.Index(genes))
    table = pd.DataFrame(rows).set_index("condition")
    own = own_effects(matrix.to_numpy())
    table["size"] = np.sqrt(np.maximum((own**2).sum(axis=1) - table["noise"], 0))
    table["strongest"] = strongest(matrix, {})
    largest = table["size"].sort_values(ascending=False, kind="stable").index[:detailed]
    detailed_parts = [part for name in largest for part in results.cate_parts(by, donor_key=donor_key, condition=name)]
    order = order_of_conditions(matrix.to_numpy())
    table = table.iloc[order].assign(place=np.arange(1, len(order) + 1))
    return Screen(
        table[["place", "cells", "donors", "size", "genes", "strongest"]], matrix.iloc[order],
        bool(table["tested"].any()), pd.concat(detailed_parts, ignore_index=True),
    )  # fmt: skip


def own_effects(effects: np.ndarray) -> np.ndarray:
    """Return specific effects, (conditions, genes): effects minus their mean over conditions, with NaN as 0."""
    filled = np.nan_to_num(effects.astype(np.float64))
    return np.asarray(filled - filled.mean(axis=0))


def by_condition(parts: Iterable[pd.DataFrame]) -> Iterator[tuple[str, list[pd.DataFrame]]]:
    """Group the parts of a CATE table, which come condition by condition."""
    for name, same in itertools.groupby(parts, key=lambda part: str(part["condition"].iloc[0])):
        yield name, list(same)


def pooled(parts: list[pd.DataFrame]) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean effect over the cells of all populations, and its sampling variance over cells: (genes,) each.

    A population of one cell has no variance; it gets the mean variance of the others.
    """
    cells = np.array([part["cells"].iloc[0] for part in parts], dtype=np.float64)
    means, spreads = (np.stack([part[name].to_numpy() for part in parts]) for name in ("mean_ite", "sd_ite"))
    weights = (cells / cells.sum())[:, None]
    has_spread = np.isfinite(spreads)
    usual = (spreads**2).sum(axis=0, where=has_spread) / np.maximum(has_spread.sum(axis=0), 1)
    variance = np.where(has_spread, spreads**2, usual) / cells[:, None]
    return (weights * means).sum(axis=0), (weights**2 * variance).sum(axis=0)


def _facts(parts: list[pd.DataFrame]) -> dict[str, object]:
    """Return a condition's numbers of cells, donors and significant genes."""
    tested = any(part["p"].notna().any() for part in parts)
    called = [part["p_adjusted"] if tested else benjamini_hochberg(part["sign_p"].to_numpy()) for part in parts]
    return {
        "cells": int(sum(part["cells"].iloc[0] for part in parts)),
        "donors": max(int(part["treated_donors"].iloc[0]) for part in parts),
        "genes": int(np.any([np.asarray(p) < CALLED for p in called], axis=0).sum()),
        "tested": tested,
    }


def strongest(effects: pd.DataFrame, labels: Mapping[str, str]) -> list[str]:
    """Return the genes with the largest specific effects of each condition, with the effects, as text.

    Parameters
    ----------
    effects
        (conditions, genes) mean effects.
    labels
        Symbols of genes by name, where they differ.
    """
    own = own_effects(effects.to_numpy())
    names = [labels.get(str(gene), str(gene)) for gene in effects.columns]
    order = np.argsort(-np.abs(own), axis=1, kind="stable")[:, :STRONGEST]
    return [
        ", ".join(f"{names[gene]} {row[gene]:+.2f}" for gene in first) for row, first in zip(own, order, strict=True)
    ]


def order_of_conditions(effects: np.ndarray) -> np.ndarray:
    """Return an order of conditions that places similar ones next to each other: (conditions,).

    The similarity is the angle between specific effects (`own_effects`), on the genes that differ most.
    """
    if len(effects) < 3:
        return np.arange(len(effects))
    own = own_effects(effects)
    points = own[:, most_different(own, ORDERING_GENES)]
    points /= np.maximum(np.linalg.norm(points, axis=1, keepdims=True), 1e-12)
    tree = hierarchy.linkage(points, "average", optimal_ordering=len(points) <= MOST_OPTIMAL)
    return np.asarray(hierarchy.leaves_list(tree))


def most_different(own: np.ndarray, most: int) -> np.ndarray:
    """Return the positions, ascending, of the genes whose effects differ most between conditions."""
    return np.sort(np.argsort(-(own**2).sum(axis=0), kind="stable")[:most])
