"""Compare this package with other tools on the same cohorts and machine: time, memory, and agreement with the truth.

    python jobs/benchmark_others.py --out /tmp/others [--tools ours-harmony,pseudobulk,...] [--cells 8000] [--genes 1000] [--donors 12]
        [--kang kang_pbmc_ifnb.h5ad] [--minutes 10] [--python scvi=/tmp/venv/bin/python] [--stream]

Every tool runs in its own process with one thread, in the environment that `--python` names (by default this one); a tool that
cannot be imported there is skipped and named. Times are processor seconds of that process, including imports and reading; memory
is its peak. Tools that train stop after `--minutes` of processor time. Cohorts:

- `nested`: simulated, donors nested in two conditions, effects that depend on a cell's state, truth known;
- `null`: the control donors of another simulated cohort, half of them called treated at random: no effect;
- `kang`: real cells with and without interferon-beta, no donors.

Printed as Markdown. Mean r, rmse: mean effects of the responding types over all genes against the true ones; by cell: r of the effects of
single treated cells, over genes that respond; state: the same averaged over tenths of the true state inside a type and
centred there (does the effect follow the state?). p: share of p <= 0.05 over genes and types without an effect. Kang: r and slope of mean effects with
differences of type means, and in how many types ISG15 has the largest. With `--stream` mini-batches are streamed from a cohort of
102 400 cells x 2000 genes, by this package and annbatch. OUT keeps measurements, which are not repeated.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import anndata
import numpy as np
import pandas as pd
from scipy import sparse, stats

CONTROL = {"nested": "control", "null": "control", "kang": "ctrl"}
LEAST_CELLS = 20
"""Cells of a type that a condition must have on Kang."""
BINS = 10
STREAMED_ROWS = 400_000
STREAM_BATCH = 2048


@dataclass(frozen=True)
class Found:
    """Results of a tool on a cohort.

    Attributes
    ----------
    means
        (types, genes) mean effects.
    cells
        (treated cells, genes) effects, if the tool has them.
    p
        (types, genes) p-values, if the tool has them.
    """

    means: pd.DataFrame
    cells: pd.DataFrame | None = None
    p: pd.DataFrame | None = None


@dataclass(frozen=True)
class Tool:
    """A tool: its imports, its cohorts, and its further outputs."""

    run: Callable[[anndata.AnnData, str, float], Found]
    needs: tuple[str, ...]
    cohorts: tuple[str, ...]
    gives: str
    environment: str = "own"


AVERAGED = MappingProxyType({"match.hubs": "csls", "match.neighbours": 15})
"""For effects of single cells: distances corrected for hubs, and more cells averaged."""


# --- the tools: each runs in a process of its own ----------------------------------------------------------------------


def ours(
    space: str, settings: Mapping[str, Any] = MappingProxyType({})
) -> Callable[[anndata.AnnData, str, float], Found]:
    """Return this package with a matching space."""

    def run(cohort: anndata.AnnData, control: str, minutes: float) -> Found:
        import ndreamer_dist as nd

        del minutes
        keys: dict[str, Any] = {"condition_key": "condition", "control": control}
        donors = {"batch_key": "donor"} if "donor" in cohort.obs else {}
        changes = {"run.serial": True, "run.progress": False, "cohort.small_groups": "keep", **settings}
        with tempfile.TemporaryDirectory() as folder:
            made = nd.run(
                cohort, out=f"{folder}/run", **keys, **donors, embedding=space, preset="small", settings=changes
            )
            results = made.results
            table = results.cate(by="cell_type", donor_key=None if donors else "condition")
            treated = list(results.obs.index[results.obs["condition"].astype(str) != control])
            cells = results.ite(treated).to_df()
        wide = {name: table.pivot(index="population", columns="gene", values=name) for name in ("mean_ite", "p")}
        return Found(wide["mean_ite"], cells, wide["p"] if donors else None)

    return run


def logged(cohort: anndata.AnnData) -> anndata.AnnData:
    """Return log-normalised expression of the most variable genes, as scanpy's tutorials have it."""
    import scanpy as sc

    made = cohort.copy()
    sc.pp.normalize_total(made, target_sum=1e4)
    sc.pp.log1p(made)
    if made.n_vars > 2000:
        sc.pp.highly_variable_genes(made, n_top_genes=2000, batch_key="donor" if "donor" in made.obs else None)
        made = made[:, made.var["highly_variable"]].copy()
    return made


def pseudobulk(cohort: anndata.AnnData, control: str, minutes: float) -> Found:
    """Correct components by harmonypy, cluster, and test means of donors by Welch's t test, all in memory."""
    import harmonypy
    import scanpy as sc

    del minutes
    made = logged(cohort)
    sc.pp.pca(made, n_comps=50)
    if "donor" in made.obs:
        corrected = np.asarray(harmonypy.run_harmony(made.obsm["X_pca"], made.obs, "donor").Z_corr)
        made.obsm["X_harmony"] = corrected if len(corrected) == made.n_obs else corrected.T
    sc.pp.neighbors(made, use_rep="X_harmony" if "donor" in made.obs else "X_pca")
    sc.tl.leiden(made, flavor="igraph", n_iterations=2, directed=False)
    values, obs = made.to_df(), made.obs
    if "donor" not in obs:
        return Found(type_differences(values, obs, control))
    means = values.groupby([obs["cell_type"].astype(str), obs["donor"].astype(str)]).mean()
    arms = obs.groupby("donor", observed=True)["condition"].first().astype(str)
    effects, p = {}, {}
    for kind, part in means.groupby(level=0):
        treated = part.index.get_level_values(1).map(arms).to_numpy() != control
        one, other = part[treated], part[~treated]
        effects[kind] = one.mean() - other.mean()
        p[kind] = pd.Series(stats.ttest_ind(one, other, equal_var=False).pvalue, index=part.columns)
    return Found(pd.DataFrame(effects).T, None, pd.DataFrame(p).T)


def type_differences(values: pd.DataFrame, obs: pd.DataFrame, control: str) -> pd.DataFrame:
    """Return the difference of the means of treated and control cells, by type."""
    treated = (obs["condition"].astype(str) != control).to_numpy()
    kinds = obs["cell_type"].astype(str)
    one, other = values[treated].groupby(kinds[treated]).mean(), values[~treated].groupby(kinds[~treated]).mean()
    return (one - other).dropna()


def wilcoxon(cohort: anndata.AnnData, control: str, minutes: float) -> Found:
    """Test cells by scanpy's rank_genes_groups, type by type, as many tutorials do."""
    import scanpy as sc

    del minutes
    made = logged(cohort)
    p = {}
    for kind in made.obs["cell_type"].astype(str).unique():
        part = made[(made.obs["cell_type"].astype(str) == kind).to_numpy()].copy()
        if part.obs["condition"].astype(str).value_counts().reindex([control], fill_value=0).min() < 2:
            continue
        if part.obs["condition"].astype(str).nunique() < 2:
            continue
        sc.tl.rank_genes_groups(part, "condition", reference=control, method="wilcoxon")
        (name,) = part.uns["rank_genes_groups"]["names"].dtype.names
        table = sc.get.rank_genes_groups_df(part, name).set_index("names")
        p[kind] = table["pvals"].reindex(part.var_names)
    return Found(type_differences(made.to_df(), made.obs, control), None, pd.DataFrame(p).T)


def cinemaot(cohort: anndata.AnnData, control: str, minutes: float) -> Found:
    """Match treated with control cells by CINEMA-OT's defaults."""
    import pertpy
    import scanpy as sc

    del minutes
    made = logged(cohort)
    sc.pp.pca(made)
    out = pertpy.tl.Cinemaot().causaleffect(made, pert_key="condition", control=control)
    treated = made.obs_names[(made.obs["condition"].astype(str) != control).to_numpy()]
    cells = pd.DataFrame(np.asarray(out.X), index=treated, columns=made.var_names)
    return of_cells(cells, made.obs)


def of_cells(cells: pd.DataFrame, obs: pd.DataFrame) -> Found:
    """Return effects of cells with their means by type."""
    return Found(cells.groupby(obs.loc[cells.index, "cell_type"].astype(str)).mean(), cells)


def stopping(minutes: float) -> Any:
    """Return a callback that stops a training after this many minutes of processor time."""
    from lightning.pytorch.callbacks import Callback

    began = time.process_time()

    class Stop(Callback):
        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            del module
            trainer.should_stop = trainer.should_stop or time.process_time() - began > 60 * minutes

    return Stop()


def scvi(cohort: anndata.AnnData, control: str, minutes: float) -> Found:
    """Train scVI with donors as batches, and decode every treated cell as of the treated and as of the control donors."""
    from scvi.model import SCVI

    made = cohort.copy()
    made.obs = made.obs.astype({"donor": str, "condition": str})
    SCVI.setup_anndata(made, batch_key="donor")
    model = SCVI(made)
    model.train(accelerator="cpu", callbacks=[stopping(minutes)], enable_progress_bar=False)
    print(f"epochs {len(model.history['elbo_train'])}", file=sys.stderr)
    arms = made.obs.groupby("donor")["condition"].first()
    treated = made[(made.obs["condition"] != control).to_numpy()].copy()

    def under(donors: list[str]) -> np.ndarray:
        decoded = [
            np.log1p(
                model.get_normalized_expression(treated, transform_batch=name, library_size=1e4, return_numpy=True)
            )
            for name in donors
        ]
        return np.asarray(np.mean(decoded, axis=0))

    effects = under(list(arms.index[arms != control])) - under(list(arms.index[arms == control]))
    return of_cells(pd.DataFrame(effects, index=treated.obs_names, columns=made.var_names), made.obs)


def mrvi(cohort: anndata.AnnData, control: str, minutes: float) -> Found:
    """Train MrVI with donors as samples, and take its fold changes of single cells by condition."""
    from scvi.external import MRVI

    made = cohort.copy()
    made.obs = made.obs.astype({"donor": str, "condition": str}).astype({"condition": "category"})
    MRVI.setup_anndata(made, sample_key="donor")
    model = MRVI(made)
    model.train(accelerator="cpu", callbacks=[stopping(minutes)], enable_progress_bar=False)
    print(f"epochs {len(model.history['elbo_train'])}", file=sys.stderr)
    model.update_sample_info(made)
    treated = made[(made.obs["condition"] != control).to_numpy()].copy()
    found = model.differential_expression(
        treated, sample_cov_keys=["condition"], store_lfc=True, store_baseline=True, mc_samples=10, delta=None
    )
    change = np.asarray(found["lfc"])[:, 0]  # (cells, genes), log2
    base = np.asarray(found["baseline_expression"])[0]
    base = base / base.sum(axis=1, keepdims=True) * 1e4
    effects = np.log1p(base * 2**change) - np.log1p(base)
    return of_cells(pd.DataFrame(effects, index=treated.obs_names, columns=made.var_names), made.obs)


TOOLS: dict[str, Tool] = {
    "ours-harmony": Tool(ours("harmony"), ("ndreamer_dist",), ("nested", "null", "kang"), "effects by cell and gene, denoised expression, tests on donors, overlap"),
    "ours-harmony-averaged": Tool(ours("harmony", AVERAGED), ("ndreamer_dist",), ("nested", "null", "kang"), "the same"),
    "ours-pca-averaged": Tool(ours("pca", AVERAGED), ("ndreamer_dist",), ("nested", "null", "kang"), "the same"),
    "ours-pca": Tool(ours("pca"), ("ndreamer_dist",), ("nested", "null", "kang"), "the same"),
    "ours-ndreamer": Tool(ours("ndreamer"), ("ndreamer_dist",), ("nested",), "the same, and a trained embedding"),
    "pseudobulk": Tool(pseudobulk, ("scanpy", "harmonypy"), ("nested", "null", "kang"), "effects by type, tests on donors; nothing by cell; all in memory"),
    "wilcoxon": Tool(wilcoxon, ("scanpy",), ("nested", "null", "kang"), "effects by type, tests that take cells for replicates"),
    "cinemaot": Tool(cinemaot, ("pertpy",), ("kang", "nested"), "effects by cell and gene; no donors, no test of genes", "pertpy"),
    "scvi": Tool(scvi, ("scvi",), ("nested",), "embedding, denoised expression, effects by cell through the decoder; Bayes factors over cells", "scvi"),
    "mrvi": Tool(mrvi, ("scvi",), ("nested",), "embedding, effects by cell as fold changes; a p by cell, none by gene", "scvi"),
}  # fmt: skip


# --- a process for each ------------------------------------------------------------------------------------------------


def child(tool: str, data: Path, control: str, out: Path, minutes: float) -> None:
    """Run one tool on one file and write its results."""
    found = TOOLS[tool].run(anndata.read_h5ad(data), control, minutes)
    parts = {"means": found.means, "cells": found.cells, "p": found.p}
    for name, frame in parts.items():
        if frame is not None:
            frame.astype(np.float32).to_parquet(f"{out}.{name}.parquet")


def measured(command: list[str], log: Path) -> dict[str, Any]:
    """Run a command with one thread; return its processor and wall seconds, its peak memory and whether it succeeded."""
    one = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"), "1")
    flags = {
        "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
        "OMP_WAIT_POLICY": "passive",
    }
    began = time.perf_counter()
    with log.open("wb") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream, env=os.environ | one | flags)
        _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return {
        "seconds": used.ru_utime + used.ru_stime, "wall": time.perf_counter() - began, "peak_gb": used.ru_maxrss / 1e6,
        "ended": process.returncode,
    }  # fmt: skip


def importable(python: str, names: tuple[str, ...]) -> bool:
    """Return whether an environment has all of some packages."""
    looked = "import importlib.util as u, sys; sys.exit(any(u.find_spec(n) is None for n in sys.argv[1:]))"
    return subprocess.run([python, "-c", looked, *names], check=False).returncode == 0


# --- cohorts and scores --------------------------------------------------------------------------------------------------


def cohorts(given: argparse.Namespace) -> dict[str, Path]:
    """Write the cohorts that do not exist yet; return their files."""
    import ndreamer_dist as nd

    files = {name: given.out / f"{name}.h5ad" for name in CONTROL}
    sizes = {"nested": (given.cells, given.donors, 1.0, 0), "null": (2 * given.cells, 2 * given.donors, 0.0, 1)}
    for name, (cells, donors, follow, seed) in sizes.items():
        store = given.out / f"{name}.zarr"
        if not files[name].exists():
            nd.simulate(
                store, cells=cells, genes=given.genes, batches=donors, design="nested", state_effects=follow, seed=seed
            )
            cohort = anndata.read_zarr(store)
            (drawn(cohort) if name == "null" else cohort).write_h5ad(files[name])
    if given.kang is None:
        del files["kang"]
    elif not files["kang"].exists():
        cohort = anndata.read_h5ad(given.kang)
        cohort.obs = cohort.obs[["condition", "cell_type"]].astype(str)
        cohort.write_h5ad(files["kang"])
    return files


def drawn(cohort: anndata.AnnData) -> anndata.AnnData:
    """Return the control donors, half of them called treated at random."""
    kept = cohort[(cohort.obs["condition"] == "control").to_numpy()].copy()
    donors = np.unique(kept.obs["donor"].astype(str))
    treated = np.random.default_rng(0).permutation(donors)[: len(donors) // 2]
    kept.obs["condition"] = np.where(kept.obs["donor"].astype(str).isin(treated), "treated", "control")
    return kept


def scores(name: str, out: Path, given: argparse.Namespace) -> dict[str, float]:
    """Return the scores of a tool's results."""
    read = {
        part: pd.read_parquet(f"{out}.{part}.parquet")
        for part in ("means", "cells", "p")
        if Path(f"{out}.{part}.parquet").exists()
    }
    if name == "null":
        return (
            {"p": float((read["p"].to_numpy()[np.isfinite(read["p"].to_numpy())] <= 0.05).mean())}
            if "p" in read
            else {}
        )
    if name == "kang":
        return of_kang(read["means"], given)
    return of_truth(read, given)


def of_truth(read: Mapping[str, pd.DataFrame], given: argparse.Namespace) -> dict[str, float]:
    """Return the agreement with a simulated cohort's truth."""
    from ndreamer_dist.datasets import load_truth

    truth = load_truth(given.out / "nested.zarr")
    genes = list(read["means"].columns)
    true = {kind: truth.mean_ite(kind, "treated", genes) for kind in read["means"].index}
    kinds = [kind for kind, effect in true.items() if np.abs(effect).max() > 0.1]
    said, right = read["means"].loc[kinds].to_numpy(), np.stack([true[kind] for kind in kinds])
    by_type = [np.corrcoef(one, two)[0, 1] for one, two in zip(said, right, strict=True)]
    result = {"mean_r": float(np.mean(by_type)), "rmse": float(np.sqrt(np.mean((said - right) ** 2)))}
    if "cells" in read:
        result |= of_single_cells(
            read["cells"], truth, kinds, [gene for gene in truth.effect_genes if gene in set(genes)]
        )
    return result


def of_single_cells(cells: pd.DataFrame, truth: Any, kinds: list[str], genes: list[str]) -> dict[str, float]:
    """Return r of single cells' effects, and of those averaged over tenths of the state inside a type."""
    rows = truth.positions(list(cells.index))
    obs, right, said = truth.obs(rows), truth.ite(rows, genes=genes), cells[genes].to_numpy()
    inside = np.isin(obs["cell_type"], kinds)
    binned: list[list[np.ndarray]] = [[], []]
    for kind in kinds:
        place = np.flatnonzero(obs["cell_type"] == kind)
        parts = np.array_split(place[np.argsort(obs["state"][place])], BINS)
        for values, kept in zip((said, right), binned, strict=True):
            means = np.stack([values[part].mean(axis=0) for part in parts])
            kept.append((means - means.mean(axis=0)).ravel())
    return {
        "cell_r": float(np.corrcoef(said[inside].ravel(), right[inside].ravel())[0, 1]),
        "state_r": float(np.corrcoef(*(np.concatenate(kept) for kept in binned))[0, 1]),
    }


def of_kang(means: pd.DataFrame, given: argparse.Namespace) -> dict[str, float]:
    """Return the agreement with differences of type means, and how often ISG15 comes first."""
    cohort = logged(anndata.read_h5ad(given.out / "kang.h5ad"))
    counts = pd.crosstab(cohort.obs["cell_type"].astype(str), cohort.obs["condition"].astype(str)).min(axis=1)
    plain = type_differences(cohort.to_df(), cohort.obs, CONTROL["kang"])
    kinds = [kind for kind in plain.index if counts[kind] >= LEAST_CELLS and kind in means.index]
    genes = [gene for gene in means.columns if gene in set(plain.columns)]
    said, right = means.loc[kinds, genes].to_numpy(), plain.loc[kinds, genes].to_numpy()
    pairs = list(zip(said, right, strict=True))
    first = sum(genes[int(row.argmax())] == "ISG15" for row in said)
    return {
        "kang_r": float(np.mean([np.corrcoef(one, two)[0, 1] for one, two in pairs])),
        "kang_slope": float(np.mean([np.polyfit(two, one, 1)[0] for one, two in pairs])),
        "isg15": first / len(kinds),
    }  # fmt: skip


# --- streaming -----------------------------------------------------------------------------------------------------------


def stream_ours(out: Path) -> dict[str, float]:
    """Stream mini-batches from packed.zarr by one process, and write the same cohort as h5ad for others."""
    bench: Any = importlib.import_module("benchmark_stream")
    names = {"groups": 40, "density": 0.07, "block_rows": 4096, "genes": 2000, "batch_size": STREAM_BATCH // 2}
    given = argparse.Namespace(**names, cpus=2, rows=STREAMED_ROWS)
    packed = bench.cohort(out / "stream", 102_400, given)
    if not (out / "stream.h5ad").exists():
        whole = sparse.vstack([packed.block(number) for number in range(packed.n_blocks)], format="csr")
        anndata.AnnData(whole).write_h5ad(out / "stream.h5ad")
    plan = bench.plan_of(packed, STREAMED_ROWS, given.batch_size)
    ways = bench.ways_of(packed, plan, argparse.Namespace(**vars(given), ways="own"))
    return {"rows_a_second": max(rate(lambda: (len(x) for x in ways["own"]())) for _ in range(2))}


def rate(batches: Callable[[], Iterator[int]]) -> float:
    """Return rows per second of processor time, of all threads, from the sizes of mini-batches."""
    began, rows = time.process_time(), 0
    while rows < STREAMED_ROWS:
        for size in batches():
            rows += size
    return rows / (time.process_time() - began)


def stream_annbatch(out: Path) -> dict[str, float]:
    """Shuffle the h5ad into annbatch's own store, and stream dense mini-batches from it by its defaults for shuffled data."""
    import annbatch
    import zarr

    zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline", "threading.max_workers": 2})
    began = time.process_time()
    store = annbatch.DatasetCollection(str(out / "annbatch.zarr"))
    if store.is_empty:
        store.add_adatas([str(out / "stream.h5ad")])
    wrote = time.process_time() - began

    def batches() -> Iterator[int]:
        loader = annbatch.Loader(shuffle=True, batch_size=STREAM_BATCH, chunk_size=32, preload_nchunks=512)
        return (len(batch["X"].toarray()) for batch in loader.use_collection(store))

    return {"rows_a_second": max(rate(batches) for _ in range(2)), "wrote_seconds": wrote}


STREAMS: dict[str, tuple[Callable[[Path], dict[str, float]], tuple[str, ...], str]] = {
    "stream-ours": (stream_ours, ("ndreamer_dist",), "own"),
    "stream-annbatch": (stream_annbatch, ("annbatch", "zarrs"), "annbatch"),
}


# --- all of it -------------------------------------------------------------------------------------------------------------


def main() -> None:
    """Run every tool on every cohort, and print the table."""
    given = arguments()
    if given.child:
        if given.child in STREAMS:
            print(json.dumps(STREAMS[given.child][0](given.out)))
        else:
            child(given.child, given.data, given.control, given.out, given.minutes)
        return
    given.out.mkdir(parents=True, exist_ok=True)
    pythons = {"own": sys.executable, **dict(word.split("=", 1) for word in given.python)}
    if given.stream:
        print(streams(given, pythons))
    files = cohorts(given)
    rows: dict[str, dict[str, Any]] = {}
    for name in given.tools.split(","):
        tool = TOOLS[name]
        python = pythons.get(tool.environment, sys.executable)
        if not importable(python, tool.needs):
            print(f"{name}: skipped, {', '.join(tool.needs)} cannot be imported", flush=True)
            continue
        rows[name] = {"gives": tool.gives}
        for cohort in tool.cohorts:
            if cohort in files:
                rows[name] |= one_cohort(given, name, cohort, files[cohort], python)
    print(markdown(rows))


def one_cohort(given: argparse.Namespace, name: str, cohort: str, file: Path, python: str) -> dict[str, Any]:
    """Return what a tool took and found on a cohort; measured once."""
    out = given.out / f"{name}-{cohort}"
    facts = Path(f"{out}.json")
    if not facts.exists():
        command = [python, __file__, "--child", name, "--data", str(file), "--control", CONTROL[cohort], "--out", str(out), "--minutes", str(given.minutes)]  # fmt: skip
        facts.write_text(json.dumps(measured(command, Path(f"{out}.log"))))
    took = json.loads(facts.read_text())
    print(f"{name} on {cohort}: {took}", file=sys.stderr, flush=True)
    if took["ended"]:
        return {f"{cohort}_seconds": "failed"}
    shown = {f"{cohort}_{key}": took[key] for key in ("seconds", "peak_gb")}
    return shown | scores(cohort, out, given)


def streams(given: argparse.Namespace, pythons: Mapping[str, str]) -> str:
    """Return the table of streaming."""
    lines = [
        "| mini-batches of 2048 x 2000, dense | rows a processor second | processor s in all | peak GB |",
        "|---|---|---|---|",
    ]
    for name, (_, needs, environment) in STREAMS.items():
        python = pythons.get(environment, sys.executable)
        if not importable(python, needs):
            lines.append(f"| {name} | skipped | | |")
            continue
        log = given.out / f"{name}.log"
        took = measured([python, __file__, "--child", name, "--out", str(given.out)], log)
        told = log.read_text().strip().splitlines()[-1]
        speed = told if took["ended"] else f"{json.loads(told)['rows_a_second']:.0f}"
        lines.append(f"| {name} | {speed} | {took['seconds']:.0f} | {took['peak_gb']:.2f} |")
    return "\n".join(lines)


COLUMNS = {
    "nested_seconds": ".0f", "nested_peak_gb": ".2f", "mean_r": ".3f", "rmse": ".3f", "cell_r": ".3f", "state_r": ".3f", "p": ".3f",
    "kang_seconds": ".0f", "kang_peak_gb": ".2f", "kang_r": ".3f", "kang_slope": ".2f", "isg15": ".0%",
}  # fmt: skip


def markdown(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the table."""
    lines = [f"| tool | {' | '.join(COLUMNS)} | gives |", "|---" * (len(COLUMNS) + 2) + "|"]
    for name, row in rows.items():
        cells = [
            format(row[key], how) if isinstance(row.get(key), float) else str(row.get(key, "-"))
            for key, how in COLUMNS.items()
        ]
        lines.append(f"| {name} | {' | '.join(cells)} | {row['gives']} |")
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tools", default=",".join(TOOLS))
    for name, default in {"cells": 8000, "genes": 1000, "donors": 12}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--kang", type=Path)
    parser.add_argument("--minutes", type=float, default=10.0, help="of training, at most, of processor time")
    parser.add_argument(
        "--python", action="append", default=[], metavar="ENVIRONMENT=PYTHON", help="scvi, pertpy, annbatch"
    )
    parser.add_argument("--stream", action="store_true")
    for name in ("child", "control"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
