"""The truth of a simulated cohort, computed for any cells and genes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import fields
from functools import cached_property
from typing import Any

import numpy as np
import zarr
from numpy.typing import ArrayLike, NDArray

from ndreamer_dist import keys
from ndreamer_dist.datasets.expectation import Floats
from ndreamer_dist.datasets.model import Model
from ndreamer_dist.datasets.parameters import (
    CELL_PREFIX,
    CELL_TYPE,
    CONDITION,
    DONOR,
    Codes,
    Names,
    Parameters,
    SimulatedCells,
    StateLaw,
)
from ndreamer_dist.errors import CohortError, QueryError, listing, suggest
from ndreamer_dist.storage.arrays import read_array
from ndreamer_dist.storage.files import Storage, open_storage


class Truth:
    """The true expression and effects of a simulated cohort, computed on request.

    Values are expectations of log-normalised expression, `E[log1p(1e4 y / library)]`, over counts and library sizes
    (see `ndreamer_dist.datasets`): the averages that estimates of a method should approach. `rows` selects cells by
    position: a slice, integers or a boolean mask. `genes` are names; None selects all genes. Results are (rows, genes)
    float32 unless said otherwise.

    Attributes
    ----------
    genes, cell_types, conditions, donors
        Names by code; the first condition is the control.
    effect_genes
        Names of the genes that any condition changes in any cell type.
    """

    def __init__(self, storage: Storage, model: Model, cells: int) -> None:
        self._storage, self._model, self._cells = storage, model, cells
        names = Names.of(model.parameters)
        self.genes = names.genes
        self.cell_types = names.categories[CELL_TYPE]
        self.conditions = names.categories[CONDITION]
        self.donors = names.categories[DONOR]
        self.effect_genes = [self.genes[j] for j in np.flatnonzero(model.affected)]

    def __len__(self) -> int:
        return self._cells

    def expression(
        self, rows: slice | ArrayLike, condition: str | None = None, genes: Sequence[str] | None = None
    ) -> Floats:
        """Return f, the expression without batch effect, of cells under a condition; None for their own condition."""
        cells = self._latents(rows)
        if condition is not None:
            cells = cells.under(self._code(self.conditions, condition, "condition"))
        return self._model.true_expression(cells, self._columns(genes))

    def batch_effect(self, rows: slice | ArrayLike, genes: Sequence[str] | None = None) -> Floats:
        """Return g, the batch effect of cells in their own donor and condition; its mean over the donors is 0."""
        cells, columns = self._latents(rows), self._columns(genes)
        return self._model.observed_expression(cells, columns) - self._model.true_expression(cells, columns)

    def ite(self, rows: slice | ArrayLike, condition: str | None = None, genes: Sequence[str] | None = None) -> Floats:
        """Return the effect of a condition on the cells, against the control.

        With None it is the effect of the cell's own condition, and NaN for control cells, as in the results of a run.
        """
        cells, columns = self._latents(rows), self._columns(genes)
        treated = cells if condition is None else cells.under(self._code(self.conditions, condition, "condition"))
        effect = self._model.true_expression(treated, columns) - self._model.true_expression(cells.under(0), columns)
        if condition is None:
            effect[cells.condition == 0] = np.nan
        return effect

    @property
    def law(self) -> StateLaw:
        """How effects depend on the cell state, and the state on the condition."""
        return self._model.law

    def mean_ite(self, cell_type: str, condition: str, genes: Sequence[str] | None = None) -> Floats:
        """Return the mean effect of a condition on its own cells of a type: (genes,) float32.

        If effects depend on the state, the mean is over the distribution of the state in the condition.
        """
        code, columns = self._code(self.conditions, condition, "condition"), self._columns(genes)
        states = self.law.states(code) if self.law.effects else np.zeros(1, np.float32)
        cells = self._typical(cell_type, states)
        effects = self._model.true_expression(cells.under(code), columns) - self._model.true_expression(cells, columns)
        return effects.mean(0, dtype=np.float64).astype(np.float32)

    def mean_state_shift(self, cell_type: str, condition: str, genes: Sequence[str] | None = None) -> Floats:
        """Return how much a condition's shift of the state alone changes the mean of a cell type: (genes,) float32.

        The difference of the true means between condition and control is `mean_ite` plus this.
        """
        code, columns = self._code(self.conditions, condition, "condition"), self._columns(genes)
        moved, unmoved = (
            self._model.true_expression(self._typical(cell_type, self.law.states(c)), columns) for c in (code, 0)
        )
        return (moved - unmoved).mean(0, dtype=np.float64).astype(np.float32)

    def _typical(self, cell_type: str, states: Floats) -> SimulatedCells:
        """Return one control cell of a type for each state."""
        kind = np.full(len(states), self._code(self.cell_types, cell_type, "cell type"))
        return SimulatedCells(kind, np.zeros_like(kind), np.zeros_like(kind), states, np.zeros_like(states))

    def positions(self, cells: Sequence[str]) -> Codes:
        """Return the positions of cells with names from `simulate`: (cells,) integers."""
        numbers = [name.removeprefix(CELL_PREFIX) for name in cells]
        wrong = [name for name, number in zip(cells, numbers, strict=True) if not number.isdecimal() or name == number]
        if wrong:
            msg = f"the simulated cohort has no cell {listing(wrong)}; its cells are {CELL_PREFIX}0000000 and so on"
            raise QueryError(msg)
        return np.array([int(number) for number in numbers], dtype=np.intp)

    def obs(self, rows: slice | ArrayLike = slice(None)) -> dict[str, NDArray[Any]]:
        """Return the names of the cells' type, condition and donor, and their state and library size: (rows,) each."""
        cells = self._latents(rows)
        return {
            CELL_TYPE: np.array(self.cell_types)[cells.cell_type],
            CONDITION: np.array(self.conditions)[cells.condition],
            DONOR: np.array(self.donors)[cells.donor],
            "state": cells.state,
            "library": cells.library,
        }

    @cached_property
    def _position(self) -> dict[str, int]:
        return {name: j for j, name in enumerate(self.genes)}

    def _columns(self, genes: Sequence[str] | None) -> Codes:
        if genes is None:
            return np.arange(len(self.genes))
        unknown = [str(name) for name in genes if name not in self._position]
        if unknown:
            msg = f"the simulated cohort has no gene {listing(unknown)}.{suggest(unknown[0], self.genes)}"
            raise QueryError(msg)
        return np.array([self._position[name] for name in genes], dtype=np.intp)

    @staticmethod
    def _code(names: list[str], name: str, what: str) -> int:
        if name not in names:
            msg = f"the simulated cohort has no {what} {name!r}; it has {listing(names)}.{suggest(name, names)}"
            raise QueryError(msg)
        return names.index(name)

    def _positions(self, rows: slice | ArrayLike) -> Codes:
        """Return the positions that a slice, integers or a boolean mask select; `QueryError` if out of range."""
        if isinstance(rows, slice):
            return np.arange(self._cells)[rows]
        index = np.asarray(rows)
        if index.dtype == bool:
            if index.shape != (self._cells,):
                msg = f"the mask of cells has shape {index.shape}; the simulated cohort has {self._cells} cells"
                raise QueryError(msg)
            return np.flatnonzero(index)
        positions = index.astype(np.intp)
        if positions.size and not (positions.min() >= 0 and positions.max() < self._cells):
            msg = f"no rows {positions.min()} to {positions.max()}; the simulated cohort has {self._cells} cells"
            raise QueryError(msg)
        return positions

    def _latents(self, rows: slice | ArrayLike) -> SimulatedCells:
        """Read the latent variables of some cells; one read spans the rows from the first to the last."""
        positions = self._positions(rows)
        start, stop = (int(positions.min()), int(positions.max()) + 1) if len(positions) else (0, 0)
        parts: dict[str, Any] = {
            field.name: read_array(self._storage, f"cells/{field.name}", slice(start, stop))[positions - start]
            for field in fields(SimulatedCells)
        }
        return SimulatedCells(
            **{name: p.astype(np.float32 if p.dtype.kind == "f" else np.intp) for name, p in parts.items()}
        )


def truth_path(path: str | os.PathLike[str]) -> str:
    """Return the address of the truth of a simulated cohort: `cohort.truth.zarr` beside `cohort.zarr`."""
    return f"{open_storage(path).url.removesuffix('.zarr')}.truth.zarr"


def load_truth(path: str | os.PathLike[str]) -> Truth:
    """Open the truth of a cohort that `simulate` wrote.

    Parameters
    ----------
    path
        Address of the cohort, not of the truth.

    Raises
    ------
    CohortError
        There is no truth, because the cohort was not simulated, not finished, or moved without it; or the truth has
        another format version.
    """
    storage = open_storage(truth_path(path))
    if not storage.exists("zarr.json"):
        msg = f"{storage.url} does not exist: {path} was not simulated, not finished, or moved without its truth"
        raise CohortError(msg)
    attributes = zarr.open_group(storage.store(read_only=True), mode="r").attrs
    if attributes["format"] != keys.FORMAT_VERSION:
        msg = f"{storage.url} has format {attributes['format']}, expected {keys.FORMAT_VERSION}: simulate it again"
        raise CohortError(msg)
    names = [field.name for field in fields(Parameters) if field.name != "pathway"]
    arrays = {name: read_array(storage, name) for name in names}
    # Truths written before screens were introduced have no pathways.
    has_pathways = storage.exists("pathway/zarr.json")
    pathway = read_array(storage, "pathway") if has_pathways else np.full(len(arrays["fold"]), -1, dtype=np.int16)
    parameters = Parameters(**arrays, pathway=pathway)
    law = StateLaw(*(float(str(attributes.get(f"state_{field.name}", 0))) for field in fields(StateLaw)))
    return Truth(storage, Model(parameters, law), int(str(attributes["cells"])))
