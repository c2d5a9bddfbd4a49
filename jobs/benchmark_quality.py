"""Measure by scib-metrics how well the embedding mixes conditions and batches and keeps cell types.

    python jobs/benchmark_quality.py COHORT.h5ad --condition-key condition --control ctrl --out /tmp/quality \
        [--batch-key donor] [--label-key cell_type] [--seeds 3] [--threads 2] [--preset paper] \
        [--variant calm:train.reset_below=0.1] [--variant quiet:model.latent_noise=0]

Needs the extra `bench`. The preset itself is measured, and each variant, a set of settings (`name:stage.setting=value,...`);
a variant that affects only the embedding (`embed.codes=expected`) reuses the preset's trained model. Every run keeps its
directory, so the same command continues after an interruption. The output, also in OUT/quality.csv, holds a row per run, mean
and standard deviation over seeds, and the same measures of the input's PCA.
"""

from __future__ import annotations

import argparse
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scanpy as sc
import scib_metrics
from scib_metrics.nearest_neighbors import pynndescent

import ndreamer_dist as nd
from ndreamer_dist.settings import parse_assignments
from ndreamer_dist.stats.results import Results

NEIGHBOURS = 90
DIMENSIONS = 50
AFTER_TRAINING = ("embed.", "match.", "effects.")


def main() -> None:
    """Run every variant with every seed and print the table."""
    given = arguments()
    rows: list[dict[str, Any]] = []
    for name, settings in [("preset", {}), *map(variant, given.variant)]:
        for seed in range(given.seeds):
            results = trained(given, name, settings, seed)
            if not rows:
                rows.append({"variant": "input", "seed": 0, **of_input(results, given)})
                show(rows[-1])
            rows.append({"variant": name, "seed": seed, **of_run(results, given)})
            show(rows[-1])
            pd.DataFrame(rows).to_csv(given.out / "quality.csv", index=False)
    print(summary(pd.DataFrame(rows)))


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("cohort", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--condition-key", required=True)
    parser.add_argument("--control", required=True)
    parser.add_argument("--batch-key")
    parser.add_argument("--label-key", default="cell_type")
    parser.add_argument("--preset", default="paper")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--variant", action="append", default=[], help="name:stage.setting=value,...")
    return parser.parse_args()


def variant(text: str) -> tuple[str, dict[str, Any]]:
    """Read `name:stage.setting=value,...`."""
    name, _, assignments = text.partition(":")
    return name, parse_assignments(assignments.split(","))


def trained(given: argparse.Namespace, name: str, settings: dict[str, Any], seed: int) -> Results:
    """Run the job in this process, unless it is finished."""
    out = given.out / f"{name}-{seed}"
    if settings and not out.exists() and all(setting.startswith(AFTER_TRAINING) for setting in settings):
        shutil.copytree(given.out / f"preset-{seed}", out)
    return nd.run(
        given.cohort,
        out=out,
        condition_key=given.condition_key,
        control=given.control,
        batch_key=given.batch_key,
        preset=given.preset,
        settings={"seed": seed, "run.serial": True, "run.task_threads": given.threads, **settings},
        redo=True,
    ).results


def of_input(results: Results, given: argparse.Namespace) -> dict[str, float]:
    """Measure the PCA of the log-normalised input over the modelled genes."""
    expression = results.expression()
    points = sc.pp.pca(expression.X, n_comps=min(DIMENSIONS, expression.n_vars - 1), random_state=0)
    return {**measures(points, results.obs, given), "distortion": 1.0}


def of_run(results: Results, given: argparse.Namespace) -> dict[str, float]:
    """Measure a run's embedding, and how much of each cell's expression the denoised one keeps."""
    points = results.embedding(pca=True).to_numpy()
    return {**measures(points, results.obs, given), "distortion": correlation(results)}


def measures(points: np.ndarray, obs: pd.DataFrame, given: argparse.Namespace) -> dict[str, float]:
    """Return the scores of points, (cells, dimensions); all lie in 0 to 1 and larger is better."""
    points = np.ascontiguousarray(points, dtype=np.float32)
    labels = obs[given.label_key].astype(str).to_numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        near = pynndescent(points, n_neighbors=NEIGHBOURS, random_state=0, n_jobs=2)
        found: dict[str, float] = {}
        for what, key in mixed(given):
            groups = obs[key].astype(str).to_numpy()
            found[f"iLISI {what}"] = scib_metrics.ilisi_knn(near, groups)
            found[f"kBET {what}"] = scib_metrics.kbet_per_label(near, groups, labels)
            found[f"silhouette {what}"] = scib_metrics.silhouette_batch(points, labels, groups)
        found["cLISI"] = scib_metrics.clisi_knn(near, labels)
        found["silhouette label"] = scib_metrics.silhouette_label(points, labels)
        agreement = scib_metrics.nmi_ari_cluster_labels_kmeans(points, labels)
    return {name: float(value) for name, value in (found | {"NMI": agreement["nmi"], "ARI": agreement["ari"]}).items()}


def mixed(given: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """Yield the properties that should be mixed, with their columns."""
    yield "condition", given.condition_key
    if given.batch_key:
        yield "batch", given.batch_key


def correlation(results: Results) -> float:
    """Return the mean over cells of the correlation of denoised with raw expression."""
    raw = results.expression().to_df().to_numpy()
    denoised = results.denoised().X
    return float(np.nanmean([np.corrcoef(pair)[0, 1] for pair in zip(raw, denoised, strict=True)]))


def show(row: dict[str, Any]) -> None:
    """Print one run's row."""
    print("  ".join(f"{name} {value:.3f}" if isinstance(value, float) else f"{value}" for name, value in row.items()))


def summary(table: pd.DataFrame) -> str:
    """Return mean and standard deviation over seeds as a Markdown table."""
    names = [name for name in table.columns if name not in ("variant", "seed")]
    lines = [f"| variant | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for name, part in table.groupby("variant", sort=False):
        cells = [
            f"{part[c].mean():.3f} ± {part[c].std(ddof=1):.3f}" if len(part) > 1 else f"{part[c].iloc[0]:.3f}"
            for c in names
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
