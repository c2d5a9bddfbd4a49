"""Stores written by R, Julia, and old and new versions of anndata are read with the right values."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import zarr
from scipy import sparse

from ndreamer_dist.cohort.matrix import tidied
from ndreamer_dist.cohort.source import open_source
from ndreamer_dist.errors import CohortError
from ndreamer_dist.storage import hdf5
from tests.cohort.inputs import as_h5ad, as_zarr, backed, counts


def assert_reads(cohort: object, expected: ad.AnnData) -> None:
    source = open_source(cohort)
    np.testing.assert_array_equal(source.read_rows(0, expected.n_obs).toarray(), expected.X.toarray())
    assert list(source.cell_names) == list(expected.obs_names)
    assert list(source.gene_names) == list(expected.var_names)
    for column in ("condition", "donor"):
        assert list(source.obs[column].astype(str)) == list(expected.obs[column].astype(str))


@pytest.mark.parametrize("dense", [False, True], ids=["sparse", "dense"])
def test_attributes_of_a_fixed_length_are_text(dense: bool, tmp_path: Path) -> None:
    adata = counts(60, 20)
    path = as_h5ad(adata, tmp_path)

    def fix(_: str, item: h5py.HLObject) -> None:
        for name, value in list(item.attrs.items()):
            if isinstance(value, str):
                item.attrs[name] = np.bytes_(value)

    with h5py.File(path, "r+") as file:
        if dense:
            del file["X"]
            file["X"] = adata.X.toarray()
            file["X"].attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
        fix("/", file)
        file.visititems(fix)
        assert isinstance(file["X"].attrs["encoding-type"], bytes)
    assert_reads(path, adata)


@pytest.mark.parametrize(("sparse_x", "field"), [(True, "index"), (False, "CellID")], ids=["sparse", "dense"])
def test_tables_of_records_are_read_with_their_categories(sparse_x: bool, field: str, tmp_path: Path) -> None:
    adata, path = counts(60, 20), tmp_path / "old.h5ad"
    with h5py.File(path, "w") as file:
        if sparse_x:
            group = file.create_group("X")
            group.attrs["h5sparse_format"], group.attrs["h5sparse_shape"] = "csr", np.array(adata.shape)
            for part in ("data", "indices", "indptr"):
                group[part] = getattr(adata.X, part)
        else:
            file["X"] = adata.X.toarray()
        obs = np.zeros(60, [(field, "S16"), ("condition", "i1"), ("donor", "i1"), ("age", "i8")])
        obs[field] = adata.obs_names.to_numpy().astype("S")
        obs["age"] = adata.obs["age"]
        for name in ("condition", "donor"):
            codes, levels = pd.factorize(adata.obs[name].astype(str), sort=True)
            obs[name], file[f"uns/{name}_categories"] = codes, np.array(levels, dtype=h5py.string_dtype())
        var = np.zeros(20, [(field, "S16")])
        var[field] = adata.var_names.to_numpy().astype("S")
        file["obs"], file["var"] = obs, var
    assert_reads(path, adata)
    assert list(open_source(path).obs["age"]) == list(adata.obs["age"])


def test_an_analysed_cohort_in_zarr_is_read_though_its_uns_is_not(tmp_path: Path) -> None:
    adata = counts(60, 20)
    path = Path(as_zarr(3)(adata, tmp_path))
    root = zarr.open_group(path, mode="r+", use_consolidated=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        root["uns"].create_array("ranked", data=np.arange(3))
        zarr.consolidate_metadata(path)
    for file in (path / "zarr.json", path / "uns/ranked/zarr.json"):
        text = file.read_text().replace('"data_type": "int64"', '"data_type": {"name": "struct", "configuration": {}}')
        file.write_text(text)
    with pytest.raises(ValueError, match="struct"):
        zarr.open_group(path, mode="r")
    assert_reads(str(path), adata)


@pytest.mark.parametrize("layer", ["counts", "raw"])
def test_an_x_that_holds_nothing_is_none(layer: str, tmp_path: Path) -> None:
    adata = counts(60, 20)
    adata.raw, adata.layers["counts"] = adata.copy(), adata.X.copy()
    path = as_h5ad(adata, tmp_path)
    with h5py.File(path, "r+") as file:
        del file["X"]
        file["X"] = h5py.Empty("f4")
        file["X"].attrs.update({"encoding-type": "null", "encoding-version": "0.1.0"})
    with pytest.raises(
        CohortError, match=r"holds no X; --layer raw reads the counts in .raw; .* \(layers there: 'counts'\)$"
    ):
        open_source(path)
    source = open_source(path, layer=layer)
    np.testing.assert_array_equal(source.read_rows(0, 60).toarray(), adata.X.toarray())
    assert (
        open_source(path, prefer_counts=True)
        .notes[0]
        .startswith("there is no X: the counts of 20 genes in .raw are read")
    )


def split_values(adata: ad.AnnData) -> ad.AnnData:
    """Return a cohort in which each entry above 1 is stored as two entries of the same cell and gene."""
    made, x = adata.copy(), adata.X.tocoo()
    several = x.data > 1
    data = np.concatenate([np.where(several, x.data - 1, x.data), np.ones(several.sum(), np.float32)])
    row, column = np.concatenate([x.row, x.row[several]]), np.concatenate([x.col, x.col[several]])
    order = np.argsort(row, kind="stable")
    indptr = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=x.shape[0]))])
    made.X = sparse.csr_matrix((data[order], column[order], indptr), shape=x.shape)
    assert not made.X.has_canonical_format
    return made


@pytest.mark.parametrize(
    "store", [as_h5ad, as_zarr(3), lambda a, _: a, backed], ids=["h5ad", "zarr", "memory", "backed"]
)
def test_a_gene_that_a_cell_holds_twice_is_added_up(store, tmp_path: Path) -> None:
    adata = counts(60, 20, density=3.0)
    assert_reads(store(split_values(adata), tmp_path), adata)


def test_how_many_values_were_added_up_is_known_and_nothing_is_changed() -> None:
    adata = counts(60, 20)
    twice = split_values(adata).X
    before = twice.data.copy(), twice.indices.copy()
    rows, repeated = tidied(twice)
    assert repeated == twice.nnz - adata.X.nnz > 0
    np.testing.assert_array_equal(rows.toarray(), adata.X.toarray())
    np.testing.assert_array_equal(twice.data, before[0])
    np.testing.assert_array_equal(twice.indices, before[1])
    assert tidied(adata.X)[1] == 0


def test_added_values_are_said_in_the_notes(tmp_path: Path) -> None:
    from ndreamer_dist import keys
    from ndreamer_dist.cohort.genes import run_cohort
    from tests.cohort.inputs import SERIAL, opened, settings_of

    adata = split_values(counts(300, 40))
    settings = settings_of()
    run, source, key = opened(tmp_path / "run", as_h5ad(adata, tmp_path), settings)
    run_cohort(run, settings, source, SERIAL, key["cohort"])
    repeated = adata.X.nnz - counts(300, 40).X.nnz
    assert (
        f"{repeated} duplicate entries of a cell and gene were added to the first"
        in run.read_json(keys.COHORT_SUMMARY)["notes"]
    )


@pytest.mark.parametrize(
    ("modality", "dataset"), [("", "X/data"), ("", "obs/age"), ("mod/rna/", "X/data"), ("mod/rna/", "obs/age")]
)
def test_a_filter_that_hdf5_lacks_is_named(
    modality: str, dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(as_h5ad(counts(60, 20), tmp_path))
    if modality:
        with h5py.File(path) as adata, h5py.File(path := tmp_path / "in.h5mu", "w") as mudata:
            adata.copy("/", mudata.create_group("mod"), "rna")
            adata.copy("obs", mudata)
    lacking = f"/{modality}{dataset}"
    monkeypatch.setattr(hdf5, "_missing", lambda item: "HDF5 zstd filter (32015)" if item.name == lacking else None)
    element = dataset.split("/")[0]
    words = rf"{element} is compressed by 'HDF5 zstd filter \(32015\)'.* pip install hdf5plugin$"
    with pytest.raises(CohortError, match=words):
        open_source(path)


@pytest.mark.skipif(importlib.util.find_spec("hdf5plugin") is None, reason="hdf5plugin is not installed")
def test_an_installed_hdf5plugin_is_used(tmp_path: Path) -> None:
    import hdf5plugin

    adata = counts(60, 20)
    adata.write_h5ad(tmp_path / "in.h5ad", compression=hdf5plugin.FILTERS["zstd"])
    assert_reads(tmp_path / "in.h5ad", adata)


@pytest.mark.parametrize("number", [37, 38, 95, 524])
def test_a_file_system_without_locks_is_read_without(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, opened = as_h5ad(counts(60, 20), tmp_path), h5py.File

    def no_locks(name: str, mode: str, **how: object) -> h5py.File:
        if how.get("locking") is not False:
            msg = f"Unable to synchronously open file (unable to lock file, errno = {number}, error message = '...')"
            raise OSError(msg)
        return opened(name, mode, **how)

    monkeypatch.setattr(hdf5.h5py, "File", no_locks)
    assert hdf5.open_file(path, path)["X"].attrs["encoding-type"] == "csr_matrix"


def test_an_anndata_backed_for_writing_is_refused_at_once(tmp_path: Path) -> None:
    adata = ad.read_h5ad(as_h5ad(counts(60, 20), tmp_path), backed="r+")
    with pytest.raises(CohortError, match=r"in mode 'r\+', which keeps every other process out"):
        open_source(adata)
    adata.file.close()


def test_a_table_indexed_by_a_column_of_its_own_keeps_its_columns(tmp_path: Path) -> None:
    from ndreamer_dist.effects.tables import check_tables, writable

    adata = counts(60, 20)
    adata.obs["cell_id"], adata.var["entrez"] = np.arange(60) + 1000, np.arange(20) + 7
    adata.obs.index = pd.Index(adata.obs["cell_id"].astype(str), name="cell_id")
    source = open_source(adata)
    check_tables(source.obs, source.var)
    obs = adata.obs.set_axis(pd.Index(np.arange(60) + 1000, name="cell_id"), axis=0)
    check_tables(obs, adata.var.set_axis(pd.Index(np.arange(20) + 7, name="entrez"), axis=0))
    text = obs.set_axis(pd.Index(obs.index.astype(str), name="cell_id"), axis=0)
    assert writable(text, "obs").index.name is None
    assert list(writable(text, "obs")["cell_id"]) == list(adata.obs["cell_id"])


def test_what_an_analysis_leaves_in_uns_is_not_opened(tmp_path: Path) -> None:
    adata = counts(200, 30)
    sc.pp.log1p(adata)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sc.tl.rank_genes_groups(adata, "condition")
    path = as_h5ad(adata, tmp_path)
    with h5py.File(path, "r+") as file:
        for name in file["uns/rank_genes_groups"]:
            file["uns/rank_genes_groups"][name].attrs["encoding-type"] = "of another world"
    assert open_source(path).n_cells == 200


@pytest.mark.parametrize("dense", [False, True], ids=["sparse", "dense"])
def test_sharded_zarr_with_nullable_columns_is_read(dense: bool, tmp_path: Path) -> None:
    adata = counts(300, 40)
    adata.obs["text"] = pd.array(["x", None, "y"] * 100, dtype="string")
    adata.obs["number"] = pd.array([1, None, 3] * 100, dtype="Int64")
    adata.obs["condition"] = adata.obs["condition"].astype("string")
    written = adata.copy()
    if dense:
        written.X = adata.X.toarray()
    settings = {"auto_shard_zarr_v3": True, "zarr_write_format": 3, "allow_write_nullable_strings": True}
    with ad.settings.override(**settings), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        written.write_zarr(tmp_path / "in.zarr", chunks=(50, 40)) if dense else written.write_zarr(tmp_path / "in.zarr")
    array = zarr.open_group(tmp_path / "in.zarr")["X" if dense else "X/data"]
    assert array.shards is not None
    assert_reads(str(tmp_path / "in.zarr"), adata)
    obs = open_source(str(tmp_path / "in.zarr")).obs
    assert obs["number"].isna().sum() == 100
    (path,) = [p for p in (tmp_path / "in.zarr/X").rglob("c/*") if p.is_file()][:1] or [None]
    if not dense:
        path.unlink()
        with pytest.raises(CohortError, match=r"X is truncated: .* chunks of X/"):
            open_source(str(tmp_path / "in.zarr"))
