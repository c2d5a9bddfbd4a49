"""An epoch's row is the mean of its steps, and every row is written once, however often the run was resumed."""

from __future__ import annotations

import io
from copy import deepcopy
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from ndreamer_dist import keys
from ndreamer_dist.storage.files import Storage, append_at
from ndreamer_dist.training.log import Logged, append_logs, epoch_row, logged_epochs

LENGTH, BOOKS = 3, 2


def steps_of(count: int) -> tuple[list[dict[str, float]], list[list[float]]]:
    rng = np.random.default_rng(0)
    names = ("total", "independence_batch", "learning_rate", "perplexity", "cells_per_second", "waiting", "seconds")
    rows = [{"step": step, **dict(zip(names, rng.random(7).tolist(), strict=True))} for step in range(1, count + 1)]
    return rows, (10 * rng.random((count, BOOKS))).tolist()


def epochs_of(steps: list[dict[str, float]], books: list[list[float]]) -> list[dict[str, float]]:
    ends = range(LENGTH, len(steps) + 1, LENGTH)
    return [epoch_row(steps[end - LENGTH : end], books[end - LENGTH : end]) for end in ends]


def test_an_epochs_row_is_the_mean_of_its_steps_and_rates_are_weighted_by_time() -> None:
    steps, books = steps_of(8)
    epochs = epochs_of(steps, books)
    assert [row["epoch"] for row in epochs] == [1, 2]
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


@pytest.fixture(params=["local", "object_store"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    return Storage(str(tmp_path) if request.param == "local" else f"memory://{tmp_path}")


def table(storage: Storage, name: str) -> pd.DataFrame:
    return pd.read_csv(io.BytesIO(storage.read(name)))


def test_each_step_and_epoch_is_written_once_though_steps_are_done_again_and_a_line_was_torn(storage: Storage) -> None:
    steps, books = steps_of(30)
    epochs, logged, checkpoint = epochs_of(steps, books), Logged(), Logged()
    for first, last, saved in ((0, 7, True), (6, 14, False), (6, 9, True), (9, 20, True), (18, 30, False)):
        if first == 6 and last == 9:  # killed with half a line written; resumed from the checkpoint at step 7
            append_at(storage, keys.METRICS, storage.list(keys.LOGS)[keys.METRICS], b"5,15,0.12")
            logged = deepcopy(checkpoint)
            assert [row["epoch"] for row in logged_epochs(storage, logged)] == [1, 2]
        append_logs(storage, logged, steps[first:last], epochs[first // LENGTH : last // LENGTH], LENGTH)
        checkpoint = deepcopy(logged) if saved else checkpoint
    assert table(storage, keys.EPOCHS)["epoch"].tolist() == list(range(1, 11))
    assert table(storage, keys.METRICS)["step"].tolist() == list(range(1, 31))
    assert table(storage, keys.METRICS)["total"].to_numpy() == pytest.approx([row["total"] for row in steps], rel=1e-5)


def test_a_log_that_somebody_cut_begins_anew_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    storage, logged = Storage(str(tmp_path)), Logged()
    steps, books = steps_of(9)
    append_logs(storage, logged, steps[:6], epochs_of(steps[:6], books), LENGTH)
    (tmp_path / keys.METRICS).unlink()
    assert len(logged_epochs(storage, logged)) == 2
    assert "its steps to 6 are lost" in caplog.text
    append_logs(storage, logged, steps[6:], [], LENGTH)
    assert table(storage, keys.METRICS)["step"].tolist() == [7, 8, 9]
    (tmp_path / keys.METRICS).write_bytes(b"")  # during the training
    append_logs(storage, logged, steps_of(11)[0][9:], [], LENGTH)
    assert table(storage, keys.METRICS)["step"].tolist() == [10, 11]
    assert table(storage, keys.EPOCHS)["epoch"].tolist() == [1, 2]


def bytes_of_this_thread() -> tuple[int, int]:
    """Return the bytes that this thread has read and written; other threads of the tests read and write, too."""
    lines = Path("/proc/thread-self/io").read_text().splitlines()
    counts = {name: int(count) for name, _, count in (line.partition(": ") for line in lines)}
    return counts["rchar"], counts["wchar"]


def test_what_a_log_takes_does_not_grow_with_it(tmp_path: Path) -> None:
    """The last of 40 additions to a local file reads and writes as many bytes as the first."""
    storage, logged, (steps, _) = Storage(str(tmp_path)), Logged(), steps_of(200)
    took = []
    for first in range(0, 200, 5):
        before = bytes_of_this_thread()
        append_logs(storage, logged, steps[first : first + 5], [], LENGTH)
        took.append(np.subtract(bytes_of_this_thread(), before))
    read, written = np.transpose(took)
    assert max(written[1:]) < 1.5 * min(written[1:])
    assert max(read[1:]) < 1000  # the bytes that reading the counters takes
