"""Measure by simulation whether p-values are calibrated: rates without an effect, power, and the known limit.

    python jobs/benchmark_null.py [--cohorts 20] [--labellings 10] [--genes 300] [--trained 2] [--decomposed 20]
        [--hubs csls] [--out FOLDER]

Cohorts are simulated on arrays: donors nested in conditions, two types of cells, each with a continuous state that moves
the genes; counts of which most are zero; donors that differ in every gene. By default the embedding is the true state with
noise, without training, and the package's functions compute the statistics. With `--trained` N, N cohorts also go through the
whole job, with training, under permuted labels and at the known limit. With `--decomposed` N, N labellings of 42 v 9 donors
and N cohorts at the known limit are run in the space `pca`, and every column of p-values of `cate` is printed.

The output is Markdown: rates of p-values at 0.05, 0.01 and 0.001 without an effect, for the donor-level test, Welch's,
pseudobulk's and the sign test; power and false discoveries with planted effects; and the limit: a state that is shifted by one
standard deviation in a type of treated cells, without an effect given the state. The exit code is 1 if a bound does not hold.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
from scipy import sparse
from scipy.spatial import cKDTree
from scipy.spatial.distance import cdist

import ndreamer_dist as nd
from ndreamer_dist.cohort.design import Design, build_design
from ndreamer_dist.matching.hubs import NEAREST_QUERIES
from ndreamer_dist.settings import CohortSettings
from ndreamer_dist.stats.null import counted_below, donor_p, permuted_labels, rates, sampled, sign_p
from ndreamer_dist.stats.populations import PopulationMeans, Replicates, population_means
from ndreamer_dist.stats.sign_test import benjamini_hochberg

DESIGNS = ((42, 9), (11, 5), (16, 32))
SMALL_DESIGNS = ((4, 4), (3, 3))
STATES, NOISE = 3, 0.3
DONOR_SPREAD, GENE_SPREAD, LOADING = 0.3, 0.5, 0.5
PLANTED, FOLD = 30, 1.2
TYPES = 2
TRAINING: dict[str, Any] = {
    "run.serial": True, "run.progress": False, "cohort.normalise": "counts", "cohort.min_group_cells": 20, "train.batch_size": 64, "train.epochs": 40,
    "train.passes": 1, "clusters.n_pcs": 20, "embed.dimensions": 20,
}  # fmt: skip


# --- simulated cohorts -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Law:
    """Parameters of a simulated cohort.

    Attributes
    ----------
    zeros
        Approximate share of zeros of a gene.
    fold
        Log-fold change of the first `PLANTED` genes, half up and half down, in type 0 of treated donors.
    shift
        Of the first state of type 0 in treated donors, in standard deviations.
    """

    treated: int
    control: int
    genes: int = 300
    cells: int = 60
    zeros: float = 0.9
    fold: float = 0.0
    shift: float = 0.0


@dataclass(frozen=True)
class Cohort:
    """Cells in packed order: counts, labels, and their true state."""

    law: Law
    design: Design
    obs: pd.DataFrame
    counts: np.ndarray
    state: np.ndarray
    types: np.ndarray
    x: sparse.csr_matrix = field(init=False)

    def __post_init__(self) -> None:
        scaled = self.counts * (1e4 / np.maximum(self.counts.sum(axis=1, keepdims=True), 1))
        object.__setattr__(self, "x", sparse.csr_matrix(np.log1p(scaled)))

    @property
    def density(self) -> float:
        """See `Expression.density`."""
        return self.x.nnz / np.prod(self.x.shape)

    def read(self, rows: np.ndarray, columns: np.ndarray) -> sparse.csr_matrix:
        """See `Expression.read`."""
        return self.x[rows][:, columns]

    @property
    def replicates(self) -> Replicates:
        """The donors."""
        return Replicates.of(self.obs["donor"], self.design)

    @property
    def columns(self) -> np.ndarray:
        """All genes."""
        return np.arange(self.law.genes)


def simulate(law: Law, seed: int) -> Cohort:
    """Draw a cohort."""
    rng = np.random.default_rng((seed, law.treated, law.control))
    donors = law.treated + law.control
    treated_donor = np.arange(donors) < law.treated
    donor = np.repeat(np.arange(donors), rng.poisson(law.cells, donors).clip(law.cells // 2))
    treated, types = treated_donor[donor], rng.integers(TYPES, size=len(donor))
    state = rng.normal(size=(len(donor), STATES))
    state[treated & (types == 0), 0] += law.shift
    log_mean = np.log(-np.log(law.zeros)) + rng.normal(0, GENE_SPREAD, law.genes)
    log_mean = log_mean + state @ rng.normal(0, LOADING / np.sqrt(STATES), (STATES, law.genes))
    log_mean += rng.normal(0, 0.5, (TYPES, law.genes))[types] + rng.normal(0, DONOR_SPREAD, (donors, law.genes))[donor]
    fold = np.where(np.arange(law.genes) % 2, 1.0, -1.0) * (np.arange(law.genes) < PLANTED) * law.fold
    log_mean += np.outer(treated & (types == 0), fold)
    log_mean += rng.normal(0, 0.3, len(donor))[:, None]
    counts = rng.poisson(np.exp(log_mean) * rng.gamma(4.0, 0.25, log_mean.shape)).astype(np.float32)
    obs = pd.DataFrame(
        {
            "donor": [f"d{d:02d}" for d in donor], "type": [f"type {t}" for t in types],
            "condition": np.where(treated, "treated", "control"),
        }
    )  # fmt: skip
    kept = counts.any(axis=1)
    made = build_design(
        obs[kept], CohortSettings(condition_key="condition", control="control", batch_key=("donor",), min_group_cells=1)
    )
    order = np.flatnonzero(kept)[np.argsort(made.groups, kind="stable")]
    return Cohort(law, made.design, obs.iloc[order].reset_index(drop=True), counts[order], state[order], types[order])


class Nearest:
    """Nearest neighbours in an embedding that is given: see `stats.populations.Nearest`."""

    hubs = "none"
    """As `match.hubs`; the command line sets it."""

    def __init__(self, points: np.ndarray) -> None:
        self.points = points
        self.trees: dict[int, cKDTree] = {}

    def __call__(self, queries: np.ndarray, targets: np.ndarray, asking: np.ndarray) -> np.ndarray:
        """Return the nearest target of every query, itself left out."""
        if self.hubs == "csls" and asking[0] != targets[0]:
            remote = np.sort(cdist(self.points[targets], self.points[asking]), axis=1)[:, :NEAREST_QUERIES].mean(axis=1)
            return targets[(2 * cdist(self.points[queries], self.points[targets]) - remote).argmin(axis=1)]
        tree = self.trees.setdefault(int(targets[0]), cKDTree(self.points[targets]))
        _, place = tree.query(self.points[queries], k=2)
        found = targets[np.minimum(place, len(targets) - 1)]
        return np.where(found[:, 0] == queries, found[:, 1], found[:, 0])


def embeddings(cohort: Cohort, seed: int) -> dict[str, np.ndarray]:
    """Return embeddings that hold type and state, with noise: as it is, and with the state centred per donor and type."""
    rng = np.random.default_rng((seed, 1))
    state = cohort.state + rng.normal(0, NOISE, cohort.state.shape)
    centred = pd.DataFrame(state).groupby([cohort.obs["donor"].to_numpy(), cohort.types]).transform("mean").to_numpy()
    kind = 10.0 * cohort.types[:, None]
    return {"true state": np.hstack([kind, state]), "centred per donor": np.hstack([kind, state - centred])}


def means(cohort: Cohort, points: np.ndarray) -> PopulationMeans:
    """Return the donors' means through an embedding's matches, and plain ones."""
    return population_means(cohort.types, cohort.replicates, [Nearest(points)], cohort, cohort.columns, min_cells=5)


# --- what is measured ------------------------------------------------------------------------------------------------


def null(law: Law, cohorts: int, labellings: int) -> pd.DataFrame:
    """Return how many p-values lie below each level under permuted labels of cohorts without an effect."""
    parts = []
    for seed in range(cohorts):
        cohort = simulate(law, seed)
        replicates, points = cohort.replicates, embeddings(cohort, seed)["true state"]
        made, sample = means(cohort, points), sampled(cohort.types, replicates, Nearest(points))
        for number in range(TYPES):
            kept = np.flatnonzero(made.included[number])
            truth = replicates.conditions[kept] != 0
            labels = permuted_labels(truth, labellings, np.random.default_rng((seed, number)))
            found = donor_p(made.matched[number, kept], made.own[number, kept], labels, seed=seed)
            found["sign"] = sign_p(sample.of(number, kept, replicates), labels, cohort, cohort.columns)
            parts.append(counted_below(found).assign(cohort=seed, type=number))
    return pd.concat(parts, ignore_index=True)


def under_truth(cohort: Cohort, points: np.ndarray) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """Yield each type with the p-values of its genes under the true labels, by test."""
    made = means(cohort, points)
    for number in range(TYPES):
        kept = np.flatnonzero(made.included[number])
        labels = (cohort.replicates.conditions[kept] != 0)[None]
        found = donor_p(made.matched[number, kept], made.own[number, kept], labels)
        yield number, {name: p[0] for name, p in found.items()}


def planted(law: Law, cohorts: int) -> pd.DataFrame:
    """Return power and the share of false discoveries at an adjusted p of 0.05, mean over cohorts; a row per test."""
    rows = []
    for seed in range(cohorts):
        cohort = simulate(law, seed)
        for test in ("main", "pseudobulk"):
            called = np.zeros((TYPES, law.genes), dtype=bool)
            for number, found in under_truth(cohort, embeddings(cohort, seed)["true state"]):
                called[number] = benjamini_hochberg(found[test]) < 0.05
            true = called[0, :PLANTED].sum()
            rows.append({"test": test, "power": true / PLANTED, "FDR": 1 - true / max(called.sum(), 1)})
            rows[-1]["FDR"] *= bool(called.any())
    return pd.DataFrame(rows).groupby("test", sort=False).mean()


def limit(law: Law, cohorts: int) -> pd.Series:
    """Return the share of p-values below 0.05 in the shifted type, which has no effect given the state."""
    rows = []
    for seed in range(cohorts):
        cohort, row = simulate(law, seed), {}
        for name, points in embeddings(cohort, seed).items():
            _, found = next(under_truth(cohort, points))
            row["pseudobulk"] = below(found["pseudobulk"])
            row[f"matched on the {name}" if "true" in name else f"matched on the state, {name}"] = below(found["main"])
        rows.append(row)
    return pd.DataFrame(rows).mean()


def below(p: np.ndarray, level: float = 0.05) -> float:
    """Return the share of p-values at or below a level."""
    return float((p[np.isfinite(p)] <= level).mean())


# --- with training ---------------------------------------------------------------------------------------------------


def run(
    cohort: Cohort, out: Path, seed: int, *, permuted: bool, settings: Mapping[str, Any] | None = None
) -> nd.Results:
    """Run the whole job on a cohort, under its labels or under permuted ones."""
    obs = cohort.obs.copy()
    if permuted:
        donors = obs["donor"].unique()
        labels = np.random.default_rng((seed, 2)).permutation(np.arange(len(donors)) < cohort.law.treated)
        obs["condition"] = np.where(obs["donor"].map(dict(zip(donors, labels, strict=True))), "treated", "control")
    obs.index = [f"cell{number}" for number in range(len(obs))]
    adata = anndata.AnnData(sparse.csr_matrix(cohort.counts), obs=obs)
    adata.var_names = [f"gene{number}" for number in range(adata.n_vars)]
    return nd.run(
        adata, out=out, condition_key="condition", control="control", batch_key="donor", preset="small",
        settings={"seed": seed, "match.hubs": Nearest.hubs, **TRAINING, **(settings or {})},
    ).results  # fmt: skip


def trained_null(law: Law, seed: int, folder: Path, settings: Mapping[str, Any] | None = None) -> dict[str, float]:
    """Train on permuted labels of a cohort without an effect and return the rates at 0.05 under those labels."""
    results = run(simulate(law, seed), folder / f"null-{seed}", seed, permuted=True, settings=settings)
    table = results.cate("type")
    names = {"main": "p", "welch": "p_parametric", "pseudobulk": "pseudobulk_p", "sign": "sign_p"}
    return {test: below(table[name].to_numpy()) for test, name in names.items()} | {
        "main at 0.001": below(table["p"].to_numpy(), 0.001)
    }


def trained_limit(law: Law, seed: int, folder: Path) -> dict[str, float]:
    """Train on a cohort with a shifted state; return the rate at 0.05, and what of the state the embedding holds."""
    cohort = simulate(law, seed)
    results = run(cohort, folder / f"limit-{seed}", seed, permuted=False)
    table = results.cate("type")
    shifted = table[table["population"] == "type 0"]
    points = results.embedding(pca=True).to_numpy()  # in the order of the cohort given
    inside, treated = cohort.types == 0, (cohort.obs["condition"] == "treated").to_numpy()
    one, control = np.column_stack([points, np.ones(len(points))]), inside & ~treated
    learnt = np.linalg.lstsq(one[control], cohort.state[control, 0], rcond=None)[0]
    told = one @ learnt
    return {
        "pseudobulk": below(shifted["pseudobulk_p"].to_numpy()),
        "matched on the trained embedding": below(shifted["p"].to_numpy()),
        "state held (R2 in control cells)": float(np.corrcoef(told[control], cohort.state[control, 0])[0, 1] ** 2),
        "shift held, of 1 sd": float(told[inside & treated].mean() - told[control].mean()),
        "match purity": float(shifted["match_purity"].iloc[0]),
    }


# --- the decomposition -----------------------------------------------------------------------------------------------


P_COLUMNS = ("total_p", "within_state_p", "state_shift_p", "p", "p_parametric", "pseudobulk_p")


def decomposed(law: Law, seed: int, folder: Path, *, permuted: bool) -> dict[str, float]:
    """Run a cohort in the space `pca`; return the rate at 0.05 of every column, of the first type at the limit."""
    out = folder / f"decomposed-{law.shift}-{seed}"
    table = run(simulate(law, seed), out, seed, permuted=permuted, settings={"embed.method": "pca"}).cate("type")
    if not permuted:
        table = table[table["population"] == "type 0"]
    return {name: below(table[name].to_numpy()) for name in P_COLUMNS}


# --- the job ---------------------------------------------------------------------------------------------------------


def main() -> None:
    """Print the tables; the exit code is 1 if a bound does not hold."""
    given = arguments()
    Nearest.hubs = given.hubs
    law = Law(0, 0, genes=given.genes, cells=given.cells)
    held = [calibration(law, given)]
    print("\n## Planted effects: power and false discoveries at an adjusted p of 0.05\n")
    for treated, control in DESIGNS:
        found = planted(replace(law, treated=treated, control=control, fold=FOLD), max(given.cohorts // 2, 1))
        print(f"{treated} v {control}:\n\n{markdown(found)}\n")
    held.append(known_limit(law, given))
    if given.trained:
        with tempfile.TemporaryDirectory() as folder:
            held.append(training(law, given, Path(given.out or folder)))
    if given.decomposed:
        with tempfile.TemporaryDirectory() as folder:
            held.append(decomposition(law, given, Path(given.out or folder)))
    sys.exit(0 if all(held) else 1)


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    numbers = {"cohorts": 20, "labellings": 10, "genes": 300, "cells": 60, "trained": 2, "decomposed": 0}
    for name, default in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--hubs", choices=["none", "csls"], default="none", help="as match.hubs")
    parser.add_argument("--out", type=Path, help="where runs are kept; none: nowhere")
    return parser.parse_args()


def calibration(law: Law, given: argparse.Namespace) -> bool:
    """Print the rates without an effect, and return whether the bounds hold."""
    print(f"## No effect: rates over {given.cohorts} cohorts x {given.labellings} labellings, about 90 % zeros\n")
    held = True
    for treated, control in DESIGNS + SMALL_DESIGNS:
        table = null(replace(law, treated=treated, control=control), given.cohorts, given.labellings)
        found = rates(table)
        least = 0.03 if (treated, control) in DESIGNS else 0.0
        fine = least <= found.loc["main", 0.05] <= 0.07 and found.loc["main", 0.001] <= 0.003
        print(
            f"{treated} v {control} donors: {'holds' if fine else 'DOES NOT HOLD'}\n\n{markdown(found)}\n", flush=True
        )
        held &= bool(fine)
    return held


def known_limit(law: Law, given: argparse.Namespace) -> bool:
    """Print the rates at the known limit, and return whether matching on the state is near the level."""
    found = limit(replace(law, treated=16, control=32, shift=1.0), given.cohorts)
    print("## The limit: a state shifted by 1 sd, no effect given the state: rates at 0.05, 16 v 32 donors\n")
    print(f"{markdown(found.to_frame('rate'))}\n", flush=True)
    return bool(found["matched on the true state"] < 0.1)


def training(law: Law, given: argparse.Namespace, folder: Path) -> bool:
    """Print the same two measurements with training."""
    print("## With training (small preset)\n\nNo effect, trained on permuted labels, 11 v 5 donors: rates at 0.05\n")
    seeds = range(given.trained)
    null_law = replace(law, treated=11, control=5, zeros=0.7)
    nothing = pd.DataFrame([trained_null(null_law, seed, folder) for seed in seeds])
    print(f"{markdown(nothing)}\n\nThe limit, 16 v 32 donors\n", flush=True)
    limit_law = replace(law, treated=16, control=32, shift=1.0, zeros=0.7)
    given_state = limit(limit_law, given.trained)
    print(f"{markdown(given_state.to_frame('rate'))}\n")
    print(markdown(pd.DataFrame([trained_limit(limit_law, seed, folder) for seed in seeds])))
    return bool(nothing["main"].mean() <= 0.1)


def decomposition(law: Law, given: argparse.Namespace, folder: Path) -> bool:
    """Print the rates of every column of p-values, and return whether each keeps its level without an effect."""
    null_law = replace(law, treated=42, control=9, zeros=0.7)
    limit_law = replace(law, treated=16, control=32, shift=1.0, zeros=0.7)
    tables = {
        "No effect, permuted labels, 42 v 9 donors": (null_law, True),
        "The limit, 16 v 32 donors": (limit_law, False),
    }
    rows = {
        name: pd.DataFrame([decomposed(rule, seed, folder, permuted=permuted) for seed in range(given.decomposed)])
        for name, (rule, permuted) in tables.items()
    }
    print(f"## The decomposition, in the space `pca`: rates at 0.05 over {given.decomposed} runs each\n")
    print(markdown(pd.DataFrame({name: found.mean() for name, found in rows.items()})), flush=True)
    means = next(iter(rows.values())).mean()
    return bool(means[["total_p", "within_state_p", "state_shift_p"]].between(0.03, 0.07).all())


def markdown(table: pd.DataFrame) -> str:
    """Return a table as Markdown."""
    heads = ["", *map(str, table.columns)]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    lines += [
        f"| {name} | {' | '.join(f'{v:.4f}' for v in row)} |"
        for name, row in zip(table.index, table.to_numpy(), strict=True)
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
