"""Compute the memory of every stage and the disk space of a run from sizes alone. Pure.

The memory of a stage is `workers x (base + shard + tile) + object store`, plus the driver's memory per cell and, with
Ray, its idle workers. The base is the memory of a process that has only imported the libraries.
"""

from __future__ import annotations

from ndreamer_dist import keys
from ndreamer_dist.compute.executor import TaskNeed
from ndreamer_dist.compute.machine import Needs
from ndreamer_dist.effects.tables import SHARD_GENES, keeps_matches
from ndreamer_dist.embedding.space import MOST_SPANS
from ndreamer_dist.planning.sizes import BASE_BYTES, GIVEN_DIMENSIONS, CohortSize, parameter_count
from ndreamer_dist.planning.stages import stages_of
from ndreamer_dist.settings import Settings

DRIVER_BYTES = 700e6
"""Memory of the driver and of Ray's own processes."""
DRIVER_BYTES_PER_CELL = 150
"""Memory of the driver per cell: one column of obs at a time with its encoding, and codes, totals and counts."""

SMALL_BLOCK_ROWS = 1024
FEWER = "fewer processors (--set run.cpus=1)"
SMALLER_BLOCKS = f"smaller blocks (--set pack.block_rows={SMALL_BLOCK_ROWS})"
SMALLER_MODEL = "a smaller model (--preset small)"
WORTH_SAYING = 0.97
"""A change is proposed if it needs less than this share of the memory."""
IDLE_BYTES = 600e6
"""Memory of an idle worker. Ray keeps one per processor, and one that spills objects."""
FRAME_BYTES_PER_CELL = 1500
"""Memory per cell of `obs` as a data frame with names and a few dozen columns, which the results reader loads."""


def stage_memory(size: CohortSize, settings: Settings, *, cpus: int, object_store: int) -> dict[str, int]:
    """Return the promised peak memory in bytes of every stage, summed over all processes of one machine.

    Parameters
    ----------
    cpus
        Number of tasks that run concurrently.
    object_store
        Size of Ray's object store in bytes; 0 without Ray.
    """
    tasks = task_memory(size, settings)
    idle = (cpus + 1) * IDLE_BYTES if object_store else 0.0
    driver = driver_memory(size) + object_store + idle
    return {
        name: int(driver + cpus * tasks[name] + stage.beside_bytes(size, settings))
        for name, stage in stages_of(settings).items()
    }


def task_memory(size: CohortSize, settings: Settings) -> dict[str, int]:
    """Return the memory in bytes of one task of every stage, with its process; for training, of one read task."""
    return {name: int(BASE_BYTES + stage.task_bytes(size, settings)) for name, stage in stages_of(settings).items()}


def driver_memory(size: CohortSize) -> int:
    """Return the memory in bytes of the driver and of Ray's own processes on its machine."""
    return int(DRIVER_BYTES + DRIVER_BYTES_PER_CELL * size.cells)


def disk_bytes(size: CohortSize, settings: Settings) -> int:
    """Return the disk space in bytes of the run directory, before compression."""
    modelled = size.modelled(settings)
    own = size.cells * size.modelled_per_cell(settings)
    embedding = _coordinate_bytes(size, settings, modelled)
    pairs = (
        size.cells * size.groups if keeps_matches(size.cells, size.groups, size.edges) else 0
    )  # obsm of results.zarr
    matches = (size.cells * _matches_per_cell(size, settings) + pairs) * 8
    layers = len(settings.effects.store) * size.cells * modelled * 4
    checkpoints = 3 * 3 * parameter_count(settings, modelled) * 4
    return int(2 * own * 8 + embedding + matches + layers + checkpoints)


def _matches_per_cell(size: CohortSize, settings: Settings) -> float:
    """Return the largest number of matches that are stored per cell.

    For every group that a cell is matched with, as many neighbours are stored as `denoised` averages. If groups are
    sampled (`match.groups`), groups of other conditions than the cell's own have only `match.neighbours`.
    """
    averaged = max(settings.match.neighbours, settings.denoise.counted(size.fewest_groups))
    most, sampled = size.edges / size.groups * averaged, settings.match.groups
    if sampled is None:
        return most
    others = size.conditions - 1 if settings.match.edges == "all" else 1
    return min(most, (sampled + 1) * averaged + sampled * others * settings.match.neighbours)


def _coordinate_bytes(size: CohortSize, settings: Settings, genes: int) -> int:
    """Return the bytes of the coordinates in embedding.zarr and results.zarr, and of the sums behind them."""
    method, width = settings.embed.method, settings.embed.dimensions
    trained = size.cells * (2 * settings.model.latent + 100) * 4 if keys.is_trained(method) else 0
    if method == keys.NDREAMER:
        return trained
    if method.startswith(keys.OBSM_PREFIX):
        return size.cells * 2 * GIVEN_DIMENSIONS * 4
    arrays = 3 if method == keys.HARMONY else 2
    return trained + size.cells * arrays * width * 4 + MOST_SPANS * genes * genes * 8


def needs(size: CohortSize, settings: Settings, *, cpus: int, object_store: int) -> Needs:
    """Return the peak memory and the disk space of a run, in bytes, and the changes that would need less memory."""
    memory = _peak(size, settings, cpus, object_store)
    changes = {FEWER: (settings, 1), SMALLER_BLOCKS: (_blocks(settings), cpus), SMALLER_MODEL: (_model(settings), cpus)}
    savings = [
        how for how, (changed, workers) in changes.items()
        if _peak(size, changed, workers, object_store) < WORTH_SAYING * memory
    ]  # fmt: skip
    return Needs(memory=memory, disk=disk_bytes(size, settings), savings=tuple(savings))


def _peak(size: CohortSize, settings: Settings, cpus: int, object_store: int) -> int:
    return max(stage_memory(size, settings, cpus=cpus, object_store=object_store).values())


def _blocks(settings: Settings) -> Settings:
    """Return settings with smaller blocks of rows."""
    pack = settings.pack.model_copy(update={"block_rows": min(settings.pack.block_rows, SMALL_BLOCK_ROWS)})
    return settings.model_copy(update={"pack": pack})


def _model(settings: Settings) -> Settings:
    """Return settings with the network and the batches of the preset for laptops."""
    small = Settings.build(preset="small")
    train = settings.train.model_copy(update={"batch_size": small.train.batch_size})
    return settings.model_copy(update={"model": small.model, "train": train})


def all_genes_needs(
    cells: int, genes: int, density: float, settings: Settings, *, cpus: int, object_store: int
) -> Needs:
    """Return the peak memory and the disk space, in bytes, of writing the layers for all genes of the cohort.

    Parameters
    ----------
    density
        Share of the matrix entries that are stored (not zero).
    """
    rows, values = settings.pack.block_rows, density * genes
    task = rows * (min(genes, SHARD_GENES) * 24 + values * 36) + settings.cohort.chunk_rows * values * 40
    driver = DRIVER_BYTES + FRAME_BYTES_PER_CELL * cells + object_store
    disk = len(settings.effects.store) * cells * genes * 4 + 2 * cells * values * 8
    savings = ((FEWER,) if cpus > 1 else ()) + ((SMALLER_BLOCKS,) if rows > SMALL_BLOCK_ROWS else ())
    return Needs(memory=int(driver + cpus * (BASE_BYTES + task)), disk=int(disk), savings=savings)


def largest_task(size: CohortSize, settings: Settings) -> TaskNeed:
    """Return the stage whose tasks need the most memory, and that memory."""
    tasks = task_memory(size, settings)
    stage = max(tasks, key=tasks.__getitem__)
    return TaskNeed(stage, tasks[stage])
