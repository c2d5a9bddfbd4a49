"""Donors held out of a run and mapped onto it, against the run that had them.

    python jobs/benchmark_map.py --out /tmp/map [--cells 6000] [--genes 1000] [--donors 12] [--design nested]
        [--embedding ndreamer,pca,harmony,state] [--preset small] [--set STAGE.NAME=VALUE]

One donor of each condition is held out. Printed, as Markdown, a row per matching space: the correlation of the held-out
treated cells' effects, by cell and by cell type over the genes that both runs model, with those of the run that had the
donors: of the two donors mapped together; of the treated one mapped after the control one, with `--extend`, so that it is
matched with as many groups as in that run; and of another seed of that run; the shares of far and unlike cells; and the seconds that
a run and the mapping took. Every run keeps its directory, so the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import anndata
import numpy as np

import ndreamer_dist as nd
from ndreamer_dist.settings import parse_assignments

NAMES = {"condition_key": "condition", "control": "control", "batch_key": "donor"}


def main() -> None:
    """Simulate, run, map and print."""
    given = arguments()
    given.out.mkdir(parents=True, exist_ok=True)
    path = given.out / "cohort.zarr"
    if not path.exists():
        nd.simulate(path, cells=given.cells, genes=given.genes, batches=given.donors, design=given.design, seed=0)
    cohort = anndata.read_zarr(path)
    donors = cohort.obs.groupby("condition", observed=True)["donor"].agg(lambda names: sorted(names.astype(str))[-1])
    out = cohort.obs["donor"].astype(str).isin(set(donors)).to_numpy()
    print(f"held out: {', '.join(sorted(set(donors)))}, {out.sum()} of {len(out)} cells\n")
    print(
        "| space | by cell: mapped / after the control / seeds | by type: the same | far | unlike | run s | map s |\n|---|---|---|---|---|---|---|"
    )
    for space in given.embedding.split(","):
        print(row(given, space, cohort, out), flush=True)


def row(given: argparse.Namespace, space: str, cohort: anndata.AnnData, out: np.ndarray) -> str:
    """Return the row of a space."""
    folder, changes = given.out / space, parse_assignments(given.assignments)

    def run(name: str, cells: anndata.AnnData, seed: int) -> tuple[nd.Results, float]:
        began = time.perf_counter()
        made = nd.run(
            cells, out=folder / name, **NAMES, embedding=space, preset=given.preset, settings=changes | {"seed": seed}
        )
        return made.results, time.perf_counter() - began

    (whole, took), (other, _) = run("whole", cohort, 0), run("seed", cohort, 1)
    run("kept", cohort[~out].copy(), 0)
    began = time.perf_counter()
    mapped = nd.map(cohort[out].copy(), onto=folder / "kept", out=folder / "mapped").results
    seconds = time.perf_counter() - began
    control = (cohort.obs["condition"] == "control").to_numpy()
    nd.map(cohort[out & control].copy(), onto=folder / "kept", out=folder / "controls", extend=True)
    after = nd.map(cohort[out & ~control].copy(), onto=folder / "controls", out=folder / "after").results
    cells = list(mapped.obs.index[mapped.obs["condition"] != "control"])
    genes = [name for name in mapped.var_names if name in set(whole.var_names) & set(other.var_names)]
    effects = [np.asarray(results.ite(cells, genes).X, dtype=np.float64) for results in (whole, mapped, after, other)]
    types = mapped.obs.loc[cells, "cell_type"].astype(str).to_numpy()
    by_type = [np.stack([values[types == name].mean(axis=0) for name in np.unique(types)]) for values in effects]
    shown = [" / ".join(f"{correlation(one, two):.3f}" for two in others) for one, *others in (effects, by_type)]
    told: Any = mapped.mapped
    return f"| {space} | {shown[0]} | {shown[1]} | {told.far:.1%} | {told.unlike:.1%} | {took:.0f} | {seconds:.0f} |"


def correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Return the correlation of all values."""
    return float(np.corrcoef(one.ravel(), other.ravel())[0, 1])


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
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
