"""A cohort by columns becomes the same cohort by rows, out of core."""

from __future__ import annotations

from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from ndreamer_dist.cohort.source import open_source
from ndreamer_dist.cohort.stored import stored_matrix
from ndreamer_dist.commands.convert import convert, row_blocks
from ndreamer_dist.errors import CohortError, StoreError
from tests.cohort.inputs import PLACES
from tests.memory import peak_bytes


def cohort(cells: int = 300, genes: int = 40) -> ad.AnnData:
    """Return a cohort whose matrices are stored by columns."""
    x = sparse.random(cells, genes, 0.3, format="csc", dtype=np.float32, random_state=0)
    obs = pd.DataFrame({"condition": pd.Categorical(["a", "b"] * (cells // 2))}, index=[f"c{i}" for i in range(cells)])
    adata = ad.AnnData(x, obs=obs, var=pd.DataFrame(index=[f"g{i}" for i in range(genes)]))
    adata.layers["twice"] = adata.X * 2
    adata.raw = adata.copy()
    adata.obsm["X_pca"] = np.arange(2.0 * cells).reshape(cells, 2)
    return adata


@pytest.mark.parametrize("entries", [2**23, 400], ids=["one_range", "many_ranges"])
@pytest.mark.parametrize("kind", ["h5ad", "zarr2", "zarr3"])
def test_a_cohort_by_columns_becomes_the_same_by_rows(kind: str, entries: int, tmp_path: Path) -> None:
    adata = cohort()
    path = PLACES[kind](adata, tmp_path)
    assert convert(path, tmp_path / "out.zarr", entries=entries) == (300, 40)
    made = ad.read_zarr(tmp_path / "out.zarr")
    for values, expected in ((made.X, adata.X), (made.layers["twice"], adata.layers["twice"]), (made.raw.X, adata.X)):
        assert values.format == "csr"
        np.testing.assert_array_equal(values.toarray(), expected.toarray())
    pd.testing.assert_frame_equal(made.obs, adata.obs)
    np.testing.assert_array_equal(made.obsm["X_pca"], adata.obsm["X_pca"])
    assert made.raw.var_names.equals(adata.var_names)
    source = open_source(tmp_path / "out.zarr")
    np.testing.assert_array_equal(source.read_rows(10, 250).toarray(), adata.X.toarray()[10:250])
    assert not [left for left in tmp_path.iterdir() if left.name.startswith(".")]


def test_memory_is_bounded_by_the_values_of_a_range(tmp_path: Path) -> None:
    x = sparse.random(4000, 300, 0.5, format="csc", dtype=np.float32, random_state=0)
    ad.AnnData(x).write_h5ad(tmp_path / "in.h5ad")
    with h5py.File(tmp_path / "in.h5ad") as file:
        matrix = stored_matrix(file, str(tmp_path / "in.h5ad"), "h5ad", "X")
        totals: list[float] = []

        def work() -> None:
            totals.append(sum(float(block.sum(dtype=np.float64)) for block in row_blocks(matrix, tmp_path, 2**16)))

        peak = peak_bytes(work)
    assert totals == pytest.approx([float(x.sum(dtype=np.float64))] * len(totals))
    assert peak < 80 * 2**16 < 10 * x.nnz


def test_what_cannot_be_converted_is_refused(tmp_path: Path) -> None:
    cohort().write_h5ad(tmp_path / "in.h5ad")
    (tmp_path / "there.zarr").mkdir()
    with pytest.raises(StoreError, match=r"there\.zarr is there already"):
        convert(tmp_path / "in.h5ad", tmp_path / "there.zarr")
    with pytest.raises(StoreError, match="is no path on this machine"):
        convert(tmp_path / "in.h5ad", "s3://bucket/out.zarr")
    with pytest.raises(CohortError, match="does not exist"):
        convert(tmp_path / "no.h5ad", tmp_path / "out.zarr")
    with h5py.File(tmp_path / "in.h5ad", "r+") as file:
        file["X/indices"][5] = 10_000
    with pytest.raises(CohortError, match="name cells that are not there"):
        convert(tmp_path / "in.h5ad", tmp_path / "out.zarr")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.h5ad", "there.zarr"]
