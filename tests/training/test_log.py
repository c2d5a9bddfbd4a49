"""Epochs are the means of their steps, each written once, however often the run was resumed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from ndreamer_dist import keys
from ndreamer_dist.storage.files import Storage
from ndreamer_dist.training.log import epoch_rows, write_logs

LENGTH, BOOKS = 3, 2


def steps_of(count: int) -> tuple[list[dict[str, float]], list[list[float]]]:
    rng = np.random.default_rng(0)
    names = ("total", "independence_batch", "learning_rate", "perplexity", "cells_per_second", "waiting", "seconds")
    rows = [{"step": step, **dict(zip(names, rng.random(7).tolist(), strict=True))} for step in range(1, count + 1)]
    return rows, (10 * rng.random((count, BOOKS))).tolist()


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


def test_each_step_and_epoch_is_written_once_though_steps_are_done_again(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    steps, books = steps_of(30)
    for done in (7, 14, 9, 9, 20, 30):  # killed after 14 steps, and resumed from a checkpoint at 9
        write_logs(storage, steps[:done], epoch_rows(steps[:done], books[:done], LENGTH), LENGTH)
    assert pd.read_csv(tmp_path / keys.EPOCHS)["epoch"].tolist() == list(range(1, 11))
    assert pd.read_csv(tmp_path / keys.METRICS)["step"].tolist() == list(range(1, 31))
