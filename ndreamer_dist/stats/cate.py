"""The effect in a population: mean effects, the sign test and Benjamini-Hochberg (METHOD section 7).

Pure: arrays come in, arrays and tables go out. The test takes cells as replicates, so it only describes; inference
about donors needs donors.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy import special

SIGNIFICANT = 0.05
"""Adjusted p below which a gene counts as significant."""


def sign_test(ite: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the sign test per gene (METHOD section 7).

    Parameters
    ----------
    ite
        (cells, genes) effects; NaN where a cell has none.

    Returns
    -------
    z, p, n
        (genes,) `(s - n/2) / sqrt(n/4)` with s the positive effects and half of the zero ones; two-sided normal p;
        cells with an effect. z and p are NaN where there is no cell.
    """
    n = np.count_nonzero(~np.isnan(ite), axis=0)
    with np.errstate(invalid="ignore"):
        s = np.count_nonzero(ite > 0, axis=0) + 0.5 * np.count_nonzero(ite == 0, axis=0)
        z = (s - n / 2) / np.sqrt(n / 4)
    return z, special.erfc(np.abs(z) / np.sqrt(2)), n


def benjamini_hochberg(p: np.ndarray) -> np.ndarray:
    """Return p adjusted for the false discovery rate: (genes,); NaN is not counted as a test and stays NaN."""
    adjusted = np.full(len(p), np.nan)
    tested = np.flatnonzero(~np.isnan(p))
    order = tested[np.argsort(p[tested], kind="stable")[::-1]]
    ranks = np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(1.0, np.minimum.accumulate(p[order] * len(order) / ranks))
    return adjusted


def describe_effects(ite: np.ndarray, genes: Sequence[str]) -> pd.DataFrame:
    """Return each gene's effect in a population, the strongest first (METHOD section 7).

    Parameters
    ----------
    ite
        (cells, genes) effects of the population's cells; NaN where a cell has none.

    Returns
    -------
    Columns `gene`, `mean_ite`, `z`, `p`, `p_adjusted`, `significant` (adjusted p < 0.05) and `n_cells`, ordered by
    |z|, ties by gene position.
    """
    z, p, n = sign_test(ite)
    total = np.nansum(ite, axis=0, dtype=np.float64)
    mean = np.divide(total, n, out=np.full(len(n), np.nan), where=n > 0)
    adjusted = benjamini_hochberg(p)
    described = pd.DataFrame(
        {
            "gene": list(genes), "mean_ite": mean, "z": z, "p": p, "p_adjusted": adjusted,
            "significant": adjusted < SIGNIFICANT, "n_cells": n,
        }
    )  # fmt: skip
    strength = np.where(np.isnan(z), -1.0, np.abs(z))
    return described.iloc[np.argsort(-strength, kind="stable")].reset_index(drop=True)
