"""The tables of docs/scaling.md, computed: `python -m tests.docs.scaling` prints them.

Sizes follow from `ndreamer_dist.planning.memory` and the sampling plan, times from what was measured of a million cells
(docs/benchmarks-log.md): seconds of a stage on 2 cores, divided by what the stage's work grows with.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ndreamer_dist import keys
from ndreamer_dist.planning.memory import disk_bytes, stage_memory
from ndreamer_dist.planning.sizes import CohortSize
from ndreamer_dist.settings import Settings
from ndreamer_dist.training.sampling import SamplingPlan

GENES, VALUES_PER_CELL = 20_000, 800
MEASURED_CELLS, MEASURED_MATCHES, MEASURED_STEPS = 10**6, 60 * 10**6, 4000
MEASURED_SECONDS = {
    keys.STAGE_COHORT: 24, keys.STAGE_PACK: 23, keys.STAGE_CLUSTERS: 249, keys.STAGE_TRAIN: 745, keys.STAGE_EMBED: 18,
    keys.STAGE_PCA: 3, keys.STAGE_MATCH: 403, keys.STAGE_EFFECTS: 252,
}  # fmt: skip
"""Of the million cells in 80 groups, small preset, 2 cores."""
SIZES = ((10**6, 80), (10**7, 400), (10**8, 800))
"""Cells and donors, each donor of one condition, half of them controls."""


@dataclass(frozen=True)
class Worked:
    """A cohort whose needs are worked out, with the small preset."""

    cells: int
    groups: int

    @property
    def settings(self) -> Settings:
        return Settings.build(preset="small")

    @property
    def size(self) -> CohortSize:
        """Controls meet all controls; treated cells meet controls, and one another for their own average."""
        edges = self.groups * (self.groups // 2) + (self.groups // 2) ** 2
        return CohortSize(
            cells=self.cells, genes=GENES, stored_values=self.cells * VALUES_PER_CELL, groups=self.groups,
            largest_group=2 * self.cells // self.groups, edges=edges, conditions=2, fewest_groups=self.groups // 2,
        )  # fmt: skip

    @property
    def matches(self) -> int:
        return self.cells * self.size.edges // self.groups

    @property
    def steps(self) -> int:
        starts = np.linspace(0, self.cells, self.groups + 1).astype(np.int64)
        return SamplingPlan.for_cohort(starts, self.settings.train, 0).steps

    def hours(self, stage: str) -> float:
        """Return the hours of a stage on 2 cores."""
        share = {
            keys.STAGE_TRAIN: self.steps / MEASURED_STEPS,
            keys.STAGE_MATCH: self.matches / MEASURED_MATCHES,
        }.get(stage, self.cells / MEASURED_CELLS)
        return MEASURED_SECONDS[stage] * share / 3600


def needs() -> str:
    """Return the table of what a cohort needs."""
    lines = [
        "| cells | groups | driver | a task, at most | a training worker | run directory | matches | training steps |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for worked in (Worked(*size) for size in SIZES):
        none, one = (stage_memory(worked.size, worked.settings, cpus=cpus, object_store=0) for cpus in (0, 1))
        driver = none[keys.STAGE_PCA]
        task = max(one[stage] - none[stage] for stage in keys.STAGES)
        trainer = none[keys.STAGE_TRAIN] - driver
        sizes = [
            f"{value / 1e9:,.1f} GB" for value in (driver, task, trainer, disk_bytes(worked.size, worked.settings))
        ]
        counts = f"{worked.matches / 1e6:,.0f} million | {worked.steps:,}"
        lines.append(f"| {worked.cells // 10**6} million | {worked.groups} | {' | '.join(sizes)} | {counts} |")
    return "\n".join(lines)


def hours() -> str:
    """Return the table of hours on 2 cores."""
    lines = [f"| cells | {' | '.join(keys.STAGES)} | all |", "|---" * (len(keys.STAGES) + 2) + "|"]
    for worked in (Worked(*size) for size in SIZES):
        spent = [worked.hours(stage) for stage in keys.STAGES]
        cells = " | ".join(f"{value:,.2f}" for value in [*spent, sum(spent)])
        lines.append(f"| {worked.cells // 10**6} million | {cells} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(needs(), hours(), sep="\n\n")
