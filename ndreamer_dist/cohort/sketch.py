"""Cluster more cells than one graph can hold, through a sample of them, the sketch (METHOD section 1.3).

The sketch takes the same share of each group and is clustered as if it were the cohort. Each other cell gets the most
frequent label of its nearest sketch cells. Input: the packed cohort. Output: packed.zarr/sketch, the principal axes,
points and labels of the sketch; the task of each group reads them to label its cells. A single group that is too large
for its own graph has its own sketch, which is not stored.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import sparse

from ndreamer_dist import keys
from ndreamer_dist.cohort.design import Design, Group
from ndreamer_dist.cohort.graph import QUERY_ROWS, cluster_points, one_cluster, scanpy_pca
from ndreamer_dist.cohort.packed import Packed
from ndreamer_dist.rundir.directory import Shard
from ndreamer_dist.settings import ClustersSettings
from ndreamer_dist.storage.arrays import array_files, read_array, write_array
from ndreamer_dist.storage.files import Storage

SKETCH_ARRAYS = ("mean", "axes", "points", "low", "high")
"""The arrays of packed.zarr/sketch."""


@dataclass(frozen=True)
class Sketch:
    """A clustered sample of the cells.

    Attributes
    ----------
    mean, axes
        (genes,) float64 mean expression; (genes, components) float64 principal axes.
    points
        (sketch cells, components) float32 coordinates of the sketch cells on the axes.
    low, high
        (sketch cells,) int32 labels; 0 is the largest cluster of the sketch.
    """

    mean: np.ndarray
    axes: np.ndarray
    points: np.ndarray
    low: np.ndarray
    high: np.ndarray

    @property
    def labels(self) -> np.ndarray:
        """The low and the high labels: (2, sketch cells) int32."""
        return np.stack((self.low, self.high))

    def write(self, storage: Storage) -> None:
        """Write the arrays of the sketch below packed.zarr; one task does this."""
        for name in SKETCH_ARRAYS:
            write_array(storage, f"{keys.PACKED_SKETCH}/{name}", getattr(self, name))

    @classmethod
    def read(cls, storage: Storage) -> Sketch:
        """Read the output of `write`."""
        return cls(*(read_array(storage, f"{keys.PACKED_SKETCH}/{name}") for name in SKETCH_ARRAYS))


def sketch_shard() -> Shard:
    """Return the shard of the sketch."""
    folder, axes = f"{keys.PACKED}/{keys.PACKED_SKETCH}", {"axes": 2, "points": 2}
    files = (file for name in SKETCH_ARRAYS for file in array_files(f"{folder}/{name}", axes=axes.get(name, 1)))
    return Shard(keys.PACKED_SKETCH, tuple(files), None)


def sketch_spans(design: Design, cells: int) -> list[tuple[int, int]]:
    """Return the packed rows of the sketch, a span `start:stop` per group: the same share of each group, rounded up.

    Packed rows are in random order inside a group, so its first rows are a random sample that one read returns.
    """
    share = min(1.0, cells / design.n_cells)
    return [(group.start, group.start + int(np.ceil(group.cells * share))) for group in design.groups]


def sketch_of(packed: Packed, settings: ClustersSettings, seed: int) -> Sketch:
    """Read and cluster the sketch of a packed cohort."""
    spans = sketch_spans(packed.design, settings.sketch_cells)
    return clustered_sketch(sparse.vstack([packed.rows(*span) for span in spans], format="csr"), settings, seed)


def clustered_sketch(x: sparse.csr_matrix, settings: ClustersSettings, seed: int) -> Sketch:
    """Cluster the cells of a sketch: (cells, genes) log-normalised expression."""
    mean = np.asarray(x.mean(axis=0, dtype=np.float64)).ravel()
    if one_cluster(x):
        none, zeros = np.zeros((x.shape[1], 1)), np.zeros(x.shape[0], dtype=np.int32)
        return Sketch(mean, none, project(x, mean, none), zeros, zeros)
    axes = scanpy_pca(x, settings.n_pcs, seed)[1]
    points = project(x, mean, axes)
    return Sketch(mean, axes, points, *cluster_points(points, settings, seed))


def project(x: sparse.csr_matrix, mean: np.ndarray, axes: np.ndarray) -> np.ndarray:
    """Project cells on principal axes: (cells, components) float32; the result of a row depends on no other row."""
    return np.asarray(x @ axes - mean @ axes, dtype=np.float32)


def sketch_labels(group: Group, packed: Packed, sketch: Sketch, settings: ClustersSettings) -> np.ndarray:
    """Return the low and the high labels of a group's cells, (2, cells) int32; sketch cells keep their own labels."""
    sizes = [stop - start for start, stop in sketch_spans(packed.design, settings.sketch_cells)]
    first = sum(sizes[: group.code])
    return _labelled(sketch.labels[:, first : first + sizes[group.code]], group, packed, sketch, settings)


def labels_apart(group: Group, packed: Packed, settings: ClustersSettings, seed: int) -> np.ndarray:
    """Cluster a sketch of one group and return the low and the high labels of all its cells: (2, cells) int32."""
    stop = min(group.start + settings.sketch_cells, group.stop)  # the first rows are a random sample
    sketch = clustered_sketch(packed.rows(group.start, stop), settings, seed)
    return _labelled(sketch.labels, group, packed, sketch, settings)


def _labelled(own: np.ndarray, group: Group, packed: Packed, sketch: Sketch, settings: ClustersSettings) -> np.ndarray:
    """Append to `own`, the labels of the group's first cells, which are in the sketch, those of its other cells."""
    parts = [own]
    for start in range(group.start + own.shape[1], group.stop, QUERY_ROWS):
        points = project(packed.rows(start, min(start + QUERY_ROWS, group.stop)), sketch.mean, sketch.axes)
        parts.append(nearest_labels(points, sketch, settings.n_neighbors))
    return np.concatenate(parts, axis=1)


def nearest_labels(points: np.ndarray, sketch: Sketch, neighbours: int) -> np.ndarray:
    """Return the most frequent low and high label of each point's nearest sketch cells: (2, points) int32."""
    import faiss

    near = faiss.knn(points, sketch.points, min(neighbours, len(sketch.points)))[1]
    return np.stack([majority(labels[near]) for labels in sketch.labels])


def majority(labels: np.ndarray) -> np.ndarray:
    """Return the most frequent label of each row, ties by first appearance, which is the nearest cell: (rows,)."""
    times = (labels[:, :, None] == labels[:, None, :]).sum(axis=2)
    return labels[np.arange(len(labels)), times.argmax(axis=1)]
