"""A plan states what the run then does."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ndreamer_dist as nd
from ndreamer_dist import keys
from ndreamer_dist.cli import main
from ndreamer_dist.cohort.source import open_source
from ndreamer_dist.compute.events import duration
from ndreamer_dist.compute.executor import SerialRuntime
from ndreamer_dist.errors import CohortError
from ndreamer_dist.pipeline import Claim, run_stages
from ndreamer_dist.planning import memory, speeds
from ndreamer_dist.planning.plan import Plan, plan_of
from ndreamer_dist.planning.sizes import CohortSize
from ndreamer_dist.planning.stages import Job, stage_keys
from ndreamer_dist.rundir.directory import RunDirectory
from ndreamer_dist.settings import Settings
from tests.cohorts import design_of
from tests.tiny import NAMES, SETTINGS, as_memory


@pytest.fixture(scope="module")
def cohort(tiny: Path) -> Path:
    return tiny


def made(sizes: list[int], **overrides: object) -> Plan:
    settings = Settings.build(preset="small", overrides=overrides)
    design = design_of(sizes).sampling(settings.match.groups)
    size = CohortSize.of(design, settings, genes=30, stored_values=9000)
    input_groups = {group.name: group.cells for group in design.groups} | {"donor9|treated": 50}
    return plan_of(design, settings, size, input_groups=input_groups, cpus=2, object_store=0)


class Counting(SerialRuntime):
    """A runtime that records the number of concurrent tasks by the title, or the function, of their work."""

    cpus = 1000  # as in a plan: a worker for every task

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings.run)
        self.tasks: dict[str, int] = {}

    def map(
        self, function: Callable[..., Any], items: Iterable[Any], *shared: Any, title: str, num_gpus: float = 0
    ) -> Iterator[Any]:
        items = list(items)
        self.tasks[title] = len(items)
        return super().map(function, items, *shared, title=title, num_gpus=num_gpus)

    def submit(self, function: Callable[..., Any], *args: Any, returns: int = 1) -> list[Any]:
        self.tasks[function.__name__] = self.tasks.get(function.__name__, 0) + 1
        return super().submit(function, *args, returns=returns)


def test_groups_edges_and_steps_are_those_of_the_run() -> None:
    plan = made([700, 600, 500], **{"train.batch_size": 64, "train.epochs": 20, "match.query_rows": 300})
    assert (plan.cells, plan.dropped, plan.genes, plan.modelled) == (1800, 50, 30, 30)
    assert [cells for _, cells in plan.groups] == [700, 600, 500]
    assert plan.dropped_groups == (("donor9|treated", 50),)
    assert plan.epochs == 3 * 1800 // (64 * 3) + 1 + 30 - 29 - 2  # enough passes, and the end not near a code reset
    assert plan.steps == 2 * plan.epochs


@pytest.mark.parametrize(("edges", "within"), [("needed", "group"), ("all", "sketch")])
def test_the_tasks_of_a_stage_are_those_that_it_is_seen_to_run(
    edges: str, within: str, cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ndreamer_dist.matching.stage.LEAST_DISTANCES", 20_000_000)  # else one unit holds all
    changes = {"train.epochs": 1, "match.edges": edges, "clusters.within": within, "clusters.sketch_cells": 300}
    settings = Settings.build(
        preset="small", overrides=SETTINGS | changes | {f"cohort.{k}": v for k, v in NAMES.items()}
    )
    source, runtime = open_source(cohort), Counting(settings)
    run = RunDirectory.at(tmp_path)
    run.write_json(keys.RUN_JSON, {"input": {}, "settings": {}, "keys": {}})
    run_stages(Job(run, settings, source, runtime), Claim(run, stage_keys(settings, {})))
    plan = nd.plan(cohort, settings=settings)
    seen = {
        keys.STAGE_COHORT: (runtime.tasks["cohort: values"],),
        keys.STAGE_PACK: (runtime.tasks["deal_span"], runtime.tasks["pack"]),
        keys.STAGE_CLUSTERS: tuple(runtime.tasks[t] for t in ("clusters: sketch", "clusters") if t in runtime.tasks),
        keys.STAGE_EMBED: (runtime.tasks["embed"],),
        keys.STAGE_PCA: (runtime.tasks["pca"],),
        keys.STAGE_MATCH: (runtime.tasks["match"],),
    }
    told = {stage.name: tuple(tasks for tasks, _ in stage.work) for stage in plan.stages}
    assert {stage: told[stage] for stage in seen} == seen
    assert told[keys.STAGE_MATCH][0] > 1
    assert told[keys.STAGE_TRAIN] == (2 * settings.train.batch_size // 64,)
    assert told[keys.STAGE_EFFECTS][1] == runtime.tasks["effects: matches counted"]


def test_memory_is_the_promise_that_runs_are_refused_by() -> None:
    design, settings = design_of([700, 600]), Settings.build()
    size = CohortSize.of(design, settings, genes=30, stored_values=9000)
    names = {group.name: group.cells for group in design.groups}
    plan = plan_of(design, settings, size, input_groups=names, cpus=3, object_store=10**9)
    needs = memory.needs(size, settings, cpus=3, object_store=10**9)
    assert (plan.memory, plan.disk) == (needs.memory, needs.disk)
    assert plan.memory == max(stage.memory for stage in plan.stages)


def test_the_command_line_tells_everything_and_writes_nothing(
    cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adata = as_memory(cohort)
    adata.obs["donor"] = adata.obs["donor"].astype(str)
    rare = np.flatnonzero(adata.obs["condition"] == "treated")[:7]
    adata.obs.iloc[rare, adata.obs.columns.get_loc("donor")] = [f"rare{i % 4}" for i in range(7)]
    adata.write_h5ad(tmp_path / "in.h5ad")
    names = ["--condition-key", "condition", "--control", "control", "--batch-key", "donor"]
    sets = (
        "run.memory_gb=7",
        "run.object_store_gb=0.5",
        "cohort.min_genes=5",
        "cohort.min_cells=2",
        "cohort.min_group_cells=20",
    )
    words = [*names, "--preset", "small", *(word for text in sets for word in ("--set", text))]
    out = tmp_path / "run"
    with pytest.raises(SystemExit) as ended:
        main(["plan", str(tmp_path / "in.h5ad"), "--out", str(out), *words])
    assert not ended.value.code
    told = capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["plan", str(tmp_path / "in.h5ad"), "--out", str(out), *words, "--json"])
    for_programs = json.loads(capsys.readouterr().out)
    assert not out.exists()
    settings = dict(text.split("=") for text in sets)
    plan = nd.plan(tmp_path / "in.h5ad", out=out, **NAMES, preset="small", settings=settings)
    smallest, largest = (pick(plan.groups, key=lambda group: group[1]) for pick in (min, max))
    assert (plan.cells, plan.dropped, len(plan.groups), len(plan.dropped_groups)) == (893, 7, 6, 4)
    unknown = (
        "cells without counts or fewer than 5 genes, genes in fewer than 2 cells, and groups that become too small "
        "without them"
    )
    expected = [
        "cells      893 kept, 7 dropped",
        "genes      200, of which 200 are modelled",
        "conditions control (control), treated",
        "groups     6 kept, 4 dropped",
        f"  smallest {smallest[0]} ({smallest[1]} cells)",
        f"  largest  {largest[0]} ({largest[1]} cells)",
        "  dropped  rare0|treated (2 cells), rare1|treated (2 cells), rare2|treated (2 cells), ...",
        f"not known until the run reads all values: {unknown}",
        f"matching   {3 * 3 + 3 * 6} pairs of groups",
        f"training   {plan.steps:,} steps of 1,024 cells, in {plan.epochs} epochs",
        f"memory {plan.memory / 1e9:.1f} GB needed, 7.0 GB available (run.memory_gb)",
        f"cpus   {plan.cpus} ({plan.cpus_source})",
    ]
    assert (for_programs["cells"], for_programs["memory"], for_programs["steps"]) == (893, plan.memory, plan.steps)
    assert {each["name"]: each["cells"] for each in for_programs["groups"]} == dict(plan.groups)
    assert [each["workers"] for each in for_programs["stages"]] == [stage.workers for stage in plan.stages]
    lines = told.splitlines()
    assert [line for line in expected if line not in lines] == []
    (disk,) = (line for line in lines if line.startswith("disk"))
    assert re.fullmatch(rf"disk   {plan.disk / 1e9:.1f} GB needed, \d+\.\d GB available", disk)
    for stage in plan.stages:
        (line,) = (line for line in lines if line.startswith(f"{stage.name} "))
        work = ", then ".join(f"{tasks} {unit}" for tasks, unit in stage.work)
        memory, workers = f"{stage.memory / 1e9:.1f} GB", f"up to {stage.workers}".rjust(12)
        assert line.split(None, 1)[1] == memory + workers + f"~{duration(stage.seconds)}".rjust(10) + f"  {work}"
    assert f"time   ~{duration(plan.seconds)} in all, estimated" in lines
    assert [each["seconds_estimated"] for each in for_programs["stages"]] == [round(s.seconds) for s in plan.stages]
    assert for_programs["seconds_estimated"] == round(plan.seconds)


def test_estimated_times_are_those_that_were_measured_up_to_a_factor_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """The case is the million cells in 80 groups of `docs/benchmarks-log.md`."""
    monkeypatch.setitem(speeds.MATCH_SECONDS, "none", (1e-10, 1e-3))
    settings = Settings.build(preset="small", overrides={"run.serial": False})
    design = design_of([12_500] * 80)
    size = CohortSize.of(design, settings, genes=20_000, stored_values=460_000_000)
    plan = plan_of(design, settings, size, input_groups={}, cpus=2, object_store=10**9)
    estimated = {stage.name: stage.seconds for stage in plan.stages}
    measured = {keys.STAGE_CLUSTERS: 249, keys.STAGE_TRAIN: 745}
    assert all(0.5 < estimated[name] / seconds < 2 for name, seconds in measured.items()), estimated
    searches, pairs = 500_000 * 40 + 500_000 * 80, 40 * 40 + 40 * 80
    assert estimated[keys.STAGE_MATCH] == pytest.approx((searches * 12_500 * 1e-10 + pairs * 1e-3) / 2)
    assert plan.seconds == pytest.approx(sum(estimated.values()))
    sampled = plan_of(design.sampling(5), settings, size, input_groups={}, cpus=2, object_store=10**9)
    (seconds,) = (stage.seconds for stage in sampled.stages if stage.name == keys.STAGE_MATCH)
    assert seconds == pytest.approx((500_000 * (6 + 6 + 5) * 12_500 * 1e-10 + size.edges * 1e-3) / 2)


def test_what_a_run_took_stands_in_place_of_the_estimates(tiny: Path, tiny_run: Path) -> None:
    plan = nd.plan(tiny, out=tiny_run, preset="small", settings=SETTINGS, **NAMES)
    took = dict(plan.took)
    assert set(took) == {stage.name for stage in plan.stages}
    assert plan.seconds == pytest.approx(sum(took.values()))
    rows = [line for line in str(plan).splitlines() if line.split(" ")[0] in took]
    assert len(rows) == len(took)
    assert not [line for line in rows if "~" in line]


def test_what_run_would_refuse_is_refused(cohort: Path) -> None:
    with pytest.raises(CohortError, match="Did you mean 'control'"):
        nd.plan(cohort, condition_key="condition", control="contrl")


def test_a_sample_of_the_groups_is_advised_where_all_of_them_take_long() -> None:
    plan, asked = (made([40_000] * 60, **{"match.groups": groups}) for groups in (None, speeds.SAMPLED_GROUPS))
    every, some = (next(s.seconds for s in p.stages if s.name == keys.STAGE_MATCH) for p in (plan, asked))
    assert every > max(speeds.LONG_MATCHING / 2, 2 * plan.sampled) > 0
    assert some == pytest.approx(plan.sampled)
    assert f"~{duration(some)} with --set match.groups={speeds.SAMPLED_GROUPS}" in str(plan)
    assert asked.sampled == 0 == made([500] * 60).sampled
