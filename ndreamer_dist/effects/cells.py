"""Encode `obs` of results.zarr column by column, so that no process holds more than one column.

Input: the `obs` of the input cohort, the input row of every packed row, and our own columns. Output: the files of
`obs`, one after the other. anndata encodes each column. Text is encoded in blocks of rows, since every value is a
Python object.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import zarr
from zarr.storage import MemoryStore

from ndreamer_dist import keys
from ndreamer_dist.cohort.cells import ObsTable
from ndreamer_dist.cohort.packed import Packed
from ndreamer_dist.effects.tables import ROOT, writable, write_element

TEXT_ROWS = 65_536
"""Number of rows per chunk of a text column."""
_OBS = "obs"

Take = Callable[[slice], pd.Series]
"""Function that returns a slice of a column, in packed order."""


@dataclass(frozen=True)
class CellTable:
    """The table `obs`: every column of the input, unchanged, then our columns; all in packed order.

    Attributes
    ----------
    cells
        `obs` of the input.
    rows
        (cells,) input row of every packed row.
    ours
        Functions that make our columns, by column name.
    """

    cells: ObsTable
    rows: np.ndarray
    ours: Mapping[str, Callable[[], Any]]

    def files(self) -> Iterator[tuple[str, bytes]]:
        """Yield the files of `obs`, as (name, content), one column after the other."""
        names = [*self.cells.columns, *self.ours]
        index_name = self._index_name()
        yield _header(names, index_name)
        if index_name not in names:
            yield from self._files(index_name or "_index", self._names())
        for name in names:
            yield from self._files(name, self._take(name))

    def _files(self, name: str, take: Take) -> Iterator[tuple[str, bytes]]:
        count = len(self.rows)
        first = take(slice(0, 1))
        text = first.dtype == object or isinstance(first.dtype, pd.StringDtype)
        step = TEXT_ROWS if text and count > TEXT_ROWS else count
        for number, start in enumerate(range(0, count, step)):
            values = take(slice(start, min(start + step, count)))
            for file, data in _encoded(name, values, step if step < count else None).items():
                if step == count:
                    yield file, data
                elif not file.endswith(ROOT):
                    yield f"{file.removesuffix('/0')}/{number}", data
                elif number == 0:
                    yield file, _with_rows(data, count)

    def _names(self) -> Take:
        """Return the function that reads the cells' names."""
        return self._of_texts(self.cells.text(None), object)

    def _take(self, name: str) -> Take:
        """Return the function that reads a column."""
        if name in self.ours:
            values = pd.Series(self.ours[name]())
            return lambda part: values.iloc[part]
        texts = self.cells.text(name)
        if texts is not None:
            return self._of_texts(texts, self.cells.sample()[name].dtype)
        held = writable(self.cells[name].to_frame(name), _OBS)[name]
        return lambda part: held.iloc[self.rows[part]]

    def _of_texts(self, texts: pa.LargeStringArray | None, dtype: Any) -> Take:
        def take(part: slice) -> pd.Series:
            here = pc.take(texts, pa.array(self.rows[part])).to_numpy(zero_copy_only=False)
            return pd.Series(here, dtype=object).astype(dtype)

        return take

    def _index_name(self) -> str | None:
        """Return the name of the index; None if a column with other values has the same name."""
        name = self.cells.index_name
        if name is None or name not in self.cells:
            return name
        names, column = self._names(), self._take(name)
        parts = (slice(start, start + TEXT_ROWS) for start in range(0, len(self.rows), TEXT_ROWS))
        return name if all(pd.Index(names(part)).equals(pd.Index(column(part))) for part in parts) else None


def cell_table(source: Any, packed: Packed, columns: Mapping[str, Any], *, clustered: bool = True) -> CellTable:
    """Return the cells' table of a run.

    Parameters
    ----------
    columns
        Our last columns, in packed order, or functions that make them, by name.
    clustered
        Whether the run has clusters; it has none if nothing needs them.
    """
    design = packed.design
    groups = design.own_groups
    sizes = [group.cells for group in groups]

    def named(codes: Sequence[int], names: Sequence[str]) -> Any:
        return pd.Categorical.from_codes(np.repeat(np.array(codes, dtype=np.int32), sizes), pd.Index(list(names)))

    ours: dict[str, Any] = {
        keys.OBS_CONDITION: partial(named, [group.condition for group in groups], design.conditions),
        keys.OBS_BATCH: partial(named, [group.batch for group in groups], design.batches),
        keys.OBS_GROUP: partial(named, [group.code for group in groups], [group.name for group in design.groups]),
    }
    if clustered:
        ours[keys.OBS_LOW] = partial(packed.clusters, keys.PACKED_LOW)
        ours[keys.OBS_HIGH] = partial(packed.clusters, keys.PACKED_HIGH)
    ours = {**ours, keys.OBS_INPUT_ROW: packed.input_row, **columns}
    return CellTable(
        source.cells,
        packed.input_row,
        {name: value if callable(value) else partial(lambda held: held, value) for name, value in ours.items()},
    )


def _encoded(name: str, column: pd.Series, chunk_rows: int | None) -> dict[str, bytes]:
    """Return the files of a column, or of some of its rows, by name."""
    files: dict[str, Any] = {}
    group = zarr.open_group(MemoryStore(files), mode="w", zarr_format=3).create_group(_OBS)
    write_element(group, name, column.to_numpy() if isinstance(column.dtype, np.dtype) else column.array, chunk_rows)
    own = sorted(file for file in files if file.startswith(f"{_OBS}/{name}/"))
    return {file: files.pop(file).to_bytes() for file in own}


def _header(names: Sequence[str], index_name: str | None) -> tuple[str, bytes]:
    """Return the metadata file of `obs`, which lists its columns."""
    files: dict[str, Any] = {}
    table = pd.DataFrame("", columns=list(names), index=pd.Index([""], name=index_name))
    write_element(zarr.open_group(MemoryStore(files), mode="w", zarr_format=3), _OBS, table)
    return f"{_OBS}/{ROOT}", files[f"{_OBS}/{ROOT}"].to_bytes()


def _with_rows(metadata: bytes, count: int) -> bytes:
    """Return the metadata of a column's first rows as that of all; a group's as it is."""
    fields = json.loads(metadata)
    return json.dumps(fields | {"shape": [count]}, indent=2).encode() if fields["node_type"] == "array" else metadata
