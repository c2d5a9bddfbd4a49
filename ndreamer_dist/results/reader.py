"""Read results.zarr in pieces, by name: cells by a query on `obs`, genes by name.

Only the chunks that hold the answer are read, from a disk or an object store. Input and output are names. Cells are in
the order of the input cohort unless packed order is requested. A chunk that is missing or fails its checksum is an error
that names it, never a wrong number.
"""

from __future__ import annotations

import json
import logging
import os
import re
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
from ndreamer_dist.results.names import SUGGEST_AMONG, cells_of_query, places_of_cells, places_of_genes
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
"""Populations: the name of a column of `obs`, a label per cell by name (a Series, or a table of one column), or none for all
cells together."""
Room = Callable[[tuple[int, int]], np.ndarray]

REQUIRED = {"design", "key", "seed", "settings", "version", "versions"}
"""What every `uns["ndreamer"]` tells."""
OBJECTS: dict[str, Callable[[Any], Any]] = {
    "settings": dict, "versions": str, "dropped": int, "effective_controls": float, "design": lambda value: value, "input": lambda value: value,
}  # fmt: skip
"""Entries of it that are objects in JSON, and what the values of these are."""
SCALARS: dict[str, type] = {
    "seed": Integral, "key": str, "version": str, "normalise": str, keys.UNS_EMBEDDING: str, keys.UNS_EMBEDDING_KEY: str,
}  # fmt: skip
"""Entries of it that are plain."""


def results_storage(address: str | os.PathLike[str] | Storage, embedding: str | None = None) -> ConsolidatedStorage:
    """Return the storage of a run's results.

    Parameters
    ----------
    address
        A run directory, a results.zarr, or the URL of either (`s3://`, `https://`, ...).
    embedding
        The matching space whose results are wanted, where a run directory holds several: `harmony`, say. By default
        those of the space that the run was begun with.

    Raises
    ------
    StoreError
        There are no results, or none of that space, or the run that makes them has not finished.
    """
    folder = open_storage(address)
    if embedding is not None:
        folder = _of_space(folder, embedding)
    for url in (folder.url, (folder / keys.RESULTS).url):
        storage = ConsolidatedStorage(url)
        if (storage.root_metadata or {}).get("attributes", {}).get("encoding-type") == "anndata":
            return storage
    if any(folder.exists(name) for name in (keys.RUN_JSON, keys.RESULTS, "X")):
        msg = f"the run in {folder.url} has not finished; give the same `run` command again and it goes on"
        raise StoreError(msg)
    msg = f"{folder.url} holds no results: expected a run directory or a results.zarr"
    raise StoreError(msg)


def _of_space(folder: Storage, method: str) -> Storage:
    """Return where the results of a matching space are."""
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
    """A copy of `obs` that says so where a column is put into it; what is made of it is an ordinary table."""

    @property
    def _constructor(self) -> type[pd.DataFrame]:
        return pd.DataFrame

    def __setitem__(self, key: Any, value: Any) -> None:
        logger.warning(
            "column %s is in this copy of obs alone; results.annotate(series) keeps it, and `by` takes a Series", key
        )
        super().__setitem__(key, value)


@dataclass(frozen=True)
class ResultsReader:
    """The results of a run, read in pieces; `stats.results.Results` adds the statistics.

    In every method that takes them:

    - `cells` is a pandas query on `obs` (`'cell_type == "Microglia"'`), a list of cell names (which then come in that
      order), a Boolean mask over `obs`, or none for all cells;
    - `genes` is a list of gene names, which come in that order, or none for all modelled genes;
    - `cohort`, the input cohort (an AnnData, a path or a URL), lets `genes` name any of its genes, or none for all;
      `open_cohort` opens and checks one for many questions;
    - `order` is `"input"`, the input cohort's, or `"packed"`, the store's (by group). Dropped cells are in neither.

    A layer that is not stored, and everything of a cohort given, is computed through the matches, with the same bits:
    `StoreError` says where the matches must be added first. `QueryError` is raised where a name is unknown or no cell
    is selected, `StoreError` where a chunk is damaged, `CohortError` where a cohort is not the one of these results.
    """

    storage: ConsolidatedStorage
    labels: pd.DataFrame | None = field(default=None, repr=False, compare=False)
    """Columns by cell that take part as those of `obs` do, for this process alone; see `labelled`."""

    def __repr__(self) -> str:
        """Return what the results are of, for a notebook."""
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
        """The store's address."""
        return self.storage.url

    @property
    def obs(self) -> pd.DataFrame:
        """The cells' table, in input order: the input's columns and ours, which start with `ndreamer_`.

        It is a copy: `Results.annotate` keeps a column.
        """
        return CellsTable(self._input_cells)

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
        told = self._table("uns").get(keys.UNS)
        if not isinstance(told, dict) or not told.keys() >= REQUIRED:
            msg = f"{self.url}: uns['{keys.UNS}'] does not say what made the results; it is damaged, or not of this package"
            raise StoreError(msg)
        for name in OBJECTS.keys() & told.keys():
            self._object(name, told[name])
        for name in SCALARS.keys() & told.keys():
            if not isinstance(told[name], SCALARS[name]):
                msg = f"{self.url}: what it tells of its {name} is damaged (it is {type(told[name]).__name__})"
                raise StoreError(msg)
        return told

    @cached_property
    def design(self) -> Design:
        """Conditions, batches and groups; groups own contiguous rows of the packed order."""
        made = Design.from_json(self._told("design"))
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
        """What the last query read of the store: bytes, requests, chunks, and bytes of what it touched."""
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
        """Return individual treatment effects, own condition minus control (METHOD section 6).

        Parameters
        ----------
        drop_undefined
            Leave out control cells, which have no effect of a treatment; otherwise their rows are NaN.
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
        """Return denoised expression: each cell's expected expression over its condition's batches (section 6)."""
        return self.layer(keys.LAYER_DENOISED, cells, genes, cohort=cohort, order=order)

    def batch_effect(
        self,
        cells: Cells = None,
        genes: Sequence[str] | None = None,
        *,
        cohort: Cohort | None = None,
        order: Order = "input",
    ) -> anndata.AnnData:
        """Return the batch effect that was removed, and with it the cell's own noise (METHOD section 6)."""
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
        """Return a part of a layer: `X` (cells, genes) float32, with the tables' rows that belong to it.

        It is read where it is stored, else computed.

        Parameters
        ----------
        room
            Makes the array that what is read goes into, by its shape: a `numpy.memmap` for what memory cannot hold.
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
        """Return the effect of a condition on any cells, controls included (METHOD section 6 and 8).

        It is the expected expression of cells like each under the condition, minus that under the baseline. On cells of
        the condition, with the control as baseline, it is the `ite`.

        Parameters
        ----------
        baseline
            The condition to compare with; by default the control.
        room
            Makes the array that the values go to; by default memory.

        Raises
        ------
        StoreError
            The matches between the cells' groups and those of either condition have not been searched.
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
        """Return the expected expression of cells like each under a condition (METHOD section 6).

        On cells of that condition it is `denoised`.

        Parameters
        ----------
        room
            Makes the array that the values go to; by default memory.

        Raises
        ------
        StoreError
            The matches between the cells' groups and the condition's have not been searched.
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
        """Return the log-normalised expression that went in: `X` (cells, genes) CSR float32."""
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
        """Return an AnnData of dask arrays: `X`, all layers and the embedding, read by blocks when they are wanted.

        scanpy, anndata and dask go on with it out of core. Blocks are the store's in packed order, which is the default.

        Parameters
        ----------
        effects, counterfactuals
            Conditions whose effect, and expected expression, are layers as well: `effect_NAME`, `counterfactual_NAME`.

        Returns
        -------
        Layers `denoised`, `batch_effect` and `ite` (NaN on control cells) besides, stored or not. A block that cannot be
        computed, for want of its matches, raises `StoreError` when it is wanted.
        """
        from ndreamer_dist.results import lazy

        rows = self._rows(cells, order)
        expression, table = self._expression(cohort)
        columns = self._columns(genes, table)
        token = lazy.token_of(self.url, str(self._fact("key")), rows, columns, cohort is None)
        block_rows = int(open_array(self.storage, f"obsm/{self.embedding_key}").chunks[0])
        asked = lazy.conditional_questions(effects, counterfactuals, self.design.condition_code)
        return lazy.lazy_anndata(
            self, (self._cells.iloc[rows].copy(), table.iloc[columns].copy()),
            lazy.LazyParts(rows, columns, block_rows, token), expression, stored=cohort is None,
            questions={name: layer_question(name, self._keep_bits) for name in keys.LAYERS} | asked,
        )  # fmt: skip

    def open_cohort(self, cohort: Cohort) -> GivenExpression:
        """Open and check the input cohort once, to be given as `cohort` in many questions.

        Raises
        ------
        CohortError
            It is not the cohort that these results were made from.
        """
        return given_expression(cohort, self.uns, self._cells)

    @counted
    def matches(self, cell: str) -> pd.DataFrame:
        """Return the counterparts of a cell in every group that it was matched with, by name (METHOD section 6).

        The expected expression under a condition is the mean, over the condition's groups, of the sum of `weight` times
        the counterpart's expression.

        Returns
        -------
        A row per counterpart: `cell`, its name; `batch`, `condition` and `group`, where it is from; `neighbour`, 1 for
        the nearest in its group, 0 for the cell itself; `distance` in the embedding's principal components; `weight` in
        its group's mean, in a sample of the groups times how many it stands for. In its own group a cell is its own
        counterpart, and its nearest other cells have weight 0.

        Raises
        ------
        StoreError
            More than one neighbour is averaged, or results.zarr holds none, and there is no matches.zarr beside it.
        """
        (row,) = places_of_cells(self._cells.index, [cell])
        return matches_table(self.counterparts, self._all_cells.index, int(row) + self.design.first_row)

    @cached_property
    def space(self) -> str:
        """Name of the space that cells were matched in: `ndreamer`, `pca`, `harmony`, ... (METHOD section 9)."""
        return str(self._fact_or(keys.UNS_EMBEDDING, keys.NDREAMER))

    @cached_property
    def embedding_key(self) -> str:
        """Name of the array in `obsm` that holds the coordinates cells were matched in."""
        name = str(self._fact_or(keys.UNS_EMBEDDING_KEY, keys.OBSM_PCA))
        if name not in keys.SPACES.values():
            msg = f"{self.url}: what it tells of its {keys.UNS_EMBEDDING_KEY} is damaged (it is {quoted(name)})"
            raise StoreError(msg)
        return name

    @counted
    def embedding(self, cells: Cells = None, *, pca: bool = False, order: Order = "input") -> pd.DataFrame:
        """Return coordinates of cells: one row a cell, by name.

        They are those that cells were matched in; where these are principal components of the trained effect modifier,
        they come with `pca`, and the effect modifier itself without it.
        """
        rows = self._rows(cells, order)
        whole = self.space == keys.NDREAMER and not pca
        name = keys.OBSM_MU if whole else self.embedding_key
        width = open_array(self.storage, f"obsm/{name}").shape[1]
        values = read_dense(self.storage, f"obsm/{name}", rows, np.arange(width))
        return pd.DataFrame(values, index=self._cells.index[rows])

    def add_embedding(self, adata: anndata.AnnData) -> None:
        """Add the coordinates cells were matched in to a part of these results, as `obsm[results.embedding_key]`."""
        adata.obsm[self.embedding_key] = self.embedding(list(adata.obs_names), pca=True).to_numpy()

    def labelled(self, by: PopulationLabels) -> tuple[Self, str | None]:
        """Return the results with a Series of labels among the columns of `obs`, and the column's name.

        Nothing is stored. The name of a column, or none, comes back with these results themselves.

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
        kept = pd.concat([before.drop(columns=table.columns, errors="ignore"), table], axis=1)
        object.__setattr__(other, "labels", kept)
        return other, str(labels.name)

    # --- what is behind them -----------------------------------------------------------------------------------------

    def refuse_damaged(self) -> None:
        """Read the tables that every question rests on, before anything is made of them; `StoreError` where one is damaged."""
        _ = self.counterparts, self._cells, self._genes

    @cached_property
    def _cells(self) -> pd.DataFrame:
        """`obs` in packed order, with what was annotated after the run."""
        stored, by_others = read_cells(self.storage)
        if by_others:
            _refuse_other_cells(stored, self.design, self.url)
        for later in (read_annotations(self.storage, stored.index), self.labels):
            if later is not None and len(later.columns):
                stored = pd.concat([stored.drop(columns=later.columns, errors="ignore"), later], axis=1)
        return stored

    @cached_property
    def _input_cells(self) -> pd.DataFrame:
        """`obs` in input order, kept: its index then knows that its names differ."""
        return self._cells.iloc[self._input_order]

    @cached_property
    def _genes(self) -> pd.DataFrame:
        return self._table("var")

    @cached_property
    def _input_order(self) -> np.ndarray:
        """Packed rows in input order."""
        return np.argsort(self._cells[keys.OBS_INPUT_ROW].to_numpy(), kind="stable")

    @cached_property
    def _pointers(self) -> np.ndarray:
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
        """Return one entry of `uns["ndreamer"]`, without reading the others."""
        return self._table(f"uns/{keys.UNS}/{name}")

    def _fact_or(self, name: str, default: str) -> Any:
        """Return one entry of `uns["ndreamer"]`, or what stands for it in results of a version that wrote none."""
        return self._fact(name) if self.storage.node(f"uns/{keys.UNS}/{name}") is not None else default

    def _told(self, name: str) -> dict[str, Any]:
        """Return an entry of `uns["ndreamer"]` that is an object in JSON."""
        return self._object(name, self._fact(name))

    def _object(self, name: str, text: Any) -> dict[str, Any]:
        try:
            found = dict(json.loads(text))
            return {key: OBJECTS[name](value) for key, value in found.items()}
        except (ValueError, TypeError, RecursionError) as error:
            msg = f"{self.url}: what it tells of its {name} is damaged ({type(error).__name__}: {error})"
            raise StoreError(msg) from error

    @cached_property
    def matched_inside(self) -> Inside | None:
        """The labels that cells were matched inside (`match.within`), and how many matches are; none without."""
        return Inside.read(self._fact_or(keys.UNS_WITHIN, "null"), self.url)

    @cached_property
    def _keep_bits(self) -> int | None:
        """Bits of the layers' mantissa that were kept; none for all."""
        return self._told("settings").get("effects", {}).get("keep_bits")

    def _table(self, name: str) -> Any:
        return read_element(self.storage, name)

    def _part(self, values: Any, rows: np.ndarray, genes: pd.DataFrame) -> anndata.AnnData:
        obs = self._input_cells if rows is self._input_order else self._cells.iloc[rows]
        return anndata.AnnData(X=values, obs=obs.copy(), var=genes.copy())

    @cached_property
    def counterparts(self) -> Counterparts:
        """The matches behind the effects."""
        stored = None if self.stored is None else self.stored.counterparts
        found = counterparts_of(self.storage, self.design, self._told("settings"), stored)
        # To mapped cells no matches are added later, those of a screen would be too many, and results apart from their run
        # (of all genes, say) have but the nearest ones: what is missing is searched when it is asked for.
        if stored is None and not self.design.is_screen and found.searched is not None:
            return found
        return replace(found, search=found.between(self.embedding_key))

    @cached_property
    def stored(self) -> Self | None:
        """Of cells that were mapped onto a finished run: the results of that run; none of a run's own."""
        return None if self.mapped is None else type(self)(self.mapped.found(self.storage, results_storage))

    @property
    def mapped(self) -> Onto | None:
        """Of cells that were mapped onto a finished run: which, and how far they are from it (`nd.map`)."""
        return Onto.read(self._fact_or(keys.UNS_ONTO, "null"), self.url)

    @cached_property
    def _all_cells(self) -> pd.DataFrame:
        """`obs` of all cells that statistics are of, those of a run that these are mapped onto first."""
        return self._cells if self.stored is None else pd.concat([self.stored._all_cells, self._cells])

    @property
    def _own_expression(self) -> StoredExpression:
        return StoredExpression(self.storage, self._pointers, len(self._genes))

    def _expression(self, cohort: Cohort | None) -> tuple[Expression, pd.DataFrame]:
        """Return the expression to compute with, and the table of its genes."""
        if cohort is None:
            if self.stored is None:
                return self._own_expression, self._genes
            before, _ = self.stored._expression(None)
            return JoinedExpression(before, self._own_expression, self.design.first_row), self._genes
        if self.stored is not None:
            msg = f"{self.url}: cells mapped onto a run are answered for the modelled genes alone; leave out the cohort"
            raise QueryError(msg)
        given = self.open_cohort(cohort)
        table = given.source.var.copy()
        table.index = pd.Index(given.source.gene_names, name=table.index.name)
        return given, table

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
        """Return the packed rows that a selection means, in the order asked for: (rows,) int64."""
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
                msg += f" by {cells!r}.{self._near_value(cells)}"
            raise QueryError(msg)
        return np.sort(chosen) if order == "packed" else chosen

    def _near_value(self, query: str) -> str:
        """Return what value of a column was meant by a query that selects nothing; empty where none is near."""
        table = self._cells
        for column, value in re.findall(r"`?([\w ]+?)`?\s*==\s*[\"'](.+?)[\"']", query):
            levels = table[column].dropna().unique() if column in table else []
            if len(levels) <= SUGGEST_AMONG and value not in set(levels):
                return f" Column {column!r} has no {quoted(value)}.{suggest(value, map(str, levels))}"
        return ""

    def _listed(self, cells: Any) -> np.ndarray:
        values = np.asarray(cells)
        if values.dtype == bool:
            if values.shape != (len(self._cells),):
                msg = f"a mask over the cells needs shape ({len(self._cells)},), found {values.shape}"
                raise QueryError(msg)
            return self._input_order[values]
        return places_of_cells(self._cells.index, values.tolist())

    def _columns(self, genes: Sequence[str] | None, among: pd.DataFrame | None = None) -> np.ndarray:
        """Return where genes stand among the modelled ones, or others that are given."""
        table = self._genes if among is None else among
        if genes is None:
            return np.arange(len(table))
        chosen = places_of_genes(table, [genes] if isinstance(genes, str) else list(genes))
        if not len(chosen):
            msg = "no gene is selected"
            raise QueryError(msg)
        return chosen

    def _with_effect(self, rows: np.ndarray) -> np.ndarray:
        treated = self.design.group_conditions[self.design.group_of(rows + self.design.first_row)] != 0
        if not treated.any():
            msg = (
                f"all {len(rows)} selected cells are {self.control!r}, the control, and have no treatment effect; "
                "select cells of another condition"
            )
            raise QueryError(msg)
        return rows[treated]


def _refuse_other_cells(stored: pd.DataFrame, design: Design, url: str) -> None:
    """Refuse an `obs` that another program wrote for other cells, or in another order."""
    names = np.array([group.name for group in design.own_groups], dtype=object)
    expected = np.repeat(names, [group.cells for group in design.own_groups])
    if not np.array_equal(stored.get(keys.OBS_GROUP, pd.Series(dtype=object)).astype(str), expected):
        msg = (
            f"{url}: another program wrote obs, of other cells or in another order; `ndreamer-dist check DIR "
            "--mend` removes it, and the run's own command makes it again"
        )
        raise StoreError(msg)
