"""The logs of training: a row per step and a row per epoch.

Input: the rows that the loop measured since the first step (a checkpoint holds them, so a resumed run has them all).
Output: `logs/metrics.csv` and `logs/epochs.csv`. Each file is written whole and never appended to, so a local disk and an
object store share one code path.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

import numpy as np

from ndreamer_dist import keys
from ndreamer_dist.storage.files import Storage

Row = dict[str, float]

RATES = ("cells_per_second", "waiting")
"""Measures that are shares of a step's seconds: their mean over an epoch is weighted by these."""


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
    """Write metrics.csv and epochs.csv."""
    if steps:
        numbered = [{"epoch": (int(row["step"]) - 1) // steps_per_epoch + 1, **row} for row in steps]
        storage.write_atomic(keys.METRICS, csv_bytes(numbered))
    if epochs:
        storage.write_atomic(keys.EPOCHS, csv_bytes(epochs))


def csv_bytes(rows: Sequence[Row]) -> bytes:
    """Return rows as a table, numbers in six digits."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(
        {name: value if float(value).is_integer() else f"{value:.6g}" for name, value in row.items()} for row in rows
    )
    return text.getvalue().encode()
