"""The benchmark of shifted states, in small: a state shift is an effect in plain means but not within states."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd
import pytest

JOB = Path(__file__).parents[2] / "jobs/benchmark_state.py"


@pytest.fixture(scope="module")
def job() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_state", JOB)
    module = importlib.util.module_from_spec(spec)
    sys.modules["benchmark_state"] = module
    spec.loader.exec_module(module)
    return module


def cells(donors: int = 20, each: int = 100, genes: int = 150) -> tuple[np.ndarray, np.ndarray, pd.Index]:
    """Return counts of donors that differ in every gene, whose cells follow one state."""
    rng = np.random.default_rng(2)
    donor = np.repeat(np.arange(donors), each)
    state, loading = rng.normal(size=len(donor)), np.where(np.arange(genes) < 40, rng.normal(0, 0.6, genes), 0.0)
    rates = rng.normal(0.7, 0.6, genes) + rng.normal(0, 0.15, (donors, genes))[donor] + np.outer(state, loading)
    return rng.poisson(np.exp(rates)), donor, pd.Index([f"g{i}" for i in range(genes)])


@pytest.mark.slow
def test_a_shifted_state_is_read_as_state_and_not_as_effects(job: ModuleType) -> None:
    counts, donor, genes = cells()
    made = job.tilted(counts, donor, genes, strength=0.8, effects=False, generator=np.random.default_rng(3))
    assert abs(made.shift) > 0.5
    table = job.measured(made, ["pca"], {"seed": 0})
    found = table[table["genes"] == "state"].set_index("test")["p<=.05"]
    assert found["total"] > 0.5
    assert found["state_shift"] > 0.5
    assert found["within_state"] <= 0.2
    words = table[(table["genes"] == "state") & (table["test"] == "reading")].iloc[0]
    assert words["read state"] > 0.3 > words["read within"]


def test_donors_keep_half_of_their_cells_and_the_arms_shift_apart(job: ModuleType) -> None:
    counts, donor, genes = cells(each=40)
    made = job.tilted(counts, donor, genes, strength=0.8, effects=True, generator=np.random.default_rng(3), most=15)
    assert (made.cohort.obs["donor"].value_counts() == 15).all()
    assert not set(made.state) & set(made.others)
    assert len(made.planted) == int(job.PLANTED * len(genes))
