"""A sample shows whether values are counts, scaled counts or logarithms to some base; other values are refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
from scipy import sparse

from ndreamer_dist import keys, plan
from ndreamer_dist.cohort.genes import run_cohort
from ndreamer_dist.cohort.pack import run_pack
from ndreamer_dist.cohort.source import open_cohort, open_source
from ndreamer_dist.cohort.values import decide_values
from ndreamer_dist.errors import CohortError
from tests.cohort.inputs import SERIAL, as_h5ad, as_zarr, counts, opened, scanpy_selection, settings_of


def per_cell(adata: ad.AnnData, total: float) -> sparse.csr_matrix:
    x = sparse.csr_matrix(adata.X, dtype=np.float64)
    return sparse.diags(total / np.asarray(x.sum(axis=1)).ravel()) @ x


def logged(adata: ad.AnnData, base: float | None = None, total: float = 1e4) -> ad.AnnData:
    made = adata.copy()
    x = per_cell(adata, total).log1p()
    made.X = (x / np.log(base) if base else x).tocsr().astype(np.float32)
    return made


SEEN = {
    "counts": (lambda a: a, "auto", ("counts", None), "whole numbers up to"),
    "ln": (logged, "auto", ("none", None), "natural logarithms (every cell sums to 1e+04"),
    "log2": (lambda a: logged(a, 2), "auto", ("none", 2.0), "logarithms to base 2 (every cell sums to"),
    "log10_cpm": (lambda a: logged(a, 10, 1e6), "auto", ("none", 10.0), "logarithms to base 10"),
    "ln_of_some_genes": (lambda a: logged(a)[:, :60].copy(), "auto", ("none", None), "multiples of its smallest"),
    "log2_of_some_genes": (lambda a: logged(a, 2)[:, :60].copy(), "auto", ("none", 2.0), "multiples of its smallest"),
    "log2_asked_none": (lambda a: logged(a, 2), "none", ("none", 2.0), "turned into natural ones"),
    "scaled_asked_counts": (lambda a: ad.AnnData(per_cell(a, 1.0).tocsr()), "counts", ("counts", None), "as asked"),
}


@pytest.mark.parametrize("case", SEEN)
def test_what_values_are_is_seen_and_said(case: str) -> None:
    make, asked, expected, words = SEEN[case]
    decision = decide_values(open_source(make(counts(300, 90))), asked)
    assert (decision.normalise, decision.base) == expected
    assert words in decision.seen


SCALED = {
    "proportions": (lambda a: per_cell(a, 1.0).tocsr(), True),
    "cpm_of_some_genes": (lambda a: per_cell(a, 1e6).tocsr()[:, :60], True),
    "decontaminated": (lambda a: sparse.csr_matrix(a.X.power(1.3)), False),
    "one_estimated": (lambda a: sparse.csr_matrix(np.r_[a.X.toarray()[:-1], a.X.toarray()[-1:] + 0.5]), False),
    "counts": (lambda a: a.X, False),
}


@pytest.mark.parametrize("case", SCALED)
def test_scaled_counts_are_told_from_counts_that_can_be_halved(case: str) -> None:
    make, scaled = SCALED[case]
    decision = decide_values(open_source(ad.AnnData(make(counts(300, 90)))), "counts")
    assert (decision.normalise, decision.scaled) == ("counts", scaled)


REFUSED: dict[str, tuple[Callable[[ad.AnnData], object], str, str]] = {
    "proportions": (lambda a: per_cell(a, 1.0), "auto", "every cell sums to 1); --normalise counts scales them"),
    "proportions_as_logs": (lambda a: per_cell(a, 1.0), "none", "scaled but not log-normalised"),
    "cpm": (lambda a: per_cell(a, 1e6), "auto", "every cell sums to 1e+06"),
    "per_10_000": (lambda a: per_cell(a, 1e4), "none", "every cell sums to 1e+04"),
    "cpm_of_some_genes": (lambda a: per_cell(a, 1e6).tocsr()[:, :60], "auto", "multiples of its smallest"),
    "neither": (lambda a: a.X.power(1.3), "auto", "neither counts nor clearly log-normalised"),
    "logs_as_counts": (lambda a: logged(a).X, "counts", "look log-normalised"),
    "counts_as_logs": (lambda a: a.X, "none", "look like counts"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_values_that_are_not_what_is_needed_are_refused_with_the_way(case: str) -> None:
    make, asked, words = REFUSED[case]
    adata = ad.AnnData(sparse.csr_matrix(make(counts(300, 90)), dtype=np.float32))
    with pytest.raises(CohortError, match=re.escape(words)):
        decide_values(open_source(adata), asked)


@pytest.mark.parametrize("store", [as_h5ad, lambda a, _: a], ids=["h5ad", "memory"])
def test_a_refusal_names_the_layers_that_could_be_read(store, tmp_path: Path) -> None:
    adata = counts(200, 30)
    adata.layers["counts"] = adata.X.copy()
    adata.X.data[0] = -1
    with pytest.raises(CohortError, match="the cohort has the layers 'counts'"):
        decide_values(open_source(store(adata, tmp_path)), "auto")


def test_a_base_that_uns_names_is_used_where_the_values_do_not_tell() -> None:
    adata = counts(200, 90)
    adata.X = sparse.csr_matrix(adata.X.power(1.3))
    adata.uns["log1p"] = {"base": 2}
    assert decide_values(open_source(adata), "auto").base == 2.0
    adata.uns["log1p"] = {"base": None}
    with pytest.raises(CohortError, match="neither"):
        decide_values(open_source(adata), "auto")
    assert decide_values(open_source(adata), "none", 10.0).base == 10.0


@pytest.mark.parametrize("store", [as_h5ad, as_zarr(3), lambda a, _: a], ids=["h5ad", "zarr", "memory"])
def test_log2_values_give_the_genes_and_the_numbers_of_natural_ones(store, tmp_path: Path) -> None:
    made = {}
    for base in (None, 2):
        folder = tmp_path / str(base)
        folder.mkdir()
        adata = logged(counts(300, 90), base)
        adata.uns["log1p"] = {"base": base} if base else {}
        settings = settings_of(hvg__num_hvg=40)
        run, source, key = opened(folder / "run", store(adata, folder), settings)
        run_cohort(run, settings, source, SERIAL, key["cohort"])
        made[base] = run_pack(run, settings, source, SERIAL, key["pack"])
    assert made[2].genes == made[None].genes
    np.testing.assert_allclose(made[2].rows(0, 300).toarray(), made[None].rows(0, 300).toarray(), rtol=1e-6)
    summary = json.loads((tmp_path / "2/run" / keys.COHORT_SUMMARY).read_text())
    assert summary["log_base"] == 2.0
    assert summary["notes"][0] == summary["values"]
    natural = logged(counts(300, 90))
    groups = natural.obs["donor"].astype(str) + natural.obs["condition"].astype(str)
    selected = scanpy_selection(natural, groups, 40, normalise=False)
    assert set(made[2].genes) == set(selected.var_names[selected.var["highly_variable"]])


def with_raw(x: str) -> ad.AnnData:
    """Return a cohort with counts of all genes in `.raw`, and `X` of 70 genes that are logged, scaled or missing."""
    full = counts(200, 90)
    made = logged(full)
    made.raw = full
    made = made[:, :70].copy()
    if x == "scaled":
        values = made.X.toarray()
        made.X = (values - values.mean(axis=0)) / (values.std(axis=0) + 1)
    elif x == "none":
        del made.X
    return made


@pytest.mark.parametrize(
    "store", [as_h5ad, as_zarr(2), as_zarr(3), lambda a, _: a], ids=["h5ad", "zarr2", "zarr3", "memory"]
)
@pytest.mark.parametrize("x", ["scaled", "logged", "none"])
def test_counts_in_raw_are_read_where_x_holds_none(x: str, store, tmp_path: Path) -> None:
    adata, full = with_raw(x), counts(200, 90)
    cohort = store(adata, tmp_path)
    for source in (open_source(cohort, layer="raw"), open_cohort(cohort, settings_of().cohort)):
        np.testing.assert_array_equal(source.read_rows(0, 200).toarray(), full.X.toarray())
        assert list(source.gene_names) == list(full.var_names)
    assert ".raw are read (--layer X reads X)" in source.notes[0]
    told = plan(
        cohort, condition_key="condition", control="ctrl", batch_key="donor", settings={"cohort.min_group_cells": 10}
    )
    assert any(".raw are read" in note for note in told.notes)
    if x != "none":
        own = open_source(cohort, layer="X")
        assert own.n_genes == 70
        assert own.raw


def test_counts_in_x_are_read_whatever_raw_holds() -> None:
    adata = counts(100, 30)
    adata.raw = logged(adata)
    source = open_cohort(adata, settings_of().cohort)
    assert source.looks_like_counts
    assert not source.notes
    assert open_cohort(with_raw("logged"), settings_of(cohort__normalise="none").cohort).n_genes == 70


def test_a_layer_called_raw_comes_before_raw() -> None:
    adata = counts(50, 20)
    adata.raw = adata.copy()
    adata.layers["raw"] = adata.X * 2
    assert open_source(adata, layer="raw").read_rows(0, 50).sum() == 2 * adata.X.sum()
