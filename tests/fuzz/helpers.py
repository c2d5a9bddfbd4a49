"""Bad input, given to the command line as a user would give it, and what must be true of every refusal."""

from __future__ import annotations

import atexit
import contextlib
import functools
import io
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import anndata as ad

import ndreamer_dist as nd
import ndreamer_dist.pipeline  # what it takes to load counts against no test's time
from ndreamer_dist import cli
from tests.cohort.inputs import counts

NAMES = ["--condition-key", "condition", "--control", "ctrl", "--batch-key", "donor"]
SMALL = ["--set", "cohort.min_group_cells=10", "--set", "run.serial=true", "--set", "run.progress=false"]
SURVEY = {"cohort.min_group_cells": 10, "run.serial": True, "run.progress": False, "hvg.num_hvg": 20}
SECONDS = 30
"""Longer than any refusal may take, on a busy machine."""


@dataclass(frozen=True)
class Said:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def refusal(self) -> str:
        """The one line of a refusal, which is all that was said; fails where it is anything else."""
        assert self.code == 2, self.out + self.err
        assert self.out == ""
        lines = self.err.splitlines()
        assert lines, "nothing was said"
        assert lines[-1].startswith("error: "), self.err
        assert sum(line.startswith("error: ") for line in lines) == 1
        assert "Traceback" not in self.err
        assert len(lines[-1]) < 4100
        assert lines[-1].isprintable(), ascii(lines[-1])
        return lines[-1]


def said(work: Callable[[], object]) -> Said:
    """Do some work as the command line does."""
    out, err = io.StringIO(), io.StringIO()
    code: object = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            cli.run_program(work)
        except SystemExit as ended:
            code = ended.code or 0
    return Said(int(code), out.getvalue(), err.getvalue())


def command(words: Sequence[str]) -> Said:
    """Run a command line in this process."""
    return said(lambda: cli.run_command(list(words)))


def planned(cohort: Path | str, *more: str, names: Sequence[str] = NAMES) -> Said:
    """Plan a run of a cohort."""
    return command(["plan", str(cohort), "--preset", "small", *names, *SMALL, *more])


def surveyed(cohort: Path | str, out: Path) -> Said:
    """Run the first stage, which reads every value once."""
    return said(
        lambda: nd.run(
            cohort, out=out, condition_key="condition", control="ctrl", batch_key="donor", preset="small",
            settings=SURVEY, stage="cohort",
        )
    )  # fmt: skip


@functools.cache
def stored(kind: str) -> Path:
    """Return a small cohort on disk that is fine: `h5ad`, `zarr` (format 3) or `zarr2`, or `csc`, an h5ad by columns."""
    folder = Path(tempfile.mkdtemp(prefix="nd-fuzz-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    adata = counts(120, 30)
    if kind == "csc":
        adata.X = adata.X.tocsc()
    path = folder / ("cohort.zarr" if "zarr" in kind else "cohort.h5ad")
    version = 2 if kind == "zarr2" else 3
    with warnings.catch_warnings(), ad.settings.override(zarr_write_format=version, auto_shard_zarr_v3=False):
        warnings.simplefilter("ignore")
        (adata.write_zarr if "zarr" in kind else adata.write_h5ad)(path)
    return path


def copied(kind: str, folder: Path) -> Path:
    """Return a copy of a stored cohort, to be damaged."""
    source = stored(kind)
    copy = shutil.copytree if source.is_dir() else shutil.copy
    return Path(copy(source, folder / source.name))


def files_of(folder: Path) -> dict[str, tuple[int, int]]:
    """Return size and time of every file and folder below a folder."""
    found = {}
    for place, folders, names in os.walk(folder):
        for name in (*folders, *names):
            path = Path(place) / name
            status = path.lstat()
            found[str(path.relative_to(folder))] = (status.st_size, status.st_mtime_ns)
    return found
