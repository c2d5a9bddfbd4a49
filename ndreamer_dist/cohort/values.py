"""Decide from a sample of rows what the values of a cohort are: counts, scaled counts, or logarithms and their base.

Input: a source and the setting `normalise`. Output: a `Decision`, or an error that says what to do. `plan`, the log,
`info` and the report show the decision as one sentence.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NoReturn

import numpy as np
from scipy import sparse

from ndreamer_dist.cohort.source import Source
from ndreamer_dist.errors import CohortError, listing

Values = Literal["counts", "none"]
ValuesAsked = Literal["auto", "counts", "none"]

LOG_CEILING = 20.0
"""Upper bound of natural log1p values: log1p of counts per 10 000 or per million is always smaller."""
BASES: dict[float, str] = {
    float(np.exp(1.0)): "natural logarithms",
    2.0: "logarithms to base 2",
    10.0: "logarithms to base 10",
}
EXACT = 1e-3
"""Largest coefficient of variation of the cells' sums at which the sums count as equal."""
CLOSE = 0.02
"""The same limit for natural logarithms; it is wider because a few genes may have been removed after scaling."""
MULTIPLES = 0.95
"""Smallest share of values that must be multiples of the smallest value of their cell for scaled counts."""

MOSTLY_WHOLE = 0.5
"""Smallest share of whole numbers at which values are counts, some of them estimated or corrected."""


@dataclass(frozen=True)
class Decision:
    """What the values are treated as.

    Attributes
    ----------
    normalise
        `counts`: the pipeline scales and logs the values; `none`: they are log-normalised already.
    integers
        Whether a value that is not a whole number is an error, because `auto` decided for counts.
    base
        Base of the logarithms, if it is not e; None for natural logarithms and counts.
    seen
        The observation and the decision in one sentence.
    scaled
        Whether the counts were divided by a factor, so that numbers of molecules are not known.
    """

    normalise: Values
    integers: bool
    base: float | None
    seen: str
    scaled: bool = False


@dataclass(frozen=True)
class _Scale:
    """The scale on which values are counts divided by a factor: `base` 0 as they are, else after undoing log(1 + x)."""

    base: float
    why: str


def decide_values(source: Source, asked: ValuesAsked, log_base: float | None = None) -> Decision:
    """Decide from a sample what the values are, and whether the pipeline normalises them.

    Parameters
    ----------
    asked
        The setting `normalise`.
    log_base
        Base of the logarithms, if the user sets it.

    Raises
    ------
    CohortError
        The sample holds a negative, NaN or infinite value; `asked` contradicts the values; or `auto` cannot decide.
    """
    rows = source.sample
    _refuse_impossible(source)
    if not rows.data.size:
        return Decision("none" if asked == "none" else "counts", False, None, "values: none in the cells looked at")
    if (rows.data == np.floor(rows.data)).all():
        return _whole_numbers(rows, asked)
    scale = _scale(rows)
    if asked == "counts" and scale is not None and scale.base:
        msg = (
            f"the values look log-normalised ({_shown(rows)}, {scale.why}), but normalise=counts expects counts; use "
            f"--normalise none, or name the layer that holds counts{_elsewhere(source)}"
        )
        raise CohortError(msg)
    if asked == "counts":
        scaled = scale is not None and bool((rows.data == np.floor(rows.data)).mean() < MOSTLY_WHOLE)
        seen = f"values: {_shown(rows)}; taken for {'scaled ' * scaled}counts, as asked: {SCALING}"
        return Decision("counts", False, None, seen, scaled)
    return _logarithms(source, asked, scale, log_base)


SCALING = "scaled to 10,000 a cell, ln(1 + x)"


def _whole_numbers(rows: sparse.csr_matrix, asked: ValuesAsked) -> Decision:
    largest = float(rows.data.max())
    if asked == "none" and largest > 1:
        msg = (
            f"the values look like counts (integers up to {largest:.0f}), but normalise=none expects them "
            "log-normalised; use --normalise counts, or name the layer that is log-normalised"
        )
        raise CohortError(msg)
    seen = f"values: whole numbers up to {largest:.0f} in {rows.shape[0]} cells looked at"
    if asked == "none":
        return Decision("none", False, None, f"{seen}; used as they are, as asked")
    return Decision("counts", asked == "auto", None, f"{seen}: counts; {SCALING}")


def _logarithms(source: Source, asked: ValuesAsked, scale: _Scale | None, log_base: float | None) -> Decision:
    rows = source.sample
    if scale is not None and not scale.base and log_base is None:
        msg = (
            f"the values are scaled but not log-normalised ({_shown(rows)}; {scale.why}); --normalise counts scales them to "
            f"10,000 a cell and takes the log, as it does with counts, or name a layer of counts{_elsewhere(source)}"
        )
        raise CohortError(msg)
    base = log_base or (scale.base if scale else None) or source.log_base
    if asked == "auto" and scale is None and log_base is None and source.log_base is None:
        msg = (
            f"the values are neither counts nor clearly log-normalised ({_shown(rows)}); say what they are: "
            "--normalise counts; --normalise none for natural logarithms, with --set cohort.log_base=2 for such to base 2"
            f"{_elsewhere(source)}"
        )
        raise CohortError(msg)
    why = "as asked" if log_base else scale.why if scale else "uns['log1p'] says so" if source.log_base else "as asked"
    natural = base is None or abs(base - math.e) < 1e-6
    named = "natural logarithms" if base is None else BASES.get(base, f"logarithms to base {base:g}")
    turned = "used as they are" if natural else "turned into natural ones"
    return Decision("none", False, None if natural else base, f"values: {_shown(rows)}; {named} ({why}), {turned}")


def _shown(rows: sparse.csr_matrix) -> str:
    return f"not integers, at most {float(rows.data.max()):.2f}"


def _elsewhere(source: Source) -> str:
    """Return the end of an error message: the layers, and `.raw`, that could be read instead."""
    raw = "; --layer raw reads what is in .raw" if source.raw else ""
    return raw + (f"; the cohort has the layers {listing(source.layers)} (--layer NAME)" if source.layers else "")


def _scale(rows: sparse.csr_matrix) -> _Scale | None:
    """Return the scale on which the values are scaled counts, or None.

    Values are scaled counts if all cells have the same sum, or if each cell's values are multiples of its smallest.
    """
    filled = np.diff(rows.indptr) > 0  # cells with any value
    starts, lengths = rows.indptr[:-1][filled], np.diff(rows.indptr)[filled]
    undone = {base: _undone(rows.data, base) for base in (*BASES, 0.0) if _may_be(rows.data, base)}
    spread = {base: _spread(np.add.reduceat(values, starts)) for base, values in undone.items()}
    nearest = min(spread, key=lambda base: spread[base])
    natural = next(iter(BASES))
    if spread[nearest] >= EXACT and spread.get(natural, 1.0) < CLOSE:
        nearest = natural
    if spread[nearest] < (CLOSE if nearest == natural else EXACT):
        total = float(np.add.reduceat(undone[nearest], starts).mean())
        return _Scale(nearest, f"every cell sums to {total:,.4g}{_without_log(nearest)}")
    share = {base: _multiples(values, starts, lengths) for base, values in undone.items()}
    likeliest = max(share, key=lambda base: share[base])
    if share[likeliest] > MULTIPLES:
        return _Scale(likeliest, f"a cell's values are multiples of its smallest{_without_log(likeliest)}")
    return None


def _without_log(base: float) -> str:
    return f" once {BASES[base]} are undone" if base else ""


def _may_be(values: np.ndarray, base: float) -> bool:
    return not base or float(values.max()) * np.log(base) < LOG_CEILING


def _undone(values: np.ndarray, base: float) -> np.ndarray:
    """Invert log(1 + x) to a base; base 0 returns the values as they are."""
    wide = values.astype(np.float64)
    return np.expm1(wide * np.log(base)) if base else wide


def _spread(sums: np.ndarray) -> float:
    """Return the coefficient of variation of sums; 1 for a single sum, which shows no spread."""
    return float(sums.std() / sums.mean()) if len(sums) > 1 and sums.mean() > 0 else 1.0


def _multiples(values: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> float:
    """Return the share of values that are multiples of the smallest value of their cell."""
    smallest = np.repeat(np.minimum.reduceat(values, starts), lengths)
    times = values / smallest
    return float((np.abs(times - np.round(times)) < 0.01 * times).mean())


def _refuse_impossible(source: Source) -> None:
    """Refuse a sample with a NaN, infinite or negative value; the error names the cell and the gene."""
    rows = source.sample
    bad = ~(np.isfinite(rows.data) & (rows.data >= 0))
    if bad.any():
        place = int(bad.argmax())
        row = int(np.searchsorted(rows.indptr, place, side="right")) - 1
        refuse_value(source, int(source.sample_rows[row]), int(rows.indices[place]), float(rows.data[place]))


def refuse_value(source: Source, row: int, gene: int, value: float) -> NoReturn:
    """Raise the `CohortError` for a value that is NaN, infinite or negative."""
    what = (
        "NaN" if np.isnan(value) else f"{value:g}, an infinite value" if np.isinf(value) else f"{value:g}, below zero"
    )
    msg = (
        f"{named_value(source, row, gene)} holds {what}; expected counts or log-normalised expression, finite and not "
        f"negative (not scaled or corrected values){_elsewhere(source)}"
    )
    raise CohortError(msg)


def named_value(source: Source, row: int, gene: int) -> str:
    """Return the position of a value as text: the names of its cell and gene, and its row."""
    return f"cell {source.cell_name(row)!r}, gene {str(source.gene_names[gene])!r} (row {row})"
