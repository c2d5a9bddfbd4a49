"""A stage is declared once: its key, order, memory and tasks follow from that, and a run runs it."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

import ndreamer_dist as nd
from ndreamer_dist import keys
from ndreamer_dist.planning import stages
from ndreamer_dist.planning.sizes import BASE_BYTES
from ndreamer_dist.planning.stages import ALL_STAGES, Job, Stage, stages_of
from ndreamer_dist.rundir.directory import RunDirectory, Shard
from ndreamer_dist.rundir.stage import StageRun
from ndreamer_dist.settings import Settings
from tests.tiny import NAMES, SETTINGS


def run_last(job: Job, run: RunDirectory, key: str) -> None:
    stage = StageRun(run, "last", key)
    todo = stage.begin([Shard("all", ("last.txt",))])
    stage.map(job.runtime, lambda _: run.storage.write_atomic("last.txt", b"done"), todo)


LAST = Stage(
    "last",
    settings=("effects",),
    reads=lambda _: (keys.STAGE_EFFECTS,),
    run=run_last,
    task_bytes=lambda *_: 5,
    work=lambda cohort: ((cohort.blocks, "row block(s)"),),
)


def test_the_flow_is_in_the_order_of_the_names() -> None:
    assert tuple(stage.name for stage in ALL_STAGES) == keys.FLOW


@pytest.mark.parametrize("method", [keys.NDREAMER, keys.SPACE_PCA, keys.STATE, keys.NDREAMER_STATE, "obsm:X"])
def test_a_stage_reads_only_what_the_run_has_before_it(method: str) -> None:
    settings = Settings.build(overrides={"embed.method": method})
    flow = list(stages_of(settings))
    for place, stage in enumerate(stages_of(settings).values()):
        assert set(stage.reads(settings)) <= set(flow[:place])


def test_a_stage_that_is_declared_is_planned_and_run(
    tiny: Path, tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, "ALL_STAGES", (*ALL_STAGES, LAST))
    plan = nd.plan(tiny, preset="small", settings=SETTINGS, **NAMES)
    assert dataclasses.replace(plan.stages[-1], memory=0) == dataclasses.replace(
        plan.stages[-1], name="last", work=((4, "row block(s)"),), memory=0
    )
    assert BASE_BYTES + 5 < plan.stages[-1].memory < plan.stages[-2].memory
    run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    before = json.loads((run / keys.RUN_JSON).read_text())["keys"]
    nd.run(tiny, out=run, preset="small", settings=SETTINGS, **NAMES)
    after = json.loads((run / keys.RUN_JSON).read_text())["keys"]
    assert (run / "last.txt").read_text() == "done"
    assert after == {**before, "last": after["last"]}
    assert (run / keys.DONE / "last" / "all.json").exists()
