"""Represent results as an AnnData of dask arrays, whose blocks are read or computed on demand.

Input: a reader, cells and genes. Output: an AnnData whose `X`, layers and `obsm` are dask arrays, for work out of core
with scanpy, anndata and dask. Stored layers have the chunks of the store; computed layers have its row blocks. The
values equal those of the reader bit by bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import anndata
import dask.array as da
import numpy as np
import pandas as pd
from dask.base import tokenize
from scipy import sparse

from ndreamer_dist import keys
from ndreamer_dist.results.on_demand import (
    Counterparts,
    Expression,
    Question,
    compute,
    counterfactual_question,
    effect_question,
)
from ndreamer_dist.results.read import read_dense
from ndreamer_dist.storage.arrays import open_array
from ndreamer_dist.storage.files import Storage

COMPUTED_VALUES = 2**23
"""Approximate largest number of values of a computed block: 32 MB."""


class LazyBlocks(Protocol):
    """Source of the blocks of a dask array."""

    def read(self, rows: np.ndarray, columns: np.ndarray) -> Any:
        """Return packed rows and columns of the array, in the order of the arguments."""
        ...


@dataclass(frozen=True)
class StoredBlocks:
    """Blocks of a stored array."""

    storage: Storage
    name: str

    def read(self, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """See `LazyBlocks.read`."""
        return read_dense(self.storage, self.name, rows, columns)


@dataclass(frozen=True)
class ComputedBlocks:
    """Blocks that are computed through the matches."""

    question: Question
    counterparts: Counterparts
    expression: Expression

    def read(self, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """See `LazyBlocks.read`."""
        rows = rows + self.counterparts.design.first_row
        return compute(self.question, self.counterparts, self.expression, rows, columns)


@dataclass(frozen=True)
class ExpressionBlocks:
    """Blocks of the input expression, CSR; `first` is the row of the first cell, not 0 for mapped cells."""

    expression: Expression
    first: int = 0

    def read(self, rows: np.ndarray, columns: np.ndarray) -> sparse.csr_matrix:
        """See `LazyBlocks.read`."""
        wanted, back = np.unique(rows, return_inverse=True)
        return self.expression.read(wanted + self.first, columns)[back]


@dataclass(frozen=True)
class LazyParts:
    """Cells and genes of a lazy AnnData, and the shape of its blocks.

    Attributes
    ----------
    rows, columns
        Packed rows of the cells and positions of the genes, in the order of the AnnData.
    block_rows
        Rows of a block, as in the store.
    token
        Text that identifies the results, cells and genes; part of the names of the dask arrays.
    """

    rows: np.ndarray
    columns: np.ndarray
    block_rows: int
    token: str

    def array(
        self, name: str, blocks: LazyBlocks, *, genes: int | None = None, columns: np.ndarray | None = None
    ) -> da.Array:
        """Return a dask array of dense blocks.

        Parameters
        ----------
        genes
            Columns of a block; by default as many as give blocks of about `COMPUTED_VALUES`.
        columns
            Positions of the columns; by default those of the genes.
        """
        places = self.columns if columns is None else columns
        step = genes or max(1, COMPUTED_VALUES // self.block_rows)
        return self._mapped(name, blocks, places, step, np.empty((0, 0), dtype=np.float32))

    def sparse_array(self, name: str, blocks: LazyBlocks) -> da.Array:
        """Return a dask array of CSR blocks, each of which holds all genes."""
        meta = sparse.csr_matrix((0, 0), dtype=np.float32)
        return self._mapped(name, blocks, self.columns, len(self.columns), meta)

    def _mapped(self, name: str, blocks: LazyBlocks, columns: np.ndarray, step: int, meta: Any) -> da.Array:
        chunks = (_cuts(len(self.rows), self.block_rows), _cuts(len(columns), step))
        return da.map_blocks(
            _read, blocks, self.rows, columns, chunks=chunks, dtype=meta.dtype, meta=meta, name=f"{name}-{self.token}"
        )


def _read(blocks: LazyBlocks, rows: np.ndarray, columns: np.ndarray, block_info: Any = None) -> Any:
    (first, last), (left, right) = block_info[None]["array-location"]
    return blocks.read(rows[first:last], columns[left:right])


def _cuts(size: int, step: int) -> tuple[int, ...]:
    return tuple(min(step, size - start) for start in range(0, size, step))


def lazy_anndata(
    reader: Any,
    tables: tuple[pd.DataFrame, pd.DataFrame],
    parts: LazyParts,
    expression: Expression,
    *,
    stored: bool,
    questions: dict[str, Question],
) -> anndata.AnnData:
    """Return a part of some results as an AnnData of dask arrays.

    Parameters
    ----------
    reader
        The `ResultsReader`.
    tables
        `obs` and `var` of the cells and genes.
    stored
        Whether the genes are modelled ones, so that stored layers can be read.
    questions
        Question of every layer by name; it is only computed if the layer is not stored.
    """
    layers = {}
    for name, question in questions.items():
        if stored and name in reader.layers:
            chunk = int(open_array(reader.storage, f"layers/{name}").chunks[1])
            layers[name] = parts.array(name, StoredBlocks(reader.storage, f"layers/{name}"), genes=chunk)
        else:
            layers[name] = parts.array(name, ComputedBlocks(question, reader.counterparts, expression))
    obsm = {}
    for name in (keys.OBSM_MU, reader.embedding_key):
        if reader.storage.node(f"obsm/{name}") is None:  # a space without a network has no X_ndreamer
            continue
        width = np.arange(int(open_array(reader.storage, f"obsm/{name}").shape[1]))
        obsm[name] = parts.array(name, StoredBlocks(reader.storage, f"obsm/{name}"), columns=width)
    obs, var = tables
    return anndata.AnnData(
        X=parts.sparse_array("X", ExpressionBlocks(expression, reader.design.first_row)),
        obs=obs,
        var=var,
        layers=layers,
        obsm=obsm,
    )


def conditional_questions(
    effects: Sequence[str], counterfactuals: Sequence[str], code: Callable[[str], int]
) -> dict[str, Question]:
    """Return the questions for effects of and expression under conditions, by the names of their layers."""
    questions = {f"effect_{name}": effect_question(code(name), 0) for name in effects}
    return questions | {f"counterfactual_{name}": counterfactual_question(code(name)) for name in counterfactuals}


def token_of(*what: Any) -> str:
    """Return a text that identifies results, cells and genes: equal for equal arguments."""
    return str(tokenize(*what))
