"""Results as an AnnData of dask arrays: every layer, stored or computed, is read block by block on demand.

Input: a reader, cells and genes. Output: an AnnData whose `X`, layers and `obsm` are dask arrays, for use out of core in
scanpy, anndata and dask. Stored layers have the chunks of the store; computed layers have blocks of its rows. The values
are those of the reader, bit by bit.
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
"""Values of a computed block at most, about: 32 MB."""


class LazyBlocks(Protocol):
    """What a block of an array is read by."""

    def read(self, rows: np.ndarray, columns: np.ndarray) -> Any:
        """Return some packed rows and columns."""
        ...


@dataclass(frozen=True)
class StoredBlocks:
    """An array of the store."""

    storage: Storage
    name: str

    def read(self, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """See `LazyBlocks.read`."""
        return read_dense(self.storage, self.name, rows, columns)


@dataclass(frozen=True)
class ComputedBlocks:
    """What is computed through the matches."""

    question: Question
    counterparts: Counterparts
    expression: Expression

    def read(self, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """See `LazyBlocks.read`."""
        rows = rows + self.counterparts.design.first_row
        return compute(self.question, self.counterparts, self.expression, rows, columns)


@dataclass(frozen=True)
class ExpressionBlocks:
    """The expression that went in, sparse; of cells that are mapped onto others after the rows of these."""

    expression: Expression
    first: int = 0

    def read(self, rows: np.ndarray, columns: np.ndarray) -> sparse.csr_matrix:
        """See `LazyBlocks.read`."""
        wanted, back = np.unique(rows, return_inverse=True)
        return self.expression.read(wanted + self.first, columns)[back]


@dataclass(frozen=True)
class LazyParts:
    """Cells and genes of a lazy AnnData, and how its blocks are cut.

    Attributes
    ----------
    rows, columns
        Packed rows of the cells and places of the genes, in the order asked for.
    block_rows
        Rows of a block, those of the store.
    token
        What tells these results, cells and genes from others.
    """

    rows: np.ndarray
    columns: np.ndarray
    block_rows: int
    token: str

    def array(
        self, name: str, blocks: LazyBlocks, *, genes: int | None = None, columns: np.ndarray | None = None
    ) -> da.Array:
        """Return an array of dask whose blocks are dense; `genes` of them in one, by default as many as are held well."""
        places = self.columns if columns is None else columns
        step = genes or max(1, COMPUTED_VALUES // self.block_rows)
        return self._mapped(name, blocks, places, step, np.empty((0, 0), dtype=np.float32))

    def sparse_array(self, name: str, blocks: LazyBlocks) -> da.Array:
        """Return an array of dask whose blocks are CSR and hold all genes."""
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
    """Return cells and genes of results as an AnnData of dask arrays.

    Parameters
    ----------
    tables
        `obs` and `var` of these cells and genes.
    stored
        Whether the genes are the modelled ones, so that layers may be read where they are stored.
    questions
        What is computed, by the name of its layer.
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
        if reader.storage.node(f"obsm/{name}") is None:  # a space that was not trained has none of a network's
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
    """Return the questions for effects of conditions and for expression under them, by the names of their layers."""
    questions = {f"effect_{name}": effect_question(code(name), 0) for name in effects}
    return questions | {f"counterfactual_{name}": counterfactual_question(code(name)) for name in counterfactuals}


def token_of(*what: Any) -> str:
    """Return a text that is the same for the same results, cells and genes."""
    return str(tokenize(*what))
