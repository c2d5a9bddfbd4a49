"""The stages `embed` and `pca`: encode every cell, then compute the PCA of the embedding (METHOD section 5).

Input: packed.zarr and model/. Output: embedding.zarr. A task encodes one row block in fixed tiles and pads the last
one, so the embedding of a cell does not depend on the other cells of its tile. It also writes the float64 moments of
the block. The driver adds these in block order and diagonalises one (z, z) matrix. A second round of tasks projects.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from ndreamer_dist import keys
from ndreamer_dist.cohort.packed import Packed
from ndreamer_dist.compute.engines import chosen_device, torch_finding
from ndreamer_dist.compute.executor import Runtime, with_threads
from ndreamer_dist.embedding.axes import principal_axes
from ndreamer_dist.errors import StoreError
from ndreamer_dist.rundir.directory import RunDirectory, Shard
from ndreamer_dist.rundir.stage import StageRun
from ndreamer_dist.settings import Settings
from ndreamer_dist.storage.arrays import ensure_array, read_array, shard_files, write_array, write_part
from ndreamer_dist.storage.files import Storage
from ndreamer_dist.training.model_file import TrainedModel

_AXES_FILES = (
    shard_files(keys.PCA_MEAN, 0),
    shard_files(keys.PCA_COMPONENTS, 0, 0),
    shard_files(keys.PCA_VARIANCE, 0),
)


def run_embed(run: RunDirectory, settings: Settings, packed: Packed, runtime: Runtime, key: str) -> None:
    """Write the embedding mu and the moments of each block to embedding.zarr; one task per row block."""
    stage = StageRun(run, keys.STAGE_EMBED, key)
    shards = [Shard(keys.block_name(block), _embed_files(block), block) for block in range(packed.n_blocks)]
    todo = stage.begin(shards, [f"{keys.EMBEDDING}/{name}" for name in (keys.MU, keys.MOMENT_SUM, keys.MOMENT_OUTER)])
    if not todo:
        return
    _make_arrays(run.storage / keys.EMBEDDING, settings.model.latent, packed)
    device = chosen_device(settings.embed.device, "embed.device", runtime, torch_finding)
    stage.map(runtime, _embed, todo, stage, packed, settings, device, num_gpus=1 if device == "cuda" else 0)


def run_pca(run: RunDirectory, settings: Settings, packed: Packed, runtime: Runtime, key: str) -> None:
    """Write the PCA of mu to embedding.zarr: the axes from summed moments, then one task per row block."""
    stage, storage = StageRun(run, keys.STAGE_PCA, key), run.storage / keys.EMBEDDING
    width = min(settings.embed.dimensions, settings.model.latent, packed.n_rows)
    axes = Shard("axes", tuple(f"{keys.EMBEDDING}/{name}" for name in _AXES_FILES), settings.embed.dimensions)
    blocks = [
        Shard(keys.block_name(block), (f"{keys.EMBEDDING}/{shard_files(keys.PCA, block, 0)}",), block)
        for block in range(packed.n_blocks)
    ]
    todo = stage.begin([axes, *blocks], [f"{keys.EMBEDDING}/{keys.PCA}"])
    if not todo:
        return
    shape, chunks = (packed.n_rows, width), (packed.block_rows, width)
    ensure_array(storage, keys.PCA, shape=shape, dtype="float32", chunks=chunks, fill_value=np.nan)
    if axes in todo:
        with_threads(1, stage.do, _write_axes, axes, storage, packed)
        todo.remove(axes)
    stage.map(runtime, _project, todo, storage, packed)


def _embed_files(block: int) -> tuple[str, ...]:
    names = (
        shard_files(keys.MU, block, 0),
        shard_files(keys.MOMENT_SUM, block, 0),
        shard_files(keys.MOMENT_OUTER, block, 0, 0),
    )
    return tuple(f"{keys.EMBEDDING}/{name}" for name in names)


def _make_arrays(storage: Storage, z: int, packed: Packed) -> None:
    shape, chunks = (packed.n_rows, z), (packed.block_rows, z)
    ensure_array(storage, keys.MU, shape=shape, dtype="float32", chunks=chunks, fill_value=np.nan)
    ensure_array(storage, keys.MOMENT_SUM, shape=(packed.n_blocks, z), dtype="float64", chunks=(1, z))
    ensure_array(storage, keys.MOMENT_OUTER, shape=(packed.n_blocks, z, z), dtype="float64", chunks=(1, z, z))


@lru_cache(maxsize=1)
def _model(storage: Storage, device: str, key: str) -> TrainedModel:
    del key  # part of the cache key: another stage key means other weights
    return TrainedModel.load(storage, device)


def _embed(block: int, stage: StageRun, packed: Packed, settings: Settings, device: str) -> None:
    storage, model = stage.run.storage / keys.EMBEDDING, _model(stage.run.storage, device, stage.key)
    drawn = settings.seed, keys.STREAMS[keys.STAGE_EMBED], block
    mu = model.embed(packed.block(block), settings.embed.tile_rows, codes=settings.embed.codes, key=drawn)
    if not np.isfinite(mu).all():
        msg = f"the embedding of packed rows from {block * packed.block_rows} is not finite: training went wrong"
        raise StoreError(msg)
    write_part(storage, keys.MU, slice(*packed.block_range(block)), mu)
    exact = mu.astype(np.float64)
    part = slice(block, block + 1)
    write_part(storage, keys.MOMENT_SUM, part, exact.sum(axis=0)[None])
    write_part(storage, keys.MOMENT_OUTER, part, (exact.T @ exact)[None])


def _write_axes(dimensions: int, storage: Storage, packed: Packed) -> None:
    sums: np.ndarray | float = 0.0
    outer: np.ndarray | float = 0.0
    for block in range(packed.n_blocks):  # in block order, so that the bits do not depend on the tasks
        part = slice(block, block + 1)
        sums = sums + read_array(storage, keys.MOMENT_SUM, part)[0]
        outer = outer + read_array(storage, keys.MOMENT_OUTER, part)[0]
    axes = principal_axes(packed.n_rows, np.asarray(sums), np.asarray(outer), dimensions)
    for name, values in zip((keys.PCA_MEAN, keys.PCA_COMPONENTS, keys.PCA_VARIANCE), axes, strict=True):
        write_array(storage, name, values)


def _project(block: int, storage: Storage, packed: Packed) -> None:
    rows = slice(*packed.block_range(block))
    mean, components = read_array(storage, keys.PCA_MEAN), read_array(storage, keys.PCA_COMPONENTS)
    scores = (read_array(storage, keys.MU, rows).astype(np.float64) - mean) @ components
    write_part(storage, keys.PCA, rows, scores.astype(np.float32))
