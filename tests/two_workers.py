"""A whole job whose training is shared by workers that meet through gloo on this machine, without Ray.

What several workers learn under Ray, through failures and across machines, must be these very bits.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import ndreamer_dist as nd
from ndreamer_dist import keys
from ndreamer_dist.cohort.packed import Packed
from ndreamer_dist.model.collectives import Distributed
from ndreamer_dist.rundir.directory import RunDirectory, Shard
from ndreamer_dist.settings import Settings
from ndreamer_dist.training.densify import RowLabels, densify
from ndreamer_dist.training.loop import train
from ndreamer_dist.training.model_file import save_model
from ndreamer_dist.training.sampling import SamplingPlan
from ndreamer_dist.training.trainer import _fresh
from ndreamer_dist.training.windows import read_window, windows
from tests.tiny import NAMES

WORKERS = 2


def run_with_two_workers(cohort: Path, out: Path, settings: dict[str, Any]) -> Path:
    """Run the whole job, its training in two processes and all else in this one; return the run directory."""
    for stage in keys.STAGES:
        if stage == keys.STAGE_TRAIN:
            train_together(out)
        else:
            nd.run(cohort, out=out, preset="small", settings=settings, stage=stage, **NAMES)
    return out


def train_together(out: Path) -> None:
    """Do the training stage of a run with two workers."""
    mp.spawn(train_share, (out,), nprocs=WORKERS)
    run = RunDirectory.at(out)
    key = run.read_run()["keys"][keys.STAGE_TRAIN]
    run.mark(keys.STAGE_TRAIN, key, Shard("model", (keys.MODEL_WEIGHTS, keys.MODEL_JSON)))


def train_share(rank: int, out: Path) -> None:
    """Train one worker's share from the first step to the last; the first worker writes the model."""
    run = RunDirectory.at(out)
    settings = Settings.build(config=run.read_run()["settings"])
    torch.set_num_threads(settings.train.threads)
    dist.init_process_group("gloo", init_method=f"file://{out}.meet", rank=rank, world_size=WORKERS)
    try:
        packed = Packed.open(run, settings.pack.block_rows)
        plan = SamplingPlan.for_cohort(packed.design.starts, settings.train, settings.seed)
        labels, place = RowLabels.of(packed), (rank, WORKERS)
        shares = (share for steps in windows(plan, 0) for share in read_window(packed, plan, steps, *place))
        state = _fresh(settings, packed, "cpu")
        train(state, (densify(share, labels, plan, place, "cpu") for share in shares), settings, Distributed())
        if rank == 0:
            save_model(run.storage, state.network, packed, settings)
    finally:
        dist.destroy_process_group()
