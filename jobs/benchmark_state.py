"""Measure the decomposition of effects on real cells whose state is shifted, through the whole job.

The donors of a cohort without a treatment are assigned to two arms at random. Half of the cells of one type are kept of every
donor, with a probability that depends, oppositely in the two arms, on a state score. An independent half of each cell's counts
gives the score; the analysis sees only the other half. So there is no effect, and the state is shifted and nested. `--effects`
plants effects by thinning a share of the genes in one arm. Each cohort goes through `nd.run` and `Results.cate`.

    python jobs/benchmark_state.py onek1k_40donors.h5ad --types cd4nc,bmem,monoc --shifts 0,0.6,1.5 --repetitions 5 --out state.csv
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
from scipy import sparse

import ndreamer_dist as nd
from ndreamer_dist.settings import parse_assignments

PLANTED, THINNED = 0.15, 0.7
"""Share of the genes that an effect is planted in, and the share of their counts that is kept."""
EXPRESSED = 0.05
"""Share of cells in which a gene is seen that is looked at."""
STATE_GENES, OTHER_GENES = 0.1, 0.6
"""Share of the genes that are most tied to the state, and least."""
SETTINGS = {
    "run.serial": True, "run.progress": False, "effects.store": "ite", "cohort.min_group_cells": 5, "hvg.num_hvg": 2000,
}  # fmt: skip


@dataclass(frozen=True)
class Tilted:
    """A cohort with a shifted state, and its sets of genes.

    Attributes
    ----------
    score
        (cells,) state of every cell, from the counts that the analysis does not see.
    state, others, planted
        (genes,) the genes most and least tied to the state, and those with an effect.
    """

    cohort: anndata.AnnData
    score: np.ndarray
    state: pd.Index
    others: pd.Index
    planted: pd.Index

    @property
    def shift(self) -> float:
        """Difference of the arms' mean states in standard deviations."""
        treated = (self.cohort.obs["arm"] == "treated").to_numpy()
        return float((self.score[treated].mean() - self.score[~treated].mean()) / self.score.std())


def donors_of(path: str, cell_type: str, least: int) -> tuple[np.ndarray, np.ndarray, pd.Index]:
    """Return counts (cells, genes) of one type, the donor of every cell, and the genes; donors with few cells are left out."""
    cohort = anndata.read_h5ad(path)
    chosen = (cohort.obs["cell_type"] == cell_type).to_numpy()
    donors = cohort.obs["donor"].astype(str)[chosen]
    kept = donors.map(donors.value_counts()).to_numpy() >= least
    counts = cohort.X[chosen][kept]
    dense = np.asarray(counts.toarray() if sparse.issparse(counts) else counts).astype(np.int64)
    return dense, pd.factorize(donors[kept])[0], cohort.var_names


def tilted(
    counts: np.ndarray,
    donors: np.ndarray,
    genes: pd.Index,
    *,
    strength: float,
    effects: bool,
    generator: np.random.Generator,
    most: int | None = None,
) -> Tilted:
    """Return a cohort of half of every donor's cells, drawn with a tilt.

    Parameters
    ----------
    strength
        Strength of the tilt; 0.6 shifts the state by about 0.7 standard deviations, 1.5 by about 1.2.
    most
        Maximum number of cells of a donor, if half of them are more.
    """
    number = int(donors.max()) + 1
    hidden = generator.binomial(counts, 0.5)
    seen = counts - hidden
    score = state_score(hidden[:, (counts > 0).mean(axis=0) > EXPRESSED], donors) * generator.choice([-1, 1])
    arm = np.zeros(number, dtype=bool)
    arm[generator.permutation(number)[: number // 2]] = True
    drawn = generator.gumbel(size=len(score)) + np.where(arm[donors], strength, -strength) * score
    kept = np.sort(np.concatenate([_first(np.flatnonzero(donors == d), drawn, most) for d in range(number)]))
    y, d, s = seen[kept], donors[kept], score[kept]
    expressed = np.flatnonzero((y > 0).mean(axis=0) > EXPRESSED)
    planted = generator.permutation(expressed)[: int(PLANTED * len(expressed))] if effects else expressed[:0]
    rows = np.flatnonzero(arm[d])
    y[np.ix_(rows, planted)] = generator.binomial(y[np.ix_(rows, planted)], THINNED)
    tied = expressed[np.argsort(-correlation_inside(logged(y)[:, expressed], s, d), kind="stable")]
    obs = pd.DataFrame(
        {"arm": np.where(arm[d], "treated", "control"), "donor": [f"d{i}" for i in d], "cell_type": "one"}
    )
    obs.index = obs.index.astype(str)
    cohort = anndata.AnnData(sparse.csr_matrix(y.astype(np.float32)), obs=obs, var=pd.DataFrame(index=genes))
    top, last = max(20, int(STATE_GENES * len(tied))), int(OTHER_GENES * len(tied))
    return Tilted(cohort, s, genes[tied[:top]], genes[tied[len(tied) - last :]], genes[planted])


def _first(rows: np.ndarray, drawn: np.ndarray, most: int | None) -> np.ndarray:
    half = len(rows) // 2
    return rows[np.argsort(-drawn[rows])[: half if most is None else min(most, half)]]


def logged(counts: np.ndarray) -> np.ndarray:
    """Return log-normalised counts."""
    return np.log1p(counts / np.maximum(counts.sum(axis=1, keepdims=True), 1) * 1e4)


def inside(values: np.ndarray, donors: np.ndarray) -> np.ndarray:
    """Return values minus their donor's mean."""
    member = np.zeros((int(donors.max()) + 1, len(donors)))
    member[donors, np.arange(len(donors))] = 1
    return values - ((member @ values) / np.maximum(member.sum(axis=1), 1)[:, None])[donors]


def state_score(counts: np.ndarray, donors: np.ndarray) -> np.ndarray:
    """Return the first principal component of what varies inside donors: (cells,), of variance 1."""
    centred = inside(logged(counts), donors)
    score = centred @ np.linalg.eigh(centred.T @ centred)[1][:, -1]
    return np.asarray(score / score.std())


def correlation_inside(x: np.ndarray, score: np.ndarray, donors: np.ndarray) -> np.ndarray:
    """Return how strongly every gene follows the state inside donors: (genes,)."""
    centred, s = inside(x, donors), inside(score[:, None], donors)
    return np.asarray(np.abs((centred * s).sum(axis=0)) / np.sqrt((centred**2).sum(axis=0) * (s**2).sum() + 1e-12))


def shares(made: Tilted, table: pd.DataFrame) -> pd.DataFrame:
    """Return the share of small p-values of every test and set of genes, and of the readings."""
    table = table.set_index("gene")
    sets = {
        "state": made.state.difference(made.planted), "others": made.others.difference(made.planted),
        "null": table.index.difference(made.planted).intersection(made.state.union(made.others)), "planted": made.planted,
        "planted state": made.planted.intersection(made.state),
    }  # fmt: skip
    rows = []
    for name, genes in sets.items():
        part = table.loc[table.index.intersection(genes)]
        for test in ("total", "within_state", "state_shift", "matched"):
            p = part["p" if test == "matched" else f"{test}_p"]
            adjusted = part["p_adjusted" if test == "matched" else f"{test}_p_adjusted"]
            values = {"p<=.05": (p <= 0.05).mean(), "p<=.001": (p <= 0.001).mean(), "q<=.05": (adjusted <= 0.05).mean()}
            rows.append({"genes": name, "test": test, "tests": int(p.notna().sum()), **values})
        words = {f"read {word}": (part["reading"] == word).mean() for word in ("within", "state", "both", "neither")}
        rows.append({"genes": name, "test": "reading", "tests": len(part), **words})
    return pd.DataFrame(rows)


def measured(made: Tilted, spaces: list[str], settings: dict[str, Any]) -> pd.DataFrame:
    """Run a cohort in every space and return the shares; the decomposition is that of the first space."""
    tables = []
    with tempfile.TemporaryDirectory() as folder:
        for space in spaces:
            started = time.process_time()
            run = nd.run(
                made.cohort, out=Path(folder) / "run", condition_key="arm", control="control", batch_key="donor",
                preset="small", embedding=space, settings={**SETTINGS, **settings},
            )  # fmt: skip
            table = run.results.cate("cell_type", min_cells=5)
            found = shares(made, table)
            if space != spaces[0]:
                found = found[found["test"] == "matched"]
            facts = {"cells": table["cells_a_donor"].iloc[0], "reliability": table["state_reliability"].iloc[0]}
            seconds = time.process_time() - started
            tables.append(found.replace({"test": {"matched": space}}).assign(seconds=seconds, **facts))
    return pd.concat(tables)


def main() -> None:
    """Measure every type, shift and repetition, and write a table of shares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cohort")
    parser.add_argument("--types", default="cd4nc,bmem,monoc")
    parser.add_argument("--shifts", default="0,0.6,1.5", help="strengths of the tilt")
    parser.add_argument("--effects", default="0,1", help="without planted effects, with them, or both")
    parser.add_argument("--spaces", default="pca", help="spaces to run in; the decomposition needs none of them")
    parser.add_argument("--least", type=int, default=20, help="cells that a donor needs")
    parser.add_argument("--most", type=int, default=None, help="cells of a donor that are kept")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", required=True)
    parser.add_argument(
        "--set", action="append", default=[], dest="assignments", help="of every run: match.hubs=csls, say"
    )
    options = parser.parse_args()
    assigned = parse_assignments(options.assignments)
    tables = []
    for cell_type in options.types.split(","):
        counts, donors, genes = donors_of(options.cohort, cell_type, options.least)
        for strength in (float(s) for s in options.shifts.split(",")):
            for effects in (bool(int(e)) for e in options.effects.split(",")):
                for repetition in range(options.repetitions):
                    generator = np.random.default_rng((options.seed, repetition, int(100 * strength), effects))
                    made = tilted(
                        counts,
                        donors,
                        genes,
                        strength=strength,
                        effects=effects,
                        generator=generator,
                        most=options.most,
                    )
                    found = measured(made, options.spaces.split(","), {"seed": repetition, **assigned})
                    tables.append(
                        found.assign(
                            cell_type=cell_type,
                            strength=strength,
                            shift=made.shift,
                            effects=effects,
                            repetition=repetition,
                        )
                    )
                    pd.concat(tables).to_csv(options.out, index=False)
    table = pd.concat(tables)
    print(table.groupby(["strength", "effects", "genes", "test"])[["p<=.05", "p<=.001", "q<=.05"]].mean().round(3))


if __name__ == "__main__":
    main()
