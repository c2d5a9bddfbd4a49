"""Measure the benefit and the cost of corrected distances (hubs) and of more neighbours.

    python jobs/benchmark_hubs.py scores COHORT [--condition-key condition] [--control control] [--batch-key donor]
        [--by cell_type] [--run RUN_DIRECTORY] [--harmony] [--neighbours 1 5 15 30]
    python jobs/benchmark_hubs.py cost [20000/8 60000/4]

`scores` matches a cohort that fits in memory in its principal components, in those corrected by Harmony (`--harmony`,
by harmonypy, the group as the batch), and in the embedding of a run of it (`--run`), with plain and corrected
distances. The output is Markdown. Per space it holds the effective number of control cells that are matches, and the share of
matches of the same type; per number of neighbours r and root mean square error of the mean effect per responding type, the
error of `denoised`, how well it follows the state inside types (over ten bins of the true state), and the balance of signs.
For cohorts that are not simulated, r is between the effects of one half of the cells and the differences of type means of the
other half. `cost` times the stage, all groups against all, in this process.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
from scipy import sparse

from ndreamer_dist import keys
from ndreamer_dist.cohort.design import Design, Group
from ndreamer_dist.compute.executor import SerialRuntime
from ndreamer_dist.datasets.truth import Truth, load_truth
from ndreamer_dist.effects.averages import effective_number, kernel_weights
from ndreamer_dist.errors import CohortError
from ndreamer_dist.matching.exact import nearest
from ndreamer_dist.matching.hubs import MOST_QUERIES, nearest_corrected, remoteness
from ndreamer_dist.matching.stage import run_match
from ndreamer_dist.rundir.directory import RunDirectory
from ndreamer_dist.settings import Settings
from ndreamer_dist.storage.arrays import write_array

DIMENSIONS, BINS, LEAST_CELLS = 50, 10, 20


@dataclass(frozen=True)
class Cells:
    """A cohort in memory: log-normalised expression (cells, genes), and labels of its cells."""

    x: np.ndarray
    types: np.ndarray
    treated: np.ndarray
    groups: np.ndarray
    truth: Truth | None

    @classmethod
    def read(cls, asked: argparse.Namespace) -> Cells:
        """Read a cohort; counts are normalised."""
        read = anndata.read_h5ad if str(asked.cohort).endswith(".h5ad") else anndata.read_zarr
        adata = read(asked.cohort)
        x = sparse.csr_matrix(adata.X, dtype=np.float64)
        if np.array_equal(x.data, np.round(x.data)):
            x = sparse.diags(1e4 / np.asarray(x.sum(axis=1)).ravel()) @ x
            x.data = np.log1p(x.data)
        obs = adata.obs.astype(str)
        treated = (obs[asked.condition_key] != asked.control).to_numpy()
        batch = obs[asked.batch_key] if asked.batch_key else pd.Series("", index=obs.index)
        groups = (batch + "|" + obs[asked.condition_key]).to_numpy()
        try:
            truth = load_truth(asked.cohort)
        except CohortError:
            truth = None
        return cls(x.toarray(), obs[asked.by].to_numpy(), treated, groups, truth)


@dataclass(frozen=True)
class Matched:
    """Matches along every edge that effects need: rows and distances by (query group, target group)."""

    cells: Cells
    edges: dict[tuple[str, str], tuple[np.ndarray, np.ndarray]]

    def average(self, k: int, *, control: bool) -> np.ndarray:
        """Return F of the control, or of each cell's own condition: (cells, genes)."""
        cells, total = self.cells, np.zeros_like(self.cells.x)
        for query in np.unique(cells.groups):
            here = np.flatnonzero(cells.groups == query)
            targets = [t for t in np.unique(cells.groups) if self.wanted(query, t, control)]
            for target in targets:
                if target == query:
                    total[here] += cells.x[here] / len(targets)
                    continue
                rows, distances = (values[:, :k] for values in self.edges[query, target])
                weights = kernel_weights(distances, 1.0).ravel() / len(targets)
                starts = np.arange(len(here) + 1) * rows.shape[1]
                shape = (len(here), len(cells.x))
                total[here] += sparse.csr_matrix((weights, rows.ravel(), starts), shape=shape) @ cells.x
        return total

    def wanted(self, query: str, target: str, control: bool) -> bool:
        """Return whether a group is of the control, or of a query group's own condition."""
        treated = {group: bool(self.cells.treated[self.cells.groups == group][0]) for group in (query, target)}
        return not treated[target] if control else treated[target] == treated[query]


def matched(cells: Cells, points: np.ndarray, hubs: str, k: int) -> Matched:
    """Match every group with those of its own condition and of the control."""
    rows = {group: np.flatnonzero(cells.groups == group) for group in np.unique(cells.groups)}
    edges = {}
    for query, asking in rows.items():
        for target, there in rows.items():
            if query == target or (cells.treated[there[0]] and not cells.treated[asking[0]]):
                continue
            near, far = points[asking], points[there]
            if hubs == "csls":
                found = nearest_corrected(near, far, remoteness(far, near[:MOST_QUERIES]), k)
            else:
                found = nearest(near, far, k)
            edges[query, target] = there[found.rows], found.distances
    return Matched(cells, edges)


# --- scores ----------------------------------------------------------------------------------------------------------


def scores(asked: argparse.Namespace) -> None:
    """Print the scores of every space."""
    cells = Cells.read(asked)
    for name, points in spaces(cells, asked):
        for hubs in ("none", "csls"):
            found = matched(cells, points.astype(np.float32), hubs, max(asked.neighbours))
            used, pure = reuse(found)
            print(f"\n{name}, {hubs}: {used:.0f} of {(~cells.treated).sum()} controls, purity {pure:.4f}\n")
            table = pd.DataFrame(
                [score(found, k) for k in asked.neighbours], index=[f"k = {k}" for k in asked.neighbours]
            )
            print(markdown(table), flush=True)


def spaces(cells: Cells, asked: argparse.Namespace) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the matching spaces."""
    centred = cells.x - cells.x.mean(axis=0)
    axes = np.linalg.eigh(centred.T @ centred)[1][:, ::-1][:, :DIMENSIONS]
    components = centred @ axes
    yield "pca", components
    if asked.harmony:
        import harmonypy

        moved = np.asarray(harmonypy.run_harmony(components, pd.DataFrame({"group": cells.groups}), "group").Z_corr)
        yield "harmony", moved if len(moved) == len(components) else moved.T
    if asked.run:
        import zarr

        place = np.asarray(zarr.open_array(f"{asked.run}/{keys.PACKED}/{keys.PACKED_INPUT_ROW}", mode="r")[...])
        points = np.empty((len(cells.x), DIMENSIONS))
        points[place] = zarr.open_array(f"{asked.run}/{keys.EMBEDDING}/{keys.PCA}", mode="r")[...]
        yield "ndreamer", points


def reuse(found: Matched) -> tuple[float, float]:
    """Return the effective number of control cells of treated cells' matches, and the share of the same type."""
    cells, times, same = found.cells, np.zeros(len(found.cells.x)), []
    for (query, _), (rows, _) in found.edges.items():
        asking = np.flatnonzero(cells.groups == query)
        if cells.treated[asking[0]] and not cells.treated[rows[0, 0]]:
            np.add.at(times, rows[:, 0], 1)
            same.append(cells.types[rows[:, 0]] == cells.types[asking])
    return effective_number(times), float(np.concatenate(same).mean())


def score(found: Matched, k: int) -> dict[str, float]:
    """Return the scores of a number of neighbours."""
    cells = found.cells
    own = found.average(k, control=False)
    effects = (own - found.average(k, control=True))[cells.treated]
    balance = float((effects > 0).mean() + (effects == 0).mean() / 2)
    if cells.truth is None:
        return {**against_means(cells, effects), "sign balance": balance}
    return {**against_truth(cells, cells.truth, own, effects), "sign balance": balance}


def against_truth(cells: Cells, truth: Truth, own: np.ndarray, effects: np.ndarray) -> dict[str, float]:
    """Return how effects and denoised expression agree with the truth of a simulated cohort."""
    agreement, error = [], []
    for kind in truth.cell_types:
        true = truth.mean_ite(kind, truth.conditions[1]).astype(np.float64)
        if true.any():
            mean = effects[cells.types[cells.treated] == kind].mean(axis=0)
            agreement.append(np.corrcoef(true, mean)[0, 1])
            error.append(np.sqrt(((true - mean) ** 2).mean()))
    expected = truth.expression(slice(None)).astype(np.float64)
    return {
        "r": float(np.mean(agreement)), "rmse": float(np.mean(error)),
        "error of denoised": float(np.sqrt(((own - expected) ** 2).mean())),
        "local r": local_agreement(cells, truth.obs()["state"], own, expected),
    }  # fmt: skip


def local_agreement(cells: Cells, state: np.ndarray, own: np.ndarray, expected: np.ndarray) -> float:
    """Return how well denoised expression follows the state inside type and condition, over genes that it moves."""
    agreement = []
    for kind in np.unique(cells.types):
        for treated in (False, True):
            here = np.flatnonzero((cells.types == kind) & (cells.treated == treated))
            part = np.array_split(here[np.argsort(state[here], kind="stable")], BINS)
            one, other = (np.array([values[rows].mean(axis=0) for rows in part]) for values in (own, expected))
            moved = other.std(axis=0) > 0.02
            one, other = (values[:, moved] - values[:, moved].mean(axis=0) for values in (one, other))
            agreement.append((one * other).sum() / np.sqrt((one**2).sum() * (other**2).sum()))
    return float(np.mean(agreement))


def against_means(cells: Cells, effects: np.ndarray) -> dict[str, float]:
    """Return how effects of one half of the cells agree with differences of type means in the other half."""
    half = np.random.default_rng(0).random(len(cells.x)) < 0.5
    agreement, slopes = [], []
    for kind in np.unique(cells.types):
        inside = cells.types == kind
        if min((inside & cells.treated).sum(), (inside & ~cells.treated).sum()) < LEAST_CELLS:
            continue
        for part in (half, ~half):
            seen, other = inside & part, inside & ~part
            difference = cells.x[seen & cells.treated].mean(axis=0) - cells.x[seen & ~cells.treated].mean(axis=0)
            mean = effects[other[cells.treated]].mean(axis=0)
            agreement.append(np.corrcoef(difference, mean)[0, 1])
            slopes.append(np.polyfit(difference, mean, 1)[0])
    return {"r with type means": float(np.mean(agreement)), "slope": float(np.mean(slopes))}


# --- cost ------------------------------------------------------------------------------------------------------------


def cost(asked: argparse.Namespace) -> None:
    """Print the processor seconds of the stage, by hubs and numbers of neighbours, and what they are times the plain one."""
    for problem in asked.problems:
        cells, groups = map(int, problem.split("/"))
        rows = {}
        for denoised in (1, 15):
            for hubs in ("none", "csls"):
                seconds = min(stage_seconds(cells, groups, hubs, denoised) for _ in range(asked.rounds))
                rows[f"{hubs}, denoise.neighbours {denoised}"] = {"seconds": seconds}
        table = pd.DataFrame(rows).T
        table["times"] = table["seconds"] / table["seconds"].iloc[0]
        print(f"\n{cells} cells x {DIMENSIONS} in {groups} groups, all against all\n\n{markdown(table)}", flush=True)


def stage_seconds(cells: int, groups: int, hubs: str, denoised: int) -> float:
    """Return the processor seconds of the match stage on a mixture of 20 kinds of cells."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(20, DIMENSIONS)) * np.linspace(3, 0.3, DIMENSIONS)
    points = centres[rng.integers(20, size=cells)] + rng.normal(size=(cells, DIMENSIONS)) * 0.5
    size = cells // groups
    spans = [(code * size, (code + 1) * size) for code in range(groups)]
    made = tuple(Group(code, f"d{code}|c", code % 2, code, (code,), *span) for code, span in enumerate(spans))
    names = tuple(f"d{code}" for code in range(groups))
    design = Design("condition", ("donor",), ("control", "treated"), (names,), names, made)
    asked = {"match.edges": "all", "match.hubs": hubs, "denoise.neighbours": denoised, "run.serial": True}
    settings = Settings.build(overrides={**asked, "run.progress": False})
    with tempfile.TemporaryDirectory() as folder:
        run = RunDirectory.at(folder)
        write_array(run.storage / keys.EMBEDDING, keys.PCA, points.astype(np.float32), chunks=(4096, DIMENSIONS))
        begun = time.process_time()
        run_match(run, settings, design, SerialRuntime(settings.run), "benchmark")
        return time.process_time() - begun


def markdown(table: pd.DataFrame) -> str:
    """Return a table as Markdown."""
    lines = [f"| | {' | '.join(map(str, table.columns))} |", "|---" * (table.shape[1] + 1) + "|"]
    lines += [
        f"| {name} | {' | '.join(f'{v:.3f}' for v in row)} |"
        for name, row in zip(table.index, table.to_numpy(), strict=True)
    ]
    return "\n".join(lines)


def main() -> None:
    """Read the command line and do what it asks."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parts = parser.add_subparsers(required=True)
    one = parts.add_parser("scores")
    one.add_argument("cohort", type=Path)
    for name, default in (
        ("condition-key", "condition"),
        ("control", "control"),
        ("batch-key", "donor"),
        ("by", "cell_type"),
    ):
        one.add_argument(f"--{name}", default=default)
    one.add_argument("--run", type=Path)
    one.add_argument("--harmony", action="store_true")
    one.add_argument("--neighbours", type=int, nargs="+", default=[1, 5, 15, 30])
    one.set_defaults(do=scores)
    other = parts.add_parser("cost")
    other.add_argument("problems", nargs="*", default=["20000/8", "60000/4"])
    other.add_argument("--rounds", type=int, default=3)
    other.set_defaults(do=cost)
    asked = parser.parse_args()
    asked.do(asked)


if __name__ == "__main__":
    main()
