"""Plan a run: what it will do and need, printed before anything runs.

Input: the design and the sizes of a checked cohort, and the settings. Output: a `Plan`, which prints as tables. `run`
refuses to start by the same numbers. Pure.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from ndreamer_dist import keys
from ndreamer_dist.cohort.design import Design
from ndreamer_dist.compute.events import duration
from ndreamer_dist.errors import printable, shown
from ndreamer_dist.grouping.small_groups import SCREEN_CONDITIONS
from ndreamer_dist.planning import memory, speeds
from ndreamer_dist.planning.sizes import CohortSize
from ndreamer_dist.planning.stages import DesignedCohort, Stage, Work, stages_of
from ndreamer_dist.settings import CohortSettings, Settings
from ndreamer_dist.training.sampling import SamplingPlan

NAMED_GROUPS = 3
"""Number of dropped groups that a plan names."""


@dataclass(frozen=True)
class StagePlan:
    """One stage of a plan.

    Attributes
    ----------
    memory
        Promised peak memory of the stage in bytes, with the processors of the plan.
    seconds
        Estimated duration.
    """

    name: str
    work: Work
    memory: int
    seconds: float = 0.0

    @property
    def workers(self) -> int:
        """Largest number of workers that the stage can use."""
        return max(tasks for tasks, _ in self.work)


@dataclass(frozen=True)
class Plan:
    """What a run will do and need.

    Attributes
    ----------
    cells, dropped
        Number of kept and of dropped cells.
    genes, modelled
        Number of genes of the cohort and of the model.
    conditions
        Names of the conditions, the control first.
    groups, dropped_groups
        Name and number of cells of every kept (batch, condition) group in packed order, and of every dropped one.
    unknown
        What may also be dropped, which is only known once the values are read.
    edges
        Pairs of groups to match.
    epochs, steps, batch_cells
        Training: epochs, optimiser steps in all, and cells of one step; all 0 without a network.
    stages
        Stages in the order of the run.
    memory, disk
        Peak memory over all stages and disk space, in bytes.
    memory_free, disk_free
        Available memory and disk space in bytes; `None` if unknown.
    embedding
        Name of the matching space.
    left_out
        Stages that this space does not need.
    notes
        Observations about the values, and decisions that follow from them.
    cpus, cpus_source, memory_source
        Number of processors, and what limits them and the memory: SLURM, a cgroup, a setting, ...
    runtime
        Where tasks run, and why.
    engines
        Builds of torch and FAISS, and whether there is a GPU.
    took
        Seconds of stages, measured in the run directory or extrapolated from their speed there; replace the estimates.
    within
        Column of labels inside which cells are matched, if any.
    sampled
        Estimated seconds of matching with a sample of the groups, if that is worth while; else 0.
    """

    cells: int
    dropped: int
    genes: int
    modelled: int
    conditions: tuple[str, ...]
    groups: tuple[tuple[str, int], ...]
    dropped_groups: tuple[tuple[str, int], ...]
    unknown: str
    edges: int
    epochs: int
    steps: int
    batch_cells: int
    stages: tuple[StagePlan, ...]
    memory: int
    disk: int
    memory_free: int | None = None
    disk_free: int | None = None
    embedding: str = keys.NDREAMER
    left_out: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    cpus: int = 1
    cpus_source: str = ""
    memory_source: str = ""
    runtime: str = ""
    engines: str = ""
    took: tuple[tuple[str, float], ...] = ()
    within: str | None = None
    sampled: float = 0.0

    @property
    def seconds(self) -> float:
        """Seconds of the whole run: for every stage `took` if it is there, else the estimate."""
        took = dict(self.took)
        return sum(took.get(stage.name, stage.seconds) for stage in self.stages)

    def __str__(self) -> str:
        return "\n".join([*self._cohort_lines(), "", *self._stage_lines(), "", *self._resource_lines()])

    def to_json(self) -> str:
        """Return the plan as a JSON object by attribute name: sizes in bytes, times in seconds."""
        named = {
            name: [{"name": group, "cells": cells} for group, cells in groups]
            for name, groups in (("groups", self.groups), ("dropped_groups", self.dropped_groups))
        }
        stages = [
            {"name": stage.name, "memory": stage.memory, "workers": stage.workers, "seconds_estimated": round(stage.seconds),
             "work": [{"tasks": tasks, "unit": unit} for tasks, unit in stage.work]}
            for stage in self.stages
        ]  # fmt: skip
        whole = {"stages": stages, "seconds_estimated": round(self.seconds)}
        return json.dumps({**asdict(self), **named, **whole}, indent=2)

    def _cohort_lines(self) -> list[str]:
        smallest = min(self.groups, key=lambda group: group[1])
        largest = max(self.groups, key=lambda group: group[1])
        others = ", ".join(map(shown, self.conditions[1:9])) + (", ..." if len(self.conditions) > 9 else "")
        return [
            f"cells      {self.cells:,} kept, {self.dropped:,} dropped",
            f"genes      {self.genes:,}, of which {self.modelled:,} are modelled",
            f"conditions {shown(self.conditions[0])} (control), {others}",
            f"groups     {len(self.groups):,} kept, {len(self.dropped_groups):,} dropped",
            f"  smallest {_group(smallest)}",
            f"  largest  {_group(largest)}",
            *([f"  dropped  {self._dropped_names()}"] if self.dropped_groups else []),
            *map(printable, self.notes),
            f"not known until the run reads all values: {self.unknown}",
            f"matching   {self.edges:,} pairs of groups{self._place()}",
            *(
                [f"  ~{duration(self.sampled)} with --set match.groups={speeds.SAMPLED_GROUPS}, a sample"]
                if self.sampled
                else []
            ),
            *self._screen_lines(),
            f"training   {self._training()}",
            *([f"not run    {', '.join(self.left_out)}: {shown(self.embedding)} needs none"] if self.left_out else []),
            *([f"works in   {self.runtime}"] if self.runtime else []),
            *([f"engines    {self.engines}"] if self.engines else []),
        ]

    def _place(self) -> str:
        inside = "" if self.within is None else f", inside {shown(self.within)}"
        return inside if self.embedding == keys.NDREAMER else f", in {shown(self.embedding)}{inside}"

    def _screen_lines(self) -> list[str]:
        """Return lines that say, for a screen of many conditions, which effects are stored."""
        if len(self.conditions) < SCREEN_CONDITIONS:
            return []
        others = f"{len(self.conditions) - 2:,} (the control's cells: all)"
        return [f"stored     effects of every cell's own condition; of the other {others} they are computed on demand"]

    def _training(self) -> str:
        if not self.steps:
            return "none"
        return f"{self.steps:,} steps of {self.batch_cells:,} cells, in {self.epochs:,} epochs"

    def _dropped_names(self) -> str:
        named = ", ".join(map(_group, self.dropped_groups[:NAMED_GROUPS]))
        return named + (", ..." if len(self.dropped_groups) > NAMED_GROUPS else "")

    def _stage_lines(self) -> list[str]:
        took = dict(self.took)
        lines = [f"{'stage':<10}{'memory':>10}{'workers':>12}{'time':>10}  tasks"]
        for stage in self.stages:
            work = ", then ".join(f"{tasks:,} {unit}" for tasks, unit in stage.work)
            time = duration(took[stage.name]) if stage.name in took else f"~{duration(stage.seconds)}"
            lines.append(f"{stage.name:<10}{_gb(stage.memory):>10}{f'up to {stage.workers:,}':>12}{time:>10}  {work}")
        own = "; without ~: what the stages took in this run directory, or will by their speed there" if took else ""
        return [*lines, f"time: ~ is estimated from counts, by speeds measured on other processors{own}"]

    def _resource_lines(self) -> list[str]:
        memory = ("memory", self.memory, self.memory_free, self.memory_source)
        disk = ("disk", self.disk, self.disk_free, "")
        lines = [
            f"{name:<7}{_gb(need)} needed" + ("" if free is None else f", {_gb(free)} available{_in_brackets(source)}")
            for name, need, free, source in (memory, disk)
        ]
        whole = f"time   ~{duration(self.seconds)} in all, estimated"
        return [*lines, f"cpus   {self.cpus:,}{_in_brackets(self.cpus_source)}", whole]


def plan_of(
    design: Design,
    settings: Settings,
    size: CohortSize,
    *,
    input_groups: Mapping[str, int],
    cpus: int,
    object_store: int,
) -> Plan:
    """Return the plan of a cohort; the caller adds facts about the machine and the run directory.

    Parameters
    ----------
    input_groups
        Number of cells of every group of the input, dropped groups included.
    cpus, object_store
        Number of concurrent tasks, and size of Ray's object store in bytes; the promised memory grows with both.
    """
    schedule = SamplingPlan.for_cohort(design.starts, settings.train, settings.seed)
    needs = memory.needs(size, settings, cpus=cpus, object_store=object_store)
    stage_memory = memory.stage_memory(size, settings, cpus=cpus, object_store=object_store)
    input_cells = sum(input_groups.values())
    designed = DesignedCohort(design, size, input_cells, settings)
    kept = {group.name for group in design.groups}
    stages = stages_of(settings)
    trained = keys.STAGE_TRAIN in stages
    return Plan(
        cells=design.n_cells,
        dropped=input_cells - design.n_cells,
        genes=size.genes,
        modelled=size.modelled(settings),
        conditions=design.conditions,
        groups=tuple((group.name, group.cells) for group in design.groups),
        dropped_groups=tuple((name, cells) for name, cells in input_groups.items() if name not in kept),
        unknown=_unknown(settings.cohort),
        edges=size.edges,
        epochs=schedule.epochs if trained else 0,
        steps=schedule.steps if trained else 0,
        batch_cells=schedule.cells(0) if trained else 0,
        stages=tuple(_stage_plan(stage, designed, stage_memory[name], cpus) for name, stage in stages.items()),
        memory=needs.memory,
        disk=needs.disk,
        embedding=settings.embed.method,
        left_out=tuple(stage for stage in keys.STAGES if stage not in stages),
        cpus=cpus,
        within=settings.match.within,
        sampled=speeds.sampled_match_seconds(design, settings) / cpus,
    )


def _stage_plan(stage: Stage, designed: DesignedCohort, memory: int, cpus: int) -> StagePlan:
    """Return the plan of one stage; its processor seconds are divided by the processors that it can use."""
    settings, work = designed.settings, stage.work(designed)
    train = settings.train.workers * settings.train.threads
    at_once = train if stage.name == keys.STAGE_TRAIN else min(cpus, max(tasks for tasks, _ in work))
    alone = stage.seconds(designed.design, designed.size, settings)
    return StagePlan(stage.name, work, memory, alone / at_once + speeds.start_seconds(stage.name, settings))


def _unknown(cohort: CohortSettings) -> str:
    """Return what may also be dropped once the values are read."""
    genes = f" or fewer than {cohort.min_genes:,} genes" if cohort.min_genes else ""
    more = f", genes in fewer than {cohort.min_cells:,} cells" if cohort.min_cells else ""
    return f"cells without counts{genes}{more}, and groups that become too small without them"


def _group(group: tuple[str, int]) -> str:
    return f"{shown(group[0])} ({group[1]:,} cells)"


def _in_brackets(source: str) -> str:
    return f" ({source})" if source else ""


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB"
