"""Map donors that were held out of a run onto it, and compare with the run of all donors.

    python jobs/benchmark_map.py --out /tmp/map [--cells 6000] [--genes 1000] [--donors 12] [--design nested]
        [--embedding ndreamer,pca,harmony,state] [--preset small] [--set STAGE.NAME=VALUE]
    python jobs/benchmark_map.py --out /tmp/map --cohort onek1k_40donors.h5ad      # real donors, arms drawn at random

One donor of each condition is held out. The output is Markdown, a row per matching space. First the correlation of the effects
of the held-out treated cells, by cell and by cell type over the genes that both runs model, with those of the run of all donors:
for the two donors mapped together; for the same with `--extend`, where the treated one is also matched with the control one; for
a whole run without the held-out control donor, which has the same information as mapping without `--extend`; and for another
seed of that run. Then the correlation by cell type with the true effects of these cells: for the run of all donors, for both
mapped together, for both with `--extend`, and for the run without the control donor. Last the shares of far and unlike cells, and
the seconds of a run and of the mapping. Every run keeps its directory, so the same command continues after an interruption.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
from scipy import sparse

import ndreamer_dist as nd
from ndreamer_dist.datasets import load_truth
from ndreamer_dist.settings import parse_assignments

NAMES = {"condition_key": "condition", "control": "control", "batch_key": "donor"}
PLANTED, THINNED = 0.15, 0.5
"""Share of a real cohort's genes that an effect is planted in, and the share of their counts that treated cells keep."""
HEAD = (
    "| space | by cell: together / --extend / run without it / seeds | by type: the same "
    "| truth by type: whole run / together / --extend / run without it | far | unlike | run s | map s |"
)
Truth = Callable[[np.ndarray, Sequence[str]], np.ndarray]
"""The true effects of cells, by their places, on genes."""


def main() -> None:
    """Simulate or plant, run, map and print."""
    given = arguments()
    given.out.mkdir(parents=True, exist_ok=True)
    cohort, truth = simulated(given) if given.cohort is None else planted(given.cohort)
    donors = cohort.obs.groupby("condition", observed=True)["donor"].agg(lambda names: sorted(names.astype(str))[-1])
    out = cohort.obs["donor"].astype(str).isin(set(donors)).to_numpy()
    print(f"held out: {', '.join(sorted(set(donors)))}, {out.sum()} of {len(out)} cells\n")
    print(f"{HEAD}\n|---|---|---|---|---|---|---|---|")
    for space in given.embedding.split(","):
        print(row(given, space, cohort, out, truth), flush=True)


def simulated(given: argparse.Namespace) -> tuple[anndata.AnnData, Truth]:
    """Return the simulated cohort, which is written once, and its true effects."""
    path = given.out / "cohort.zarr"
    if not path.exists():
        nd.simulate(path, cells=given.cells, genes=given.genes, batches=given.donors, design=given.design, seed=0)
    truth = load_truth(path)
    return anndata.read_zarr(path), lambda rows, genes: np.asarray(truth.ite(rows, genes=genes))


def planted(path: Path) -> tuple[anndata.AnnData, Truth]:
    """Return a cohort of counts whose donors are drawn into two arms at random, with some genes thinned in the treated one.

    The true effect on a cell is the difference that thinning made to its log-normalised expression.
    """
    cohort, generator = anndata.read_h5ad(path), np.random.default_rng(0)
    donors = np.unique(cohort.obs["donor"].astype(str))
    treated = cohort.obs["donor"].astype(str).isin(generator.permutation(donors)[: len(donors) // 2]).to_numpy()
    counts = np.asarray(cohort.X.toarray() if sparse.issparse(cohort.X) else cohort.X).astype(np.int64)
    genes = generator.permutation(counts.shape[1])[: int(PLANTED * counts.shape[1])]
    where, before = np.ix_(np.flatnonzero(treated), genes), logged(counts)
    counts[where] = generator.binomial(counts[where], THINNED)
    change = pd.DataFrame(logged(counts) - before, columns=cohort.var_names)
    obs = cohort.obs[["donor", "cell_type"]].assign(condition=np.where(treated, "treated", "control"))
    made = anndata.AnnData(sparse.csr_matrix(counts.astype(np.float32)), obs=obs, var=cohort.var[[]])
    return made, lambda rows, names: change[list(names)].to_numpy()[rows]


def logged(counts: np.ndarray) -> np.ndarray:
    """Return log-normalised counts."""
    return np.asarray(np.log1p(counts / np.maximum(counts.sum(axis=1, keepdims=True), 1) * 1e4))


def row(given: argparse.Namespace, space: str, cohort: anndata.AnnData, out: np.ndarray, truth: Truth) -> str:
    """Return the row of a space."""
    folder, changes = given.out / space, parse_assignments(given.assignments)

    def run(name: str, cells: anndata.AnnData, seed: int) -> tuple[nd.Results, float]:
        began = time.perf_counter()
        made = nd.run(
            cells, out=folder / name, **NAMES, embedding=space, preset=given.preset, settings=changes | {"seed": seed}
        )
        return made.results, time.perf_counter() - began

    control = (cohort.obs["condition"] == "control").to_numpy()
    (whole, took), (other, _) = run("whole", cohort, 0), run("seed", cohort, 1)
    without, _ = run("without", cohort[~(out & control)].copy(), 0)
    run("kept", cohort[~out].copy(), 0)
    began = time.perf_counter()
    mapped = nd.map(cohort[out].copy(), onto=folder / "kept", out=folder / "mapped").results
    seconds = time.perf_counter() - began
    after = nd.map(cohort[out].copy(), onto=folder / "kept", out=folder / "after", extend=True).results
    cells = list(mapped.obs.index[mapped.obs["condition"] != "control"])
    every = (whole, mapped, after, without, other)
    genes = [name for name in mapped.var_names if all(name in set(results.var_names) for results in every)]
    effects = [np.asarray(results.ite(cells, genes).X, dtype=np.float64) for results in every]
    types = mapped.obs.loc[cells, "cell_type"].astype(str).to_numpy()
    true = truth(cohort.obs_names.get_indexer(cells), genes)
    *by_type, true_by_type = (of_types(values, types) for values in (*effects, true))
    shown = [" / ".join(f"{correlation(one, two):.3f}" for two in others) for one, *others in (effects, by_type)]
    shown.append(" / ".join(f"{correlation(true_by_type, one):.3f}" for one in by_type[:-1]))
    told: Any = mapped.mapped
    return f"| {space} | {' | '.join(shown)} | {told.far:.1%} | {told.unlike:.1%} | {took:.0f} | {seconds:.0f} |"


def of_types(values: np.ndarray, types: np.ndarray) -> np.ndarray:
    """Return the mean of every cell type: (types, genes)."""
    return np.stack([values[types == name].mean(axis=0) for name in np.unique(types)])


def correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Return the correlation of all values."""
    return float(np.corrcoef(one.ravel(), other.ravel())[0, 1])


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--cohort", type=Path, help="AnnData of counts with donor and cell_type in obs, in place of a simulated one"
    )
    parser.add_argument("--cells", type=int, default=6000)
    parser.add_argument("--genes", type=int, default=1000)
    parser.add_argument("--donors", type=int, default=12)
    parser.add_argument("--design", choices=("nested", "crossed"), default="nested")
    parser.add_argument("--embedding", default="ndreamer,pca,harmony,state")
    parser.add_argument("--preset", default="small")
    parser.add_argument("--set", dest="assignments", action="append", default=[], metavar="STAGE.NAME=VALUE")
    return parser.parse_args()


if __name__ == "__main__":
    main()
