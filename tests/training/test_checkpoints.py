"""A checkpoint is due by steps or by minutes, and half a checkpoint is none."""

from __future__ import annotations

from pathlib import Path

import pytest

from ndreamer_dist import keys
from ndreamer_dist.model.collectives import Single
from ndreamer_dist.settings import TrainSettings
from ndreamer_dist.storage.files import Storage
from ndreamer_dist.training.checkpoints import Schedule, latest_serial, save_serial
from ndreamer_dist.training.loop import STATE_FILE


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
