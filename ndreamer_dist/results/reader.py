"""Reading results.zarr in pieces, by name: cells by a query on `obs`, genes by name.

Only the chunks that hold the answer are read, wherever the store lives. Names go in and come out; the cells' order is
the input cohort's unless packed order is asked for. A chunk that is missing or fails its checksum is an error that
names it, never a wrong number.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import anndata
import numpy as np
import pandas as pd

from ndreamer_dist import keys
from ndreamer_dist.cohort.design import Design
from ndreamer_dist.errors import QueryError, StoreError, listing, suggest
from ndreamer_dist.results.pieces import read_dense, read_element, read_sparse
from ndreamer_dist.results.store import ROOT
from ndreamer_dist.storage import Storage, open_array, open_storage, read_array

Order = Literal["input", "packed"]
Cells = str | Sequence[str] | np.ndarray | pd.Series | None

SUGGEST_AMONG = 50_000
"""Beyond this many names, none is suggested for a misspelt one: looking for it would take minutes."""


def open_results(address: str | os.PathLike[str] | Storage) -> Results:
    """Open the results of a run.

    Parameters
    ----------
    address
        A run directory, a results.zarr, or the URL of either (`s3://`, `https://`, ...).

    Raises
    ------
    StoreError
        There are no results, or the run that makes them has not finished.
    """
    given = open_storage(address)
    for storage in (given, given / keys.RESULTS):
        if storage.exists(ROOT):
            attributes = json.loads(storage.read(ROOT)).get("attributes", {})
            if attributes.get("encoding-type") == "anndata":
                return Results(storage)
    if any(given.exists(name) for name in (keys.RUN_JSON, keys.RESULTS, "X")):
        msg = f"the run in {given.url} has not finished; give the same `run` command again and it goes on"
        raise StoreError(msg)
    msg = f"{given.url} holds no results: expected a run directory or a results.zarr"
    raise StoreError(msg)


@dataclass(frozen=True)
class Results:
    """The results of a run, read in pieces. Make one with `open_results`.

    In every method that takes them:

    - `cells` is a pandas query on `obs` (`'cell_type == "Microglia"'`), a list of cell names (which then come in that
      order), a Boolean mask over `obs`, or none for all cells;
    - `genes` is a list of gene names, which come in that order, or none for all modelled genes;
    - `order` is `"input"`, the input cohort's, or `"packed"`, the store's (by group). Dropped cells are in neither.

    `QueryError` is raised where a name is unknown or no cell is selected, `StoreError` where a chunk is damaged.
    """

    storage: Storage

    @property
    def url(self) -> str:
        """The store's address."""
        return self.storage.url

    @property
    def obs(self) -> pd.DataFrame:
        """The cells' table, in input order: the input's columns and ours, which start with `ndreamer_`."""
        return self._cells.iloc[self._input_order].copy()

    @property
    def packed_obs(self) -> pd.DataFrame:
        """The cells' table in the order of the store, by group: reading stretches of it reads each chunk once."""
        return self._cells.copy()

    @property
    def var(self) -> pd.DataFrame:
        """The modelled genes' table."""
        return self._genes.copy()

    @property
    def var_names(self) -> pd.Index:
        """Names of the modelled genes."""
        return self._genes.index

    @cached_property
    def uns(self) -> dict[str, Any]:
        """What the run said of itself: settings, versions, seed, groups, sign convention, counts of dropped cells."""
        return dict(self._table("uns")[keys.UNS])

    @cached_property
    def design(self) -> Design:
        """Conditions, batches and groups; groups own contiguous rows of the packed order."""
        return Design.from_json(json.loads(self.uns["design"]))

    @property
    def conditions(self) -> tuple[str, ...]:
        """Names of the conditions, the control first."""
        return self.design.conditions

    @property
    def control(self) -> str:
        """Name of the control condition."""
        return self.design.control

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the stored layers."""
        return tuple(str(name) for name in self.uns["layers"])

    def ite(
        self,
        cells: Cells = None,
        genes: Sequence[str] | None = None,
        *,
        order: Order = "input",
        drop_undefined: bool = True,
    ) -> anndata.AnnData:
        """Return individual treatment effects, own condition minus control (METHOD section 6).

        Parameters
        ----------
        drop_undefined
            Leave out control cells, which have no effect of a treatment; otherwise their rows are NaN.
        """
        return self.layer(keys.LAYER_ITE, cells, genes, order=order, drop_undefined=drop_undefined)

    def denoised(
        self, cells: Cells = None, genes: Sequence[str] | None = None, *, order: Order = "input"
    ) -> anndata.AnnData:
        """Return denoised expression: each cell's expected expression over its condition's batches (section 6)."""
        return self.layer(keys.LAYER_DENOISED, cells, genes, order=order)

    def batch_effect(
        self, cells: Cells = None, genes: Sequence[str] | None = None, *, order: Order = "input"
    ) -> anndata.AnnData:
        """Return the batch effect that was removed, and with it the cell's own noise (METHOD section 6)."""
        return self.layer(keys.LAYER_BATCH_EFFECT, cells, genes, order=order)

    def layer(
        self,
        name: str,
        cells: Cells = None,
        genes: Sequence[str] | None = None,
        *,
        order: Order = "input",
        drop_undefined: bool = False,
    ) -> anndata.AnnData:
        """Return a part of a stored layer: `X` (cells, genes) float32, with the tables' rows that belong to it."""
        if name not in self.layers:
            kept = listing(self.layers) if self.layers else "none"
            msg = f"{self.url} has no layer {name!r}; it stores {kept}.{suggest(name, self.layers)}"
            raise QueryError(msg)
        rows = self._rows(cells, order)
        if drop_undefined and name == keys.LAYER_ITE:
            rows = self._with_effect(rows)
        columns = self._columns(genes)
        return self._part(read_dense(self.storage, f"layers/{name}", rows, columns), rows, columns)

    def expression(
        self, cells: Cells = None, genes: Sequence[str] | None = None, *, order: Order = "input"
    ) -> anndata.AnnData:
        """Return the log-normalised expression that went in: `X` (cells, genes) CSR float32."""
        rows, columns = self._rows(cells, order), self._columns(genes)
        return self._part(read_sparse(self.storage, rows, self._pointers, len(self._genes))[:, columns], rows, columns)

    def embedding(self, cells: Cells = None, *, pca: bool = False, order: Order = "input") -> pd.DataFrame:
        """Return effect-modifier coordinates, or their principal components: one row a cell, by name."""
        rows = self._rows(cells, order)
        name = keys.OBSM_PCA if pca else keys.OBSM_MU
        width = open_array(self.storage, f"obsm/{name}").shape[1]
        values = read_dense(self.storage, f"obsm/{name}", rows, np.arange(width))
        return pd.DataFrame(values, index=self._cells.index[rows])

    # --- what is behind them -----------------------------------------------------------------------------------------

    @cached_property
    def _cells(self) -> pd.DataFrame:
        return self._table("obs")

    @cached_property
    def _genes(self) -> pd.DataFrame:
        return self._table("var")

    @cached_property
    def _input_order(self) -> np.ndarray:
        """Packed rows in input order."""
        return np.argsort(self._cells[keys.OBS_INPUT_ROW].to_numpy(), kind="stable")

    @cached_property
    def _pointers(self) -> np.ndarray:
        return read_array(self.storage, f"X/{keys.INDPTR}")

    def _table(self, name: str) -> Any:
        return read_element(self.storage, name)

    def _part(self, values: Any, rows: np.ndarray, columns: np.ndarray) -> anndata.AnnData:
        return anndata.AnnData(X=values, obs=self._cells.iloc[rows].copy(), var=self._genes.iloc[columns].copy())

    def _rows(self, cells: Cells, order: Order) -> np.ndarray:
        """Return the packed rows that a selection means, in the order asked for: (rows,) int64."""
        if order not in ("input", "packed"):
            msg = f"order is 'input' or 'packed', found {order!r}"
            raise QueryError(msg)
        if cells is None:
            chosen = self._input_order
        elif isinstance(cells, str):
            chosen = self._queried(cells)
        else:
            chosen = self._listed(cells)
        if not len(chosen):
            msg = f"no cell is selected by {cells!r}" if isinstance(cells, str) else "no cell is selected"
            raise QueryError(msg)
        return np.sort(chosen) if order == "packed" else chosen

    def _queried(self, query: str) -> np.ndarray:
        table = self._cells
        try:
            mask = table.eval(query, engine="python", local_dict={}, global_dict={})
        except Exception as error:
            names = [str(name) for name in table.columns]
            msg = f"the query {query!r} cannot be read ({error}); the columns are {listing(names, limit=30)}"
            raise QueryError(msg) from error
        if not isinstance(mask, pd.Series) or not pd.api.types.is_bool_dtype(mask.dtype):
            msg = f"the query {query!r} does not say yes or no of every cell; compare a column with a value"
            raise QueryError(msg)
        kept = mask.fillna(value=False).to_numpy(dtype=bool)
        return self._input_order[kept[self._input_order]]

    def _listed(self, cells: Any) -> np.ndarray:
        values = np.asarray(cells)
        if values.dtype == bool:
            if values.shape != (len(self._cells),):
                msg = f"a mask over the cells needs shape ({len(self._cells)},), found {values.shape}"
                raise QueryError(msg)
            return self._input_order[values]
        return _places(self._cells.index, values.tolist(), "cell")

    def _columns(self, genes: Sequence[str] | None) -> np.ndarray:
        if genes is None:
            return np.arange(len(self._genes))
        chosen = _places(self._genes.index, [genes] if isinstance(genes, str) else list(genes), "gene")
        if not len(chosen):
            msg = "no gene is selected"
            raise QueryError(msg)
        return chosen

    def _with_effect(self, rows: np.ndarray) -> np.ndarray:
        treated = self.design.group_conditions[self.design.group_of(rows)] != 0
        if not treated.any():
            msg = (
                f"all {len(rows)} selected cells are {self.control!r}, the control, and have no treatment effect; "
                "select cells of another condition"
            )
            raise QueryError(msg)
        return rows[treated]


def _places(index: pd.Index, names: Sequence[Any], what: str) -> np.ndarray:
    """Return where names stand; `QueryError` names those that are not there."""
    places = index.get_indexer(pd.Index(names, dtype=object))
    absent = [str(name) for name, place in zip(names, places, strict=True) if place < 0]
    if absent:
        near = suggest(absent[0], index) if len(index) <= SUGGEST_AMONG else ""
        hint = " Only the modelled genes have effects." if what == "gene" else ""
        msg = f"there is no {what} {listing(absent)} among the {len(index)} in the results.{near}{hint}"
        raise QueryError(msg)
    return np.asarray(places, dtype=np.int64)
