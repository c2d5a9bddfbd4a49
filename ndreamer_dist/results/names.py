"""Find cells and genes by name: queries on `obs`, names of cells, names and symbols of genes.

Input: tables of cells and genes, and a query or names. Output: positions in the tables, or an error that suggests or
lists existing names.
"""

from __future__ import annotations

import keyword
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from ndreamer_dist.cohort.tables import gene_places
from ndreamer_dist.errors import QueryError, listing, quoted, suggest

SUGGEST_AMONG = 50_000
"""With more names than this, no similar name is suggested for an unknown one: the search would take minutes."""
QUOTED = re.compile(r"""("(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*'|`[^`]*`)""")
"""Parts of a query that stay as they are: strings, and names in backticks."""


def cells_of_query(table: pd.DataFrame, query: str) -> np.ndarray:
    """Evaluate a pandas query on `obs`: (cells,) bool.

    Columns whose names are not Python identifiers (`orig.ident`, `Donor ID`, `class`) may be written with or without
    backticks.

    Raises
    ------
    QueryError
        The query cannot be evaluated, or its value is not one Boolean per cell.
    """
    mask, error = _evaluated(table, query)
    if error is not None and (plainer := with_backticks(query, map(str, table.columns))) != query:
        mask, again = _evaluated(table, plainer)
        error = error if again is not None else None
    if error is not None:
        names = [str(name) for name in table.columns]
        odd = [name for name in names if not _is_plain(name)]
        hint = f'; write names like {listing(odd, limit=3)} in backticks: `{odd[0]}` == "..."' if odd else ""
        unknown = re.search(r"name '(.+?)' is not defined", str(error))
        near = suggest(unknown[1], names) if unknown else ""
        msg = f"the query {query!r} cannot be read ({error});{near} the columns are {listing(names, limit=30)}{hint}"
        raise QueryError(msg) from error
    if not isinstance(mask, pd.Series) or not pd.api.types.is_bool_dtype(mask.dtype):
        msg = f"the query {query!r} is not true or false for every cell; compare a column with a value"
        raise QueryError(msg)
    return mask.fillna(value=False).to_numpy(dtype=bool)


def _evaluated(table: pd.DataFrame, query: str) -> tuple[Any, Exception | None]:
    try:
        return table.eval(query, engine="python", local_dict={}, global_dict={}), None
    except Exception as error:  # noqa: BLE001 - a query can raise anything
        return None, error


def with_backticks(query: str, columns: Any) -> str:
    """Put backticks around the columns of a query whose names are not Python identifiers."""
    odd = sorted((name for name in columns if name and not _is_plain(name)), key=len, reverse=True)
    if not odd:
        return query
    pattern = re.compile(r"(?<![\w.`])(" + "|".join(map(re.escape, odd)) + r")(?![\w`])")
    parts = QUOTED.split(query)
    return "".join(part if place % 2 else pattern.sub(r"`\1`", part) for place, part in enumerate(parts))


def near_value(table: pd.DataFrame, query: str) -> str:
    """Return a hint for a query that selects no cell: the value of a column that was probably meant; or nothing."""
    marked = with_backticks(query, map(str, table.columns))
    for odd, plain, value in re.findall(r"(?:`([^`]+)`|(\w+))\s*==\s*[\"'](.+?)[\"']", marked):
        column = odd or plain
        levels = table[column].dropna().unique() if column in table else None
        if levels is not None and len(levels) <= SUGGEST_AMONG and value not in set(levels):
            return f" Column {column!r} has no {quoted(value)}.{suggest(value, map(str, levels))}"
    return ""


def _is_plain(name: str) -> bool:
    return name.isidentifier() and not keyword.iskeyword(name)


def places_of_cells(index: pd.Index, names: Sequence[Any]) -> np.ndarray:
    """Return the positions of cells: (names,) int64; raise `QueryError` if one is unknown."""
    places = index.get_indexer(pd.Index(names, dtype=object))
    absent = [str(name) for name, place in zip(names, places, strict=True) if place < 0]
    if absent:
        raise QueryError(_absent("cell", absent, index, ""))
    return np.asarray(places, dtype=np.int64)


def places_of_genes(table: pd.DataFrame, names: Sequence[Any]) -> np.ndarray:
    """Return the positions of genes: (names,) int64.

    Parameters
    ----------
    names
        Names, Ensembl ids with or without version, or symbols.

    Raises
    ------
    QueryError
        A gene is unknown, or several genes have the name.
    """
    places_by_name = gene_places(table.index, table, names)
    absent = [name for name, places in places_by_name.items() if not places]
    if absent:
        hint = " Genes that were not modelled are found in the input cohort, if given."
        raise QueryError(_absent("gene", absent, table.index, hint))
    several = {name: places for name, places in places_by_name.items() if len(places) > 1}
    for name, places in several.items():
        msg = f"{len(places)} genes are called {name!r}; name one of them: {listing(table.index[places])}"
        raise QueryError(msg)
    return np.array([places_by_name[str(name)][0] for name in names], dtype=np.int64)


def _absent(what: str, names: Sequence[str], index: pd.Index, hint: str) -> str:
    near = suggest(names[0], index) if len(index) <= SUGGEST_AMONG else ""
    return f"there is no {what} {listing(names)} among the {len(index)} here.{near}{hint}"
