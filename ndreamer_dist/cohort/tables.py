"""Read and check the tables of cells and genes of a cohort, and name the genes.

Input: `obs` and `var` of a store or an AnnData, also from anndata before 0.7. Output: data frames with unique names and
with columns that can be written. A column of `var`, for example the gene symbols, can name the genes.
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
"""Most bytes of a column name, which names a folder in a zarr store."""
OBS_OR_VAR = "obs or var"
INDEX_FIELDS = ("index", "_index")
"""Fields of a structured table in which anndata stored the index; in other tables it is the first field."""
SYMBOL_COLUMNS = (
    "feature_name", "gene_name", "gene_names", "gene_symbol", "gene_symbols", "symbol", "symbols", "Symbol",
)  # fmt: skip
ID_COLUMNS = ("gene_ids", "gene_id", "feature_id", "ensembl_id", "ensembl", "Ensembl", "ENSEMBL")
Blocks = Callable[[], Iterator[np.ndarray]]
"""A function that yields names in blocks; each call starts again."""
VERSION = re.compile(r"^(ENS[A-Z]*\d{11})\.\d+$")
"""Matches an Ensembl id with a version; group 1 is the id without it."""


def read_frame(root: Any, name: str, url: str) -> pd.DataFrame:
    """Read `obs`, `var` or `raw/var` of a store; `CohortError` if it is damaged or not a table."""
    with refusing_damage(f"{url}: {OBS_OR_VAR}"):
        refuse_missing_filter(root[name], f"{url}: {name}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", OldFormatWarning)  # old formats are supported
            table = read_elem(root[name])
        if isinstance(table, np.ndarray) and table.dtype.names:
            table = structured_table(table, root.get("uns", {}))
    if not isinstance(table, pd.DataFrame):
        msg = f"{url}: {name} is a {type(table).__name__} and no table; write it again: adata.write_h5ad('new.h5ad')"
        raise CohortError(msg)
    return table


def structured_table(values: np.ndarray, uns: Any) -> pd.DataFrame:
    """Convert a table from before anndata 0.7, a structured array whose categories are in `uns`, to a data frame."""
    columns: dict[str, Any] = {str(name): _plain(values[name]) for name in values.dtype.names or ()}
    index = columns.pop(next((name for name in INDEX_FIELDS if name in columns), next(iter(columns))))
    for name in list(columns):
        stored = f"{name}_categories"
        if stored in uns and np.asarray(columns[name]).dtype.kind in "iu":
            levels = _plain(np.atleast_1d(np.asarray(uns[stored][()])))
            columns[name] = pd.Categorical.from_codes(columns[name], pd.Index(levels))
    return pd.DataFrame(columns, index=pd.Index(index).astype(str))


def _plain(values: np.ndarray) -> np.ndarray:
    """Decode bytes to text; return other values unchanged."""
    if values.dtype.kind not in "SO":
        return values
    texts = [value.decode(errors="replace") if isinstance(value, bytes) else value for value in values.tolist()]
    return np.array(texts, dtype=object)


def in_memory(table: Any) -> pd.DataFrame:
    """Return a table of an AnnData, in memory or lazy, as a data frame of its own."""
    return table.copy() if isinstance(table, pd.DataFrame) else table.to_memory()


def named_genes(var: pd.DataFrame, column: str | None) -> tuple[pd.DataFrame, str]:
    """Name the genes by a column of `var`; return the table, and a note for the user.

    If several genes share a name, it is joined with their former names: `SYMBOL_ENSG...`. A gene without a name keeps
    its former one. The former names are kept in the column `ndreamer_gene_id`. Without a column nothing changes.

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
    """Find genes by name, Ensembl id (with or without version) or symbol.

    Parameters
    ----------
    index
        Unique names of the genes, in the order of the rows of `table`.
    table
        `var`, whose id and symbol columns are searched too.
    names
        Names to find.

    Returns
    -------
    By name, the matching rows: one, none, or several if the name is ambiguous.
    """
    places: dict[str, list[int]] = {}
    aliases: list[dict[Any, Any]] | None = None
    wanted = [str(name) for name in names]
    for name, place in zip(wanted, index.get_indexer(pd.Index(wanted, dtype=object)).tolist(), strict=True):
        if place >= 0:
            places[name] = [place]
            continue
        aliases = _aliases(index, table) if aliases is None else aliases
        bare = VERSION.sub(r"\1", name)
        matching = (alias[text] for alias in aliases for text in (name, bare) if text in alias)
        places[name] = list(map(int, next(matching, ())))
    return places


def _aliases(index: pd.Index, table: pd.DataFrame) -> list[dict[Any, Any]]:
    """Return the positions of genes by their other names, one dict per kind of name; ids with and without versions."""
    columns = [name for name in (keys.VAR_GENE_ID, *SYMBOL_COLUMNS, *ID_COLUMNS) if name in table]
    plain = [pd.Series(np.asarray(index, dtype=object))]
    plain += [pd.Series(table[name].astype(object).to_numpy()) for name in columns]
    bare = [series.astype(str).str.replace(VERSION, r"\1", regex=True) for series in plain]
    return [series.groupby(series, sort=False).indices for series in (*plain[1:], *bare)]


def check_names(name: str, obs: Any, var: pd.DataFrame) -> None:
    """Refuse an empty cohort, names of cells or genes that repeat or are not text, and unusable column names.

    Parameters
    ----------
    name
        Name of the cohort in messages.
    obs
        Table of the cells, a `cells.ObsTable`.

    Raises
    ------
    CohortError
        A check fails; the message lists the names.
    """
    _check_index("cell", "obs", obs.names, len(obs))
    unique = [column for column in ID_COLUMNS if column in var and var[column].notna().all() and var[column].is_unique]
    instead = f", or name genes by a column of var: --gene-names {unique[0]}" if unique else ""
    _check_index("gene", "var", lambda: iter([var.index.astype(str).to_numpy(dtype=object)]), len(var), instead)
    if not len(obs) or not len(var):
        msg = f"{name} is empty: {len(obs)} cells x {len(var)} genes"
        raise CohortError(msg)


def _check_index(what: str, table: str, names: Blocks, count: int, instead: str = "") -> None:
    """Refuse names that repeat or are not Unicode text; holds one 8-byte hash per name, not the names."""
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
    if len(twice):  # one name twice, or two names with equal hashes: compare the names themselves
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
    """Return whether a column name can be the name of a folder, on a disk and on an object store."""
    if name in ("", ".", "..", "zarr.json") or not is_unicode(name) or len(name.encode()) > LONGEST_COLUMN:
        return False
    return not (has_controls(name) or "/" in name or "\\" in name)
