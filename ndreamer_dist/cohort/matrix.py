"""Read cells x genes matrices in memory, or the blocks of a dask array, by ranges of rows.

Every kind of matrix returns CSR float32 with sorted indices, without stored zeros and with each gene once per cell. If
a cell stores a gene twice, the values are added, as scipy, anndata and scanpy do; `tidied` counts them. Matrices are
cheap to send to a task. Matrices in files are in `stored.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import numpy as np
from scipy import sparse

from ndreamer_dist.compute.executor import Runtime, fetch
from ndreamer_dist.errors import CohortError

Kind = Literal["csr", "csc", "dense"]


class Matrix(Protocol):
    """A cells x genes matrix that is read by ranges of rows; it can be sent to a task."""

    @property
    def shape(self) -> tuple[int, int]:
        """Cells and genes."""
        ...

    @property
    def factor(self) -> float:
        """Factor of every value; it turns logarithms to another base into natural ones, else it is 1."""
        ...

    def raw_rows(self, start: int, stop: int) -> Any:
        """Return the rows `start:stop` as they are stored, dense or sparse, without `factor` (see `csr_rows`)."""
        ...


@dataclass(frozen=True)
class MemoryMatrix:
    """A matrix in memory: the caller's own, or a handle to the copy in the object store that tasks share.

    If the values are a dask array, of dense or sparse blocks, a task computes only the blocks that hold its rows.
    """

    values: Any  # csr_matrix, csr_array, 2-d array or dask array; or a handle to one
    kind: Kind
    shape: tuple[int, int]
    nnz: int
    dtype: str
    shared: bool = False
    factor: float = 1.0

    def raw_rows(self, start: int, stop: int) -> Any:
        """See `Matrix.raw_rows`."""
        rows = (fetch(self.values) if self.shared else self.values)[start:stop]
        return rows.compute(scheduler="synchronous") if is_dask(rows) else rows

    def share(self, runtime: Runtime) -> MemoryMatrix:
        """Return the same matrix with its values in the runtime's object store, put there once for all tasks."""
        return replace(self, values=runtime.put(self.values), shared=True)


def memory_matrix(values: Any) -> MemoryMatrix:
    """Wrap a matrix of an AnnData; `CohortError` if it is not a two-dimensional matrix of real numbers."""
    if is_dask(values) and values.ndim == 2:
        check_numbers(values.dtype, "the AnnData: the matrix")
        rows, genes = (int(n) for n in values.shape)
        # Make each block span all genes, so that a task computes only the blocks of its rows.
        whole = values.rechunk({1: -1})
        return MemoryMatrix(whole, "dense", (rows, genes), rows * genes, str(values.dtype))
    if sparse.issparse(values) or isinstance(values, np.ndarray):
        check_numbers(values.dtype, "the AnnData: the matrix")
    if sparse.issparse(values):
        rows = values.tocsr()
        return MemoryMatrix(rows, "csr", rows.shape, int(rows.nnz), str(rows.dtype))
    if isinstance(values, np.ndarray) and values.ndim == 2:
        return MemoryMatrix(values, "dense", values.shape, int(values.size), str(values.dtype))
    what = "nothing" if values is None else type(values).__name__
    msg = f"the AnnData's matrix holds {what}; expected a sparse matrix or an array (or name a layer)"
    raise CohortError(msg)


def is_dask(values: Any) -> bool:
    """Return whether a matrix is a dask array."""
    return type(values).__module__.startswith("dask.")


def check_numbers(dtype: Any, where: str) -> None:
    """Refuse any dtype but integers and floats; the imaginary part of complex numbers, say, would be lost silently."""
    if np.dtype(dtype).kind not in "iuf":
        msg = f"{where} holds {np.dtype(dtype).name} values; expected counts or log-normalised expression"
        raise CohortError(msg)


def widened(values: np.ndarray) -> np.ndarray:
    """Convert float16 to float32, because scipy has no float16 sparse matrices; return other values unchanged."""
    return values.astype(np.float32) if values.dtype == np.float16 else values


def tidied(values: Any) -> tuple[sparse.csr_matrix, int]:
    """Return values as canonical CSR float32 without stored zeros, and how many duplicate entries were added up.

    Canonical: indices are sorted and each gene is stored once per cell. The input is not changed.
    """
    rows = sparse.csr_matrix(widened(values) if isinstance(values, np.ndarray) else values)
    changed = sparse.csr_matrix(
        (rows.data.astype(np.float32, copy=False), rows.indices, rows.indptr), shape=rows.shape, copy=False
    )
    if not changed.has_sorted_indices:
        changed = changed.sorted_indices()
    repeated = 0
    if not changed.has_canonical_format:
        changed = changed.copy()
        changed.sum_duplicates()
        repeated = int(rows.nnz - changed.nnz)
    if not changed.data.all():
        changed = changed.copy()
        changed.eliminate_zeros()
    return changed, repeated


def rows_and_repeats(matrix: Matrix, start: int, stop: int) -> tuple[sparse.csr_matrix, int]:
    """Return the rows `start:stop` as `csr_rows` does, and how many duplicate entries were added up."""
    rows, repeated = tidied(matrix.raw_rows(start, stop))
    if matrix.factor == 1.0:
        return rows, repeated
    data = rows.data * np.float32(matrix.factor)
    return sparse.csr_matrix((data, rows.indices, rows.indptr), shape=rows.shape, copy=False), repeated


def csr_rows(matrix: Matrix, start: int, stop: int) -> sparse.csr_matrix:
    """Return the rows `start:stop`: (rows, genes) canonical CSR float32 without stored zeros, times `factor`."""
    return rows_and_repeats(matrix, start, stop)[0]
