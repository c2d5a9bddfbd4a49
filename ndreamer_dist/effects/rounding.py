"""Keep fewer bits of mantissa in stored layers, so that they compress better. Pure."""

from __future__ import annotations

import numpy as np
from numcodecs.bitround import BitRound


def rounded(values: np.ndarray, keep_bits: int | None = None) -> np.ndarray:
    """Return float64 averages as they are stored: float32, NaN kept.

    Parameters
    ----------
    keep_bits
        Bits of the mantissa to keep, the others 0; all by default. The relative error is at most 2^-(keep_bits + 1).
    """
    kept = values.astype(np.float32, copy=keep_bits is not None)
    return kept if keep_bits is None else np.asarray(BitRound(keep_bits).encode(kept).view(np.float32))
