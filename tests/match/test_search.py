"""Matches are exact and the same everywhere."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ndreamer_dist import keys
from ndreamer_dist.errors import StoreError
from ndreamer_dist.match import index, search
from ndreamer_dist.match.search import Matches, nearest, run_match
from ndreamer_dist.runtime import RayRuntime, SerialRuntime
from ndreamer_dist.storage import open_array, read_array
from tests.results.brute_force import nearest_rows
from tests.results.fabricate import fabricate


def assert_exact(queries, targets, k, exclude=None):
    rows, distances, widened = nearest(queries, targets, k, exclude=exclude)
    expected_rows, expected_distances = nearest_rows(queries, targets, k, exclude)
    np.testing.assert_array_equal(rows, expected_rows)
    np.testing.assert_array_equal(distances, expected_distances.astype(np.float32))
    assert rows.dtype == np.int64
    assert distances.dtype == np.float32
    return widened


def gaussian(rng, rows, dims=50):
    return rng.normal(size=(rows, dims)).astype(np.float32)


def copies(rng, jitter):
    """Three crowds of 500 copies of a row."""
    crowds = np.repeat(gaussian(rng, 3), 500, axis=0)
    return (crowds + jitter * gaussian(rng, 1500)).astype(np.float32)


@pytest.mark.parametrize(
    "points",
    [
        pytest.param(lambda rng: gaussian(rng, 1500), id="plain"),
        pytest.param(lambda rng: gaussian(rng, 1500) + np.float32(1e4), id="far_from_the_origin"),
        pytest.param(lambda rng: copies(rng, 0.0), id="500_copies"),
        pytest.param(lambda rng: copies(rng, 1e-6), id="500_copies_with_jitter"),
        pytest.param(lambda rng: copies(rng, 1e-6) + np.float32(30), id="500_copies_with_jitter_far"),
        pytest.param(lambda rng: np.zeros((1500, 5), np.float32), id="all_equal"),
        pytest.param(lambda rng: gaussian(rng, 1500, 1), id="one_dimension"),
        pytest.param(lambda rng: gaussian(rng, 1500) * np.float32(1e-30), id="tiny"),
        pytest.param(lambda rng: gaussian(rng, 1500) * np.float32(1e30), id="overflows_float32"),
        pytest.param(lambda rng: np.rint(gaussian(rng, 1500, 3)), id="many_ties"),
    ],
)
@pytest.mark.parametrize("k", [1, 5])
def test_neighbours_are_those_of_brute_force(points, k):
    rng = np.random.default_rng(0)
    cloud = rng.permutation(points(rng))
    assert_exact(cloud[:200], cloud[200:], k)
    assert_exact(cloud[:300], cloud[:300], k, exclude=np.arange(300))


def test_a_crowd_widens_and_a_plain_cloud_does_not():
    rng = np.random.default_rng(0)
    crowd = rng.permutation(copies(rng, 1e-6))
    assert assert_exact(crowd[:100], crowd[100:], 1) == 100
    assert assert_exact(gaussian(rng, 100), gaussian(rng, 1400), 1) == 0


@settings(max_examples=60, deadline=None)
@given(
    points=hnp.arrays(
        np.float32,
        st.tuples(st.integers(2, 40), st.integers(1, 4)),
        elements=st.floats(-1000, 1000, width=32) | st.sampled_from([0.0, 1.0, 1.0000001, 1e-7]),
    ),
    k=st.integers(1, 6),
    data=st.data(),
)
def test_any_points_are_matched_exactly(points, k, data):
    queries = data.draw(st.integers(0, len(points)))
    assert_exact(points[:queries], points, k, exclude=np.arange(queries))
    assert_exact(points[:queries], points[queries:], k)


@pytest.mark.parametrize("targets", [0, 1, 2, 4])
def test_fewer_targets_than_neighbours_leave_gaps(targets):
    points = gaussian(np.random.default_rng(0), 5, 3)
    rows, distances, _ = nearest(points, points[:targets], 3)
    assert (rows[:, min(targets, 3) :] == -1).all()
    assert np.isnan(distances[:, min(targets, 3) :]).all()
    assert_exact(points, points[:targets], 3)


def test_the_only_cell_of_a_group_has_no_other():
    rows, distances, _ = nearest(np.ones((1, 3), np.float32), np.ones((1, 3), np.float32), 2, exclude=np.zeros(1, int))
    assert (rows == -1).all()
    assert np.isnan(distances).all()


def test_tiles_and_blocks_change_nothing(monkeypatch):
    rng = np.random.default_rng(1)
    cloud = rng.permutation(np.concatenate([copies(rng, 1e-6)[::3], gaussian(rng, 200)]))
    queries, targets = cloud[:100], cloud[100:]
    whole = nearest(queries, targets, 3)
    for module, name, value in [
        (index, "QUERY_TILE", 7),
        (search, "QUERY_TILE", 64),
        (index, "TARGET_BLOCK", 100),
        (search, "WIDE_QUERIES", 11),
        (search, "WIDE_TARGETS", 97),
        (search, "PAIRS", 50),
    ]:
        monkeypatch.setattr(module, name, value)
        other = nearest(queries, targets, 3)
        np.testing.assert_array_equal(whole[0], other[0])
        np.testing.assert_array_equal(whole[1], other[1])
    parts = [nearest(queries[i : i + 13], targets, 3) for i in range(0, 100, 13)]
    np.testing.assert_array_equal(whole[0], np.concatenate([part[0] for part in parts]))
    np.testing.assert_array_equal(whole[1], np.concatenate([part[1] for part in parts]))


# --- the stage -------------------------------------------------------------------------------------------------------

SIZES = {(0, 0): 130, (0, 1): 70, (1, 0): 1, (1, 2): 50}


def matched(folder, overrides=None, runtime=None, **kwargs):
    made = fabricate(folder, SIZES, overrides={"match.query_rows": 64, **(overrides or {})}, **kwargs)
    run_match(made.run, made.settings, made.design, runtime or SerialRuntime(made.settings.run), "key")
    return made, Matches(made.run.storage / keys.MATCHES)


def stored(made):
    return {
        (group.code, name): np.asarray(
            open_array(made.run.storage / keys.MATCHES, f"{keys.block_name(group.code)}/{name}")[...]
        )
        for group in made.design.groups
        for name in (keys.MATCH_ROW, keys.MATCH_DISTANCE)
    }


def assert_same(one, other):
    for name, values in one.items():
        np.testing.assert_array_equal(values, other[name], err_msg=str(name))


@pytest.mark.parametrize("k", [1, 5])
def test_every_needed_edge_is_searched_exactly_and_no_other(tmp_path, k):
    made, matches = matched(tmp_path, {"match.neighbours": k})
    points = read_array(made.run.storage / keys.EMBEDDING, keys.PCA)
    needed = made.design.needed_edges("needed")
    for query in made.design.groups:
        for target in made.design.groups:
            if (query.code, target.code) not in needed:
                with pytest.raises(StoreError, match="missing"):
                    matches.edge(query.code, target.code)
                continue
            rows, distances = matches.edge(query.code, target.code)
            itself = np.arange(query.cells) if query.code == target.code else None
            found, far = nearest_rows(points[query.start : query.stop], points[target.start : target.stop], k, itself)
            np.testing.assert_array_equal(rows, np.where(found < 0, -1, found + target.start))
            np.testing.assert_array_equal(distances, far.astype(np.float32))
            part = matches.edge(query.code, target.code, 0, 1)
            np.testing.assert_array_equal(part[0], rows[:1])


def test_all_edges_are_searched_where_asked(tmp_path):
    made, matches = matched(tmp_path, {"match.edges": "all"})
    assert all(matches.edge(q, t)[0].shape == (made.design.groups[q].cells, 1) for q in range(4) for t in range(4))


def test_query_tiles_do_not_change_the_matches(tmp_path):
    few, _ = matched(tmp_path / "a", {"match.query_rows": 65536}, crowds=3)
    many, _ = matched(tmp_path / "b", {"match.query_rows": 9}, crowds=3)
    assert_same(stored(few), stored(many))


def test_a_lost_tile_is_searched_again_and_nothing_else(tmp_path):
    made, _ = matched(tmp_path)
    before = stored(made)
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / keys.MATCHES).rglob("*") if path.is_file()}
    lost = tmp_path / keys.MATCHES / "00000" / keys.MATCH_ROW / "c" / "1" / "0" / "0"
    lost.unlink()
    (tmp_path / keys.MATCHES / "00003" / keys.MATCH_DISTANCE / "zarr.json").unlink()
    run_match(made.run, made.settings, made.design, SerialRuntime(made.settings.run), "key")
    assert_same(before, stored(made))
    redone = {path for path, time in files.items() if path.stat().st_mtime_ns != time}
    assert {path.parent.parent.parent.parent.name for path in redone if path.name != "zarr.json"} == {
        keys.MATCH_ROW, keys.MATCH_DISTANCE,
    }  # fmt: skip
    assert len(redone) == 3  # both chunks of the tile, and the metadata


def test_another_key_begins_anew(tmp_path):
    made, _ = matched(tmp_path)
    run_match(made.run, made.settings, made.design, SerialRuntime(made.settings.run), "key")
    other = fabricate(tmp_path, SIZES, seed=1, overrides={"match.neighbours": 2})
    run_match(other.run, other.settings, other.design, SerialRuntime(other.settings.run), "another key")
    assert Matches(other.run.storage / keys.MATCHES).edge(0, 0)[0].shape == (130, 2)


def test_units_are_cut_and_ordered_by_work(monkeypatch, tmp_path):
    made = fabricate(tmp_path, SIZES, overrides={"match.query_rows": 64})
    shards = list(search._shards(made.settings, made.design))
    monkeypatch.setattr(search, "UNIT_DISTANCES", 10_000)
    units = search._units(shards, made.settings, made.design)
    assert sorted(shard.name for unit in units for shard in unit.shards) == sorted(shard.name for shard in shards)
    assert [unit.distances for unit in units] == sorted((unit.distances for unit in units), reverse=True)
    assert all(len(unit.shards) == 1 or unit.distances <= 10_000 for unit in units)


def test_an_embedding_that_is_not_finite_is_refused(tmp_path):
    made = fabricate(tmp_path, SIZES)
    open_array(made.run.storage / keys.EMBEDDING, keys.PCA, mode="r+")[17, 2] = np.nan
    with pytest.raises(StoreError, match="not finite in row 17"):
        run_match(made.run, made.settings, made.design, SerialRuntime(made.settings.run), "key")


@pytest.mark.ray
def test_ray_and_the_serial_way_find_the_same(tmp_path, local_ray):
    serial, _ = matched(tmp_path / "a", crowds=3)
    ray, _ = matched(tmp_path / "b", crowds=3, runtime=RayRuntime(serial.settings.run))
    assert_same(stored(serial), stored(ray))
