"""Columns of obs that users add after the run, for example labels of cell types.

One file beside results.zarr holds them by cell name. Nothing that the run wrote is changed.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from ndreamer_dist import keys
from ndreamer_dist.cohort.design import Design
from ndreamer_dist.cohort.stored import open_root
from ndreamer_dist.effects.tables import check_tables
from ndreamer_dist.errors import CohortError, QueryError, StoreError, listing, quoted
from ndreamer_dist.storage.files import Storage

LABEL_SEPARATORS = {".csv": ",", ".tsv": "\t", ".txt": "\t"}
CONTAINERS = {".h5ad": "h5ad", ".zarr": "zarr"}
SUFFIXES = (*LABEL_SEPARATORS, ".parquet", *CONTAINERS)
CELL_COLUMN = "cell"


@dataclass(frozen=True)
class Annotation:
    """What became of a table of labels.

    Attributes
    ----------
    new, changed
        Columns that obs did not have, and those whose values differ from what it had.
    unlabelled
        Cells of the results that the table does not name; their values are missing.
    unknown
        Rows of the table that name no cell of the results: cells that were dropped, say.
    """

    new: tuple[str, ...]
    changed: tuple[str, ...]
    unlabelled: int = 0
    unknown: int = 0

    def __str__(self) -> str:
        parts = [f"{name} (new)" for name in self.new] + [f"{name} (changed)" for name in self.changed]
        text = ", ".join(parts) or "nothing new"
        if self.unlabelled:
            text += f"; {self.unlabelled:,} cells have no row in the table"
        if self.unknown:
            text += f"; {self.unknown:,} rows of the table name no cell of these results"
        return text


def beside(results: Storage) -> tuple[Storage, str]:
    """Return the folder of a results.zarr, and the name of the file that holds what was annotated later."""
    folder, _, name = results.url.rpartition("/")
    folder = re.sub(f"/{keys.SPACES_DIR}/[^/]+$", "", folder)  # all matching spaces of a run share them
    return Storage(folder or "."), f"{name.removesuffix('.zarr')}.{keys.ANNOTATIONS}"


def read_annotations(results: Storage, cells: pd.Index) -> pd.DataFrame:
    """Return the columns that were annotated, a row per cell in the order given; no columns where there are none.

    Raises
    ------
    StoreError
        The file is damaged.
    """
    folder, name = beside(results)
    data = folder.read_if_there(name, counted=False)
    if data is None:
        return pd.DataFrame(index=cells)
    try:
        table = pq.read_table(io.BytesIO(data), page_checksum_verification=True).to_pandas()
        table = table.set_index(CELL_COLUMN)
    except Exception as error:
        msg = f"{folder.url}/{name} is damaged ({error}); delete it and annotate again"
        raise StoreError(msg) from error
    return table if table.index.equals(cells) else table.reindex(cells)


def write_annotations(results: Storage, table: pd.DataFrame) -> None:
    """Keep columns, a row per cell of the results, beside them; what was annotated before is replaced."""
    folder, name = beside(results)
    if folder.is_read_only:
        msg = f"{folder.url} can only be read; annotate a copy, or give `by` a Series"
        raise StoreError(msg)
    buffer = io.BytesIO()
    try:
        table.rename_axis(CELL_COLUMN).reset_index().to_parquet(buffer, index=False, write_page_checksum=True)
    except Exception as error:
        msg = f"the table cannot be stored ({error}); turn its columns into text or numbers"
        raise QueryError(msg) from error
    folder.write_atomic(name, buffer.getvalue())


def annotation_of(
    labels: pd.DataFrame | pd.Series | anndata.AnnData, cells: pd.DataFrame, design: Design
) -> tuple[pd.DataFrame, Annotation]:
    """Return the columns of a table of labels that `obs` lacks or has otherwise, and what is to be said of them.

    Parameters
    ----------
    labels
        A row per cell, by its name; of an AnnData, `obs`.
    cells
        `obs` of the results: its index orders the answer.

    Raises
    ------
    QueryError
        No cell is named, a name stands twice, or a column is ours or bears on the design.
    """
    table = _table_of(labels, cells)
    _check_columns(table, design)
    _check_names(table.index, cells.index)
    try:
        aligned = pd.DataFrame({name: _categorical(values) for name, values in table.reindex(cells.index).items()})
        check_tables(aligned, pd.DataFrame())
    except (CohortError, TypeError) as error:
        msg = f"a column cannot be stored ({error}); turn it into text or numbers"
        raise QueryError(msg) from error
    new = tuple(str(name) for name in aligned if name not in cells)
    changed = tuple(str(name) for name in aligned if name in cells and differ(cells[name], aligned[name]))
    known = int(table.index.isin(cells.index).sum())
    return aligned[[*new, *changed]], Annotation(new, changed, len(cells) - known, len(table) - known)


def population_labels(by: Any) -> str | pd.Series | None:
    """Return what names populations: a column of obs, labels by cell as a Series with a name, or None.

    Raises
    ------
    QueryError
        It is neither: several columns, or labels that say no cell.
    """
    one = by.iloc[:, 0] if isinstance(by, pd.DataFrame) and by.shape[1] == 1 else by
    if not isinstance(one, str | pd.Series | None):
        msg = f"`by` is a {type(by).__name__}; expected a column's name, or one column of labels by cell (a pandas Series)"
        raise QueryError(msg)
    return one.rename(str(one.name or "population")) if isinstance(one, pd.Series) else one


def _table_of(labels: pd.DataFrame | pd.Series | anndata.AnnData, cells: pd.DataFrame) -> pd.DataFrame:
    if isinstance(labels, pd.Series):
        if labels.name is None:
            msg = "the Series has no name; give it that of the column: labels.rename('cell_type')"
            raise QueryError(msg)
        table = labels.to_frame()
    elif isinstance(labels, anndata.AnnData):
        theirs = labels.obs
        table = theirs[[name for name in theirs if not str(name).startswith(keys.OBS_PREFIX)]]
        common = theirs.index.intersection(cells.index)
        same = [n for n in table if n in cells and not differ(cells.loc[common, n], table.loc[common, n])]
        table = table.drop(columns=same)
    else:
        table = labels
    return table.set_axis(table.index.astype(str)).set_axis([str(name) for name in table.columns], axis=1)


def _check_columns(table: pd.DataFrame, design: Design) -> None:
    names = list(table.columns)
    ours = [name for name in names if name.startswith(keys.OBS_PREFIX)]
    fixed = [name for name in names if name in (design.condition_key, *design.batch_keys)]
    twice = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    for refused, msg in (
        (ours, f"columns that begin with {keys.OBS_PREFIX!r} are the run's own: {listing(ours)}; rename them"),
        (fixed, f"{listing(fixed)} says what was compared, so it cannot be changed after the run; run again with it"),
        (twice, f"the table has more than one column {listing(twice)}"),
    ):
        if refused:
            raise QueryError(msg)


def _check_names(rows: pd.Index, cells: pd.Index) -> None:
    if rows.empty:
        msg = "the table has no rows; expected one a cell"
        raise QueryError(msg)
    if str(rows.name) in cells:
        msg = f"the table's line of column names is the cell {quoted(rows.name)}; write one before it: cell,cell_type"
        raise QueryError(msg)
    twice = rows[rows.duplicated()]
    if len(twice):
        msg = f"the table names {len(twice)} cells twice, first {quoted(twice[0])}; expected one row a cell"
        raise QueryError(msg)
    if not rows.isin(cells).any():
        hint = "its index (of a file: the first column) must hold their names"
        msg = f"none of the table's {len(rows)} rows, first {quoted(rows[0])}, is a cell of the results, first {quoted(cells[0])}; {hint}"
        raise QueryError(msg)


def _categorical(values: pd.Series) -> pd.Series:
    """Return text as categories, and True and False with gaps as such, the way anndata keeps them."""
    if values.dtype != object and not pd.api.types.is_string_dtype(values.dtype):
        return values
    if values.dropna().map(lambda value: isinstance(value, bool)).all() and values.notna().any():
        return values.astype("boolean") if values.isna().any() else values.astype(bool)
    return values.astype("category")


def differ(one: pd.Series, other: pd.Series) -> bool:
    """Return whether two columns of the same cells hold other values, whatever types they are stored as."""
    missing = one.isna().to_numpy(), other.isna().to_numpy()
    if not np.array_equal(*missing):
        return True
    left, right = one[~missing[0]], other[~missing[0]]
    if pd.api.types.is_numeric_dtype(left) and pd.api.types.is_numeric_dtype(right):
        return not np.array_equal(left.to_numpy(dtype=np.float64), right.to_numpy(dtype=np.float64))
    return not np.array_equal(left.astype(str).to_numpy(dtype=object), right.astype(str).to_numpy(dtype=object))


def changed_columns(stored: pd.DataFrame, cells: pd.DataFrame, now: pd.DataFrame, design: Design) -> list[str]:
    """Return the columns of a cohort's `obs` that have changed since the run, or are new.

    A column that was annotated by hand stays as it is where the cohort's is still that of the run.

    Parameters
    ----------
    stored, cells
        `obs` as the run wrote it, and with what was annotated later.
    now
        `obs` of the cohort, by cell; cells that were dropped may be in it.
    """
    fixed = {design.condition_key, *design.batch_keys}
    names = [name for name in now.columns if name not in fixed and not str(name).startswith(keys.OBS_PREFIX)]
    rows = now.loc[cells.index, names]
    changed = [name for name in names if name not in stored or differ(stored[name], rows[name])]
    return [str(name) for name in changed if name not in cells or differ(cells[name], rows[name])]


def table_of_file(path: str | os.PathLike[str], columns: Sequence[str] | None = None) -> Any:
    """Read a table of labels: `.csv` or `.tsv` with the cells' names in the first column, `.parquet`, `.h5ad` or `.zarr`.

    Parameters
    ----------
    columns
        Those to take; by default all.

    Returns
    -------
    A data frame, or of `.h5ad` and `.zarr` an AnnData that holds `obs` alone.

    Raises
    ------
    QueryError
        The file cannot be read, or lacks a column.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        msg = f"{path}: the suffix {suffix!r} says no format; there are {listing(SUFFIXES)}"
        raise QueryError(msg)
    try:
        if suffix in CONTAINERS:
            table = anndata.io.read_elem(open_root(str(path), CONTAINERS[suffix])["obs"])
        elif suffix == ".parquet":
            table = pd.read_parquet(path)
            table = table.set_index(CELL_COLUMN) if CELL_COLUMN in table else table
        else:
            table = pd.read_csv(path, sep=LABEL_SEPARATORS[suffix], index_col=0, dtype={0: str})
    except Exception as error:
        msg = f"{path} cannot be read ({error})"
        raise QueryError(msg) from error
    marks = [mark for mark in ";,\t|" if mark in str(table.index.name)] if suffix in LABEL_SEPARATORS else []
    if marks and table.columns.empty:  # whole lines were read as names of cells
        msg = f"{path} has {marks[0]!r} between its columns; a {suffix} file has {LABEL_SEPARATORS[suffix]!r}, so write it with that"
        raise QueryError(msg)
    absent = [name for name in columns or () if name not in table]
    if absent:
        msg = f"{path} has no column {listing(absent)}; there are {listing(table.columns, limit=30)}"
        raise QueryError(msg)
    table = table[list(columns)] if columns else table
    return anndata.AnnData(obs=table) if suffix in CONTAINERS else table
