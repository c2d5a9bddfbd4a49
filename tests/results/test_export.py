"""A part of the results is written in the format of the suffix, and is equal when read back."""

import anndata
import numpy as np
import pandas as pd
import pytest

from ndreamer_dist.errors import QueryError
from ndreamer_dist.results.export import save
from ndreamer_dist.stats.results import open_results


@pytest.fixture(scope="module")
def part(finished):
    results = open_results(finished.run.url)
    return results.ite(cells='kind == "NK"', genes=list(results.var_names[[4, 2]]))


@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
def test_anndata_formats_hold_everything(part, tmp_path, suffix):
    before = part.copy()
    save(part, tmp_path / f"ite{suffix}")
    read = (anndata.read_h5ad if suffix == ".h5ad" else anndata.read_zarr)(tmp_path / f"ite{suffix}")
    np.testing.assert_array_equal(read.X, part.X)
    pd.testing.assert_frame_equal(read.obs, part.obs)
    pd.testing.assert_frame_equal(part.obs, before.obs)


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_tables_have_a_row_per_cell_and_a_column_per_gene(part, tmp_path, suffix):
    save(part, tmp_path / f"ite{suffix}")
    path = tmp_path / f"ite{suffix}"
    read = pd.read_csv(path, index_col=0) if suffix == ".csv" else pd.read_parquet(path)
    assert read.index.name == "cell"
    assert list(read.index) == list(part.obs_names)
    assert list(read.columns) == list(part.var_names)
    np.testing.assert_allclose(read, part.X, rtol=1e-6)


def test_sparse_expression_is_written_as_a_table(finished, tmp_path):
    part = open_results(finished.run.url).expression(genes=["G7"] if "G7" in finished.packed.genes else None)
    save(part, tmp_path / "x.csv")
    np.testing.assert_allclose(pd.read_csv(tmp_path / "x.csv", index_col=0), part.X.toarray(), rtol=1e-6)


def test_other_suffixes_and_taken_names_are_refused(part, tmp_path):
    with pytest.raises(
        QueryError, match=r"unknown suffix '.txt'; expected one of '.h5ad', '.zarr', '.csv', '.parquet'"
    ):
        save(part, tmp_path / "ite.txt")
    with pytest.raises(QueryError, match="is not a folder"):
        save(part, tmp_path / "nowhere" / "ite.csv")
    (tmp_path / "taken.zarr").mkdir()
    with pytest.raises(QueryError, match="is an existing folder"):
        save(part, tmp_path / "taken.zarr")
    save(part, tmp_path / "ite.csv")
    save(part[:3], tmp_path / "ite.csv")
    assert len(pd.read_csv(tmp_path / "ite.csv")) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ite.csv", "taken.zarr"]
