"""Simulated cohorts of any size whose true expression, batch effect and treatment effects are known.

`simulate` writes counts as a plain AnnData zarr v3 store, chunk of cells by chunk of cells, and the truth beside it
(`cohort.zarr` and `cohort.truth.zarr`); `load_truth` opens the latter. Nothing of size cells x genes is ever held: the
truth is a function of a few numbers per cell and per gene, computed for the rows and genes that are asked for.

How a cell comes about. A type has a baseline and marker genes, a cell a continuous state that moves about a tenth of
the genes by type-specific amounts; a condition changes the genes named `EFFECT...` in the types that respond to it.
This gives the *shares* of a cell's counts. With `phi(share)` the expected log-normalised value `log1p(1e4 y / library)`
of a negative binomial count y of mean share x library, averaged over the libraries' log-normal law,

    f(X, c) = phi(share of X under c)                      what METHOD calls the true expression
    g(X, c, b) = h1(f) u1_bc w1_type + h2(f) u2_bc w2_type   with h1(f) = tanh f, h2(f) = f exp(-f)

where the donors' u are centred over the donors that hold c, so that E[g | X, c] = 0 exactly, whatever f. Counts are
drawn with the shares `phi^-1(f + g)`. Their sum is kept at 1 by one abundant gene, `BALLAST`, which takes what the
distortions leave: without it, normalising would spread every gene's batch effect over all genes. It is the only gene
whose g is not centred. A condition's gains and losses cancel, so it has no treatment effect.
"""

from __future__ import annotations

import math
import os
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, Final, Literal, TypeVar

import numpy as np
import zarr
from numpy.typing import ArrayLike, NDArray

from ndreamer_dist import keys
from ndreamer_dist.errors import CohortError, QueryError, listing, suggest
from ndreamer_dist.storage import Storage, create_array, open_array, open_storage, read_array, write_array

Floats = NDArray[np.float32]
Codes = NDArray[np.intp]
Item = TypeVar("Item")
Value = TypeVar("Value")

CELL_TYPE: Final = "cell_type"
CONDITION: Final = "condition"
DONOR: Final = "donor"
BALLAST: Final = "BALLAST"

SCALE: Final = 1e4  # counts of a normalised cell
LIBRARY_MEDIAN: Final = 2500.0
LIBRARY_SIGMA: Final = 0.35
DISPERSIONS: Final = np.array([1.0, 2.0, 4.0, 200.0])  # sizes r of the negative binomials; the last is the ballast's
BALLAST_SHARE: Final = 0.2
FOLD_MIN, FOLD_MAX = 0.7, 3.0  # log-fold changes of effect genes
BLOCK_ROWS: Final = 64  # cells that share a generator: results depend on no other cut
ENTRIES_CHUNK: Final = 1 << 20  # entries of the sparse matrix per zarr chunk
CELLS_CHUNK: Final = 1 << 15
DIRECT_MEAN: Final = 4.0  # above this mean a count is drawn as gamma-Poisson, below by inversion
TABLE_SIZE: Final = 1024
LOG_SHARE_MIN: Final = math.log(1e-10)


# --- the law of a log-normalised count ---------------------------------------------------------------------------
@dataclass(frozen=True)
class Expectation:
    """`phi`, the expected log-normalised value of a share, and its inverse: tables, one row per dispersion class."""

    log_value: Floats  # (classes, TABLE_SIZE) at even steps of log share, from LOG_SHARE_MIN to 0
    log_share: Floats  # (classes, TABLE_SIZE) at even steps of log value
    low: float
    high: float

    def value(self, log_share: Floats, classes: NDArray[Any]) -> Floats:
        """Return phi of shares (cells, genes); classes (genes,) are the genes' dispersion classes."""
        return np.exp(_look_up(self.log_value, LOG_SHARE_MIN, 0.0, log_share, classes))

    def inverse(self, value: Floats, classes: NDArray[Any]) -> Floats:
        """Return the log shares that have these expected values."""
        return _look_up(self.log_share, self.low, self.high, np.log(value), classes)


def expectation_tables() -> Expectation:
    """Tabulate phi by quadrature (relative error of a looked-up value about 1e-5)."""
    log_shares = np.linspace(LOG_SHARE_MIN, 0.0, TABLE_SIZE)
    log_values = np.log([expected_log1p(np.exp(log_shares), size) for size in DISPERSIONS])
    low, high = float(log_values.min()), float(log_values.max())
    even = np.linspace(low, high, TABLE_SIZE)
    inverse = np.array([np.interp(even, row, log_shares) for row in log_values])
    return Expectation(log_values.astype(np.float32), inverse.astype(np.float32), low, high)


def expected_log1p(share: NDArray[Any], size: float) -> NDArray[Any]:
    """Return E[log1p(1e4 y / l)] for y negative binomial of mean share x l and size r, l log-normal.

    Uses log(1 + s) = integral over t of (1 - exp(-s t)) exp(-t) / t, whose expectation needs only the generating
    function of y: smooth, and exact for means of 1e-7 and of 1e4 alike. Trapezoids in log t, Gauss-Hermite in log l.
    """
    step = 0.2
    t = np.exp(np.arange(-28.0, 4.0, step))
    nodes, weights = np.polynomial.hermite_e.hermegauss(9)
    total = np.zeros(share.shape)
    for node, weight in zip(nodes, weights / weights.sum(), strict=True):
        library = LIBRARY_MEDIAN * math.exp(LIBRARY_SIGMA * node)
        drop = -np.expm1(-t * SCALE / library)
        generating = -np.expm1(-size * np.log1p(np.multiply.outer(share * library / size, drop)))
        total += weight * step * (generating @ np.exp(-t))
    return total


def _look_up(table: Floats, low: float, high: float, x: Floats, classes: NDArray[Any]) -> Floats:
    last = table.shape[1] - 1
    position = np.clip((x - np.float32(low)) * np.float32(last / (high - low)), 0, np.float32(last - 0.001))
    left = position.astype(np.int32)
    fraction = position - left
    left += classes.astype(np.int32) * table.shape[1]
    flat = table.ravel()
    below = flat[left]
    return below + fraction * (flat[1:][left] - below)


# --- parameters --------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Parameters:
    """All that is drawn once per cohort. Each field is an array of the truth store."""

    log_share: Floats  # (types, genes) of a control cell in state 0; the ballast's is not used
    state_load: Floats  # (types, genes) change per unit of state; 0 for most genes
    fold: Floats  # (conditions, types, genes) log-fold change; 0 for all but effect genes
    donor_shape: Floats  # (2, donors, genes) u1 and u2, centred later
    type_shape: Floats  # (2, types, genes) w1 and w2
    dispersion: NDArray[np.int8]  # (genes,) rows of DISPERSIONS
    group_weight: Floats  # (donors, conditions) shares of the cells; 0 where a donor lacks a condition
    type_weight: Floats  # (donors, types) shares of the donor's cells


@dataclass(frozen=True)
class Cells:
    """The latent variables of some cells, each (cells,)."""

    cell_type: Codes
    condition: Codes
    donor: Codes
    state: Floats
    library: Floats

    def under(self, condition: int) -> Cells:
        """Return the same cells as they would be under another condition."""
        return Cells(self.cell_type, np.full_like(self.condition, condition), self.donor, self.state, self.library)

    def __getitem__(self, rows: Any) -> Cells:
        return Cells(*(getattr(self, field.name)[rows] for field in fields(self)))

    def __len__(self) -> int:
        return len(self.cell_type)


def draw_parameters(
    rng: np.random.Generator, *, genes: int, donors: int, conditions: int, cell_types: int, nested: bool
) -> Parameters:
    """Draw a cohort's parameters; the last third of the cell types does not respond to any condition."""
    responding = responding_types(cell_types)
    raised, lowered = _effect_sets(rng, genes, responding)
    effect = np.unique(np.concatenate([raised, lowered], axis=None))
    log_share = _log_shares(rng, genes, cell_types, np.unique(raised), np.unique(lowered))
    quiet = np.setdiff1d(np.flatnonzero(log_share[:, :-1].max(0) < math.log(3e-3)), effect)
    state_load = np.zeros((cell_types, genes))
    moved = rng.choice(quiet, min(genes // 10, len(quiet)), replace=False)
    state_load[:, moved] = rng.normal(0, 0.5, (cell_types, len(moved)))
    fold = np.zeros((conditions, cell_types, genes))
    for condition in range(1, conditions):
        for kind in range(responding):
            own = 1 + (kind + condition - 1) % responding  # other conditions hit other sets; set 0 is shared
            up, down = raised[[0, own]].ravel(), lowered[[0, own]].ravel()
            fold[condition, kind, up], fold[condition, kind, down] = _folds(rng, log_share[kind], up, down)
    donor_shape = np.tanh(rng.normal(0, 1.5, (2, donors, genes))) * np.array([0.4, 0.09])[:, None, None]
    type_shape = rng.uniform([[[0.4]], [[-1.0]]], 1.0, (2, cell_types, genes))
    dispersion = rng.integers(0, len(DISPERSIONS) - 1, genes, dtype=np.int8)
    dispersion[-1] = len(DISPERSIONS) - 1
    present = np.arange(conditions) == np.arange(donors)[:, None] % conditions if nested else True
    group_weight = rng.gamma(20, size=(donors, conditions)) * present
    type_weight = rng.dirichlet(30 * rng.dirichlet(np.full(cell_types, 8.0)), donors) + 0.01
    return Parameters(
        log_share=log_share.astype(np.float32),
        state_load=state_load.astype(np.float32),
        fold=fold.astype(np.float32),
        donor_shape=donor_shape.astype(np.float32),
        type_shape=type_shape.astype(np.float32),
        dispersion=dispersion,
        group_weight=(group_weight / group_weight.sum()).astype(np.float32),
        type_weight=(type_weight / type_weight.sum(1, keepdims=True)).astype(np.float32),
    )


def responding_types(cell_types: int) -> int:
    """Return how many of the cell types respond to conditions: the first two thirds, of one type that one."""
    return cell_types - (max(1, cell_types // 3) if cell_types > 1 else 0)


def _effect_sets(rng: np.random.Generator, genes: int, responding: int) -> tuple[Codes, Codes]:
    """Choose the genes that go up and those that go down: (sets, genes per set) each; set 0 is shared by the types."""
    size = max(1, min(10, genes // 80))
    needed = 2 * size * (responding + 1)
    if needed > (genes - 1) // 2:
        msg = f"{genes} genes are too few for {responding} responding cell types; at least {2 * needed + 1} are needed"
        raise CohortError(msg)
    chosen = rng.choice(genes - 1, needed, replace=False).reshape(2, responding + 1, size)
    return chosen[0], chosen[1]


def _log_shares(rng: np.random.Generator, genes: int, cell_types: int, raised: Codes, lowered: Codes) -> NDArray[Any]:
    log_mean = np.tile(rng.normal(0, 2.7, genes), (cell_types, 1)) + rng.normal(0, 0.15, (cell_types, genes))
    for kind in range(cell_types):
        markers = rng.choice(genes - 1, max(2, genes // 25), replace=False)
        log_mean[kind, markers] += rng.uniform(1.0, 2.5, len(markers))
    effect = np.concatenate([raised, lowered])
    # Genes that can rise start low and those that can fall start high, so that gains and losses can cancel.
    start = np.concatenate([np.full(len(raised), 0.8), np.full(len(lowered), 4.0)])
    target = np.log(start / SCALE) + rng.normal(0, 0.25, len(effect)) + rng.normal(0, 0.3, (cell_types, len(effect)))
    share = np.exp(log_mean)
    share[:, effect] = share[:, -1] = 0
    room = 1 - BALLAST_SHARE - np.exp(target).sum(1, keepdims=True)
    share = np.minimum(share / share.sum(1, keepdims=True) * room, 0.03 + 3 / genes)  # what is cut goes to the ballast
    share[:, effect] = np.exp(target)
    share[:, -1] = BALLAST_SHARE
    return np.log(share)


def _folds(rng: np.random.Generator, log_share: NDArray[Any], up: Codes, down: Codes) -> tuple[Any, Any]:
    """Draw log-fold changes within the limits such that the shares gained equal the shares lost."""
    lost = -_fold(rng.normal(size=len(down)))
    loss = np.exp(log_share[down]) @ -np.expm1(lost)
    z, share = rng.normal(size=len(up)), np.exp(log_share[up])
    low, high = -12.0, 12.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if share @ np.expm1(_fold(z + middle)) > loss else (middle, high)
    return _fold(z + low), lost


def _fold(z: NDArray[Any]) -> NDArray[Any]:
    return FOLD_MIN + (FOLD_MAX - FOLD_MIN) / (1 + np.exp(-z))


# --- the model: from latent variables to expectations ------------------------------------------------------------
class Model:
    """The expectations of a cohort as functions of cells' latent variables; pure, shared by simulation and truth."""

    def __init__(self, parameters: Parameters) -> None:
        self.parameters = parameters
        self.tables = expectation_tables()
        self.genes = parameters.log_share.shape[1]
        self.ballast = self.genes - 1
        present = (parameters.group_weight > 0).T.astype(np.float32)  # (conditions, donors)
        # The mean of the donors that hold a condition, per condition: what centres the batch effect.
        self.centre = np.einsum("cb,kbg->kcg", present / present.sum(1, keepdims=True), parameters.donor_shape)

    def true_expression(self, cells: Cells, genes: Codes) -> Floats:
        """Return f (cells, genes), without batch effect."""
        log_share = self._log_share(cells, genes)
        if self.ballast in genes:
            others = np.arange(self.ballast)
            control = cells.under(0)  # a condition's gains and losses cancel: the ballast is that of the control
            taken = _by_blocks(lambda part: np.exp(self._log_share(part, others)).sum(1, dtype=np.float64), control)
            log_share[:, genes == self.ballast] = np.log(_rest(taken))[:, None]
        return self.tables.value(log_share, self.parameters.dispersion[genes])

    def observed_expression(self, cells: Cells, genes: Codes) -> Floats:
        """Return f + g (cells, genes)."""
        true = self.true_expression(cells, genes[genes != self.ballast])
        value = np.empty((len(cells), len(genes)), np.float32)
        value[:, genes != self.ballast] = true + self._distortion(true, cells, genes[genes != self.ballast])
        if self.ballast in genes:
            others = np.arange(self.ballast)
            taken = _by_blocks(lambda part: self.observed_shares(part, others).sum(1, dtype=np.float64), cells)
            share = np.log(_rest(taken)).astype(np.float32)[:, None]
            value[:, genes == self.ballast] = self.tables.value(share, self.parameters.dispersion[[self.ballast]])
        return value

    def observed_shares(self, cells: Cells, genes: Codes) -> Floats:
        """Return the shares (cells, genes) that counts are drawn with; genes other than the ballast."""
        classes = self.parameters.dispersion[genes]
        true = self.tables.value(self._log_share(cells, genes), classes)
        return np.exp(self.tables.inverse(true + self._distortion(true, cells, genes), classes))

    def _log_share(self, cells: Cells, genes: Codes) -> Floats:
        p, kind = self.parameters, cells.cell_type[:, None]
        log_share = p.log_share[kind, genes] + p.fold[cells.condition[:, None], kind, genes]
        log_share += cells.state[:, None] * p.state_load[kind, genes]
        return log_share

    def _distortion(self, true: Floats, cells: Cells, genes: Codes) -> Floats:
        kind, condition, donor = (a[:, None] for a in (cells.cell_type, cells.condition, cells.donor))
        amount = self.parameters.donor_shape[:, donor, genes] - self.centre[:, condition, genes]
        amount *= self.parameters.type_shape[:, kind, genes]
        return np.tanh(true) * amount[0] + true * np.exp(-true) * amount[1]  # |g| < f, since |amount| sums below 1


def _rest(taken: NDArray[Any]) -> NDArray[Any]:
    """Return the ballast's share; the floor is reached in cohorts of a few dozen genes only."""
    return np.maximum(1 - taken, 0.02)


def _by_blocks(function: Callable[[Cells], NDArray[Any]], cells: Cells) -> NDArray[Any]:
    parts = [function(cells[i : i + BLOCK_ROWS]) for i in range(0, len(cells), BLOCK_ROWS)]
    return np.concatenate(parts) if parts else np.empty(0)


# --- drawing -----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Chunk:
    """Some rows of the cohort: their latent variables and their counts as CSR parts."""

    cells: Cells
    data: Floats
    indices: NDArray[np.int32]
    row_nnz: NDArray[np.int64]


def draw_chunk(model: Model, seed: int, start: int, stop: int) -> Chunk:
    """Draw the cells start to stop (start a multiple of `BLOCK_ROWS`), the same whatever the chunks are."""
    generators = [_generator(seed, 1, row // BLOCK_ROWS) for row in range(start, stop, BLOCK_ROWS)]
    sizes = [min(BLOCK_ROWS, stop - row) for row in range(start, stop, BLOCK_ROWS)]
    blocks = [_draw_cells(model.parameters, rng, size) for rng, size in zip(generators, sizes, strict=True)]
    cells = Cells(*(np.concatenate([getattr(b, field.name) for b in blocks]) for field in fields(Cells)))
    kinds, of_cell = _kinds_of_cell(cells)
    # Most genes do not depend on the state: their shares are worked out once per (type, condition, donor).
    shares = np.concatenate([
        model.observed_shares(kinds[i : i + 8], np.arange(model.genes)) for i in range(0, len(kinds), 8)
    ])  # fmt: skip
    drawn, first = [], 0
    for rng, block in zip(generators, blocks, strict=True):
        drawn.append(_draw_counts(model, rng, block, shares[of_cell[first : first + len(block)]]))
        first += len(block)
    counts, columns, row_nnz = (np.concatenate(parts) for parts in zip(*drawn, strict=True))
    return Chunk(cells, counts, columns, row_nnz)


def _generator(seed: int, *key: int) -> np.random.Generator:
    return np.random.Generator(np.random.SFC64(np.random.SeedSequence((seed, *key))))


def _draw_cells(p: Parameters, rng: np.random.Generator, size: int) -> Cells:
    group = _choose(rng.random(size), np.broadcast_to(p.group_weight.ravel(), (size, p.group_weight.size)))
    donor, condition = np.divmod(group, p.group_weight.shape[1])
    kind = _choose(rng.random(size), p.type_weight[donor])
    state = np.clip(rng.standard_normal(size, dtype=np.float32), -2, 2)
    library = LIBRARY_MEDIAN * np.exp(LIBRARY_SIGMA * rng.standard_normal(size, dtype=np.float32))
    return Cells(kind, condition, donor, state, library.astype(np.float32))


def _choose(uniform: NDArray[Any], weights: NDArray[Any]) -> Codes:
    """Return one column per row, with the row's weights (rows, columns) as probabilities."""
    cumulative = np.cumsum(weights, axis=1, dtype=np.float64)
    return (uniform[:, None] * cumulative[:, -1:] >= cumulative).sum(1)


def _kinds_of_cell(cells: Cells) -> tuple[Cells, Codes]:
    """Return one cell of state 0 per (type, condition, donor) present, and which of them each cell is."""
    table = np.stack([cells.cell_type, cells.condition, cells.donor])
    unique, of_cell = np.unique(table, axis=1, return_inverse=True)
    zero = np.zeros(unique.shape[1], np.float32)
    return Cells(unique[0], unique[1], unique[2], zero, zero), of_cell.ravel()


def _draw_counts(model: Model, rng: np.random.Generator, cells: Cells, mean: Floats) -> tuple[Any, Any, Any]:
    """Draw the counts of a block; `mean` (cells, genes) comes with the shares at state 0 and is used up."""
    moved = np.flatnonzero(model.parameters.state_load.any(0))
    mean[:, moved] = model.observed_shares(cells, moved)
    mean[:, model.ballast] = _rest(mean[:, : model.ballast].sum(1, dtype=np.float64))
    mean *= cells.library[:, None]
    size = DISPERSIONS[model.parameters.dispersion].astype(np.float32)
    zero = np.exp(-size * np.log1p(mean / size))  # P(y = 0)
    direct = mean > DIRECT_MEAN
    hit = np.flatnonzero((rng.random(mean.shape, dtype=np.float32) >= zero) | direct)
    row, column = np.divmod(hit, model.genes)
    counts = _positive_counts(rng, mean.ravel()[hit], size[column], direct.ravel()[hit])
    kept = counts > 0
    row_nnz = np.bincount(row[kept], minlength=len(cells))
    return counts[kept].astype(np.float32), column[kept].astype(np.int32), row_nnz


def _positive_counts(
    rng: np.random.Generator, mean: Floats, size: Floats, direct: NDArray[np.bool_]
) -> NDArray[np.int64]:
    """Draw negative binomials: as they are where `direct`, else given that they are positive, by inversion."""
    counts = np.zeros(len(mean), np.int64)
    gamma = rng.standard_gamma(size[direct].astype(np.float64)) * (mean[direct] / size[direct])
    counts[direct] = rng.poisson(gamma)
    waiting = np.flatnonzero(~direct)
    m, r = mean[waiting].astype(np.float64), size[waiting].astype(np.float64)
    ratio = m / (m + r)
    zero = np.exp(-r * np.log1p(m / r))
    left = rng.random(len(waiting)) * (1 - zero)  # of the uniform, after the probabilities of smaller counts
    probability, count = zero * r * ratio, 1
    while len(waiting):
        counts[waiting] = count
        left = left - probability
        on = left > 0
        waiting, left, r, ratio = waiting[on], left[on], r[on], ratio[on]
        probability = probability[on] * ratio * (count + r) / (count + 1)
        count += 1
        if count > 1000:  # rounding can leave a uniform of almost 1 beyond the sum of all probabilities
            break
    return counts


# --- writing -----------------------------------------------------------------------------------------------------
class _Column:
    """A one-dimensional array that is written from start to end in whole chunks, whatever pieces it comes in."""

    def __init__(self, storage: Storage, name: str, dtype: Any, chunk: int, attributes: dict[str, Any] | None) -> None:
        fill: Any = "" if dtype == "string" else 0
        create_array(storage, name, shape=(0,), dtype=dtype, chunks=(chunk,), fill_value=fill, attributes=attributes)
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


class _Writer:
    """The cohort and its truth while they are being written; the root of each comes last."""

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
        """Write some rows, which follow those before."""
        columns, cells = self._columns, chunk.cells
        columns["data"].add(chunk.data)
        columns["indices"].add(chunk.indices)
        columns["name"].add(np.array([f"cell_{self.cells + i:07d}" for i in range(len(cells))]))
        columns["state"].add(cells.state)
        columns["library"].add(cells.library)
        columns["nnz"].add(chunk.row_nnz.astype(np.int32))
        for key in (CELL_TYPE, CONDITION, DONOR):
            codes = getattr(cells, key).astype(np.int16)
            columns[key].add(codes)
            columns[f"true {key}"].add(codes)
        self.entries += len(chunk.data)
        self.cells += len(cells)

    def close(self, parameters: Parameters) -> None:
        """Finish both stores; without this neither opens."""
        for column in self._columns.values():
            column.close()
        self._write_indptr()
        for field in fields(parameters):
            write_array(self.truth, field.name, getattr(parameters, field.name))
        _group(self.truth, "", {"format": keys.FORMAT_VERSION, "cells": self.cells})
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
            warnings.simplefilter("ignore")  # zarr warns that other implementations may not know this metadata
            zarr.consolidate_metadata(self.cohort.store())

    def _write_indptr(self) -> None:
        """Write the rows' ends last: scipy wants them as wide as the indices, if the number of entries allows."""
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


def _encoding(kind: str, version: str) -> dict[str, Any]:
    return {"encoding-type": kind, "encoding-version": version}


def _group(storage: Storage, name: str, attributes: dict[str, Any]) -> None:
    zarr.create_group(storage.store(name), attributes=attributes)


def _strings(storage: Storage, name: str, values: Sequence[str]) -> None:
    column = _Column(storage, name, "string", max(1, len(values)), _encoding("string-array", "0.2.0"))
    column.add(np.array(values))
    column.close()


# --- the public face ---------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Names:
    """The names of a cohort, by position."""

    genes: list[str]
    categories: dict[str, list[str]]  # of each column of obs

    @classmethod
    def of(cls, parameters: Parameters) -> Names:
        """Return the names that follow from the parameters."""
        conditions, cell_types, genes = parameters.fold.shape
        effect = _affected(parameters)
        gene_names = [f"{'EFFECT' if effect[j] else 'GENE'}{j + 1:05d}" for j in range(genes - 1)]
        later = [f"treated_{c}" for c in range(2, conditions)]
        categories = {
            CELL_TYPE: [f"type_{t + 1}" for t in range(cell_types)],
            CONDITION: ["control", "treated", *later][:conditions],
            DONOR: [f"donor_{b + 1:02d}" for b in range(len(parameters.group_weight))],
        }
        return cls([*gene_names, BALLAST], categories)


def _affected(parameters: Parameters) -> NDArray[np.bool_]:
    """Return which genes some condition changes in some cell type, (genes,)."""
    return (parameters.fold != 0).any(axis=(0, 1))


class Truth:
    """What is true of a simulated cohort, computed for the cells and genes that are asked for.

    Values are expectations of log-normalised expression, `E[log1p(1e4 y / library)]`, over counts and library sizes
    (see the module), so they are what a method's own expressions and effects average to. `rows` are positions of the
    cohort (a slice or integers), `genes` are names; all genes without them. All results are (rows, genes), float32.

    Attributes
    ----------
    genes, cell_types, conditions, donors
        Names, by position; the first condition is the control.
    effect_genes
        Names of the genes that some condition changes in some cell type.
    """

    def __init__(self, storage: Storage, model: Model, cells: int) -> None:
        self._storage, self._model, self._cells = storage, model, cells
        names = Names.of(model.parameters)
        self.genes = names.genes
        self.cell_types = names.categories[CELL_TYPE]
        self.conditions = names.categories[CONDITION]
        self.donors = names.categories[DONOR]
        self.effect_genes = [self.genes[j] for j in np.flatnonzero(_affected(model.parameters))]

    def __len__(self) -> int:
        return self._cells

    def expression(
        self, rows: slice | ArrayLike, condition: str | None = None, genes: Sequence[str] | None = None
    ) -> Floats:
        """Return f of the cells under a condition (their own without one), free of any batch effect."""
        cells = self._latents(rows)
        if condition is not None:
            cells = cells.under(self._code(self.conditions, condition, "condition"))
        return self._model.true_expression(cells, self._columns(genes))

    def batch_effect(self, rows: slice | ArrayLike, genes: Sequence[str] | None = None) -> Floats:
        """Return g of the cells in their own donor and condition; its mean over a condition's donors is 0."""
        cells, columns = self._latents(rows), self._columns(genes)
        return self._model.observed_expression(cells, columns) - self._model.true_expression(cells, columns)

    def ite(self, rows: slice | ArrayLike, condition: str | None = None, genes: Sequence[str] | None = None) -> Floats:
        """Return the effect of a condition on the cells, against control.

        Without a condition it is that of the cell's own, and NaN on control cells, as in the results of a run.
        """
        cells, columns = self._latents(rows), self._columns(genes)
        treated = cells if condition is None else cells.under(self._code(self.conditions, condition, "condition"))
        effect = self._model.true_expression(treated, columns) - self._model.true_expression(cells.under(0), columns)
        if condition is None:
            effect[cells.condition == 0] = np.nan
        return effect

    def mean_ite(self, cell_type: str, condition: str, genes: Sequence[str] | None = None) -> Floats:
        """Return the mean effect of a condition on a cell type, (genes,); exact: effects do not vary with the state."""
        kind = np.array([self._code(self.cell_types, cell_type, "cell type")])
        zero = np.zeros(1, np.float32)
        cell = Cells(kind, np.zeros_like(kind), np.zeros_like(kind), zero, zero)
        treated, columns = cell.under(self._code(self.conditions, condition, "condition")), self._columns(genes)
        return (self._model.true_expression(treated, columns) - self._model.true_expression(cell, columns))[0]

    def obs(self, rows: slice | ArrayLike = slice(None)) -> dict[str, NDArray[Any]]:
        """Return the cells' names of cell type, condition and donor, and their true state and library size."""
        cells = self._latents(rows)
        return {
            CELL_TYPE: np.array(self.cell_types)[cells.cell_type],
            CONDITION: np.array(self.conditions)[cells.condition],
            DONOR: np.array(self.donors)[cells.donor],
            "state": cells.state,
            "library": cells.library,
        }

    @cached_property
    def _position(self) -> dict[str, int]:
        return {name: j for j, name in enumerate(self.genes)}

    def _columns(self, genes: Sequence[str] | None) -> Codes:
        if genes is None:
            return np.arange(len(self.genes))
        unknown = [str(name) for name in genes if name not in self._position]
        if unknown:
            msg = f"the simulated cohort has no gene {listing(unknown)}.{suggest(unknown[0], self.genes)}"
            raise QueryError(msg)
        return np.array([self._position[name] for name in genes], dtype=np.intp)

    @staticmethod
    def _code(known: list[str], name: str, what: str) -> int:
        if name not in known:
            msg = f"the simulated cohort has no {what} {name!r}; it has {listing(known)}.{suggest(name, known)}"
            raise QueryError(msg)
        return known.index(name)

    def _latents(self, rows: slice | ArrayLike) -> Cells:
        if not isinstance(rows, slice):
            rows = np.asarray(rows, dtype=np.intp)
            if rows.size and not (rows.min() >= 0 and rows.max() < self._cells):
                msg = f"rows {rows.min()} to {rows.max()} are asked for; the simulated cohort has {self._cells} cells"
                raise QueryError(msg)
        start, stop = (rows.start, rows.stop) if isinstance(rows, slice) else _span(rows)
        within = slice(None, None, rows.step) if isinstance(rows, slice) else rows - start
        parts: dict[str, Any] = {
            field.name: read_array(self._storage, f"cells/{field.name}", slice(start, stop))[within]
            for field in fields(Cells)
        }
        return Cells(**{name: p.astype(np.float32 if p.dtype.kind == "f" else np.intp) for name, p in parts.items()})


def _span(rows: Codes) -> tuple[int, int]:
    return (int(rows.min()), int(rows.max()) + 1) if len(rows) else (0, 0)


def truth_path(path: str | os.PathLike[str]) -> str:
    """Return the address of a simulated cohort's truth: `cohort.truth.zarr` beside `cohort.zarr`."""
    return f"{open_storage(path).url.removesuffix('.zarr')}.truth.zarr"


def load_truth(path: str | os.PathLike[str]) -> Truth:
    """Open the truth of a cohort that `simulate` wrote; `path` is the cohort's.

    Raises
    ------
    CohortError
        There is none: the cohort was not simulated, was moved without its truth, or was not finished.
    """
    storage = open_storage(truth_path(path))
    if not storage.exists("zarr.json"):
        msg = f"{storage.url} does not exist: {path} was not simulated, not finished, or moved without its truth"
        raise CohortError(msg)
    attributes = zarr.open_group(storage.store(read_only=True), mode="r").attrs
    if attributes["format"] != keys.FORMAT_VERSION:
        msg = f"{storage.url} has format {attributes['format']}, expected {keys.FORMAT_VERSION}: simulate it again"
        raise CohortError(msg)
    parameters = Parameters(*(read_array(storage, field.name) for field in fields(Parameters)))
    return Truth(storage, Model(parameters), int(str(attributes["cells"])))


def simulate(
    path: str | os.PathLike[str],
    *,
    cells: int = 20_000,
    genes: int = 2_000,
    batches: int = 4,
    conditions: int = 2,
    design: Literal["crossed", "nested"] = "crossed",
    cell_types: int = 6,
    seed: int = 0,
    chunk_rows: int = 4096,
    threads: int = 2,
    progress: Callable[[int, int], object] | None = None,
) -> Truth:
    """Write a simulated cohort as an AnnData zarr v3 store, its truth beside it, and return the truth.

    Parameters
    ----------
    path
        Where the cohort goes: `X` (cells x genes, CSR of counts, float32) and `obs` with `cell_type`, `condition`
        (`control`, `treated`, `treated_2`, ...) and `donor`. The truth goes to `truth_path(path)`.
    batches
        Donors. `crossed`: each has cells of every condition. `nested`: each has one condition.
    cell_types
        The last third of them (at least one, where there are two) does not respond to any condition.
    seed
        The same seed and sizes give the same cohort, whatever `chunk_rows` and `threads` are.
    chunk_rows, threads
        Cells drawn at a time, and chunks drawn at once; they bound the memory.
    progress
        Called after each chunk with the cells written and the cells in all.

    Raises
    ------
    CohortError
        The sizes make no cohort, or there is one at `path` already.
    """
    _check_sizes(cells, genes, batches, conditions, cell_types, design, chunk_rows, threads)
    cohort, truth = open_storage(path), open_storage(truth_path(path))
    if cohort.exists("zarr.json"):
        msg = f"{cohort.url} exists already; delete it or choose another path"
        raise CohortError(msg)
    truth.delete()
    parameters = draw_parameters(
        _generator(seed, 0), genes=genes, donors=batches, conditions=conditions, cell_types=cell_types,
        nested=design == "nested",
    )  # fmt: skip
    model, writer = Model(parameters), _Writer(cohort, truth, Names.of(parameters))
    step = -(-chunk_rows // BLOCK_ROWS) * BLOCK_ROWS
    ranges = ((start, min(start + step, cells)) for start in range(0, cells, step))
    with ThreadPoolExecutor(threads) as pool:
        for chunk in _in_order(pool, lambda part: draw_chunk(model, seed, *part), ranges, ahead=threads + 1):
            writer.add(chunk)
            if progress is not None:
                progress(writer.cells, cells)
    writer.close(parameters)
    return Truth(truth, model, cells)


def _in_order(
    pool: ThreadPoolExecutor, function: Callable[[Item], Value], items: Iterable[Item], *, ahead: int
) -> Iterator[Value]:
    """Yield the function's values in order, with no more than `ahead` calls begun and not taken."""
    begun: deque[Any] = deque()
    for item in items:
        begun.append(pool.submit(function, item))
        if len(begun) >= ahead:
            yield begun.popleft().result()
    while begun:
        yield begun.popleft().result()


def _check_sizes(
    cells: int, genes: int, batches: int, conditions: int, cell_types: int, design: str, chunk_rows: int, threads: int
) -> None:
    least = {"cells": (cells, 1), "genes": (genes, 50), "batches": (batches, 1), "conditions": (conditions, 2),
             "cell_types": (cell_types, 1), "chunk_rows": (chunk_rows, 1), "threads": (threads, 1)}  # fmt: skip
    for name, (found, smallest) in least.items():
        if found < smallest:
            msg = f"{name} is {found}; a simulated cohort needs at least {smallest}"
            raise CohortError(msg)
    if design not in ("crossed", "nested"):
        msg = f"design is {design!r}; it can be 'crossed' or 'nested'.{suggest(design, ('crossed', 'nested'))}"
        raise CohortError(msg)
    if design == "nested" and batches < conditions:
        msg = f"a nested design of {conditions} conditions needs at least as many batches, found {batches}"
        raise CohortError(msg)
