"""Small cohorts of counts in the forms that users have, and settings and run directories for the cohort's stages."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scanpy as sc
from scipy import sparse

from ndreamer_dist.cohort.design import Design, build_design
from ndreamer_dist.cohort.source import fingerprint, open_source
from ndreamer_dist.compute.executor import SerialRuntime
from ndreamer_dist.planning.stages import stage_keys
from ndreamer_dist.rundir.directory import RunDirectory
from ndreamer_dist.settings import CohortSettings, RunSettings, Settings

SERIAL = SerialRuntime(RunSettings(serial=True))


def cohort_settings(*, batch_keys: Sequence[str] = (), exclude: Sequence[str] = (), **names: Any) -> CohortSettings:
    """Return settings that keep groups of any size; with `min_group_cells`, smaller groups are dropped."""
    small = {"min_group_cells": 1, "small_groups": "drop"}
    return CohortSettings(**{"batch_key": batch_keys, "exclude_conditions": exclude, **small, **names})


def designed(
    obs: pd.DataFrame, *, keep: np.ndarray | None = None, **names: Any
) -> tuple[Design, np.ndarray, pd.Categorical]:
    """Return the parts of `build_design` with `cohort_settings`."""
    grouped = build_design(obs, cohort_settings(**names), keep)
    return grouped.design, grouped.groups, grouped.reasons


def counts(
    cells: int = 400,
    genes: int = 90,
    *,
    donors: int = 2,
    conditions: Sequence[str] = ("stim", "ctrl"),
    seed: int = 0,
    density: float = 1.0,
) -> ad.AnnData:
    """Return a cohort of counts, cells in random order; the first five genes are absent from the first group."""
    rng = np.random.default_rng(seed)
    obs = pd.DataFrame(
        {
            "condition": rng.choice(list(conditions), cells),
            "donor": pd.Categorical(rng.choice([f"D{i}" for i in range(donors)], cells)),
            "age": rng.integers(20, 90, cells),
            "score": rng.normal(size=cells),
        },
        index=[f"cell{i}" for i in range(cells)],
    )
    means = rng.gamma(0.6, 2.0, genes) * density
    kinds = rng.gamma(1.0, 1.0, (3, genes))
    x = rng.poisson(means * kinds[rng.integers(0, 3, cells)] * rng.gamma(4, 0.25, (cells, 1))).astype(np.float32)
    x[np.ix_((obs["condition"] == conditions[0]).to_numpy() & (obs["donor"] == "D0").to_numpy(), range(5))] = 0
    x[x.sum(axis=1) == 0, genes - 1] = 1
    var = pd.DataFrame(index=[f"g{i}" for i in rng.permutation(genes)])
    return ad.AnnData(sparse.csr_matrix(x), obs=obs, var=var)


def settings_of(**overrides: Any) -> Settings:
    """Return serial settings; two underscores in a name stand for a dot: `hvg__num_hvg=50`."""
    named = {name.replace("__", "."): value for name, value in overrides.items()}
    base = {
        "cohort.condition_key": "condition", "cohort.control": "ctrl", "cohort.batch_key": "donor",
        "cohort.min_group_cells": 10, "cohort.chunk_rows": 32, "hvg.num_hvg": 40, "pack.block_rows": 64,
        "embed.tile_rows": 32, "run.serial": True, "clusters.iterations": 2,
    }  # fmt: skip
    return Settings.build(overrides={**base, **named})


def opened(folder: Path, cohort: Any, settings: Settings) -> tuple[RunDirectory, Any, dict[str, str]]:
    """Return run directory, source and stage keys."""
    source = open_source(cohort, layer=settings.cohort.layer)
    identity = fingerprint(source, settings.cohort.condition_key, settings.cohort.batch_key)
    return RunDirectory.at(folder), source, stage_keys(settings, identity)


def scanpy_selection(
    adata: ad.AnnData, groups: pd.Series | None, num_hvg: int, *, normalise: bool = True
) -> ad.AnnData:
    """Return the cohort after scanpy's preprocessing, with selected genes in `var`; without groups, no batch key."""
    made = adata.copy()
    made.X = sparse.csr_matrix(made.X).astype(np.float32)
    if normalise:
        sc.pp.normalize_total(made, target_sum=1e4)
        sc.pp.log1p(made)
    batch_key = None if groups is None else "group"
    if groups is not None:
        made.obs["group"] = pd.Categorical(groups.to_numpy())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scanpy warns about genes that do not vary
        sc.pp.highly_variable_genes(made, flavor="seurat", batch_key=batch_key, n_top_genes=num_hvg)
    return made


def files_below(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Return the modification time and the bytes of each file, by path."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def as_zarr(version: int) -> Callable[[ad.AnnData, Path], str]:
    def write(adata: ad.AnnData, folder: Path) -> str:
        with warnings.catch_warnings(), ad.settings.override(zarr_write_format=version, auto_shard_zarr_v3=False):
            warnings.simplefilter("ignore")  # anndata announces new defaults
            adata.write_zarr(folder / "in.zarr")
        return str(folder / "in.zarr")

    return write


def as_h5ad(adata: ad.AnnData, folder: Path) -> str:
    adata.write_h5ad(folder / "in.h5ad")
    return str(folder / "in.h5ad")


def backed(adata: ad.AnnData, folder: Path) -> ad.AnnData:
    return ad.read_h5ad(as_h5ad(adata, folder), backed="r")


PLACES = {"h5ad": as_h5ad, "zarr2": as_zarr(2), "zarr3": as_zarr(3), "memory": lambda a, _: a, "backed": backed}
