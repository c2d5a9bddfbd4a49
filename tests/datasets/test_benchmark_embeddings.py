"""The benchmark of matching spaces computes its measures correctly, and names unknown spaces that it skips."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd
import pytest

import ndreamer_dist as nd
from ndreamer_dist.datasets import load_truth
from tests.tiny import SETTINGS

JOB = Path(__file__).parents[2] / "jobs" / "benchmark_embeddings.py"


@pytest.fixture(scope="module")
def job() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_embeddings", JOB)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def finished(job: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """Run the benchmark on a tiny cohort; return its folder and what it printed."""
    out = tmp_path_factory.mktemp("bench")
    settings = [word for name, value in SETTINGS.items() for word in ("--set", f"{name}={value}")]
    words = ["--out", str(out), "--cohorts", "stateful", "--seeds", "1", "--cells", "900", "--genes", "200",
             "--spaces", "ndreamer", "nonsense", "--variant", "soft:embed.codes=expected", *settings]  # fmt: skip
    table, said = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(table), contextlib.redirect_stderr(said):
        patch.setattr(sys, "argv", [str(JOB), *words])
        job.main()
    return out, table.getvalue(), said.getvalue()


@pytest.mark.slow
def test_every_space_has_a_row_and_unknown_ones_are_skipped_by_name(finished: tuple[Path, str, str]) -> None:
    _, table, said = finished
    assert "skipped: nonsense" in said
    assert "| stateful | ndreamer | none | " in table
    assert "| stateful | soft | " in table
    assert "nonsense |" not in table
    assert "processors" in table


@pytest.mark.slow
def test_purity_and_local_r_are_those_of_brute_force(job: ModuleType, finished: tuple[Path, str, str]) -> None:
    out = finished[0]
    results, truth = nd.open_results(out / "runs/stateful/ndreamer/0"), load_truth(out / "stateful-0.zarr")
    obs, points = results.obs, results.embedding(pca=True).to_numpy()
    kind, treated = obs["cell_type"].to_numpy(), (obs["condition"] == "treated").to_numpy()
    same = []
    for donor in obs["donor"].unique():
        control = np.flatnonzero((obs["donor"] == donor).to_numpy() & ~treated)
        for row in np.flatnonzero(treated):
            near = control[((points[control] - points[row]) ** 2).sum(1).argmin()]
            same.append(kind[near] == kind[row])
    assert job.purity(results) == pytest.approx(np.mean(same), abs=0.003)  # float32 distances may tie otherwise
    denoised, rows = results.denoised(), truth.positions(list(obs.index))
    state, of_types = truth.obs(rows)["state"], []
    for name in truth.cell_types:
        here = np.flatnonzero(kind == name)
        bins = np.array_split(here[np.argsort(state[here], kind="stable")], 10)
        found = []
        for gene in set(denoised.var_names) - set(truth.effect_genes):
            true = truth.expression(rows, genes=[gene])[:, 0]
            if np.ptp(true[here]) > 0:
                values = denoised[:, gene].X[:, 0]
                pair = [[float(v[part].mean(dtype=float)) for part in bins] for v in (values, true)]
                found.append(0.0 if np.ptp(pair[0]) == 0 else np.corrcoef(*pair)[0, 1])
        of_types.append(np.mean(found))
    assert job.local_correlation(results, truth) == pytest.approx(np.mean(of_types), abs=1e-4)


def test_a_table_holds_means_and_deviations_over_seeds(job: ModuleType) -> None:
    empty = dict.fromkeys(job.FORMATS, float("nan"))
    rows = [
        {"cohort": "c", "space": "s", "within": "none", "seed": seed, **empty, "mean_r": r}
        for seed, r in ((0, 0.5), (1, 0.7))
    ]
    assert job.markdown(pd.DataFrame(rows)).splitlines()[-1] == "| c | s | none | 0.600 (0.141) |" + " - |" * 8
