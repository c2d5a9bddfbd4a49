"""The table of a cohort's cells, read column by column: where it is stored, no process holds it whole.

Input: `obs` of a store, or a data frame in memory. Output: single columns, names block by block, or the whole table for
those who ask for it. A column of text comes as categories; its rows can be had as Arrow, without an object a cell.
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
    """A table in memory, read as `StoredCells` is."""

    held: pd.DataFrame

    @property
    def columns(self) -> pd.Index:
        """See `StoredCells`."""
        return self.held.columns

    @property
    def index_name(self) -> Any:
        """See `StoredCells`."""
        return self.held.index.name

    @property
    def index(self) -> pd.Index:
        """See `StoredCells`."""
        return self.held.index.astype(str)

    def __len__(self) -> int:
        return len(self.held)

    def __contains__(self, name: object) -> bool:
        return name in self.held

    def __getitem__(self, name: str) -> pd.Series:
        return self.held[name]

    def names(self) -> Iterator[np.ndarray]:
        """See `StoredCells.names`."""
        for start in range(0, len(self.held), TEXT_BLOCK):
            yield np.array(list(map(str, self.held.index[start : start + TEXT_BLOCK])), dtype=object)

    def text(self, name: str | None) -> pa.LargeStringArray | None:
        """Return the names of the cells where no column is named; what a column of objects holds is not known here."""
        return as_texts(self.index) if name is None else None

    def sample(self) -> pd.DataFrame:
        """Return all rows, since a column of objects may hold anything in any of them."""
        return self.held

    def frame(self) -> pd.DataFrame:
        """See `StoredCells.frame`."""
        return self.held.copy()

    def assign(self, **columns: pd.Series) -> HeldCells:
        """See `StoredCells.assign`."""
        return HeldCells(self.held.assign(**{name: values.array for name, values in columns.items()}))


@dataclass(frozen=True)
class StoredCells:
    """A table in an h5ad file or a zarr store; every process opens it for itself.

    Attributes
    ----------
    place
        Where it is in the store: `obs`, or that of a modality.
    added
        Columns that were set later.
    """

    url: str
    container: Container
    place: str
    rows: int
    added: Mapping[str, pd.Series] = field(default_factory=dict)

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}  # the open file stays where it is

    @cached_property
    def _group(self) -> Any:
        return open_root(self.url, self.container)[self.place]

    @cached_property
    def columns(self) -> pd.Index:
        """Names of the columns."""
        own = [text_of(name) for name in self._group.attrs["column-order"]]
        return pd.Index([*own, *(name for name in self.added if name not in own)], dtype=object)

    @cached_property
    def _index(self) -> str:
        return text_of(self._group.attrs["_index"])

    @property
    def index_name(self) -> str | None:
        """Name of the index; none where it has none."""
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
        """Return a column; one of text as categories."""
        if name in self.added:
            return self.added[name]
        with refusing_damage(f"{self.url}: {OBS_OR_VAR}"):
            values = _categories(self._blocks(name)) if self._is_text(name) else read_elem(self._group[name])
            return pd.Series(values, name=name)

    def names(self) -> Iterator[np.ndarray]:
        """Give the names of the cells, block by block."""
        with refusing_damage(f"{self.url}: {OBS_OR_VAR}"):
            for block in self._blocks(self._index):
                for start in range(0, len(block), TEXT_BLOCK):
                    yield block[start : start + TEXT_BLOCK].to_numpy(zero_copy_only=False)

    def text(self, name: str | None) -> pa.LargeStringArray | None:
        """Return a column of text, or where none is named the cells' names; nothing where it is of another kind."""
        if name in self.added or not self._is_text(name or self._index):
            return None
        with refusing_damage(f"{self.url}: {OBS_OR_VAR}"):
            return joined(list(self._blocks(name or self._index)))

    def sample(self) -> pd.DataFrame:
        """Return the first row, having read every column once: each has a type, so that one value tells what it holds."""
        return self._first

    @cached_property
    def _first(self) -> pd.DataFrame:
        with refusing_damage(f"{self.url}: {OBS_OR_VAR}"):
            first = {name: self._head(name) for name in self.columns}
            return pd.DataFrame(first, index=self._head(self._index), columns=self.columns).rename_axis(self.index_name)

    def _head(self, name: str) -> Any:
        """Return the first value of a column, of which all are read; `ValueError` where they are not one a cell."""
        if self._is_text(name):
            blocks = iter(self._blocks(name))
            first = next(blocks, pa.array([], pa.large_string()))
            rows = len(first) + sum(map(len, blocks))
            values: Any = pd.array(
                first[:1].to_pylist(), dtype="string" if self._kind(name) == NULLABLE_TEXT else object
            )
        else:
            values = self[name]
            rows = len(values)
        if rows != self.rows:
            msg = f"column {name!r} has {rows} rows, others have {self.rows}"
            raise ValueError(msg)
        head = values[:1]
        return head.cat.remove_unused_categories() if isinstance(head.dtype, pd.CategoricalDtype) else head

    def frame(self) -> pd.DataFrame:
        """Return the whole table."""
        table = read_frame(open_root(self.url, self.container), self.place, self.url)
        return table.assign(**{name: values.set_axis(table.index) for name, values in self.added.items()})

    def assign(self, **columns: pd.Series) -> StoredCells:
        """Return the table with columns set, as a data frame's `assign` does."""
        return replace(self, added={**self.added, **columns})

    def _kind(self, name: str) -> str:
        return text_of(self._group[name].attrs.get("encoding-type", ""))

    def _is_text(self, name: str) -> bool:
        return self._kind(name) in (TEXT, NULLABLE_TEXT)

    def _blocks(self, name: str) -> Iterator[pa.LargeStringArray]:
        """Give a column of text, block by block."""
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
"""A table of cells; `columns`, `index`, `len`, `in` and `[]` mean what they do of a data frame."""


def _categories(blocks: Iterator[pa.LargeStringArray]) -> pd.Categorical:
    """Return text as categories, in order of appearance."""
    kind = pa.dictionary(pa.int32(), pa.large_string())
    coded = (
        pa.chunked_array([block.dictionary_encode() for block in blocks], kind).unify_dictionaries().combine_chunks()
    )
    names = coded.dictionary.to_numpy(zero_copy_only=False)
    return pd.Categorical.from_codes(
        coded.indices.fill_null(-1).to_numpy(zero_copy_only=False), pd.Index(names, dtype=object)
    )


def stored_cells(group: Any, matrix: StoredMatrix) -> ObsTable:
    """Return the `obs` of a store that holds a matrix: by columns where it is written as it is today, else read whole."""
    element, url = group["obs"], matrix.url
    told = {name: text_of(element.attrs.get(name, "")) for name in ("encoding-type", "encoding-version", "_index")}
    with refusing_damage(f"{url}: {OBS_OR_VAR}"):
        if hasattr(group, "filename"):
            refuse_missing_filter(element, f"{url}: obs")
        if (told["encoding-type"], told["encoding-version"]) == ("dataframe", "0.2.0") and is_group(element):
            rows = _named_rows(element[told["_index"]])
            if rows is not None:
                cells = StoredCells(url, matrix.container, f"{matrix.folder}obs", rows)
                cells.sample()
                return cells
    return HeldCells(read_frame(group, "obs", url))


def _named_rows(index: Any) -> int | None:
    """Return how many names an index of text holds; none where it is of another kind, or a name is missing.

    anndata writes it as an array of text; from 0.13 on, beside pandas 3, as one that may hold missing values.
    """
    kind = text_of(index.attrs.get("encoding-type", ""))
    if not is_group(index):
        return int(index.shape[0]) if kind == TEXT else None
    if kind != NULLABLE_TEXT or np.asarray(index["mask"][...], dtype=bool).any():
        return None
    return int(index["values"].shape[0])
