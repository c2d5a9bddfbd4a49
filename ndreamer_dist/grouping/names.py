"""Compare names of conditions and batches, and report suspicious names and confounded designs. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import pandas as pd

from ndreamer_dist.errors import listing

LIKE_MISSING = ("", "nan", "na", "n/a", "<na>", "null")
"""Lower-case names that other programs write for missing values."""


def level_meant(values: pd.Series[Any], levels: Sequence[str], name: str) -> str:
    """Return the level that a name means: the name itself, or in a numeric or boolean column its value's level."""
    kind = values.cat.categories.dtype if isinstance(values.dtype, pd.CategoricalDtype) else values.dtype
    if name in levels or not pd.api.types.is_numeric_dtype(kind):
        return name
    same = [level for level in levels if nearly_same(level, name)]
    return same[0] if len(same) == 1 else name


def nearly_same(one: str, other: str) -> bool:
    """Return whether two names are equal up to case, surrounding spaces and the notation of a number."""
    return one.strip().casefold() == other.strip().casefold() or _number(one) == _number(other)


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def odd_designs(batches: Mapping[str, set[int]], merged: Collection[str], names: Iterable[str]) -> Iterator[str]:
    """Yield notes on conditions that are confounded with a batch, and on names that look like missing values.

    Parameters
    ----------
    batches
        By condition, the control first: codes of the batches that have cells of it.
    merged
        Conditions whose batches were merged; these are not reported.
    names
        Names of all conditions and batches.
    """
    (_, control), *others = batches.items()
    confounded = [
        name for name, own in others if not own & control and min(len(own), len(control)) == 1 and name not in merged
    ]
    if confounded:
        yield (
            f"the effect of {listing(confounded)} cannot be told from a difference between batches: it has no batch in common "
            "with the control, and one of the two has a single batch"
        )
    if odd := [name for name in names if name.strip().lower() in LIKE_MISSING]:
        yield f"{listing(odd)} is taken for the name of a condition or batch; if it stands for none, leave those cells out"
