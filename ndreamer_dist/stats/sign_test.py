"""The sign test and Benjamini-Hochberg (METHOD section 7).

Pure: arrays in, arrays out. The sign test treats cells as replicates, so it is descriptive; inference needs donors.
"""

from __future__ import annotations

import numpy as np
from scipy import special, stats


def sign_test(positive: np.ndarray, zero: np.ndarray, n: np.ndarray | int) -> tuple[np.ndarray, np.ndarray]:
    """Return the sign test per gene (METHOD section 7).

    Parameters
    ----------
    positive, zero
        (genes,) number of cells whose effect is positive, and exactly zero.
    n
        Number of cells with a defined effect: one number, or one per gene.

    Returns
    -------
    z, p
        (genes,) `(s - n/2) / sqrt(n/4)`, where s is `positive + zero / 2`, and its two-sided normal p-value. Both are
        NaN where n is 0.
    """
    n = np.asarray(n, dtype=np.float64)
    with np.errstate(invalid="ignore"):
        z = (positive + zero / 2 - n / 2) / np.sqrt(n / 4)
    return z, special.erfc(np.abs(z) / np.sqrt(2))


def benjamini_hochberg(p: np.ndarray) -> np.ndarray:
    """Return Benjamini-Hochberg adjusted p-values, (genes,); NaN stays NaN and does not count as a test."""
    adjusted, tested = np.full(len(p), np.nan), ~np.isnan(p)
    if tested.any():
        adjusted[tested] = stats.false_discovery_control(p[tested])
    return adjusted
