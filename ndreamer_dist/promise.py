"""What a run will need, known before it starts: memory per stage and disk, from sizes alone. Pure.

Per stage the promise is `workers x (base + shard + tile) + object store`, plus what the driver holds per cell. The base
is what a Python process with this package's libraries holds before it has done anything.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from ndreamer_dist import keys
from ndreamer_dist.cohort.design import Design
from ndreamer_dist.cohort.pack import partition_count
from ndreamer_dist.cohort.scan import spans_of
from ndreamer_dist.results.store import MATCH_LIMIT
from ndreamer_dist.runtime import Needs
from ndreamer_dist.settings import Settings

BASE_BYTES = 450e6
"""A worker process with torch, scanpy and Ray loaded."""
DRIVER_BYTES = 700e6
"""The driver and Ray's own processes."""
DRIVER_BYTES_PER_CELL = 1500
"""obs (names and a few dozen columns), codes, and the embedding's 50 dimensions."""


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
    per_cell = size.stored_values / max(size.cells, 1)
    modelled = min(size.genes, settings.hvg.num_hvg)
    own = per_cell * min(1.0, 2.5 * modelled / size.genes)  # variable genes are expressed above average
    rows = settings.pack.block_rows
    block = rows * own * 12
    clustered = min(size.cells, max(size.largest_group, settings.clusters.max_cells))
    tasks = {
        keys.STAGE_COHORT: settings.cohort.chunk_rows * per_cell * 40 + size.groups * size.genes * 24,
        keys.STAGE_PACK: settings.cohort.chunk_rows * per_cell * 40 + _partition_cells(size, settings) * own * 24,
        keys.STAGE_CLUSTERS: clustered * (own * 24 + settings.clusters.n_neighbors * 60 + 50 * 12),
        keys.STAGE_EMBED: block * 2 + rows * settings.model.latent * 12 + _parameters(settings, modelled) * 4,
        keys.STAGE_PCA: rows * settings.model.latent * 24,
        keys.STAGE_MATCH: _matching_bytes(size, settings),
        keys.STAGE_EFFECTS: rows * modelled * 24 + block * 3,
    }
    driver = DRIVER_BYTES + DRIVER_BYTES_PER_CELL * size.cells + object_store
    promised = {stage: int(driver + cpus * (BASE_BYTES + tile)) for stage, tile in tasks.items()}
    training = settings.train.workers * (BASE_BYTES * 2 + _training_bytes(size, settings, modelled, own))
    promised[keys.STAGE_TRAIN] = int(driver + training + cpus * (BASE_BYTES + block * 4))
    return {stage: promised[stage] for stage in keys.STAGES}


def disk_bytes(size: CohortSize, settings: Settings) -> int:
    """Return the bytes that the run directory will take, before compression."""
    modelled = min(size.genes, settings.hvg.num_hvg)
    own = size.stored_values * min(1.0, 2.5 * modelled / size.genes)
    embedding = size.cells * (2 * settings.model.latent + 100) * 4
    told = size.cells * size.groups if size.cells * size.groups <= MATCH_LIMIT else 0  # in results.zarr's obsm
    matches = size.cells * size.edges / size.groups * settings.match.neighbours * 8 + told * 8
    layers = len(settings.effects.store) * size.cells * modelled * np.dtype(settings.effects.dtype).itemsize
    checkpoints = 3 * 3 * _parameters(settings, modelled) * 4
    return int(2 * own * 8 + embedding + matches + layers + checkpoints)


def needs(size: CohortSize, settings: Settings, *, cpus: int, object_store: int) -> Needs:
    """Return the run's peak memory and disk."""
    memory = max(stage_memory(size, settings, cpus=cpus, object_store=object_store).values())
    return Needs(memory=memory, disk=disk_bytes(size, settings))


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
