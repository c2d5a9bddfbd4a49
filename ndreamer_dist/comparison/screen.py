"""A screen at a glance: a row per condition, and conditions by genes in an order in which those that act alike lie together.

Input: the results of a run of many conditions. Output: a `Screen`. The CATE table is gone through part by part and never
held; what is kept are a few numbers per condition, one effect per condition and gene, and the rows of some conditions.
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
"""Adjusted p-value below which a gene is called."""
STRONGEST = 5
"""Genes that are named of a condition."""
ORDERING_GENES = 200
"""Genes that conditions are ordered by: those whose effects differ most between conditions."""
MOST_OPTIMAL = 1500
"""Conditions up to which the tree's leaves are turned so that neighbours are as alike as can be."""


@dataclass(frozen=True)
class Screen:
    """What a screen found.

    Attributes
    ----------
    conditions
        A row per condition, by name, in the order of the map: `place`, `cells`, `donors` (of the most in a population),
        `size` of its own effect (root of the sum of squares over genes of the mean effect less that of all conditions, less
        what the noise of cells adds), `genes` that are called in some population, and `strongest`, the largest effects less the mean of all conditions.
    effects
        (conditions, genes) mean effect over all cells of a condition, in the same order.
    tested
        Whether genes are called by tests on donors; else by the sign test over cells, which describes.
    detailed
        The rows of the CATE table of the conditions with the largest effects.
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
        Column of `obs` that names populations, or a Series of labels by cell; by default all cells are one.
    donor_key
        Column of `obs` that names the donor; by default the batch.
    detailed
        Conditions of which the rows of the CATE table are kept.
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
    """Return effects less their mean over conditions, which holds what all share, the noise of the control among it."""
    filled = np.nan_to_num(effects.astype(np.float64))
    return np.asarray(filled - filled.mean(axis=0))


def by_condition(parts: Iterable[pd.DataFrame]) -> Iterator[tuple[str, list[pd.DataFrame]]]:
    """Gather the parts of a CATE table, which come condition by condition."""
    for name, same in itertools.groupby(parts, key=lambda part: str(part["condition"].iloc[0])):
        yield name, list(same)


def pooled(parts: list[pd.DataFrame]) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean effect over the cells of all populations, and the variance of it that cells' noise makes: (genes,).

    Cells of a population of one, whose spread nobody knows, count as noisy as the others do on average.
    """
    cells = np.array([part["cells"].iloc[0] for part in parts], dtype=np.float64)
    means, spreads = (np.stack([part[name].to_numpy() for part in parts]) for name in ("mean_ite", "sd_ite"))
    weights = (cells / cells.sum())[:, None]
    has_spread = np.isfinite(spreads)
    usual = (spreads**2).sum(axis=0, where=has_spread) / np.maximum(has_spread.sum(axis=0), 1)
    variance = np.where(has_spread, spreads**2, usual) / cells[:, None]
    return (weights * means).sum(axis=0), (weights**2 * variance).sum(axis=0)


def _facts(parts: list[pd.DataFrame]) -> dict[str, object]:
    """Return what the table says of a condition besides its effects."""
    tested = any(part["p"].notna().any() for part in parts)
    called = [part["p_adjusted"] if tested else benjamini_hochberg(part["sign_p"].to_numpy()) for part in parts]
    return {
        "cells": int(sum(part["cells"].iloc[0] for part in parts)),
        "donors": max(int(part["treated_donors"].iloc[0]) for part in parts),
        "genes": int(np.any([np.asarray(p) < CALLED for p in called], axis=0).sum()),
        "tested": tested,
    }


def strongest(effects: pd.DataFrame, labels: Mapping[str, str]) -> list[str]:
    """Name the genes with the largest effects of each condition's own, with these: effects less the mean of all conditions.

    Parameters
    ----------
    labels
        What genes are called, by name, where that is not their name.
    """
    own = own_effects(effects.to_numpy())
    names = [labels.get(str(gene), str(gene)) for gene in effects.columns]
    order = np.argsort(-np.abs(own), axis=1, kind="stable")[:, :STRONGEST]
    return [
        ", ".join(f"{names[gene]} {row[gene]:+.2f}" for gene in first) for row, first in zip(own, order, strict=True)
    ]


def order_of_conditions(effects: np.ndarray) -> np.ndarray:
    """Return an order of conditions in which those whose effects point the same way are neighbours: (conditions,).

    Conditions are compared by the angle between their own effects (`own_effects`) on the genes that differ most.
    """
    if len(effects) < 3:
        return np.arange(len(effects))
    own = own_effects(effects)
    points = own[:, most_different(own, ORDERING_GENES)]
    points /= np.maximum(np.linalg.norm(points, axis=1, keepdims=True), 1e-12)
    tree = hierarchy.linkage(points, "average", optimal_ordering=len(points) <= MOST_OPTIMAL)
    return np.asarray(hierarchy.leaves_list(tree))


def most_different(own: np.ndarray, most: int) -> np.ndarray:
    """Return the places of the genes whose effects differ most between conditions, ascending."""
    return np.sort(np.argsort(-(own**2).sum(axis=0), kind="stable")[:most])
