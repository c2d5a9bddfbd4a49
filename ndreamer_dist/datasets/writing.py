"""Write a simulated cohort and its truth as zarr stores, chunk by chunk; the root metadata is written last."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Any, Final

import numpy as np
import zarr
from numpy.typing import NDArray

from ndreamer_dist import keys
from ndreamer_dist.datasets.parameters import CELL_PREFIX, CELL_TYPE, CONDITION, DONOR, Names, Parameters, StateLaw
from ndreamer_dist.datasets.sampling import Chunk
from ndreamer_dist.storage.arrays import create_array, open_array, read_array, write_array
from ndreamer_dist.storage.files import Storage

ENTRIES_CHUNK: Final = 1 << 20  # entries of the sparse matrix per zarr chunk
CELLS_CHUNK: Final = 1 << 15  # cells per zarr chunk


class _Column:
    """A one-dimensional zarr array that grows: `add` takes pieces of any length, and whole chunks are written."""

    def __init__(self, storage: Storage, name: str, dtype: Any, chunk: int, attributes: dict[str, Any] | None) -> None:
        fill: Any = "" if dtype == "string" else 0
        create_array(
            storage, name, shape=(0,), dtype=dtype, chunks=(chunk,), fill_value=fill, attributes=attributes or {}
        )
        self._array = open_array(storage, name, mode="r+")
        self._chunk, self._written, self._held = chunk, 0, 0
        self._parts: list[NDArray[Any]] = []

    def add(self, values: NDArray[Any]) -> None:
        self._parts.append(values)
        self._held += len(values)
        if self._held >= self._chunk:
            self._flush(self._held - self._held % self._chunk)

    def close(self) -> None:
        self._flush(self._held)

    def _flush(self, count: int) -> None:
        if not count:
            return
        values = np.concatenate(self._parts)
        self._array.resize((self._written + count,))
        self._array[self._written : self._written + count] = values[:count]
        self._parts, self._held = [values[count:].copy()], self._held - count
        self._written += count


class Writer:
    """Write a cohort and its truth chunk by chunk; `close` writes the root metadata of both."""

    def __init__(self, cohort: Storage, truth: Storage, names: Names) -> None:
        self.cohort, self.truth, self.names = cohort, truth, names
        self.entries, self.cells = 0, 0
        array = {"encoding-type": "array", "encoding-version": "0.2.0"}
        text = {"encoding-type": "string-array", "encoding-version": "0.2.0"}
        self._columns = {
            "data": _Column(cohort, f"X/{keys.DATA}", "float32", ENTRIES_CHUNK, None),
            "indices": _Column(cohort, f"X/{keys.INDICES}", "int32", ENTRIES_CHUNK, None),
            "name": _Column(cohort, "obs/_index", "string", CELLS_CHUNK, text),
            "state": _Column(truth, "cells/state", "float32", CELLS_CHUNK, None),
            "library": _Column(truth, "cells/library", "float32", CELLS_CHUNK, None),
            "nnz": _Column(truth, "cells/nnz", "int32", CELLS_CHUNK, None),
        }
        for key in (CELL_TYPE, CONDITION, DONOR):
            self._columns[key] = _Column(cohort, f"obs/{key}/codes", "int16", CELLS_CHUNK, array)
            self._columns[f"true {key}"] = _Column(truth, f"cells/{key}", "int16", CELLS_CHUNK, None)

    def add(self, chunk: Chunk) -> None:
        """Append the rows of a chunk."""
        columns, cells = self._columns, chunk.cells
        columns["data"].add(chunk.data)
        columns["indices"].add(chunk.indices)
        columns["name"].add(np.array([f"{CELL_PREFIX}{self.cells + i:07d}" for i in range(len(cells))]))
        columns["state"].add(cells.state)
        columns["library"].add(cells.library)
        columns["nnz"].add(chunk.row_nnz.astype(np.int32))
        for key in (CELL_TYPE, CONDITION, DONOR):
            codes = getattr(cells, key).astype(np.int16)
            columns[key].add(codes)
            columns[f"true {key}"].add(codes)
        self.entries += len(chunk.data)
        self.cells += len(cells)

    def close(self, parameters: Parameters, law: StateLaw) -> None:
        """Write the rest, and last the root metadata, without which neither store opens."""
        for column in self._columns.values():
            column.close()
        self._write_indptr()
        for field in fields(parameters):
            write_array(self.truth, field.name, getattr(parameters, field.name))
        _group(self.truth, "", {"format": keys.FORMAT_VERSION, "cells": self.cells} | _of_state(law))
        self._frame("obs", [CELL_TYPE, CONDITION, DONOR])
        for key, categories in self.names.categories.items():
            _strings(self.cohort, f"obs/{key}/categories", categories)
            _group(self.cohort, f"obs/{key}", {**_encoding("categorical", "0.2.0"), "ordered": False})
        self._frame("var", [])
        _strings(self.cohort, "var/_index", self.names.genes)
        shape = [self.cells, len(self.names.genes)]
        _group(self.cohort, "X", {**_encoding("csr_matrix", "0.1.0"), "shape": shape})
        _group(self.cohort, "", _encoding("anndata", "0.1.0"))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # zarr warns that other implementations may not read consolidated metadata
            zarr.consolidate_metadata(self.cohort.store())

    def _write_indptr(self) -> None:
        """Write `indptr`, after the number of entries is known: int32 like `indices` if they fit, as scipy expects."""
        dtype = np.int32 if self.entries < 2**31 else np.int64
        indptr = _Column(self.cohort, f"X/{keys.INDPTR}", dtype, CELLS_CHUNK, None)
        indptr.add(np.zeros(1, dtype))
        end = 0
        for start in range(0, self.cells, CELLS_CHUNK):
            counted = read_array(self.truth, "cells/nnz", slice(start, start + CELLS_CHUNK))
            ends = end + np.cumsum(counted, dtype=np.int64)
            indptr.add(ends.astype(dtype))
            end = int(ends[-1])
        indptr.close()

    def _frame(self, name: str, columns: list[str]) -> None:
        _group(self.cohort, name, {**_encoding("dataframe", "0.2.0"), "_index": "_index", "column-order": columns})


def _of_state(law: StateLaw) -> dict[str, float]:
    """Return the fields of a state law that are not 0, as attributes of the truth."""
    return {f"state_{name}": value for name, value in asdict(law).items() if value}


def _encoding(kind: str, version: str) -> dict[str, Any]:
    return {"encoding-type": kind, "encoding-version": version}


def _group(storage: Storage, name: str, attributes: dict[str, Any]) -> None:
    zarr.create_group(storage.store(name), attributes=attributes)


def _strings(storage: Storage, name: str, values: Sequence[str]) -> None:
    column = _Column(storage, name, "string", max(1, len(values)), _encoding("string-array", "0.2.0"))
    column.add(np.array(values))
    column.close()
