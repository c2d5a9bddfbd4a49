"""Genes of a mapped cohort are found by name, id or symbol: the modelled genes and those of a cell's total."""

from __future__ import annotations

from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest

from ndreamer_dist import keys
from ndreamer_dist.cohort.packed import write_tables
from ndreamer_dist.cohort.source import open_source
from ndreamer_dist.errors import CohortError
from ndreamer_dist.mapping.cohort import counted_genes, genes_of
from ndreamer_dist.rundir.directory import RunDirectory
from ndreamer_dist.settings import CohortSettings
from tests.cohort.inputs import counts

SYMBOLS = ["ISG15", "MATR3", "APOE", "TREM2", "CD14"]
IDS = [f"ENSG{number:011d}" for number in range(5)]


@pytest.fixture
def cohort() -> anndata.AnnData:
    """Cells whose genes are named by id, with the symbols in a column."""
    made = counts(40, 5)
    made.var = pd.DataFrame({"feature_name": SYMBOLS}, index=IDS)
    return made


def test_a_total_is_over_the_genes_that_the_run_kept_whatever_they_are_called(
    cohort: anndata.AnnData, tmp_path: Path
) -> None:
    home = RunDirectory.at(tmp_path)
    genes = pd.DataFrame({"name": SYMBOLS, "selected": [True, *[False] * 4], "cells": [3, 30, 2, 10, 9]})
    write_tables(home, {keys.GENES_TABLE: genes})
    source, symbols = open_source(cohort), open_source(cohort, gene_names="feature_name")
    for named in (source, symbols):
        counted = counted_genes(home, named, CohortSettings(min_cells=10))
        np.testing.assert_array_equal(counted, [True, True, False, True, False])
    assert counted_genes(home, source, CohortSettings()) is None


def test_two_genes_of_the_run_that_mean_one_of_the_cohort_are_refused(cohort: anndata.AnnData) -> None:
    source = open_source(cohort)
    assert list(genes_of(source, ("APOE", IDS[0]), 0.0).names) == [IDS[0], None, "APOE", None, None]
    with pytest.raises(CohortError, match=f"'APOE' and '{IDS[2]}' of the run's genes are the same gene .*'{IDS[2]}'"):
        genes_of(source, ("APOE", IDS[2]), 0.0)
