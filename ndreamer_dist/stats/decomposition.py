"""An effect in two parts: the change in cells of the same state, and the change of state itself. Pure.

Input: the donors' means of one population, plain and through the state neighbours of their cells. Output, per gene: three
effects that add up, each with a test on donors and its range when any one donor is left out, and a word for the reading.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ndreamer_dist.stats.donor_tests import DonorTest
from ndreamer_dist.stats.sign_test import benjamini_hochberg

FEW_CELLS = 20
"""Cells a donor below which the parts are marked: with 10, a tenth of the genes without effect fell below 0.05."""
STANDS = 0.05
"""Adjusted p-value up to which a part counts in the reading."""


@dataclass(frozen=True)
class Part:
    """One of the effects.

    Attributes
    ----------
    test
        On donors.
    low, high
        (genes,) range of the effect without any one donor.
    """

    test: DonorTest
    low: np.ndarray
    high: np.ndarray

    @classmethod
    def of(cls, test: DonorTest, left_out: np.ndarray) -> Part:
        """Return a test with the range of the effects without each donor, (donors, genes)."""
        defined = left_out[~np.isnan(left_out).all(axis=1)]
        if not len(defined):
            nothing = np.full(left_out.shape[1], np.nan)
            return cls(test, nothing, nothing)
        return cls(test, defined.min(axis=0), defined.max(axis=0))


@dataclass(frozen=True)
class Decomposition:
    """The effects of one population and condition: `total` = `within` + `shift`.

    Attributes
    ----------
    cells
        Median number of cells of a donor that is tested.
    reliability
        Mean share of a cell's state coordinates that is signal.
    """

    total: Part
    within: Part
    shift: Part
    cells: float
    reliability: float


def decomposed(
    own: np.ndarray,
    within: np.ndarray,
    test: Callable[[np.ndarray], DonorTest],
    left_out: Callable[[np.ndarray], np.ndarray],
) -> tuple[Part, Part, Part]:
    """Return total, within-state and state-shift effects of donors' means.

    Parameters
    ----------
    own, within
        (donors, genes) plain means, and means over what all donors' cells find in the donor at their own state.
    test, left_out
        The test on donors, and the effects without each donor, of (donors, genes).
    """
    total, inside, shift = (Part.of(test(values), left_out(values)) for values in (own, within, own - within))
    return total, inside, shift


def reading(within: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """Return a word per gene from two adjusted p-values; none where nothing could be tested.

    - `within`: the effect within states stands, a shift of state does not.
    - `state`: a shift of state stands, an effect within states does not.
    - `both`: both stand.
    - `neither`: neither part stands by itself. If the total does, there is an effect, and of which kind cannot be said:
      fewer matches than cells make the parts less certain than their sum.
    """
    inside, moved = (p <= STANDS for p in (within, shift))
    words = np.select([inside & moved, inside, moved], ["both", "within", "state"], "neither").astype(object)
    words[np.isnan(within) & np.isnan(shift)] = ""
    return np.asarray(words)


def decomposition_columns(decomposition: Decomposition | None, total: Part, genes: int) -> dict[str, Any]:
    """Return the table's columns of one population and condition; NaN where there is no decomposition but the total."""
    nothing = np.full(genes, np.nan)
    parts = {"total": total, "within_state": None, "state_shift": None}
    if decomposition is not None:
        parts = {"total": decomposition.total, "within_state": decomposition.within, "state_shift": decomposition.shift}
    columns: dict[str, Any] = {}
    for name, part in parts.items():
        p = nothing if part is None else part.test.p
        columns[name] = nothing if part is None else part.test.effect
        columns[f"{name}_p"] = p
        columns[f"{name}_p_adjusted"] = benjamini_hochberg(p)
        columns[f"{name}_loo_low"] = nothing if part is None else part.low
        columns[f"{name}_loo_high"] = nothing if part is None else part.high
    columns["reading"] = reading(columns["within_state_p_adjusted"], columns["state_shift_p_adjusted"])
    columns["few_cells"] = decomposition is not None and decomposition.cells < FEW_CELLS
    columns["cells_a_donor"] = np.nan if decomposition is None else decomposition.cells
    columns["state_reliability"] = np.nan if decomposition is None else decomposition.reliability
    return columns
