"""Selected genes, totals and kept cells equal those of scanpy in memory, while the matrix is read by spans."""

from __future__ import annotations

import itertools
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
from scipy import sparse

from ndreamer_dist import keys
from ndreamer_dist.cohort.genes import run_cohort, seurat_hvg
from ndreamer_dist.cohort.packed import read_table
from ndreamer_dist.cohort.statistics import normalised, spans_of
from ndreamer_dist.compute.executor import RayRuntime
from ndreamer_dist.errors import CohortError
from tests.cohort.inputs import SERIAL, counts, files_below, opened, scanpy_selection, settings_of


def selected(folder: Path) -> list[str]:
    table = pd.read_parquet(folder / keys.GENES_TABLE)
    return list(table.loc[table["selected"], "name"])


def group_of(adata: ad.AnnData) -> pd.Series:
    return adata.obs["donor"].astype(str) + "|" + adata.obs["condition"].astype(str)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("num_hvg", [1, 17, 60])
def test_the_genes_are_those_of_scanpy_in_memory(num_hvg: int, seed: int, tmp_path: Path) -> None:
    adata = counts(500, 90, donors=3, conditions=("stim", "ctrl", "drug"), seed=seed)
    settings = settings_of(hvg__num_hvg=num_hvg)
    run, source, key = opened(tmp_path, adata, settings)
    run_cohort(run, settings, source, SERIAL, key["cohort"])
    expected = scanpy_selection(adata, group_of(adata), num_hvg)
    assert selected(tmp_path) == list(expected.var_names[expected.var["highly_variable"]])
    table = pd.read_parquet(tmp_path / keys.GENES_TABLE)
    np.testing.assert_allclose(table["mean"], expected.var["means"], rtol=1e-6)
    np.testing.assert_allclose(table["dispersion_norm"], expected.var["dispersions_norm"], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(table["n_groups_variable"], expected.var["highly_variable_nbatches"])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("num_hvg", [5, 30])
@pytest.mark.parametrize("by", ["batch", "none"])
def test_by_batch_or_without_the_genes_are_scanpys_too(by: str, num_hvg: int, seed: int, tmp_path: Path) -> None:
    adata = counts(500, 90, donors=3, conditions=("stim", "ctrl", "drug"), seed=seed)
    x = adata.X.toarray()
    x[:, [11, 30]] = 0  # genes that no cell expresses: without a batch key scanpy bins them with the others
    adata.X = sparse.csr_matrix(x)
    settings = settings_of(hvg__num_hvg=num_hvg, hvg__by=by)
    run, source, key = opened(tmp_path, adata, settings)
    run_cohort(run, settings, source, SERIAL, key["cohort"])
    expected = scanpy_selection(adata, adata.obs["donor"] if by == "batch" else None, num_hvg)
    assert selected(tmp_path) == list(expected.var_names[expected.var["highly_variable"]])
    assert selected(tmp_path) != selected_by_group(adata, num_hvg, tmp_path / "group")
    table = pd.read_parquet(tmp_path / keys.GENES_TABLE)
    np.testing.assert_allclose(table["mean"], expected.var["means"], rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(table["dispersion_norm"], expected.var["dispersions_norm"], rtol=1e-5, atol=1e-6)


def selected_by_group(adata: ad.AnnData, num_hvg: int, folder: Path) -> list[str]:
    settings = settings_of(hvg__num_hvg=num_hvg)
    run, source, key = opened(folder, adata, settings)
    run_cohort(run, settings, source, SERIAL, key["cohort"])
    return selected(folder)


def test_kept_genes_are_modelled_and_the_most_variable_fill_up(tmp_path: Path) -> None:
    adata = counts(300, 60)
    free = selected_by_group(adata, 60, tmp_path / "free")
    table = pd.read_parquet(tmp_path / "free" / keys.GENES_TABLE)
    rank = table.sort_values(["n_groups_variable", "dispersion_norm"], ascending=False)["name"].tolist()
    keep = [rank[50], rank[3], rank[40]]
    settings = settings_of(hvg__num_hvg=10, hvg__keep=",".join(keep), cohort__min_cells=0)
    run, source, key = opened(tmp_path / "kept", adata, settings)
    run_cohort(run, settings, source, SERIAL, key["cohort"])
    chosen = selected(tmp_path / "kept")
    assert set(keep) <= set(chosen) <= set(free)
    assert len(chosen) == 10
    others = [gene for gene in selected_by_group(adata, 10, tmp_path / "ten") if gene not in keep]
    assert set(chosen) - set(keep) <= set(others)
    assert chosen == [gene for gene in adata.var_names if gene in chosen]


def test_a_kept_gene_passes_the_filter_of_genes(tmp_path: Path) -> None:
    adata = counts(300, 60)
    cells = np.asarray((adata.X > 0).sum(axis=0)).ravel()
    rare, least_cells = adata.var_names[int(cells.argmin())], int(cells.min()) + 1
    for keep, modelled in (((), False), ([rare], True)):
        settings = settings_of(hvg__num_hvg=60, hvg__keep=keep, cohort__min_cells=least_cells)
        run, source, key = opened(tmp_path / str(modelled), adata, settings)
        run_cohort(run, settings, source, SERIAL, key["cohort"])
        assert (rare in selected(tmp_path / str(modelled))) is modelled


def test_a_kept_gene_that_is_not_there_is_refused_before_the_matrix_is_read(tmp_path: Path) -> None:
    settings = settings_of(hvg__keep=["g1", "gg2"])
    run, source, key = opened(tmp_path, counts(), settings)
    with pytest.raises(CohortError, match=r"hvg.keep names 'gg2'.*90 genes.*Did you mean 'g2'"):
        run_cohort(run, settings, source, SERIAL, key["cohort"])
    assert not (tmp_path / "cohort").exists()


def test_genes_that_tie_are_taken_by_name_as_scanpy_does(tmp_path: Path) -> None:
    adata = counts(200, 40)
    x = adata.X.toarray()
    x[:, 20:] = x[:, 20:21]  # twenty genes alike
    adata.X = sparse.csr_matrix(x)
    settings = settings_of(hvg__num_hvg=25)
    run, source, key = opened(tmp_path, adata, settings)
    run_cohort(run, settings, source, SERIAL, key["cohort"])
    expected = scanpy_selection(adata, group_of(adata), 25)
    assert selected(tmp_path) == list(expected.var_names[expected.var["highly_variable"]])


def test_no_more_genes_than_asked_for_are_all_kept(tmp_path: Path) -> None:
    settings = settings_of(hvg__num_hvg=5000)
    adata = counts(100, 30)
    run, source, key = opened(tmp_path, adata, settings)
    run_cohort(run, settings, source, SERIAL, key["cohort"])
    assert selected(tmp_path) == list(adata.var_names)


def test_filters_are_scanpys_filter_cells_then_filter_genes(tmp_path: Path) -> None:
    adata = counts(400, 90, density=0.4, seed=2)
    least_genes, least_cells = 18, 60
    settings = settings_of(cohort__min_genes=least_genes, cohort__min_cells=least_cells, hvg__num_hvg=20)
    run, source, key = opened(tmp_path, adata, settings)
    design = run_cohort(run, settings, source, SERIAL, key["cohort"])
    made = adata.copy()
    sc.pp.filter_cells(made, min_genes=least_genes)
    sc.pp.filter_genes(made, min_cells=least_cells)
    assert 0 < made.n_obs < 400
    assert 20 < made.n_vars < 90
    cells = pd.read_parquet(tmp_path / keys.CELLS_TABLE)
    assert list(adata.obs_names[cells["input_row"]]) == list(made.obs_names)
    np.testing.assert_array_equal(cells["total"], np.asarray(made.X.sum(axis=1)).ravel())
    assert design.n_cells == made.n_obs
    expected = scanpy_selection(made, group_of(made), 20)
    assert selected(tmp_path) == list(expected.var_names[expected.var["highly_variable"]])
    dropped = pd.read_parquet(tmp_path / keys.DROPPED)
    assert set(dropped["reason"]) == {f"fewer than {least_genes} genes"}
    assert list(dropped["name"]) == [name for name in adata.obs_names if name not in made.obs_names]


def test_left_out_cells_are_named_with_their_reason(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    adata = counts(300, 30)
    x = adata.X.toarray()
    x[[4, 9]] = 0
    adata.X = sparse.csr_matrix(x)
    adata.obs["donor"] = adata.obs["donor"].astype(str)
    adata.obs.iloc[20:23, adata.obs.columns.get_loc("donor")] = "rare"
    adata.obs.iloc[20:23, adata.obs.columns.get_loc("condition")] = "stim"
    settings = settings_of()
    run, source, key = opened(tmp_path, adata, settings)
    design = run_cohort(run, settings, source, SERIAL, key["cohort"])
    dropped = pd.read_parquet(tmp_path / keys.DROPPED)
    assert dropped["input_row"].tolist() == [4, 9, 20, 21, 22]
    assert dropped["reason"].tolist() == ["no counts"] * 2 + ["group of fewer than 10 cells"] * 3
    summary = run.read_json(keys.COHORT_SUMMARY)
    assert summary["dropped"] == {"no counts": 2, "group of fewer than 10 cells": 3}
    assert design.n_cells == 295
    assert "2 cells without a single count left out, 'cell4' first" in caplog.text
    assert "rare|stim (3)" in caplog.text


@pytest.mark.parametrize("chunk_rows", [7, 50, 4096])
def test_chunk_size_changes_no_bit(chunk_rows: int, tmp_path: Path) -> None:
    adata = counts(300, 60)
    settings = settings_of(cohort__chunk_rows=chunk_rows)
    run, source, key = opened(tmp_path / "a", adata, settings)
    run_cohort(run, settings, source, SERIAL, key["cohort"])
    run, source, key = opened(tmp_path / "b", adata, settings_of())
    run_cohort(run, settings_of(), source, SERIAL, key["cohort"])
    a, b = (files_below(tmp_path / name) for name in "ab")
    assert {n: content for n, (_, content) in a.items()} == {n: content for n, (_, content) in b.items()}


def test_the_cohort_is_not_looked_at_twice(tmp_path: Path) -> None:
    settings = settings_of()
    run, source, key = opened(tmp_path, counts(), settings)
    first = run_cohort(run, settings, source, SERIAL, key["cohort"])
    before = files_below(tmp_path)
    assert run_cohort(run, settings, source, SERIAL, key["cohort"]) == first
    assert files_below(tmp_path) == before
    (tmp_path / keys.CELLS_TABLE).unlink()
    assert run_cohort(run, settings, source, SERIAL, key["cohort"]) == first
    assert {n: c for n, (_, c) in files_below(tmp_path).items()} == {n: c for n, (_, c) in before.items()}


def test_log_normalised_values_are_seen_for_what_they_are(tmp_path: Path) -> None:
    adata = counts(300, 60)
    made = scanpy_selection(adata, group_of(adata), 20)
    settings = settings_of(hvg__num_hvg=20)
    run, source, key = opened(tmp_path, ad.AnnData(made.X, obs=adata.obs, var=adata.var), settings)
    run_cohort(run, settings, source, SERIAL, key["cohort"])
    assert run.read_json(keys.COHORT_SUMMARY)["normalise"] == "none"
    assert selected(tmp_path) == list(made.var_names[made.var["highly_variable"]])


def test_a_log_normalised_subset_of_genes_is_seen_too(tmp_path: Path) -> None:
    adata = counts(300, 60)
    made = scanpy_selection(adata, group_of(adata), 20)[:, ::2].copy()
    made = made[np.asarray(made.X.sum(axis=1)).ravel() > 0].copy()
    settings = settings_of()
    run, source, key = opened(tmp_path, ad.AnnData(made.X, obs=made.obs, var=made.var[[]]), settings)
    run_cohort(run, settings, source, SERIAL, key["cohort"])
    assert run.read_json(keys.COHORT_SUMMARY)["normalise"] == "none"


def test_the_first_bad_value_is_named_whatever_span_it_is_in(tmp_path: Path) -> None:
    adata = counts(300, 60)
    x = adata.X.toarray()
    x[250, 3], x[120, 7], x[120, 40] = -1, np.nan, -5
    adata.X = sparse.csr_matrix(x)
    run, source, key = opened(tmp_path, adata, settings_of(cohort__normalise="counts"))
    with pytest.raises(CohortError, match=f"cell 'cell120', gene '{adata.var_names[7]}'.* holds NaN"):
        run_cohort(run, settings_of(cohort__normalise="counts"), source, SERIAL, key["cohort"])


def test_normalisation_has_the_bits_of_scanpy() -> None:
    adata = counts(200, 50)
    totals = np.asarray(adata.X.sum(axis=1, dtype=np.float64)).ravel()
    found = normalised(adata.X, totals)
    sc.pp.normalize_total(adata, target_sum=1e4)
    sc.pp.log1p(adata)
    np.testing.assert_array_equal(found.toarray(), adata.X.toarray())


def test_spans_depend_on_the_number_of_cells_alone_and_cover_them() -> None:
    for cells in (1, 15, 16, 1000, 5_000_000):
        spans = spans_of(cells)
        assert spans[0].start == 0
        assert spans[-1].stop == cells
        assert all(a.stop == b.start for a, b in itertools.pairwise(spans))
        assert max(span.stop - span.start for span in spans) <= max(65_536, -(-cells // 16))


def test_a_group_of_one_cell_selects_without_warning() -> None:
    sums = np.array([[1.0, 0.0, 3.0], [2.0, 5.0, 1.0]])
    table = seurat_hvg(((group, group**2, 1) for group in sums), np.array(["a", "b", "c"], dtype=object), 2)
    assert table["selected"].sum() == 2


@pytest.mark.ray
def test_ray_finds_the_same_bits(local_ray: None, tmp_path: Path) -> None:
    adata, settings = counts(), settings_of()
    for name, runtime in (("serial", SERIAL), ("ray", RayRuntime(settings.run))):
        run, source, key = opened(tmp_path / name, adata, settings)
        run_cohort(run, settings, source, runtime, key["cohort"])
    for table in (keys.CELLS_TABLE, keys.GENES_TABLE, keys.DROPPED):
        a, b = (read_table(opened(tmp_path / n, adata, settings)[0], table) for n in ("serial", "ray"))
        pd.testing.assert_frame_equal(a, b, check_exact=True)


@pytest.mark.realdata
@pytest.mark.parametrize(
    ("name", "control", "batch", "num_hvg"),
    [
        pytest.param("ctcl_skin", "healthy", "donor", 2000, id="ctcl"),
        pytest.param("kang_pbmc_ifnb", "ctrl", None, 2000, id="kang"),
        pytest.param("kang_pbmc_3donors_100genes", "ctrl", "donor", 40, id="kang_100_genes"),
    ],
)
def test_the_genes_of_real_cohorts_are_scanpys(
    name: str, control: str, batch: str | None, num_hvg: int, real_data: Path, tmp_path: Path
) -> None:
    adata = ad.read_h5ad(real_data / f"{name}.h5ad")
    settings = settings_of(
        cohort__control=control, cohort__batch_key=batch, hvg__num_hvg=num_hvg, cohort__chunk_rows=512
    )
    run, source, key = opened(tmp_path, str(real_data / f"{name}.h5ad"), settings)
    run_cohort(run, settings, source, SERIAL, key["cohort"])
    cells = pd.read_parquet(tmp_path / keys.CELLS_TABLE)
    made = adata[cells["input_row"].to_numpy()].copy()
    groups = group_of(made) if batch else made.obs["condition"].astype(str)
    expected = scanpy_selection(made, groups, num_hvg)
    assert selected(tmp_path) == list(expected.var_names[expected.var["highly_variable"]])
