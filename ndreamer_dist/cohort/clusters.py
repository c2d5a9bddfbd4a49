"""Cluster the cells with Leiden at a low and at a high resolution (METHOD section 1.3).

Input: the packed cohort. Output: `cluster_low/<group>` and `cluster_high/<group>`, int32 labels; 0 is the largest
cluster. Large groups are clustered separately, one task each; a label then has a meaning only inside its group.
Otherwise one task clusters all cells together. If the cells of a group or of the cohort are too many for one graph, a
sample of them, the sketch, is clustered, and the other cells take labels from their nearest sketch cells.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ndreamer_dist import keys
from ndreamer_dist.cohort.design import Group
from ndreamer_dist.cohort.graph import LIBRARIES, cluster_cells
from ndreamer_dist.cohort.packed import Packed
from ndreamer_dist.cohort.sketch import Sketch, labels_apart, sketch_labels, sketch_of, sketch_shard
from ndreamer_dist.compute.executor import Runtime, loads
from ndreamer_dist.errors import listing
from ndreamer_dist.rundir.directory import RunDirectory, Shard
from ndreamer_dist.rundir.stage import StageRun
from ndreamer_dist.settings import ClustersSettings, Settings
from ndreamer_dist.storage.arrays import array_files, write_array

logger = logging.getLogger(__name__)

CLUSTER_LEVELS = (keys.PACKED_LOW, keys.PACKED_HIGH)


@dataclass(frozen=True)
class GraphTask:
    """One neighbour graph: packed rows `start:stop` are its cells, `shards` the groups whose labels are missing."""

    number: int
    start: int
    stop: int
    shards: tuple[Shard, ...]


def run_clusters(run: RunDirectory, settings: Settings, packed: Packed, runtime: Runtime, key: str) -> None:
    """Write the missing cluster labels, one shard per group."""
    groups = packed.design.groups
    way = clustered_by(settings.clusters, packed.n_rows, len(groups))
    shards = [_group_shard(group.code) for group in groups]
    first = [sketch_shard()] if way == "sketch" else []
    stage = StageRun(run, keys.STAGE_CLUSTERS, key)
    todo = stage.begin([*first, *shards], [f"{keys.PACKED}/{name}" for name in (*CLUSTER_LEVELS, keys.PACKED_SKETCH)])
    if not todo:
        return
    if way == "sketch":
        _log_sketch(settings.clusters, packed.n_rows, len(groups))
        sketch, apart = [shard for shard in todo if shard.task is None], [s for s in todo if s.task is not None]
        stage.map(runtime, write_sketch, sketch, settings, packed, title="clusters: sketch")
        stage.map(runtime, write_labels, apart, settings, packed)
        return
    if way == "group":
        _log_group_sketches(settings.clusters, groups)
        tasks = [GraphTask(s.task, groups[s.task].start, groups[s.task].stop, (s,)) for s in todo]
    else:
        tasks = [GraphTask(len(shards), 0, packed.n_rows, tuple(todo))]
    for _ in runtime.map(write_clusters, tasks, stage, settings, packed, title="clusters"):
        pass


def clustered_by(settings: ClustersSettings, n_cells: int, n_groups: int) -> Literal["group", "all", "sketch"]:
    """Return what is clustered: each group separately, all cells together, or a sketch of all cells."""
    if settings.within != "auto":
        return settings.within
    if n_cells >= settings.group_mean_cells * n_groups:
        return "group"
    if n_cells <= settings.max_cells:
        return "all"
    return "sketch"


def _log_sketch(settings: ClustersSettings, n_cells: int, n_groups: int) -> None:
    logger.info(
        "clusters: %d cells in groups of %d on average are too many for one graph (clusters.max_cells), and the groups "
        "too small for graphs of their own (clusters.group_mean_cells): %d cells, the same share of every group, are "
        "clustered together, and the others take the labels of the nearest of these",
        n_cells, n_cells // n_groups, min(settings.sketch_cells, n_cells),
    )  # fmt: skip


def too_large(settings: ClustersSettings, group: Group) -> bool:
    """Return whether a group is too large for its own graph, so that its own sketch is clustered instead."""
    return settings.within == "auto" and group.cells > settings.max_cells


def _log_group_sketches(settings: ClustersSettings, groups: Sequence[Group]) -> None:
    large = [group.name for group in groups if too_large(settings, group)]
    if large:
        logger.info(
            "clusters: %s: too large for one graph (clusters.max_cells), so %d cells of each are clustered, and the "
            "others take the labels of the nearest of these",
            listing(large), settings.sketch_cells,
        )  # fmt: skip


@loads(*LIBRARIES)
def write_sketch(_: None, settings: Settings, packed: Packed) -> None:
    """Cluster a sketch of all cells and write it; a task."""
    seed = _seed(settings.seed, len(packed.design.groups))
    sketch_of(packed, settings.clusters, seed).write(packed.storage)


def write_labels(code: int, settings: Settings, packed: Packed) -> None:
    """Label the cells of one group by the stored sketch and write the labels; a task."""
    group = packed.design.groups[code]
    _write(packed, group, sketch_labels(group, packed, Sketch.read(packed.storage), settings.clusters))


@loads(*LIBRARIES)
def write_clusters(task: GraphTask, stage: StageRun, settings: Settings, packed: Packed) -> int:
    """Cluster the cells of one graph, write the labels of its groups and return the number of groups; a task."""
    groups = [packed.design.groups[shard.task] for shard in task.shards]
    seed = _seed(settings.seed, task.number)
    if len(groups) == 1 and too_large(settings.clusters, groups[0]):
        labels = labels_apart(groups[0], packed, settings.clusters, seed)
    else:
        labels = cluster_cells(packed.rows(task.start, task.stop), settings.clusters, seed)
    for shard, group in zip(task.shards, groups, strict=True):
        part = slice(group.start - task.start, group.stop - task.start)
        _write(packed, group, labels[:, part])
        stage.mark(shard)
    return len(task.shards)


def _write(packed: Packed, group: Group, labels: np.ndarray) -> None:
    for level, values in zip(CLUSTER_LEVELS, labels, strict=True):
        write_array(packed.storage, f"{level}/{keys.block_name(group.code)}", values)


def _seed(seed: int, number: int) -> int:
    """Return the seed of one graph, a non-negative int32 as scanpy and leidenalg expect."""
    return int(np.random.SeedSequence((seed, keys.STREAMS[keys.STAGE_CLUSTERS], number)).generate_state(1)[0]) % 2**31


def _group_shard(code: int) -> Shard:
    arrays = [f"{keys.PACKED}/{level}/{keys.block_name(code)}" for level in CLUSTER_LEVELS]
    return Shard(keys.block_name(code), array_files(*arrays), code)
