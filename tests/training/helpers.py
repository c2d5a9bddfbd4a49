"""A packed cohort, settings and an untrained state, so small that a training takes a second."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from ndreamer_dist import keys
from ndreamer_dist.cohort.packed import Packed
from ndreamer_dist.compute.executor import SerialRuntime
from ndreamer_dist.model.batch import MiniBatch
from ndreamer_dist.rundir.directory import RunDirectory
from ndreamer_dist.settings import Settings
from ndreamer_dist.storage.arrays import write_array
from ndreamer_dist.training.densify import RowLabels, densify
from ndreamer_dist.training.loop import TrainState
from ndreamer_dist.training.sampling import SamplingPlan
from ndreamer_dist.training.trainer import run_train
from ndreamer_dist.training.windows import read_window, windows
from tests.cohorts import packed_cohort

BLOCK_ROWS = 128
OVERRIDES = {
    "model.encoder": [32, 16], "model.codebooks": 3, "model.codes": 8, "model.latent": 12, "model.decoder": [16],
    "train.batch_size": 64, "train.epochs": 12, "train.passes": 1, "train.reset_every": 5, "run.serial": True,
    "run.progress": False, "pack.block_rows": BLOCK_ROWS, "embed.tile_rows": 64,
}  # fmt: skip
SETTINGS = Settings.build(preset="small", overrides=OVERRIDES)


class Cohort:
    """A packed cohort of three groups in a folder; an epoch has two steps."""

    def __init__(self, folder: Path, settings: Settings = SETTINGS) -> None:
        self.packed = Packed.open(RunDirectory.at(folder), BLOCK_ROWS)
        self.plan = SamplingPlan.for_cohort(self.packed.design.starts, settings.train, settings.seed)
        self.labels = RowLabels.of(self.packed)

    @classmethod
    def write(cls, folder: Path, settings: Settings = SETTINGS) -> Cohort:
        """Write the cohort and open it."""
        packed_cohort(folder, cells=(150, 101, 90), genes=40, block_rows=BLOCK_ROWS)
        return cls(folder, settings)

    def batches(self, first: int = 0, last: int | None = None, place: tuple[int, int] = (0, 1)) -> Iterator[MiniBatch]:
        """Yield a worker's share of the steps from `first` to `last`."""
        for steps in windows(self.plan, first):
            for share in read_window(self.packed, self.plan, steps, *place):
                if last is not None and share.step >= last:
                    return
                yield densify(share, self.labels, self.plan, place, "cpu")


def write_with_effect(folder: Path) -> None:
    """Write a cohort of four groups in which the condition raises the first 10 genes; an epoch has two steps."""
    packed = packed_cohort(folder, cells=(160, 160, 160, 160), genes=40, block_rows=BLOCK_ROWS)
    condition = np.repeat(packed.design.group_conditions, np.diff(packed.design.starts))
    for block in range(packed.n_blocks):
        x = packed.block(block)
        treated = np.repeat(condition[slice(*packed.block_range(block))], np.diff(x.indptr)) == 1
        raised = x.data + (treated & (x.indices < 10)).astype(np.float32)
        name = f"{keys.PACKED_X}/{keys.block_name(block)}/{keys.DATA}"
        write_array(RunDirectory.at(folder).storage / keys.PACKED, name, raised)


def train_stage(folder: Path, settings: Settings) -> None:
    """Run the training stage in this process on the cohort in a folder."""
    run = RunDirectory.at(folder)
    run_train(run, settings, Packed.open(run, BLOCK_ROWS), SerialRuntime(settings.run), "key")


def fresh(settings: Settings = SETTINGS) -> TrainState:
    """Return an untrained state for the cohort."""
    return TrainState.fresh(settings, genes=40, conditions=2, batch_levels=(2,))


def weights(state: TrainState) -> list[torch.Tensor]:
    """Return all tensors of a state's network."""
    return list(state.network.state_dict().values())
