"""How the values of layers are kept: as they are, with fewer bits of mantissa, or in half the bytes. Pure.

Float64 averages come in, what is stored goes out. Fewer bits compress better; the relative error is at most
2^-(bits + 1), and 2^-11 in float16 (where numbers below 6e-5 lose more).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numcodecs.bitround import BitRound

from ndreamer_dist.errors import StoreError


@dataclass(frozen=True)
class Rounding:
    """Settings `effects.dtype` and `effects.keep_bits`, as a function of values.

    Attributes
    ----------
    keep_bits
        Bits of the mantissa that are kept, the others 0; by default all.
    """

    dtype: Literal["float32", "float16"] = "float32"
    keep_bits: int | None = None

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """Return values as they are stored, in `dtype`; NaN stays NaN.

        Raises
        ------
        StoreError
            A value is beyond what float16 can hold, 65 504.
        """
        kept = values.astype(np.float32)
        if self.keep_bits is not None:
            kept = BitRound(self.keep_bits).encode(kept).view(np.float32)
        try:
            with np.errstate(over="raise"):
                return kept.astype(self.dtype)
        except FloatingPointError:
            msg = f"a layer reaches {np.nanmax(np.abs(kept)):g}, beyond float16; set effects.dtype=float32"
            raise StoreError(msg) from None


FULL = Rounding()
"""Float32, with all its bits."""
