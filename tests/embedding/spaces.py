"""A tiny cohort with coordinates in `obsm`, and runs of it in spaces that need no network."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd

import ndreamer_dist as nd
from ndreamer_dist import keys
from tests.tiny import NAMES, SETTINGS, as_memory, tiny_cohort

GIVEN = f"{keys.OBSM_PREFIX}X_mine"
SPACES = (keys.SPACE_PCA, keys.HARMONY, keys.STATE, GIVEN)
QUICK = {**SETTINGS, "effects.store": "ite"}


def cohort_with_coordinates(place: Path) -> anndata.AnnData:
    """Return the cohort, with valid and invalid coordinates in `obsm`."""
    made = as_memory(tiny_cohort(place))
    rng = np.random.default_rng(0)
    made.obsm["X_mine"] = rng.normal(size=(made.n_obs, 7))
    made.obsm["frame"] = pd.DataFrame(made.obsm["X_mine"], index=made.obs_names, columns=list("abcdefg"))
    made.obsm["counts"] = rng.integers(0, 9, (made.n_obs, 3))
    made.obsm["mixed"] = pd.DataFrame({"x": made.obsm["X_mine"][:, 0], "name": "a"}, index=made.obs_names)
    made.obsm["holes"] = np.where(np.arange(made.n_obs)[:, None] == 17, np.nan, made.obsm["X_mine"])
    return made


def run(cohort: Any, out: Path, embedding: str, *, redo: bool = False, **settings: Any) -> nd.Run:
    """Run the cohort in a space."""
    made = {**QUICK, **settings}
    return nd.run(cohort, out=out, preset="small", embedding=embedding, settings=made, redo=redo, **NAMES)


def folder(run: Path, name: str) -> Path:
    """Return the directory of a space, in a run whose first space is the first of `SPACES`."""
    return run if name == SPACES[0] else run / keys.space_folder(name)


def written(cohort: anndata.AnnData, path: Path) -> None:
    """Write a cohort as zarr or h5ad."""
    with warnings.catch_warnings(), anndata.settings.override(zarr_write_format=3):
        warnings.simplefilter("ignore")  # anndata's about future defaults
        cohort.write_zarr(path) if path.suffix == ".zarr" else cohort.write_h5ad(path)
