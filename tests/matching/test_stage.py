"""Every edge is searched once, exactly, and never again."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from ndreamer_dist import keys
from ndreamer_dist.compute.executor import RayRuntime, SerialRuntime
from ndreamer_dist.errors import QueryError, RunError, StoreError
from ndreamer_dist.matching import exact, hubs
from ndreamer_dist.matching import stage as search
from ndreamer_dist.matching.stage import add_edges, run_match
from ndreamer_dist.matching.store import Matches
from ndreamer_dist.storage.arrays import open_array, read_array
from tests.results.brute_force import corrected_rows, matched_rows, mean_nearest
from tests.results.fabricate import fabricate

SIZES = {(0, 0): 130, (0, 1): 70, (1, 0): 1, (1, 2): 50}


def matched(folder, overrides=None, runtime=None, sizes=None, **kwargs):
    asked = {"match.query_rows": 64, "denoise.neighbours": 1, "match.hubs": "csls", **(overrides or {})}
    made = fabricate(folder, sizes or SIZES, overrides=asked, **kwargs)
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


@pytest.mark.parametrize("distance", ["none", "csls"])
@pytest.mark.parametrize(("k", "denoised"), [(1, 1), (5, 1), (1, 5)])
def test_every_needed_edge_is_searched_exactly_and_no_other(tmp_path, k, denoised, distance):
    asked = {"match.neighbours": k, "denoise.neighbours": denoised, "match.hubs": distance}
    made, matches = matched(tmp_path, asked)
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
            sought = max(k, denoised) if query.condition == target.condition and itself is None else k
            spans = (slice(query.start, query.stop), slice(target.start, target.stop))
            found, far = matched_rows(points[spans[0]], points[spans[1]], sought, itself, distance)
            np.testing.assert_array_equal(rows[:, :sought], np.where(found < 0, -1, found + target.start))
            np.testing.assert_array_equal(distances[:, :sought], far.astype(np.float32))
            assert (rows[:, sought:] == -1).all()
            assert np.isnan(distances[:, sought:]).all()
            part = matches.edge(query.code, target.code, 0, 1)
            np.testing.assert_array_equal(part[0], rows[:1])


def test_all_edges_are_searched_where_asked(tmp_path):
    made, matches = matched(tmp_path, {"match.edges": "all"})
    assert all(matches.edge(q, t)[0].shape == (made.design.groups[q].cells, 1) for q in range(4) for t in range(4))


def test_batches_of_queries_do_not_change_the_matches(tmp_path, monkeypatch):
    overrides = {"match.query_rows": 100}
    sizes = {(0, 0): 500, (0, 1): 300}
    together, _ = matched(tmp_path / "a", overrides, sizes=sizes)
    monkeypatch.setattr(search, "BATCH_QUERIES", 150)
    monkeypatch.setattr(search, "LEAST_DISTANCES", 1)
    monkeypatch.setattr(search, "UNIT_DISTANCES", 1)
    apart, _ = matched(tmp_path / "b", overrides, sizes=sizes)
    assert_same(stored(together), stored(apart))


def test_remoteness_is_measured_from_a_bounded_number_of_queries(tmp_path, monkeypatch):
    monkeypatch.setattr(hubs, "MOST_QUERIES", 40)
    made, matches = matched(tmp_path, sizes={(0, 0): 130, (0, 1): 70})
    points = read_array(made.run.storage / keys.EMBEDDING, keys.PCA)
    found, _ = corrected_rows(points[130:], points[:130], mean_nearest(points[:130], points[130:170], 10), 1)
    np.testing.assert_array_equal(matches.edge(1, 0)[0], found)


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
    other = fabricate(tmp_path, SIZES, seed=1, overrides={"match.neighbours": 2, "denoise.neighbours": 1})
    run_match(other.run, other.settings, other.design, SerialRuntime(other.settings.run), "another key")
    assert Matches(other.run.storage / keys.MATCHES).edge(0, 0)[0].shape == (130, 2)


def test_work_is_cut_evenly_tiny_edges_share_a_unit_and_target_groups_stay_together(tmp_path, monkeypatch):
    monkeypatch.setattr(search, "LEAST_DISTANCES", 0)
    monkeypatch.setattr(search, "EDGE_DISTANCES", 100)
    made = fabricate(tmp_path, {(batch, c): 40 + 60 * batch for batch in range(2) for c in range(3)})
    settings = made.settings.model_copy(update={"match": made.settings.match.model_copy(update={"query_rows": 16})})
    shards = search.edge_shards(settings, made.design, made.design.needed_edges("all"))
    for workers in (2, 3, 1000):
        units = search.units(shards, settings, made.design, workers)
        assert sorted(shard.name for unit in units for shard in unit.shards) == sorted(shard.name for shard in shards)
        work = [unit.distances for unit in units]
        assert work == sorted(work, reverse=True)
        one_tile = 16 * 100 + 100
        even = max(sum(work) // (4 * workers), one_tile)
        assert max(work) <= even
        assert len(units) <= 1.5 * sum(work) / (even - one_tile + 1) + 1
        for unit in units:
            targets = [shard.task.target for shard in unit.shards]
            assert targets == sorted(targets)
    assert len(search.units(shards, settings, made.design, 1)) == 1  # there is nothing to balance


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


# --- the summary -----------------------------------------------------------------------------------------------------


def test_exact_search_reports_what_it_did(tmp_path, monkeypatch):
    monkeypatch.setattr(exact, "SPARE", 0)  # the crowds' copies are two points each, more than the one asked for
    made, _ = matched(tmp_path, crowds=2)
    summary = made.run.read_json(keys.MATCH_SUMMARY)
    queries = sum(made.design.groups[query].cells for query, _ in made.design.needed_edges("needed"))
    assert summary["searches"] == queries
    assert 0 < summary["widened"] <= queries
    assert summary["widened_share"] == summary["widened"] / queries


def test_a_warning_tells_of_neighbours_that_reach_across_a_group(tmp_path, caplog):
    matched(tmp_path / "a", {"match.neighbours": 5})
    (line,) = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert "match.neighbours (5) is more than 4 % of the cells of 3 of 4 groups" in line
    caplog.clear()
    matched(tmp_path / "b")
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


# --- more edges ------------------------------------------------------------------------------------------------------


def chunk_times(folder):
    chunks = (path for path in (folder / keys.MATCHES).rglob("*") if path.is_file() and "/c/" in str(path))
    return {path: path.stat().st_mtime_ns for path in chunks}


def search_again(made, settings=None):
    run_match(made.run, settings or made.settings, made.design, SerialRuntime(made.settings.run), "key")


def added(made, edges):
    return add_edges(made.run, made.settings, made.design, SerialRuntime(made.settings.run), "key", edges)


def test_edges_are_added_to_a_finished_run_and_none_is_searched_twice(tmp_path):
    made, matches = matched(tmp_path / "a")
    before = chunk_times(tmp_path / "a")
    summary = made.run.read_json(keys.MATCH_SUMMARY)
    assert added(made, "stim") == 3  # the other groups' edges to stim; its own was needed
    assert added(made, "all") == 16 - len(made.design.needed_edges("needed")) - 3
    assert added(made, "all") == 0
    after = chunk_times(tmp_path / "a")
    assert {path: after[path] for path in before} == before
    assert made.run.read_json(keys.MATCH_SUMMARY) == summary
    at_once, _ = matched(tmp_path / "b", {"match.edges": "all"})
    assert_same(stored(at_once), stored(made))
    search_again(made)
    assert chunk_times(tmp_path / "a") == after
    assert matches.edge(1, 3)[0].shape == (70, 1)


def test_asking_for_all_edges_later_searches_only_the_others(tmp_path):
    made, _ = matched(tmp_path / "a")
    before = chunk_times(tmp_path / "a")
    every = matched(tmp_path / "b", {"match.edges": "all"})[0]
    search_again(made, every.settings)
    after = chunk_times(tmp_path / "a")
    assert {path: after[path] for path in before} == before
    assert_same(stored(every), stored(made))


def test_edges_are_added_to_finished_matches_only(tmp_path):
    made, _ = matched(tmp_path)
    next((tmp_path / keys.DONE / keys.STAGE_MATCH).iterdir()).unlink()
    with pytest.raises(RunError, match="has not finished matching"):
        added(made, "all")
    with pytest.raises(QueryError, match="there is no condition 'stimm'"):
        added(made, "stimm")


# --- killed ----------------------------------------------------------------------------------------------------------

SCRIPT = """
import sys
from tests.matching.test_stage import SLOW, search_again
from tests.results.fabricate import fabricate
made = fabricate(sys.argv[1], **SLOW)
print("begins", flush=True)
search_again(made)
"""
SLOW = {"sizes": {(0, 0): 900, (0, 1): 700, (1, 1): 500}, "overrides": {"match.query_rows": 32}, "seed": 3}


def test_a_killed_search_goes_on_where_it_was_with_the_same_bits(tmp_path):
    markers = tmp_path / "killed" / keys.DONE / keys.STAGE_MATCH
    root = Path(__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "killed")], cwd=root, stdout=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(root)},
    )  # fmt: skip
    while process.poll() is None and (not markers.is_dir() or sum(1 for _ in markers.iterdir()) < 10):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    undisturbed = fabricate(tmp_path / "whole", **SLOW)
    made = fabricate(tmp_path / "killed", **SLOW)
    shards = search.edge_shards(made.settings, made.design, made.design.needed_edges("needed"))
    todo = {shard.name for shard in made.run.pending(keys.STAGE_MATCH, "key", shards)}
    finished = [tmp_path / "killed" / name for shard in shards if shard.name not in todo for name in shard.files]
    assert 0 < len(todo) < len(shards)
    times = {path: path.stat().st_mtime_ns for path in finished}
    search_again(made)
    search_again(undisturbed)
    assert {path: path.stat().st_mtime_ns for path in finished} == times
    assert_same(stored(undisturbed), stored(made))
