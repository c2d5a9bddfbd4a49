"""The tables of cells and genes of a cohort: read, name and check them.

Input: `obs` and `var` of a store or an AnnData, also from anndata before 0.7. Output: data frames whose names are
unique and whose columns can be written. Genes can take their names from a column of `var`, for example their symbols.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pandas as pd
from anndata import OldFormatWarning
from anndata.io import read_elem
from pandas.util import hash_array

from ndreamer_dist import keys
from ndreamer_dist.cohort.stored import refuse_missing_filter, refusing_damage
from ndreamer_dist.errors import CohortError, has_controls, is_unicode, listing, quoted, suggest

logger = logging.getLogger(__name__)

LONGEST_COLUMN = 200
"""Bytes of a column's name, which is a folder's name in a store."""
OBS_OR_VAR = "obs or var"
INDEX_FIELDS = ("index", "_index")
"""What anndata called the names' field of a structured table; in other tables the names are the first field."""
SYMBOL_COLUMNS = (
    "feature_name", "gene_name", "gene_names", "gene_symbol", "gene_symbols", "symbol", "symbols", "Symbol",
)  # fmt: skip
ID_COLUMNS = ("gene_ids", "gene_id", "feature_id", "ensembl_id", "ensembl", "Ensembl", "ENSEMBL")
Blocks = Callable[[], Iterator[np.ndarray]]
"""Gives names block by block, as often as it is called."""
VERSION = re.compile(r"^(ENS[A-Z]*\d{11})\.\d+$")
"""An Ensembl id with a version."""


def read_frame(root: Any, name: str, url: str) -> pd.DataFrame:
    """Read `obs`, `var` or `raw/var` of a store."""
    with refusing_damage(f"{url}: {OBS_OR_VAR}"):
        if hasattr(root, "filename"):
            refuse_missing_filter(root[name], f"{url}: {name}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", OldFormatWarning)  # old it may be: it is read all the same
            table = read_elem(root[name])
        if isinstance(table, np.ndarray) and table.dtype.names:
            table = structured_table(table, root.get("uns", {}))
    if not isinstance(table, pd.DataFrame):
        msg = f"{url}: {name} is a {type(table).__name__} and no table; write it again: adata.write_h5ad('new.h5ad')"
        raise CohortError(msg)
    return table


def structured_table(values: np.ndarray, uns: Any) -> pd.DataFrame:
    """Return a table of anndata before 0.7: an array with fields, the names of categories apart in `uns`."""
    columns: dict[str, Any] = {str(name): _plain(values[name]) for name in values.dtype.names or ()}
    index = columns.pop(next((name for name in INDEX_FIELDS if name in columns), next(iter(columns))))
    for name in list(columns):
        stored = f"{name}_categories"
        if stored in uns and np.asarray(columns[name]).dtype.kind in "iu":
            levels = _plain(np.atleast_1d(np.asarray(uns[stored][()])))
            columns[name] = pd.Categorical.from_codes(columns[name], pd.Index(levels))
    return pd.DataFrame(columns, index=pd.Index(index).astype(str))


def _plain(values: np.ndarray) -> np.ndarray:
    """Return bytes as text, anything else as it is."""
    if values.dtype.kind not in "SO":
        return values
    texts = [value.decode(errors="replace") if isinstance(value, bytes) else value for value in values.tolist()]
    return np.array(texts, dtype=object)


def in_memory(table: Any) -> pd.DataFrame:
    """Return a copy of a table of an AnnData, of a lazy one too."""
    return table.copy() if isinstance(table, pd.DataFrame) else table.to_memory()


def named_genes(var: pd.DataFrame, column: str | None) -> tuple[pd.DataFrame, str]:
    """Return the genes' table with the names of a column, and a note of what was done.

    A name that several genes have is joined with their former names, `SYMBOL_ENSG...`; a gene without one keeps its
    former name. The former names stay in `ndreamer_gene_id`.

    Raises
    ------
    CohortError
        There is no such column.
    """
    if column is None:
        return var, ""
    if column not in var:
        near = [name for name in (*SYMBOL_COLUMNS, *ID_COLUMNS) if name in var]
        hint = f" These look like names: {listing(near)}." if near else suggest(column, var.columns)
        msg = f"var has no column {quoted(column)} to name genes by; there are {listing(var.columns) or 'none'}.{hint}"
        raise CohortError(msg)
    former = np.asarray(var.index.astype(str), dtype=object)
    wanted = var[column].astype(object).where(var[column].notna(), "").astype(str).str.strip().to_numpy(dtype=object)
    names = np.where(wanted == "", former, wanted)
    several = pd.Index(names).duplicated(keep=False)
    names = np.where(several, names + "_" + former, names)
    table = var.assign(**{keys.VAR_GENE_ID: former})
    table.index = pd.Index(names, dtype=object)
    note = f"genes are named by var column {column!r}"
    if several.any():
        shared = pd.unique(pd.Series(wanted[several]))
        note += f"; {len(shared)} names that several genes have are joined with their ids: {listing(names[several], limit=3)}"
    if (nameless := int((wanted == "").sum())) > 0:
        note += f"; {nameless} genes without a name keep their id"
    return table, note


def gene_places(index: pd.Index, table: pd.DataFrame, names: Iterable[object]) -> dict[str, list[int]]:
    """Return where genes stand that may be called by name, Ensembl id (with or without version) or symbol.

    Parameters
    ----------
    index
        Names of the genes, the rows of `table`.
    names
        What is looked for.

    Returns
    -------
    For each name the places it means: one, none, or several where it is ambiguous.
    """
    places: dict[str, list[int]] = {}
    known: list[pd.Series[Any]] | None = None
    wanted = [str(name) for name in names]
    for name, place in zip(wanted, index.get_indexer(pd.Index(wanted, dtype=object)).tolist(), strict=True):
        if place >= 0:
            places[name] = [place]
            continue
        known = _other_names(index, table) if known is None else known
        bare = VERSION.sub(r"\1", name)
        matching: list[int] = []
        for other in known:
            matching = (
                np.flatnonzero((other == name).to_numpy()).tolist()
                or np.flatnonzero((other == bare).to_numpy()).tolist()
            )
            if matching:
                break
        places[name] = matching
    return places


def _other_names(index: pd.Index, table: pd.DataFrame) -> list[pd.Series[Any]]:
    """Return what genes are called besides their names, each with its versions taken off as well."""
    columns = [name for name in (keys.VAR_GENE_ID, *SYMBOL_COLUMNS, *ID_COLUMNS) if name in table]
    plain = [pd.Series(np.asarray(index, dtype=object))]
    plain += [pd.Series(table[name].astype(object).to_numpy()) for name in columns]
    return [*plain[1:], *(series.astype(str).str.replace(VERSION, r"\1", regex=True) for series in plain)]


def check_names(name: str, obs: Any, var: pd.DataFrame) -> None:
    """Refuse names of cells and genes that repeat or are no text, and tables without rows.

    Parameters
    ----------
    obs
        The cells' table, `cells.ObsTable`.
    """
    _check_index("cell", "obs", obs.names, len(obs))
    unique = [column for column in ID_COLUMNS if column in var and var[column].notna().all() and var[column].is_unique]
    instead = f", or name genes by a column of var: --gene-names {unique[0]}" if unique else ""
    _check_index("gene", "var", lambda: iter([var.index.astype(str).to_numpy(dtype=object)]), len(var), instead)
    if not len(obs) or not len(var):
        msg = f"{name} is empty: {len(obs)} cells x {len(var)} genes"
        raise CohortError(msg)


def _check_index(what: str, table: str, names: Blocks, count: int, instead: str = "") -> None:
    """Refuse names, given in blocks, that repeat or are no text; of them all, 8 bytes a name are held."""
    odd = [name for block in names() if not all(map(str.isascii, block)) for name in block if not is_unicode(name)]
    if odd:
        msg = f"{what} names {listing(odd)} are not Unicode text; rename them"
        raise CohortError(msg)
    hashes, place = np.empty(count, dtype=np.uint64), 0
    for block in names():
        hashes[place : place + len(block)] = hash_array(block, categorize=False)
        place += len(block)
    hashes.sort()
    twice = np.unique(hashes[1:][hashes[1:] == hashes[:-1]])
    if len(twice):  # of two names, or of one name twice
        alike = pd.Index(np.concatenate([b[np.isin(hash_array(b, categorize=False), twice)] for b in names()]))
        if len(repeated := alike[alike.duplicated()].unique()):
            msg = f"{what} names are used more than once: {listing(repeated)}; adata.{table}_names_make_unique() helps{instead}"
            raise CohortError(msg)


def check_columns(obs: pd.Index, var: pd.Index) -> None:
    """Refuse columns of the tables of cells and genes that are ours, have one name twice, or cannot be stored."""
    for table, columns in (("obs", obs), ("var", var)):
        _check_columns(table, columns)


def _check_columns(table: str, columns: pd.Index) -> None:
    ours = [name for name in columns if str(name).startswith(keys.OBS_PREFIX)]
    if ours:
        msg = f"{table} columns {listing(ours)} start with {keys.OBS_PREFIX!r}, which names our results; rename them"
        raise CohortError(msg)
    if twice := list(columns[columns.duplicated()].unique()):
        msg = f"{table} has more than one column {listing(twice)}; rename them"
        raise CohortError(msg)
    if unfit := [name for name in columns if not _is_folder_name(str(name))]:
        msg = (
            f"{table} columns {listing(unfit)} cannot be stored: a name is at most {LONGEST_COLUMN} bytes, without "
            "slashes or control characters; rename them"
        )
        raise CohortError(msg)


def _is_folder_name(name: str) -> bool:
    """Return whether a column's name can name a folder, on a disk and on an object store alike."""
    if name in ("", ".", "..", "zarr.json") or not is_unicode(name) or len(name.encode()) > LONGEST_COLUMN:
        return False
    return not (has_controls(name) or "/" in name or "\\" in name)
