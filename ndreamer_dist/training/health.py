"""Warnings about a training that runs but does not learn what it should. Pure functions.

Input: the log rows of the finished epochs. Output: texts that say what is wrong and what to do. (A loss that is not
finite is an error, which the loop raises.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

from ndreamer_dist.settings import LossSettings, Settings
from ndreamer_dist.training.log import Row

FAIR_SHARE = 0.25
"""Fraction of the planned epochs before which there are no warnings."""
FEWEST_STEPS = 20
"""Smallest number of steps to average over: the information in a single mini-batch varies much."""
NEGLIGIBLE_INFORMATION = 0.005
"""An independence loss below this is negligible, even if it has not fallen (1.3e-3 to 1.4e-3 on the Kang cohort)."""
DEAD_BELOW = 0.1
"""Most codes are dead if perplexity / codes is below this (0.3 to 0.9 on real cohorts)."""


def concerns(epochs: Sequence[Row], settings: Settings, planned: int) -> dict[str, str]:
    """Return warnings about a training so far, by kind; empty if all is well or it is too early to say.

    Parameters
    ----------
    epochs
        One row per finished epoch (`log.epoch_row`).
    planned
        Number of epochs of the whole training.
    """
    if not epochs or len(epochs) < FAIR_SHARE * planned:
        return {}
    steps_per_epoch = epochs[0]["step"] / epochs[0]["epoch"]
    window = max(math.ceil(FEWEST_STEPS / steps_per_epoch), len(epochs) // 5)
    if len(epochs) < 2 * window:
        return {}
    texts = {
        "independence": _independence(epochs, window, settings.loss),
        "codes": _codes(epochs, window, settings.model.codes),
    }
    return {kind: text for kind, text in texts.items() if text is not None}


def _independence(epochs: Sequence[Row], window: int, loss: LossSettings) -> str | None:
    """Return a warning if an independence loss has not fallen since the first epochs."""
    losses = {
        "independence_condition": (loss.condition_weight, "conditions"),
        "independence_batch": (loss.batch_weight, "batches"),
        "independence_batch_within": (loss.independence_batch_within, "batches inside a condition"),
    }
    stuck = [name for name, (weight, _) in losses.items() if weight and _stays(epochs, window, name)]
    if not stuck:
        return None
    name = stuck[0]
    first, last = _first_and_last(epochs, window, name)
    return (
        f"the independence loss does not fall: {name} {first:.4f} over epochs 1 to {window}, {last:.4f} over epochs "
        f"{len(epochs) - window + 1} to {len(epochs)}, so the embedding still tells {losses[name][1]} apart; raise "
        f"--set loss.{name}, or lower --set loss.dependence"
    )


def _stays(epochs: Sequence[Row], window: int, name: str) -> bool:
    """Return whether a loss has not fallen and is not negligible."""
    first, last = _first_and_last(epochs, window, name)
    return last >= max(first, NEGLIGIBLE_INFORMATION)


def _first_and_last(epochs: Sequence[Row], window: int, name: str) -> tuple[float, float]:
    """Return the mean of a loss over the first `window` epochs, and over the last."""
    return fmean(row[name] for row in epochs[:window]), fmean(row[name] for row in epochs[-window:])


def _codes(epochs: Sequence[Row], window: int, codes: int) -> str | None:
    """Return a warning if the last epochs used few of the codes."""
    used = fmean(row["perplexity"] for row in epochs[-window:])
    if used >= DEAD_BELOW * codes:
        return None
    return (
        f"most codes are dead: of {codes} codes a codebook uses {used:.1f} (perplexity, mean over codebooks) at epoch "
        f"{len(epochs)}; lower --set model.codes, re-initialise unused codes more often (--set train.reset_every), or "
        "lower --set train.learning_rate"
    )
