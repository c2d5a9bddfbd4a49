"""Measure the effects stage and its parts, and the same averages by scipy in memory.

    python jobs/benchmark_effects.py --out /tmp/effects [--cells 40000 --genes 2000 --batches 8 --cpus 2]

A cohort is simulated and run in the space `pca`. Then the effects stage runs again, on Ray with `--cpus` processors and in this
process with one thread, where the processor time of every part is measured. For comparison, the same averages are computed as
products of scipy's sparse matrices, in memory with one thread, without writing.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from scipy import sparse
from threadpoolctl import threadpool_limits

import ndreamer_dist as nd
from ndreamer_dist import keys
from ndreamer_dist.cohort.packed import Packed
from ndreamer_dist.effects import averages, tables
from ndreamer_dist.effects import stage as effects
from ndreamer_dist.planning import stages
from ndreamer_dist.rundir.directory import RunDirectory
from ndreamer_dist.settings import Settings
from ndreamer_dist.storage.files import open_storage

NAMES = {"condition_key": "condition", "control": "control", "batch_key": "donor"}


def main() -> None:
    """Print the table."""
    given = arguments()
    given.out.mkdir(parents=True, exist_ok=True)
    cohort, out = given.out / "cohort.zarr", given.out / "run"
    if not cohort.exists():
        nd.simulate(cohort, cells=given.cells, genes=given.genes, batches=given.batches)
    job(cohort, out, given.cpus)
    run = RunDirectory.at(out)
    settings = Settings.build(config=run.read_json(keys.RUN_JSON)["settings"])
    packed = Packed.open(run, settings.pack.block_rows)
    show("effects stage, Ray", again(cohort, out, given.cpus, run), packed, run)
    with threadpool_limits(1):
        clock = timed(lambda: again(cohort, out, None, run))
        show("effects stage, this process", clock.pop("all"), packed, run)
        show("    its processor time", clock.pop("the stage"), packed, run)
        print("\n".join(f"    {name:<34}{seconds:8.1f} s" for name, seconds in clock.items()))
        print(f"scipy.sparse in memory, nothing written: {packed.n_rows / in_memory(run, packed):,.0f} cells/s")


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    for name, default in {"cells": 40_000, "genes": 2_000, "batches": 8, "cpus": 2}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    return parser.parse_args()


def job(cohort: Path, out: Path, cpus: int | None) -> None:
    """Run the job, in this process if `cpus` is None."""
    where = {"run.serial": True} if cpus is None else {"run.serial": False, "run.cpus": cpus}
    nd.run(cohort, out=out, embedding="pca", settings=where, **NAMES)


def again(cohort: Path, out: Path, cpus: int | None, run: RunDirectory) -> float:
    """Delete the effects, compute them again, and return the seconds of the stage."""
    for name in (f"{keys.DONE}/{keys.STAGE_EFFECTS}", keys.RESULTS):
        open_storage(out).delete(name)
    job(cohort, out, cpus)
    lines = [json.loads(line) for line in run.storage.read(keys.STAGES_LOG).decode().splitlines()]
    return float([line["seconds"] for line in lines if line["stage"] == keys.STAGE_EFFECTS][-1])


def show(what: str, seconds: float, packed: Packed, run: RunDirectory) -> None:
    """Print one line."""
    layers = sum(size for name, size in run.storage.list(keys.RESULTS).items() if "/layers/" in name)
    dense = packed.n_rows * packed.n_genes * 3 * 4
    print(
        f"{what}: {seconds:.1f} s, {packed.n_rows / seconds:,.0f} cells/s, {dense / seconds / 1e6:.0f} MB/s of dense "
        f"values, {layers / seconds / 1e6:.0f} MB/s on disk ({layers / dense:.0%} of dense)"
    )


def timed(work: Callable[[], float]) -> dict[str, float]:
    """Run some work, and return the processor seconds of the parts of the stage."""
    clock: dict[str, float] = {}
    parts: list[tuple[Any, str, str]] = [
        (stages, "run_effects", "the stage"),
        (effects.RunOrigin, "edges", "matches read"),
        (effects, "average_over", "averages planned"),
        (effects, "average_through", "rows averaged, targets read"),
        (effects, "load_block", "expression read, targets too"),
        (effects, "layer_values", "layers made"),
        (tables, "write_layer", "layers made, compressed, written"),
        (tables, "write_obsm", "obsm compressed, written"),
        (tables, "write_expression", "expression written"),
        (tables, "finish", "tables written"),
    ]
    with _clocks(parts, clock):
        clock["all"] = work()
    return clock


@contextmanager
def _clocks(parts: list[tuple[Any, str, str]], clock: dict[str, float]) -> Iterator[None]:
    kept = [(home, name, getattr(home, name)) for home, name, _ in parts]
    for (home, name, title), (_, _, function) in zip(parts, kept, strict=True):
        setattr(home, name, _clocked(function, title, clock))
    try:
        yield
    finally:
        for home, name, function in kept:
            setattr(home, name, function)


def _clocked(function: Callable[..., Any], title: str, clock: dict[str, float]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        started = time.process_time()
        try:
            return function(*args, **kwargs)
        finally:
            clock[title] = clock.get(title, 0.0) + time.process_time() - started

    return call


def in_memory(run: RunDirectory, packed: Packed) -> float:
    """Return the processor seconds of the same averages as sparse products, all in memory."""
    settings = Settings.build(config=run.read_json(keys.RUN_JSON)["settings"])
    design, rows = packed.design, np.arange(packed.n_rows)
    edges = effects.RunOrigin(run, design, (), "int32").edges(rows, design.needed_edges("needed"))
    x = sparse.vstack([packed.block(b) for b in range(packed.n_blocks)], format="csr").astype(np.float64)
    counted = {True: settings.denoise.counted(design.fewest_groups), False: settings.match.neighbours}
    weights = []
    for term in (*averages.layer_terms(keys.LAYER_DENOISED), *averages.layer_terms(keys.LAYER_ITE)):
        average = averages.average_over(design, edges, rows, term, settings.match.bandwidth, counted[term.denoised])
        each = average.weight / average.groups[average.cell]
        weights.append(sparse.csr_matrix((each, (average.cell, average.row)), shape=(packed.n_rows,) * 2))
    started = time.process_time()
    for first in range(0, packed.n_rows, packed.block_rows):
        part = slice(first, first + packed.block_rows)
        denoised, own, control = (np.asarray((weight[part] @ x).todense()) for weight in weights)
        _ = denoised.astype(np.float32), x[part].toarray() - denoised, (own - control).astype(np.float32)
    return time.process_time() - started


if __name__ == "__main__":
    main()
