"""Expectation of a log-normalised count as a function of the gene's share of the counts, and the inverse function."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

SCALE: Final = 1e4  # total of a normalised cell
LIBRARY_MEDIAN: Final = 2500.0  # counts of the median cell
LIBRARY_SIGMA: Final = 0.35  # standard deviation of the log library size
DISPERSIONS: Final = np.array([1.0, 2.0, 4.0, 200.0])  # negative binomial sizes r, one per class; the last is BALLAST's
TABLE_SIZE: Final = 1024
LOG_SHARE_MIN: Final = math.log(1e-10)


@dataclass(frozen=True)
class Expectation:
    """Tables of `phi`, the expected log-normalised value of a share, and of its inverse, per dispersion class."""

    log_value: Floats  # (classes, TABLE_SIZE) log phi at even steps of the log share, from LOG_SHARE_MIN to 0
    log_share: Floats  # (classes, TABLE_SIZE) inverse at even steps of the log value, from `low` to `high`
    low: float
    high: float

    def value(self, log_share: Floats, classes: NDArray[Any]) -> Floats:
        """Return phi of log shares, (cells, genes), for genes of these dispersion classes, (genes,)."""
        return np.exp(_look_up(self.log_value, LOG_SHARE_MIN, 0.0, log_share, classes))

    def inverse(self, value: Floats, classes: NDArray[Any]) -> Floats:
        """Return the log shares with these expected values, (cells, genes)."""
        return _look_up(self.log_share, self.low, self.high, np.log(value), classes)


def expectation_tables() -> Expectation:
    """Tabulate phi by quadrature; an interpolated value has a relative error of about 1e-5."""
    log_shares = np.linspace(LOG_SHARE_MIN, 0.0, TABLE_SIZE)
    log_values = np.log([expected_log1p(np.exp(log_shares), size) for size in DISPERSIONS])
    low, high = float(log_values.min()), float(log_values.max())
    even = np.linspace(low, high, TABLE_SIZE)
    inverse = np.array([np.interp(even, row, log_shares) for row in log_values])
    return Expectation(log_values.astype(np.float32), inverse.astype(np.float32), low, high)


def expected_log1p(share: NDArray[Any], size: float) -> NDArray[Any]:
    """Return E[log1p(1e4 y / l)] for a negative binomial y of mean share x l and size r, and a log-normal l.

    Uses log(1 + s) = integral over t of (1 - exp(-s t)) exp(-t) / t. The expectation of the integrand needs only the
    generating function of y, and is smooth and accurate for means from 1e-7 to 1e4. The quadrature is the trapezoidal
    rule in log t and Gauss-Hermite in log l.
    """
    step = 0.2
    t = np.exp(np.arange(-28.0, 4.0, step))
    nodes, weights = np.polynomial.hermite_e.hermegauss(9)
    total = np.zeros(share.shape)
    for node, weight in zip(nodes, weights / weights.sum(), strict=True):
        library = LIBRARY_MEDIAN * math.exp(LIBRARY_SIGMA * node)
        drop = -np.expm1(-t * SCALE / library)
        generating = -np.expm1(-size * np.log1p(np.multiply.outer(share * library / size, drop)))
        total += weight * step * (generating @ np.exp(-t))
    return total


def _look_up(table: Floats, low: float, high: float, x: Floats, classes: NDArray[Any]) -> Floats:
    """Interpolate linearly in the table rows `classes`, whose columns are at even steps of x from `low` to `high`."""
    last = table.shape[1] - 1
    position = np.clip((x - np.float32(low)) * np.float32(last / (high - low)), 0, np.float32(last - 0.001))
    left = position.astype(np.int32)
    fraction = position - left
    left += classes.astype(np.int32) * table.shape[1]
    flat = table.ravel()
    below = flat[left]
    return below + fraction * (flat[1:][left] - below)
