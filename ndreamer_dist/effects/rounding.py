"""Round stored layers to fewer mantissa bits, so that they compress better. Pure."""

from __future__ import annotations

import numpy as np
from numcodecs.bitround import BitRound


def rounded(values: np.ndarray, keep_bits: int | None = None) -> np.ndarray:
    """Round float64 averages to float32 as they are stored; NaN stays NaN.

    Parameters
    ----------
    keep_bits
        Mantissa bits to keep; the others become 0. By default all. The relative error is at most 2^-(keep_bits + 1).
    """
    narrow = values.astype(np.float32, copy=keep_bits is not None)
    return narrow if keep_bits is None else np.asarray(BitRound(keep_bits).encode(narrow).view(np.float32))
