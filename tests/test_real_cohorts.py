"""Real cohorts: the known biology comes out, and results follow from themselves by brute force."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import ndreamer_dist as nd
from ndreamer_dist import keys
from tests.results.brute_force import check

pytestmark = [pytest.mark.realdata, pytest.mark.timeout(400)]
SERIAL = {"run.serial": True, "run.progress": False}
EVERYWHERE = ("ISG15", "TNFSF10")
IN_MONOCYTES = ("IFITM3", "CXCL10", "CCL8", "CCL2", "APOBEC3A")
NOT_MODELLED = ("IFI6", "IFIT1", "IFIT2", "IFIT3", "ISG20", "RSAD2")
"""Interferon's own genes, which hardly vary within a condition."""


@pytest.fixture(scope="module")
def kang(real_data: Path, tmp_path_factory: pytest.TempPathFactory) -> nd.Results:
    """Results of stimulated and control PBMC, by the small preset."""
    run = nd.run(
        real_data / "kang_pbmc_ifnb.h5ad", out=tmp_path_factory.mktemp("kang") / "run", condition_key="condition",
        control="ctrl", preset="small", settings={**SERIAL, "train.epochs": 10},
    )  # fmt: skip
    return run.results


def cell_types(results: nd.Results) -> list[str]:
    """Return the types with more than 100 stimulated cells."""
    cells = results.obs.query("condition == 'stim'")["cell_type"].value_counts()
    assert (cells > 100).sum() > 3
    return list(cells[cells > 100].index)


def test_interferon_genes_lead_in_every_cell_type_of_stimulated_pbmc(kang: nd.Results) -> None:
    for cell_type in cell_types(kang):
        effects = kang.ite(cells=f"cell_type == {cell_type!r}").to_df().mean()
        ranks = effects.rank(ascending=False)
        expected = EVERYWHERE + (IN_MONOCYTES if "Mono" in cell_type else ())
        assert (ranks[list(expected)] <= 30).all(), (cell_type, ranks[list(expected)])
        assert (effects[list(expected)] > 0).all()
        assert effects["ISG15"] > 3


def test_genes_that_were_not_modelled_lead_among_all_genes(kang: nd.Results, real_data: Path) -> None:
    cohort = real_data / "kang_pbmc_ifnb.h5ad"
    assert not set(NOT_MODELLED) & set(kang.var_names)
    every = kang.ite(cohort=cohort)
    assert every.n_vars == 4805
    np.testing.assert_array_equal(every[:, kang.var_names].X, kang.ite().X)
    for cell_type in cell_types(kang):
        effects = every[every.obs["cell_type"] == cell_type].to_df().mean()
        ranks = effects.rank(ascending=False)[list(NOT_MODELLED)]
        assert (ranks <= 20).all(), (cell_type, ranks)


@pytest.mark.parametrize(
    ("file", "control", "genes", "cells"),
    [
        pytest.param("ctcl_skin.h5ad", "healthy", 2000, 1800, id="ctcl_nested_21309_genes", marks=pytest.mark.slow),
        pytest.param(
            "kang_pbmc_3donors_100genes.h5ad", "ctrl", 100, 9517, id="kang_crossed_100_genes", marks=pytest.mark.slow
        ),
    ],
)
def test_results_of_cohorts_with_donors_follow_from_themselves(
    real_data: Path, tmp_path: Path, file: str, control: str, genes: int, cells: int
) -> None:
    out = tmp_path / "run"
    nd.run(
        real_data / file, out=out, condition_key="condition", control=control, batch_key="donor", preset="small",
        settings={**SERIAL, "train.epochs": 3, "train.passes": 1},
    )  # fmt: skip
    stored = check(out / keys.RESULTS, atol=1e-5)
    assert stored.n_vars == genes
    assert stored.n_obs + len(pd.read_parquet(out / keys.DROPPED)) == cells
    control_cells = (stored.obs["condition"] == control).to_numpy()
    assert np.isnan(stored.layers["ite"][control_cells]).all()
    assert np.isfinite(stored.layers["ite"][~control_cells]).all()
