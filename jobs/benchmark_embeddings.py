"""Measure every matching space on cohorts whose effects are known, or nearly known: the table of docs/benchmarks-log.md.

    python jobs/benchmark_embeddings.py --out /tmp/embeddings [--spaces ndreamer pca harmony state ndreamer+state] \
        [--variant weightless:loss.independence=0] [--cohorts crossed nested stateful shifted kang ctcl] [--seeds 3] \
        [--within none cell_type ndreamer_cluster_low] [--cells 8000] [--genes 1000] [--preset small] [--set run.serial=true] [--kang kang_pbmc_ifnb.h5ad]

Each space is run by `embed.method`; a space that this version does not have is skipped and named.
A variant is a set of settings of the trained space. Simulated cohorts have the seed of their run: `crossed` has 4 donors
in both conditions, `nested` 16 in one each, `stateful` is crossed and its effects depend on the state, `shifted` is nested and
its treated cells' state is shifted by one standard deviation. Kang's cohort is crossed too, so its differences of type means
are close to the truth; those of ctcl, 3 donors nested in each condition, are less so. Both are read from $NDREAMER_TEST_DATA
by default. With --within every space is matched several times, inside these labels (`match.within`), and only matching and
later stages run again. Every run keeps its directory, so the same command continues after an interruption. The output is a
Markdown table of means and standard deviations over seeds; OUT/embeddings.csv holds all runs.

- mean r, rmse: mean effects of the responding types over all genes, against the true ones (real cohorts: r and slope
  against differences of type means).
- local r: does `denoised` follow the cell's state inside its type: over ten bins of the state, of genes that depend on it.
- state r: do effects of single cells, smoothed over neighbours, follow the true ones inside types (`stateful`).
- purity: share of control matches of the cell's own type; inside: share that `match.within` kept in the cell's label.
- shifted: share of p <= 0.05 among genes that the shift of state moves and the condition does not (`shifted`), in all types.
"""

from __future__ import annotations

import argparse
import datetime as dt
import itertools
import os
import platform
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse

import ndreamer_dist as nd
from ndreamer_dist.commands.demo import score
from ndreamer_dist.comparison.table import agreement_with_means, match_purity
from ndreamer_dist.datasets import CELL_TYPE, CONDITION, DONOR, Truth, load_truth, simulate
from ndreamer_dist.errors import SettingsError
from ndreamer_dist.settings import Settings, parse_assignments
from ndreamer_dist.stats.cate_table import populations_of

SPACES = ("ndreamer", "pca", "harmony", "state", "ndreamer+state")
SIMULATED: dict[str, dict[str, Any]] = {
    "crossed": {"batches": 4, "design": "crossed"},
    "nested": {"batches": 16, "design": "nested"},
    "stateful": {"batches": 4, "design": "crossed", "state_effects": 1.0},
    "shifted": {"batches": 16, "design": "nested", "state_shift": 1.0},
}
KANG, CTCL = "kang", "ctcl"
REAL: dict[str, dict[str, Any]] = {KANG: {"control": "ctrl"}, CTCL: {"control": "healthy", "batch_key": DONOR}}
NO_LABELS = "none"
MOVED = 0.05
"""Change of a gene's mean expression by the shift of state, above which it counts as moved."""
BINS = 10
FORMATS = {
    "mean_r": ".3f",
    "rmse": ".3f",
    "slope": ".2f",
    "local_r": ".3f",
    "state_r": ".3f",
    "purity": ".3f",
    "inside": ".3f",
    "shifted": ".3f",
    "seconds": ".0f",
}


@dataclass(frozen=True)
class Row:
    """Measures of one run; NaN for those that a cohort does not have."""

    cohort: str
    space: str
    within: str
    seed: int
    mean_r: float
    rmse: float
    slope: float
    local_r: float
    state_r: float
    purity: float
    inside: float
    shifted: float
    seconds: float


def main() -> None:
    """Run every space and variant on every cohort, and print the table."""
    given = arguments()
    spaces = dict(wanted(given))
    rows: list[Row] = []
    for cohort in given.cohorts:
        for name, settings in spaces.items():
            for seed, within in itertools.product(range(given.seeds), given.within):
                rows.append(measured(given, cohort, name, settings | {"match.within": within}, seed))
                print(rows[-1], file=sys.stderr, flush=True)
                pd.DataFrame(map(asdict, rows)).to_csv(given.out / "embeddings.csv", index=False)
    print(circumstances())
    print(markdown(pd.DataFrame(map(asdict, rows))))


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cohorts", nargs="+", choices=[*SIMULATED, *REAL], default=[*SIMULATED, KANG])
    parser.add_argument("--within", nargs="+", default=[NO_LABELS], help="labels to match inside; each gives a run")
    parser.add_argument("--spaces", nargs="*", default=list(SPACES))
    parser.add_argument("--variant", action="append", default=[], help="NAME:stage.setting=value,...")
    for name, default in {"seeds": 3, "cells": 8000, "genes": 1000}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--preset", default="small")
    parser.add_argument("--set", action="append", default=[], dest="assignments", help="setting of every run")
    folder = Path(os.environ.get("NDREAMER_TEST_DATA", "."))
    for name, file in {KANG: "kang_pbmc_ifnb.h5ad", CTCL: "ctcl_skin.h5ad"}.items():
        parser.add_argument(f"--{name}", type=Path, default=folder / file)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    return given


def wanted(given: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield name and settings of each space and variant; skip and name those that this version does not have."""
    for space in given.spaces:
        settings = {} if space == "ndreamer" else {"embed.method": space}
        try:
            Settings.build(overrides=settings)
        except SettingsError as error:
            print(f"skipped: {space} ({error})", file=sys.stderr)
        else:
            yield space, settings
    for text in given.variant:
        name, _, assignments = text.partition(":")
        yield name, parse_assignments(assignments.split(","))


def measured(given: argparse.Namespace, cohort: str, name: str, settings: dict[str, Any], seed: int) -> Row:
    """Run the job on a cohort in one space, unless it is finished, and measure it."""
    path = getattr(given, cohort) if cohort in REAL else given.out / f"{cohort}-{seed}.zarr"
    if cohort not in REAL and not path.exists():
        simulate(path, cells=given.cells, genes=given.genes, seed=seed, **SIMULATED[cohort])
    columns = REAL.get(cohort, {"control": "control", "batch_key": DONOR})
    started = time.perf_counter()
    results = nd.run(
        path, out=given.out / "runs" / cohort / name / str(seed), condition_key=CONDITION, preset=given.preset,
        settings={"seed": seed, **parse_assignments(given.assignments), **settings}, redo=True, **columns,
    ).results  # fmt: skip
    seconds = time.perf_counter() - started
    found = of_types(results) if cohort in REAL else of_truth(results, load_truth(path))
    if cohort == "shifted":
        found["shifted"] = share_of_shifted(results, load_truth(path))
    if results.matched_inside:
        found["inside"] = results.matched_inside.share
    empty = dict.fromkeys(FORMATS, float("nan"))
    found |= {"purity": purity(results), "seconds": seconds}
    return Row(cohort, name, str(settings["match.within"]), seed, **empty | found)


def of_truth(results: nd.Results, truth: Truth) -> dict[str, float]:
    """Measure a run on a simulated cohort against its truth."""
    told = score(results, truth)
    responding = [effect for effect in told.effects if effect.affected]
    local = [s.correlation for s in told.local]
    return {
        "mean_r": told.correlation,
        "slope": float(np.mean([effect.slope for effect in responding])),
        "rmse": mean_rmse(results, truth, {(effect.cell_type, effect.condition) for effect in responding}),
        "local_r": local_correlation(results, truth),
        "state_r": float(np.mean(local)) if local else float("nan"),
    }


def mean_rmse(results: nd.Results, truth: Truth, populations: set[tuple[str, str]]) -> float:
    """Return the root mean squared error over genes of the mean effects, mean over populations."""
    effects = results.ite()
    values, obs, errors = dense(effects.X), effects.obs, []
    for kind, condition in sorted(populations):
        cells = ((obs[CELL_TYPE] == kind) & (obs[CONDITION] == condition)).to_numpy()
        error = values[cells].mean(0, dtype=np.float64) - truth.mean_ite(kind, condition, list(effects.var_names))
        errors.append(np.sqrt((error**2).mean()))
    return float(np.mean(errors))


def local_correlation(results: nd.Results, truth: Truth) -> float:
    """Return how `denoised` follows the true expression over ten bins of the state, of genes that depend on it.

    Correlated over the bins, mean over genes, then over cell types. Genes that a condition changes are left out.
    """
    found = results.denoised()
    genes = [gene for gene in found.var_names if gene not in set(truth.effect_genes)]
    estimate = dense(found[:, genes].X)
    positions = truth.positions(list(found.obs_names))
    true, cells = truth.expression(positions, genes=genes), truth.obs(positions)
    of_types = []
    for kind in truth.cell_types:
        rows = np.flatnonzero(cells[CELL_TYPE] == kind)
        ranked = rows[np.argsort(cells["state"][rows], kind="stable")]
        bins = np.array_split(ranked, BINS)
        moving = np.ptp(true[rows], axis=0) > 0  # a standard deviation of equal values need not be 0
        means = (
            np.stack([values[part][:, moving].mean(0, dtype=np.float64) for part in bins])
            for values in (estimate, true)
        )
        e, t = (value - value.mean(0) for value in means)
        norm = np.sqrt((e**2).sum(0) * (t**2).sum(0))
        of_types.append(np.divide((e * t).sum(0), norm, out=np.zeros_like(norm), where=norm > 0).mean())
    return float(np.mean(of_types))


def share_of_shifted(results: nd.Results, truth: Truth) -> float:
    """Return the share of p <= 0.05 among the genes of each type that the shift of state moves and the condition does not."""
    small = []
    for (kind, condition), table in results.cate(CELL_TYPE).groupby(["population", "condition"]):
        genes = list(table["gene"])
        moved = np.abs(truth.mean_state_shift(str(kind), str(condition), genes)) > MOVED
        moved &= ~np.isin(genes, list(truth.effect_genes)) & table["p"].notna().to_numpy()
        small.append(table["p"].to_numpy()[moved] <= 0.05)
    return float(np.concatenate(small).mean())


def of_types(results: nd.Results) -> dict[str, float]:
    """Measure a run against the differences of its type means: r and slope over genes, mean over types."""
    r, slope = agreement_with_means(results, populations_of(results.packed_obs, CELL_TYPE)[1])
    return {"mean_r": r, "slope": slope}


def purity(results: nd.Results) -> float:
    """Return the share of control matches that are of the cell's own type, over cells that are no controls."""
    return match_purity(results, populations_of(results.packed_obs, CELL_TYPE)[1])


def dense(values: Any) -> np.ndarray:
    """Return a part of a layer as a plain array."""
    return values.toarray() if sparse.issparse(values) else np.asarray(values)


def circumstances() -> str:
    """Return the command, the date and the machine."""
    machine = f"{os.cpu_count()} processors ({platform.machine()}), {platform.system()}"
    return f"{dt.datetime.now(tz=dt.UTC):%Y-%m-%d}, {machine}: `{shlex.join(['python', *sys.argv])}`\n"


def markdown(table: pd.DataFrame) -> str:
    """Return the mean over seeds of every cohort and space, with the standard deviation where there are several."""
    heads = ["cohort", "space", "within", *(name.replace("_", " ") for name in FORMATS)]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for (cohort, space, within), rows in table.groupby(["cohort", "space", "within"], sort=False):
        cells = [shown(rows[name].dropna().to_numpy(), form) for name, form in FORMATS.items()]
        lines.append(f"| {cohort} | {space} | {within} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def shown(values: np.ndarray, form: str) -> str:
    """Return a mean, with its standard deviation over seeds in brackets; a dash for nothing."""
    if not len(values):
        return "-"
    spread = f" ({values.std(ddof=1):{form}})" if len(values) > 1 else ""
    return f"{values.mean():{form}}{spread}"


if __name__ == "__main__":
    main()
