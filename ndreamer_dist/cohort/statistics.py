"""Pass over the cohort once: check the values, and compute the sums that gene selection needs.

The rows, in input order, are cut into spans; the number of cells alone determines the spans. Each span is a task, which
reads one chunk at a time. Output: the total of each cell and, per group and gene, the sums of the normalised expression
without its log, and of its squares. The sums are float64 and in row order, so neither the chunk size nor the number of
workers changes a bit.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import sparse

from ndreamer_dist.cohort.matrix import Matrix, rows_and_repeats
from ndreamer_dist.cohort.source import Source
from ndreamer_dist.cohort.values import Decision, Values, named_value, refuse_value
from ndreamer_dist.compute.executor import Runtime
from ndreamer_dist.errors import CohortError
from ndreamer_dist.settings import CohortSettings

TARGET_SUM = 1e4
"""Counts per cell after scaling (METHOD section 1.1)."""
SPAN_ROWS = 65_536
"""Largest number of rows of a span, once there are 16 spans."""


@dataclass(frozen=True)
class Span:
    """A range of input rows that one task reads."""

    index: int
    start: int
    stop: int


@dataclass(frozen=True)
class Recipe:
    """How a pass treats the values."""

    normalise: Values
    genes: np.ndarray | None  # (genes,) bool, genes that are used; None for all
    min_genes: int  # expressed genes that a cell needs, else its values are ignored
    chunk_rows: int
    integers: bool  # whether a value that is not a whole number is an error, because the sample holds counts

    @classmethod
    def of(cls, decision: Decision, cohort: CohortSettings, genes: np.ndarray | None = None) -> Recipe:
        """Return the recipe for a decision about the values, with the genes `genes` or all of them."""
        return cls(decision.normalise, genes, cohort.min_genes, cohort.chunk_rows, decision.integers)


@dataclass(frozen=True)
class SpanSums:
    """What one span's task returns."""

    index: int
    totals: np.ndarray  # (rows,) float64 sum of each cell over the genes used
    detected: np.ndarray  # (rows,) int64 genes above zero, over all genes
    groups: np.ndarray  # (pairs,) codes of the (batch, condition) pairs in the span
    sums: np.ndarray  # (pairs, genes) float64
    squares: np.ndarray  # (pairs, genes) float64
    expressed: np.ndarray  # (genes,) int64 cells above zero
    bad: tuple[int, int, float] | None  # row, gene and value of the first NaN, infinite or negative value
    fractional: tuple[int, int, float] | None  # the same of the first value that is not a whole number
    repeated: int = 0  # duplicate entries that were added up


def spans_of(n_cells: int) -> list[Span]:
    """Cut the input rows into 16 spans; into more if these would exceed 65 536 rows, fewer if there are fewer rows."""
    count = max(1, min(n_cells, max(16, -(-n_cells // SPAN_ROWS))))
    edges = np.linspace(0, n_cells, count + 1).astype(np.int64)
    return [Span(i, int(a), int(b)) for i, (a, b) in enumerate(itertools.pairwise(edges))]


def chunks_of(span: Span, chunk_rows: int) -> Iterator[tuple[int, int]]:
    """Yield the row ranges, `start` and `stop`, in which a span is read."""
    for start in range(span.start, span.stop, chunk_rows):
        yield start, min(start + chunk_rows, span.stop)


def normalised(rows: sparse.csr_matrix, totals: np.ndarray) -> sparse.csr_matrix:
    """Return log1p(x / total * 10 000) in scanpy's float32 arithmetic, bit for bit.

    Parameters
    ----------
    rows
        (rows, genes) CSR float32 counts.
    totals
        (rows,) float64 sum of each cell over the genes used; a cell without counts is not scaled.
    """
    factors = totals.astype(np.float32) / np.float32(TARGET_SUM)
    factors[factors == 0] = 1
    data = np.log1p(rows.data / np.repeat(factors, np.diff(rows.indptr)))
    return sparse.csr_matrix((data, rows.indices, rows.indptr), shape=rows.shape, copy=False)


def scan_span(span: Span, matrix: Matrix, pairs: np.ndarray, recipe: Recipe) -> SpanSums:
    """Read a span once and return its sums; a task. It stops after a chunk with a NaN, infinite or negative value."""
    groups, local = np.unique(pairs[span.start : span.stop], return_inverse=True)
    n_genes = matrix.shape[1]
    sums, squares = np.zeros((len(groups), n_genes)), np.zeros((len(groups), n_genes))
    totals, detected = np.zeros(span.stop - span.start), np.zeros(span.stop - span.start, dtype=np.int64)
    expressed = np.zeros(n_genes, dtype=np.int64)
    bad = fractional = None
    repeated = 0
    for start, stop in chunks_of(span, recipe.chunk_rows):
        rows, again = rows_and_repeats(matrix, start, stop)
        repeated += again
        bad = _first(rows, ~(np.isfinite(rows.data) & (rows.data >= 0)), start)
        if bad is not None:
            break
        fractional = fractional or _first(rows, rows.data != np.floor(rows.data), start)
        here = slice(start - span.start, stop - span.start)
        detected[here] = np.diff(rows.indptr)
        rows = _without(rows, detected[here] >= recipe.min_genes, recipe.genes)
        cell = np.repeat(np.arange(stop - start), np.diff(rows.indptr))
        totals[here] = np.bincount(cell, weights=rows.data.astype(np.float64), minlength=stop - start)
        expressed += np.bincount(rows.indices, minlength=n_genes)
        values = np.expm1(normalised(rows, totals[here]).data if recipe.normalise == "counts" else rows.data)
        flat = local[here][cell] * n_genes + rows.indices
        # np.add.at adds one value at a time in row order, so the sums do not depend on the chunks.
        np.add.at(sums.reshape(-1), flat, values.astype(np.float64))
        np.add.at(squares.reshape(-1), flat, (values * values).astype(np.float64))
    return SpanSums(span.index, totals, detected, groups, sums, squares, expressed, bad, fractional, repeated)


@dataclass
class Scan:
    """The sums of all spans; row i of the tables belongs to the (batch, condition) pair with code i."""

    pairs: np.ndarray  # (cells,) codes
    totals: np.ndarray  # (cells,) float64
    detected: np.ndarray  # (cells,) int64
    sums: np.ndarray  # (pairs, genes) float64
    squares: np.ndarray  # (pairs, genes) float64
    expressed: np.ndarray  # (genes,) int64
    repeated: int = 0  # duplicate entries that were added up

    def add(self, span: Span, part: SpanSums) -> None:
        """Add one span; call this in the order of the spans."""
        self.totals[span.start : span.stop] = part.totals
        self.detected[span.start : span.stop] = part.detected
        self.sums[part.groups] += part.sums
        self.squares[part.groups] += part.squares
        self.expressed += part.expressed
        self.repeated += part.repeated


def scan(source: Source, matrix: Matrix, pairs: np.ndarray, recipe: Recipe, runtime: Runtime, *, title: str) -> Scan:
    """Run the pass and return its sums.

    Parameters
    ----------
    pairs
        (cells,) code of each cell's (batch, condition) pair.

    Raises
    ------
    CohortError
        A value is negative, NaN or infinite, or not a whole number where the recipe expects counts; the message names
        the first such cell and gene.
    """
    cells, genes, n_pairs = source.n_cells, source.n_genes, int(pairs.max()) + 1
    tables = np.zeros((n_pairs, genes)), np.zeros((n_pairs, genes))
    whole = Scan(pairs, np.zeros(cells), np.zeros(cells, np.int64), *tables, np.zeros(genes, np.int64))
    spans = spans_of(source.n_cells)
    waiting: dict[int, SpanSums] = {}
    following = 0
    for part in runtime.map(scan_span, spans, matrix, pairs, recipe, title=title):
        waiting[part.index] = part
        while following in waiting:  # add in the order of the spans, whichever ends first
            ready = waiting.pop(following)
            _check_values(source, ready, recipe.integers)
            whole.add(spans[following], ready)
            following += 1
    return whole


def _first(rows: sparse.csr_matrix, wanted: np.ndarray, start: int) -> tuple[int, int, float] | None:
    """Return input row, gene and value of the first stored value where the mask `wanted` is true."""
    if not wanted.any():
        return None
    place = int(wanted.argmax())
    row = int(np.searchsorted(rows.indptr, place, side="right")) - 1
    return start + row, int(rows.indices[place]), float(rows.data[place])


def _without(rows: sparse.csr_matrix, cells: np.ndarray, genes: np.ndarray | None) -> sparse.csr_matrix:
    """Remove the values of cells and genes whose mask is false; the shape stays."""
    if genes is None and cells.all():
        return rows
    kept = np.repeat(cells, np.diff(rows.indptr))
    if genes is not None:
        kept = kept & genes[rows.indices]
    indptr = np.concatenate([[0], np.cumsum(kept)])[rows.indptr]
    return sparse.csr_matrix((rows.data[kept], rows.indices[kept], indptr), shape=rows.shape, copy=False)


def _check_values(source: Source, part: SpanSums, integers: bool) -> None:
    if part.bad is not None:
        refuse_value(source, *part.bad)
    if part.fractional is not None and integers:
        row, gene, value = part.fractional
        msg = (
            f"most values are counts, but {named_value(source, row, gene)} holds {value:g}; say which they are: "
            "--normalise counts or --normalise none"
        )
        raise CohortError(msg)


def frame_of_cells(rows: np.ndarray, groups: np.ndarray, totals: np.ndarray) -> pd.DataFrame:
    """Return the table of the kept cells, in input order."""
    return pd.DataFrame(
        {"input_row": rows.astype(np.int64), "group": groups.astype(np.int32), "total": totals.astype(np.float64)}
    )
