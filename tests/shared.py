"""What many tests start from, made once for all processes that share the tests; whoever changes it takes a copy."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

import ndreamer_dist as nd
from tests.tiny import NAMES, SETTINGS, tiny_cohort


def folder_of_all(factory: pytest.TempPathFactory) -> Path:
    """Return a folder that all processes of this session of tests have in common."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """Return a path of the common folder where something was made by the first process that asked for it."""
    path = folder_of_all(factory) / name
    done = path.with_name(f"{name}.done")
    with FileLock(f"{path}.lock"):
        if not done.exists():
            make(path)
            done.touch()
    return path


def shared_cohort(factory: pytest.TempPathFactory) -> Path:
    """Return the tiny cohort as a store."""
    folder = made_once(factory, "cohort", lambda folder: folder.mkdir() or tiny_cohort(folder))
    return folder / "cohort.zarr"


def shared_run(factory: pytest.TempPathFactory, epochs: int) -> Path:
    """Return a finished serial run of the tiny cohort."""
    cohort, settings = shared_cohort(factory), SETTINGS | {"train.epochs": epochs}

    def run(out: Path) -> Any:
        return nd.run(cohort, out=out, preset="small", settings=settings, **NAMES)

    return made_once(factory, f"run_of_{epochs}_epochs", run)
