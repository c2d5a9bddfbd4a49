"""What a run will do and what it will need, told before anything runs.

In: a checked cohort's design and sizes, and the settings. Out: a `Plan`, which prints as tables. Pure, so that what is
printed and what `run` refuses by are the same numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

from ndreamer_dist import keys, promise
from ndreamer_dist.cohort.clusters import clustered_by
from ndreamer_dist.cohort.design import Design
from ndreamer_dist.errors import shown
from ndreamer_dist.promise import CohortSize
from ndreamer_dist.settings import NOISE_ROWS, Settings
from ndreamer_dist.stream.plan import SamplingPlan


@dataclass(frozen=True)
class StagePlan:
    """One stage: the tasks it can run at once, and the most memory it will take with the processors given, in bytes."""

    name: str
    tasks: int
    unit: str
    memory: int


@dataclass(frozen=True)
class Plan:
    """What a run will do.

    Attributes
    ----------
    cells, dropped
        Cells kept and left out.
    genes, modelled
        Genes of the cohort and of the model.
    groups
        Name and cells of every (batch, condition) group, in packed order.
    edges
        Pairs of groups to match.
    epochs, steps, batch_cells
        Training: optimiser steps in all, cells of one step.
    stages
        In order.
    memory, disk
        Most bytes over all stages; `memory_free` and `disk_free` are what there is (none where it cannot be known).
    """

    cells: int
    dropped: int
    genes: int
    modelled: int
    conditions: tuple[str, ...]
    groups: tuple[tuple[str, int], ...]
    edges: int
    epochs: int
    steps: int
    batch_cells: int
    stages: tuple[StagePlan, ...]
    memory: int
    disk: int
    memory_free: int | None = None
    disk_free: int | None = None

    def __str__(self) -> str:
        return "\n".join([*self._cohort_lines(), "", *self._stage_lines(), "", *self._resource_lines()])

    def _cohort_lines(self) -> list[str]:
        smallest = min(self.groups, key=lambda group: group[1])
        largest = max(self.groups, key=lambda group: group[1])
        others = ", ".join(map(shown, self.conditions[1:9])) + (", ..." if len(self.conditions) > 9 else "")
        return [
            f"cells      {self.cells:,} kept, {self.dropped:,} dropped",
            f"genes      {self.genes:,}, of which {self.modelled:,} are modelled",
            f"conditions {shown(self.conditions[0])} (control), {others}",
            f"groups     {len(self.groups):,}",
            f"  smallest {shown(smallest[0])} ({smallest[1]:,} cells)",
            f"  largest  {shown(largest[0])} ({largest[1]:,} cells)",
            f"matching   {self.edges:,} pairs of groups",
            f"training   {self.steps:,} steps of {self.batch_cells:,} cells, in {self.epochs:,} epochs",
        ]

    def _stage_lines(self) -> list[str]:
        head = f"{'stage':<10}{'work to share out':>26}{'memory':>12}"
        return [head, *(f"{s.name:<10}{f'{s.tasks:,} {s.unit}':>26}{_gb(s.memory):>12}" for s in self.stages)]

    def _resource_lines(self) -> list[str]:
        pairs = (("memory", self.memory, self.memory_free), ("disk", self.disk, self.disk_free))
        return [
            f"{name:<7}{_gb(need)} needed" + ("" if free is None else f", {_gb(free)} there")
            for name, need, free in pairs
        ]


def plan_of(
    design: Design,
    settings: Settings,
    size: CohortSize,
    *,
    input_cells: int,
    cpus: int,
    object_store: int,
    memory_free: int | None = None,
    disk_free: int | None = None,
) -> Plan:
    """Return the plan of a cohort.

    Parameters
    ----------
    input_cells
        Cells of the input, dropped ones included.
    cpus, object_store
        Tasks that run at once, and bytes of Ray's shared memory: the promise grows with both.
    """
    schedule = SamplingPlan.for_cohort(design.starts, settings.train, settings.seed)
    needs = promise.needs(size, settings, cpus=cpus, object_store=object_store)
    memory = promise.stage_memory(size, settings, cpus=cpus, object_store=object_store)
    tasks = stage_tasks(design, settings, schedule, input_cells)
    return Plan(
        cells=design.n_cells,
        dropped=input_cells - design.n_cells,
        genes=size.genes,
        modelled=min(size.genes, settings.hvg.num_hvg),
        conditions=design.conditions,
        groups=tuple((group.name, group.cells) for group in design.groups),
        edges=size.edges,
        epochs=schedule.epochs,
        steps=schedule.steps,
        batch_cells=schedule.cells(0),
        stages=tuple(StagePlan(stage, *tasks[stage], memory[stage]) for stage in keys.STAGES),
        memory=needs.memory,
        disk=needs.disk,
        memory_free=memory_free,
        disk_free=disk_free,
    )


def stage_tasks(
    design: Design, settings: Settings, schedule: SamplingPlan, input_cells: int
) -> dict[str, tuple[int, str]]:
    """Return how many workers each stage could use, and what each of them would do."""
    blocks = -(-design.n_cells // settings.pack.block_rows)
    way = clustered_by(settings.clusters, design.n_cells, len(design.groups))
    tiles = sum(
        -(-group.cells // settings.match.query_rows) * len(design.targets(group, "needed")) for group in design.groups
    )
    return {
        keys.STAGE_COHORT: (-(-input_cells // settings.cohort.chunk_rows), "chunk(s) of rows"),
        keys.STAGE_PACK: (blocks, "row block(s)"),
        keys.STAGE_CLUSTERS: (1, "graph(s)") if way == "all" else (len(design.groups), _CLUSTERED[way]),
        keys.STAGE_TRAIN: (schedule.cells(0) // NOISE_ROWS, "worker(s)"),
        keys.STAGE_EMBED: (blocks, "row block(s)"),
        keys.STAGE_PCA: (blocks, "row block(s)"),
        keys.STAGE_MATCH: (tiles, "edge tile(s)"),
        keys.STAGE_EFFECTS: (blocks, "row block(s)"),
    }


_CLUSTERED = {"group": "graph(s)", "sketch": "group(s) after a sketch"}


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB"
