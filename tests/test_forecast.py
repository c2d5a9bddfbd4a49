"""What is told before a run is what the run then does."""

from __future__ import annotations

from pathlib import Path

import pytest

import ndreamer_dist as nd
from ndreamer_dist import keys, promise
from ndreamer_dist.cli import main
from ndreamer_dist.errors import CohortError
from ndreamer_dist.forecast import Plan, plan_of
from ndreamer_dist.promise import CohortSize
from ndreamer_dist.settings import Settings
from tests.cohorts import design_of
from tests.tiny import tiny_cohort

NAMES = {"condition_key": "condition", "control": "control"}


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_cohort(tmp_path_factory.mktemp("forecast"))


def made(sizes: list[int], **overrides: object) -> Plan:
    design = design_of(sizes)
    settings = Settings.build(preset="small", overrides=overrides)
    size = CohortSize.of(design, settings, genes=30, stored_values=9000)
    return plan_of(design, settings, size, input_cells=sum(sizes) + 50, cpus=2, object_store=0)


def test_groups_edges_and_steps_are_those_of_the_run() -> None:
    plan = made([700, 600, 500], **{"train.batch_size": 64, "train.epochs": 20, "match.query_rows": 300})
    assert (plan.cells, plan.dropped, plan.genes, plan.modelled) == (1800, 50, 30, 30)
    assert [cells for _, cells in plan.groups] == [700, 600, 500]
    assert plan.epochs == 3 * 1800 // (64 * 3) + 1 + 30 - 29 - 2  # enough passes, moved away from a reset
    assert plan.steps == 2 * plan.epochs
    tasks = {stage.name: stage.tasks for stage in plan.stages}
    assert tasks[keys.STAGE_MATCH] == 3 * 2 + 2 * 3 + 2 * 2  # tiles of each group times the groups it is matched to
    assert tasks[keys.STAGE_TRAIN] == 2


def test_memory_is_the_promise_that_runs_are_refused_by() -> None:
    design, settings = design_of([700, 600]), Settings.build()
    size = CohortSize.of(design, settings, genes=30, stored_values=9000)
    plan = plan_of(design, settings, size, input_cells=1300, cpus=3, object_store=10**9)
    needs = promise.needs(size, settings, cpus=3, object_store=10**9)
    assert (plan.memory, plan.disk) == (needs.memory, needs.disk)
    assert plan.memory == max(stage.memory for stage in plan.stages)


def test_the_command_line_tells_everything_and_writes_nothing(
    cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    with pytest.raises(SystemExit) as ended:
        main(
            ["plan", str(cohort), "--out", str(out), "--condition-key", "condition", "--control", "control",
             "--batch-key", "donor", "--preset", "small", "--set", "run.memory_gb=7"]
        )  # fmt: skip
    assert ended.value.code == 0
    told = capsys.readouterr().out
    plan = nd.plan(cohort, **NAMES, batch_key="donor", preset="small")
    for part in (
        f"{plan.cells:,} kept",
        f"{plan.steps:,} steps",
        f"{plan.edges:,} pairs",
        *keys.STAGES,
        "7.0 GB there",
    ):
        assert part in told
    assert not out.exists()


def test_what_run_would_refuse_is_refused(cohort: Path) -> None:
    with pytest.raises(CohortError, match="Did you mean 'control'"):
        nd.plan(cohort, condition_key="condition", control="contrl")
