"""What a run will need, known before it starts: memory per stage and disk, from sizes alone. Pure.

Per stage the promise is `workers x (base + shard + tile) + object store`, plus what the driver holds per cell. The base
is what a Python process with this package's libraries holds before it has done anything.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from ndreamer_dist import keys
from ndreamer_dist.cohort.design import Design
from ndreamer_dist.cohort.pack import partition_count
from ndreamer_dist.cohort.statistics import spans_of
from ndreamer_dist.compute.executor import TaskNeed
from ndreamer_dist.compute.machine import Needs
from ndreamer_dist.effects.tables import MATCH_LIMIT, SHARD_GENES
from ndreamer_dist.embedding.harmony import BYTES_PER_CELL as HARMONY_BYTES
from ndreamer_dist.embedding.space import MOST_SPANS
from ndreamer_dist.rundir.stage import stages_of
from ndreamer_dist.settings import Settings

BASE_BYTES = 450e6
"""A worker process with torch, scanpy and Ray loaded."""
DRIVER_BYTES = 700e6
"""The driver and Ray's own processes."""
DRIVER_BYTES_PER_CELL = 1500
"""obs (names and a few dozen columns), codes, and the embedding's 50 dimensions."""

GIVEN_DIMENSIONS = 100
"""Dimensions that the input's own coordinates are taken to have, before they are read."""


@dataclass(frozen=True)
class CohortSize:
    """The sizes a promise is made from."""

    cells: int
    genes: int
    stored_values: int
    groups: int
    largest_group: int
    edges: int
    conditions: int

    @classmethod
    def of(cls, design: Design, settings: Settings, *, genes: int, stored_values: int) -> CohortSize:
        """Return the sizes of a designed cohort."""
        return cls(
            cells=design.n_cells,
            genes=genes,
            stored_values=stored_values,
            groups=len(design.groups),
            largest_group=max(group.cells for group in design.groups),
            edges=sum(len(design.targets(group, settings.match.edges)) for group in design.groups),
            conditions=len(design.conditions),
        )


def stage_memory(size: CohortSize, settings: Settings, *, cpus: int, object_store: int) -> dict[str, int]:
    """Return the promised peak memory of every stage, in bytes, over all processes of one machine.

    Parameters
    ----------
    cpus
        Tasks that run at once.
    object_store
        Bytes of Ray's shared memory.
    """
    tasks = task_memory(size, settings)
    driver = driver_memory(size) + object_store
    promised = {stage: driver + cpus * task for stage, task in tasks.items()}
    if keys.STAGE_TRAIN in promised:
        promised[keys.STAGE_TRAIN] += settings.train.workers * trainer_memory(size, settings)
    if keys.STAGE_SPACE in promised:
        promised[keys.STAGE_SPACE] += space_memory(size, settings)
    return promised


def space_memory(size: CohortSize, settings: Settings) -> int:
    """Return what the driver holds to place cells without a network, beside its tables.

    That is the covariance of the genes and its eigenvectors; all that Harmony holds; or the input's own coordinates.
    """
    method, modelled = settings.embed.method, min(size.genes, settings.hvg.num_hvg)
    if method.startswith(keys.OBSM_PREFIX):
        return size.cells * GIVEN_DIMENSIONS * 12
    harmony = size.cells * HARMONY_BYTES if method == keys.HARMONY else 0
    return modelled * modelled * 8 * 6 + harmony


def task_memory(size: CohortSize, settings: Settings) -> dict[str, int]:
    """Return the bytes of one task of every stage, its process included; of training those of a reader."""
    per_cell, own = _stored(size, settings)
    modelled = min(size.genes, settings.hvg.num_hvg)
    rows = settings.pack.block_rows
    block = rows * own * 12
    products = modelled * modelled * 8
    tiles = {
        keys.STAGE_COHORT: settings.cohort.chunk_rows * per_cell * 40 + size.groups * size.genes * 24,
        keys.STAGE_PACK: settings.cohort.chunk_rows * per_cell * 40 + _partition_cells(size, settings) * own * 24,
        keys.STAGE_CLUSTERS: _most_clustered(size, settings)
        * (own * 24 + settings.clusters.n_neighbors * 60 + 50 * 12),
        keys.STAGE_TRAIN: block * 4,
        keys.STAGE_EMBED: block * 2 + rows * settings.model.latent * 12 + _parameters(settings, modelled) * 4,
        keys.STAGE_PCA: rows * settings.model.latent * 24,
        keys.STAGE_SPACE: rows * modelled * 24 + 3 * products + block * 6,
        keys.STAGE_MATCH: _matching_bytes(size, settings),
        keys.STAGE_EFFECTS: rows * modelled * 32 + block * 3,
    }
    return {stage: int(BASE_BYTES + tiles[stage]) for stage in stages_of(settings)}


def driver_memory(size: CohortSize) -> int:
    """Return the bytes of the driver, Ray's own processes on its machine included."""
    return int(DRIVER_BYTES + DRIVER_BYTES_PER_CELL * size.cells)


def trainer_memory(size: CohortSize, settings: Settings) -> int:
    """Return the bytes of one training worker."""
    modelled = min(size.genes, settings.hvg.num_hvg)
    return int(BASE_BYTES * 2 + _training_bytes(size, settings, modelled, _stored(size, settings)[1]))


def _stored(size: CohortSize, settings: Settings) -> tuple[float, float]:
    """Return the stored values of a cell, and those of its modelled genes: these are expressed above average."""
    per_cell = size.stored_values / max(size.cells, 1)
    return per_cell, per_cell * min(1.0, 2.5 * min(size.genes, settings.hvg.num_hvg) / size.genes)


def _most_clustered(size: CohortSize, settings: Settings) -> int:
    """Return the most cells of one graph."""
    asked = settings.clusters
    most = {
        "auto": max(asked.max_cells, asked.sketch_cells), "group": size.largest_group, "all": size.cells,
        "sketch": asked.sketch_cells,
    }[asked.within]  # fmt: skip
    return min(size.cells, most)


def disk_bytes(size: CohortSize, settings: Settings) -> int:
    """Return the bytes that the run directory will take, before compression."""
    modelled = min(size.genes, settings.hvg.num_hvg)
    own = size.cells * _stored(size, settings)[1]
    embedding = _coordinate_bytes(size, settings, modelled)
    told = size.cells * size.groups if size.cells * size.groups <= MATCH_LIMIT else 0  # in results.zarr's obsm
    kept = max(settings.match.neighbours, settings.denoise.neighbours)  # of a group's own condition; else fewer
    matches = size.cells * size.edges / size.groups * kept * 8 + told * 8
    layers = len(settings.effects.store) * size.cells * modelled * 4
    checkpoints = 3 * 3 * _parameters(settings, modelled) * 4
    return int(2 * own * 8 + embedding + matches + layers + checkpoints)


def _coordinate_bytes(size: CohortSize, settings: Settings, genes: int) -> int:
    """Return the bytes of the coordinates, in embedding.zarr and in results.zarr, and of the sums behind them."""
    method, width = settings.embed.method, settings.embed.dimensions
    trained = size.cells * (2 * settings.model.latent + 100) * 4 if keys.is_trained(method) else 0
    if method == keys.NDREAMER:
        return trained
    if method.startswith(keys.OBSM_PREFIX):
        return size.cells * 2 * GIVEN_DIMENSIONS * 4
    arrays = 3 if method == keys.HARMONY else 2
    return trained + size.cells * arrays * width * 4 + MOST_SPANS * genes * genes * 8


def needs(size: CohortSize, settings: Settings, *, cpus: int, object_store: int) -> Needs:
    """Return the run's peak memory and disk."""
    memory = max(stage_memory(size, settings, cpus=cpus, object_store=object_store).values())
    return Needs(memory=memory, disk=disk_bytes(size, settings))


def all_genes_needs(
    cells: int, genes: int, density: float, settings: Settings, *, cpus: int, object_store: int
) -> Needs:
    """Return peak memory and disk of a store of all genes: packed blocks of all of them, and shards of a span of them.

    Parameters
    ----------
    density
        Share of the values that are stored.
    """
    rows, values = settings.pack.block_rows, density * genes
    task = rows * (min(genes, SHARD_GENES) * 24 + values * 36) + settings.cohort.chunk_rows * values * 40
    driver = DRIVER_BYTES + DRIVER_BYTES_PER_CELL * cells + object_store
    disk = len(settings.effects.store) * cells * genes * 4 + 2 * cells * values * 8
    return Needs(memory=int(driver + cpus * (BASE_BYTES + task)), disk=int(disk))


def largest_task(size: CohortSize, settings: Settings) -> TaskNeed:
    """Return what the largest of all tasks takes."""
    tasks = task_memory(size, settings)
    stage = max(tasks, key=tasks.__getitem__)
    return TaskNeed(stage, tasks[stage])


def _partition_cells(size: CohortSize, settings: Settings) -> float:
    """Return the cells of one of packing's partitions, at the most."""
    rows = settings.pack.block_rows
    blocks = -(-size.cells // rows)
    partitions = partition_count(blocks, size.stored_values, len(spans_of(size.cells)))
    return min(size.cells, rows * -(-blocks // partitions))


def _parameters(settings: Settings, genes: int) -> int:
    model = settings.model
    widths = [genes, *model.encoder]
    encoder = sum(a * b for a, b in itertools.pairwise(widths))
    codes = model.codebooks * model.code_dim * (model.encoder[-1] + model.codes)
    head = 2 * model.latent * (model.codebooks * model.code_dim + 18 * model.latent)
    widths = [model.latent, *model.decoder, genes]
    decoder = sum(a * b for a, b in itertools.pairwise(widths))
    return encoder + codes + head + decoder


def _matching_bytes(size: CohortSize, settings: Settings) -> float:
    """Return the bytes of a target group's index and its copies on the way, a batch of queries, a tile per thread."""
    queries = min(size.cells, settings.match.query_rows + 65_536)
    return size.largest_group * 50 * 20 + queries * 50 * 8 + settings.run.task_threads * 80e6


def _training_bytes(size: CohortSize, settings: Settings, genes: int, stored: float) -> float:
    """Weights, gradients and moments; activations of a mini-batch; the row labels; the stream's read-ahead."""
    cells = 2 * settings.train.batch_size
    model = settings.model
    activations = cells * (4 * genes + 8 * sum(model.encoder) + 40 * model.latent) * 4
    tables = 4 * model.codebooks * cells * model.codes * 4 + 12 * cells * cells * 4
    window = 3 * min(64, max(8, -(-size.groups // 2))) * cells * stored * 16
    return _parameters(settings, genes) * 16 + activations + tables + window + size.cells * 8
