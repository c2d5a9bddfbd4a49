"""Matches corrected for hubs equal brute force, for all tiles and partitions."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ndreamer_dist.matching import exact, hubs
from ndreamer_dist.matching.hubs import Remoteness, nearest_corrected, remoteness
from ndreamer_dist.matching.partition import build_index
from tests.matching.test_exact import POINTS, clusters, copies, gaussian
from tests.results.brute_force import corrected_rows, mean_nearest


def assert_corrected(queries, targets, k, cells=None, threads=1):
    remote = remoteness(targets, queries, threads=threads)
    np.testing.assert_array_equal(remote, mean_nearest(targets, queries, 10))
    index = build_index(targets, cells=cells)
    found = nearest_corrected(queries, index, remote, k, threads=threads)
    rows, distances = corrected_rows(queries, targets, remote, k)
    np.testing.assert_array_equal(found.rows, rows)
    np.testing.assert_array_equal(found.distances, distances.astype(np.float32))
    return found


@pytest.mark.parametrize("points", POINTS)
@pytest.mark.parametrize("k", [1, 5])
def test_corrected_neighbours_are_those_of_brute_force(points, k):
    rng = np.random.default_rng(0)
    cloud = rng.permutation(points(rng))[:900]
    for cells in (1, None, 40):
        assert_corrected(cloud[:200], cloud[200:], k, cells)


@settings(max_examples=80, deadline=None)
@given(
    points=hnp.arrays(
        np.float32,
        st.tuples(st.integers(2, 40), st.integers(1, 4)),
        elements=st.floats(-1000, 1000, width=32) | st.sampled_from([0.0, 1.0, 1.0000001, 1e-7]),
    ),
    k=st.integers(1, 6),
    cells=st.sampled_from([1, 3, 40]),
    data=st.data(),
)
def test_any_points_are_matched_exactly(points, k, cells, data):
    queries = data.draw(st.integers(1, len(points) - 1))
    assert_corrected(points[:queries], points[queries:], k, cells)
    assert_corrected(points[:queries], points, k, cells)


@pytest.mark.parametrize("queries", [1, 3, 9, 10, 11])
def test_remoteness_is_a_mean_over_the_ten_nearest_or_all_that_there_are(queries):
    points = gaussian(np.random.default_rng(0), 200, 4)
    near = np.sort(np.linalg.norm(points[queries:, None].astype(float) - points[:queries], axis=2), axis=1)[:, :10]
    np.testing.assert_allclose(remoteness(points[queries:], points[:queries]), near.mean(axis=1), rtol=1e-6)


@pytest.mark.parametrize("kept", [0, 10**6], ids=["one_group_at_a_time", "all_groups_together"])
@pytest.mark.parametrize("label", [hubs.WHOLE, 0, 2], ids=["all", "of_a_label", "that_the_query_group_lacks"])
def test_groups_that_are_measured_together_are_as_remote_as_one_by_one(monkeypatch, kept, label):
    monkeypatch.setattr(hubs, "MOST_KEPT", kept)
    points, starts = clusters(np.random.default_rng(3), 90), np.array([0, 20, 50, 90])
    labels = np.arange(90) % 2
    labels[50:] = 2 * (np.arange(40) % 2)
    edges = [
        (target, query) for target in range(3) for query in range(3) if target != query and (target, query) != (2, 1)
    ]
    found = Remoteness(points, starts, labels, edges=edges)
    for target, query in edges:
        there, near = (np.arange(*starts[group : group + 2]) for group in (target, query))
        if label != hubs.WHOLE:
            there = there[labels[there] == label]
            near = near[labels[near] == label] if (labels[near] == label).any() else near
        np.testing.assert_array_equal(found.of(target, query, label), remoteness(points[there], points[near]))


def test_a_hub_is_left_for_targets_that_are_less_near_to_all():
    rng = np.random.default_rng(0)
    queries = gaussian(rng, 400)
    targets = np.concatenate([np.full((1, 50), 0.01, np.float32), gaussian(rng, 400)])
    plain = exact.nearest(queries, targets, 1).rows[:, 0]
    corrected = nearest_corrected(queries, targets, remoteness(targets, queries), 1).rows[:, 0]
    assert (plain == 0).mean() > 0.8
    assert (corrected == 0).mean() < 0.2
    assert np.bincount(corrected).max() < np.bincount(plain).max() / 3


def test_where_all_targets_are_as_remote_the_nearest_stays():
    rng = np.random.default_rng(0)
    queries, targets = gaussian(rng, 150), gaussian(rng, 700)
    found = nearest_corrected(queries, targets, np.ones(700, np.float32), 3)
    plain = exact.nearest(queries, targets, 3)
    np.testing.assert_array_equal(found.rows, plain.rows)
    np.testing.assert_array_equal(found.distances, plain.distances)


@pytest.mark.parametrize("spread", [0.1, 1, 10, 100])
@pytest.mark.parametrize("k", [1, 4])
def test_a_target_of_any_remoteness_is_found_in_whatever_partition(spread, k):
    rng = np.random.default_rng(0)
    cloud = rng.permutation(clusters(rng))
    queries, index = cloud[:150], build_index(cloud[150:], cells=40)
    remote = (spread * rng.gamma(0.5, size=1350)).astype(np.float32)
    found, (rows, distances) = (
        nearest_corrected(queries, index, remote, k),
        corrected_rows(queries, cloud[150:], remote, k),
    )
    np.testing.assert_array_equal(found.rows, rows)
    np.testing.assert_array_equal(found.distances, distances.astype(np.float32))


@pytest.mark.parametrize("points", [gaussian, clusters, lambda rng, rows: copies(rng, 1e-6)[:rows]])
@pytest.mark.parametrize("k", [1, 6])
def test_queries_of_several_groups_are_searched_together_as_each_by_itself(points, k):
    rng = np.random.default_rng(0)
    cloud = rng.permutation(points(rng, 1500))
    groups, index = np.repeat([2, 0, 1], [70, 50, 30]), build_index(cloud[150:], cells=20)
    remote = np.stack([remoteness(cloud[150:], cloud[:150][groups == group]) for group in range(3)])
    found = nearest_corrected(cloud[:150], index, remote, k, groups=groups)
    for group in range(3):
        rows, distances = corrected_rows(cloud[:150][groups == group], cloud[150:], remote[group], k)
        np.testing.assert_array_equal(found.rows[groups == group], rows)
        np.testing.assert_array_equal(found.distances[groups == group], distances.astype(np.float32))


def test_queries_far_beyond_the_targets_are_matched_exactly():
    rng = np.random.default_rng(0)
    queries = gaussian(rng, 30) * np.array([1e3, 1e12, 1e14, 1e17, 1e18] * 6, dtype=np.float32)[:, None]
    assert_corrected(queries, gaussian(rng, 900), 2, cells=40)
    assert_corrected(queries[:6], gaussian(rng, 900), 1, cells=40)


@pytest.mark.parametrize("targets", [0, 1, 2, 4])
def test_fewer_targets_than_neighbours_leave_gaps(targets):
    points = gaussian(np.random.default_rng(0), 5, 3)
    found = nearest_corrected(points, points[:targets], remoteness(points[:targets], points), 3)
    assert (found.rows[:, min(targets, 3) :] == -1).all()
    assert np.isnan(found.distances[:, min(targets, 3) :]).all()
    assert (found.rows[:, : min(targets, 3)] >= 0).all()


CUTS = [
    (exact, "QUERY_TILE", 50), (exact, "SCAN_PAIRS", 1000), (exact, "EXACT_PAIRS", 50),
    (exact, "SPARE", 2), (exact, "WIDEST", 1), (hubs, "WIDEST", 1), (hubs, "FOLD", 1), (exact, "SETTLED_PAIRS", 1000),
]  # fmt: skip


@pytest.mark.parametrize("k", [1, 3, 12])
def test_tiles_and_threads_change_nothing(monkeypatch, k):
    rng = np.random.default_rng(1)
    cloud = rng.permutation(np.concatenate([copies(rng, 1e-6)[::3], gaussian(rng, 300)]))
    queries, targets = cloud[:120], cloud[120:]
    whole = assert_corrected(queries, targets, k, cells=20)
    for module, name, value in CUTS:
        with monkeypatch.context() as patch:
            patch.setattr(module, name, value)
            cut = assert_corrected(queries, targets, k, cells=20, threads=2)
        np.testing.assert_array_equal(cut.rows, whole.rows, err_msg=name)


def test_a_crowd_widens_and_costs_no_pair_each():
    rng = np.random.default_rng(0)
    crowd = rng.permutation(copies(rng, 1e-6))
    assert assert_corrected(crowd[:100], crowd[100:], 1).widened.all()
    plain = gaussian(rng, 1500)
    assert not assert_corrected(plain[:100], plain[100:], 1).widened.any()
