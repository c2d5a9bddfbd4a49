"""The stage `space`: compute coordinates without a network, by PCA or Harmony, or take them from the input.

Input: packed.zarr and the parts of the input that the space needs. Output: the coordinates and their axes in
embedding.zarr (METHOD section 9). Each task sums one span of blocks; the sums are added in order, in float64.
Coordinates are written block by block, and finished blocks are not written again. `population.py` has the state space.
"""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from threadpoolctl import threadpool_limits

from ndreamer_dist import keys
from ndreamer_dist.cohort.obsm import CellLabels, checksum, column_labels, coordinates_of
from ndreamer_dist.cohort.packed import Packed, cell_totals
from ndreamer_dist.cohort.source import Source
from ndreamer_dist.compute.executor import Runtime, with_threads
from ndreamer_dist.compute.machine import cpu_count
from ndreamer_dist.embedding import state
from ndreamer_dist.embedding.axes import Moments, moments_of, principal_axes
from ndreamer_dist.embedding.harmony import Harmonised, harmonised
from ndreamer_dist.rundir.directory import RunDirectory, Shard
from ndreamer_dist.rundir.stage import StageRun
from ndreamer_dist.settings import Settings
from ndreamer_dist.storage.arrays import (
    ensure_array,
    open_array,
    read_array,
    shard_files,
    write_array,
    write_part,
)
from ndreamer_dist.storage.files import Storage

logger = logging.getLogger(__name__)

MOST_SPANS = 32
"""Largest number of spans of blocks; each stores a (genes, genes) matrix until the axes are known."""
SIGNAL_BLOCKS = 8
"""Number of blocks, evenly spaced, whose counts estimate the signal in principal components."""
AXES = "axes"
"""Name of the shard that the driver writes."""
SUMS = ("groups", "outer", "squares")
"""Arrays that store the sums over a span of blocks."""


@dataclass(frozen=True)
class SpaceInput:
    """Parts of the input that a matching space and the matching in it need, in input order.

    Attributes
    ----------
    coordinates
        (cells, d) float32 for the space `obsm:KEY`, else None.
    columns
        Columns of `obs` that the space needs, by name.
    labels
        Labels for matching inside labels, if they are a column of `obs`, else None.
    """

    coordinates: np.ndarray | None = None
    columns: Mapping[str, CellLabels] = field(default_factory=dict)
    labels: CellLabels | None = None

    @classmethod
    def of(cls, source: Source, settings: Settings) -> SpaceInput:
        """Read and check the parts of the input that the settings' space needs.

        Raises
        ------
        CohortError
            A key or column is missing, or its values cannot be used.
        """
        method, by, within = settings.embed.method, settings.state.by, settings.match.within
        labels = column_labels(source, within, keys.MATCH_WITHIN) if within not in (None, keys.OBS_LOW) else None
        if method.startswith(keys.OBSM_PREFIX):
            return cls(coordinates_of(source, method.removeprefix(keys.OBSM_PREFIX)), labels=labels)
        columns = {}
        if method == keys.HARMONY:
            columns = {n: column_labels(source, n, "embed.harmony_keys") for n in settings.embed.harmony_keys}
        elif method in (keys.STATE, keys.NDREAMER_STATE) and by not in (None, keys.OBS_LOW):
            columns = {by: column_labels(source, by, "state.by")}
        return cls(columns=columns, labels=labels)

    def checksums(self) -> dict[str, str]:
        """Return a checksum of each part, for the stage keys."""
        own = {} if self.coordinates is None else {"coordinates": checksum(self.coordinates)}
        own |= {} if self.labels is None else {keys.MATCH_WITHIN: checksum(self.labels.codes)}
        return own | {f"obs {name}": checksum(column.codes) for name, column in self.columns.items()}


@dataclass(frozen=True)
class Space:
    """Context that every task of the stage shares.

    Attributes
    ----------
    stage
        The run directory of the space, with the stage's name and key.
    packed
        Packed cohort.
    array
        Name of the array of coordinates.
    """

    stage: StageRun
    packed: Packed
    array: str

    @property
    def run(self) -> RunDirectory:
        """Run directory of the space."""
        return self.stage.run

    @property
    def key(self) -> str:
        """Stage key."""
        return self.stage.key

    @property
    def sums(self) -> StageRun:
        """Sub-stage of the sums over cells that the axes are computed from."""
        return StageRun(self.run, keys.STAGE_SUMS, self.key)

    @property
    def has_counts(self) -> bool:
        """Whether counts can be recovered exactly from the expression."""
        summary = self.packed.run.read_json(keys.COHORT_SUMMARY)
        return bool(summary["normalise"] == "counts" and not summary.get(keys.UNS_SCALED))

    @property
    def storage(self) -> Storage:
        """Storage of the space's embedding.zarr."""
        return self.run.storage / keys.EMBEDDING

    def rows(self, block: int) -> slice:
        """Return the packed rows of a block."""
        return slice(*self.packed.block_range(block))

    def groups(self, block: int) -> np.ndarray:
        """Return the group of every cell of a block."""
        return self.packed.design.group_of(np.arange(*self.packed.block_range(block)))

    def block_shards(self, array: str, prefix: str = "") -> list[Shard]:
        """Return one shard per block of an array of coordinates."""
        return [
            Shard(f"{prefix}{keys.block_name(block)}", (f"{keys.EMBEDDING}/{shard_files(array, block, 0)}",), block)
            for block in range(self.packed.n_blocks)
        ]

    def axes_shard(self, arrays: Iterable[tuple[str, int]], name: str = AXES) -> Shard:
        """Return the driver's shard of arrays with one chunk each, given as (name, number of dimensions) pairs."""
        files = tuple(f"{keys.EMBEDDING}/{shard_files(array, *[0] * axes)}" for array, axes in arrays)
        return Shard(name, files)

    def todo(self, shards: Sequence[Shard]) -> list[Shard]:
        """Return the pending shards; if none is done, delete the arrays of an earlier stage key."""
        stale = [
            f"{keys.EMBEDDING}/{name}"
            for name in (keys.HARMONY_INPUT, keys.HARMONY_CELLS, keys.HARMONY_SUMS, self.array)
        ]
        return self.stage.begin(shards, stale)

    def make(self, array: str, width: int) -> None:
        """Create an array of coordinates, unless it exists."""
        shape, chunks = (self.packed.n_rows, width), (self.packed.block_rows, width)
        ensure_array(self.storage, array, shape=shape, dtype="float32", chunks=chunks, fill_value=np.nan)

    def forget_sums(self) -> None:
        """Delete the sums over cells, once the axes are written."""
        self.run.unmark(self.sums.name)
        self.storage.delete(keys.SPACE_SUMS)


def run_space(
    run: RunDirectory, settings: Settings, packed: Packed, from_input: SpaceInput, runtime: Runtime, key: str
) -> None:
    """Write the coordinates of a matching space other than the trained one (METHOD section 9)."""
    method = settings.embed.method
    space = Space(StageRun(run, keys.STAGE_SPACE, key), packed, keys.embedding_key(method))
    if from_input.coordinates is not None:
        _run_given(space, from_input.coordinates, runtime)
    elif method == keys.SPACE_PCA:
        _run_components(space, settings, runtime)
    elif method == keys.HARMONY:
        _run_harmony(space, settings, from_input, runtime)
    else:
        from ndreamer_dist.embedding.population import run_state

        run_state(space, settings, from_input.columns, runtime)


# --- coordinates from the input --------------------------------------------------------------------------------------


def _run_given(space: Space, coordinates: np.ndarray, runtime: Runtime) -> None:
    todo = space.todo(space.block_shards(space.array))
    if not todo:
        return
    space.make(space.array, coordinates.shape[1])
    space.stage.map(runtime, _write_given, todo, space, coordinates[space.packed.input_row])


def _write_given(block: int, space: Space, coordinates: np.ndarray) -> None:
    write_part(space.storage, space.array, space.rows(block), coordinates[space.rows(block)])


# --- principal components of the genes -------------------------------------------------------------------------------

GENE_ARRAYS = ((keys.GENE_MEAN, 1), (keys.GENE_AXES, 2), (keys.GENE_VARIANCE, 1))


def _run_components(space: Space, settings: Settings, runtime: Runtime) -> None:
    axes, blocks = space.axes_shard(GENE_ARRAYS), space.block_shards(space.array)
    todo = space.todo([axes, *blocks])
    _make_components(space, settings, runtime, axes, todo)
    _project(space, space.array, [shard for shard in todo if shard.name != AXES], runtime)


def _make_components(space: Space, settings: Settings, runtime: Runtime, axes: Shard, todo: Sequence[Shard]) -> None:
    """Write the principal axes of the modelled genes, unless they are done."""
    if axes not in todo:
        return
    packed = space.packed
    everyone = np.ones(len(packed.design.groups), dtype=bool)
    moments = summed_moments(space, everyone, np.zeros(packed.n_rows, dtype=np.int32), 0, runtime)
    with_threads(1, _write_components, space, moments, settings)
    space.stage.mark(axes)
    space.forget_sums()


def _write_components(space: Space, moments: Moments, settings: Settings) -> None:
    mean, axes, variance = principal_axes(
        space.packed.n_rows, moments.sums.sum(axis=0), moments.outer, settings.embed.dimensions
    )
    if settings.embed.method == keys.HARMONY and settings.embed.signal_share:
        keep = _signal_components(space, moments, axes, settings)
        logger.info("space: %d of %d principal components are signal and taken", keep, axes.shape[1])
        axes, variance = axes[:, :keep], variance[:keep]
    for (name, _), values in zip(GENE_ARRAYS, (mean, axes, variance), strict=True):
        write_array(space.storage, name, values)


def _signal_components(space: Space, moments: Moments, axes: np.ndarray, settings: Settings) -> int:
    """Return how many components exceed chance and, for counts, have at least `embed.signal_share` of signal.

    Other components only add counting noise to distances, and cost search time.
    """
    cells, mean = space.packed.n_rows, moments.mean
    keep = min(state.beyond_chance(moments.outer / cells - np.outer(mean, mean), cells), axes.shape[1])
    if space.has_counts:
        chosen = np.unique(np.linspace(0, space.packed.n_blocks - 1, SIGNAL_BLOCKS).astype(int))
        totals = cell_totals(space.packed)
        blocks = ((space.packed.block(block), totals[space.rows(block)]) for block in chosen.tolist())
        generator = np.random.default_rng(np.random.SeedSequence((settings.seed, keys.STREAMS[keys.STAGE_SPACE])))
        shares = state.signal_shares(blocks, axes[:, :keep], generator)
        keep = int((shares >= settings.embed.signal_share).sum())
    return max(1, keep)


def _project(space: Space, array: str, todo: Sequence[Shard], runtime: Runtime) -> None:
    """Write the principal components of pending blocks."""
    if not todo:
        return
    space.make(array, open_array(space.storage, keys.GENE_AXES).shape[1])
    space.stage.map(runtime, _project_block, todo, space, array)


def _project_block(block: int, space: Space, array: str) -> None:
    axes, mean = axes_of(space.storage, space.key)
    with threadpool_limits(1):
        scores = space.packed.block(block).astype(np.float64) @ axes - mean @ axes
    write_part(space.storage, array, space.rows(block), scores.astype(np.float32))


@functools.lru_cache(maxsize=1)
def axes_of(storage: Storage, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the principal axes of the genes and the mean, read once per process."""
    del key  # part of the cache key: another stage key means other axes
    return read_array(storage, keys.GENE_AXES), read_array(storage, keys.GENE_MEAN)


# --- Harmony ---------------------------------------------------------------------------------------------------------

CLUSTER_ARRAYS = ((keys.HARMONY_CELLS, 1), (keys.HARMONY_SUMS, 2))


def _run_harmony(space: Space, settings: Settings, from_input: SpaceInput, runtime: Runtime) -> None:
    """Correct the principal components in this process, with all its CPUs: Harmony needs all cells at once."""
    axes, clusters = space.axes_shard(GENE_ARRAYS), space.axes_shard(CLUSTER_ARRAYS, "clusters")
    inputs, blocks = space.block_shards(keys.HARMONY_INPUT, "input-"), space.block_shards(space.array)
    todo = space.todo([axes, clusters, *inputs, *blocks])
    _make_components(space, settings, runtime, axes, todo)
    _project(space, keys.HARMONY_INPUT, [shard for shard in todo if shard in inputs], runtime)
    missing = [shard for shard in todo if shard in blocks]
    if not missing and clusters not in todo:
        return
    corrected = _harmonised(space, settings, from_input)
    if clusters in todo:
        for (name, _), values in zip(CLUSTER_ARRAYS, (corrected.clusters.cells, corrected.clusters.sums), strict=True):
            write_array(space.storage, name, values)
        space.stage.mark(clusters)
    space.make(space.array, corrected.points.shape[1])
    for shard in missing:
        write_part(space.storage, space.array, space.rows(shard.task), corrected.points[space.rows(shard.task)])
        space.stage.mark(shard)


def _harmonised(space: Space, settings: Settings, from_input: SpaceInput) -> Harmonised:
    """Return the corrected coordinates of all cells; the batches are `embed.harmony_keys`, or the groups."""
    design, rows = space.packed.design, space.packed.input_row
    batches = {name: column.codes[rows] for name, column in from_input.columns.items()}
    return harmonised(
        read_array(space.storage, keys.HARMONY_INPUT),
        batches or {"group": design.group_of(np.arange(design.n_cells))},
        seed=settings.seed,
        threads=cpu_count(),
    )


# --- sums over cells -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SumTask:
    """Sum one population's cells over the blocks `first:last`; `name` is the folder of the sums."""

    first: int
    last: int
    population: int
    name: str


def summed_moments(
    space: Space,
    inner: np.ndarray,
    populations: np.ndarray,
    population: int,
    runtime: Runtime,
    *,
    products: bool = True,
) -> Moments:
    """Return the sums over a population's cells, added in block order; finished spans are read, not recomputed.

    Parameters
    ----------
    inner
        (groups,) bool, whether a group's cells enter the outer products.
    populations, population
        (cells,) population code of every packed row, and the code to sum.
    products
        Whether to read the sum of outer products, by far the largest array.
    """
    edges = np.linspace(0, space.packed.n_blocks, min(space.packed.n_blocks, MOST_SPANS) + 1).astype(int)
    shards = []
    for number, (first, last) in enumerate(itertools.pairwise(edges.tolist())):
        name = f"{keys.SPACE_SUMS}/{keys.block_name(population)}-{keys.block_name(number)}"
        files = tuple(f"{keys.EMBEDDING}/{shard_files(f'{name}/{part}', 0, 0)}" for part in SUMS)
        shards.append(Shard(name.rpartition("/")[2], files, SumTask(first, last, population, name)))
    todo = space.run.pending(keys.STAGE_SUMS, space.key, shards)
    space.sums.map(runtime, _sum_span, todo, space, inner, populations, title="space: sums")
    read = (_read_moments(space, shard.task, products=products) for shard in shards)
    return functools.reduce(Moments.plus, read)


def _sum_span(task: SumTask, space: Space, inner: np.ndarray, populations: np.ndarray) -> None:
    with threadpool_limits(1):
        parts = (_block_moments(space, block, inner, populations, task) for block in range(task.first, task.last))
        found = functools.reduce(Moments.plus, parts)
        present = np.flatnonzero(found.cells)
        table = np.column_stack([present, found.cells[present], found.inner_cells[present], found.sums[present]])
        # An array cannot be empty, so a row with 0 cells stands for an empty table.
        groups = table if len(present) else np.zeros((1, 3 + found.sums.shape[1]))
        for part, values in zip(SUMS, (groups.astype(np.float64), found.outer, found.squares[None]), strict=True):
            write_array(space.storage, f"{task.name}/{part}", values)


def _block_moments(space: Space, block: int, inner: np.ndarray, populations: np.ndarray, task: SumTask) -> Moments:
    chosen = populations[space.rows(block)] == task.population
    rows = space.packed.block(block)
    return moments_of(rows if chosen.all() else rows[chosen], space.groups(block)[chosen], len(inner), inner)


def _read_moments(space: Space, task: SumTask, *, products: bool) -> Moments:
    table, squares = (read_array(space.storage, f"{task.name}/{part}") for part in ("groups", "squares"))
    count = len(space.packed.design.groups)
    codes = table[:, 0].astype(np.int64)
    cells, inner, sums = np.zeros(count), np.zeros(count), np.zeros((count, table.shape[1] - 3))
    cells[codes], inner[codes], sums[codes] = table[:, 1], table[:, 2], table[:, 3:]
    outer = read_array(space.storage, f"{task.name}/outer") if products else np.zeros((1, 1))
    return Moments(cells, sums, inner, outer, squares[0])
