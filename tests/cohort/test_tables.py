"""Genes are found by id or by symbol; names that several genes share are made unique."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from ndreamer_dist.cohort.genes import check_genes
from ndreamer_dist.cohort.source import open_source
from ndreamer_dist.cohort.tables import gene_places, named_genes
from ndreamer_dist.errors import CohortError
from ndreamer_dist.settings import HvgSettings
from tests.cohort.inputs import as_h5ad, counts


@pytest.fixture
def var() -> pd.DataFrame:
    names = ["ISG15", "MATR3", "MATR3", None, "APOE", ""]
    index = [f"ENSG{i:011d}.{i + 1}" for i in range(6)]
    return pd.DataFrame({"feature_name": pd.Categorical(names), "length": range(6)}, index=index)


def test_symbols_name_genes_and_those_of_several_are_kept_apart(var: pd.DataFrame) -> None:
    table, note = named_genes(var, "feature_name")
    ids = list(var.index)
    assert list(table.index) == ["ISG15", f"MATR3_{ids[1]}", f"MATR3_{ids[2]}", ids[3], "APOE", ids[5]]
    assert list(table["ndreamer_gene_id"]) == ids
    assert "1 names that several genes have are joined with their ids" in note
    assert "2 genes without a name keep their id" in note
    assert named_genes(var, None)[0] is var


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("ISG15", [0]), ("ENSG00000000000.1", [0]), ("ENSG00000000000", [0]), ("ENSG00000000000.99", [0]),
        ("MATR3", [1, 2]), ("MATR3_ENSG00000000002.3", [2]), ("isg", []), ("APOE", [4]),
    ],
)  # fmt: skip
def test_a_gene_is_found_by_either_name(var: pd.DataFrame, name: str, place: list[int]) -> None:
    by_symbol = named_genes(var, "feature_name")[0]
    assert gene_places(by_symbol.index, by_symbol, [name])[name] == place
    if "_" not in name:
        assert gene_places(var.index, var, [name])[name] == place


def test_genes_to_keep_are_named_either_way(var: pd.DataFrame) -> None:
    adata = counts(40, 6)
    adata.var = var
    for column in (None, "feature_name"):
        source = open_source(adata, gene_names=column)
        kept = check_genes(source, HvgSettings(keep=("ISG15", "ENSG00000000004")))
        assert np.flatnonzero(kept).tolist() == [0, 4]
        with pytest.raises(
            CohortError,
            match="which several genes are called; name one of them: 'MATR3_"[: 44 if column is None else 60],
        ):
            check_genes(source, HvgSettings(keep=("MATR3",)))
        with pytest.raises(CohortError, match=r"hvg\.keep names 'nope'"):
            check_genes(source, HvgSettings(keep=("nope",)))


def test_genes_whose_names_repeat_are_named_by_a_column_of_ids(tmp_path: Path) -> None:
    adata = counts(40, 6)
    ids = [f"ENSG{i:011d}" for i in range(6)]
    adata.var = pd.DataFrame({"gene_ids": ids}, index=["A", "A", "B", "B", "C", "D"])
    with pytest.raises(
        CohortError, match=r"more than once: 'A', 'B'; .*_make_unique\(\) helps, or .* --gene-names gene_ids$"
    ):
        open_source(as_h5ad(adata, tmp_path))
    source = open_source(tmp_path / "in.h5ad", gene_names="gene_ids")
    assert list(source.gene_names) == ids
    assert gene_places(source.var.index, source.var, ["A", "D"]) == {"A": [0, 1], "D": [5]}
