"""Finished runs for figures and reports: one with hostile names, one without known donors."""

from __future__ import annotations

from pathlib import Path

import pytest

import ndreamer_dist as nd
from ndreamer_dist.compute.executor import SerialRuntime
from ndreamer_dist.effects.stage import run_effects
from ndreamer_dist.matching.stage import run_match
from ndreamer_dist.stats.results import Results
from tests.results.fabricate import fabricate
from tests.tiny import SETTINGS, as_memory, tiny_cohort

KINDS = {"type_1": "<script>alert(1)</script>", "type_2": 'B & "T" $\\frac$', "type_3": "plain"}
GENE = "<img src=x onerror=alert(2)>"
TREATED = '"><b>ill</b>'


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of eight donors nested in conditions; cell types, a gene and the condition have names with HTML or TeX."""
    folder = tmp_path_factory.mktemp("report")
    cohort = as_memory(tiny_cohort(folder, cells=1600, batches=8, design="nested"))
    cohort.obs["cell_type"] = cohort.obs["cell_type"].astype(str).replace(KINDS)
    cohort.obs["condition"] = cohort.obs["condition"].astype(str).replace({"treated": TREATED})
    cohort.obs["age"] = cohort.obs["donor"].astype("category").cat.codes.astype(float)
    effect = next(name for name in cohort.var_names if name.startswith("EFFECT"))
    cohort.var_names = [GENE if name == effect else name for name in cohort.var_names]
    nd.run(
        cohort, out=folder / "run", condition_key="condition", control="control", batch_key="donor", preset="small",
        settings={**SETTINGS, "hvg.keep": [GENE]},
    )  # fmt: skip
    return folder / "run"


@pytest.fixture(scope="session")
def results(finished: Path) -> Results:
    return nd.open_results(finished)


@pytest.fixture(scope="session")
def without_donors(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Results of one batch and three conditions, without a column of cell types and without training."""
    sizes = {(None, 0): 90, (None, 1): 70, (None, 2): 40}
    made = fabricate(tmp_path_factory.mktemp("alone"), sizes, levels=())
    runtime = SerialRuntime(made.settings.run)
    run_match(made.run, made.settings, made.design, runtime, "key of match")
    run_effects(made.run, made.settings, made.packed, made.source, runtime, "key of effects", made.summary)
    return nd.open_results(made.run.url)
