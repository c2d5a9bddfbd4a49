"""Read parts of results.zarr by name: cells by a query on `obs`, genes by name.

Only the chunks of these parts are read, from disk or object storage. Cells come in the order of the input cohort unless
packed order is requested. A chunk that is missing or fails its checksum raises an error that names it.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from functools import cached_property
from numbers import Integral
from typing import Any, Literal, Self

import anndata
import numpy as np
import pandas as pd

from ndreamer_dist import keys
from ndreamer_dist.cohort.design import Design
from ndreamer_dist.effects.expression import JoinedExpression
from ndreamer_dist.effects.onto import Onto
from ndreamer_dist.errors import QueryError, StoreError, listing, quoted, shown, suggest
from ndreamer_dist.matching.labels import Inside
from ndreamer_dist.results.annotations import annotation_of, population_labels, read_annotations
from ndreamer_dist.results.cohort import Cohort, GivenExpression, given_expression
from ndreamer_dist.results.names import cells_of_query, near_value, places_of_cells, places_of_genes
from ndreamer_dist.results.on_demand import (
    Counterparts,
    Expression,
    Question,
    StoredExpression,
    compute,
    counterfactual_question,
    counterparts_of,
    effect_question,
    layer_question,
)
from ndreamer_dist.results.provenance import matches_table
from ndreamer_dist.results.read import read_cells, read_dense, read_element
from ndreamer_dist.rundir.directory import RunDirectory
from ndreamer_dist.storage.arrays import open_array, read_array
from ndreamer_dist.storage.counted import counted
from ndreamer_dist.storage.files import ConsolidatedStorage, Storage, open_storage
from ndreamer_dist.storage.shards import Reads

logger = logging.getLogger(__name__)

Order = Literal["input", "packed"]
Cells = str | Sequence[str] | np.ndarray | pd.Series | None
PopulationLabels = str | pd.Series | pd.DataFrame | None
"""Populations: the name of a column of `obs`, labels by cell name (a Series, or a table of one column), or `None` for
all cells together."""
Room = Callable[[tuple[int, int]], np.ndarray]

REQUIRED = {"design", "key", "seed", "settings", "version", "versions"}
"""Entries that every `uns["ndreamer"]` has."""
OBJECTS: dict[str, Callable[[Any], Any]] = {
    "settings": dict, "versions": str, "dropped": int, "effective_controls": float, "design": lambda value: value, "input": lambda value: value,
}  # fmt: skip
"""Entries of `uns["ndreamer"]` that are JSON objects, and the type of their values."""
SCALARS: dict[str, type] = {
    "seed": Integral, "key": str, "version": str, "normalise": str, keys.UNS_EMBEDDING: str, keys.UNS_EMBEDDING_KEY: str,
}  # fmt: skip
"""Entries of `uns["ndreamer"]` that are scalars, and their types."""


def results_storage(address: str | os.PathLike[str] | Storage, embedding: str | None = None) -> ConsolidatedStorage:
    """Return the storage of a run's results.

    Parameters
    ----------
    address
        A run directory, a results.zarr, or the URL of either (`s3://`, `https://`, ...).
    embedding
        Name of the matching space whose results to open, if the run directory holds several, for example `harmony`. By
        default the space that the run began with.

    Raises
    ------
    StoreError
        There are no results, the space does not exist, or the run has not finished.
    """
    folder = open_storage(address)
    if embedding is not None:
        folder = _of_space(folder, embedding)
    for url in (folder.url, (folder / keys.RESULTS).url):
        storage = ConsolidatedStorage(url)
        if (storage.root_metadata or {}).get("attributes", {}).get("encoding-type") == "anndata":
            return storage
    if any(folder.exists(name) for name in (keys.RUN_JSON, keys.RESULTS, "X")):
        msg = f"the run in {folder.url} has not finished; give the same `run` command again to continue it"
        raise StoreError(msg)
    msg = f"{folder.url} holds no results: expected a run directory or a results.zarr"
    raise StoreError(msg)


def _of_space(folder: Storage, method: str) -> Storage:
    """Return the folder with the results of a matching space; raise `StoreError` if there is no such space."""
    if not folder.exists(keys.RUN_JSON):
        found = ResultsReader(results_storage(folder)).space
        if found == method:
            return folder
        msg = f"{folder.url} is matched in {quoted(found)}, not in {quoted(method)}; give the run directory to choose"
        raise StoreError(msg)
    spaces = RunDirectory(folder).spaces()
    if method not in spaces:
        there = f"{listing(spaces)}.{suggest(method, spaces)}"
        msg = f"{folder.url} has no space {quoted(method)}; it has {there} `run` with --embedding adds one"
        raise StoreError(msg)
    return spaces[method].storage


class CellsTable(pd.DataFrame):
    """A copy of `obs` that warns if a column is set, which does not change the results; derived tables are ordinary."""

    @property
    def _constructor(self) -> type[pd.DataFrame]:
        return pd.DataFrame

    def __setitem__(self, key: Any, value: Any) -> None:
        logger.warning(
            "column %s is only in this copy of obs; results.annotate(series) stores it, and `by` takes a Series", key
        )
        super().__setitem__(key, value)


@dataclass(frozen=True)
class ResultsReader:
    """The results of a run, read part by part; `Results` adds the statistics.

    Methods share these arguments:

    - `cells` is a pandas query on `obs` (`'cell_type == "Microglia"'`), a list of cell names, a Boolean mask over
      `obs`, or `None` for all cells. A list of names determines the order of the cells.
    - `genes` is a list of gene names, which determines their order, or `None` for all genes: those that were modelled,
      or with `cohort` those of the cohort.
    - `cohort` is the input cohort (an AnnData, a path or a URL). With it, `genes` may name any of its genes. Use
      `open_cohort` to open and check it once for many calls.
    - `order` is `"input"`, the order of the input cohort, or `"packed"`, the order of the store (by group). Cells that
      the run dropped are in neither.

    A layer that is not stored, and every layer with `cohort`, is computed through the matches, bit by bit as if it were
    stored.

    Raises
    ------
    QueryError
        A name is unknown, or no cell is selected.
    StoreError
        A chunk is missing or damaged, or matches are missing; the message says how to add them.
    CohortError
        The cohort is not the input of these results.
    """

    storage: ConsolidatedStorage
    labels: pd.DataFrame | None = field(default=None, repr=False, compare=False)
    """Columns by cell that are used like those of `obs`, in this process only; see `labelled`."""

    def __repr__(self) -> str:
        """Return a summary for notebooks: cells, genes, conditions, layers and columns of obs."""
        design = self.design
        others = ", ".join(map(shown, design.conditions[1:4])) + (", ..." if len(design.conditions) > 4 else "")
        return (
            f"{type(self).__name__} of {design.own_cells:,} cells x {len(self._genes):,} modelled genes at {self.url}\n"
            f"    conditions: {shown(design.control)} (control), {others}; groups: {len(design.own_groups):,}\n"
            f"    layers: {', '.join(self.layers) or 'none'}\n"
            f"    obs: {', '.join(shown(str(name)) for name in self._cells.columns)}"
        )

    @property
    def url(self) -> str:
        """Address of the store."""
        return self.storage.url

    @property
    def obs(self) -> pd.DataFrame:
        """Table of the cells in input order, with the input's columns and those of the run (`ndreamer_...`).

        It is a copy; use `Results.annotate` to store a column.
        """
        return CellsTable(self._input_cells)

    @property
    def packed_obs(self) -> pd.DataFrame:
        """Table of the cells in packed order (by group), in which consecutive cells share chunks of the store."""
        return self._cells.copy()

    @property
    def var(self) -> pd.DataFrame:
        """Table of the modelled genes; a copy."""
        return self._genes.copy()

    @property
    def var_names(self) -> pd.Index:
        """Names of the modelled genes."""
        return self._genes.index

    @cached_property
    def uns(self) -> dict[str, Any]:
        """Description of the run: settings, versions, seed, groups, sign convention, numbers of dropped cells."""
        description = read_element(self.storage, "uns").get(keys.UNS)
        if not isinstance(description, dict) or not description.keys() >= REQUIRED:
            msg = f"{self.url}: uns['{keys.UNS}'] does not say what made the results; it is damaged, or not of this package"
            raise StoreError(msg)
        for name in OBJECTS.keys() & description.keys():
            self._object(name, description[name])
        for name in SCALARS.keys() & description.keys():
            if not isinstance(description[name], SCALARS[name]):
                raise _damaged_entry(self.url, name, f"it is {type(description[name]).__name__}")
        return description

    @cached_property
    def design(self) -> Design:
        """Conditions, batches and groups; the cells of a group are consecutive rows in packed order."""
        made = Design.from_json(self._json_fact("design"))
        pointers = self.storage.node(f"X/{keys.INDPTR}")
        if pointers is None or list(pointers.get("shape", ())) != [made.own_cells + 1]:
            msg = f"{self.url}: the design is of {made.n_cells} cells and X is not; the store is damaged"
            raise StoreError(msg)
        return made

    @property
    def conditions(self) -> tuple[str, ...]:
        """Names of the conditions, the control first."""
        return self.design.conditions

    @property
    def control(self) -> str:
        """Name of the control condition."""
        return self.design.control

    @cached_property
    def layers(self) -> tuple[str, ...]:
        """Names of the stored layers."""
        return tuple(str(name) for name in self._fact("layers"))

    @property
    def last_read(self) -> Reads:
        """Counts of what the last query read from the store: requests, bytes and chunks."""
        return getattr(self, "_last_read", Reads())

    def ite(
        self,
        cells: Cells = None,
        genes: Sequence[str] | None = None,
        *,
        cohort: Cohort | None = None,
        order: Order = "input",
        drop_undefined: bool = True,
    ) -> anndata.AnnData:
        """Return individual treatment effects: own condition minus control (METHOD section 6).

        Parameters
        ----------
        drop_undefined
            Leave out control cells, which have no treatment effect; otherwise their rows are NaN.
        """
        return self.layer(keys.LAYER_ITE, cells, genes, cohort=cohort, order=order, drop_undefined=drop_undefined)

    def denoised(
        self,
        cells: Cells = None,
        genes: Sequence[str] | None = None,
        *,
        cohort: Cohort | None = None,
        order: Order = "input",
    ) -> anndata.AnnData:
        """Return denoised expression, a cell's expected expression over its condition's batches (METHOD section 6)."""
        return self.layer(keys.LAYER_DENOISED, cells, genes, cohort=cohort, order=order)

    def batch_effect(
        self,
        cells: Cells = None,
        genes: Sequence[str] | None = None,
        *,
        cohort: Cohort | None = None,
        order: Order = "input",
    ) -> anndata.AnnData:
        """Return the removed batch effect, which also holds the cell's own noise (METHOD section 6)."""
        return self.layer(keys.LAYER_BATCH_EFFECT, cells, genes, cohort=cohort, order=order)

    @counted
    def layer(
        self,
        name: str,
        cells: Cells = None,
        genes: Sequence[str] | None = None,
        *,
        cohort: Cohort | None = None,
        order: Order = "input",
        drop_undefined: bool = False,
        room: Room | None = None,
    ) -> anndata.AnnData:
        """Return a part of a layer as an AnnData: `X` (cells, genes) float32, with `obs` and `var`.

        A stored layer is read, any other is computed.

        Parameters
        ----------
        name
            `denoised`, `batch_effect` or `ite`.
        drop_undefined
            Of `ite`, leave out control cells; otherwise their rows are NaN.
        room
            Allocates the array for the values, given its shape, for example a `numpy.memmap`; by default in memory.
        """
        if name not in keys.LAYERS:
            msg = f"there is no layer {name!r}; there are {listing(keys.LAYERS)}.{suggest(name, keys.LAYERS)}"
            raise QueryError(msg)
        rows = self._rows(cells, order)
        if drop_undefined and name == keys.LAYER_ITE:
            rows = self._with_effect(rows)
        if cohort is not None or name not in self.layers:
            return self._computed(layer_question(name, self._keep_bits), rows, genes, cohort, room)
        columns = self._columns(genes)
        out = room((len(rows), len(columns))) if room else None
        values = read_dense(self.storage, f"layers/{name}", rows, columns, out=out)
        return self._part(values, rows, self._genes.iloc[columns])

    @counted
    def effect(
        self,
        condition: str,
        cells: Cells = None,
        genes: Sequence[str] | None = None,
        *,
        baseline: str | None = None,
        cohort: Cohort | None = None,
        order: Order = "input",
        room: Room | None = None,
    ) -> anndata.AnnData:
        """Return the effect of a condition on any cells, controls included (METHOD sections 6 and 8).

        It is a cell's expected expression under the condition minus that under the baseline. For cells of the condition
        and the control as baseline, it equals `ite` before its rounding by `effects.keep_bits`.

        Parameters
        ----------
        baseline
            The condition to compare with; by default the control.
        room
            Allocates the array for the values, given its shape; by default in memory.

        Raises
        ------
        StoreError
            Matches of the cells' groups in groups of one of the conditions are missing.
        """
        codes = self.design.condition_code(condition), self.design.condition_code(baseline or self.control)
        return self._computed(effect_question(*codes), self._rows(cells, order), genes, cohort, room)

    @counted
    def counterfactual(
        self,
        condition: str,
        cells: Cells = None,
        genes: Sequence[str] | None = None,
        *,
        cohort: Cohort | None = None,
        order: Order = "input",
        room: Room | None = None,
    ) -> anndata.AnnData:
        """Return the expected expression of any cells under a condition (METHOD section 6).

        For cells of that condition, and as many neighbours for effects as for `denoised`, it equals `denoised`.

        Parameters
        ----------
        room
            Allocates the array for the values, given its shape; by default in memory.

        Raises
        ------
        StoreError
            Matches of the cells' groups in groups of the condition are missing.
        """
        question = counterfactual_question(self.design.condition_code(condition))
        return self._computed(question, self._rows(cells, order), genes, cohort, room)

    @counted
    def expression(
        self,
        cells: Cells = None,
        genes: Sequence[str] | None = None,
        *,
        cohort: Cohort | None = None,
        order: Order = "input",
    ) -> anndata.AnnData:
        """Return the log-normalised input expression: `X` (cells, genes) CSR float32."""
        rows = self._rows(cells, order)
        expression, table = (self._own_expression, self._genes) if cohort is None else self._expression(cohort)
        columns = self._columns(genes, table)
        wanted, back = np.unique(rows, return_inverse=True)
        return self._part(expression.read(wanted, columns)[back], rows, table.iloc[columns])

    def lazy(
        self,
        cells: Cells = None,
        genes: Sequence[str] | None = None,
        *,
        effects: Sequence[str] = (),
        counterfactuals: Sequence[str] = (),
        cohort: Cohort | None = None,
        order: Order = "packed",
    ) -> anndata.AnnData:
        """Return an AnnData of dask arrays, whose blocks are read or computed on demand.

        It can be used out of core by scanpy, anndata and dask. In packed order, the default, its blocks are those of
        the store.

        Parameters
        ----------
        effects, counterfactuals
            Conditions whose effect or expected expression is added as a layer: `effect_NAME`, `counterfactual_NAME`.

        Returns
        -------
        `X`, the layers `denoised`, `batch_effect` and `ite` (NaN for control cells), stored or not, and the coordinates
        in `obsm`. Computing a block whose matches are missing raises `StoreError`.
        """
        from ndreamer_dist.results import lazy

        rows = self._rows(cells, order)
        expression, table = self._expression(cohort)
        columns = self._columns(genes, table)
        token = lazy.token_of(self.url, str(self._fact("key")), rows, columns, cohort is None)
        block_rows = int(open_array(self.storage, f"obsm/{self.embedding_key}").chunks[0])
        conditional = lazy.conditional_questions(effects, counterfactuals, self.design.condition_code)
        return lazy.lazy_anndata(
            self, (self._cells.iloc[rows].copy(), table.iloc[columns].copy()),
            lazy.LazyParts(rows, columns, block_rows, token), expression, stored=cohort is None,
            questions={name: layer_question(name, self._keep_bits) for name in keys.LAYERS} | conditional,
        )  # fmt: skip

    def open_cohort(self, cohort: Cohort) -> GivenExpression:
        """Open and check the input cohort once; pass the result as `cohort` to other methods.

        Raises
        ------
        CohortError
            It is not the input of these results.
        """
        return given_expression(cohort, self.uns, self._cells)

    @counted
    def matches(self, cell: str) -> pd.DataFrame:
        """Return the counterparts of a cell: its nearest neighbours in every matched group (METHOD section 6).

        The cell's expected expression under a condition is the sum, over the counterparts in a group, of `weight` times
        their expression, averaged over the groups of the condition.

        Returns
        -------
        table
            One row per counterpart, with the columns

            - `cell`, `batch`, `condition`, `group`: its name and origin;
            - `neighbour`: 1 for the nearest in its group, 2 for the next, ...; 0 for the cell itself;
            - `distance`: distance in the matching space;
            - `weight`: weight in the mean of its group; in a sample of the groups, times the number of groups that its
              group stands for. In its own group a cell is its own counterpart, and its nearest other cells have weight
              0.

        Raises
        ------
        StoreError
            results.zarr does not hold the matches (it only holds nearest neighbours, and not in large cohorts), and
            there is no matches.zarr beside it.
        """
        (row,) = places_of_cells(self._cells.index, [cell])
        return matches_table(self.counterparts, self._all_cells.index, int(row) + self.design.first_row)

    @cached_property
    def space(self) -> str:
        """Name of the matching space: `ndreamer`, `pca`, `harmony`, ... (METHOD section 9)."""
        return str(self._fact_or(keys.UNS_EMBEDDING, keys.NDREAMER))

    @cached_property
    def embedding_key(self) -> str:
        """Name of the array in `obsm` with the coordinates of the matching space."""
        name = str(self._fact_or(keys.UNS_EMBEDDING_KEY, keys.OBSM_PCA))
        if name not in keys.SPACES.values():
            raise _damaged_entry(self.url, keys.UNS_EMBEDDING_KEY, f"it is {quoted(name)}")
        return name

    @counted
    def embedding(self, cells: Cells = None, *, pca: bool = False, order: Order = "input") -> pd.DataFrame:
        """Return coordinates of cells: one row per cell, indexed by name.

        Parameters
        ----------
        pca
            Only matters in the space `ndreamer`: False returns the trained effect modifier (`X_ndreamer`), True its
            principal components, in which cells were matched. In other spaces, the coordinates of the matching space
            are returned.
        """
        rows = self._rows(cells, order)
        whole = self.space == keys.NDREAMER and not pca
        name = keys.OBSM_MU if whole else self.embedding_key
        width = open_array(self.storage, f"obsm/{name}").shape[1]
        values = read_dense(self.storage, f"obsm/{name}", rows, np.arange(width))
        return pd.DataFrame(values, index=self._cells.index[rows])

    def add_embedding(self, adata: anndata.AnnData) -> None:
        """Add the coordinates of the matching space to a part of these results, as `obsm[results.embedding_key]`."""
        adata.obsm[self.embedding_key] = self.embedding(list(adata.obs_names), pca=True).to_numpy()

    def labelled(self, by: PopulationLabels) -> tuple[Self, str | None]:
        """Return results whose `obs` has a Series of labels as a column, and the name of the column.

        Nothing is stored. If `by` is the name of a column or `None`, these results and `by` are returned.

        Raises
        ------
        QueryError
            The Series names no cell of these results, or a cell twice; or `by` is neither a name nor labels by cell.
        """
        labels = population_labels(by)
        if not isinstance(labels, pd.Series):
            return self, labels
        table, _ = annotation_of(labels, self._cells, self.design)
        other = copy(self)
        for name in ("_cells", "_input_cells", "_all_cells"):
            other.__dict__.pop(name, None)
        before = pd.DataFrame(index=self._cells.index) if self.labels is None else self.labels
        joined = pd.concat([before.drop(columns=table.columns, errors="ignore"), table], axis=1)
        object.__setattr__(other, "labels", joined)
        return other, str(labels.name)

    # --- implementation ----------------------------------------------------------------------------------------------

    def refuse_damaged(self) -> None:
        """Read the tables that all queries need; raise `StoreError` if one is damaged."""
        _ = self.counterparts, self._cells, self._genes

    @cached_property
    def _cells(self) -> pd.DataFrame:
        """`obs` in packed order, with the annotations."""
        stored, by_others = read_cells(self.storage)
        if by_others:
            _refuse_other_cells(stored, self.design, self.url)
        for later in (read_annotations(self.storage, stored.index), self.labels):
            if later is not None and len(later.columns):
                stored = pd.concat([stored.drop(columns=later.columns, errors="ignore"), later], axis=1)
        return stored

    @cached_property
    def _input_cells(self) -> pd.DataFrame:
        """`obs` in input order; cached, so that its index is checked for duplicates only once."""
        return self._cells.iloc[self._input_order]

    @cached_property
    def _genes(self) -> pd.DataFrame:
        return read_element(self.storage, "var")

    @cached_property
    def _input_order(self) -> np.ndarray:
        """Packed rows in input order."""
        return np.argsort(self._cells[keys.OBS_INPUT_ROW].to_numpy(), kind="stable")

    @cached_property
    def _pointers(self) -> np.ndarray:
        """`indptr` of `X`, (cells + 1,) int64."""
        name = f"X/{keys.INDPTR}"
        array = open_array(self.storage, name)
        pointers = np.array([1])
        if array.shape == (len(self._cells) + 1,) and array.dtype.kind in "iu":
            pointers = read_array(self.storage, name, opened=array).astype(np.int64)
        if pointers[0] != 0 or (np.diff(pointers) < 0).any():
            msg = f"{self.url}: array '{name}' does not fit the {len(self._cells)} cells; it is damaged"
            raise StoreError(msg)
        return pointers

    def _fact(self, name: str) -> Any:
        """Read one entry of `uns["ndreamer"]`."""
        return read_element(self.storage, f"uns/{keys.UNS}/{name}")

    def _fact_or(self, name: str, default: str) -> Any:
        """Read one entry of `uns["ndreamer"]`; the default if an earlier version did not write it."""
        return self._fact(name) if self.storage.node(f"uns/{keys.UNS}/{name}") is not None else default

    def _json_fact(self, name: str) -> dict[str, Any]:
        """Read an entry of `uns["ndreamer"]` that is a JSON object."""
        return self._object(name, self._fact(name))

    def _object(self, name: str, text: Any) -> dict[str, Any]:
        """Parse an entry that is a JSON object; raise `StoreError` if it is damaged."""
        try:
            return {key: OBJECTS[name](value) for key, value in dict(json.loads(text)).items()}
        except (ValueError, TypeError, RecursionError) as error:
            raise _damaged_entry(self.url, name, f"{type(error).__name__}: {error}") from error

    @cached_property
    def matched_inside(self) -> Inside | None:
        """The labels inside which cells were matched (`match.within`) and the share of such matches; `None` without."""
        return Inside.read(self._fact_or(keys.UNS_WITHIN, "null"), self.url)

    @cached_property
    def _keep_bits(self) -> int | None:
        """Number of bits of the mantissa that layers keep (`effects.keep_bits`); `None` for all."""
        return self._json_fact("settings").get("effects", {}).get("keep_bits")

    def _part(self, values: Any, rows: np.ndarray, genes: pd.DataFrame) -> anndata.AnnData:
        obs = self._input_cells if rows is self._input_order else self._cells.iloc[rows]
        return anndata.AnnData(X=values, obs=obs.copy(), var=genes.copy())

    @cached_property
    def counterparts(self) -> Counterparts:
        """The matches behind the effects."""
        stored = None if self.stored is None else self.stored.counterparts
        found = counterparts_of(self.storage, self.design, self._json_fact("settings"), stored)
        # Missing matches are searched on demand for mapped cells (`match` cannot add any), for a screen (there would be
        # too many) and for results without a matches.zarr, such as those of all genes.
        if stored is None and not self.design.is_screen and found.searched is not None:
            return found
        return replace(found, search=found.between(self.embedding_key))

    @cached_property
    def stored(self) -> Self | None:
        """For cells that were mapped onto a finished run: the results of that run; otherwise `None`."""
        return None if self.mapped is None else type(self)(self.mapped.found(self.storage, results_storage))

    @property
    def mapped(self) -> Onto | None:
        """For cells that were mapped with `nd.map`: the run and how far the cells are from it; otherwise `None`."""
        return Onto.read(self._fact_or(keys.UNS_ONTO, "null"), self.url)

    @cached_property
    def _all_cells(self) -> pd.DataFrame:
        """`obs` of all cells in packed order: those of the run that cells are mapped onto, if any, then these."""
        return self._cells if self.stored is None else pd.concat([self.stored._all_cells, self._cells])

    @property
    def _own_expression(self) -> StoredExpression:
        return StoredExpression(self.storage, self._pointers, len(self._genes))

    def _expression(self, cohort: Cohort | None) -> tuple[Expression, pd.DataFrame]:
        """Return the expression for computed layers, and the table of its genes."""
        if cohort is None:
            if self.stored is None:
                return self._own_expression, self._genes
            before, _ = self.stored._expression(None)
            return JoinedExpression(before, self._own_expression, self.design.first_row), self._genes
        if self.stored is not None:
            msg = f"{self.url}: only modelled genes can be computed for mapped cells; leave out `cohort`"
            raise QueryError(msg)
        opened = self.open_cohort(cohort)
        table = opened.source.var.copy()
        table.index = pd.Index(opened.source.gene_names, name=table.index.name)
        return opened, table

    def _computed(
        self,
        question: Question,
        rows: np.ndarray,
        genes: Sequence[str] | None,
        cohort: Cohort | None,
        room: Room | None,
    ) -> anndata.AnnData:
        """Answer a question through the matches."""
        expression, table = self._expression(cohort)
        columns = self._columns(genes, table)
        out = room((len(rows), len(columns))) if room else None
        values = compute(question, self.counterparts, expression, rows + self.design.first_row, columns, out=out)
        return self._part(values, rows, table.iloc[columns])

    def _rows(self, cells: Cells, order: Order) -> np.ndarray:
        """Return the packed rows of a selection of cells, in the requested order: (rows,) int64."""
        if order not in ("input", "packed"):
            msg = f"order is 'input' or 'packed', found {order!r}"
            raise QueryError(msg)
        if cells is None:
            chosen = self._input_order
        elif isinstance(cells, str):
            chosen = self._input_order[cells_of_query(self._cells, cells)[self._input_order]]
        else:
            chosen = self._listed(cells)
        if not len(chosen):
            msg = "no cell is selected"
            if isinstance(cells, str):
                msg += f" by {cells!r}.{near_value(self._cells, cells)}"
            raise QueryError(msg)
        return np.sort(chosen) if order == "packed" else chosen

    def _listed(self, cells: Any) -> np.ndarray:
        """Return the packed rows of a mask, or of a list of names.

        A mask is in input order, unless it is a Series that names all cells: then it may be in any order.
        """
        if isinstance(cells, pd.Series) and pd.api.types.is_bool_dtype(cells.dtype):
            named = len(cells) == len(self._cells) and cells.index.isin(self._cells.index).all()
            cells = (cells.reindex(self._input_cells.index) if named else cells).fillna(value=False).astype(bool)
        values = np.asarray(cells)
        if values.dtype == bool:
            if values.shape != (len(self._cells),):
                msg = f"a mask over the cells needs shape ({len(self._cells)},), found {values.shape}"
                raise QueryError(msg)
            return self._input_order[values]
        return places_of_cells(self._cells.index, values.tolist())

    def _columns(self, genes: Sequence[str] | None, among: pd.DataFrame | None = None) -> np.ndarray:
        """Return the positions of genes in a table, by default that of the modelled genes."""
        table = self._genes if among is None else among
        if genes is None:
            return np.arange(len(table))
        chosen = places_of_genes(table, [genes] if isinstance(genes, str) else list(genes))
        if not len(chosen):
            msg = "no gene is selected"
            raise QueryError(msg)
        return chosen

    def _with_effect(self, rows: np.ndarray) -> np.ndarray:
        """Return the rows that are not control cells; raise `QueryError` if there are none."""
        treated = self.design.group_conditions[self.design.group_of(rows + self.design.first_row)] != 0
        if not treated.any():
            msg = (
                f"all {len(rows)} selected cells are {self.control!r}, the control, and have no treatment effect; "
                "select cells of another condition"
            )
            raise QueryError(msg)
        return rows[treated]


def _damaged_entry(url: str, name: str, why: str) -> StoreError:
    return StoreError(f"{url}: the entry {name!r} of uns['{keys.UNS}'] is damaged ({why})")


def _refuse_other_cells(stored: pd.DataFrame, design: Design, url: str) -> None:
    """Raise `StoreError` if another program wrote `obs` with other cells or in another order."""
    names = np.array([group.name for group in design.own_groups], dtype=object)
    expected = np.repeat(names, [group.cells for group in design.own_groups])
    if not np.array_equal(stored.get(keys.OBS_GROUP, pd.Series(dtype=object)).astype(str), expected):
        msg = (
            f"{url}: another program wrote obs, of other cells or in another order; `ndreamer-dist check DIR "
            "--mend` removes it, and the run's own command makes it again"
        )
        raise StoreError(msg)
