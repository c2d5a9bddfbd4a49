"""The decomposition of an effect: a change within cell states and a shift between states (METHOD section 10). Pure.

Input: the donors' means of one population, plain and through the state neighbours of their cells. Output per gene:
total = within-state + state shift, each with a donor-level test and its leave-one-donor-out range, and a one-word
reading.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ndreamer_dist.stats.donor_tests import DonorTest
from ndreamer_dist.stats.sign_test import benjamini_hochberg

FEW_CELLS = 20
"""Median cells per donor below which parts are flagged: with 10, p < 0.05 for a tenth of the genes without effect."""
STANDS = 0.05
"""Largest adjusted p-value at which the reading names a part."""


@dataclass(frozen=True)
class Part:
    """One effect: the total, the within-state effect, or the state shift.

    Attributes
    ----------
    test
        The donor-level test of this effect.
    low, high
        (genes,) range of the effect when each donor is left out in turn.
    """

    test: DonorTest
    low: np.ndarray
    high: np.ndarray

    @classmethod
    def of(cls, test: DonorTest, left_out: np.ndarray) -> Part:
        """Return the test with the range of `left_out`: the effects without each donor, (donors, genes)."""
        return cls(test, np.fmin.reduce(left_out, axis=0), np.fmax.reduce(left_out, axis=0))  # these ignore NaN


@dataclass(frozen=True)
class Decomposition:
    """The decomposed effect of one population and condition: `total` = `within` + `shift`.

    Attributes
    ----------
    cells
        Median number of cells over the tested donors.
    reliability
        Share of the variance of a cell's state coordinates that is signal, mean over coordinates.
    """

    total: Part
    within: Part
    shift: Part
    cells: float
    reliability: float


def reading(within: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """Return a word per gene from the adjusted p-values of the two parts; an empty word where neither was tested.

    - `within`: only the within-state effect is significant.
    - `state`: only the state shift is significant.
    - `both`: both are significant.
    - `neither`: neither is significant. If the total is, there is an effect of unknown kind: the parts rest on fewer
      cells than the total (only matched cells count), so they are less certain than their sum.
    """
    inside, moved = (p <= STANDS for p in (within, shift))
    words = np.select([inside & moved, inside, moved], ["both", "within", "state"], "neither").astype(object)
    words[np.isnan(within) & np.isnan(shift)] = ""
    return np.asarray(words)


def decomposition_columns(decomposition: Decomposition | None, total: Part, genes: int) -> dict[str, Any]:
    """Return the table's columns of one population and condition; without a decomposition all but the total are NaN."""
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
