"""Expression by packed row, wherever it is stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from scipy import sparse


class Expression(Protocol):
    """Expression of the kept cells, by packed row."""

    @property
    def density(self) -> float:
        """Part of the values that is stored."""
        ...

    def read(self, rows: np.ndarray, columns: np.ndarray) -> sparse.csr_matrix:
        """Return some rows (ascending, each once) and columns: CSR float32."""
        ...


@dataclass(frozen=True)
class JoinedExpression:
    """Expression of a run's cells, and after `first` rows that of cells that are mapped onto it."""

    stored: Expression
    own: Expression
    first: int

    @property
    def density(self) -> float:
        """See `Expression.density`."""
        return max(self.stored.density, self.own.density)

    def read(self, rows: np.ndarray, columns: np.ndarray) -> sparse.csr_matrix:
        """See `Expression.read`."""
        cut = int(np.searchsorted(rows, self.first))
        parts = ((self.stored, rows[:cut]), (self.own, rows[cut:] - self.first))
        return sparse.vstack([part.read(here, columns) for part, here in parts if len(here)], format="csr")
