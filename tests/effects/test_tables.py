"""Tables of cells and genes are written with all their values, or refused before work starts."""

from __future__ import annotations

import warnings
from decimal import Decimal

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import zarr
from anndata.io import read_elem
from zarr.storage import MemoryStore

from ndreamer_dist.effects.tables import check_tables, writable, write_element
from ndreamer_dist.errors import CohortError

N = 6
GENES = pd.DataFrame(index=["a", "b"])
STORED = {
    "fractions_as_objects": (np.array([0.5, 1] * 3, dtype=object), np.array([0.5, 1.0] * 3)),
    "fractions_and_none": (np.array([0.5, None] * 3, dtype=object), np.array([0.5, np.nan] * 3)),
    "whole_numbers_and_none": (np.array([1, None] * 3, dtype=object), pd.array([1, None] * 3, dtype="Int64")),
    "yes_no_and_none": (np.array([True, None] * 3, dtype=object), pd.array([True, None] * 3, dtype="boolean")),
    "decimals": (np.array([Decimal("1.5")] * N, dtype=object), np.full(N, 1.5)),
    "nullable_fractions": (pd.array([0.5, None] * 3, dtype="Float64"), np.array([0.5, np.nan] * 3)),
    "pyarrow_whole_numbers": (pd.array([1, None] * 3, dtype="int64[pyarrow]"), pd.array([1, None] * 3, dtype="Int64")),
    "pyarrow_fractions": (pd.array([0.5, None] * 3, dtype="double[pyarrow]"), np.array([0.5, np.nan] * 3)),
    "pyarrow_yes_no": (pd.array([True, None] * 3, dtype="bool[pyarrow]"), pd.array([True, None] * 3, dtype="boolean")),
    "long_doubles": (np.full(N, 0.5, dtype=np.longdouble), np.full(N, 0.5)),
    "text_and_none": (np.array(["x", None] * 3, dtype=object), pd.array(["x", None] * 3, dtype="string")),
    "half_precision": (np.full(N, 0.5, dtype=np.float16), np.full(N, 0.5, dtype=np.float16)),
}


@pytest.mark.parametrize("kind", STORED)
def test_numbers_of_all_kinds_are_stored_with_their_values(kind: str) -> None:
    values, expected = STORED[kind]
    obs = pd.DataFrame({"x": values}, index=[f"c{i}" for i in range(N)])
    check_tables(obs, GENES)
    root = zarr.open_group(MemoryStore(), mode="w", zarr_format=3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        write_element(root, "obs", writable(obs, "obs"))
        found = read_elem(root["obs"])["x"]
    pd.testing.assert_series_equal(
        found, pd.Series(expected, index=obs.index, name="x"), check_dtype=kind != "text_and_none"
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.array(["a", 1.5] * 3, dtype=object), "'x' mixes float, str"),
        (
            pd.to_datetime(["2026-01-01"] * N),
            r"'x' \(datetime64\[[nu]s\]\) cannot be stored; turn it into text or numbers",
        ),
        (np.array([b"a"] * N, dtype=object), "'x' holds bytes"),
        (np.array([[1, 2]] * N + [[]], dtype=object)[:N], "'x' holds list"),
    ],
)
def test_what_cannot_be_stored_is_refused_by_name(values: object, message: str) -> None:
    obs = pd.DataFrame({"fine": range(N), "x": pd.Series(list(values), dtype=getattr(values, "dtype", object))})
    with pytest.raises(CohortError, match=f"^obs column {message}"):
        check_tables(obs, GENES)


@pytest.mark.parametrize("name", ["cell_id", "_index"])
def test_an_index_that_is_named_like_a_column_is_written(name: str) -> None:
    obs = pd.DataFrame({name: np.arange(N) + 1000})
    obs.index = pd.Index(obs[name].astype(str), name=name)
    if name == "_index":
        with pytest.raises(CohortError, match=r"obs column '_index'.* cannot be stored"):
            check_tables(obs, GENES)
        return
    check_tables(obs, GENES)
    adata = ad.AnnData(obs=writable(obs, "obs"))
    root = zarr.open_group(MemoryStore(), mode="w", zarr_format=3)
    write_element(root, "obs", adata.obs)
    assert list(read_elem(root["obs"])[name]) == list(obs[name])


def test_an_index_that_holds_what_its_column_holds_keeps_its_name() -> None:
    obs = pd.DataFrame({"barcode": [f"c{i}" for i in range(N)]})
    obs.index = pd.Index(obs["barcode"], name="barcode")
    assert writable(obs, "obs").index.name == "barcode"
    check_tables(obs, GENES)
