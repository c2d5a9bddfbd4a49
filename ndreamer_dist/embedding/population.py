"""The state space: compute axes, reliability and coordinates of every population (METHOD section 10).

The stage makes two passes over packed.zarr. The first computes, per population, the covariance inside its control
groups, whose leading axes are W. The second computes the reliability of each coordinate from two halves of every cell's
counts. A last round of tasks writes the coordinates. Extra coordinates keep populations apart: cells of different
populations are farther from each other than any two cells of one population. So a cell is matched outside its
population only if the target group has no cell of that population.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import sparse
from threadpoolctl import threadpool_limits

from ndreamer_dist import keys
from ndreamer_dist.cohort.obsm import CellLabels
from ndreamer_dist.cohort.packed import cell_totals
from ndreamer_dist.compute.executor import Runtime, with_threads
from ndreamer_dist.embedding import state
from ndreamer_dist.embedding.axes import Moments, signed_axes, within_covariance
from ndreamer_dist.embedding.space import Space, summed_moments
from ndreamer_dist.embedding.state import HalfSums
from ndreamer_dist.errors import StoreError
from ndreamer_dist.rundir.directory import Shard
from ndreamer_dist.settings import Settings
from ndreamer_dist.storage.arrays import open_array, read_array, shard_files, write_array, write_part
from ndreamer_dist.storage.files import Storage

logger = logging.getLogger(__name__)

LEAST_CELLS = 100
"""Smallest population that is not pooled. With fewer control cells, its axes come from all groups."""
GROUPED, WHOLE = ("whole", "first", "second"), ("spread", "signal", "noise", "reach")
"""Fields of `HalfSums` with an entry per group, and fields that are over all cells."""
DIRECTIONS = ((keys.STATE_MEAN, 2), (keys.STATE_AXES, 3), (keys.STATE_RANK, 1), (keys.STATE_BEYOND_CHANCE, 1))
OWN_AXES = (
    (keys.STATE_DIMENSIONS, 1), (keys.STATE_RELIABILITY, 3), (keys.STATE_GROUP_MEAN, 3), (keys.STATE_POSITION, 3),
    (keys.STATE_CORNER, 2), (keys.STATE_WEIGHT, 1),
)  # fmt: skip


@dataclass(frozen=True)
class Populations:
    """The populations of the cells.

    Attributes
    ----------
    codes
        (cells,) int32 population of every packed row.
    names
        Names of the populations; `others` pools small populations and cells of none.
    """

    codes: np.ndarray
    names: tuple[str, ...]

    @classmethod
    def of(cls, codes: np.ndarray, names: Sequence[str] = ()) -> Populations:
        """Pool the small populations, and the cells of none (-1); without names, populations are named by their codes."""
        labels, counts = np.unique(codes, return_counts=True)
        large = labels[(counts >= LEAST_CELLS) & (labels >= 0)]
        place = np.full(int(labels[-1]) + 2, len(large), dtype=np.int32)  # the last entry is for code -1
        place[large] = np.arange(len(large))
        found = place[codes]
        kept = [names[label] if names else str(label) for label in large]
        return cls(found, (*kept, "others") if (found == len(large)).any() else tuple(kept))


def run_state(space: Space, settings: Settings, columns: Mapping[str, CellLabels], runtime: Runtime) -> None:
    """Write the state coordinates; in the space `ndreamer+state`, after the trained ones."""
    first, own = space.axes_shard(DIRECTIONS, "directions"), space.axes_shard(OWN_AXES)
    blocks = space.block_shards(space.array)
    todo = space.todo([first, own, *blocks])
    if not todo:
        return
    populations = _populations(space, settings, columns)
    if first in todo:
        _make_directions(space, settings, populations, runtime)
        space.stage.mark(first)
    if own in todo:
        _make_reliability(space, settings, populations, runtime)
        space.stage.mark(own)
    space.forget_sums()
    missing = [shard for shard in todo if shard in blocks]
    if missing:
        trained = open_array(space.run.embedding(keys.PCA), keys.PCA).shape[1] if _is_beside(settings) else 0
        space.make(space.array, trained + _width(space.storage))
    space.stage.map(runtime, _place_block, missing, space, populations, _is_beside(settings))


def _is_beside(settings: Settings) -> bool:
    """Return whether the space holds the trained coordinates too."""
    return settings.embed.method == keys.NDREAMER_STATE


def _width(storage: Storage) -> int:
    """Return the number of state coordinates of a cell, including those that keep populations apart."""
    dimensions = read_array(storage, keys.STATE_DIMENSIONS)
    corner = read_array(storage, keys.STATE_CORNER)
    return int(dimensions.max()) + (corner.shape[1] if len(corner) > 1 else 0)


def _populations(space: Space, settings: Settings, columns: Mapping[str, CellLabels]) -> Populations:
    by = settings.state.by
    if by is None:
        return Populations(np.zeros(space.packed.n_rows, dtype=np.int32), ("all cells",))
    if by == keys.OBS_LOW:
        return Populations.of(space.packed.clusters(keys.PACKED_LOW))
    return Populations.of(columns[by].codes[space.packed.input_row], columns[by].names)


# --- W ---------------------------------------------------------------------------------------------------------------


def _make_directions(space: Space, settings: Settings, populations: Populations, runtime: Runtime) -> None:
    """Write the mean and leading axes of every population."""
    packed = space.packed
    keep = min(settings.embed.dimensions, packed.n_genes)
    number = len(populations.names)
    means, axes = np.zeros((number, packed.n_genes)), np.zeros((number, packed.n_genes, keep))
    ranks, beyond = np.zeros((2, number), dtype=np.int32)
    for code in range(number):
        inner = _inner_groups(space, populations, code)
        moments = summed_moments(space, inner, populations.codes, code, runtime)
        means[code] = moments.mean
        axes[code], ranks[code], beyond[code] = with_threads(1, _directions, moments, keep)
    if not ranks.any():
        msg = f"{space.run.url}: no gene varies inside a group, so there is no state space; match in another one"
        raise StoreError(msg)
    values: tuple[np.ndarray, ...] = (means, axes, ranks, beyond)
    for (name, _), array in zip(DIRECTIONS, values, strict=True):
        write_array(space.storage, name, array)


def _directions(moments: Moments, keep: int) -> tuple[np.ndarray, int, int]:
    """Return the leading axes inside groups, (genes, keep), how many have variance, and how many exceed chance."""
    covariance = within_covariance(moments)
    axes, variance = signed_axes(covariance, keep)
    rank = int((variance > state.VANISHING * max(float(variance[0]), state.VANISHING)).sum())
    beyond = state.beyond_chance(covariance, int(moments.inner_cells.sum()))
    return axes, rank, min(rank, max(1, beyond))


def _inner_groups(space: Space, populations: Populations, code: int) -> np.ndarray:
    """Return the groups that define a population's axes: control groups, or all if it has too few control cells."""
    design = space.packed.design
    control = design.group_conditions == 0
    groups = design.group_of(np.flatnonzero(populations.codes == code))
    if int(control[groups].sum()) >= LEAST_CELLS:
        return np.asarray(control)
    return np.ones(len(control), dtype=bool)


# --- Lambda ----------------------------------------------------------------------------------------------------------


def _make_reliability(space: Space, settings: Settings, populations: Populations, runtime: Runtime) -> None:
    """Write the arrays of `OWN_AXES`: dimensions, reliability, means and positions of groups, corners and weight."""
    shrink = settings.state.shrink
    halved = space.has_counts and (shrink != "none" or settings.state.k is None)
    if shrink != "none" and not halved:
        logger.warning("state: the input holds no counts that could be halved, so coordinates are not shrunk")
    sums = _half_sums(space, settings, populations, runtime, halved=halved)
    ranks, beyond = (read_array(space.storage, name) for name in (keys.STATE_RANK, keys.STATE_BEYOND_CHANCE))
    keep = len(sums[0].reach)
    dimensions, shares, reaches = np.zeros(len(sums), dtype=np.int32), np.zeros((len(sums), keep, keep)), []
    means = np.stack([found.group_means for found in sums])
    positions = means.copy()
    doubts: list[state.Doubt | None] = [None] * len(sums)
    most = settings.embed.dimensions if len(sums) == 1 else state.MOST_IN_A_TYPE
    for code, found in enumerate(sums):
        k = dimensions[code] = min(
            settings.state.k or _confirmed(found, min(most, int(beyond[code])), halved=halved), int(ranks[code])
        )
        shares[code, :k, :k] = with_threads(1, _share, found, k, halved and shrink != "none")
        if halved and shrink == "fitted" and k:
            positions[code, :, :k], doubts[code] = _positions(space, populations, code, k, runtime)
        reaches.append(_reach(found, shares[code, :k, :k], positions[code, :, :k]))
        reliable = np.trace(shares[code, :k, :k]) / max(k, 1)
        logger.info(
            "state: population %s, %d cells: %d dimensions, mean reliability %.2f",
            populations.names[code], int(found.cells.sum()), k, reliable,
        )  # fmt: skip
    weight, beside = _weight(space, settings, sums, shares) if _is_beside(settings) else (1.0, 0.0)
    apart = state.corners(len(sums), float(np.hypot(beside, weight * max(reaches))))
    values = (
        dimensions, shares, means, positions,
        apart if apart.shape[1] else np.zeros((1, 1)), np.array([weight]),
    )  # fmt: skip
    for (name, _), array in zip(OWN_AXES, values, strict=True):
        write_array(space.storage, name, array)
    _write_doubts(space, doubts)


def _write_doubts(space: Space, doubts: Sequence[state.Doubt | None]) -> None:
    """Write the gene variances that the positions of groups were fitted with, to place groups that are mapped later."""
    nothing = np.zeros(space.packed.n_genes)
    unfitted = state.Doubt(nothing, nothing, least=np.nan)
    models = [doubt or unfitted for doubt in doubts]
    write_array(space.storage, keys.STATE_DOUBT, np.stack([np.stack([d.between, d.variance]) for d in models]))
    write_array(space.storage, keys.STATE_LEAST_DOUBT, np.array([d.least for d in models]))


def _confirmed(found: HalfSums, beyond: int, *, halved: bool) -> int:
    """Return how many of the axes beyond chance the halves of the counts confirm; all if there are no halves."""
    if not halved or not beyond:
        return beyond
    parts = (found.covariance(name)[:beyond, :beyond] for name in ("signal", "noise", "spread"))
    return state.confirmed_dimensions(*parts)


def _share(found: HalfSums, k: int, shrink: bool) -> np.ndarray:
    """Return Lambda of the first k dimensions; the identity without shrinkage."""
    if not shrink or not k:
        return np.eye(k)
    return state.reliability(found.covariance("signal")[:k, :k], found.covariance("spread")[:k, :k])


def _positions(
    space: Space, populations: Populations, code: int, k: int, runtime: Runtime
) -> tuple[np.ndarray, state.Doubt]:
    """Return the fitted positions of groups on a population's axes, (groups, k), 0 without cells, and their model."""
    inner = _inner_groups(space, populations, code)
    moments = summed_moments(space, inner, populations.codes, code, runtime, products=False)
    mean, axes = directions_of(space.storage, space.key, code)
    present = np.flatnonzero(moments.cells)
    means = moments.sums[present] / moments.cells[present, None] - mean
    found = np.zeros((len(moments.cells), k))
    cells = moments.cells[present]
    doubt = with_threads(1, state.doubt_of, means, axes[:, :k], moments.within_variance, cells)
    found[present] = with_threads(1, doubt.positions, means, axes[:, :k], cells)
    return found, doubt


def _reach(found: HalfSums, share: np.ndarray, positions: np.ndarray) -> float:
    """Return an upper bound of the norm of a population's coordinates."""
    k = len(share)
    if not k:
        return 0.0
    furthest = float(np.linalg.norm(positions, axis=1).max())
    mean = float(np.linalg.norm(found.group_means[:, :k], axis=1).max())
    return furthest + float(np.linalg.norm(share, 2)) * (float(np.sqrt(found.reach[k - 1])) + mean)


def _half_sums(
    space: Space, settings: Settings, populations: Populations, runtime: Runtime, *, halved: bool
) -> list[HalfSums]:
    """Return the sums of every population, added in block order; sums of finished blocks are read, not recomputed."""
    shards = []
    for block in range(space.packed.n_blocks):
        name = f"{keys.SPACE_SUMS}/halves/{keys.block_name(block)}"
        shards.append(Shard(f"halves-{block:05d}", (f"{keys.EMBEDDING}/{shard_files(name, 0)}",), block))
    todo = space.run.pending(keys.STAGE_SUMS, space.key, shards)
    totals = cell_totals(space.packed) if halved else None
    shared = (space, populations, totals, settings.seed)
    space.sums.map(runtime, _sum_halves, todo, *shared, title="space: reliability")
    keep = open_array(space.storage, keys.STATE_AXES).shape[2]
    parts = (_read_halves(space, block, len(populations.names), keep) for block in range(space.packed.n_blocks))
    return functools.reduce(lambda one, other: [a.plus(b) for a, b in zip(one, other, strict=True)], parts)


def _sum_halves(block: int, space: Space, populations: Populations, totals: np.ndarray | None, seed: int) -> None:
    with threadpool_limits(1):
        found = _block_halves(space, block, populations, totals, seed)
    first, last = _group_range(space, block)
    values = [getattr(one, name)[..., first:last, :].ravel() for one in found for name in GROUPED]
    values += [one.cells[first:last].astype(np.float64) for one in found]
    values += [getattr(one, name).ravel() for one in found for name in WHOLE]
    write_array(space.storage, f"{keys.SPACE_SUMS}/halves/{keys.block_name(block)}", np.concatenate(values))


def _block_halves(
    space: Space, block: int, populations: Populations, totals: np.ndarray | None, seed: int
) -> list[HalfSums]:
    """Return the sums of a row block for every population. One generator serves the whole block.

    Without the cells' totals, counts are not halved, and both halves equal the whole.
    """
    x, groups, codes = space.packed.block(block), space.groups(block), populations.codes[space.rows(block)]
    count, number = len(space.packed.design.groups), len(populations.names)
    generator = np.random.default_rng(np.random.SeedSequence((seed, keys.STREAMS[keys.STAGE_SPACE], block)))
    pair = (x, x) if totals is None else state.halves(x, totals[space.rows(block)], generator)
    moved = state.shuffled_inside(groups.astype(np.int64) * number + codes, generator)
    found = []
    for code in range(number):
        here = np.flatnonzero(codes == code)
        mean, axes = directions_of(space.storage, space.key, code)
        e, a, b = (_coordinates(values, here, mean, axes) for values in (x, *pair))
        inside = np.searchsorted(here, moved[here])
        found.append(state.half_sums(e, (a, b), groups[here], count, inside))
    return found


def _coordinates(x: sparse.csr_matrix | state.Half, rows: np.ndarray, mean: np.ndarray, axes: np.ndarray) -> np.ndarray:
    """Return the coordinates W'(x - mean) of some rows: (rows, k) float64."""
    return state.scores(x, rows, axes) - mean @ axes


@functools.lru_cache(maxsize=64)
def directions_of(storage: Storage, key: str, code: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean and axes of a population, read once per process."""
    del key  # part of the cache key: another stage key means other axes
    part = slice(code, code + 1)
    return read_array(storage, keys.STATE_MEAN, part)[0], read_array(storage, keys.STATE_AXES, part)[0]


def _group_range(space: Space, block: int) -> tuple[int, int]:
    """Return the first group of a block, and the one after its last."""
    groups = space.groups(block)
    return int(groups[0]), int(groups[-1]) + 1


def _read_halves(space: Space, block: int, number: int, keep: int) -> list[HalfSums]:
    """Read the sums of a block, as `_sum_halves` wrote them."""
    values = read_array(space.storage, f"{keys.SPACE_SUMS}/halves/{keys.block_name(block)}")
    first, last = _group_range(space, block)
    count, place = len(space.packed.design.groups), 0

    def take(*shape: int) -> np.ndarray:
        nonlocal place
        place += int(np.prod(shape))
        return np.asarray(values[place - int(np.prod(shape)) : place].reshape(shape))

    def spread_out(part: np.ndarray) -> np.ndarray:
        whole = np.zeros((count, *part.shape[1:]))
        whole[first:last] = part
        return whole

    grouped = [{name: spread_out(take(last - first, keep)) for name in GROUPED} for _ in range(number)]
    cells = [spread_out(take(last - first)) for _ in range(number)]
    whole = [{name: take(*((keep,) if name == "reach" else (keep, keep))) for name in WHOLE} for _ in range(number)]
    return [HalfSums(cells=cells[i], **grouped[i], **whole[i]) for i in range(number)]


# --- weight against the trained coordinates --------------------------------------------------------------------------


def _weight(space: Space, settings: Settings, sums: Sequence[HalfSums], shares: np.ndarray) -> tuple[float, float]:
    """Return the factor for state coordinates, and the largest norm of the trained ones.

    By default both kinds have the same total variance inside groups.
    """
    packed, storage = space.packed, space.run.embedding(keys.PCA)
    design = packed.design
    groups = len(design.groups)
    width = open_array(storage, keys.PCA).shape[1]
    total, squares, longest = np.zeros((groups, width)), 0.0, 0.0
    for block in range(packed.n_blocks):
        points = read_array(storage, keys.PCA, space.rows(block)).astype(np.float64)
        np.add.at(total, space.groups(block), points)
        lengths = (points**2).sum(axis=1)
        squares, longest = squares + float(lengths.sum()), max(longest, float(lengths.max()))
    cells = np.array([group.cells for group in design.groups])
    trained = (squares - float((total**2 / cells[:, None]).sum())) / packed.n_rows
    own = sum(
        float(np.trace(share @ found.covariance("spread") @ share.T)) * float(found.cells.sum())
        for found, share in zip(sums, shares, strict=True)
    )
    weight = settings.embed.state_weight or float(np.sqrt(trained / (own / packed.n_rows)))
    logger.info("state: beside the trained coordinates with weight %.3g", weight)
    return weight, float(np.sqrt(longest))


# --- coordinates -----------------------------------------------------------------------------------------------------


def _place_block(block: int, space: Space, populations: Populations, beside: bool) -> None:
    with threadpool_limits(1):
        values = _placed(space, block, populations)
    rows = space.rows(block)
    parts = [read_array(space.run.embedding(keys.PCA), keys.PCA, rows), values] if beside else [values]
    write_part(space.storage, space.array, rows, np.column_stack(parts).astype(np.float32))


def _placed(space: Space, block: int, populations: Populations) -> np.ndarray:
    """Return the weighted state coordinates of a row block, and the corners of populations: (cells, d) float64."""
    storage = space.storage
    dimensions, shares, means, positions, corner, weight = (read_array(storage, name) for name, _ in OWN_AXES)
    x, groups, codes = space.packed.block(block), space.groups(block), populations.codes[space.rows(block)]
    out = np.zeros((x.shape[0], int(dimensions.max())))
    for code in np.unique(codes):
        here, k = np.flatnonzero(codes == code), int(dimensions[code])
        centre, axes = directions_of(storage, space.key, int(code))
        e = _coordinates(x, here, centre, axes[:, :k])
        mean, position = (values[code][groups[here], :k] for values in (means, positions))
        out[here, :k] = state.shrunk(e, mean, position, shares[code, :k, :k])
    return np.column_stack([out * weight[0], corner[codes]]) if len(corner) > 1 else out * weight[0]
