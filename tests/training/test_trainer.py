"""The training stage in one process resumes after a kill to the same bits, and shows its progress."""

from __future__ import annotations

import logging
import multiprocessing
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from ndreamer_dist import keys
from ndreamer_dist.settings import Settings
from ndreamer_dist.storage.files import Storage, append_at
from ndreamer_dist.training import log
from ndreamer_dist.training.log import RATES
from ndreamer_dist.training.loop import TrainingError
from tests.training.helpers import OVERRIDES, Cohort, train_stage, write_with_effect

KILLED_AFTER = 40
PATIENCE_SECONDS = 100
OF_THE_CLOCK = ("seconds", *RATES)


def made(**changes: Any) -> Settings:
    return Settings.build(preset="small", overrides=OVERRIDES | changes)


def steps_of(folder: Path) -> int:
    log = folder / keys.METRICS
    return len(pd.read_csv(log)) if log.exists() else 0


@pytest.mark.slow
def test_a_killed_training_goes_on_from_its_checkpoint_to_the_very_weights(tmp_path: Path) -> None:
    settings = made(**{"train.epochs": 60, "train.checkpoint_steps": 20, "train.threads": 1})
    folders = whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in folders:
        Cohort.write(folder)
    train_stage(whole, settings)
    process = multiprocessing.get_context("spawn").Process(target=train_stage, args=(killed, settings))
    process.start()
    deadline = time.monotonic() + PATIENCE_SECONDS
    while steps_of(killed) < KILLED_AFTER and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    before = pd.read_csv(killed / keys.METRICS)
    assert KILLED_AFTER <= len(before) < 120
    assert not (killed / keys.MODEL_WEIGHTS).exists()

    train_stage(killed, settings)
    after = pd.read_csv(killed / keys.METRICS)
    assert after["step"].tolist() == list(range(1, 121))
    assert after["seconds"][: len(before)].equals(before["seconds"])  # steps before the checkpoint were not repeated
    assert pd.read_csv(killed / keys.EPOCHS)["epoch"].tolist() == list(range(1, 61))
    assert (killed / keys.MODEL_WEIGHTS).read_bytes() == (whole / keys.MODEL_WEIGHTS).read_bytes()


class Killed(BaseException):
    """Stands for the end of the process."""


def trained(folder: Path, settings: Settings) -> list[pd.DataFrame]:
    train_stage(folder, settings)
    return [pd.read_csv(folder / name).drop(columns=list(OF_THE_CLOCK)) for name in (keys.METRICS, keys.EPOCHS)]


def test_logs_of_a_training_that_was_killed_at_a_checkpoint_are_those_of_one_that_was_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed twice inside an epoch: before the checkpoint's steps are logged, and in the middle of writing a line."""
    settings = made(**{"train.epochs": 5, "train.checkpoint_steps": 3})
    folders = whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in folders:
        Cohort.write(folder)
    for share in (0.0, 0.3):

        def dies(storage: Storage, name: str, start: int, data: bytes, share: float = share) -> None:
            if start:
                append_at(storage, name, start, data[: int(share * len(data))])
                raise Killed
            append_at(storage, name, start, data)

        with monkeypatch.context() as patched:
            patched.setattr(log, "append_at", dies)
            with pytest.raises(Killed):
                train_stage(killed, settings)
    for known, found in zip(trained(whole, settings), trained(killed, settings), strict=True):
        pd.testing.assert_frame_equal(found, known, check_exact=True)


def test_a_checkpoint_of_other_settings_is_not_gone_on_from(tmp_path: Path) -> None:
    Cohort.write(tmp_path)
    settings = made(**{"train.epochs": 3, "train.checkpoint_steps": 2})
    train_stage(tmp_path, settings)
    (tmp_path / keys.TRAIN_DIR / "stage_key").write_text("another")
    (tmp_path / keys.MODEL_WEIGHTS).unlink()
    before = pd.read_csv(tmp_path / keys.METRICS)
    train_stage(tmp_path, settings)
    after = pd.read_csv(tmp_path / keys.METRICS)
    assert not (after["seconds"] == before["seconds"]).any()
    assert after["total"].equals(before["total"])


@pytest.mark.parametrize(
    ("changes", "warnings"),
    [
        pytest.param({}, [], id="healthy"),
        pytest.param(
            {"loss.independence": 1e-6},
            [r"the independence loss does not fall: independence_condition.*tells conditions apart.*--set loss\.independence_condition"],
            id="independence_of_little_weight",
        ),
        pytest.param({"loss.independence": 0}, [], id="independence_without_weight"),
        pytest.param(
            {"loss.independence": 0, "loss.independence_batch": 1e-6},
            [r"the independence loss does not fall: independence_batch .*tells batches apart.*--set loss\.independence_batch,"],
            id="one_of_two_without_weight",
        ),
        pytest.param(
            {"model.codes": 4096, "model.code_dim": 32, "train.reset_every": 0}, [r"most codes are dead: of 4096 codes.*--set model\.codes"],
            id="more_codes_than_cells",
        ),
    ],
)  # fmt: skip
def test_a_training_that_goes_wrong_says_so_once_and_what_to_do(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, changes: dict[str, Any], warnings: list[str]
) -> None:
    write_with_effect(tmp_path)
    with caplog.at_level(logging.WARNING):
        train_stage(tmp_path, made(**{"train.batch_size": 128, "train.epochs": 30}, **changes))
    assert len(caplog.messages) == len(warnings)
    for message, expected in zip(caplog.messages, warnings, strict=True):
        assert re.match(expected, message)


def test_one_bar_shows_epoch_loss_and_speed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Cohort.write(tmp_path)
    train_stage(tmp_path, made(**{"run.progress": True}))
    last = capsys.readouterr().err.split("\r")[-1]
    total = pd.read_csv(tmp_path / keys.METRICS)["total"].iloc[-1]
    assert last.startswith("train: 100%")
    assert "24/24" in last
    assert f"epoch 12/12, loss {total:.4g}, " in last
    assert " cells/s" in last
    assert last.count("train:") == 1


def test_a_loss_that_is_not_finite_leaves_the_steps_before_it_in_the_logs(tmp_path: Path) -> None:
    Cohort.write(tmp_path)
    with pytest.raises(TrainingError, match=r"not finite at step [2-9]"):
        train_stage(tmp_path, made(**{"train.learning_rate": 1e30}))
    done = pd.read_csv(tmp_path / keys.METRICS)
    assert done["step"].tolist() == list(range(1, len(done) + 1))
    assert not (tmp_path / keys.MODEL_WEIGHTS).exists()
