"""Measure the cost of clustering, and its agreement with scanpy's defaults.

    python jobs/benchmark_clusters.py COHORT.{h5ad,zarr} [--cells 15000] [--repeats 3]

The cohort's log-normalised cells (all, or a random `--cells`; if there are fewer, copies with fresh Poisson noise) go through
principal components, neighbours and two Leiden clusterings, by scanpy's functions with their defaults and by this package
with each setting. The output holds processor seconds of each part in one thread, without compile times (a first round is not
counted), and the adjusted Rand index (ARI) of the low and the high labels with those of scanpy's defaults. The ARI of scanpy's
defaults between seeds is the upper bound.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import anndata as ad
import numpy as np
import scanpy as sc
from scipy import sparse
from sklearn.metrics import adjusted_rand_score
from threadpoolctl import threadpool_limits

from ndreamer_dist.cohort import graph
from ndreamer_dist.cohort.sketch import Sketch, nearest_labels, project
from ndreamer_dist.settings import ClustersSettings

Labels = tuple[np.ndarray, np.ndarray]
Way = Callable[[sparse.csr_matrix, int], tuple[Labels, dict[str, float]]]


def main() -> None:
    """Print the table."""
    given = arguments()
    warnings.simplefilter("ignore")
    x = expression(given.cohort, given.cells)
    ways: dict[str, Way] = {
        "scanpy's defaults": scanpys,
        **{name: ours(settings) for name, settings in settings_compared().items()},
        "ours, by a sketch of half the cells": by_sketch,
    }
    print(f"{x.shape[0]} cells x {x.shape[1]} genes, one thread")
    with threadpool_limits(1):
        scanpys(x[:1000], 0)  # numba compiles
        reference = [scanpys(x, seed)[0] for seed in range(given.repeats)]
        print("scanpy's defaults, ARI between seeds:", told(reference, reference, same=True))
        print(
            "| way | components | neighbours | Leiden low | Leiden high | ARI low | ARI high |\n|---|---|---|---|---|---|---|"
        )
        for name, way in ways.items():
            found = [way(x, seed + 10) for seed in range(given.repeats)]
            seconds = [np.median([times[part] for _, times in found]) for part in ("pca", "graph", "low", "high")]
            agreement = told([labels for labels, _ in found], reference)
            print(f"| {name} | {' | '.join(f'{s:.1f} s' for s in seconds)} | {agreement} |", flush=True)


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("cohort", type=Path)
    parser.add_argument("--cells", type=int, default=15_000)
    parser.add_argument("--repeats", type=int, default=3, help="seeds")
    return parser.parse_args()


def settings_compared() -> dict[str, ClustersSettings]:
    """Return the settings to compare, by name."""
    return {
        "ours, leidenalg, until nothing moves": ClustersSettings(),
        "ours, leidenalg, 2 iterations": ClustersSettings(iterations=2),
        "ours, igraph, until nothing moves": ClustersSettings(flavor="igraph"),
        "ours, igraph, 2 iterations": ClustersSettings(flavor="igraph", iterations=2),
    }


def expression(cohort: Path, cells: int) -> sparse.csr_matrix:
    """Return log-normalised expression of the 2000 most variable genes: (cells, genes)."""
    adata = ad.read_zarr(cohort) if cohort.suffix == ".zarr" else ad.read_h5ad(cohort)
    rng = np.random.default_rng(0)
    rows = rng.permutation(adata.n_obs)[:cells] if cells <= adata.n_obs else rng.integers(adata.n_obs, size=cells)
    adata = ad.AnnData(sparse.csr_matrix(adata.X)[rows])
    if cells > len(np.unique(rows)):  # copies would be each other's nearest neighbours
        adata.X.data = rng.poisson(adata.X.data).astype(np.float32)
        adata.X.eliminate_zeros()
    sc.pp.normalize_total(adata, target_sum=1e4)
    sc.pp.log1p(adata)
    sc.pp.highly_variable_genes(adata, n_top_genes=min(2000, adata.n_vars))
    return sparse.csr_matrix(adata.X[:, adata.var["highly_variable"].to_numpy()], dtype=np.float32)


def scanpys(x: sparse.csr_matrix, seed: int) -> tuple[Labels, dict[str, float]]:
    """Cluster by scanpy's functions with their defaults."""
    adata, clock = ad.AnnData(x), Clock()
    sc.pp.pca(adata, random_state=seed)
    clock.lap("pca")
    sc.pp.neighbors(adata, random_state=seed)
    clock.lap("graph")
    labels = []
    for name, resolution in (("low", 0.5), ("high", 7.0)):
        sc.tl.leiden(adata, resolution, random_state=seed, key_added=name)
        clock.lap(name)
        labels.append(adata.obs[name].astype(int).to_numpy())
    return (labels[0], labels[1]), clock.seconds


def ours(settings: ClustersSettings) -> Way:
    """Return the package's clustering with these settings."""

    def way(x: sparse.csr_matrix, seed: int) -> tuple[Labels, dict[str, float]]:
        clock = Clock()
        points = graph.scanpy_pca(x, settings.n_pcs, seed)[0]
        clock.lap("pca")
        near = graph.neighbour_graph(points, settings.n_neighbors)
        clock.lap("graph")
        labels = []
        for name, resolution in (("low", settings.low_resolution), ("high", settings.high_resolution)):
            labels.append(graph.leiden(near, resolution, settings.iterations, seed, settings.flavor))
            clock.lap(name)
        return (labels[0], labels[1]), clock.seconds

    return way


def by_sketch(x: sparse.csr_matrix, seed: int) -> tuple[Labels, dict[str, float]]:
    """Cluster half of the cells and give the others the labels of their nearest (as `cohort/sketch.py` does)."""
    settings, half = ClustersSettings(), x.shape[0] // 2
    rows = np.random.default_rng(seed).permutation(x.shape[0])
    clock = Clock()
    axes = graph.scanpy_pca(x[rows[:half]], settings.n_pcs, seed)[1]
    mean = np.zeros(x.shape[1])  # distances do not change with a shift
    points = project(x[rows], mean, axes)
    clock.lap("pca")
    near = graph.neighbour_graph(points[:half], settings.n_neighbors)
    clock.lap("graph")
    own = []
    for name, resolution in (("low", settings.low_resolution), ("high", settings.high_resolution)):
        own.append(graph.leiden(near, resolution, settings.iterations, seed))
        clock.lap(name)
    others = nearest_labels(points[half:], Sketch(mean, axes, points[:half], *own), settings.n_neighbors)
    labels = np.empty((2, x.shape[0]), dtype=np.int32)
    labels[:, rows] = np.concatenate([np.stack(own), np.stack(others)], axis=1)
    clock.lap("others")
    return (labels[0], labels[1]), {**clock.seconds, "graph": clock.seconds["graph"] + clock.seconds["others"]}


class Clock:
    """Measure processor seconds of the parts of some work; other processes do not count."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.process_time()

    def lap(self, name: str) -> None:
        """End a part."""
        now = time.process_time()
        self.seconds[name], self._last = now - self._last, now


def told(found: list[Labels], reference: list[Labels], *, same: bool = False) -> str:
    """Return the mean agreement of labels with reference labels, low and high."""
    pairs = [(one, other) for i, one in enumerate(found) for j, other in enumerate(reference) if not same or i < j]
    means = (np.mean([adjusted_rand_score(one[level], other[level]) for one, other in pairs]) for level in (0, 1))
    return " | ".join(f"{mean:.3f}" for mean in means)


if __name__ == "__main__":
    main()
