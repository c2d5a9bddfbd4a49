"""Measure the cost of gene selection on a stored cohort: this package's passes over row chunks, and scanpy on dask arrays.

    python jobs/benchmark_cohort.py --out F [--cells 50000] [--genes 20000] [--donors 8] [--cpus 2]

A nested case-control cohort of counts is simulated as zarr, unless F holds it. Each method then runs in its own process: the
cohort stage of a run, on a local Ray and in one process; and scanpy's `normalize_total`, `log1p` and `highly_variable_genes`
(seurat, the group as batch) on a dask array of CSR row chunks, with as many threads. The output holds seconds without imports
and the start of Ray, processor seconds of processes without Ray, the peak memory over all processes with shared pages counted
once, and whether the genes are the same.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import anndata as ad
import dask
import pandas as pd
import scanpy as sc
import zarr
from anndata.experimental import read_elem_lazy
from anndata.io import read_elem

import ndreamer_dist as nd
from ndreamer_dist import keys
from ndreamer_dist.cohort.genes import run_cohort
from ndreamer_dist.cohort.source import fingerprint, open_source
from ndreamer_dist.compute.executor import choose_runtime
from ndreamer_dist.compute.monitors import PeakMemory
from ndreamer_dist.planning.stages import stage_keys
from ndreamer_dist.rundir.directory import RunDirectory
from ndreamer_dist.settings import Settings

NAMES = {"cohort.condition_key": "condition", "cohort.control": "control", "cohort.batch_key": "donor"}
GENES = 2000


def main() -> None:
    """Run every way and print the table."""
    given = arguments()
    if given.way:
        print(json.dumps(measured(given)))
        return
    given.out.mkdir(parents=True, exist_ok=True)
    if not (cohort_of(given) / "zarr.json").exists():
        nd.simulate(cohort_of(given), cells=given.cells, genes=given.genes, batches=given.donors, design="nested")
    found = {way: apart(way) for way in WAYS}
    print("| way | s | processor s | peak GB | the same genes |\n|---|---|---|---|---|")
    for way, told in found.items():
        same = "yes" if told["genes"] == found["serial"]["genes"] else "no"
        processor = "-" if way == "ray" else f"{told['processor']:.1f}"
        print(f"| {way} | {told['seconds']:.1f} | {processor} | {told['peak'] / 1e9:.2f} | {same} |")


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cells", type=int, default=50_000)
    parser.add_argument("--genes", type=int, default=20_000)
    parser.add_argument("--donors", type=int, default=8)
    parser.add_argument("--cpus", type=int, default=2)
    parser.add_argument("--way", choices=WAYS, help="run only this method, in this process")
    return parser.parse_args()


def cohort_of(given: argparse.Namespace) -> Path:
    """Return the path of the cohort."""
    return given.out / f"{given.cells}x{given.genes}x{given.donors}.zarr"


def apart(way: str) -> dict[str, object]:
    """Measure one method in a new process."""
    ended = subprocess.run([sys.executable, *sys.argv, "--way", way], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(ended.stdout.splitlines()[-1])


def measured(given: argparse.Namespace) -> dict[str, object]:
    """Choose the genes by one way and return seconds, peak memory and the genes."""
    meter, before = PeakMemory(), time.process_time()
    seconds, genes = WAYS[given.way](given)
    meter.close()
    return {"seconds": seconds, "processor": time.process_time() - before, "peak": meter.bytes, "genes": genes}


def ours(given: argparse.Namespace, **how: object) -> tuple[float, list[str]]:
    """Choose the genes by the cohort stage."""
    settings = Settings.build(overrides={**NAMES, "hvg.num_hvg": GENES, "run.progress": False, **how})
    source = open_source(cohort_of(given))
    key = stage_keys(settings, fingerprint(source, "condition", ["donor"]))[keys.STAGE_COHORT]
    with tempfile.TemporaryDirectory() as folder, choose_runtime(settings.run) as runtime:
        list(runtime.map(abs, range(given.cpus), title="start"))
        started = time.perf_counter()
        run_cohort(RunDirectory.at(folder), settings, source, runtime, key)
        seconds = time.perf_counter() - started
        table = pd.read_parquet(Path(folder) / keys.GENES_TABLE)
    return seconds, list(table.loc[table["selected"], "name"])


def scanpy_on_dask(given: argparse.Namespace) -> tuple[float, list[str]]:
    """Choose the genes by scanpy on a dask array of CSR row chunks, on dask's threads."""
    warnings.simplefilter("ignore")
    root = zarr.open_group(cohort_of(given), mode="r")
    obs, var = read_elem(root["obs"]), read_elem(root["var"])
    started = time.perf_counter()
    x = read_elem_lazy(root["X"], chunks=(Settings().cohort.chunk_rows, len(var)))
    adata = ad.AnnData(x, obs=obs, var=var)
    adata.obs["group"] = pd.Categorical(obs["donor"].astype(str) + "|" + obs["condition"].astype(str))
    with dask.config.set(scheduler="threads", num_workers=given.cpus):
        sc.pp.normalize_total(adata, target_sum=1e4)
        sc.pp.log1p(adata)
        sc.pp.highly_variable_genes(adata, flavor="seurat", batch_key="group", n_top_genes=GENES)
    return time.perf_counter() - started, list(adata.var_names[adata.var["highly_variable"]])


WAYS: dict[str, Callable[[argparse.Namespace], tuple[float, list[str]]]] = {
    "ray": lambda given: ours(given, **{"run.serial": False, "run.cpus": given.cpus}),
    "serial": lambda given: ours(given, **{"run.serial": True}),
    "dask": scanpy_on_dask,
}


if __name__ == "__main__":
    main()
