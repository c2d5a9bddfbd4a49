"""The model of a simulated cohort: expected expression of cells, with and without batch effect."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ndreamer_dist.datasets.expectation import Floats, expectation_tables
from ndreamer_dist.datasets.parameters import Codes, Parameters, SimulatedCells, StateLaw, affected

BLOCK_ROWS: Final = 64  # cells that share a random generator; chunks are whole blocks, so their size changes no result


class Model:
    """Expected expression as a function of the cells' latent variables; pure, used by the simulation and the truth."""

    def __init__(self, parameters: Parameters, law: StateLaw | None = None) -> None:
        self.parameters = parameters
        self.law = law or StateLaw()
        self.tables = expectation_tables()
        self.genes = parameters.log_share.shape[1]
        self.ballast = self.genes - 1
        self.affected = affected(parameters)
        present = (parameters.group_weight > 0).T.astype(np.float32)  # (conditions, donors)
        # Per condition, the mean over its donors; subtracting it centres the batch effect.
        self.centre = np.einsum("cb,kbg->kcg", present / present.sum(1, keepdims=True), parameters.donor_shape)

    def true_expression(self, cells: SimulatedCells, genes: Codes) -> Floats:
        """Return f, the expectation without batch effect: (cells, genes)."""
        log_share = self._log_share(cells, genes)
        if self.ballast in genes:
            others = np.arange(self.ballast)
            control = cells.under(0)  # gains and losses of a condition cancel, so the ballast is that of the control
            taken = _by_blocks(lambda part: np.exp(self._log_share(part, others)).sum(1, dtype=np.float64), control)
            log_share[:, genes == self.ballast] = np.log(rest(taken))[:, None]
        return self.tables.value(log_share, self.parameters.dispersion[genes])

    def observed_expression(self, cells: SimulatedCells, genes: Codes) -> Floats:
        """Return f + g, the expectation with batch effect: (cells, genes)."""
        true = self.true_expression(cells, genes[genes != self.ballast])
        value = np.empty((len(cells), len(genes)), np.float32)
        value[:, genes != self.ballast] = true + self._distortion(true, cells, genes[genes != self.ballast])
        if self.ballast in genes:
            others = np.arange(self.ballast)
            taken = _by_blocks(lambda part: self.observed_shares(part, others).sum(1, dtype=np.float64), cells)
            share = np.log(rest(taken)).astype(np.float32)[:, None]
            value[:, genes == self.ballast] = self.tables.value(share, self.parameters.dispersion[[self.ballast]])
        return value

    def observed_shares(self, cells: SimulatedCells, genes: Codes) -> Floats:
        """Return the shares with which counts are drawn, (cells, genes); the genes must not include the ballast."""
        classes = self.parameters.dispersion[genes]
        true = self.tables.value(self._log_share(cells, genes), classes)
        return np.exp(self.tables.inverse(true + self._distortion(true, cells, genes), classes))

    def _log_share(self, cells: SimulatedCells, genes: Codes) -> Floats:
        p, kind = self.parameters, cells.cell_type[:, None]
        log_share = p.log_share[kind, genes] + self._fold(cells, genes)
        log_share += cells.state[:, None] * p.state_load[kind, genes]
        return log_share

    def _fold(self, cells: SimulatedCells, genes: Codes) -> Floats:
        """Return the log-fold changes by the cells' condition, and by their state if the law says so: (cells, genes)."""
        fold = self.parameters.fold[cells.condition[:, None], cells.cell_type[:, None], genes]
        if self.law.effects:
            # Scale the gains and losses of shares, not the logs, so that they still cancel and spare the ballast.
            changed = np.flatnonzero(self.affected[genes])
            gain = np.expm1(fold[:, changed]) * self.law.response(cells.state)[:, None]
            fold[:, changed] = np.log1p(gain)
        return fold

    def _distortion(self, true: Floats, cells: SimulatedCells, genes: Codes) -> Floats:
        """Return g, the batch effect, for expectations `true` = f: (cells, genes)."""
        kind, condition, donor = (a[:, None] for a in (cells.cell_type, cells.condition, cells.donor))
        amount = self.parameters.donor_shape[:, donor, genes] - self.centre[:, condition, genes]
        amount *= self.parameters.type_shape[:, kind, genes]
        return np.tanh(true) * amount[0] + true * np.exp(-true) * amount[1]  # |g| < f, since |amount| sums below 1


def rest(taken: NDArray[Any]) -> NDArray[Any]:
    """Return the share of the ballast, with a floor that only cohorts of a few dozen genes reach."""
    return np.maximum(1 - taken, 0.02)


def _by_blocks(function: Callable[[SimulatedCells], NDArray[Any]], cells: SimulatedCells) -> NDArray[Any]:
    parts = [function(cells[i : i + BLOCK_ROWS]) for i in range(0, len(cells), BLOCK_ROWS)]
    return np.concatenate(parts) if parts else np.empty(0)
