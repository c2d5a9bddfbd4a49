"""Draw the cells of a simulated cohort in chunks: first their latent variables, then their counts."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ndreamer_dist.datasets.expectation import DISPERSIONS, LIBRARY_MEDIAN, LIBRARY_SIGMA, Floats
from ndreamer_dist.datasets.model import BLOCK_ROWS, Model, rest
from ndreamer_dist.datasets.parameters import STATE_LIMIT, Codes, SimulatedCells

DIRECT_MEAN: Final = 4.0  # counts of a larger mean are drawn as gamma-Poisson, others by inversion


@dataclass(frozen=True)
class Chunk:
    """Some rows of the cohort: their latent variables, and their counts as the parts of a CSR matrix."""

    cells: SimulatedCells
    data: Floats  # (entries,) positive counts
    indices: NDArray[np.int32]  # (entries,) genes
    row_nnz: NDArray[np.int64]  # (cells,) entries per row


def draw_chunk(model: Model, seed: int, start: int, stop: int) -> Chunk:
    """Draw the cells `start:stop`; if `start` is a multiple of `BLOCK_ROWS`, other chunks give the same cells."""
    generators = [generator(seed, 1, row // BLOCK_ROWS) for row in range(start, stop, BLOCK_ROWS)]
    sizes = [min(BLOCK_ROWS, stop - row) for row in range(start, stop, BLOCK_ROWS)]
    blocks = [_draw_cells(model, rng, size) for rng, size in zip(generators, sizes, strict=True)]
    cells = SimulatedCells(
        *(np.concatenate([getattr(b, field.name) for b in blocks]) for field in fields(SimulatedCells))
    )
    kinds, of_cell = _kinds_of_cell(cells)
    # Most genes do not depend on the state, so their shares are computed once per (type, condition, donor).
    shares = np.concatenate([
        model.observed_shares(kinds[i : i + 8], np.arange(model.genes)) for i in range(0, len(kinds), 8)
    ])  # fmt: skip
    drawn, first = [], 0
    for rng, block in zip(generators, blocks, strict=True):
        drawn.append(_draw_counts(model, rng, block, shares[of_cell[first : first + len(block)]]))
        first += len(block)
    counts, columns, row_nnz = (np.concatenate(parts) for parts in zip(*drawn, strict=True))
    return Chunk(cells, counts, columns, row_nnz)


def generator(seed: int, *key: int) -> np.random.Generator:
    """Return the random generator of a key: the seed, a number for what is drawn, and the block of cells."""
    return np.random.Generator(np.random.SFC64(np.random.SeedSequence((seed, *key))))


def _draw_cells(model: Model, rng: np.random.Generator, size: int) -> SimulatedCells:
    """Draw the latent variables of a block of cells."""
    p = model.parameters
    group = _choose(rng.random(size), np.broadcast_to(p.group_weight.ravel(), (size, p.group_weight.size)))
    donor, condition = np.divmod(group, p.group_weight.shape[1])
    kind = _choose(rng.random(size), p.type_weight[donor])
    state = np.clip(rng.standard_normal(size, dtype=np.float32), -STATE_LIMIT, STATE_LIMIT)
    state += np.float32(model.law.shift) * (condition > 0)
    library = LIBRARY_MEDIAN * np.exp(LIBRARY_SIGMA * rng.standard_normal(size, dtype=np.float32))
    return SimulatedCells(kind, condition, donor, state, library.astype(np.float32))


def _choose(uniform: NDArray[Any], weights: NDArray[Any]) -> Codes:
    """Draw one column per row with probabilities proportional to the weights (rows, columns), by inversion."""
    cumulative = np.cumsum(weights, axis=1, dtype=np.float64)
    return (uniform[:, None] * cumulative[:, -1:] >= cumulative).sum(1)


def _kinds_of_cell(cells: SimulatedCells) -> tuple[SimulatedCells, Codes]:
    """Return one cell of state 0 per observed (type, condition, donor), and the number of each cell's combination."""
    table = np.stack([cells.cell_type, cells.condition, cells.donor])
    unique, of_cell = np.unique(table, axis=1, return_inverse=True)
    zero = np.zeros(unique.shape[1], np.float32)
    return SimulatedCells(unique[0], unique[1], unique[2], zero, zero), of_cell.ravel()


def _draw_counts(model: Model, rng: np.random.Generator, cells: SimulatedCells, mean: Floats) -> tuple[Any, Any, Any]:
    """Draw the counts of a block; return positive counts, genes, and entries per row.

    Parameters
    ----------
    mean
        (cells, genes) shares at state 0; overwritten.
    """
    moves = model.parameters.state_load.any(0)
    moved = np.flatnonzero(moves | model.affected if model.law.effects else moves)
    mean[:, moved] = model.observed_shares(cells, moved)
    mean[:, model.ballast] = rest(mean[:, : model.ballast].sum(1, dtype=np.float64))
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
    """Draw negative binomial counts: where `direct` as they are, else, by inversion, given that they are positive."""
    counts = np.zeros(len(mean), np.int64)
    gamma = rng.standard_gamma(size[direct].astype(np.float64)) * (mean[direct] / size[direct])
    counts[direct] = rng.poisson(gamma)
    waiting = np.flatnonzero(~direct)
    m, r = mean[waiting].astype(np.float64), size[waiting].astype(np.float64)
    ratio = m / (m + r)
    zero = np.exp(-r * np.log1p(m / r))
    left = rng.random(len(waiting)) * (1 - zero)  # the uniform minus the probabilities of the counts tried so far
    probability, count = zero * r * ratio, 1
    while len(waiting):
        counts[waiting] = count
        left = left - probability
        on = left > 0
        waiting, left, r, ratio = waiting[on], left[on], r[on], ratio[on]
        probability = probability[on] * ratio * (count + r) / (count + 1)
        count += 1
        if count > 1000:  # by rounding, a uniform close to 1 can exceed the sum of all probabilities
            break
    return counts
