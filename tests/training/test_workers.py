"""Several workers learn what one worker learns, in single precision, and write checkpoints at the same steps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from ndreamer_dist.model.collectives import Collective, Distributed, Single
from ndreamer_dist.settings import Settings, TrainSettings
from ndreamer_dist.training.checkpoints import Schedule
from ndreamer_dist.training.loop import train
from tests.training.helpers import OVERRIDES, Cohort, fresh

STEPS, WORLDS = 50, (2, 4)
# A mini-batch has four blocks, one for each of four workers. The learning rate is small, since training at the default
# one is chaotic: after 50 steps of one worker a change of its weights by 1e-7 has grown to 2 %.
SETTINGS = Settings.build(
    preset="small",
    overrides=OVERRIDES | {
        "train.batch_size": 128, "train.epochs": 30, "train.reset_every": 20, "train.learning_rate": 1e-4,
    },
)  # fmt: skip
Rows = list[dict[str, float]]


def learn(folder: Path, collective: Collective) -> tuple[Rows, dict[str, torch.Tensor]]:
    """Train some steps with resets of codes; return their measures and the weights."""
    cohort, state = Cohort(folder, SETTINGS), fresh(SETTINGS)
    batches = cohort.batches(last=STEPS, place=(collective.rank, collective.world))
    train(state, batches, SETTINGS, collective)
    return state.measures, state.network.state_dict()


def due_steps(collective: Collective) -> list[int]:
    """Return the steps after which a checkpoint is due on a worker; a step of the first worker takes a second."""
    now = 0.0
    minutes = TrainSettings(checkpoint_steps=150, checkpoint_minutes=0.5)
    schedule = Schedule(minutes, collective, clock=lambda: now)
    found = []
    for step in range(1, 201):
        now += 1 + 3 * collective.rank  # other workers' clocks do not count
        if schedule.due(step):
            found.append(step)
    return found


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=max(WORLDS))
    try:
        for world in WORLDS:
            group = dist.new_group(list(range(world)))
            if rank < world:
                collective = Distributed(group)
                found = (*learn(Path(folder), collective), due_steps(collective))
                torch.save(found, f"{folder}/{world}-{rank}.pt")
    finally:
        dist.destroy_process_group()


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the results of the workers, which are started once for all tests."""
    folder = tmp_path_factory.mktemp("workers")
    Cohort.write(folder, SETTINGS)
    mp.spawn(worker, (str(folder),), nprocs=max(WORLDS))
    return folder


@pytest.fixture(params=WORLDS, ids="workers_{}".format)
def found(request: pytest.FixtureRequest, folder: Path) -> list[tuple[Rows, dict[str, torch.Tensor], list[int]]]:
    return [torch.load(folder / f"{request.param}-{rank}.pt") for rank in range(request.param)]


@pytest.fixture(scope="module")
def alone(folder: Path) -> Rows:
    return learn(folder, Single())[0]


def test_fifty_steps_in_single_precision_stay_with_those_of_one_worker(found, alone: Rows) -> None:
    rows = found[0][0]
    terms = [name for name in alone[0] if name not in {"cells_per_second", "waiting", "seconds"}]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    for row, expected in zip(rows, alone, strict=True):
        for name in terms:
            assert row[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-5), f"{name} at step {row['step']}"


def test_workers_hold_the_same_weights(found) -> None:
    weights = found[0][1]
    assert len(weights) > 30
    for other in found[1:]:
        assert all(torch.equal(value, weights[name]) for name, value in other[1].items())


def test_the_first_workers_clock_says_for_all_when_a_checkpoint_is_due(found) -> None:
    for _, _, steps in found:
        # At the first look at the clock 30 s or more after the last checkpoint, and every 150 steps.
        assert steps == [32, 64, 96, 128, 150, 184]
