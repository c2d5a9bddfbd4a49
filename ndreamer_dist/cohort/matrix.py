"""Matrices of cells x genes that are read by ranges of rows: in memory, or as blocks of a dask array.

Every kind returns the same: CSR float32 with sorted indices, without stored zeros, each gene once per cell. Where a
cell holds a gene twice, the values are added, as scipy, anndata and scanpy do; `tidied` counts them. Matrices are cheap
to send to a task. `stored.py` has the matrices in files.
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
        """What every value is multiplied by: the natural logarithm of a base, where values are logarithms to that base."""
        ...

    def raw_rows(self, start: int, stop: int) -> Any:
        """Return the rows `start:stop` as they are held, dense or sparse (see `csr_rows`)."""
        ...


@dataclass(frozen=True)
class MemoryMatrix:
    """A matrix in memory: the caller's own, or a handle to the one copy that tasks share.

    Of a dask array, dense or of sparse blocks, a task computes the blocks that hold its rows.
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
        """Return the same matrix with its values put once where tasks can see them."""
        return replace(self, values=runtime.put(self.values), shared=True)


def memory_matrix(values: Any) -> MemoryMatrix:
    """Return a matrix of an AnnData; `CohortError` where it is none of numbers."""
    if is_dask(values) and values.ndim == 2:
        check_numbers(values.dtype, "the AnnData: the matrix")
        rows, genes = (int(n) for n in values.shape)
        # Along one row lies one block: a task then computes what it returns and nothing else.
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
    """Refuse what is not whole or real numbers: an imaginary part, say, would be lost without a word."""
    if np.dtype(dtype).kind not in "iuf":
        msg = f"{where} holds {np.dtype(dtype).name} values; expected counts or log-normalised expression"
        raise CohortError(msg)


def widened(values: np.ndarray) -> np.ndarray:
    """Return values of half precision in single precision, since scipy makes no sparse matrix of them; others as they are."""
    return values.astype(np.float32) if values.dtype == np.float16 else values


def tidied(values: Any) -> tuple[sparse.csr_matrix, int]:
    """Return values as CSR float32, indices sorted, each gene once a cell, no stored zeros; the input is not changed.

    The second value is how many were added to another of the same cell and gene.
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
    """Return the rows `start:stop` as `csr_rows` does, and how many values were added to others."""
    rows, repeated = tidied(matrix.raw_rows(start, stop))
    if matrix.factor == 1.0:
        return rows, repeated
    data = rows.data * np.float32(matrix.factor)
    return sparse.csr_matrix((data, rows.indices, rows.indptr), shape=rows.shape, copy=False), repeated


def csr_rows(matrix: Matrix, start: int, stop: int) -> sparse.csr_matrix:
    """Return the rows `start:stop`: (rows, genes) CSR float32, sorted indices, each gene once a cell, no stored zeros."""
    return rows_and_repeats(matrix, start, stop)[0]
