"""Read expression by packed row, from any store."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from scipy import sparse

HELD_VALUES = 2**24
"""Approximate limit on the stored values of expression that `held` keeps in memory."""


class Expression(Protocol):
    """Protocol of readers of the kept cells' expression, by packed row."""

    @property
    def density(self) -> float:
        """Share of the values that are stored, which are the non-zero ones."""
        ...

    def read(self, rows: np.ndarray, columns: np.ndarray) -> sparse.csr_matrix:
        """Return distinct ascending rows and some columns: CSR float32."""
        ...


@dataclass(frozen=True)
class JoinedExpression:
    """Expression of a run's cells (`stored`) and, from row `first` on, of cells that are mapped onto it (`own`)."""

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
        found = [part.read(here, columns) for part, here in parts if len(here)]
        return sparse.vstack(found or [self.own.read(rows, columns)], format="csr")


@dataclass(frozen=True)
class HeldExpression:
    """Expression with some rows and columns held in memory, since they are read repeatedly."""

    expression: Expression
    rows: np.ndarray
    columns: np.ndarray
    values: sparse.csr_matrix

    @property
    def density(self) -> float:
        """See `Expression.density`."""
        return self.expression.density

    def read(self, rows: np.ndarray, columns: np.ndarray) -> sparse.csr_matrix:
        """See `Expression.read`."""
        if columns is self.columns and len(rows):
            place = np.minimum(np.searchsorted(self.rows, rows), len(self.rows) - 1)
            if np.array_equal(self.rows[place], rows):
                return self.values[place]
        return self.expression.read(rows, columns)


def held(expression: Expression, rows: np.ndarray, columns: np.ndarray) -> Expression:
    """Hold some rows and columns of expression in memory; return it unchanged if these are too many values."""
    if len(rows) * len(columns) * expression.density > HELD_VALUES:
        return expression
    return HeldExpression(expression, rows, columns, expression.read(rows, columns))
