"""Columns of text are read in blocks as Arrow, with the values that zarr and h5py read, in every encoding."""

from __future__ import annotations

import struct
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pytest
import zarr
from numcodecs import VLenUTF8

from ndreamer_dist.storage import texts
from ndreamer_dist.storage.texts import joined, parse_texts, text_blocks

TEXTS = {
    "none": [],
    "one": ["a"],
    "empty": ["", "", ""],
    "of_one_length": [f"c{number:05d}" for number in range(300)],
    "of_many_lengths": ["x" * (number % 7) for number in range(333)],
    "beyond_ascii": ["ab", "", "zürich", "細胞", "x" * 300],
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "TEXT_BLOCK", 100)


def encoded(values: list[str]) -> np.ndarray:
    data = VLenUTF8().encode(np.array(values, dtype=object)) if values else struct.pack("<I", 0)
    return np.frombuffer(data, np.uint8)


@pytest.mark.parametrize("values", TEXTS.values(), ids=TEXTS)
def test_a_chunk_holds_what_numcodecs_put_there(values: list[str]) -> None:
    blocks = list(parse_texts(encoded(values)))
    assert all(len(block) <= 100 for block in blocks)
    assert joined(blocks).to_pylist() == values


@pytest.mark.parametrize(
    "damaged",
    [
        pytest.param(lambda data: data[:-1], id="end_lost"),
        pytest.param(lambda data: data[:6], id="in_a_length"),
        pytest.param(lambda data: np.concatenate([data, data[:3]]), id="longer"),
        pytest.param(lambda data: np.where(np.arange(len(data)) == 8, 255, data).astype(np.uint8), id="no_text"),
        pytest.param(lambda data: np.where(np.arange(len(data)) == 4, 77, data).astype(np.uint8), id="length"),
    ],
)
def test_a_damaged_chunk_is_no_text(damaged: object) -> None:
    with pytest.raises((ValueError, struct.error)):
        list(parse_texts(damaged(encoded(["ab", "c", "def"]))))


@pytest.mark.parametrize("values", [TEXTS["of_many_lengths"], TEXTS["beyond_ascii"]], ids=["many", "beyond_ascii"])
@pytest.mark.parametrize(
    "layout",
    [
        pytest.param({"zarr_format": 2, "filters": [VLenUTF8()], "chunks": (1000,)}, id="zarr_2_one_chunk"),
        pytest.param({"zarr_format": 3, "chunks": (1000,)}, id="zarr_3_one_chunk"),
        pytest.param({"zarr_format": 3, "chunks": (30,)}, id="zarr_3_chunks"),
        pytest.param({"zarr_format": 3, "chunks": (30,), "compressors": None}, id="not_compressed"),
        pytest.param({"zarr_format": 3, "chunks": (30,), "shards": (120,)}, id="shards"),
    ],
)
def test_text_in_zarr_is_what_zarr_reads(layout: dict[str, object], values: list[str], tmp_path: Path) -> None:
    group = zarr.open_group(tmp_path, mode="w", zarr_format=layout["zarr_format"]).create_group("obs")
    kept = {name: value for name, value in layout.items() if name != "zarr_format"}
    array = group.create_array("x", shape=(len(values),), dtype="string", **kept)
    array[:] = np.array(values, dtype=object)
    blocks = list(text_blocks(zarr.open_group(tmp_path, mode="r")["obs/x"]))
    assert pa.concat_arrays(blocks).to_pylist() == values


def test_a_chunk_that_was_not_written_is_of_empty_texts(tmp_path: Path) -> None:
    group = zarr.open_group(tmp_path, mode="w")
    array = group.create_array("x", shape=(90,), dtype="string", chunks=(30,))
    array[:30] = np.array(["a"] * 30, dtype=object)
    assert joined(list(text_blocks(array))).to_pylist() == ["a"] * 30 + [""] * 60


def test_text_in_hdf5_is_what_h5py_reads(tmp_path: Path) -> None:
    values = TEXTS["beyond_ascii"] * 50
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file.create_dataset("x", data=values, dtype=h5py.string_dtype())
        blocks = list(text_blocks(file["x"]))
    assert [len(block) for block in blocks] == [100, 100, 50]
    assert joined(blocks).to_pylist() == values
