"""Cluster cells on one graph: scanpy's principal components, its default neighbour graph, and Leiden. Pure.

Input: expression. Output: labels; 0 is the largest cluster (METHOD section 1.3). scanpy and the Leiden packages take
two seconds to import, so they are imported inside functions, and the driver of a job on Ray does not load them.
"""

from __future__ import annotations

import anndata as ad
import numpy as np
from scipy import sparse

from ndreamer_dist.settings import ClustersSettings

LIBRARIES = ("scanpy", "igraph", "leidenalg")
"""Packages that a clustering task imports."""
FEWEST_CELLS = 4
"""Fewer cells than this form one cluster without a graph."""
QUERY_ROWS = 4096
"""Queries of one neighbour search; constant, because the arithmetic of FAISS depends on the number of queries."""
BISECTIONS, BISECTION_TOLERANCE, LEAST_SCALE = 64, 1e-5, 1e-3
"""Constants of UMAP's `smooth_knn_dist`, which finds the scale of a cell's neighbourhood."""
SPARE_CANDIDATES = 8
"""Candidates searched beyond k, so that exact distances can decide among near-ties."""


def cluster_cells(x: sparse.csr_matrix, settings: ClustersSettings, seed: int) -> np.ndarray:
    """Return the low and the high cluster label of each cell, 0 for the largest cluster: (2, cells) int32.

    Parameters
    ----------
    x
        (cells, genes) log-normalised expression.
    """
    if one_cluster(x):
        return np.zeros((2, x.shape[0]), dtype=np.int32)
    return cluster_points(scanpy_pca(x, settings.n_pcs, seed)[0], settings, seed)


def one_cluster(x: sparse.csr_matrix) -> bool:
    """Return whether the cells are too few or too similar for a graph, so that they form one cluster."""
    return x.shape[0] < FEWEST_CELLS or x.shape[1] < 2 or x.nnz == 0 or not _varies(x)


def cluster_points(points: np.ndarray, settings: ClustersSettings, seed: int) -> np.ndarray:
    """Return the low and the high cluster label of points, (cells, components), as (2, cells) int32."""
    graph = neighbour_graph(points, settings.n_neighbors)
    resolutions = settings.low_resolution, settings.high_resolution
    return np.stack([leiden(graph, r, settings.iterations, seed, settings.flavor) for r in resolutions])


def scanpy_pca(x: sparse.csr_matrix, n_pcs: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return scanpy's principal components: at most `n_pcs`, and fewer than there are cells and genes.

    Returns
    -------
    The scores of the cells, (cells, components) float32, and the axes, (genes, components) float64.
    """
    import scanpy as sc

    components = min(n_pcs, min(x.shape) - 1)
    points, axes = sc.pp.pca(x, n_comps=components, svd_solver="arpack", random_state=seed, return_info=True)[:2]
    return np.asarray(points, dtype=np.float32), np.asarray(axes, dtype=np.float64).T


def neighbour_graph(points: np.ndarray, n_neighbors: int) -> sparse.csr_matrix:
    """Return scanpy's default neighbour graph (UMAP's fuzzy set union) of exact neighbours: (cells, cells).

    This repeats umap's code, because numba takes half a minute to compile it in every process.
    """
    cells = len(points)
    k = n_neighbors if n_neighbors <= cells else 1 + cells // 2  # as scanpy does for small data
    indices, distances = nearest_with_self(np.ascontiguousarray(points, dtype=np.float32), k)
    strengths = membership_strengths(distances)
    edges = (strengths.ravel(), indices.ravel(), np.arange(0, cells * k + 1, k))
    directed = sparse.csr_matrix(edges, shape=(cells, cells))
    directed.eliminate_zeros()
    union = directed + directed.T - directed.multiply(directed.T)
    return sparse.csr_matrix(union)


def membership_strengths(distances: np.ndarray) -> np.ndarray:
    """Return UMAP's membership strengths of each cell's neighbours: (cells, k) in [0, 1].

    The strength is `exp(-(d - nearest) / scale)`. Bisection finds the scale at which the strengths of a cell sum to
    log2(k). The first column is the cell itself, with strength 0.
    """
    k = distances.shape[1]
    above = np.where(distances > 0, distances, np.inf).min(axis=1)
    nearest = np.where(np.isfinite(above), above, 0.0)[:, None]
    excess = np.maximum(distances - nearest, 0.0)
    low, high, scale = np.zeros(len(distances)), np.full(len(distances), np.inf), np.ones(len(distances))
    open_cells = np.ones(len(distances), dtype=bool)
    for _ in range(BISECTIONS):
        total = np.exp(-excess[:, 1:] / scale[:, None]).sum(axis=1)
        open_cells &= np.abs(total - np.log2(k)) >= BISECTION_TOLERANCE
        over = total > np.log2(k)
        high, low = np.where(open_cells & over, scale, high), np.where(open_cells & ~over, scale, low)
        middle = np.where(np.isinf(high), 2 * scale, (low + np.where(np.isinf(high), 0, high)) / 2)
        scale = np.where(open_cells, middle, scale)
    floor = np.where(nearest[:, 0] > 0, distances.mean(axis=1), distances.mean()) * LEAST_SCALE
    scale = np.maximum(scale, floor)[:, None]
    strengths = np.where(excess > 0, np.exp(-excess / np.where(scale > 0, scale, 1.0)), 1.0)
    strengths[:, 0] = 0.0
    return strengths


def nearest_with_self(x: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (points, k) rows and distances of each point's k nearest: itself first, ties by the smaller row."""
    import faiss  # users choose one of two builds, so it is no dependency: see `engines.require_faiss`

    indices, distances = np.empty((len(x), k), dtype=np.int64), np.empty((len(x), k), dtype=np.float64)
    wanted = min(len(x), k + SPARE_CANDIDATES)
    for start in range(0, len(x), QUERY_ROWS):
        rows = np.arange(start, min(start + QUERY_ROWS, len(x)))
        _, near = faiss.knn(x[rows], x, wanted)
        # A cell with many copies may be missing among its own candidates.
        near[:, -1] = np.where((near == rows[:, None]).any(axis=1), near[:, -1], rows)
        exact = np.linalg.norm(x[rows].astype(np.float64)[:, None, :] - x[near].astype(np.float64), axis=2)
        exact[near == rows[:, None]] = -1.0  # sorts the cell itself before its copies
        order = np.lexsort((near, exact), axis=1)[:, :k]
        indices[rows] = np.take_along_axis(near, order, axis=1)
        distances[rows] = np.maximum(np.take_along_axis(exact, order, axis=1), 0.0)
    return indices, distances


def leiden(
    graph: sparse.csr_matrix, resolution: float, iterations: int, seed: int, flavor: str = "leidenalg"
) -> np.ndarray:
    """Return the labels of scanpy's Leiden flavour `flavor`, 0 for the largest cluster: (cells,) int32."""
    return largest_first(FLAVORS[flavor](graph, resolution, iterations, seed))


def _leidenalg(graph: sparse.csr_matrix, resolution: float, iterations: int, seed: int) -> np.ndarray:
    import igraph
    import leidenalg

    edges = graph.tocoo()
    partition = leidenalg.find_partition(
        igraph.Graph(graph.shape[0], np.column_stack([edges.row, edges.col]), directed=True),
        leidenalg.RBConfigurationVertexPartition,
        weights=edges.data.astype(np.float64),
        resolution_parameter=resolution,
        n_iterations=iterations,
        seed=seed,
    )
    return np.asarray(partition.membership)


def _igraph(graph: sparse.csr_matrix, resolution: float, iterations: int, seed: int) -> np.ndarray:
    import scanpy as sc

    # Through scanpy, which sets igraph's random generator from the seed and restores it.
    cells = ad.AnnData(sparse.csr_matrix((graph.shape[0], 1), dtype=np.float32))
    sc.tl.leiden(
        cells, resolution, adjacency=graph, flavor="igraph", directed=False, n_iterations=iterations, random_state=seed
    )
    return cells.obs["leiden"].to_numpy().astype(np.int64)


FLAVORS = {"leidenalg": _leidenalg, "igraph": _igraph}


def largest_first(labels: np.ndarray) -> np.ndarray:
    """Renumber clusters by size, the largest 0, ties by first appearance: (cells,) int32."""
    _, first, inverse, counts = np.unique(labels, return_index=True, return_inverse=True, return_counts=True)
    rank = np.empty(len(counts), dtype=np.int32)
    rank[np.lexsort((first, -counts))] = np.arange(len(counts), dtype=np.int32)
    return rank[inverse]


def _varies(x: sparse.csr_matrix) -> bool:
    """Return whether any two cells differ in any gene."""
    return bool((x - sparse.csr_matrix(np.ones((x.shape[0], 1), dtype=x.dtype)) @ x[:1]).count_nonzero())
