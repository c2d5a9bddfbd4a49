"""Exact search equals brute force, for all engines, tiles and partitions."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ndreamer_dist.matching import exact, gpu
from ndreamer_dist.matching.exact import FLOAT32, certain_limit, exact_squared, nearest
from ndreamer_dist.matching.partition import build_index
from tests.results.brute_force import nearest_rows


def flat(queries, targets, k, exclude=None):
    """Search with the code for GPUs, on the CPU."""
    if not len(targets):
        return nearest(queries, targets, k)
    group = gpu.GpuIndex(torch.tensor(targets), gpu.ENGINES["cpu"])
    return group.nearest(torch.tensor(queries), k, exclude=exclude)


ENGINES = {
    "chosen": nearest,
    "one_cell": lambda q, t, k, exclude=None: nearest(q, built(t, 1), k, exclude=exclude),
    "many_cells": lambda q, t, k, exclude=None: nearest(q, built(t, 40), k, exclude=exclude),
    "two_threads": lambda q, t, k, exclude=None: nearest(q, t, k, exclude=exclude, threads=2),
    "flat": flat,
}


def built(targets, cells):
    return build_index(targets, cells=cells) if len(targets) else targets


def assert_exact(queries, targets, k, exclude=None, engine=nearest):
    found = engine(queries, targets, k, exclude=exclude)
    expected_rows, expected_distances = nearest_rows(queries, targets, k, exclude)
    np.testing.assert_array_equal(found.rows, expected_rows)
    np.testing.assert_array_equal(found.distances, expected_distances.astype(np.float32))
    assert found.rows.dtype == np.int64
    assert found.distances.dtype == np.float32
    return found.widened


def gaussian(rng, rows, dims=50):
    return rng.normal(size=(rows, dims)).astype(np.float32)


def copies(rng, jitter):
    """Three crowds of 500 copies of a row."""
    crowds = np.repeat(gaussian(rng, 3), 500, axis=0)
    return (crowds + jitter * gaussian(rng, 1500)).astype(np.float32)


def clusters(rng, rows=1500):
    return (np.repeat(3 * gaussian(rng, 15), rows // 15, axis=0) + 0.3 * gaussian(rng, rows)).astype(np.float32)


POINTS = [
    pytest.param(lambda rng: gaussian(rng, 1500), id="plain"),
    pytest.param(clusters, id="clusters"),
    pytest.param(lambda rng: gaussian(rng, 1500) + np.float32(1e4), id="far_from_the_origin"),
    pytest.param(lambda rng: copies(rng, 0.0), id="500_copies"),
    pytest.param(lambda rng: copies(rng, 1e-6), id="500_copies_with_jitter"),
    pytest.param(lambda rng: copies(rng, 1e-6) + np.float32(30), id="500_copies_with_jitter_far"),
    pytest.param(lambda rng: np.zeros((1500, 5), np.float32), id="all_equal"),
    pytest.param(lambda rng: gaussian(rng, 1500, 1), id="one_dimension"),
    pytest.param(lambda rng: gaussian(rng, 1500) * np.float32(1e-30), id="tiny"),
    pytest.param(lambda rng: gaussian(rng, 1500) * np.float32(1e30), id="overflows_float32"),
    pytest.param(lambda rng: np.rint(gaussian(rng, 1500, 3)), id="many_ties"),
    pytest.param(
        lambda rng: gaussian(rng, 1500) * np.logspace(0, 20, 1500)[:, None].astype(np.float32), id="all_scales"
    ),
]


@pytest.mark.parametrize("points", POINTS)
@pytest.mark.parametrize("k", [1, 5])
def test_neighbours_are_those_of_brute_force_by_every_engine(points, k):
    rng = np.random.default_rng(0)
    cloud = rng.permutation(points(rng))
    others, same = nearest_rows(cloud[:150], cloud[150:], k), nearest_rows(cloud[:200], cloud[:200], k, np.arange(200))
    for name, engine in ENGINES.items():
        for (rows, distances), found in (
            (others, engine(cloud[:150], cloud[150:], k)),
            (same, engine(cloud[:200], cloud[:200], k, exclude=np.arange(200))),
        ):
            np.testing.assert_array_equal(found.rows, rows, err_msg=name)
            np.testing.assert_array_equal(found.distances, distances.astype(np.float32), err_msg=name)


def test_queries_far_beyond_the_targets_find_their_nearest():
    rng = np.random.default_rng(0)
    queries = gaussian(rng, 30) * np.array([1e3, 1e12, 1e18, 1e25, 1e36] * 6, dtype=np.float32)[:, None]
    assert_exact(queries, gaussian(rng, 900), 2, engine=ENGINES["many_cells"])
    assert_exact(queries, gaussian(rng, 900) * np.float32(1e-25), 2, engine=ENGINES["many_cells"])


def test_a_crowd_widens_and_a_plain_cloud_does_not():
    rng = np.random.default_rng(0)
    crowd = rng.permutation(copies(rng, 1e-6))
    for engine in (nearest, flat):
        assert assert_exact(crowd[:100], crowd[100:], 1, engine=engine).all()
        assert not assert_exact(gaussian(rng, 100), gaussian(rng, 1400), 1, engine=engine).any()


@settings(max_examples=80, deadline=None)
@given(
    points=hnp.arrays(
        np.float32,
        st.tuples(st.integers(2, 40), st.integers(1, 4)),
        elements=st.floats(-1000, 1000, width=32) | st.sampled_from([0.0, 1.0, 1.0000001, 1e-7]),
    ),
    k=st.integers(1, 6),
    engine=st.sampled_from(sorted(ENGINES)),
    data=st.data(),
)
def test_any_points_are_matched_exactly(points, k, engine, data):
    queries = data.draw(st.integers(0, len(points)))
    assert_exact(points[:queries], points, k, exclude=np.arange(queries), engine=ENGINES[engine])
    assert_exact(points[:queries], points[queries:], k, engine=ENGINES[engine])


@pytest.mark.parametrize("engine", ["chosen", "many_cells", "flat"])
@pytest.mark.parametrize("targets", [0, 1, 2, 4])
def test_fewer_targets_than_neighbours_leave_gaps(targets, engine):
    points = gaussian(np.random.default_rng(0), 5, 3)
    found = ENGINES[engine](points, points[:targets], 3)
    assert (found.rows[:, min(targets, 3) :] == -1).all()
    assert np.isnan(found.distances[:, min(targets, 3) :]).all()
    assert_exact(points, points[:targets], 3, engine=ENGINES[engine])


@pytest.mark.parametrize("engine", [nearest, flat])
def test_the_only_cell_of_a_group_has_no_other(engine):
    found = engine(np.ones((1, 3), np.float32), np.ones((1, 3), np.float32), 2, exclude=np.zeros(1, int))
    assert (found.rows == -1).all()
    assert np.isnan(found.distances).all()


CUTS = [
    (exact, "QUERY_TILE", 50), (exact, "SCAN_PAIRS", 1000), (exact, "EXACT_PAIRS", 50), (exact, "SPARE", 2),
    (gpu, "SETTLED_QUERIES", 64), (gpu, "PRODUCT_PAIRS", 1000), (gpu, "SPARE", 1), (gpu, "MORE", 1),
]  # fmt: skip


def test_tiles_blocks_and_threads_change_nothing(monkeypatch):
    rng = np.random.default_rng(1)
    cloud = rng.permutation(np.concatenate([copies(rng, 1e-6)[::3], gaussian(rng, 200), clusters(rng, 300)]))
    queries, targets = cloud[:120], cloud[120:]
    index = build_index(targets, cells=20)

    def found(part=slice(None), threads=1):
        return nearest(queries[part], index, 3, threads=threads)

    whole = found()
    others = [found(threads=2)]
    flats = [flat(queries, targets, 3)]
    for module, name, value in CUTS:
        monkeypatch.setattr(module, name, value)
        others.append(found())
        flats.append(flat(queries, targets, 3))
    pieces = [found(slice(i, i + 31)) for i in range(0, 120, 31)]
    others.append([np.concatenate(column) for column in zip(*pieces, strict=True)])
    for other in [*others, *flats]:
        np.testing.assert_array_equal(whole.rows, other[0])
        np.testing.assert_array_equal(whole.distances, other[1])


# --- the certificate -------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000), dims=st.integers(1, 60), spread=st.sampled_from([1.0, 1e-3, 1e-6]), k=st.integers(1, 4)
)
def test_no_true_neighbour_lies_beyond_the_certain_limit(seed, dims, spread, k):
    rng = np.random.default_rng(seed)
    targets = (gaussian(rng, 1, dims) + spread * gaussian(rng, 60, dims)).astype(np.float32)
    query = (targets[:1] + 0.3 * gaussian(rng, 1, dims)).astype(np.float32)
    computed = np.float32(-2) * (query @ targets.T)[0] + (targets * targets).sum(axis=1)
    squared = float((query.astype(np.float64) ** 2).sum())
    limit = certain_limit(np.sort(computed)[k - 1 : k] + squared, np.array([squared**0.5]), dims, FLOAT32)
    true = exact_squared(query, targets, np.zeros(60, np.int64), np.arange(60))
    assert (computed[np.argsort(true, kind="stable")[:k]] + squared <= limit).all()


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), dims=st.integers(1, 20), spread=st.sampled_from([1.0, 0.1, 1e-4]))
def test_no_target_is_nearer_than_where_its_cell_begins(seed, dims, spread):
    rng = np.random.default_rng(seed)
    kinds = gaussian(rng, 6, dims)
    targets = (kinds[rng.integers(6, size=300)] + spread * gaussian(rng, 300, dims)).astype(np.float32)
    queries = (kinds[rng.integers(6, size=40)] + 2 * spread * gaussian(rng, 40, dims)).astype(np.float32)
    index = build_index(targets, cells=12)
    tile = exact.Tile(index, queries, np.full(40, -1), 1)
    along = tile.local[:, :-1] @ index.centroids.T
    begins = tile._beginnings(np.ascontiguousarray(along.T), rng.integers(index.cells, size=40))
    for cell in range(index.cells):
        points = index.points[:-1, index.starts[cell] : index.starts[cell + 1]].T / -2
        distances = ((tile.local[:, None, :-1].astype(np.float64) - points) ** 2).sum(axis=2).min(axis=1)
        assert (begins[cell] <= distances).all()


def test_cells_that_hold_no_neighbour_are_not_looked_at():
    rng = np.random.default_rng(0)
    targets = clusters(rng)
    index = build_index(targets, cells=30)
    looked_at = []

    class Watched(exact.Tile):
        def _scan(self, cell, queries, **how):
            looked_at.append(len(queries) * (self.index.starts[cell + 1] - self.index.starts[cell]))
            super()._scan(cell, queries, **how)

    rows, _, _ = Watched(index, targets[::5], np.full(300, -1), 1).search()
    assert (rows[:, 0] == np.arange(0, 1500, 5)).all()
    assert sum(looked_at) < 0.2 * 300 * 1500
