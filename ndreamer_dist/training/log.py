"""The logs of training: one row per step, and one per epoch.

Input: the rows measured since the last write. Output: `logs/metrics.csv` and `logs/epochs.csv`. Rows are appended, so a
write does not cost more as the files grow (except on object storage, where both files are rewritten). A checkpoint
holds the sizes of the files. A resumed run cuts the files to these sizes and goes on, so neither partial lines nor rows
of repeated steps remain.
"""

from __future__ import annotations

import csv
import io
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ndreamer_dist import keys
from ndreamer_dist.storage.files import Storage, append_at

Row = dict[str, float]
logger = logging.getLogger(__name__)

COUNTS = ("epoch", "step")
RATES = ("cells_per_second", "waiting")
"""Measures per second of a step; their mean over an epoch is weighted by the seconds of the steps."""


@dataclass
class Logged:
    """What the log files hold: the number of steps, and the size of each file in bytes."""

    steps: int = 0
    sizes: dict[str, int] = field(default_factory=dict)


def epoch_row(steps: Sequence[Row], perplexities: Sequence[Sequence[float]]) -> Row:
    """Return the row of one epoch.

    Parameters
    ----------
    steps
        The rows of its steps.
    perplexities
        (steps, codebooks), perplexity of each codebook.

    Returns
    -------
    `epoch` (from 1), its last `step`, its `seconds`, the means over its steps of all other measures, and the mean
    perplexity of each codebook as `perplexity_00`, `perplexity_01`, ....
    """
    values = dict(zip(steps[0], np.array([[row[name] for name in steps[0]] for row in steps]).T, strict=True))
    seconds, last = values.pop("seconds"), values.pop("step")[-1]
    weighted = {name: float(values.pop(name) @ seconds / seconds.sum()) for name in RATES}
    means = {name: float(value.mean()) for name, value in values.items()} | weighted
    books = {f"perplexity_{book:02d}": float(value) for book, value in enumerate(np.mean(perplexities, axis=0))}
    return {"epoch": last // len(steps), "step": last, "seconds": float(seconds.sum()), **means, **books}


def append_logs(storage: Storage, logged: Logged, steps: Sequence[Row], epochs: Sequence[Row], length: int) -> None:
    """Append to metrics.csv and epochs.csv the rows they lack, and update `logged`; an epoch has `length` steps."""
    _forget_what_was_cut(storage, logged)
    numbered = [{"epoch": (int(row["step"]) - 1) // length + 1, **row} for row in steps]
    for name, rows in ((keys.METRICS, numbered), (keys.EPOCHS, epochs)):
        new = [row for row in rows if row["step"] > logged.steps]
        start = logged.sizes.get(name, 0)
        if new:
            data = csv_bytes(new, header=not start)
            append_at(storage, name, start, data)
            logged.sizes[name] = start + len(data)
    if steps:
        logged.steps = int(steps[-1]["step"])


def logged_epochs(storage: Storage, logged: Logged) -> list[Row]:
    """Return the rows of epochs.csv up to the size that a checkpoint holds."""
    _forget_what_was_cut(storage, logged)
    size = logged.sizes.get(keys.EPOCHS)
    text = storage.read(keys.EPOCHS)[:size].decode() if size else ""
    return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(io.StringIO(text))]


def _forget_what_was_cut(storage: Storage, logged: Logged) -> None:
    """Start a log file anew if it is shorter than it was, since somebody has cut or deleted it."""
    there = storage.list(keys.LOGS) if logged.sizes else {}
    for name, size in list(logged.sizes.items()):
        if there.get(name, 0) < size:
            where = f"{storage.url}/{name}"
            logger.warning("%s was cut since the last checkpoint; its steps to %d are lost", where, logged.steps)
            del logged.sizes[name]


def csv_bytes(rows: Sequence[Row], *, header: bool) -> bytes:
    """Return rows as CSV lines with six significant digits, all by one format pattern, which is fast."""
    pattern = ",".join("%d" if name in COUNTS else "%.6g" for name in rows[0])
    lines = [",".join(rows[0])] * header + [pattern % tuple(row[name] for name in rows[0]) for row in rows]
    return "".join(f"{line}\n" for line in lines).encode()
