"""A file as CELLxGENE has it runs on its counts, and its genes are asked for by id or symbol wherever genes are named."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scanpy as sc

import ndreamer_dist as nd
from ndreamer_dist import keys
from tests.cohort.inputs import counts
from tests.fuzz.helpers import command
from tests.tiny import SETTINGS

NAMES = {"condition_key": "disease", "control": "normal", "batch_key": "donor_id"}
SMALL = {
    **SETTINGS,
    "hvg.num_hvg": 60,
    "train.epochs": 2,
    "cohort.min_group_cells": 10,
    "cohort.gene_names": "feature_name",
}
GENE, ID, OTHER = "SYM3", "ENSG00000000003.3", "ENSG00000000003"


def as_cellxgene_has_it() -> ad.AnnData:
    """Return counts in `.raw`, normalised values in X, genes by Ensembl id, two of one symbol."""
    adata = counts(300, 90, conditions=("dementia", "normal"))
    adata.obs = adata.obs.rename(columns={"condition": "disease", "donor": "donor_id"})
    adata.var["feature_name"] = pd.Categorical([f"SYM{max(i, 1)}" for i in range(90)])
    adata.var_names = [f"ENSG{i:011d}.{i % 7}" for i in range(90)]
    adata.var.index.name, adata.obs.index.name = "feature_id", "observation_joinid"
    adata.raw = adata.copy()
    sc.pp.normalize_total(adata, target_sum=1e4)
    sc.pp.log1p(adata)
    return adata


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("census")
    adata = as_cellxgene_has_it()
    adata.write_h5ad(folder / "census.h5ad")
    settings = SMALL | {"hvg.keep": [GENE, "ENSG00000000005"]}
    run = nd.run(folder / "census.h5ad", out=folder / "run", **NAMES, preset="small", settings=settings)
    return SimpleNamespace(adata=adata, folder=folder, results=run.results, cohort=folder / "census.h5ad")


def test_symbols_are_stored_and_ids_kept_beside_them(made) -> None:
    results = made.results
    assert {GENE, "SYM5"} <= set(results.var_names)
    ids = results.var[keys.VAR_GENE_ID]
    assert ids[GENE] == ID
    assert all(name.startswith("SYM") for name in results.var_names)
    twice = [name for name in results.var_names if name.startswith("SYM1_")]
    assert all(name == f"SYM1_{ids[name]}" for name in twice)
    told = results.uns["notes"]
    assert any("'feature_name'; 1 names that several genes have" in note for note in told)
    assert any(".raw are read" in note for note in told)


def test_it_ran_on_the_counts(made) -> None:
    assert made.results.uns["normalise"] == "counts"
    found = made.results.expression()
    ids = made.results.var[keys.VAR_GENE_ID]
    np.testing.assert_allclose(found.X.toarray(), made.adata[found.obs_names, ids].X.toarray(), rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("name", [GENE, ID, OTHER])
def test_a_gene_is_asked_for_by_either_name(made, name: str, tmp_path: Path) -> None:
    expected = made.results.ite(genes=[GENE]).X
    np.testing.assert_array_equal(made.results.ite(genes=[name]).X, expected)
    np.testing.assert_array_equal(made.results.ite(genes=[name], cohort=made.cohort).X, expected)
    words = ["get", made.results.url, "--layer", "ite", "--genes", name, "--out", str(tmp_path / "out.csv")]
    assert command(words).code == 0
    table = pd.read_csv(tmp_path / "out.csv", index_col=0)
    assert list(table.columns) == [GENE]


def test_a_symbol_of_two_genes_is_refused_with_both(made) -> None:
    words = ["get", made.results.url, "--genes", "SYM1", "--cohort", str(made.cohort), "--out", "x.csv"]
    line = command(words).refusal
    assert "'SYM1_ENSG00000000000.0'" in line
    assert "'SYM1_ENSG00000000001.1'" in line


def test_what_was_decided_is_shown_by_plan_and_info(made) -> None:
    names = ["--condition-key", "disease", "--control", "normal", "--batch-key", "donor_id"]
    sets = [word for name, value in SMALL.items() for word in ("--set", f"{name}={value}")]
    shown = command(["plan", str(made.cohort), "--preset", "small", *names, *sets]).out
    assert "values: whole numbers up to" in shown
    assert "the counts of 90 genes in .raw are read" in shown
    assert "values: whole numbers up to" in command(["info", str(made.folder / "run")]).out
