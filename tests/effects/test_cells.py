"""`obs` of results.zarr keeps types and values of the input's columns, although columns are written one by one."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import zarr
from anndata.io import read_elem, write_elem
from zarr.storage import MemoryStore

from ndreamer_dist.cohort.cells import HeldCells, StoredCells
from ndreamer_dist.cohort.source import open_source
from ndreamer_dist.effects import cells, tables
from ndreamer_dist.effects.cells import CellTable
from ndreamer_dist.effects.tables import memory_store
from ndreamer_dist.storage import texts
from tests.cohort.inputs import as_h5ad, as_zarr, counts

WAYS = {"h5ad": as_h5ad, "zarr_2": as_zarr(2), "zarr_3": as_zarr(3), "memory": lambda adata, _: adata}


def cohort(n: int = 250) -> ad.AnnData:
    """Return a cohort whose table has columns of all kinds."""
    adata, rng = counts(n, 12), np.random.default_rng(0)
    adata.obs.index = pd.Index([f"cell-{number}" for number in range(n)], name="barcode")
    adata.obs["unique"] = [f"x{'y' * (number % 9)}{number}" for number in range(n)]
    adata.obs["text"] = pd.array([None, *(f"t{number}" for number in range(n - 1))], dtype="string")
    adata.obs["phase"] = pd.Categorical.from_codes(rng.integers(-1, 3, n), ["G1", "S", "G2M"], ordered=True)
    adata.obs["whole"] = pd.array([None, *range(n - 1)], dtype="Int64")
    adata.obs["yes"] = pd.array([None, *([True] * (n - 1))], dtype="boolean")
    adata.obs["share"] = rng.random(n, dtype=np.float32)
    adata.obs["flag"] = rng.random(n) < 0.5
    return adata


def written(table: CellTable) -> tuple[pd.DataFrame, dict[str, bytes]]:
    """Return the table that is read from the files of a `CellTable`, and these files."""
    files = dict(table.files())
    plain = {"zarr.json": b'{"zarr_format": 3, "node_type": "group", "attributes": {}}'}
    return read_elem(zarr.open_group(memory_store(plain | files), mode="r", zarr_format=3)["obs"]), files


def whole(table: pd.DataFrame) -> pd.DataFrame:
    """Return a table after anndata wrote and read it as a whole."""
    root = zarr.open_group(MemoryStore(), mode="w", zarr_format=3)
    tables.write_element(root, "obs", tables.writable(table, "obs"))
    return read_elem(root["obs"])


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cells, "TEXT_ROWS", 64)
    monkeypatch.setattr(texts, "TEXT_BLOCK", 50)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("way", WAYS)
def test_columns_are_those_of_the_whole_table(way: str, tmp_path: Path) -> None:
    adata = cohort()
    with ad.settings.override(allow_write_nullable_strings=True):
        source = open_source(WAYS[way](adata, tmp_path))
    rows = np.random.default_rng(1).permutation(250)[:230]
    found, files = written(
        CellTable(source.cells, rows, {"ndreamer_row": lambda: rows, "ndreamer_x": lambda: rows > 9})
    )
    expected = source.obs.iloc[rows].assign(ndreamer_row=rows, ndreamer_x=rows > 9)
    pd.testing.assert_frame_equal(found, whole(expected), check_dtype=expected["unique"].dtype == object)
    assert len([name for name in files if re.fullmatch(r"obs/unique/(values/)?c/\d", name)]) == 4
    assert "obs/share/c/1" not in files


@pytest.mark.parametrize("missing", [False, True], ids=["names", "a_missing_name"])
def test_names_that_may_be_missing_are_read_by_columns_where_none_is(missing: bool, tmp_path: Path) -> None:
    adata = cohort()
    url = as_zarr(3)(adata, tmp_path)
    names = pd.array([None if missing else adata.obs_names[0], *adata.obs_names[1:]], dtype="string")
    obs = zarr.open_group(url, mode="r+", use_consolidated=False)["obs"]
    del obs["barcode"]
    with ad.settings.override(allow_write_nullable_strings=True), warnings.catch_warnings(action="ignore"):
        write_elem(obs, "barcode", names)  # as anndata 0.13 writes it
        zarr.consolidate_metadata(url)
    source = open_source(url)
    assert isinstance(source.cells, HeldCells if missing else StoredCells)
    assert missing or list(source.cells.index) == list(adata.obs_names)


@pytest.mark.parametrize("same", [True, False], ids=["same_values", "other_values"])
@pytest.mark.parametrize("way", WAYS)
def test_an_index_named_like_a_column_keeps_its_name_where_the_values_are_the_same(
    way: str, same: bool, tmp_path: Path
) -> None:
    adata = counts(60, 12)
    adata.obs["barcode"] = adata.obs_names if same else [f"other-{number}" for number in range(60)]
    adata.obs.index = pd.Index(adata.obs_names, name="barcode" if same or way == "memory" else "name")
    source = open_source(WAYS[way](adata, tmp_path))
    found, _ = written(CellTable(source.cells, np.arange(60)[::-1], {}))
    assert found.index.name == ("barcode" if same else None if way == "memory" else "name")
    assert list(found.index) == list(adata.obs_names[::-1])
    assert list(found["barcode"]) == list(adata.obs["barcode"][::-1])
