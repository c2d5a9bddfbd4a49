"""Epochs are the means of their steps, and each is told to TensorBoard once, however often the run was resumed."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from tensorboardX.crc32c import crc32c
from tensorboardX.proto.event_pb2 import Event

from ndreamer_dist import keys
from ndreamer_dist.storage.files import Storage
from ndreamer_dist.training.log import epoch_rows, event_bytes, write_logs

LENGTH, BOOKS = 3, 2


def steps_of(count: int) -> tuple[list[dict[str, float]], list[list[float]]]:
    rng = np.random.default_rng(0)
    names = ("total", "independence", "learning_rate", "perplexity", "cells_per_second", "waiting", "seconds")
    rows = [{"step": step, **dict(zip(names, rng.random(7).tolist(), strict=True))} for step in range(1, count + 1)]
    return rows, (10 * rng.random((count, BOOKS))).tolist()


def events(data: bytes) -> Iterator[Event]:
    """Read an event file by the format's own definition: length, its checksum, bytes, their checksum."""

    def masked(part: bytes) -> int:
        crc = crc32c(part)
        return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF

    file = io.BytesIO(data)
    while head := file.read(12):
        (length, crc) = struct.unpack("<QI", head)
        assert crc == masked(head[:8])
        body = file.read(length)
        assert struct.unpack("<I", file.read(4)) == (masked(body),)
        yield Event.FromString(body)


def test_an_epochs_row_is_the_mean_of_its_steps_and_rates_are_weighted_by_time() -> None:
    steps, books = steps_of(8)
    epochs = epoch_rows(steps, books, LENGTH)
    assert [row["epoch"] for row in epochs] == [1, 2]  # the third has not finished
    assert [row["step"] for row in epochs] == [3, 6]
    table = pd.DataFrame(steps)
    for row, part in zip(epochs, (table[:3], table[3:6]), strict=True):
        assert row["total"] == pytest.approx(part["total"].mean())
        assert row["seconds"] == pytest.approx(part["seconds"].sum())
        cells = (part["cells_per_second"] * part["seconds"]).sum()
        assert row["cells_per_second"] == pytest.approx(cells / part["seconds"].sum())
        waited = (part["waiting"] * part["seconds"]).sum()
        assert row["waiting"] == pytest.approx(waited / part["seconds"].sum())
        expected = np.asarray(books)[part.index].mean(0)
        assert [row["perplexity_00"], row["perplexity_01"]] == pytest.approx(expected)


def test_each_epoch_is_told_once_though_steps_are_done_again(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    steps, books = steps_of(30)
    for done in (7, 14, 9, 9, 20, 30):  # killed after 14 steps, and on from a checkpoint at 9
        write_logs(storage, steps[:done], epoch_rows(steps[:done], books[:done], LENGTH), LENGTH)
    files = sorted((tmp_path / keys.TENSORBOARD).iterdir())
    assert len(files) > 2
    told: dict[str, list[tuple[int, float, float]]] = {}
    for file in files:
        for event in events(file.read_bytes()):
            for value in event.summary.value:
                told.setdefault(value.tag, []).append((event.step, value.simple_value, event.wall_time))
    epochs = pd.read_csv(tmp_path / keys.EPOCHS)
    names = {tag.partition("/")[2] for tag in told}
    assert names == set(epochs.columns) - {"epoch", "step", "seconds"}
    for tag, series in told.items():
        assert [epoch for epoch, _, _ in series] == list(range(1, 11))
        expected = epochs[tag.partition("/")[2]]
        assert [value for _, value, _ in series] == pytest.approx(expected.tolist(), rel=1e-5)
    assert told.keys() >= {
        "loss/total", "loss/independence", "train/learning_rate", "codes/perplexity", "codebooks/perplexity_01",
        "speed/cells_per_second", "speed/waiting",
    }  # fmt: skip
    assert pd.read_csv(tmp_path / keys.METRICS)["step"].tolist() == list(range(1, 31))


def test_epochs_are_dated_to_when_they_ended() -> None:
    epochs = [{"epoch": e, "step": 3 * e, "seconds": float(e), "total": 1.0} for e in (1, 2, 3)]
    dated = [event.wall_time for event in events(event_bytes(epochs, now=1000.0)) if event.summary.value]
    assert dated == [995, 997, 1000]
