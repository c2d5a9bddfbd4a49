"""Recompute a results.zarr from its own `X`, embedding and `obs`, in a few lines of numpy.

`check(path)` works on all results with default edges that fit in memory, also on those of real cohorts.
"""

import json

import anndata
import numpy as np

from tests.tiny import layer_names


def exact_squared(queries, targets):
    """Return (queries, targets) float64 squared distances."""
    return np.stack([((targets.astype(np.float64) - query) ** 2).sum(axis=1) for query in queries.astype(np.float64)])


def nearest_rows(queries, targets, k, exclude=None):
    """Return the k nearest targets, ties to the smaller row: rows (-1 where there are fewer) and distances."""
    rows, distances = np.full((len(queries), k), -1), np.full((len(queries), k), np.nan)
    for start in range(0, len(queries), 256):
        for i, squared in enumerate(exact_squared(queries[start : start + 256], targets), start):
            allowed = np.arange(len(targets))
            if exclude is not None and exclude[i] >= 0:
                allowed = np.delete(allowed, exclude[i])
            best = allowed[np.argsort(squared[allowed], kind="stable")][:k]
            rows[i, : len(best)], distances[i, : len(best)] = best, np.sqrt(squared[best])
    return rows, distances


def mean_nearest(targets, queries, count):
    """Return every target's mean distance to its nearest queries, at most `count` of them: float32."""
    distances = np.sqrt(np.sort(exact_squared(targets, queries), axis=1)[:, :count])
    return distances.mean(axis=1).astype(np.float32)


def corrected_rows(queries, targets, remote, k):
    """Return the k targets of least `2 d - r`, ties to the smaller row: rows (-1 where there are fewer) and distances."""
    distances = np.sqrt(exact_squared(queries, targets))
    found = np.argsort(2 * distances - remote, axis=1, kind="stable")[:, :k]
    rows, near = np.full((len(queries), k), -1), np.full((len(queries), k), np.nan)
    rows[:, : found.shape[1]], near[:, : found.shape[1]] = found, np.take_along_axis(distances, found, axis=1)
    return rows, near


def matched_rows(queries, targets, k, exclude=None, hubs="none"):
    """Return the k matches of every query as a run defines them: in its own group, the nearest other cells."""
    if hubs == "none" or exclude is not None:
        return nearest_rows(queries, targets, k, exclude)
    return corrected_rows(queries, targets, mean_nearest(targets, queries, 10), k)


def weighed(rows, distances, bandwidth, x):
    """Return, for every cell, the mean of its matches' expression with the weights of the kernel."""
    weights = np.exp(-(distances - np.nanmin(distances, axis=1, keepdims=True)) / bandwidth)
    weights = np.nan_to_num(weights / np.nansum(weights, axis=1, keepdims=True))
    return np.einsum("ck,ckg->cg", weights, x[np.where(rows < 0, 0, rows)])


def check(path, *, atol=1e-4):
    """Compare the matches, distances and stored layers of a results.zarr with recomputed ones."""
    stored = anndata.read_zarr(path)
    told = stored.uns["ndreamer"]
    settings = json.loads(told["settings"])
    match, most = settings["match"], settings["denoise"]["neighbours"]
    k, bandwidth, control = match["neighbours"], match["bandwidth"], told["control"]
    group = np.asarray(stored.obs["ndreamer_group"].astype(str))
    names = [str(name) for name in told["groups"]]
    conditions = dict(zip(group, stored.obs["ndreamer_condition"].astype(str), strict=True))
    points, x = np.asarray(stored.obsm["X_ndreamer_pca"]), stored.X.toarray().astype(np.float64)
    own_sum, control_sum, denoised_sum = np.zeros_like(x), np.zeros_like(x), np.zeros_like(x)
    own_count, control_count = np.zeros(len(x)), np.zeros(len(x))
    far = [[] for _ in x]
    times = np.zeros(len(x), dtype=int)
    for query in names:
        cells = np.flatnonzero(group == query)
        for column, target in enumerate(names):
            there = np.flatnonzero(group == target)
            if conditions[target] not in (control, conditions[query]):
                if match["edges"] == "needed":
                    assert (stored.obsm["ndreamer_match"][cells, column] == -1).all()
                continue
            itself = np.arange(len(cells)) if query == target else None
            rows, distances = matched_rows(points[cells], points[there], max(k, most), itself, match["hubs"])
            packed = np.where(rows < 0, -1, there[rows])
            np.testing.assert_array_equal(stored.obsm["ndreamer_match"][cells, column], packed[:, 0])
            np.testing.assert_allclose(
                stored.obsm["ndreamer_match_distance"][cells, column], distances[:, 0], rtol=1e-6
            )
            if query == target:
                values, denoised = x[cells], x[cells]
            else:
                np.add.at(times, packed[:, :k][packed[:, :k] >= 0], 1)
                values, denoised = (weighed(packed[:, :n], distances[:, :n], bandwidth, x) for n in (k, most))
            if conditions[target] == conditions[query]:
                own_sum[cells] += values
                denoised_sum[cells] += denoised
                own_count[cells] += 1
            if conditions[target] == control:
                control_sum[cells] += values
                control_count[cells] += 1
                if query != target:
                    for cell, distance in zip(cells, distances[:, 0], strict=True):
                        far[cell].append(distance)
    own, base = own_sum / own_count[:, None], control_sum / control_count[:, None]
    denoised = denoised_sum / own_count[:, None]
    expected = {"denoised": denoised, "batch_effect": x - denoised, "ite": own - base}
    expected["ite"][np.asarray(stored.obs["ndreamer_condition"] == control)] = np.nan
    for name in layer_names(stored):
        np.testing.assert_allclose(stored.layers[name], expected[name], atol=atol, err_msg=name)
    np.testing.assert_array_equal(stored.obs["ndreamer_times_matched"], times)
    mean = [np.mean(distances) if distances else np.nan for distances in far]
    np.testing.assert_allclose(stored.obs["ndreamer_match_distance"], mean, rtol=1e-5)
    own = stored.obsm["ndreamer_match_distance"][np.arange(len(x)), stored.obs["ndreamer_group"].cat.codes]
    limit = np.nanquantile(own, json.loads(told["settings"])["effects"]["near_quantile"])
    without = np.isnan(stored.obs["ndreamer_match_distance"])
    near = without | (stored.obs["ndreamer_match_distance"] <= limit)
    np.testing.assert_array_equal(stored.obs["ndreamer_overlap"], near)
    return stored
