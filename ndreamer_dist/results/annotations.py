"""Store columns of obs that users add after the run, for example cell types.

One file beside results.zarr holds them by cell name. No file of the run is changed.
"""

from __future__ import annotations

import io
import os
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
    """What a table of labels changes in the results.

    Attributes
    ----------
    new, changed
        Names of the columns that obs did not have, and of those whose values differ from obs.
    unlabelled
        Number of cells without a row in the table; their values are missing.
    unknown
        Number of rows of the table that name no cell of the results, for example dropped cells.
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
    """Return the folder of a results.zarr, and the name of the file of annotations in it."""
    folder, _, name = results.url.rpartition("/")
    folder = keys.run_folder(folder)  # all matching spaces of a run share the annotations
    return Storage(folder or "."), f"{name.removesuffix('.zarr')}.{keys.ANNOTATIONS}"


def read_annotations(results: Storage, cells: pd.Index) -> pd.DataFrame:
    """Read the annotated columns: one row per cell, in the order of `cells`; without annotations, no columns.

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
    """Write annotated columns, one row per cell of the results; the file with earlier annotations is replaced.

    Raises
    ------
    StoreError
        The results are on a web server.
    QueryError
        A column cannot be stored.
    """
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
    """Compare a table of labels with `obs`; return its new and changed columns, and a summary.

    Parameters
    ----------
    labels
        A table with one row per cell, indexed by cell name, or an AnnData, of which `obs` is used.
    cells
        `obs` of the results; the returned columns have its index.

    Raises
    ------
    QueryError
        The table names no cell of the results, or a cell or column twice; or a column starts with `ndreamer_`, is the
        condition or a batch, or cannot be stored.
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
    labelled = int(table.index.isin(cells.index).sum())
    return aligned[[*new, *changed]], Annotation(new, changed, len(cells) - labelled, len(table) - labelled)


def population_labels(by: Any) -> str | pd.Series | None:
    """Check the argument `by`: return the name of a column of obs, a named Series of labels by cell, or `None`.

    Raises
    ------
    QueryError
        `by` is something else, for example a table of several columns or an array of labels without cell names.
    """
    one = by.iloc[:, 0] if isinstance(by, pd.DataFrame) and by.shape[1] == 1 else by
    if not isinstance(one, str | pd.Series | None):
        msg = f"`by` is a {type(by).__name__}; expected a column's name, or one column of labels by cell (a pandas Series)"
        raise QueryError(msg)
    return one.rename(str(one.name or "population")) if isinstance(one, pd.Series) else one


def _table_of(labels: pd.DataFrame | pd.Series | anndata.AnnData, cells: pd.DataFrame) -> pd.DataFrame:
    """Return labels as a table; of an AnnData, the columns of `obs` that differ from those of the results."""
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
        msg = "the table has no rows; expected one per cell"
        raise QueryError(msg)
    if str(rows.name) in cells:
        msg = f"the table's line of column names is the cell {quoted(rows.name)}; write one before it: cell,cell_type"
        raise QueryError(msg)
    twice = rows[rows.duplicated()]
    if len(twice):
        msg = f"the table names {len(twice)} cells twice, first {quoted(twice[0])}; expected one row per cell"
        raise QueryError(msg)
    if not rows.isin(cells).any():
        hint = "its index (of a file: the first column) must hold their names"
        msg = f"none of the table's {len(rows)} rows, first {quoted(rows[0])}, is a cell of the results, first {quoted(cells[0])}; {hint}"
        raise QueryError(msg)


def _categorical(values: pd.Series) -> pd.Series:
    """Convert text to categories, and a column of True, False and gaps to Booleans, as anndata stores them."""
    if values.dtype != object and not pd.api.types.is_string_dtype(values.dtype):
        return values
    if values.dropna().map(lambda value: isinstance(value, bool)).all() and values.notna().any():
        return values.astype("boolean") if values.isna().any() else values.astype(bool)
    return values.astype("category")


def differ(one: pd.Series, other: pd.Series) -> bool:
    """Return whether two columns of the same cells differ in a value; their dtypes may differ."""
    missing = one.isna().to_numpy(), other.isna().to_numpy()
    if not np.array_equal(*missing):
        return True
    left, right = one[~missing[0]], other[~missing[0]]
    if pd.api.types.is_numeric_dtype(left) and pd.api.types.is_numeric_dtype(right):
        return not np.array_equal(left.to_numpy(dtype=np.float64), right.to_numpy(dtype=np.float64))
    return not np.array_equal(left.astype(str).to_numpy(dtype=object), right.astype(str).to_numpy(dtype=object))


def changed_columns(stored: pd.DataFrame, cells: pd.DataFrame, now: pd.DataFrame, design: Design) -> list[str]:
    """Return the names of the columns of a cohort's `obs` that are new or have changed since the run.

    A column that the cohort has as the run read it is left out, even if it has been annotated since.

    Parameters
    ----------
    stored, cells
        `obs` as the run wrote it, and `obs` with the annotations.
    now
        `obs` of the cohort, indexed by cell name; it may hold cells that the run dropped.
    """
    fixed = {design.condition_key, *design.batch_keys}
    names = [name for name in now.columns if name not in fixed and not str(name).startswith(keys.OBS_PREFIX)]
    rows = now.loc[cells.index, names]
    changed = [name for name in names if name not in stored or differ(stored[name], rows[name])]
    return [str(name) for name in changed if name not in cells or differ(cells[name], rows[name])]


def table_of_file(path: str | os.PathLike[str], columns: Sequence[str] | None = None) -> Any:
    """Read a table of labels from a file.

    Parameters
    ----------
    path
        A `.csv`, `.tsv` or `.txt` file with cell names in the first column, a `.parquet` file, or an AnnData in `.h5ad`
        or `.zarr`, of which only `obs` is read.
    columns
        Names of the columns to return; by default all.

    Returns
    -------
    A data frame; for `.h5ad` and `.zarr`, an AnnData that holds only `obs`.

    Raises
    ------
    QueryError
        The file cannot be read, or lacks a column.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        msg = f"{path}: unknown suffix {suffix!r}; expected one of {listing(SUFFIXES)}"
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
    if marks and table.columns.empty:  # whole lines were read as cell names
        msg = f"{path} has {marks[0]!r} between its columns; a {suffix} file has {LABEL_SEPARATORS[suffix]!r}, so write it with that"
        raise QueryError(msg)
    absent = [name for name in columns or () if name not in table]
    if absent:
        msg = f"{path} has no column {listing(absent)}; there are {listing(table.columns, limit=30)}"
        raise QueryError(msg)
    table = table[list(columns)] if columns else table
    return anndata.AnnData(obs=table) if suffix in CONTAINERS else table
