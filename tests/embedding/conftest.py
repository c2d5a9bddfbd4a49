"""Fixtures for tests of matching spaces: one cohort, and one run of it in several spaces."""

from __future__ import annotations

from pathlib import Path

import anndata
import pytest

from tests.embedding.spaces import SPACES, cohort_with_coordinates, run


@pytest.fixture(scope="session")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> anndata.AnnData:
    return cohort_with_coordinates(tmp_path_factory.mktemp("cohort"))


@pytest.fixture(scope="session")
def finished(cohort: anndata.AnnData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in the first of `SPACES`, with the others added."""
    out = tmp_path_factory.mktemp("run") / "run"
    for name in SPACES:
        run(cohort, out, name)
    return out
