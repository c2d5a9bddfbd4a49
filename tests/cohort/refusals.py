"""Every refusal of a cohort, made to happen: the rows of docs/refusals.md.

`python -m tests.cohort.refusals` prints the page anew.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
from scipy import sparse

from ndreamer_dist.cohort.genes import run_cohort
from ndreamer_dist.errors import NDreamerError
from ndreamer_dist.runtime import Needs, check_resources
from ndreamer_dist.settings import Settings
from tests.cohort.inputs import SERIAL, counts, opened, settings_of

HEAD = """# What is refused, and how

Each row is an input or a setting that cannot be used, and the one line that says so. Python raises an `NDreamerError`
(`CohortError` for the cohort) with this text; the command line prints it and ends with exit code 2, without a stack
trace. Nothing has been started then; only values that are negative, NaN or infinite are met later, on the first pass
over the matrix. `DIR` stands for a folder. The rows are made by running them: `python -m tests.cohort.refusals`.

| refused | message |
|---|---|
"""
PIPELINE = """
Refused by the pipeline, since they depend on the run directory:

| refused | message (pipeline) |
|---|---|
| the directory holds another input's run | `DIR holds a run of another input; choose another --out, or start over there with --fresh` |
| the directory holds something else | `DIR holds files that are not a run's; choose another --out` |
| finished stages were made with other settings | `DIR was made with other settings (...); --redo runs these stages again: ...; --fresh starts over` |
| the directory is a web server's | `https://... can only be read; choose a folder or an object store (s3://, gs://, az://) to write to` |
| the directory is in use | `DIR is being worked on by another run (...); wait for it, or choose another --out` |

## What is not refused, but said

Groups of fewer than `min_group_cells` cells (left out or kept, by name and size), cells without a single count (left
out), and batches without a control ("k of B batches hold no control: their controls come from the other batches",
which is ordinary) are logged and kept in `cohort/summary.json`; `dropped.parquet` names every cell left out, with the
reason. Fewer genes than `num_hvg` is fine: all are kept.
"""


def _cohort(change: Callable[[ad.AnnData], object] | None = None, **overrides: object) -> Callable[[Path], object]:
    """Return a case: a small cohort, changed, and run with these settings."""

    def case(folder: Path) -> object:
        adata, settings = counts(200, 30), settings_of(**overrides)
        if change is not None:
            change(adata)
        run, source, key = opened(folder / "run", adata, settings)
        return run_cohort(run, settings, source, SERIAL, key["cohort"])

    return case


def _stored(name: str, damage: Callable[[Path], object]) -> Callable[[Path], object]:
    """Return a case: a stored cohort, damaged, and opened."""

    def case(folder: Path) -> object:
        path = folder / name
        with warnings.catch_warnings(), ad.settings.override(auto_shard_zarr_v3=False, zarr_write_format=3):
            warnings.simplefilter("ignore")
            write = ad.AnnData.write_zarr if name.endswith("zarr") else ad.AnnData.write_h5ad
            write(counts(200, 30), path)
        damage(path)
        return opened(folder / "run", str(path), settings_of())

    return case


def _set(row: int, gene: int, value: float) -> Callable[[ad.AnnData], object]:
    def change(adata: ad.AnnData) -> None:
        x = adata.X.toarray()
        x[row, gene] = value
        adata.X = sparse.csr_matrix(x)

    return change


def _column(name: str, values: Callable[[ad.AnnData], object]) -> Callable[[ad.AnnData], object]:
    return lambda adata: adata.obs.__setitem__(name, values(adata))


def _logged(adata: ad.AnnData) -> None:
    adata.X.data = np.log1p(adata.X.data / np.repeat(adata.X.sum(axis=1).A1, np.diff(adata.X.indptr)) * 1e4)


def _few_controls(adata: ad.AnnData) -> np.ndarray:
    return np.where(np.arange(adata.n_obs) < 5, "ctrl", np.where(np.arange(adata.n_obs) < 100, "stim", "drug"))


def _without(group: str) -> Callable[[Path], object]:
    def damage(path: Path) -> None:
        with h5py.File(path, "r+") as file:
            del file[group]

    return damage


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _shorten(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        data = file["X/data"][:-7]
        del file["X/data"]
        file["X/data"] = data


CASES: dict[str, Callable[[Path], object]] = {
    "no such file": lambda folder: opened(folder, str(folder / "cohort.h5ad"), settings_of()),
    "an h5ad file cut short": _stored("cohort.h5ad", _cut),
    "a file that is no HDF5": _stored("cohort.h5ad", lambda path: path.write_text("cell,gene\n")),
    "an HDF5 file that is not AnnData": _stored("cohort.h5ad", _without("obs")),
    "a store without X": _stored("cohort.h5ad", _without("X")),
    "a matrix whose parts do not fit": _stored("cohort.h5ad", _shorten),
    "a zarr store with a chunk missing": _stored("cohort.zarr", lambda path: (path / "X/data/c/0").unlink()),
    "a folder that is no zarr store": _stored("cohort.zarr", lambda path: (path / "zarr.json").unlink()),
    "a misspelled layer": _cohort(lambda a: a.layers.__setitem__("counts", a.X), cohort__layer="count"),
    "a layer where there is none": _cohort(cohort__layer="counts"),
    "cell names used twice": _cohort(lambda a: setattr(a, "obs_names", ["cell1", *a.obs_names[1:]])),
    "gene names used twice": _cohort(lambda a: setattr(a, "var_names", ["ISG15", "ISG15", *a.var_names[2:]])),
    "input columns with our prefix": _cohort(_column("ndreamer_group", lambda _: 1)),
    "column names that cannot be stored": _cohort(_column("IFN/ctrl", lambda _: 1)),
    "two columns of one name": _cohort(lambda a: setattr(a, "obs", pd.concat([a.obs, a.obs[["age"]]], axis=1))),
    "values that are no real numbers": _cohort(lambda a: setattr(a, "X", a.X.astype(np.complex64))),
    "no condition key": _cohort(cohort__condition_key=None),
    "a misspelled condition key": _cohort(cohort__condition_key="conditon"),
    "a misspelled batch key": _cohort(cohort__batch_key="doner"),
    "one column as condition and batch": _cohort(cohort__batch_key="condition"),
    "a batch key given twice": _cohort(cohort__batch_key=["donor", "donor"]),
    "no control": _cohort(cohort__control=None),
    "a control that no cell has": _cohort(cohort__control="control"),
    "fewer than two conditions": _cohort(_column("condition", lambda _: "ctrl")),
    "missing values in the condition": _cohort(
        _column("condition", lambda a: a.obs["condition"].where(np.arange(a.n_obs) % 50 != 9))
    ),
    "a condition column of lists": _cohort(_column("condition", lambda a: pd.Series([["ctrl"]] * a.n_obs, a.obs_names))),
    "missing values in a batch column": _cohort(
        _column("donor", lambda a: a.obs["donor"].where(np.arange(a.n_obs) != 7))
    ),
    "a control that min_group_cells makes vanish": _cohort(
        _column("condition", _few_controls), cohort__min_group_cells=10
    ),
    "a condition that min_group_cells makes vanish": _cohort(
        _column("condition", _few_controls), cohort__min_group_cells=10, cohort__control="drug",
        cohort__batch_key=None,
    ),
    "small groups, with small_groups=error": _cohort(
        cohort__min_group_cells=60, cohort__small_groups="error"
    ),
    "min_genes that no cell of a condition reaches": _cohort(cohort__min_genes=31),
    "min_cells that no gene reaches": _cohort(cohort__min_cells=201),
    "a negative value": _cohort(_set(17, 3, -1.5)),
    "NaN": _cohort(_set(150, 29, np.nan)),
    "an infinite value": _cohort(_set(1, 0, np.inf)),
    "log-normalised values, with normalise=counts": _cohort(_logged, cohort__normalise="counts"),
    "counts, with normalise=none": _cohort(cohort__normalise="none"),
    "neither counts nor log-normalised, with normalise=auto": _cohort(
        lambda a: setattr(a, "X", a.X * np.float32(13.37))
    ),
    "a misspelled setting": lambda _: Settings.build(overrides={"train.epoch": 5}),
    "a setting out of range": lambda _: Settings.build(overrides={"hvg.num_hvg": 0}),
    "an unknown preset": lambda _: Settings.build(preset="papr"),
    "not enough memory": lambda folder: check_resources(
        Needs(memory=64 * 10**9, disk=1), memory=16 * 10**9, disk=10, where=str(folder)
    ),
    "not enough disk": lambda folder: check_resources(
        Needs(memory=1, disk=80 * 10**9), memory=10, disk=20 * 10**9, where=str(folder)
    ),
}  # fmt: skip


def message_of(name: str, folder: Path) -> str:
    """Return the message that a case gives, with the folder's name taken out."""
    try:
        CASES[name](folder)
    except NDreamerError as error:
        return str(error).replace(str(folder), "DIR")
    msg = f"{name!r} was not refused"
    raise AssertionError(msg)


def row(name: str, message: str) -> str:
    """Return a row of the page."""
    return f"| {name} | `{message.replace('|', chr(92) + '|')}` |"


def page() -> str:
    """Return the whole page."""
    rows = []
    for name in CASES:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(row(name, message_of(name, Path(folder))))
    return HEAD + "\n".join(rows) + "\n" + PIPELINE


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    print(page(), end="")
