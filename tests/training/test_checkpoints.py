"""A checkpoint is due by steps or by minutes, and an incomplete checkpoint is ignored."""

from __future__ import annotations

from pathlib import Path

import pytest

from ndreamer_dist import keys
from ndreamer_dist.model.collectives import Single
from ndreamer_dist.settings import TrainSettings
from ndreamer_dist.storage.files import Storage
from ndreamer_dist.training.checkpoints import Schedule, latest_serial, save_serial
from ndreamer_dist.training.loop import STATE_FILE
from tests.double import CUDA, Device, pretended


@pytest.mark.parametrize(
    ("steps", "minutes", "expected"),
    [
        pytest.param(20, None, [20, 40, 60, 80], id="steps_alone"),
        pytest.param(1000, 0.5, [32, 64, 96], id="minutes_alone"),
        pytest.param(20, 0.5, [20, 40, 60, 80], id="steps_are_sooner"),
        pytest.param(50, 0.5, [32, 50, 80], id="whichever_is_sooner"),
    ],
)
def test_a_checkpoint_is_due_every_so_many_steps_or_minutes(
    steps: int, minutes: float | None, expected: list[int]
) -> None:
    now = 0.0
    settings = TrainSettings(checkpoint_steps=steps, checkpoint_minutes=minutes)
    schedule = Schedule(settings, Single(), clock=lambda: now)
    found = []
    for step in range(1, 100):
        now = float(step)  # a step takes a second
        if schedule.due(step):
            found.append(step)
    assert found == expected


def test_checkpoints_by_time_take_a_small_share_of_a_training_whatever_one_costs() -> None:
    now, waited, last = 0.0, 0.0, 0
    schedule = Schedule(TrainSettings(checkpoint_minutes=0.5), Single(), clock=lambda: now)
    for step in range(1, 100_001):
        now += 0.01
        if schedule.due(step):
            cost = 0.1 + 2e-5 * step  # a checkpoint that grows with every step
            with schedule.saving():
                now += cost
            waited, last = waited + cost, step
    assert last > 90_000
    assert waited <= 0.02 * now


class Pair(Single):
    """The first of two workers; the other one has nothing to say."""

    world = 2


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        pytest.param(None, [40, 80, 120, 160], id="minutes_alone"),
        pytest.param(35, [35, 70, 105, 140, 175], id="steps_are_sooner"),
    ],
)
def test_on_gpus_whose_answers_come_one_look_later_one_checkpoint_is_written_for_each_time(
    steps: int | None, expected: list[int]
) -> None:
    now = 0.0
    settings = TrainSettings(checkpoint_steps=steps, checkpoint_minutes=0.5)
    with pretended(), Device() as device:
        schedule = Schedule(settings, Pair(), CUDA, clock=lambda: now, stop=lambda: now > 180)
        found = []
        for step in range(1, 192):
            now = float(step)
            if schedule.due(step):
                found.append(step)
            assert not schedule.stopping
        assert schedule.due(192)
        assert schedule.stopping
    assert found == expected
    assert device.waits == []


def test_checkpoints_by_neither_steps_nor_time_are_refused() -> None:
    with pytest.raises(ValueError, match="checkpoint_steps and checkpoint_minutes are both null"):
        TrainSettings(checkpoint_minutes=None)


def test_the_last_whole_checkpoint_counts_and_those_before_it_are_deleted(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    assert latest_serial(storage) is None
    for step in (5, 100, 20_000):
        save_serial(storage, step, {STATE_FILE: b"%d" % step, "weights.safetensors": b"w"})
        found = latest_serial(storage)
        assert found is not None
        assert found.files == {STATE_FILE: b"%d" % step, "weights.safetensors": b"w"}
        assert found.url == f"{tmp_path}/{keys.TRAIN_SERIAL}/{step:09d}"
    assert len(list((tmp_path / keys.TRAIN_SERIAL).rglob(STATE_FILE))) == 1
    (tmp_path / keys.TRAIN_SERIAL / "000020005").mkdir()
    (tmp_path / keys.TRAIN_SERIAL / "000020005" / "weights.safetensors").write_bytes(b"half of it")  # killed here
    assert latest_serial(storage) == found
