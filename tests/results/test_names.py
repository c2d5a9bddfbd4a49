"""Cells are selected by queries on any column, genes by names, ids or symbols."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from ndreamer_dist.errors import QueryError
from ndreamer_dist.results.names import cells_of_query, places_of_genes, with_backticks


@pytest.fixture
def obs() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "orig.ident": ["stim", "ctrl", "stim"], "Donor ID": ["D1", "D1", "D2"], "cell-type (fine)": ["T", "B", "T"],
            "class": ["x", "y", "x"], "res.0.8": pd.Categorical(["0", "1", "1"]), "größe": [1, 2, 3], "orig": [0, 0, 1],
            "text": ["orig.ident", "a", "b"],
        }
    )  # fmt: skip


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ('orig.ident == "stim"', [1, 0, 1]), ('`orig.ident` == "stim"', [1, 0, 1]), ('Donor ID == "D1"', [1, 1, 0]),
        ('`Donor ID` == "D1" and orig.ident == "ctrl"', [0, 1, 0]), ('cell-type (fine) == "T"', [1, 0, 1]),
        ('class == "y"', [0, 1, 0]), ('res.0.8 == "1"', [0, 1, 1]), ("größe > 1", [0, 1, 1]), ("orig == 1", [0, 0, 1]),
        ("text == 'orig.ident' and class == 'x'", [1, 0, 0]), ('orig.ident in ["ctrl"]', [0, 1, 0]),
    ],
)  # fmt: skip
def test_any_column_may_stand_in_a_query(obs: pd.DataFrame, query: str, expected: list[int]) -> None:
    assert cells_of_query(obs, query).astype(int).tolist() == expected


def test_what_is_quoted_stays_as_it_is(obs: pd.DataFrame) -> None:
    assert with_backticks("text == 'class' and class == \"orig.ident\"", obs.columns) == (
        "text == 'class' and `class` == \"orig.ident\""
    )


def test_a_query_that_cannot_be_read_names_backticks_and_columns(obs: pd.DataFrame) -> None:
    with pytest.raises(QueryError, match=r"the columns are 'orig.ident'.*in backticks: `orig.ident` =="):
        cells_of_query(obs, "nope == 1")
    with pytest.raises(QueryError, match="is not true or false"):
        cells_of_query(obs, "größe + 1")


@pytest.fixture
def var() -> pd.DataFrame:
    symbols = ["ISG15", "MATR3", "MATR3"]
    return pd.DataFrame(
        {"feature_name": symbols}, index=["ENSG00000000001.4", "ENSG00000000002.1", "ENSG00000000003.2"]
    )


def test_genes_are_found_by_id_and_by_symbol(var: pd.DataFrame) -> None:
    names = ["ISG15", "ENSG00000000003", "ENSG00000000002.1", "ENSG00000000002.7"]
    np.testing.assert_array_equal(places_of_genes(var, names), [0, 2, 1, 1])
    with pytest.raises(QueryError, match=r"2 genes are called 'MATR3'; name one of them: 'ENSG00000000002.1', 'ENSG"):
        places_of_genes(var, ["ISG15", "MATR3"])
    with pytest.raises(QueryError, match="there is no gene 'ISG16' among the 3 here"):
        places_of_genes(var, ["ISG16"])


def test_a_gene_in_other_letters_is_suggested(var: pd.DataFrame) -> None:
    with pytest.raises(QueryError, match="Did you mean 'ISG15'"):
        places_of_genes(var.iloc[:2].set_index("feature_name"), ["isg15"])
