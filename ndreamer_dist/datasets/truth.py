"""The truth of a simulated cohort, which a method should recover, for any cells and genes."""

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
    """What is true of a simulated cohort, computed for the cells and genes that are asked for.

    Values are expectations of log-normalised expression, `E[log1p(1e4 y / library)]`, over counts and library sizes
    (see the module), so they are what a method's own expressions and effects average to. `rows` are positions of the
    cohort (a slice or integers), `genes` are names; all genes without them. All results are (rows, genes), float32.

    Attributes
    ----------
    genes, cell_types, conditions, donors
        Names, by position; the first condition is the control.
    effect_genes
        Names of the genes that some condition changes in some cell type.
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
        """Return f of the cells under a condition (their own without one), free of any batch effect."""
        cells = self._latents(rows)
        if condition is not None:
            cells = cells.under(self._code(self.conditions, condition, "condition"))
        return self._model.true_expression(cells, self._columns(genes))

    def batch_effect(self, rows: slice | ArrayLike, genes: Sequence[str] | None = None) -> Floats:
        """Return g of the cells in their own donor and condition; its mean over a condition's donors is 0."""
        cells, columns = self._latents(rows), self._columns(genes)
        return self._model.observed_expression(cells, columns) - self._model.true_expression(cells, columns)

    def ite(self, rows: slice | ArrayLike, condition: str | None = None, genes: Sequence[str] | None = None) -> Floats:
        """Return the effect of a condition on the cells, against control.

        Without a condition it is that of the cell's own, and NaN on control cells, as in the results of a run.
        """
        cells, columns = self._latents(rows), self._columns(genes)
        treated = cells if condition is None else cells.under(self._code(self.conditions, condition, "condition"))
        effect = self._model.true_expression(treated, columns) - self._model.true_expression(cells.under(0), columns)
        if condition is None:
            effect[cells.condition == 0] = np.nan
        return effect

    @property
    def law(self) -> StateLaw:
        """How effects and conditions depend on the cells' state."""
        return self._model.law

    def mean_ite(self, cell_type: str, condition: str, genes: Sequence[str] | None = None) -> Floats:
        """Return the mean effect of a condition on the cells of a type that are in it, (genes,).

        Where effects depend on the state, the mean is over the law of the state in that condition; else it is exact.
        """
        code, columns = self._code(self.conditions, condition, "condition"), self._columns(genes)
        states = self.law.states(code) if self.law.effects else np.zeros(1, np.float32)
        cells = self._typical(cell_type, states)
        effects = self._model.true_expression(cells.under(code), columns) - self._model.true_expression(cells, columns)
        return effects.mean(0, dtype=np.float64).astype(np.float32)

    def mean_state_shift(self, cell_type: str, condition: str, genes: Sequence[str] | None = None) -> Floats:
        """Return by how much a condition's shift of the state alone moves the mean of a type's control cells, (genes,).

        A difference of means between condition and control is `mean_ite` plus this.
        """
        code, columns = self._code(self.conditions, condition, "condition"), self._columns(genes)
        moved, unmoved = (
            self._model.true_expression(self._typical(cell_type, self.law.states(c)), columns) for c in (code, 0)
        )
        return (moved - unmoved).mean(0, dtype=np.float64).astype(np.float32)

    def _typical(self, cell_type: str, states: Floats) -> SimulatedCells:
        """Return control cells of a type, one for each state."""
        kind = np.full(len(states), self._code(self.cell_types, cell_type, "cell type"))
        return SimulatedCells(kind, np.zeros_like(kind), np.zeros_like(kind), states, np.zeros_like(states))

    def positions(self, cells: Sequence[str]) -> Codes:
        """Return the rows of cells by their names, as `simulate` named them."""
        numbers = [name.removeprefix(CELL_PREFIX) for name in cells]
        wrong = [name for name, number in zip(cells, numbers, strict=True) if not number.isdigit() or name == number]
        if wrong:
            msg = f"the simulated cohort has no cell {listing(wrong)}; its cells are {CELL_PREFIX}0000000 and so on"
            raise QueryError(msg)
        return np.array([int(number) for number in numbers], dtype=np.intp)

    def obs(self, rows: slice | ArrayLike = slice(None)) -> dict[str, NDArray[Any]]:
        """Return the cells' names of cell type, condition and donor, and their true state and library size."""
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
    def _code(known: list[str], name: str, what: str) -> int:
        if name not in known:
            msg = f"the simulated cohort has no {what} {name!r}; it has {listing(known)}.{suggest(name, known)}"
            raise QueryError(msg)
        return known.index(name)

    def _latents(self, rows: slice | ArrayLike) -> SimulatedCells:
        if not isinstance(rows, slice):
            rows = np.asarray(rows, dtype=np.intp)
            if rows.size and not (rows.min() >= 0 and rows.max() < self._cells):
                msg = f"rows {rows.min()} to {rows.max()} are asked for; the simulated cohort has {self._cells} cells"
                raise QueryError(msg)
        start, stop = (rows.start, rows.stop) if isinstance(rows, slice) else _span(rows)
        within = slice(None, None, rows.step) if isinstance(rows, slice) else rows - start
        parts: dict[str, Any] = {
            field.name: read_array(self._storage, f"cells/{field.name}", slice(start, stop))[within]
            for field in fields(SimulatedCells)
        }
        return SimulatedCells(
            **{name: p.astype(np.float32 if p.dtype.kind == "f" else np.intp) for name, p in parts.items()}
        )


def _span(rows: Codes) -> tuple[int, int]:
    return (int(rows.min()), int(rows.max()) + 1) if len(rows) else (0, 0)


def truth_path(path: str | os.PathLike[str]) -> str:
    """Return the address of a simulated cohort's truth: `cohort.truth.zarr` beside `cohort.zarr`."""
    return f"{open_storage(path).url.removesuffix('.zarr')}.truth.zarr"


def load_truth(path: str | os.PathLike[str]) -> Truth:
    """Open the truth of a cohort that `simulate` wrote; `path` is the cohort's.

    Raises
    ------
    CohortError
        There is none: the cohort was not simulated, was moved without its truth, or was not finished.
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
    found = {name: read_array(storage, name) for name in names}
    # A truth that was written before there were pathways has none.
    known = storage.exists("pathway/zarr.json")
    pathway = read_array(storage, "pathway") if known else np.full(len(found["fold"]), -1, dtype=np.int16)
    parameters = Parameters(**found, pathway=pathway)
    law = StateLaw(*(float(str(attributes.get(f"state_{field.name}", 0))) for field in fields(StateLaw)))
    return Truth(storage, Model(parameters, law), int(str(attributes["cells"])))
