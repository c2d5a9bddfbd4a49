"""Produce every refusal of a cohort, a setting or a run directory on the command line, for docs/refusals.md.

`python -m tests.cohort.refusals` prints the page.
"""

from __future__ import annotations

import gzip
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
from scipy import sparse

import ndreamer_dist as nd
from ndreamer_dist import cli
from ndreamer_dist.rundir.directory import RunDirectory
from tests.cohort.inputs import counts
from tests.fuzz.helpers import Said, said

HEAD = """# What is refused, and how

Each row is a command that is refused, and its error message. The command line prints the message to standard error and
ends with exit code 2, without a stack trace; Python raises an `NDreamerError` (`CohortError` for the cohort) with the
same text. Nothing has been started or written then, not even the run directory. `DIR` stands for a folder, `N` for a
number that depends on the machine. `python -m tests.cohort.refusals` generates the rows by running the commands.

| refused | message |
|---|---|
"""
ON_THE_WAY_HEAD = """
Some errors show only when all values are read. They are raised on the first pass over the matrix, after the run
directory has been created. It holds no results then, and the same command with the corrected cohort can use it:

| refused on the first pass | message |
|---|---|
"""
IN_PYTHON_HEAD = """
These cannot be stored in a file and occur only in an AnnData in memory:

| refused in Python | message |
|---|---|
"""
TAIL = """
## What is reported, but not refused

These are logged and kept in `cohort/summary.json`:

- groups of fewer than `min_group_cells` cells, by name and size: left out or kept, or merged in a screen;
- cells without a single count, which are left out;
- batches without a control ("k of B batches hold no control: their controls come from the other batches"), which is ordinary;
- a condition that shares no batch with the control, if one of the two has a single batch: its effect cannot be told from a
  difference between batches;
- names of conditions and batches such as `nan`.

`dropped.parquet` names every cell left out, with the reason. If there are fewer genes than `num_hvg`, all are kept.
"""
NAMES = {"condition_key": "condition", "control": "ctrl", "batch_key": "donor"}
SETTINGS = {"cohort.min_group_cells": 10, "run.serial": True, "run.progress": False, "hvg.num_hvg": 20}

Work = Callable[[], object]
Case = Callable[[Path], Work]
"""Prepares the input of a refusal in a folder, and returns the command that is refused."""


def _words(cohort: Path | str, out: Path | str, *more: str, **names: str | None) -> Work:
    """Return a `run` command as a function; options with the value None are omitted."""
    given = {name: value for name, value in {**NAMES, **names}.items() if value is not None}
    options = [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", value)]
    sets = [word for name, value in SETTINGS.items() for word in ("--set", f"{name}={value}")]
    words = ["run", str(cohort), "--out", str(out), "--preset", "small", *options, *sets, *more]
    return lambda: cli.run_command(words)


def _write(adata: ad.AnnData, path: Path) -> Path:
    with warnings.catch_warnings(), ad.settings.override(auto_shard_zarr_v3=False, zarr_write_format=3):
        warnings.simplefilter("ignore")
        (adata.write_zarr if path.suffix == ".zarr" else adata.write_h5ad)(path)
    return path


def _cohort(
    change: Callable[[ad.AnnData], object] | None = None, *more: str, cells: int = 200, **names: str | None
) -> Case:
    """Return a case: change and store a small cohort, and run it with further options."""

    def case(folder: Path) -> Work:
        adata = counts(cells, 30)
        if change is not None:
            change(adata)
        return _words(_write(adata, folder / "cohort.h5ad"), folder / "run", *more, **names)

    return case


def _stored(name: str, damage: Callable[[Path], object], *more: str) -> Case:
    """Return a case: store a cohort, damage the file or folder, and run it."""

    def case(folder: Path) -> Work:
        path = _write(counts(200, 30), folder / name)
        damage(path)
        return _words(path, folder / "run", *more)

    return case


def _begun(change: Callable[[Path], object] = lambda _: None, *more: str) -> Case:
    """Return a case: run the first stage, change the cohort or the run directory, and repeat the command."""

    def case(folder: Path) -> Work:
        path, out = _write(counts(200, 30), folder / "cohort.h5ad"), folder / "run"
        nd.run(path, out=out, **NAMES, preset="small", settings=SETTINGS, stage="cohort")
        change(folder)
        return _words(path, out, *more)

    return case


def _in_use(folder: Path) -> Work:
    work = _begun()(folder)

    def while_locked() -> None:
        with RunDirectory.at(folder / "run").locked():
            work()

    return while_locked


def _beside_a_thesis(folder: Path) -> Work:
    work = _cohort()(folder)
    (folder / "run").mkdir()
    (folder / "run/thesis.txt").write_text("years of work")
    return work


def _elsewhere(out: str, *more: str) -> Case:
    return lambda folder: _words(_write(counts(200, 30), folder / "cohort.h5ad"), out, *more)


def _in_memory(change: Callable[[ad.AnnData], object]) -> Case:
    def case(folder: Path) -> Work:
        adata = counts(200, 30)
        change(adata)
        return lambda: nd.run(adata, out=folder / "run", **NAMES, preset="small", settings=SETTINGS)

    return case


def _file(name: str, content: bytes) -> Case:
    def case(folder: Path) -> Work:
        (folder / name).write_bytes(content)
        return _words(folder / name, folder / "run")

    return case


def _hdf5(name: str, *arrays: str) -> Case:
    def case(folder: Path) -> Work:
        with h5py.File(folder / name, "w") as file:
            for array in arrays:
                file[array] = np.arange(3)
        return _words(folder / name, folder / "run")

    return case


def _folder(name: str, *files: str) -> Case:
    def case(folder: Path) -> Work:
        for file in files:
            path = folder / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"")
        return _words(folder / name, folder / "run")

    return case


HOLD = """
import fcntl, sys
with open(sys.argv[1], "rb") as file:
    fcntl.flock(file, fcntl.LOCK_EX)  # as HDF5 does for a writer
    print("held", flush=True)
    sys.stdin.read()
"""


def _locked(folder: Path) -> Work:
    path = _write(counts(200, 30), folder / "cohort.h5ad")
    work = _words(path, folder / "run")

    def while_held() -> None:
        words = [sys.executable, "-c", HOLD, str(path)]
        with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
            assert holder.stdout is not None
            holder.stdout.readline()
            try:
                work()
            finally:
                holder.communicate()

    return while_held


def _scaled(adata: ad.AnnData) -> None:
    adata.raw = adata.copy()
    x = adata.X.toarray()
    adata.X = (x - x.mean(axis=0)) / (x.std(axis=0) + 1)


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


def _edited(edit: Callable[[h5py.File], object]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        with h5py.File(path, "r+") as file:
            edit(file)

    return damage


def _slash(file: h5py.File) -> None:
    file.copy("obs/age", "obs/IFN/ctrl")
    file["obs"].attrs["column-order"] = [*file["obs"].attrs["column-order"], "IFN/ctrl"]


def _shorten(file: h5py.File) -> None:
    data = file["X/data"][:-7]
    del file["X/data"]
    file["X/data"] = data


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


CASES: dict[str, Case] = {
    "no such file": lambda folder: _words(folder / "cohort.h5ad", folder / "run"),
    "an h5ad file cut short": _stored("cohort.h5ad", _cut),
    "a file that is no HDF5": _stored("cohort.h5ad", lambda path: path.write_text("cell,gene\n")),
    "a file that another program writes": _locked,
    "a pointer of git-lfs": _file("cohort.h5ad", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"),
    "a web page": _file("cohort.h5ad", b"<!DOCTYPE html><html><body>404</body></html>"),
    "an h5ad file in gzip": _file("cohort.h5ad.gz", gzip.compress(b"\x89HDF\r\n\x1a\n")),
    "a zarr store in a zip": _file("cohort.zarr.zip", b"PK\x03\x04 and so on"),
    "an R object": _file("cohort.rds", gzip.compress(b"X\n\0\0\0\3")),
    "a MatrixMarket file": _file("matrix.mtx", b"%%MatrixMarket matrix coordinate integer general\n"),
    "a MatrixMarket file in gzip": _file("matrix.mtx.gz", gzip.compress(b"%%MatrixMarket matrix coordinate integer general\n")),
    "a 10x HDF5 matrix": _hdf5("filtered_feature_bc_matrix.h5", "matrix/barcodes", "matrix/indptr", "matrix/features/id"),
    "a loom file": _hdf5("cohort.loom", "matrix", "row_attrs/Gene", "col_attrs/CellID"),
    "an h5Seurat file": _hdf5("cohort.h5seurat", "assays/RNA/counts/data", "cell.names", "meta.data/x"),
    "a MuData without a modality rna": _hdf5("cohort.h5mu", "obs/x", "var/x", "mod/protein/X", "mod/gex/X"),
    "a 10x matrix folder": _folder("filtered", "matrix.mtx.gz", "barcodes.tsv.gz", "features.tsv.gz"),
    "a folder of h5ad files": _folder("samples", "D1.h5ad", "D2.h5ad"),
    "a SOMA experiment": _folder("soma", "__group/0_0", "ms/__group/0_0", "obs/__schema/0_0"),
    "an HDF5 file that is not AnnData": _stored("cohort.h5ad", _edited(lambda file: file.__delitem__("obs"))),
    "a store without X": _stored("cohort.h5ad", _edited(lambda file: file.__delitem__("X"))),
    "a matrix whose parts do not fit": _stored("cohort.h5ad", _edited(_shorten)),
    "a zarr store with a chunk missing": _stored("cohort.zarr", lambda path: (path / "X/data/c/0").unlink()),
    "a folder that is no zarr store": _stored("cohort.zarr", lambda path: (path / "zarr.json").unlink()),
    "a misspelled layer": _cohort(
        lambda a: a.layers.__setitem__("counts", a.X), "--set", "cohort.layer=count"
    ),
    "a layer where there is none": _cohort(None, "--set", "cohort.layer=counts"),
    "raw where there is none": _cohort(None, "--layer", "raw"),
    "a column to name genes by that is not there": _cohort(
        lambda a: a.var.__setitem__("feature_name", "x"), "--gene-names", "featurename"
    ),
    "no cells": _stored("cohort.h5ad", lambda path: _write(counts(200, 30)[:0], path)),
    "cell names used twice": _cohort(lambda a: setattr(a, "obs_names", ["cell1", *a.obs_names[1:]])),
    "gene names used twice": _cohort(lambda a: setattr(a, "var_names", ["ISG15", "ISG15", *a.var_names[2:]])),
    "input columns with our prefix": _cohort(_column("ndreamer_group", lambda _: 1)),
    "column names that cannot be stored": _stored("cohort.h5ad", _edited(_slash)),
    "values that are no real numbers": _cohort(lambda a: setattr(a, "X", a.X.astype(np.complex64))),
    "no condition key": _cohort(condition_key=None),
    "a misspelled condition key": _cohort(condition_key="conditon"),
    "a misspelled batch key": _cohort(batch_key="doner"),
    "one column as condition and batch": _cohort(batch_key="condition"),
    "a batch key given twice": _cohort(None, "--batch-key", "donor"),
    "no control": _cohort(control=None),
    "a control that no cell has": _cohort(control="control"),
    "fewer than two conditions": _cohort(_column("condition", lambda _: "ctrl")),
    "missing values in the condition": _cohort(
        _column("condition", lambda a: a.obs["condition"].where(np.arange(a.n_obs) % 50 != 9))
    ),
    "missing values in a batch column": _cohort(
        _column("donor", lambda a: a.obs["donor"].where(np.arange(a.n_obs) != 7))
    ),
    "a control that min_group_cells makes vanish": _cohort(_column("condition", _few_controls)),
    "a condition that min_group_cells makes vanish": _cohort(
        _column("condition", _few_controls), control="drug", batch_key=None
    ),
    "several conditions that min_group_cells makes vanish": _cohort(
        _column("condition", lambda a: np.where(np.arange(a.n_obs) < 6, [f"KO {i % 3}" for i in range(a.n_obs)], "ctrl")),
        batch_key=None,
    ),
    "a condition to exclude that is not there": _cohort(None, "--exclude-condition", "stimm"),
    "the control to be excluded": _cohort(None, "--exclude-condition", "ctrl"),
    "small groups, with small_groups=error": _cohort(
        None, "--set", "cohort.min_group_cells=60", "--set", "cohort.small_groups=error"
    ),
    "a gene to keep that is not there": _cohort(None, "--set", "hvg.keep=g1,g100"),
    "log-normalised values, with normalise=counts": _cohort(_logged, "--normalise", "counts"),
    "counts, with normalise=none": _cohort(None, "--normalise", "none"),
    "neither counts nor log-normalised, with normalise=auto": _cohort(
        lambda a: setattr(a.X, "data", a.X.data ** np.float32(1.3))
    ),
    "scaled counts without their log": _cohort(lambda a: setattr(a, "X", a.X * np.float32(13.37))),
    "proportions": _cohort(lambda a: setattr(a, "X", sparse.csr_matrix(a.X / a.X.sum(axis=1)))),
    "a negative value": _cohort(_set(17, 3, -1.5)),
    "NaN": _cohort(_set(150, 29, np.nan)),
    "an infinite value": _cohort(_set(1, 0, np.inf)),
    "scaled values, with counts in .raw": _cohort(_scaled, "--layer", "X"),
    "yes and no as names": _cohort(None, "--set", "cohort.control=true", control=None),
    "a misspelled setting": _cohort(None, "--set", "train.epoch=5"),
    "a setting out of range": _cohort(None, "--set", "hvg.num_hvg=0"),
    "a setting that is no assignment": _cohort(None, "--set", "epochs"),
    "an unknown preset": _cohort(None, "--preset", "papr"),
    "a misspelled option": _cohort(None, "--worker", "2"),
    "a misspelled command": lambda _: lambda: cli.run_command(["rum"]),
    "a command without what it needs": lambda _: lambda: cli.run_command(["run"]),
    "not enough memory": _cohort(None, "--set", "run.memory_gb=0.001"),
    "not enough disk": _elsewhere("/proc/run"),
    "a run directory that is a web server's": _elsewhere("https://127.0.0.1/run"),
    "a run directory that holds another input's run": _begun(
        lambda folder: _write(counts(200, 30, seed=1), folder / "cohort.h5ad")
    ),
    "a run directory that holds something else": _beside_a_thesis,
    "finished stages that were made with other settings": _begun(lambda _: None, "--set", "hvg.num_hvg=10"),
    "a run directory in use": _in_use,
}  # fmt: skip
ON_THE_WAY: dict[str, Case] = {
    "a negative value where no sample is taken": _cohort(_set(25, 3, -1.5), cells=2000),
    "a value that is no integer, among counts": _cohort(_set(25, 2, 0.5), cells=2000),
    "min_genes that no cell of a condition reaches": _cohort(None, "--set", "cohort.min_genes=31"),
    "min_cells that no gene reaches": _cohort(None, "--set", "cohort.min_cells=201"),
}
IN_PYTHON: dict[str, Case] = {
    "a condition column of lists": _in_memory(
        _column("condition", lambda a: pd.Series([["ctrl"]] * a.n_obs, a.obs_names))
    ),
    "two columns of one name": _in_memory(lambda a: setattr(a, "obs", pd.concat([a.obs, a.obs[["age"]]], axis=1))),
}
TABLES: tuple[tuple[str, Mapping[str, Case]], ...] = (
    (HEAD, CASES), (ON_THE_WAY_HEAD, ON_THE_WAY), (IN_PYTHON_HEAD, IN_PYTHON),
)  # fmt: skip


def row_of(name: str, told: Said, folder: Path) -> str:
    """Return a row of the page: the message, with folders and numbers that depend on the machine replaced."""
    text = told.refusal.removeprefix("error: ").replace(str(folder), "DIR")
    text = re.sub(r"(eof = )\d+", r"\1N", text)  # the size of a file depends on anndata's version
    text = re.sub(r"\d+\.\d+ GB", "N GB", re.sub(r"\(\{.*?\}\)", "(...)", text))
    return f"| {name} | `{text.replace('|', chr(92) + '|')}` |"


def page(tables: Sequence[tuple[str, Mapping[str, Case]]] = TABLES) -> str:
    """Return the whole page."""
    parts = []
    for head, cases in tables:
        parts.append(head)
        for name, case in cases.items():
            with tempfile.TemporaryDirectory() as folder:
                parts.append(row_of(name, said(case(Path(folder))), Path(folder)) + "\n")
    return "".join(parts) + TAIL


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    print(page(), end="")
