"""Coordinates in the `obsm` of the input, and columns of its `obs` that a matching space needs.

Input: an opened cohort and a key. Output: a dense float32 array, or codes, in input order. What cannot serve for
matching is refused here, before work starts: an unknown key, sparse or non-numeric values, a wrong length, values that
are not finite.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import h5py
import numpy as np
import pandas as pd
import zarr
from anndata.io import read_elem
from scipy import sparse

from ndreamer_dist.cohort.matrix import MemoryMatrix, is_dask
from ndreamer_dist.cohort.source import Source
from ndreamer_dist.cohort.stored import open_root, refusing_damage
from ndreamer_dist.errors import CohortError, listing, quoted, suggest

HASHED_ROWS = 65_536
"""Rows that are looked at at a time."""


@dataclass(frozen=True)
class CellLabels:
    """A label for every cell.

    Attributes
    ----------
    codes
        (cells,) int32 places in `names`, -1 where a cell has no label.
    names
        Of the labels.
    """

    codes: np.ndarray
    names: tuple[str, ...]


def coordinates_of(source: Source, key: str) -> np.ndarray:
    """Return the coordinates under a key of the input's `obsm`: (cells, d) float32, in input order.

    Raises
    ------
    CohortError
        There is no such key, or it does not hold a finite number per cell and dimension.
    """
    held = _obsm(source)
    if key not in held:
        names = [str(name) for name in held]
        there = f"it holds {listing(names)}" if names else "it is empty"
        msg = f"{source.name}: obsm has no {quoted(key)}; {there}.{suggest(key, names)}"
        raise CohortError(msg)
    where = f"{source.name}: obsm[{quoted(key)}]"
    with refusing_damage(where):
        values = _array(held[key], where)
    _check_shape(values, source.n_cells, where)
    made = values.astype(np.float32, copy=False)
    _check_finite(made, source, where)
    return made


def codes_of(source: Source, name: str, setting: str) -> np.ndarray:
    """Return the codes of a column of the input's `obs`; see `column_labels`."""
    return column_labels(source, name, setting).codes


def column_labels(source: Source, name: str, setting: str) -> CellLabels:
    """Return a column of the input's `obs` as labels, in input order; names in order of appearance.

    Raises
    ------
    CohortError
        There is no such column.
    """
    if name not in source.cells:
        names = [str(column) for column in source.cells.columns]
        msg = f"{setting}: obs has no column {quoted(name)}; it has {listing(names)}.{suggest(name, names)}"
        raise CohortError(msg)
    codes, found = pd.factorize(source.cells[name].astype("string"))
    return CellLabels(np.asarray(codes, dtype=np.int32), tuple(map(str, found)))


def checksum(values: np.ndarray) -> str:
    """Return the sha256 of an array's values."""
    found = hashlib.sha256(f"{values.shape} {values.dtype.str}".encode())
    for start in range(0, len(values), HASHED_ROWS):
        found.update(np.ascontiguousarray(values[start : start + HASHED_ROWS]).tobytes())
    return found.hexdigest()


def _obsm(source: Source) -> Any:
    """Return the input's `obsm`, of which nothing is read yet where it is stored."""
    if source.obsm is not None:
        return source.obsm
    if isinstance(source.matrix, MemoryMatrix):
        return {}
    return open_root(source.matrix.url, source.matrix.container).get(f"{source.matrix.folder}obsm", {})


def _array(element: Any, where: str) -> np.ndarray:
    """Return what lies under a key as a dense array of floats; refuse all else by its type."""
    values = element
    if isinstance(element, h5py.Dataset | zarr.Array):  # other programs write arrays without anndata's attributes
        values = np.asarray(element[...])
    elif isinstance(element, h5py.Group | zarr.Group):
        values = read_elem(element)
    elif is_dask(element):
        values = element.compute()
    elif hasattr(element, "to_memory"):  # a table of a lazy AnnData
        values = element.to_memory()
    if isinstance(values, pd.DataFrame):
        _refuse_columns((str(name) for name, kind in values.dtypes.items() if not _is_float(kind)), where)
        values = values.to_numpy(dtype=np.float64)
    if sparse.issparse(values) or not isinstance(values, np.ndarray):
        msg = f"{where} is {type(values).__name__}; expected a dense array of floats, or a DataFrame of them"
        raise CohortError(msg)
    if not _is_float(values.dtype):
        msg = f"{where} holds {values.dtype.name} values; expected floats, the coordinates of an embedding"
        raise CohortError(msg)
    return values


def _is_float(dtype: Any) -> bool:
    return pd.api.types.is_float_dtype(dtype)


def _refuse_columns(names: Iterable[str], where: str) -> None:
    if found := list(names):
        msg = f"{where} has columns that are no floats: {listing(found)}; expected the coordinates of an embedding"
        raise CohortError(msg)


def _check_shape(values: np.ndarray, cells: int, where: str) -> None:
    if values.ndim != 2 or values.shape[0] != cells or not values.shape[1]:
        msg = f"{where} has shape {values.shape}; expected ({cells}, d), a row for every cell of the cohort"
        raise CohortError(msg)


def _check_finite(values: np.ndarray, source: Source, where: str) -> None:
    for start in range(0, len(values), HASHED_ROWS):
        finite = np.isfinite(values[start : start + HASHED_ROWS]).all(axis=1)
        if not finite.all():
            row = start + int(np.flatnonzero(~finite)[0])
            cell = quoted(source.cell_name(row))
            msg = f"{where} is not finite in cell {cell} (row {row}); every cell needs a place, so leave such cells out"
            raise CohortError(msg)
