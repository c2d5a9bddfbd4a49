"""Read what a matching space needs of the input: coordinates in `obsm`, and columns of `obs` as labels.

Input: an opened cohort and a key. Output: a dense float32 array, or codes, in input order. Coordinates that cannot be
matched are refused here, before work starts: an unknown key, sparse or non-numeric values, a wrong length, values that
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
"""Rows of a block that is checked or hashed at once."""


@dataclass(frozen=True)
class CellLabels:
    """A label per cell.

    Attributes
    ----------
    codes
        (cells,) int32 indices into `names`; -1 for cells without a label.
    names
        Names of the labels.
    """

    codes: np.ndarray
    names: tuple[str, ...]


def coordinates_of(source: Source, key: str) -> np.ndarray:
    """Return `obsm[key]` of the input: (cells, d) float32, in input order.

    Raises
    ------
    CohortError
        There is no such key, or its value is not a dense float array of shape (cells, d) with finite values.
    """
    obsm = _obsm(source)
    if key not in obsm:
        names = [str(name) for name in obsm]
        there = f"it holds {listing(names)}" if names else "it is empty"
        msg = f"{source.name}: obsm has no {quoted(key)}; {there}.{suggest(key, names)}"
        raise CohortError(msg)
    where = f"{source.name}: obsm[{quoted(key)}]"
    with refusing_damage(where):
        values = _array(obsm[key], where)
    _check_shape(values, source.n_cells, where)
    coordinates = values.astype(np.float32, copy=False)
    _check_finite(coordinates, source, where)  # after the cast: float32 may overflow
    return coordinates


def column_labels(source: Source, name: str, setting: str) -> CellLabels:
    """Return a column of the input's `obs` as labels, in input order; names in order of appearance.

    Parameters
    ----------
    setting
        Setting that names the column, for the error message.

    Raises
    ------
    CohortError
        There is no such column.
    """
    if name not in source.cells:
        names = [str(column) for column in source.cells.columns]
        msg = f"{setting}: obs has no column {quoted(name)}; it has {listing(names)}.{suggest(name, names)}"
        raise CohortError(msg)
    codes, labels = pd.factorize(source.cells[name].astype("string"))
    return CellLabels(np.asarray(codes, dtype=np.int32), tuple(map(str, labels)))


def checksum(values: np.ndarray) -> str:
    """Return the sha256 of an array's shape, dtype and values."""
    digest = hashlib.sha256(f"{values.shape} {values.dtype.str}".encode())
    for start in range(0, len(values), HASHED_ROWS):
        digest.update(np.ascontiguousarray(values[start : start + HASHED_ROWS]).tobytes())
    return digest.hexdigest()


def _obsm(source: Source) -> Any:
    """Return the input's `obsm`; the arrays of a stored one are not read yet."""
    if source.obsm is not None:
        return source.obsm
    if isinstance(source.matrix, MemoryMatrix):
        return {}
    return open_root(source.matrix.url, source.matrix.container).get(f"{source.matrix.folder}obsm", {})


def _array(element: Any, where: str) -> np.ndarray:
    """Read an element of `obsm` as a dense array of floats; `CohortError` names any other type."""
    values = element
    if isinstance(element, h5py.Dataset | zarr.Array):  # other programs omit the attributes that `read_elem` needs
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
    if columns := list(names):
        msg = f"{where} has columns that are no floats: {listing(columns)}; expected the coordinates of an embedding"
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
