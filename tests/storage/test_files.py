"""Files are written atomically, and no damaged or missing chunk is read as data."""

from __future__ import annotations

import functools
import itertools
import pickle
import random
import tempfile
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from ndreamer_dist.errors import StoreError
from ndreamer_dist.storage import shards
from ndreamer_dist.storage.arrays import (
    create_array,
    open_array,
    read_array,
    shard_files,
    write_array,
    write_part,
    write_shard,
)
from ndreamer_dist.storage.files import Storage, open_storage
from ndreamer_dist.storage.shards import counting, merged


@pytest.fixture(params=["local", "memory"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """A local folder, and one that is reached through fsspec."""
    return open_storage(tmp_path if request.param == "local" else f"memory://{tmp_path.name}")


def test_a_file_is_written_whole_read_back_listed_and_deleted(storage: Storage) -> None:
    storage.write_atomic("a/b.json", b"12345")
    storage.write_atomic("a/b.json", b"1", b"", b"23")
    assert storage.read("a/b.json") == b"123"
    assert storage.list() == {"a/b.json": 3}
    assert storage.exists("a")
    storage.delete("a")
    assert storage.list() == {}
    storage.delete("a")


def test_a_folder_that_is_begun_while_it_is_listed_is_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    storage = open_storage("memory://begun")
    folder = {"name": storage.path("done"), "size": 0, "type": "directory"}
    monkeypatch.setattr(type(storage.filesystem), "find", lambda *_, **__: {folder["name"]: folder})
    assert storage.list("done") == {}


def test_a_missing_file_is_named(storage: Storage) -> None:
    with pytest.raises(StoreError, match=r"nothing\.json does not exist"):
        storage.read("nothing.json")


def test_a_failed_write_leaves_the_old_file_and_no_rubbish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = open_storage(tmp_path)
    storage.write_atomic("x", b"old")

    def refuse(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(StoreError, match="disk full"):
        storage.write_atomic("x", b"new")
    assert storage.list() == {"x": 3}
    assert storage.read("x") == b"old"


def test_a_storage_travels_to_another_process(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    _ = storage.filesystem
    assert pickle.loads(pickle.dumps(storage)) == storage


def test_arrays_round_trip(storage: Storage) -> None:
    values = np.random.default_rng(0).normal(size=(500, 70)).astype(np.float32)
    write_array(storage, "x", values, chunks=(64, 8), shards=(128, 72))
    assert np.array_equal(read_array(storage, "x"), values)
    assert np.array_equal(read_array(storage, "x", (slice(100, 300), slice(3, 9))), values[100:300, 3:9])


@pytest.mark.parametrize(
    "shards", [pytest.param((64, 64), id="a_row_of_chunks"), pytest.param((128, 32), id="a_block")]
)
def test_a_shard_that_is_written_chunk_by_chunk_is_the_one_that_zarr_writes(tmp_path: Path, shards: tuple) -> None:
    storage, values = open_storage(tmp_path), np.random.default_rng(0).normal(size=(150, 70)).astype(np.float32)
    for name in ("ours", "zarr"):
        create_array(
            storage, name, shape=values.shape, dtype="f4", chunks=(64, 16), shards=shards, fill_value=np.nan,
            attributes={},
        )  # fmt: skip
    for first, column in itertools.product(range(0, 150, shards[0]), range(0, 70, shards[1])):
        part = values[first : first + shards[0], column : column + shards[1]]
        starts = itertools.product(range(0, part.shape[0], 64), range(0, part.shape[1], 16))
        position = (first // shards[0], column // shards[1])
        write_shard(storage, "ours", position, (part[row : row + 64, gene : gene + 16] for row, gene in starts))
        write_part(storage, "zarr", np.s_[first : first + part.shape[0], column : column + part.shape[1]], part)
        if part.shape == shards == (64, 64):
            assert storage.read(shard_files("ours", *position)) == storage.read(shard_files("zarr", *position))
    np.testing.assert_array_equal(zarr.open_array(tmp_path / "ours", mode="r")[...], values)
    np.testing.assert_array_equal(read_array(storage, "ours"), values)
    np.testing.assert_array_equal(read_array(storage, "zarr"), values)


def test_making_an_array_does_not_make_the_root(tmp_path: Path) -> None:
    create_array(open_storage(tmp_path), "layers/ite", shape=(4, 4), dtype="f4", chunks=(2, 2))
    assert not (tmp_path / "zarr.json").exists()
    assert not (tmp_path / "layers/zarr.json").exists()


@pytest.mark.parametrize(
    ("chunks", "shards"), [pytest.param((64, 16), (128, 64), id="sharded"), pytest.param((64, 64), None, id="plain")]
)
@pytest.mark.parametrize("kind", ["values", "zeros"])
def test_no_flipped_bit_passes_for_data(tmp_path: Path, chunks: tuple, shards: tuple | None, kind: str) -> None:
    values = np.random.default_rng(0).normal(size=(300, 64)).astype(np.float32) * (kind == "values")
    storage = open_storage(tmp_path)
    write_array(storage, "x", values, chunks=chunks, shards=shards)
    files = [tmp_path / name for name in storage.list() if "/c/" in name]
    draw = random.Random(0)
    for _ in range(60):
        file = draw.choice(files)
        whole = file.read_bytes()
        damaged = bytearray(whole)
        damaged[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        file.write_bytes(damaged)
        position = tuple(int(part) for part in file.relative_to(tmp_path / "x/c").parts)
        with pytest.raises(StoreError) as raised:
            read_array(storage, "x")
        assert str(tmp_path) in str(raised.value)
        assert f"array 'x', chunk {position} is damaged" in str(raised.value)
        file.write_bytes(whole)
    assert np.array_equal(read_array(storage, "x"), values)


@pytest.mark.parametrize("value", [0.0, np.nan, 1.0])
def test_a_missing_chunk_is_an_error_and_a_chunk_of_fill_values_is_not(tmp_path: Path, value: float) -> None:
    storage = open_storage(tmp_path)
    create_array(storage, "x", shape=(8, 8), dtype="f4", chunks=(2, 4), shards=(4, 8), fill_value=np.nan)
    open_array(storage, "x", mode="r+")[...] = np.full((8, 8), value, dtype=np.float32)
    assert np.array_equal(read_array(storage, "x"), np.full((8, 8), value), equal_nan=True)
    (tmp_path / shard_files("x", 1, 0)).unlink()
    assert read_array(storage, "x", slice(0, 4)).shape == (4, 8)
    with pytest.raises(StoreError, match=r"chunk \(1, 0\) is missing"):
        read_array(storage, "x")


def test_a_chunk_that_other_writers_left_out_is_its_fill_value(tmp_path: Path) -> None:
    storage, values = open_storage(tmp_path), np.arange(64, dtype=np.float32).reshape(8, 8)
    create_array(storage, "x", shape=(8, 8), dtype="f4", chunks=(2, 4), shards=(4, 8), fill_value=np.nan)
    values[:2, :4] = np.nan
    open_array(storage, "x", mode="r+").with_config({"write_empty_chunks": False})[...] = values
    assert np.array_equal(read_array(storage, "x"), values, equal_nan=True)
    assert np.array_equal(read_array(storage, "x", (slice(1, 3), slice(3))), values[1:3, :3], equal_nan=True)


def test_a_truncated_chunk_is_named(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    write_array(storage, "x", np.arange(1000.0))
    file = tmp_path / shard_files("x", 0)
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(StoreError, match=r"array 'x', chunk \(0,\) is damaged"):
        read_array(storage, "x")


def test_an_array_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="array 'nothing' cannot be opened"):
        read_array(open_storage(tmp_path), "nothing")


# --- what a read costs -----------------------------------------------------------------------------------------------

LAYOUTS = [((7, 5), (21, 15)), ((7, 5), (7, 45)), ((7, 5), None)]


@functools.cache
def made(layout: int) -> tuple[Storage, np.ndarray]:
    """Return an array of one layout, cached for the session, and its values."""
    chunk, shard = LAYOUTS[layout]
    storage = open_storage(tempfile.mkdtemp())
    values = np.random.default_rng(layout).normal(size=(50, 42)).astype(np.float32)
    write_array(storage, "x", values, chunks=chunk, shards=shard)
    return storage, values


@settings(deadline=None, max_examples=60)
@given(st.integers(0, len(LAYOUTS) - 1), st.tuples(*[st.integers(-60, 60) | st.none()] * 4))
def test_any_slices_are_what_numpy_makes_of_them(layout: int, bounds: tuple) -> None:
    storage, values = made(layout)
    part = (slice(*bounds[:2]), slice(*bounds[2:]))
    assert np.array_equal(read_array(storage, "x", part), values[part])


def test_a_selection_with_steps_is_refused() -> None:
    with pytest.raises(ValueError, match="without steps"):
        read_array(made(0)[0], "x", slice(None, None, 2))


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(1, 99), st.integers(1, 99)), min_size=1, max_size=9), st.integers(0, 300))
def test_ranges_are_joined_over_small_gaps_and_no_further(steps: list, spare: int) -> None:
    spans, place = [], 0
    for gap, length in steps:
        spans.append((place + gap, place + gap + length))
        place += gap + length
    runs = merged(spans[::-1], spare)
    wanted = {byte for span in spans for byte in range(*span)}
    read = [byte for run in runs for byte in range(*run)]
    assert len(read) == len(set(read))
    assert wanted <= set(read)
    assert len(read) - len(wanted) <= spare
    gaps = sorted(later[0] - earlier[1] for earlier, later in itertools.pairwise(spans))
    assert len(spans) - len(runs) == sum(np.cumsum(gaps) <= spare)


def test_ranges_that_touch_are_one_request() -> None:
    assert merged([(5, 9), (0, 5), (9, 20)], 0) == [(0, 20)]


@pytest.mark.parametrize(
    ("columns", "requests"),
    [
        pytest.param(slice(0, 16), 2, id="one_chunk_and_the_index"),
        pytest.param(slice(10, 50), 2, id="neighbours_in_one_request"),
        pytest.param(slice(0, 80), 1, id="a_whole_shard_in_one"),
    ],
)
def test_a_read_costs_the_chunks_it_touches_and_the_index(storage: Storage, columns: slice, requests: int) -> None:
    values = np.random.default_rng(0).normal(size=(96, 80)).astype(np.float32)
    write_array(storage, "x", values, chunks=(32, 16), shards=(32, 80))
    with counting() as reads:
        assert np.array_equal(read_array(storage, "x", (slice(40, 50), columns)), values[40:50, columns])
    shard = storage.read(shard_files("x", 1, 0))
    lengths = np.frombuffer(shard[-84:-4], dtype="<u8").reshape(5, 2)[:, 1]
    touched = int(lengths[columns.start // 16 : -(-columns.stop // 16)].sum()) + 84
    assert (reads.requests, reads.bytes, reads.touched) == (requests, touched, touched)
    assert reads.chunks == -(-columns.stop // 16) - columns.start // 16


def test_shards_are_read_side_by_side_only_as_far_as_memory_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    storage, values = made(0)
    monkeypatch.setattr(shards, "DECODED_BYTES", 1)
    assert np.array_equal(read_array(storage, "x"), values)


def test_counts_are_of_the_block_they_stand_in(storage: Storage) -> None:
    storage.write_atomic("a", b"12345")
    with counting() as outer:
        storage.read("a")
        with counting() as inner:
            storage.read("a")
    storage.read("a")
    assert (inner.requests, inner.bytes, outer.requests, outer.bytes) == (1, 5, 2, 10)
