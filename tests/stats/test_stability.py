"""The job that compares seeds agrees with brute force, and separates stable effects from others."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

JOB = Path(__file__).parents[2] / "jobs" / "stability.py"


def table(seed: int, genes: int = 120) -> pd.DataFrame:
    """Return the columns of a CATE table that the job reads; effects of the second population vary by seed."""
    shared, own = np.random.default_rng(0).normal(size=(3, genes)), np.random.default_rng(seed).normal(size=genes)
    names = [f"g{number}" for number in range(genes)]
    parts = {"same": shared[0], "other": own}
    return pd.concat(
        pd.DataFrame(
            {
                "population": name,
                "condition": "treated",
                "gene": names,
                "mean_ite": effect,
                "pseudobulk_effect": shared[2],
            }
        )
        for name, effect in parts.items()
    )


def test_effects_of_several_seeds_are_compared_gene_by_gene() -> None:
    spec = importlib.util.spec_from_file_location("stability", JOB)
    job = importlib.util.module_from_spec(spec)
    sys.modules["stability"] = job
    spec.loader.exec_module(job)
    tables = [table(seed) for seed in (1, 2, 3)]
    told = job.stability([tables[0], tables[1].sample(frac=1, random_state=0), tables[2]]).set_index("population")
    assert told.loc["same", "rank correlation"] == pytest.approx(1)
    assert told.loc["same", "top 50 shared"] == 1
    effects = [part.loc[part["population"] == "other", "mean_ite"].to_numpy() for part in tables]
    pairs = [(0, 1), (0, 2), (1, 2)]
    ranks = [stats.spearmanr(effects[a], effects[b]).statistic for a, b in pairs]
    top = [set(np.argsort(-np.abs(effect))[:50]) for effect in effects]
    assert told.loc["other", "rank correlation"] == pytest.approx(np.mean(ranks))
    assert told.loc["other", "its smallest"] == pytest.approx(min(ranks))
    assert told.loc["other", "top 50 shared"] == pytest.approx(np.mean([len(top[a] & top[b]) / 50 for a, b in pairs]))
    assert told.loc["other", "its smallest share"] == min(len(top[a] & top[b]) / 50 for a, b in pairs)
    plain = set(
        np.argsort(-np.abs(tables[0].loc[tables[0]["population"] == "other", "pseudobulk_effect"].to_numpy()))[:50]
    )
    assert told.loc["other", "shared with pseudobulk"] == len(top[0] & plain) / 50
