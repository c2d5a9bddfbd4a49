"""Finished runs, made once per session; no test may change them."""

from __future__ import annotations

import pytest

import ndreamer_dist as nd
from ndreamer_dist.stats.results import Results
from tests.tiny import SETTINGS, tiny_cohort


@pytest.fixture(scope="session")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """A finished run of eight donors nested in conditions, with cell types that the embedding separates."""
    folder = tmp_path_factory.mktemp("inference")
    cohort = tiny_cohort(folder, cells=1600, batches=8, design="nested", conditions=2)
    return nd.run(
        cohort, out=folder / "run", condition_key="condition", control="control", batch_key="donor", preset="small",
        settings=SETTINGS,
    ).results  # fmt: skip


@pytest.fixture(scope="session")
def paired(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """A finished run of three donors, each seen in both conditions."""
    folder = tmp_path_factory.mktemp("paired")
    cohort = tiny_cohort(folder, cells=900, batches=3, conditions=2)
    return nd.run(
        cohort, out=folder / "run", condition_key="condition", control="control", batch_key="donor", preset="small",
        settings=SETTINGS,
    ).results  # fmt: skip
