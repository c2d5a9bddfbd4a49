"""One streaming pass over the cohort: check the values, and sum what gene selection needs.

The rows, in input order, are cut into spans that depend on the number of cells alone; a span is a task, read a chunk
at a time. Out come the cells' totals and, per group and gene, the sums of the normalised expression and of its squares,
in float64 and in row order, so that neither chunk size nor the number of workers changes a bit. The decision whether
the values are counts or already log-normalised is made here as well, on a sample.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
from scipy import sparse

from ndreamer_dist.cohort.source import Matrix, Source
from ndreamer_dist.compute.executor import Runtime
from ndreamer_dist.errors import CohortError

TARGET_SUM = 1e4
"""Counts per cell after scaling (METHOD section 1.1)."""
SPAN_ROWS = 65_536
"""Most rows of a span, where there are more than 16 of them."""
LOG_CEILING = 20.0
"""No log1p of counts per 10 000, nor per million, is as large."""

Values = Literal["counts", "none"]


@dataclass(frozen=True)
class Span:
    """A range of input rows that one task reads."""

    index: int
    start: int
    stop: int


@dataclass(frozen=True)
class Recipe:
    """How a pass treats the values: scaled or not, which genes are left, and the fewest genes of a cell."""

    normalise: Values
    genes: np.ndarray | None  # (genes,) bool of the genes left; none: all
    min_genes: int
    chunk_rows: int


@dataclass(frozen=True)
class SpanSums:
    """What one span's task returns."""

    index: int
    totals: np.ndarray  # (rows,) float64 over the genes left
    detected: np.ndarray  # (rows,) int64 genes above zero, over all genes
    groups: np.ndarray  # (present,) pair codes
    sums: np.ndarray  # (present, genes) float64
    squares: np.ndarray  # (present, genes) float64
    expressed: np.ndarray  # (genes,) int64 cells above zero
    bad: tuple[int, int, float] | None  # first row, gene and value that cannot be
    fractional: tuple[int, int, float] | None  # first value that is no integer


def spans_of(n_cells: int) -> list[Span]:
    """Cut the input rows into about 16 spans, more where they would exceed 65 536 rows."""
    count = max(1, min(n_cells, max(16, -(-n_cells // SPAN_ROWS))))
    edges = np.linspace(0, n_cells, count + 1).astype(np.int64)
    return [Span(i, int(a), int(b)) for i, (a, b) in enumerate(itertools.pairwise(edges))]


def chunks_of(span: Span, chunk_rows: int) -> Iterator[tuple[int, int]]:
    """Return the row ranges in which a span is read."""
    for start in range(span.start, span.stop, chunk_rows):
        yield start, min(start + chunk_rows, span.stop)


def normalised(rows: sparse.csr_matrix, totals: np.ndarray) -> sparse.csr_matrix:
    """Return log1p(x / total * 10 000) by scanpy's float32 arithmetic, so that the bits are the same.

    Parameters
    ----------
    rows
        (rows, genes) CSR float32 counts.
    totals
        (rows,) float64 counts of each cell over all genes left.
    """
    factors = totals.astype(np.float32) / np.float32(TARGET_SUM)
    factors[factors == 0] = 1
    data = np.log1p(rows.data / np.repeat(factors, np.diff(rows.indptr)))
    return sparse.csr_matrix((data, rows.indices, rows.indptr), shape=rows.shape, copy=False)


def scan_span(span: Span, matrix: Matrix, pairs: np.ndarray, recipe: Recipe) -> SpanSums:
    """Read a span once; the task of `scan`. It stops at the first value that cannot be."""
    groups, local = np.unique(pairs[span.start : span.stop], return_inverse=True)
    n_genes = matrix.shape[1]
    sums, squares = np.zeros((len(groups), n_genes)), np.zeros((len(groups), n_genes))
    totals, detected = np.zeros(span.stop - span.start), np.zeros(span.stop - span.start, dtype=np.int64)
    expressed = np.zeros(n_genes, dtype=np.int64)
    bad = fractional = None
    for start, stop in chunks_of(span, recipe.chunk_rows):
        rows = matrix.read_rows(start, stop)
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
        # add.at adds one by one in row order, so the sum does not depend on where chunks begin.
        np.add.at(sums.reshape(-1), flat, values.astype(np.float64))
        np.add.at(squares.reshape(-1), flat, (values * values).astype(np.float64))
    return SpanSums(span.index, totals, detected, groups, sums, squares, expressed, bad, fractional)


@dataclass
class Scan:
    """The sums of all spans."""

    totals: np.ndarray  # (cells,) float64
    detected: np.ndarray  # (cells,) int64
    sums: np.ndarray  # (pairs, genes) float64
    squares: np.ndarray  # (pairs, genes) float64
    expressed: np.ndarray  # (genes,) int64

    def add(self, span: Span, part: SpanSums) -> None:
        """Take in one span; to be called in the order of the spans."""
        self.totals[span.start : span.stop] = part.totals
        self.detected[span.start : span.stop] = part.detected
        self.sums[part.groups] += part.sums
        self.squares[part.groups] += part.squares
        self.expressed += part.expressed


def scan(
    source: Source, matrix: Matrix, pairs: np.ndarray, recipe: Recipe, runtime: Runtime, *, integers: bool, title: str
) -> Scan:
    """Run the pass and return its sums.

    Parameters
    ----------
    pairs
        (cells,) codes of the (batch, condition) pairs.
    integers
        Whether a value that is no integer is refused: the sample looked like counts.

    Raises
    ------
    CohortError
        A value is negative, NaN or infinite; the message names the first cell and gene.
    """
    n_pairs = int(pairs.max()) + 1
    tables = np.zeros((n_pairs, source.n_genes)), np.zeros((n_pairs, source.n_genes))
    whole = Scan(
        np.zeros(source.n_cells), np.zeros(source.n_cells, np.int64), *tables, np.zeros(source.n_genes, np.int64)
    )
    spans = spans_of(source.n_cells)
    waiting: dict[int, SpanSums] = {}
    following = 0
    for part in runtime.map(scan_span, spans, matrix, pairs, recipe, title=title):
        waiting[part.index] = part
        while following in waiting:  # sums are taken in the order of the spans, whichever ends first
            found = waiting.pop(following)
            _check_values(source, found, integers)
            whole.add(spans[following], found)
            following += 1
    return whole


def decide_values(source: Source, asked: Literal["auto", "counts", "none"]) -> tuple[Values, bool]:
    """Decide on a sample whether the values are counts to be normalised, and whether all of them are integers.

    Raises
    ------
    CohortError
        What is asked for contradicts the values, or `auto` cannot tell.
    """
    rows = source.sample
    values = rows.data
    if not values.size or not (np.isfinite(values) & (values >= 0)).all():
        return (
            "none" if asked == "none" else "counts"
        ), False  # the pass over all values says what is wrong, and where
    integers = bool((values == np.floor(values)).all())
    largest = float(values.max())
    logged = not integers and _looks_logged(rows)
    if asked == "none" and integers and largest > 1:
        msg = (
            f"the values look like counts (integers up to {largest:.0f}), but normalise=none expects them "
            "log-normalised; use --normalise counts, or name the layer that is log-normalised"
        )
        raise CohortError(msg)
    if asked == "counts" and logged:
        msg = (
            f"the values look log-normalised (not integers, at most {largest:.2f}), but normalise=counts expects counts; "
            "use --normalise none, or name the layer that holds counts"
        )
        raise CohortError(msg)
    if asked == "auto" and not integers and not logged:
        msg = (
            f"the values are neither counts nor clearly log-normalised (not integers, at most {largest:.2f}); say which: "
            "--normalise counts or --normalise none"
        )
        raise CohortError(msg)
    decided: Values = ("counts" if integers else "none") if asked == "auto" else asked
    return decided, integers and asked == "auto"


def _looks_logged(rows: sparse.csr_matrix) -> bool:
    """Return whether values look like log1p of scaled counts.

    Either all cells have one library size once the log is undone, or each cell's values are multiples of its smallest.
    """
    if not rows.data.size or not np.isfinite(rows.data).all() or rows.data.max() >= LOG_CEILING:
        return False
    undone = np.expm1(rows.data.astype(np.float64))
    held = np.diff(rows.indptr) > 0
    sizes = np.add.reduceat(undone, rows.indptr[:-1][held])
    if len(sizes) > 1 and sizes.std() < 0.02 * sizes.mean():
        return True
    smallest = np.minimum.reduceat(undone, rows.indptr[:-1][held])
    multiples = undone / np.repeat(smallest, np.diff(rows.indptr)[held])
    return bool((np.abs(multiples - np.round(multiples)) < 0.01 * multiples).mean() > 0.95)


def _first(rows: sparse.csr_matrix, wanted: np.ndarray, start: int) -> tuple[int, int, float] | None:
    """Return input row, gene and value of the first stored value that is wanted."""
    if not wanted.any():
        return None
    place = int(wanted.argmax())
    row = int(np.searchsorted(rows.indptr, place, side="right")) - 1
    return start + row, int(rows.indices[place]), float(rows.data[place])


def _without(rows: sparse.csr_matrix, cells: np.ndarray, genes: np.ndarray | None) -> sparse.csr_matrix:
    """Return the rows with the values of cells and genes that are left out taken away; the shape stays."""
    if genes is None and cells.all():
        return rows
    kept = np.repeat(cells, np.diff(rows.indptr))
    if genes is not None:
        kept = kept & genes[rows.indices]
    indptr = np.concatenate([[0], np.cumsum(kept)])[rows.indptr]
    return sparse.csr_matrix((rows.data[kept], rows.indices[kept], indptr), shape=rows.shape, copy=False)


def _check_values(source: Source, part: SpanSums, integers: bool) -> None:
    found = part.bad or (part.fractional if integers else None)
    if found is None:
        return
    row, gene, value = found
    where = f"cell {str(source.cell_names[row])!r}, gene {str(source.gene_names[gene])!r}"
    if part.bad is None:
        msg = (
            f"most values are counts, but {where} (row {row}) holds {value:g}; say which they are: "
            "--normalise counts or --normalise none"
        )
        raise CohortError(msg)
    what = (
        "NaN" if np.isnan(value) else f"{value:g}, an infinite value" if np.isinf(value) else f"{value:g}, below zero"
    )
    msg = (
        f"{where} (row {row}) holds {what}; expected counts or log-normalised expression, finite and not negative "
        "(not scaled or corrected values)"
    )
    raise CohortError(msg)


def frame_of_cells(rows: np.ndarray, groups: np.ndarray, totals: np.ndarray) -> pd.DataFrame:
    """Return the table of the kept cells, in input order."""
    return pd.DataFrame(
        {"input_row": rows.astype(np.int64), "group": groups.astype(np.int32), "total": totals.astype(np.float64)}
    )
