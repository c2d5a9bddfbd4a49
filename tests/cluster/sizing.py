"""The tables of cluster/README.md, computed: `python -m tests.cluster.sizing` prints them.

Sizes follow from `ndreamer_dist.planning.memory` and `ndreamer_dist.training.sampling` for the paper preset; none is measured. Costs are
those steps, cells and matches, times the seconds of one as they were measured on 2 cores (docs/benchmarks-log.md).
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np

from ndreamer_dist import keys
from ndreamer_dist.planning.memory import disk_bytes, stage_memory
from ndreamer_dist.planning.sizes import CohortSize
from ndreamer_dist.settings import Settings
from ndreamer_dist.training.sampling import SamplingPlan
from tests.docs.scaling import MEASURED_CELLS, MEASURED_MATCHES, MEASURED_SECONDS

GENES = 30_000
VALUES_PER_CELL = 2_000
CONDITIONS = 2
STEP_SECONDS = 1.21
"""Of a training step of 2048 cells x 2000 genes, paper preset, on 2 cores with nothing else running."""
CLUSTERS_SECONDS = {"paper": (1.1, 0.8, 3.7, 112.4), "small": (1.0, 0.8, 3.3, 4.8)}
"""Of components, neighbours and both Leiden clusterings of 15 000 cells: the million was clustered as `small` does."""
STORE_SHARE = 0.3
"""Share of a pod's memory that Ray takes for its objects."""


@dataclass(frozen=True)
class Example:
    """A cohort of donors crossed with two conditions, and how many processors a reader pod has."""

    cells: int
    donors: int
    reader_cpus: int

    @property
    def groups(self) -> int:
        return CONDITIONS * self.donors

    @property
    def edges(self) -> int:
        """A group meets all groups of its own condition and of the control."""
        return self.donors**2 * (1 + 2 * (CONDITIONS - 1))

    @property
    def size(self) -> CohortSize:
        """Groups differ in size: the largest is twice the mean."""
        return CohortSize(
            cells=self.cells,
            genes=GENES,
            stored_values=self.cells * VALUES_PER_CELL,
            groups=self.groups,
            largest_group=2 * self.cells // self.groups,
            edges=self.edges,
            conditions=CONDITIONS,
            fewest_groups=self.groups // CONDITIONS,
        )


EXAMPLES = (Example(10**6, 20, 8), Example(10**7, 100, 8), Example(10**8, 400, 2))
HEADER = """\
| cells | groups | head pod | reader pod | its processors | trainer pod | run directory | training steps |
|---|---|---|---|---|---|---|---|"""


def memory(example: Example, cpus: int) -> dict[str, int]:
    """Return the promise per stage for one machine with `cpus` tasks and one training worker."""
    return stage_memory(example.size, Settings.build(), cpus=cpus, object_store=0)


def head_bytes(example: Example) -> int:
    """Return what the driver and Ray's own processes hold: the promise without a task."""
    return memory(example, 0)[keys.STAGE_PCA]


def reader_bytes(example: Example) -> int:
    """Return what the tasks of a reader pod hold in the hungriest stage, and Ray's objects beside them."""
    with_tasks, without = memory(example, example.reader_cpus), memory(example, 0)
    tasks = max(with_tasks[stage] - without[stage] for stage in keys.STAGES)
    return math.ceil(tasks / (1 - STORE_SHARE))


def trainer_bytes(example: Example) -> int:
    """Return what one training worker holds, and Ray's objects beside it."""
    alone = memory(example, 0)
    return math.ceil((alone[keys.STAGE_TRAIN] - alone[keys.STAGE_PCA]) / (1 - STORE_SHARE))


def steps(example: Example) -> int:
    """Return the number of mini-batches of the whole training, for groups of equal size."""
    starts = np.linspace(0, example.cells, example.groups + 1).astype(np.int64)
    return SamplingPlan.for_cohort(starts, Settings.build().train, 0).steps


def gigabytes(value: float) -> str:
    return f"{math.ceil(value / 1e9):,} GB".replace(",", " ")


def row(example: Example) -> str:
    """Return a cohort's line of the table."""
    cells = f"{example.cells // 10**6} million"
    pods = [gigabytes(head_bytes(example)), gigabytes(reader_bytes(example)), str(example.reader_cpus)]
    rest = [gigabytes(trainer_bytes(example)), gigabytes(disk_bytes(example.size, Settings.build()))]
    return f"| {' | '.join([cells, str(example.groups), *pods, *rest, f'{steps(example):,}'.replace(',', ' ')])} |"


def table() -> str:
    """Return the table as the README holds it."""
    return "\n".join(itertools.chain([HEADER], map(row, EXAMPLES)))


def others_seconds(example: Example) -> float:
    """Return the seconds of all stages but training and matching on 2 cores, for the paper preset."""
    dearer = {keys.STAGE_CLUSTERS: clusters_dearer()}
    alike = set(keys.STAGES) - {keys.STAGE_TRAIN, keys.STAGE_MATCH}
    return sum(MEASURED_SECONDS[stage] * dearer.get(stage, 1) for stage in alike) * example.cells / MEASURED_CELLS


def clusters_dearer() -> float:
    """Return how many times as long the paper preset clusters as the small one does."""
    return sum(CLUSTERS_SECONDS["paper"]) / sum(CLUSTERS_SECONDS["small"])


def matching_seconds(example: Example) -> float:
    """Return the seconds of matching on 2 cores, if a match costs in a larger group what it cost in the million's."""
    matches = example.cells * example.edges / example.groups
    return MEASURED_SECONDS[keys.STAGE_MATCH] * matches / MEASURED_MATCHES


def costs() -> str:
    """Return the table of node-hours, of nodes of 2 cores."""
    lines = ["| cells | training, on processors | matching | all other stages | all |", "|---|---|---|---|---|"]
    for example in EXAMPLES:
        seconds = [steps(example) * STEP_SECONDS, matching_seconds(example), others_seconds(example)]
        hours = " | ".join(f"{each / 3600:,.1f}".replace(",", " ") for each in [*seconds, sum(seconds)])
        lines.append(f"| {example.cells // 10**6} million | {hours} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(), costs(), sep="\n\n")
