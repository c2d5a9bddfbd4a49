"""What training leaves to be looked at: a row per step, a row per epoch, and the epochs as TensorBoard events.

What comes in: the rows that the loop measured, from the first step on (a checkpoint holds them, so a resumed run has
them all). What goes out: `logs/metrics.csv` and `logs/epochs.csv`, each written whole, and event files that hold each
epoch once however often the run was resumed: a file's name says which epochs it holds, and only those that follow are
written. Nothing is appended to, so that a local disk and an object store are one code path.
"""

from __future__ import annotations

import csv
import io
import re
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ndreamer_dist import keys
from ndreamer_dist.storage.files import Storage

Row = dict[str, float]

RATES = ("cells_per_second", "waiting")
"""Measures that are shares of a step's seconds: their mean over an epoch is weighted by these."""
EVENTS = re.compile(r"events\.out\.tfevents\.(\d+)-(\d+)\.ndreamer$")
TAGS = {"learning_rate": "train", "perplexity": "codes", "cells_per_second": "speed", "waiting": "speed"}
"""TensorBoard's sections; what is not named here is a loss, and a codebook's perplexity is under `codebooks`."""


def epoch_rows(steps: Sequence[Row], perplexities: Sequence[Sequence[float]], steps_per_epoch: int) -> list[Row]:
    """Return one row per finished epoch.

    Parameters
    ----------
    steps
        One row per step, from the first on, as the loop measured it.
    perplexities
        Of each step, how many codes of each codebook were in use: (steps, codebooks).

    Returns
    -------
    `epoch` (from 1), its last `step`, its `seconds`, the mean over its steps of everything else that a step's row
    holds, and `perplexity_00`, `perplexity_01`, ... of each codebook.
    """
    starts = range(0, len(steps) - steps_per_epoch + 1, steps_per_epoch)
    parts = [slice(start, start + steps_per_epoch) for start in starts]
    return [epoch_row(steps[part], perplexities[part]) for part in parts]


def epoch_row(steps: Sequence[Row], perplexities: Sequence[Sequence[float]]) -> Row:
    """Return the row of one epoch, of which these are all steps (see `epoch_rows`)."""
    values = {name: np.array([row[name] for row in steps]) for name in steps[0]}
    seconds = values.pop("seconds")
    last = values.pop("step")[-1]
    means = {
        name: float(np.average(value, weights=seconds if name in RATES else None)) for name, value in values.items()
    }
    books = {f"perplexity_{book:02d}": float(value) for book, value in enumerate(np.mean(perplexities, axis=0))}
    return {"epoch": last // len(steps), "step": last, "seconds": float(seconds.sum()), **means, **books}


def write_logs(storage: Storage, steps: Sequence[Row], epochs: Sequence[Row], steps_per_epoch: int) -> None:
    """Write metrics.csv, epochs.csv and the events of the epochs that no event file holds yet."""
    if steps:
        numbered = [{"epoch": (int(row["step"]) - 1) // steps_per_epoch + 1, **row} for row in steps]
        storage.write_atomic(keys.METRICS, csv_bytes(numbered))
    if epochs:
        storage.write_atomic(keys.EPOCHS, csv_bytes(epochs))
        _write_events(storage, epochs)


def csv_bytes(rows: Sequence[Row]) -> bytes:
    """Return rows as a table, numbers in six digits."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(
        {name: value if float(value).is_integer() else f"{value:.6g}" for name, value in row.items()} for row in rows
    )
    return text.getvalue().encode()


def _write_events(storage: Storage, epochs: Sequence[Row]) -> None:
    matches = [EVENTS.search(name) for name in storage.list(keys.TENSORBOARD)]
    told = max((int(match[2]) for match in matches if match), default=0)
    new = [row for row in epochs if row["epoch"] > told]
    if new:
        first, last = int(new[0]["epoch"]), int(new[-1]["epoch"])
        # TensorBoard reads the files of a folder in the order of their names.
        name = f"events.out.tfevents.{first:09d}-{last:09d}.ndreamer"
        storage.write_atomic(f"{keys.TENSORBOARD}/{name}", event_bytes(new, now=time.time()))


def event_bytes(epochs: Sequence[Row], *, now: float) -> bytes:
    """Return a TensorBoard event file of epochs, the last of which ended `now`."""
    from tensorboardX import SummaryWriter

    ends = np.cumsum([row["seconds"] for row in epochs])
    ended = now - (ends[-1] - ends)
    with tempfile.TemporaryDirectory() as folder:
        with SummaryWriter(folder) as writer:
            for row, at in zip(epochs, ended.tolist(), strict=True):
                for name in row.keys() - {"epoch", "step", "seconds"}:
                    writer.add_scalar(_tag(name), row[name], int(row["epoch"]), walltime=at)
        (file,) = Path(folder).iterdir()
        return file.read_bytes()


def _tag(name: str) -> str:
    section = "codebooks" if name.startswith("perplexity_") else TAGS.get(name, "loss")
    return f"{section}/{name}"
