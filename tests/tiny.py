"""A cohort and settings so small that the whole job takes seconds, and a way to compare what two runs wrote."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import zarr
from scipy import sparse

from ndreamer_dist import keys
from ndreamer_dist.datasets import simulate
from ndreamer_dist.storage.arrays import open_array
from ndreamer_dist.storage.files import open_storage

NAMES: dict[str, Any] = {"condition_key": "condition", "control": "control", "batch_key": "donor"}
SETTINGS: dict[str, Any] = {
    "run.serial": True, "run.progress": False, "hvg.num_hvg": 150, "pack.block_rows": 256, "embed.tile_rows": 128,
    "embed.dimensions": 10, "clusters.n_pcs": 10, "model.encoder": [32, 16], "model.codebooks": 3, "model.codes": 16,
    "model.latent": 16, "model.decoder": [16, 32], "train.batch_size": 64, "train.epochs": 6, "train.reset_every": 5,
    "train.passes": 1, "train.checkpoint_steps": 5, "cohort.min_group_cells": 20,
}  # fmt: skip
PROMPT = {
    "RAY_worker_niceness": "0", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_idle_worker_killing_time_threshold_ms": "60000", "RAY_USAGE_STATS_ENABLED": "0",
}  # fmt: skip
"""Environment of every Ray of the tests.

Workers are not polite to the other tests, or they would wait for ever. Ray Train looks after its workers every 2 s by
itself, and takes in one checkpoint each time. A worker without work would be ended after 1 s, and another made for the
next task. An actor of Ray Data would count its use for Ray's makers.
"""
STORES = (keys.PACKED, keys.EMBEDDING, keys.MATCHES, keys.RESULTS)


def tiny_cohort(folder: Path, **changes: Any) -> Path:
    """Simulate 900 cells of 3 donors, crossed, and return the store's path."""
    path = folder / "cohort.zarr"
    simulate(path, **{"cells": 900, "genes": 200, "batches": 3, "cell_types": 3, "seed": 1, **changes})
    return path


def as_memory(path: Path) -> anndata.AnnData:
    """Return a stored cohort as an AnnData in memory."""
    return anndata.read_zarr(path)


def arrays(store: Path) -> dict[str, np.ndarray]:
    """Return every array of a zarr store by its path; values, not bytes on disk."""
    storage = open_storage(store)
    found = {}
    for metadata in sorted(store.rglob("zarr.json")):
        if json.loads(metadata.read_text())["node_type"] == "array":
            name = str(metadata.parent.relative_to(store))
            found[name] = np.asarray(open_array(storage, name)[...])  # edges not asked for are not there
    return found


def assert_same_bits(first: Path, second: Path, stores: tuple[str, ...] = STORES) -> None:
    """Fail where a value of one run's stores differs from the other's by a single bit."""
    for store in stores:
        one, other = arrays(first / store), arrays(second / store)
        assert one.keys() == other.keys()
        assert len(one) > 3
        for name, values in one.items():
            kept = other[name]
            same = np.array_equal(values, kept, equal_nan=values.dtype.kind == "f")
            assert same, f"{store}/{name} differs"
            assert values.dtype == kept.dtype


def undone(reference: Path, copy: Path, stage: str) -> Path:
    """Copy a finished run as it was before a stage."""
    shutil.copytree(reference, copy)
    for later in keys.STAGES[keys.STAGES.index(stage) :]:
        shutil.rmtree(copy / keys.DONE / later)
    (copy / keys.RESULTS / "zarr.json").unlink()
    (copy / keys.LOCK).unlink(missing_ok=True)  # in object storage it would be a lease
    return copy


def layer_names(adata: anndata.AnnData) -> list[str]:
    """Return the names of an AnnData's layers; from anndata 0.13 on, X is one of them and has none."""
    return [name for name in adata.layers if name is not None]


def write_into(root: zarr.Group, name: str, value: object) -> None:
    """Write an element at a place in a store, as a user's script does; anndata 0.13 takes no path."""
    folder, _, last = name.rpartition("/")
    with anndata.settings.override(auto_shard_zarr_v3=False):
        anndata.io.write_elem(root[folder] if folder else root, last, value)


def dense(values: Any) -> np.ndarray:
    """Return a matrix as an array."""
    return values.toarray() if sparse.issparse(values) else np.asarray(values)


def run_words(cohort: Path, out: Path, settings: dict[str, Any], *more: str) -> list[str]:
    """Return the `run` command that NAMES and these settings make."""
    names = ["--condition-key", NAMES["condition_key"], "--control", NAMES["control"], "--batch-key", "donor"]
    sets = [word for name, value in settings.items() for word in ("--set", f"{name}={value}".replace("'", ""))]
    return ["run", str(cohort), "--out", str(out), "--preset", "small", *names, *sets, *more]
