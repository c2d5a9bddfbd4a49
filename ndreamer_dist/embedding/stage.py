"""The embedding: every cell through the trained encoder, then its PCA (METHOD section 5).

Reads packed.zarr and model/; writes embedding.zarr. A task encodes one row block in fixed tiles (the last one padded),
so that no cell's value depends on which cells are encoded beside it, and leaves the block's float64 sums; the driver
adds these in block order and diagonalises one (z, z) matrix; a second round of tasks projects.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np

from ndreamer_dist import keys
from ndreamer_dist.cohort.packed import Packed
from ndreamer_dist.compute.executor import Runtime, with_threads
from ndreamer_dist.embedding.axes import principal_axes
from ndreamer_dist.errors import StoreError
from ndreamer_dist.rundir.directory import RunDirectory, Shard
from ndreamer_dist.rundir.stage import begin_stage, run_task
from ndreamer_dist.settings import Settings
from ndreamer_dist.storage.arrays import create_array, ensure_array, read_array, shard_files, write_array, write_part
from ndreamer_dist.storage.files import Storage
from ndreamer_dist.training.model_file import TrainedModel

_AXES_FILES = (
    shard_files(keys.PCA_MEAN, 0),
    shard_files(keys.PCA_COMPONENTS, 0, 0),
    shard_files(keys.PCA_VARIANCE, 0),
)


def run_embed(run: RunDirectory, settings: Settings, packed: Packed, runtime: Runtime, key: str) -> None:
    """Write mu and the blocks' moments to embedding.zarr; one task per row block."""
    shards = [Shard(keys.block_name(block), _embed_files(block), block) for block in range(packed.n_blocks)]
    todo = begin_stage(
        run,
        keys.STAGE_EMBED,
        key,
        shards,
        lambda fresh: _create(run, settings, packed, create_array if fresh else ensure_array),
    )
    if not todo:
        return
    device = "cuda" if runtime.gpus and settings.train.device != "cpu" else "cpu"
    answers = runtime.map(
        _embed_shard, todo, run, key, packed, settings, device, title="embed",
        num_gpus=1 if device == "cuda" else 0,
    )  # fmt: skip
    for _ in answers:
        pass


def run_pca(run: RunDirectory, settings: Settings, packed: Packed, runtime: Runtime, key: str) -> None:
    """Write the PCA of mu to embedding.zarr: loadings from summed moments, then one task per row block."""
    storage = run.storage / keys.EMBEDDING
    width = min(settings.embed.dimensions, settings.model.latent, packed.n_rows)
    axes = Shard("axes", tuple(f"{keys.EMBEDDING}/{name}" for name in _AXES_FILES), settings.embed.dimensions)
    blocks = [
        Shard(keys.block_name(block), (f"{keys.EMBEDDING}/{shard_files(keys.PCA, block, 0)}",), block)
        for block in range(packed.n_blocks)
    ]

    def create(fresh: bool) -> None:
        make = create_array if fresh else ensure_array
        shape, chunks = (packed.n_rows, width), (packed.block_rows, width)
        make(storage, keys.PCA, shape=shape, dtype="float32", chunks=chunks, fill_value=np.nan)

    todo = begin_stage(run, keys.STAGE_PCA, key, [axes, *blocks], create)
    if axes in todo:
        with_threads(1, run_task, run, keys.STAGE_PCA, key, _write_axes, axes, storage, packed)
        todo.remove(axes)
    for _ in runtime.map(_project_shard, todo, run, key, packed, title="pca"):
        pass


def _embed_files(block: int) -> tuple[str, ...]:
    names = (
        shard_files(keys.MU, block, 0),
        shard_files(keys.MOMENT_SUM, block, 0),
        shard_files(keys.MOMENT_OUTER, block, 0, 0),
    )
    return tuple(f"{keys.EMBEDDING}/{name}" for name in names)


def _create(run: RunDirectory, settings: Settings, packed: Packed, make: Callable[..., None]) -> None:
    storage, z = run.storage / keys.EMBEDDING, settings.model.latent
    shape, chunks = (packed.n_rows, z), (packed.block_rows, z)
    make(storage, keys.MU, shape=shape, dtype="float32", chunks=chunks, fill_value=np.nan)
    make(storage, keys.MOMENT_SUM, shape=(packed.n_blocks, z), dtype="float64", chunks=(1, z))
    make(storage, keys.MOMENT_OUTER, shape=(packed.n_blocks, z, z), dtype="float64", chunks=(1, z, z))


@lru_cache(maxsize=1)
def _model(storage: Storage, device: str, key: str) -> TrainedModel:
    del key  # only tells one training's weights from another's
    return TrainedModel.load(storage, device)


def _embed_shard(shard: Shard, run: RunDirectory, key: str, packed: Packed, settings: Settings, device: str) -> None:
    def work(block: int) -> None:
        storage, model = run.storage / keys.EMBEDDING, _model(run.storage, device, key)
        drawn = settings.seed, keys.STAGES.index(keys.STAGE_EMBED), block
        mu = model.embed(packed.block(block), settings.embed.tile_rows, codes=settings.embed.codes, key=drawn)
        if not np.isfinite(mu).all():
            msg = f"the embedding of packed rows from {block * packed.block_rows} is not finite: training went wrong"
            raise StoreError(msg)
        start, stop = packed.block_range(block)
        write_part(storage, keys.MU, slice(start, stop), mu)
        exact = mu.astype(np.float64)
        part = slice(block, block + 1)
        write_part(storage, keys.MOMENT_SUM, part, exact.sum(axis=0)[None])
        write_part(storage, keys.MOMENT_OUTER, part, (exact.T @ exact)[None])

    run_task(run, keys.STAGE_EMBED, key, work, shard)


def _write_axes(dimensions: int, storage: Storage, packed: Packed) -> None:
    sums: np.ndarray | float = 0.0
    outer: np.ndarray | float = 0.0
    for block in range(packed.n_blocks):  # in block order: one order of summation everywhere
        part = slice(block, block + 1)
        sums = sums + read_array(storage, keys.MOMENT_SUM, part)[0]
        outer = outer + read_array(storage, keys.MOMENT_OUTER, part)[0]
    axes = principal_axes(packed.n_rows, np.asarray(sums), np.asarray(outer), dimensions)
    for name, values in zip((keys.PCA_MEAN, keys.PCA_COMPONENTS, keys.PCA_VARIANCE), axes, strict=True):
        write_array(storage, name, values)


def _project_shard(shard: Shard, run: RunDirectory, key: str, packed: Packed) -> None:
    def work(block: int) -> None:
        storage = run.storage / keys.EMBEDDING
        rows = slice(*packed.block_range(block))
        mean, components = read_array(storage, keys.PCA_MEAN), read_array(storage, keys.PCA_COMPONENTS)
        scores = (read_array(storage, keys.MU, rows).astype(np.float64) - mean) @ components
        write_part(storage, keys.PCA, rows, scores.astype(np.float32))

    run_task(run, keys.STAGE_PCA, key, work, shard)
