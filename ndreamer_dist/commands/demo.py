"""Run the whole job on a simulated cohort and score it: `ndreamer-dist demo`."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from anndata import AnnData
from scipy import sparse
from tqdm.auto import tqdm

from ndreamer_dist import keys
from ndreamer_dist.compute.events import bars_disabled
from ndreamer_dist.datasets import CELL_TYPE, CONDITION, DONOR, Truth, load_truth, simulate, truth_path
from ndreamer_dist.datasets.local_score import local_scores
from ndreamer_dist.datasets.score import Recovery, recovery
from ndreamer_dist.pipeline import run
from ndreamer_dist.stats.results import Results
from ndreamer_dist.storage.files import open_storage

DEMO_EPOCHS = 60
"""Fewer than the preset's 100, which suffices for this cohort and saves time."""


def run_demo(
    out: Path, *, sizes: Mapping[str, Any], seed: int, settings: Mapping[str, Any], fresh: bool = False
) -> str:
    """Simulate a cohort of four donors in two conditions, run the small preset on it, and return the scores as text.

    Parameters
    ----------
    out
        Folder for the cohort and the run. A cohort that is there already is used again.
    sizes
        Arguments of `datasets.simulate`: `cells`, `genes`, `state_effects`.
    settings
        Further settings by dotted name.
    fresh
        Delete the cohort and the run first.
    """
    cohort, directory = out / "cohort.zarr", out / "run"
    if fresh:
        open_storage(cohort).delete()
        open_storage(truth_path(cohort)).delete()
    started = time.perf_counter()
    if not open_storage(cohort).exists("zarr.json"):
        simulate_with_bar(cohort, **sizes, seed=seed)
    simulated = time.perf_counter()
    finished = run(
        cohort, out=directory, condition_key=CONDITION, control="control", batch_key=DONOR, preset="small",
        settings={"seed": seed, "train.epochs": DEMO_EPOCHS, **settings}, fresh=fresh,
    )  # fmt: skip
    ended = time.perf_counter()
    where = shlex.quote(str(directory))
    lines = [
        score(finished.results, load_truth(cohort)).table(),
        "",
        f"Simulated in {simulated - started:.0f} s, ran in {ended - simulated:.0f} s.",
        f"The cohort is {cohort}, the run {directory}. Look further:",
        f"  ndreamer-dist info {where}",
        f"  ndreamer-dist report {where} --by cell_type",
        f"  ndreamer-dist get {where} --layer ite --cells 'cell_type == \"type_1\"' --out type_1.h5ad",
    ]
    return "\n".join(lines)


def simulate_with_bar(path: str | Path, *, cells: int, **sizes: Any) -> None:
    """Simulate a cohort (see `datasets.simulate`), with a progress bar on a terminal."""
    with tqdm(total=cells, desc="simulate", disable=bars_disabled()) as bar:
        simulate(path, cells=cells, **sizes, progress=lambda done, _: bar.update(done - bar.n))


def score(results: Results, truth: Truth) -> Recovery:
    """Score the results of a run on a simulated cohort against the true effects."""
    obs = results.packed_obs
    readers: dict[str, Callable[..., AnnData]] = {
        "X": results.expression,
        keys.LAYER_DENOISED: results.denoised,
        keys.LAYER_ITE: partial(results.ite, drop_undefined=False),
    }

    def read(layer: str, start: int, stop: int) -> np.ndarray:
        values = readers[layer](cells=list(obs.index[start:stop])).X
        return values.toarray() if sparse.issparse(values) else np.asarray(values)

    genes = list(results.var_names)
    scores = recovery(
        truth, read, cell_type=obs[CELL_TYPE], condition=obs[CONDITION], donor=obs[DONOR], genes=genes,
    )  # fmt: skip
    if not truth.law.effects:
        return scores
    local = local_scores(
        truth, partial(read, keys.LAYER_ITE), positions=truth.positions(list(obs.index)),
        points=results.embedding(pca=True, order="packed").to_numpy(), genes=genes,
    )  # fmt: skip
    return replace(scores, local=local)
