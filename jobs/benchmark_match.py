"""Measure matches per second of one k-d tree query per cell and of this package's search, on the same points.

    python jobs/benchmark_match.py NAIVE_MATCH.py [--problems 20000/8 60000/4] [--rounds 3] [--engines]
        [--run RUN_DIRECTORY] [--large 1000000/80] [--stage 100000/8]

NAIVE_MATCH.py is the yardstick: a module with `points(cells, dims)`, whose command line takes `--cells` and `--groups`
and prints cell-group matches per second. In each problem (cells / groups) every cell is matched in every group, in its own group
to the nearest other cell; times include building the indexes. "2 tasks" are two processes of one thread, as Ray runs them;
"2 threads" is one task with `run.task_threads=2`. Then the same for crowds of 500 near copies, and for a real embedding if a
run directory is given. `--large` times a sample of target groups and extrapolates; `--stage` runs the whole stage, with its
files, on a local Ray (jobs/gpu_check.py does so on GPUs).
"""

from __future__ import annotations

import argparse
import importlib.util
import multiprocessing
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import faiss
import numpy as np
from scipy.spatial import cKDTree
from threadpoolctl import threadpool_limits

from ndreamer_dist import keys
from ndreamer_dist.cohort.design import Design, Group
from ndreamer_dist.compute.executor import choose_runtime
from ndreamer_dist.matching.exact import nearest
from ndreamer_dist.matching.partition import build_index
from ndreamer_dist.matching.stage import run_match
from ndreamer_dist.rundir.directory import RunDirectory
from ndreamer_dist.settings import Settings
from ndreamer_dist.storage.arrays import read_array, write_array

DIMS = 50
SAMPLE = 300
LARGE_TARGETS, LARGE_QUERIES = 4, 50_000
Search = Callable[[int], float]
"""Matches every cell in one group."""


@dataclass(frozen=True)
class Problem:
    """Points, and the rows of each group."""

    name: str
    points: np.ndarray
    groups: tuple[np.ndarray, ...]

    @property
    def matches(self) -> int:
        """Number of cell-group matches."""
        return len(self.points) * len(self.groups)


def main() -> None:
    """Run the measurements and print them."""
    given = arguments()
    naive = loaded(given.naive)
    print(f"load {os.getloadavg()[0]:.1f}, {len(os.sched_getaffinity(0))} processors")
    for cells, groups in given.problems:
        problem = spread(f"{cells} cells / {groups} groups", naive.points(cells, DIMS), groups)
        compare(problem, lambda c=cells, g=groups: naive_tool(given.naive, c, g), given)
    crowds = spread("60000 cells / 4 groups in crowds of 500 near copies", crowded(60_000), 4)
    compare(crowds, lambda: naive_rate(crowds), given)
    if given.run:
        real = embedded(given.run)
        compare(real, lambda: naive_rate(real), given)
    for cells, groups in given.large:
        large(spread(f"{cells} cells / {groups} groups", naive.points(cells, DIMS), groups))
    for cells, groups in given.stage:
        stage(naive.points(cells, DIMS), groups)


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("naive", type=Path, metavar="NAIVE_MATCH.py")
    parser.add_argument("--problems", type=shape, nargs="*", default=[(20_000, 8), (60_000, 4)], metavar="CELLS/GROUPS")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--engines", action="store_true", help="other ways to search, for comparison")
    parser.add_argument("--run", type=Path, help="run directory whose embedding is matched, too")
    for name in ("large", "stage"):
        parser.add_argument(f"--{name}", type=shape, nargs="*", default=[], metavar="CELLS/GROUPS")
    return parser.parse_args()


def shape(text: str) -> tuple[int, int]:
    """Read `cells/groups`."""
    cells, groups = text.split("/")
    return int(cells), int(groups)


def loaded(path: Path) -> ModuleType:
    """Import the yardstick from its file."""
    spec = importlib.util.spec_from_file_location("naive_match", path)
    if spec is None or spec.loader is None:
        msg = f"{path} is no Python module"
        raise SystemExit(msg)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- problems --------------------------------------------------------------------------------------------------------


def spread(name: str, points: np.ndarray, groups: int) -> Problem:
    """Distribute points evenly over groups, as the yardstick does."""
    return Problem(name, points, tuple(np.arange(group, len(points), groups) for group in range(groups)))


def crowded(cells: int) -> np.ndarray:
    """Return points in crowds of 500 per 15 000, whose members differ by rounding."""
    rng = np.random.default_rng(0)
    centres = 3 * rng.normal(size=(30, DIMS)).astype(np.float32)
    return (centres[rng.integers(30, size=cells)] + 1e-6 * rng.normal(size=(cells, DIMS))).astype(np.float32)


def embedded(run: Path) -> Problem:
    """Return the embedding of a run, by its groups."""
    directory = RunDirectory.at(run)
    design = Design.from_json(directory.read_json(keys.DESIGN_JSON))
    points = read_array(directory.storage / keys.EMBEDDING, keys.PCA)
    groups = tuple(np.arange(group.start, group.stop) for group in design.groups)
    return Problem(f"{run}: {len(points)} cells / {len(groups)} groups", points, groups)


# --- rates -----------------------------------------------------------------------------------------------------------


def naive_tool(path: Path, cells: int, groups: int) -> float:
    """Return the yardstick's own rate."""
    words = [sys.executable, str(path), "--cells", str(cells), "--groups", str(groups)]
    told = subprocess.run(words, check=True, capture_output=True, text=True).stdout
    return float(re.findall(r"(\d+) cell-group matches per second", told)[0])


def naive_rate(problem: Problem) -> float:
    """Return the rate of one k-d tree query per cell, as the yardstick measures it."""
    begun, queries = time.perf_counter(), problem.points[:: max(1, len(problem.points) // SAMPLE)]
    for rows in problem.groups:
        tree = cKDTree(problem.points[rows])
        for query in queries:
            tree.query(query, k=2)
    return len(queries) * len(problem.groups) / (time.perf_counter() - begun)


def excluded(problem: Problem, group: int) -> np.ndarray:
    """Return each cell's own row among the group's, or -1."""
    itself = np.full(len(problem.points), -1)
    itself[problem.groups[group]] = np.arange(len(problem.groups[group]))
    return itself


def searched(problem: Problem, group: int, threads: int) -> np.ndarray:
    """Return the row of every cell's match in a group."""
    with threadpool_limits(1):
        index = build_index(problem.points[problem.groups[group]])
        itself = excluded(problem, group)
        return nearest(problem.points, index, 1, exclude=itself, threads=threads).rows[:, 0]


def serial_rate(problem: Problem, threads: int) -> float:
    """Return the rate of one task."""
    begun = time.perf_counter()
    for group in range(len(problem.groups)):
        searched(problem, group, threads)
    return problem.matches / (time.perf_counter() - begun)


held: list[Problem] = []


def hold(problem: Problem) -> None:
    """Keep a problem in a worker process."""
    held[:] = [problem]


def task(group: int) -> int:
    """Match one group in a worker process."""
    return int(searched(held[0], group, 1)[-1])


def tasks_rate(problem: Problem, pool: ProcessPoolExecutor) -> float:
    """Return the rate of two tasks of one thread each."""
    begun = time.perf_counter()
    list(pool.map(task, range(len(problem.groups))))
    return problem.matches / (time.perf_counter() - begun)


def compare(problem: Problem, naive: Callable[[], float], given: argparse.Namespace) -> None:
    """Print all rates of a problem, medians over rounds in which each is measured once."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=context, initializer=hold, initargs=(problem,)) as pool:
        list(pool.map(task, range(2)))
        ways: dict[str, Callable[[], float]] = {"naive": naive}
        ways["exact, 1 thread"] = lambda: serial_rate(problem, 1)
        ways["exact, 2 threads"] = lambda: serial_rate(problem, 2)
        ways["exact, 2 tasks"] = lambda: tasks_rate(problem, pool)
        if given.engines:
            ways |= dict(other_engines(problem))
        rates: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(given.rounds):
            for name, way in ways.items():
                rates[name].append(way())
    print(f"\n{problem.name} (load {os.getloadavg()[0]:.1f})")
    for name, found in rates.items():
        ratio = statistics.median(rate / base for rate, base in zip(found, rates["naive"], strict=True))
        print(f"  {name:<28}{statistics.median(found):>12,.0f} matches/s{ratio:>8.1f} x naive")


def other_engines(problem: Problem) -> Iterator[tuple[str, Callable[[], float]]]:
    """Yield other engines on two processors; only the last is exact if float32 leaves ties."""
    yield "FAISS flat, 2 threads", lambda: by(problem, lambda targets: by_faiss(problem.points, targets))
    yield "one cell (GEMM), 2 threads", lambda: by(problem, lambda targets: by_cells(problem.points, targets, 1))
    yield (
        "k-d tree in bulk, 2 threads",
        lambda: by(problem, lambda targets: cKDTree(targets).query(problem.points, k=2, workers=2)),
    )


def by(problem: Problem, search: Callable[[np.ndarray], object]) -> float:
    """Return the rate of a way to match all cells in a group."""
    begun = time.perf_counter()
    for rows in problem.groups:
        search(problem.points[rows])
    return problem.matches / (time.perf_counter() - begun)


def by_faiss(queries: np.ndarray, targets: np.ndarray) -> object:
    """Search by FAISS's flat index, in float32."""
    faiss.omp_set_num_threads(2)
    return faiss.knn(queries, targets, 2)


def by_cells(queries: np.ndarray, targets: np.ndarray, cells: int) -> object:
    """Search exactly with an index of this many cells."""
    return nearest(queries, build_index(targets, cells=cells), 1, threads=2)


# --- large problems --------------------------------------------------------------------------------------------------


def large(problem: Problem) -> None:
    """Time some cells against some target groups with one thread, and extrapolate to all cells and groups."""
    queries = problem.points[:: max(1, len(problem.points) // LARGE_QUERIES)]
    with threadpool_limits(1):
        begun = time.perf_counter()
        indexes = [build_index(problem.points[rows]) for rows in problem.groups[:LARGE_TARGETS]]
        building = (time.perf_counter() - begun) / LARGE_TARGETS
        begun = time.perf_counter()
        for index in indexes:
            nearest(queries, index, 1)
        each = (time.perf_counter() - begun) / LARGE_TARGETS / len(queries)
        whole = len(problem.groups) * building + problem.matches * each
        print(
            f"\n{problem.name}, one thread: {1 / each:,.0f} matches/s after {building:.2f} s a group for its index; every "
            f"cell in every group: {whole / 60:.1f} processor-minutes, files apart (load {os.getloadavg()[0]:.1f})"
        )


def stage(points: np.ndarray, groups: int) -> None:
    """Run the stage on a local Ray, every group against every group, and print the time of its parts."""
    cells = len(points) // groups
    spans = [(code * cells, (code + 1) * cells) for code in range(groups)]
    made = tuple(Group(code, f"d{code}|c", code % 2, code, (code,), *span) for code, span in enumerate(spans))
    names = tuple(f"d{code}" for code in range(groups))
    design = Design("condition", ("donor",), ("control", "treated"), (names,), names, made)
    settings = Settings.build(overrides={"match.edges": "all"})
    with tempfile.TemporaryDirectory() as folder, choose_runtime(settings.run) as runtime:
        run = RunDirectory.at(folder)
        write_array(run.storage / keys.EMBEDDING, keys.PCA, points[: groups * cells], chunks=(4096, DIMS))
        list(runtime.map(abs, range(runtime.cpus), title="start"))
        begun = time.perf_counter()
        run_match(run, settings, design, runtime, "benchmark")
        seconds = time.perf_counter() - begun
        size = sum(run.storage.list(keys.MATCHES).values())
    print(
        f"\nthe stage: {groups} groups of {cells} cells, {groups**2} edges: {seconds:.1f} s on {runtime.cpus} tasks, "
        f"{groups**2 * cells / seconds:,.0f} matches/s with all files written ({size / 1e6:.0f} MB); "
        f"load {os.getloadavg()[0]:.1f}"
    )


if __name__ == "__main__":
    main()
