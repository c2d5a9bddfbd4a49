"""The sampling plan: the packed rows of each training step (METHOD section 4). Pure functions.

The packed rows of each group are in random order and are treated as a circular sequence. An epoch starts at a keyed
offset in every group and takes the next `batch_size` rows, so it draws without replacement (from a smaller group it
takes rows more than once). These rows are cut into runs of 32. A keyed permutation of all runs is cut into mini-batches
of `2 * batch_size` rows. Any step can be computed without the steps before it.

A mini-batch consists of blocks of 64 cells. A worker owns whole blocks, so noise depends neither on the number of
workers nor on that of threads.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from ndreamer_dist.settings import NOISE_ROWS, RUN_ROWS, TrainSettings

PLAN_STREAM = 1
"""Key of the plan's random stream."""


def scheduled_epochs(*, asked: int, cells: int, groups: int, batch_size: int, passes: int = 15) -> int:
    """Return the number of epochs to train (METHOD section 4).

    Training takes at least `asked` epochs, and enough for about `passes` passes over the cells. If `passes` decides and
    there are at most 10 groups, the number becomes 28 modulo 30, so that training ends long after a reset of codes.
    """
    enough = passes * cells // (batch_size * groups) + 1
    if enough <= asked:
        return asked
    return enough + 30 - enough % 30 - 2 if groups <= 10 else enough


@dataclass(frozen=True)
class SamplingPlan:
    """The rows of every training step.

    Attributes
    ----------
    starts
        (groups + 1,), first packed row of each group, and the total number of rows.
    batch_size
        Rows drawn per group and epoch, a multiple of 64.
    epochs
        Number of epochs.
    seed
        Seed of all draws.
    """

    starts: tuple[int, ...]
    batch_size: int
    epochs: int
    seed: int

    @classmethod
    def for_cohort(cls, starts: np.ndarray, settings: TrainSettings, seed: int) -> SamplingPlan:
        """Return the plan for groups with these row offsets, (groups + 1,)."""
        epochs = scheduled_epochs(
            asked=settings.epochs,
            cells=int(starts[-1]),
            groups=len(starts) - 1,
            batch_size=settings.batch_size,
            passes=settings.passes,
        )
        return cls(tuple(int(s) for s in starts), settings.batch_size, epochs, seed)

    @property
    def n_groups(self) -> int:
        """Number of groups."""
        return len(self.starts) - 1

    @property
    def steps_per_epoch(self) -> int:
        """Mini-batches per epoch; with an odd number of groups the last one has half as many cells."""
        return -(-self.n_groups // 2)

    @property
    def steps(self) -> int:
        """Total number of steps."""
        return self.epochs * self.steps_per_epoch

    def rows(self, step: int) -> np.ndarray:
        """Return the packed rows of a step's global mini-batch, (cells,) int64."""
        epoch, place = divmod(step, self.steps_per_epoch)
        runs = _epoch_runs(self, epoch)
        per_step = 2 * self.batch_size // RUN_ROWS
        return runs[place * per_step : (place + 1) * per_step].ravel()

    def cells(self, step: int) -> int:
        """Return the number of cells of a step's global mini-batch."""
        place = step % self.steps_per_epoch
        return min(2 * self.batch_size, self.n_groups * self.batch_size - place * 2 * self.batch_size)

    def share(self, step: int, rank: int, world: int) -> range:
        """Return the indices of the 64-cell blocks that a worker owns; shares differ by at most one block."""
        blocks = self.cells(step) // NOISE_ROWS
        return range(rank * blocks // world, (rank + 1) * blocks // world)

    def share_rows(self, step: int, rank: int, world: int) -> np.ndarray:
        """Return the packed rows of a worker's share of a step, (cells of the share,) int64."""
        share = self.share(step, rank, world)
        return self.rows(step)[share.start * NOISE_ROWS : share.stop * NOISE_ROWS]


@lru_cache(maxsize=8)
def _epoch_runs(plan: SamplingPlan, epoch: int) -> np.ndarray:
    """Return the shuffled runs of an epoch: (runs, 32) packed rows."""
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence((plan.seed, PLAN_STREAM, epoch))))
    sizes: np.ndarray = np.diff(np.asarray(plan.starts, dtype=np.int64))
    offsets = (generator.random(plan.n_groups) * sizes).astype(np.int64)
    walk = (offsets[:, None] + np.arange(plan.batch_size)) % sizes[:, None]  # (groups, batch_size)
    runs = (walk + np.asarray(plan.starts[:-1])[:, None]).reshape(-1, RUN_ROWS)
    return runs[generator.permutation(len(runs))]
