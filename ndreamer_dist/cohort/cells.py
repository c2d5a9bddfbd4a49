"""Read the table of a cohort's cells (`obs`) column by column, so that no process holds a stored table whole.

Input: `obs` of a store, or a data frame in memory. Output: single columns, the cell names block by block, or on request
the whole table. A text column is returned as a categorical or as an Arrow array; neither needs a Python object per cell.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from anndata.io import read_elem

from ndreamer_dist.cohort.stored import (
    Container,
    StoredMatrix,
    is_group,
    open_root,
    refuse_missing_filter,
    refusing_damage,
    text_of,
)
from ndreamer_dist.cohort.tables import OBS_OR_VAR, read_frame
from ndreamer_dist.storage.texts import TEXT_BLOCK, as_texts, joined, text_blocks

TEXT, NULLABLE_TEXT = "string-array", "nullable-string-array"


@dataclass(frozen=True)
class HeldCells:
    """A data frame in memory with the interface of `StoredCells`."""

    table: pd.DataFrame

    @property
    def columns(self) -> pd.Index:
        """See `StoredCells`."""
        return self.table.columns

    @property
    def index_name(self) -> Any:
        """See `StoredCells`."""
        return self.table.index.name

    @property
    def index(self) -> pd.Index:
        """See `StoredCells`."""
        return self.table.index.astype(str)

    def __len__(self) -> int:
        return len(self.table)

    def __contains__(self, name: object) -> bool:
        return name in self.table

    def __getitem__(self, name: str) -> pd.Series:
        return self.table[name]

    def names(self) -> Iterator[np.ndarray]:
        """See `StoredCells.names`."""
        for start in range(0, len(self.table), TEXT_BLOCK):
            yield np.array(list(map(str, self.table.index[start : start + TEXT_BLOCK])), dtype=object)

    def text(self, name: str | None) -> pa.LargeStringArray | None:
        """Return the cell names if `name` is None, else None: an object column may hold values other than text."""
        return as_texts(self.index) if name is None else None

    def sample(self) -> pd.DataFrame:
        """Return all rows, because each value of an object column may have another type."""
        return self.table

    def frame(self) -> pd.DataFrame:
        """See `StoredCells.frame`."""
        return self.table.copy()

    def assign(self, **columns: pd.Series) -> HeldCells:
        """See `StoredCells.assign`."""
        return HeldCells(self.table.assign(**{name: values.array for name, values in columns.items()}))


@dataclass(frozen=True)
class StoredCells:
    """A table in an h5ad file or a zarr store. Each process opens the store on its own.

    Attributes
    ----------
    place
        Path of the table in the store: `obs`, or `mod/rna/obs` of a MuData.
    added
        Columns set by `assign`, by name; they replace stored columns of the same name.
    """

    url: str
    container: Container
    place: str
    rows: int
    added: Mapping[str, pd.Series] = field(default_factory=dict)

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}  # without the cached open file

    @cached_property
    def _group(self) -> Any:
        return open_root(self.url, self.container)[self.place]

    @cached_property
    def columns(self) -> pd.Index:
        """Names of the columns, stored ones first."""
        own = [text_of(name) for name in self._group.attrs["column-order"]]
        return pd.Index([*own, *(name for name in self.added if name not in own)], dtype=object)

    @cached_property
    def _index(self) -> str:
        return text_of(self._group.attrs["_index"])

    @property
    def index_name(self) -> str | None:
        """Name of the index, or None."""
        return None if self._index == "_index" else self._index

    @property
    def index(self) -> pd.Index:
        """Names of all cells."""
        return pd.Index(np.concatenate(list(self.names())), dtype=object, name=self.index_name)

    def __len__(self) -> int:
        return self.rows

    def __contains__(self, name: object) -> bool:
        return name in self.columns

    def __getitem__(self, name: str) -> pd.Series:
        """Return a column; a text column is returned as a categorical."""
        if name in self.added:
            return self.added[name]
        with refusing_damage(f"{self.url}: {OBS_OR_VAR}"):
            values = _categories(self._blocks(name)) if self._is_text(name) else read_elem(self._group[name])
            return pd.Series(values, name=name)

    def names(self) -> Iterator[np.ndarray]:
        """Yield the cell names as text, block by block."""
        with refusing_damage(f"{self.url}: {OBS_OR_VAR}"):
            for block in self._blocks(self._index):
                for start in range(0, len(block), TEXT_BLOCK):
                    yield block[start : start + TEXT_BLOCK].to_numpy(zero_copy_only=False)

    def text(self, name: str | None) -> pa.LargeStringArray | None:
        """Return a text column, or the cell names if `name` is None; return None if the column does not hold text."""
        if not self._is_text(name or self._index):
            return None
        with refusing_damage(f"{self.url}: {OBS_OR_VAR}"):
            return joined(list(self._blocks(name or self._index)))

    def sample(self) -> pd.DataFrame:
        """Return the first row, after reading every column once to check it.

        One row is enough to test whether a column can be written, because all values of a stored column have one type.
        """
        return self._first

    @cached_property
    def _first(self) -> pd.DataFrame:
        with refusing_damage(f"{self.url}: {OBS_OR_VAR}"):
            first = {name: self._head(name) for name in self.columns}
            return pd.DataFrame(first, index=self._head(self._index), columns=self.columns).rename_axis(self.index_name)

    def _head(self, name: str) -> Any:
        """Read a column and return its first value as an array; `ValueError` unless it has one value per cell."""
        if self._is_text(name):
            blocks = iter(self._blocks(name))
            first = next(blocks, pa.array([], pa.large_string()))
            rows = len(first) + sum(map(len, blocks))
            values: Any = pd.array(
                first[:1].to_pylist(), dtype="string" if self._kind(name) == NULLABLE_TEXT else object
            )
        else:
            values = self[name].array  # without an index, which pandas would align with the names of the cells
            rows = len(values)
        if rows != self.rows:
            msg = f"column {name!r} has {rows} rows, others have {self.rows}"
            raise ValueError(msg)
        head = values[:1]
        return head.remove_unused_categories() if isinstance(head, pd.Categorical) else head

    def frame(self) -> pd.DataFrame:
        """Return the whole table."""
        table = read_frame(open_root(self.url, self.container), self.place, self.url)
        return table.assign(**{name: values.set_axis(table.index) for name, values in self.added.items()})

    def assign(self, **columns: pd.Series) -> StoredCells:
        """Return a table with more columns, like `DataFrame.assign`; the store is not changed."""
        return replace(self, added={**self.added, **columns})

    def _kind(self, name: str) -> str:
        return text_of(self._group[name].attrs.get("encoding-type", ""))

    def _is_text(self, name: str) -> bool:
        return name not in self.added and self._kind(name) in (TEXT, NULLABLE_TEXT)

    def _blocks(self, name: str) -> Iterator[pa.LargeStringArray]:
        """Yield a stored text column block by block; missing values are null."""
        element = self._group[name]
        if not is_group(element):
            yield from text_blocks(element)
            return
        start = 0
        for block in text_blocks(element["values"]):
            missing = np.asarray(element["mask"][start : start + len(block)], dtype=bool)
            yield pc.if_else(pa.array(missing), pa.scalar(None, pa.large_string()), block)
            start += len(block)


ObsTable = HeldCells | StoredCells
"""A table of cells; `columns`, `index`, `len`, `in` and `[]` behave as on a data frame."""


def _categories(blocks: Iterator[pa.LargeStringArray]) -> pd.Categorical:
    """Return blocks of text as one categorical, with categories in order of appearance."""
    kind = pa.dictionary(pa.int32(), pa.large_string())
    coded = (
        pa.chunked_array([block.dictionary_encode() for block in blocks], kind).unify_dictionaries().combine_chunks()
    )
    names = coded.dictionary.to_numpy(zero_copy_only=False)
    return pd.Categorical.from_codes(
        coded.indices.fill_null(-1).to_numpy(zero_copy_only=False), pd.Index(names, dtype=object)
    )


def stored_cells(group: Any, matrix: StoredMatrix) -> ObsTable:
    """Return the `obs` beside a stored matrix: read by columns if its encoding is the current one, else read whole."""
    element, url = group["obs"], matrix.url
    encoding = {name: text_of(element.attrs.get(name, "")) for name in ("encoding-type", "encoding-version", "_index")}
    with refusing_damage(f"{url}: {OBS_OR_VAR}"):
        refuse_missing_filter(element, f"{url}: obs")
        if (encoding["encoding-type"], encoding["encoding-version"]) == ("dataframe", "0.2.0") and is_group(element):
            rows = _named_rows(element[encoding["_index"]])
            if rows is not None:
                cells = StoredCells(url, matrix.container, f"{matrix.folder}obs", rows)
                cells.sample()
                return cells
    return HeldCells(read_frame(group, "obs", url))


def _named_rows(index: Any) -> int | None:
    """Return the number of names in a text index; None if the index is not text or a name is missing.

    anndata writes the index as a text array; from version 0.13 with pandas 3, as a nullable text array.
    """
    kind = text_of(index.attrs.get("encoding-type", ""))
    if not is_group(index):
        return int(index.shape[0]) if kind == TEXT else None
    if kind != NULLABLE_TEXT or np.asarray(index["mask"][...], dtype=bool).any():
        return None
    return int(index["values"].shape[0])
