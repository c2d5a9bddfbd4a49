"""Reading results.zarr in pieces, by name: cells by a query on `obs`, genes by name.

Only the chunks that hold the answer are read, wherever the store lives. Names go in and come out; the cells' order is
the input cohort's unless packed order is asked for. A chunk that is missing or fails its checksum is an error that
names it, never a wrong number.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import anndata
import numpy as np
import pandas as pd
import zarr
from scipy import sparse

from ndreamer_dist import keys
from ndreamer_dist.cohort.design import Design
from ndreamer_dist.errors import QueryError, StoreError, listing, suggest
from ndreamer_dist.results.store import ROOT, memory_store
from ndreamer_dist.storage import Storage, open_array, open_storage, read_array, touched_shards

Order = Literal["input", "packed"]
Cells = str | Sequence[str] | np.ndarray | pd.Series | None

READ_BYTES = 128 * 2**20
"""Dense values decoded by one read; more rows are read in several."""
READ_ENTRIES = 2**24
"""Stored values of the sparse expression decoded by one read."""
GAP_ROWS = 256
"""Unwanted rows of the sparse expression that are read along rather than starting another read."""
CONCURRENT_READS = 16
"""Files of a table that are fetched at the same time."""
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
        return self._part(self._read_sparse(rows)[:, columns], rows, columns)

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

    def _read_sparse(self, rows: np.ndarray) -> sparse.csr_matrix:
        """Read rows of the expression: (rows, all genes) CSR float32."""
        pointers, wanted = self._pointers, np.unique(rows)
        parts = []
        for first, last in _stretches(wanted, pointers):
            low, high = int(pointers[first]), int(pointers[last])
            data, indices = (
                read_array(self.storage, f"X/{part}", slice(low, high)) if high > low else np.zeros(0, dtype)
                for part, dtype in ((keys.DATA, np.float32), (keys.INDICES, np.int32))
            )
            stretch = sparse.csr_matrix(
                (data, indices, pointers[first : last + 1] - low), shape=(last - first, len(self._genes))
            )
            parts.append(stretch[wanted[(wanted >= first) & (wanted < last)] - first])
        return sparse.vstack(parts, format="csr")[np.searchsorted(wanted, rows)]


def read_dense(storage: Storage, name: str, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Read rows and columns of a two-dimensional array, in the order given, from the chunks that hold them.

    Neighbouring chunks are read together, up to a bounded size.
    """
    array = open_array(storage, name)
    height, width = array.chunks
    values = np.empty((len(rows), len(columns)), dtype=array.dtype)
    order = np.argsort(rows, kind="stable")
    sorted_rows = rows[order]
    for left, right in _runs(columns // width):
        span = slice(left * width, min(right * width, array.shape[1]))
        inside = np.flatnonzero((columns >= span.start) & (columns < span.stop))
        tall = max(1, READ_BYTES // (height * (span.stop - span.start) * array.dtype.itemsize))
        for top, bottom in _runs(rows // height, longest=tall):
            part = slice(top * height, min(bottom * height, array.shape[0]))
            low, high = np.searchsorted(sorted_rows, [part.start, part.stop])
            block = read_array(storage, name, (part, span))
            here = order[low:high]
            values[np.ix_(here, inside)] = block[np.ix_(rows[here] - part.start, columns[inside] - span.start)]
    return values


def read_element(storage: Storage, name: str) -> Any:
    """Read `obs`, `var` or `uns` by anndata, from files that were checked to be all there.

    Raises
    ------
    StoreError
        A chunk is missing or fails its checksum; the message names array and chunk.
    """
    files = _metadata(storage, name)
    root = zarr.open_group(memory_store(files), mode="r", zarr_format=3)
    arrays = [member for _, member in root.members(max_depth=None) if isinstance(member, zarr.Array)]
    chunks = [
        (array.path, position, _chunk_file(array, position))
        for array in arrays
        for position in touched_shards(array, ...)
    ]
    with ThreadPoolExecutor(CONCURRENT_READS) as pool:
        files |= pool.map(lambda chunk: _read_chunk(storage, *chunk), chunks)
    root = zarr.open_group(memory_store(files), mode="r", zarr_format=3)
    try:
        return anndata.io.read_elem(root[name])
    except Exception as error:
        raise _named_damage(storage, name, root, error) from error


def _metadata(storage: Storage, name: str) -> dict[str, bytes]:
    """Return the metadata files of an element, which the store's root holds all of."""
    root = json.loads(storage.read(ROOT))
    nodes = root["consolidated_metadata"]["metadata"]
    found = {path: node for path, node in nodes.items() if path == name or path.startswith(f"{name}/")}
    if not found:
        msg = f"{storage.url} has no '{name}'; it is not a results.zarr"
        raise StoreError(msg)
    for node in found.values():
        node.pop("consolidated_metadata", None)  # an inner group's is empty, and would hide what it holds
    plain = {"zarr_format": 3, "node_type": "group", "attributes": {}}
    return {ROOT: json.dumps(plain).encode()} | {
        f"{path}/{ROOT}": json.dumps(node).encode() for path, node in found.items()
    }


def _chunk_file(array: zarr.Array[Any], position: tuple[int, ...]) -> str:
    return f"{array.path}/{array.metadata.encode_chunk_key(position)}"


def _read_chunk(storage: Storage, array: str, position: tuple[int, ...], file: str) -> tuple[str, bytes]:
    try:
        return file, storage.read(file)
    except StoreError:
        msg = f"{storage.url}: array '{array}', chunk {position} is missing; run the same command again to repair it"
        raise StoreError(msg) from None


def _named_damage(storage: Storage, name: str, root: zarr.Group, error: Exception) -> StoreError:
    """Find which chunk of an element is at fault by reading them one by one."""
    for _, member in root.members(max_depth=None):
        if isinstance(member, zarr.Array):
            for position in touched_shards(member, ...):
                part = tuple(slice(p * u, (p + 1) * u) for p, u in zip(position, member.chunks, strict=True))
                try:
                    member[part]
                except Exception as cause:  # noqa: BLE001 - whatever the codec says of this chunk is the finding
                    return StoreError(
                        f"{storage.url}: array '{member.path}', chunk {position} is damaged ({cause}); "
                        "delete it and run the same command again to repair it"
                    )
    return StoreError(f"{storage.url}: '{name}' cannot be read ({type(error).__name__}: {error})")


def _runs(places: np.ndarray, *, longest: int | None = None) -> Iterator[tuple[int, int]]:
    """Give the stretches of consecutive numbers, `first:last`, that the places fill, none longer than `longest`."""
    numbers = np.unique(places)
    for stretch in np.split(numbers, np.flatnonzero(np.diff(numbers) > 1) + 1):
        if len(stretch):
            first, last = int(stretch[0]), int(stretch[-1]) + 1
            step = longest or last - first
            yield from ((start, min(start + step, last)) for start in range(first, last, step))


def _stretches(rows: np.ndarray, pointers: np.ndarray) -> Iterator[tuple[int, int]]:
    """Give stretches of sparse rows to read at once: neighbours joined over small gaps, entries bounded."""
    first = last = int(rows[0])
    for row in rows.tolist():
        if row - last > GAP_ROWS or pointers[row + 1] - pointers[first] > READ_ENTRIES:
            if last > first:
                yield first, last
            first = row
        last = row + 1
    yield first, last


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
