"""The sign test and Benjamini-Hochberg (METHOD section 7).

Pure: arrays in, arrays out. The sign test takes cells as replicates, so it only describes; inference needs donors.
"""

from __future__ import annotations

import numpy as np
from scipy import special, stats


def sign_test(positive: np.ndarray, zero: np.ndarray, n: np.ndarray | int) -> tuple[np.ndarray, np.ndarray]:
    """Return the sign test per gene (METHOD section 7).

    Parameters
    ----------
    positive, zero
        (genes,) number of cells whose effect is above zero, and exactly zero.
    n
        Number of cells that have an effect, of all genes or of each.

    Returns
    -------
    z, p
        (genes,) `(s - n/2) / sqrt(n/4)` with s the positive effects and half of the zero ones; two-sided normal p.
        Both are NaN where there is no cell.
    """
    n = np.asarray(n, dtype=np.float64)
    with np.errstate(invalid="ignore"):
        z = (positive + zero / 2 - n / 2) / np.sqrt(n / 4)
    return z, special.erfc(np.abs(z) / np.sqrt(2))


def benjamini_hochberg(p: np.ndarray) -> np.ndarray:
    """Return p adjusted for the false discovery rate: (genes,); NaN is not counted as a test and stays NaN."""
    adjusted, tested = np.full(len(p), np.nan), ~np.isnan(p)
    if tested.any():
        adjusted[tested] = stats.false_discovery_control(p[tested])
    return adjusted
