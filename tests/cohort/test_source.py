"""A cohort has the same rows and tables from every kind of input, and the caller's object is not changed."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import anndata as ad
import cloudpickle
import dask.array as da
import fsspec
import h5py
import numpy as np
import pandas as pd
import pytest
import zarr
from anndata.io import write_elem
from anndata.tests.helpers import assert_equal
from scipy import sparse

from ndreamer_dist.cohort.source import fingerprint, open_cohort, open_source
from ndreamer_dist.errors import CohortError
from tests.cohort.inputs import PLACES, as_h5ad, as_zarr, cohort_settings, counts
from tests.memory import peak_bytes

MATRICES = {
    "csr": sparse.csr_matrix,
    "csc": sparse.csc_matrix,
    "csr_array": sparse.csr_array,
    "dense": lambda x: x.toarray(),
    "float64": lambda x: x.astype(np.float64),
    "int": lambda x: x.astype(np.int32),
    "half": lambda x: x.toarray().astype(np.float16),
}


@pytest.mark.parametrize(
    ("place", "matrix"),
    [(place, matrix) for place in PLACES for matrix in MATRICES if matrix != "csc" or place == "memory"],
)
def test_rows_are_the_same_from_everywhere(place: str, matrix: str, tmp_path: Path) -> None:
    adata = counts(60, 20)
    expected = adata.X.toarray()
    adata.X = MATRICES[matrix](adata.X)
    source = open_source(PLACES[place](adata, tmp_path))
    for start, stop in ((0, 60), (0, 1), (7, 31), (59, 60)):
        rows = source.read_rows(start, stop)
        assert rows.dtype == np.float32
        assert rows.has_canonical_format
        np.testing.assert_array_equal(rows.toarray(), expected[start:stop])
    pd.testing.assert_frame_equal(source.obs, adata.obs)
    assert list(source.gene_names) == list(adata.var_names)
    assert (source.n_cells, source.n_genes) == (60, 20)


def test_sparse_values_of_half_precision_are_read(tmp_path: Path) -> None:
    adata = counts(60, 20)
    as_h5ad(adata, tmp_path)
    with h5py.File(tmp_path / "in.h5ad", "r+") as file:
        values = file["X/data"][:].astype(np.float16)
        del file["X/data"]
        file["X/data"] = values
    np.testing.assert_array_equal(open_source(tmp_path / "in.h5ad").read_rows(7, 31).toarray(), adata.X[7:31].toarray())


@pytest.mark.parametrize("place", PLACES)
def test_a_source_can_be_sent_to_a_task(place: str, tmp_path: Path) -> None:
    source = open_source(PLACES[place](counts(30, 10), tmp_path))
    before = source.read_rows(3, 9).toarray()  # the file is open now
    again = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(again.read_rows(3, 9).toarray(), before)


@pytest.mark.parametrize("place", PLACES)
def test_several_condition_keys_make_one_column_wherever_the_cohort_is(place: str, tmp_path: Path) -> None:
    adata = counts(30, 10)
    adata.obs["site"] = ["s", "t"] * 15
    settings = cohort_settings(condition_key=["condition", "site"], control="ctrl:s")
    source = open_cohort(PLACES[place](adata, tmp_path), settings)
    expected = adata.obs.assign(
        **{"condition:site": adata.obs["condition"].astype(str) + ":" + adata.obs["site"].astype(str)}
    )
    pd.testing.assert_frame_equal(
        source.cells.sample().iloc[:1], expected.iloc[:1], check_categorical=False, check_dtype=False
    )
    pd.testing.assert_frame_equal(source.obs, expected, check_categorical=False, check_dtype=False)


@pytest.mark.parametrize("place", PLACES)
def test_a_layer_is_read_instead_of_x(place: str, tmp_path: Path) -> None:
    adata = counts(30, 10)
    adata.layers["raw counts"] = adata.X * 3
    source = open_source(PLACES[place](adata, tmp_path), layer="raw counts")
    np.testing.assert_array_equal(source.read_rows(0, 30).toarray(), adata.X.toarray() * 3)


def test_the_same_data_have_the_same_fingerprint_wherever_they_are(tmp_path: Path) -> None:
    adata = counts(1500, 12)
    found = {
        place: fingerprint(open_source(PLACES[place](adata, tmp_path)), "condition", ["donor"]) for place in PLACES
    }
    assert all(one == found["h5ad"] for one in found.values())


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda a: a.obs.__setitem__("condition", ["x", *a.obs["condition"][1:]]), id="condition"),
        pytest.param(lambda a: a.obs.__setitem__("donor", ["x", *a.obs["donor"][1:]]), id="batch"),
        pytest.param(lambda a: a.X.data.__setitem__(0, 9999), id="a_value"),
        pytest.param(lambda a: a.obs_names.__class__ and setattr(a, "obs_names", a.obs_names + "x"), id="cell_names"),
        pytest.param(lambda a: setattr(a, "var_names", a.var_names + "x"), id="gene_names"),
    ],
)
def test_other_data_have_another_fingerprint(change: Callable[[ad.AnnData], None]) -> None:
    adata = counts(50, 12)
    before = fingerprint(open_source(adata), "condition", ["donor"])
    change(adata)
    assert fingerprint(open_source(adata), "condition", ["donor"]) != before


def lazily(adata: ad.AnnData, folder: Path) -> ad.AnnData:
    """Return a lazy AnnData, whose matrix and tables stay in a store."""
    return ad.experimental.read_lazy(as_zarr(3)(adata, folder))


def with_dask(
    chunks: tuple[int, int], blocks: Callable[[np.ndarray], object]
) -> Callable[[ad.AnnData, Path], ad.AnnData]:
    def make(adata: ad.AnnData, folder: Path) -> ad.AnnData:
        made = adata.copy()
        made.X = da.from_array(adata.X.toarray(), chunks=chunks).map_blocks(blocks)
        return made

    return make


LAZY = {
    "dense": with_dask((13, 7), lambda x: x),
    "sparse": with_dask((13, 20), sparse.csr_matrix),
    "read_lazy": lazily,
}


@pytest.mark.parametrize("kind", LAZY)
def test_a_lazy_anndata_is_read_by_blocks(kind: str, tmp_path: Path) -> None:
    adata = counts(60, 20)
    cohort = LAZY[kind](adata, tmp_path)
    source = cloudpickle.loads(cloudpickle.dumps(open_source(cohort)))
    for start, stop in ((0, 60), (0, 1), (7, 31)):
        rows = source.read_rows(start, stop)
        assert rows.has_canonical_format
        np.testing.assert_array_equal(rows.toarray(), adata.X[start:stop].toarray())
    assert list(source.obs["condition"]) == list(adata.obs["condition"])
    assert list(source.cell_names) == list(adata.obs_names)
    assert isinstance(source.obs, pd.DataFrame)
    assert (
        fingerprint(source, "condition", ["donor"])["rows"]
        == fingerprint(open_source(adata), "condition", ["donor"])["rows"]
    )


def test_of_a_dask_array_only_the_blocks_asked_for_are_computed() -> None:
    computed: list[int] = []

    def block(x: np.ndarray, block_info: dict | None = None) -> np.ndarray:
        if block_info:
            computed.append(block_info[0]["chunk-location"][0])
        return x

    adata = counts(60, 20)
    lazy = ad.AnnData(da.from_array(adata.X.toarray(), chunks=(10, 20)).map_blocks(block, dtype=np.float32))
    source = open_source(lazy)
    computed.clear()
    source.read_rows(25, 35)
    assert sorted(set(computed)) == [2, 3]


class MuData:
    """A stand-in for `mudata.MuData`: modalities by name."""

    def __init__(self, **mod: ad.AnnData) -> None:
        self.mod = mod


def test_of_a_mudata_the_modality_rna_is_read() -> None:
    adata = counts(50, 12)
    source = open_source(MuData(rna=adata, protein=counts(50, 8)))
    np.testing.assert_array_equal(source.read_rows(0, 50).toarray(), adata.X.toarray())
    with pytest.raises(CohortError, match="the MuData has no modality 'rna'; there are 'gex'"):
        open_source(MuData(gex=adata))


@pytest.mark.parametrize("store", ["h5mu", "zarr"])
def test_of_a_stored_mudata_the_modality_rna_is_read(store: str, tmp_path: Path) -> None:
    adata = counts(50, 12)
    if store == "h5mu":
        with h5py.File(tmp_path / "in.h5mu", "w") as file:
            write_elem(file.create_group("mod"), "rna", adata)
            write_elem(file, "obs", adata.obs)
            file.attrs["encoding-type"] = "MuData"
        path = tmp_path / "in.h5mu"
    else:
        path = tmp_path / "in.zarr"
        with ad.settings.override(auto_shard_zarr_v3=False):
            write_elem(zarr.open_group(path, mode="w").create_group("mod"), "rna", adata)
    source = pickle.loads(pickle.dumps(open_source(path)))
    np.testing.assert_array_equal(source.read_rows(0, 50).toarray(), adata.X.toarray())


def test_other_columns_are_no_part_of_the_fingerprint() -> None:
    adata = counts(50, 12)
    before = fingerprint(open_source(adata), "condition", ["donor"])
    adata.obs["age"] = 1
    assert fingerprint(open_source(adata), "condition", ["donor"]) == before


@pytest.mark.parametrize("matrix", MATRICES)
def test_the_callers_anndata_is_not_modified(matrix: str) -> None:
    adata = counts(50, 12)
    adata.X = MATRICES[matrix](adata.X)
    if matrix == "csr":  # rows out of order and stored zeros must not be tidied up in place
        adata.X.indices[:2], adata.X.data[1] = adata.X.indices[:2][::-1].copy(), 0
        adata.X.has_sorted_indices = False
    before, parts = adata.copy(), [part.copy() for part in _parts(adata.X)]
    source = open_source(adata)
    assert source.sample.shape == (50, 12)
    source.read_rows(0, 50)
    obs = source.obs
    obs["mine"] = 1
    fingerprint(source, "condition", ["donor"])
    assert_equal(adata, before)
    for now, then in zip(_parts(adata.X), parts, strict=True):
        np.testing.assert_array_equal(now, then)


def _parts(x: object) -> list[np.ndarray]:
    return [x] if isinstance(x, np.ndarray) else [x.data, x.indices, x.indptr]


def test_a_remote_h5ad_is_read_through_a_file_object(tmp_path: Path) -> None:
    adata = counts(40, 10)
    content = Path(as_h5ad(adata, tmp_path)).read_bytes()
    fsspec.filesystem("memory").pipe_file("/cohorts/in.h5ad", content)
    source = open_source("memory://cohorts/in.h5ad")
    np.testing.assert_array_equal(source.read_rows(5, 25).toarray(), adata.X[5:25].toarray())


def test_a_remote_zarr_is_read_by_slices(tmp_path: Path) -> None:
    adata = counts(40, 10)
    as_zarr(3)(adata, tmp_path)
    fsspec.filesystem("memory").put(str(tmp_path / "in.zarr"), "/cohorts/in.zarr", recursive=True)
    source = open_source("memory://cohorts/in.zarr")
    np.testing.assert_array_equal(source.read_rows(5, 25).toarray(), adata.X[5:25].toarray())


@pytest.mark.parametrize("kind", ["csr", "dense"])
def test_reading_never_holds_the_matrix(kind: str, tmp_path: Path) -> None:
    x = sparse.random(20_000, 400, 0.25, format="csr", dtype=np.float32, random_state=0)
    adata = ad.AnnData(x if kind == "csr" else x.toarray())
    path = as_h5ad(adata, tmp_path)
    whole = x.data.nbytes + x.indices.nbytes if kind == "csr" else adata.X.nbytes
    source = open_source(path)
    totals: list[float] = []

    def work() -> None:
        rows = (source.read_rows(start, start + 500) for start in range(0, 20_000, 500))
        totals.append(sum(float(block.sum(dtype=np.float64)) for block in rows))

    assert peak_bytes(work) < whole / 6
    assert totals == pytest.approx([float(x.sum(dtype=np.float64))] * len(totals))


@pytest.mark.parametrize("place", ["h5ad", "zarr3"])
def test_a_matrix_by_columns_is_refused_with_the_command_that_turns_it(place: str, tmp_path: Path) -> None:
    adata = counts(50, 12)
    adata.X = sparse.csc_matrix(adata.X)
    path = PLACES[place](adata, tmp_path)
    with pytest.raises(CohortError, match=f"X is stored by columns .*: ndreamer-dist convert {path} OUT.zarr"):
        open_source(path)
