"""Measure how much effects depend on the seed of training: train the same cohort with several seeds.

    python jobs/stability.py COHORT --condition-key condition --control ctrl --batch-key donor --by cell_type \
        --out /tmp/stability [--seeds 3] [--preset paper] [--set train.epochs=50]

The output is a Markdown table. For every population and condition it holds, between seeds, the rank correlation over genes of
the mean treatment effect and the shared part of the 50 genes of largest effect (mean and minimum over pairs of seeds), and, for
scale, the shared part of the first seed's 50 genes and those of plain pseudobulk differences. Every run keeps its directory,
so the same command continues after an interruption.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import numpy as np
import pandas as pd

import ndreamer_dist as nd
from ndreamer_dist.settings import parse_assignments

TOP = 50


def main() -> None:
    """Train every seed and print the table."""
    given = arguments()
    tables = [trained(given, seed).cate(given.by, donor_key=given.donor_key) for seed in range(given.seeds)]
    told = stability(tables)
    told.to_csv(given.out / "stability.csv", index=False)
    print("| " + " | ".join(told) + " |\n" + "|---" * len(told.columns) + "|")
    for row in told.itertuples(index=False):
        print("| " + " | ".join(f"{value:.3f}" if isinstance(value, float) else str(value) for value in row) + " |")


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("cohort")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--condition-key", required=True)
    parser.add_argument("--control", required=True)
    parser.add_argument("--batch-key", action="append")
    parser.add_argument("--donor-key", help="column of obs that names donors (default: the batch)")
    parser.add_argument("--by", help="column of obs that names populations")
    parser.add_argument("--preset", default="paper")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--set", dest="assignments", action="append", default=[], metavar="STAGE.NAME=VALUE")
    return parser.parse_args()


def trained(given: argparse.Namespace, seed: int) -> nd.Results:
    """Run the job of one seed, and return its results."""
    return nd.run(
        given.cohort, out=given.out / f"seed-{seed}", condition_key=given.condition_key, control=given.control,
        batch_key=given.batch_key, preset=given.preset, settings={**parse_assignments(given.assignments), "seed": seed},
    ).results  # fmt: skip


def stability(tables: list[pd.DataFrame]) -> pd.DataFrame:
    """Return the agreement of the effects of several seeds: a row per population and condition.

    Parameters
    ----------
    tables
        `Results.cate` of every seed.
    """
    effects = pd.concat([table.assign(seed=seed) for seed, table in enumerate(tables)])
    rows = []
    for (population, condition), part in effects.groupby(["population", "condition"], sort=False):
        by_seed = part.pivot_table(index="gene", columns="seed", values="mean_ite").dropna()
        first = part[part["seed"] == 0].set_index("gene")["pseudobulk_effect"].loc[by_seed.index]
        pairs = list(itertools.combinations(by_seed.columns, 2))
        rank = [by_seed[one].corr(by_seed[other], method="spearman") for one, other in pairs]
        shared = [overlap(by_seed[one], by_seed[other]) for one, other in pairs]
        rows.append(
            {
                "population": population, "condition": condition, "genes": len(by_seed),
                "rank correlation": float(np.mean(rank)), "its smallest": float(np.min(rank)),
                f"top {TOP} shared": float(np.mean(shared)), "its smallest share": float(np.min(shared)),
                "shared with pseudobulk": overlap(by_seed[0], first) if first.notna().any() else np.nan,
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


def overlap(one: pd.Series, other: pd.Series) -> float:
    """Return the shared part of the `TOP` genes of largest effect of two tables."""
    most = min(TOP, len(one))
    return len({*one.abs().nlargest(most).index} & {*other.abs().nlargest(most).index}) / most


if __name__ == "__main__":
    main()
