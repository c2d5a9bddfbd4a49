"""The logs of training: a row per step and a row per epoch.

Input: the rows that the loop measured since they were last written. Output: `logs/metrics.csv` and `logs/epochs.csv`, which
grow: what a write costs does not depend on the steps before it, but at an object store, where both files are
written anew. A checkpoint holds how long the files were. A resumed run cuts them there and goes on, so that neither half a
line nor steps that are done again remain.
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
"""Measures that are shares of a step's seconds: their mean over an epoch is weighted by these."""


@dataclass
class Logged:
    """What the files hold: the number of steps, and the bytes of each file."""

    steps: int = 0
    sizes: dict[str, int] = field(default_factory=dict)


def epoch_row(steps: Sequence[Row], perplexities: Sequence[Sequence[float]]) -> Row:
    """Return the row of one epoch.

    Parameters
    ----------
    steps
        Its steps' rows, as the loop measured them.
    perplexities
        Of each step, how many codes of each codebook were in use: (steps, codebooks).

    Returns
    -------
    `epoch` (from 1), its last `step`, its `seconds`, the mean over its steps of everything else that a step's row
    holds, and `perplexity_00`, `perplexity_01`, ... of each codebook.
    """
    values = dict(zip(steps[0], np.array([[row[name] for name in steps[0]] for row in steps]).T, strict=True))
    seconds, last = values.pop("seconds"), values.pop("step")[-1]
    weighted = {name: float(values.pop(name) @ seconds / seconds.sum()) for name in RATES}
    means = {name: float(value.mean()) for name, value in values.items()} | weighted
    books = {f"perplexity_{book:02d}": float(value) for book, value in enumerate(np.mean(perplexities, axis=0))}
    return {"epoch": last // len(steps), "step": last, "seconds": float(seconds.sum()), **means, **books}


def append_logs(storage: Storage, logged: Logged, steps: Sequence[Row], epochs: Sequence[Row], length: int) -> None:
    """Add to metrics.csv and epochs.csv the rows that they lack, and note it; an epoch has `length` steps."""
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
    """Return the rows of epochs.csv as far as a checkpoint knows of them."""
    _forget_what_was_cut(storage, logged)
    size = logged.sizes.get(keys.EPOCHS)
    text = storage.read(keys.EPOCHS)[:size].decode() if size else ""
    return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(io.StringIO(text))]


def _forget_what_was_cut(storage: Storage, logged: Logged) -> None:
    """Let files begin anew that are shorter than they were: somebody has cut or deleted them."""
    there = storage.list(keys.LOGS) if logged.sizes else {}
    for name, size in list(logged.sizes.items()):
        if there.get(name, 0) < size:
            where = f"{storage.url}/{name}"
            logger.warning("%s was cut since the last checkpoint; its steps to %d are lost", where, logged.steps)
            del logged.sizes[name]


def csv_bytes(rows: Sequence[Row], *, header: bool) -> bytes:
    """Return rows as lines of a table, numbers in six digits; one pattern for all, since every step has its line."""
    pattern = ",".join("%d" if name in COUNTS else "%.6g" for name in rows[0])
    lines = [",".join(rows[0])] * header + [pattern % tuple(row[name] for name in rows[0]) for row in rows]
    return "".join(f"{line}\n" for line in lines).encode()
