"""Test and time the package on the GPUs of this machine with one command.

    python jobs/gpu_check.py [--cells 40000] [--preset paper] [--steps 300] [--match 1378211/89] [--no-tests]

It tests torch and FAISS on a GPU as a run does, runs the tests that need a GPU, runs the whole job on a simulated cohort with
and without CUDA graphs, runs the match stage with all its files by plain distances and by distances corrected for hubs, and
trains with two workers if there are two GPUs. The output is a table of measurements beside the figures computed for one H200
(docs/scaling.md). Without a working GPU everything runs on processors, and the table says so. With the defaults it takes about
ten minutes on a GPU.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

import ndreamer_dist as nd
from ndreamer_dist import keys
from ndreamer_dist.cohort.design import Design, Group
from ndreamer_dist.compute.engines import engines_here, tried_apart
from ndreamer_dist.compute.engines import torch_finding as by_torch
from ndreamer_dist.compute.executor import choose_runtime
from ndreamer_dist.compute.monitors import metered, stage_costs
from ndreamer_dist.matching.gpu import faiss_finding as by_faiss
from ndreamer_dist.matching.stage import run_match
from ndreamer_dist.rundir.directory import RunDirectory
from ndreamer_dist.settings import Settings
from ndreamer_dist.storage.arrays import write_array
from ndreamer_dist.storage.files import Storage

DIMS = 50
WARM_UP = 20
"""First steps, which load code and choose kernels, and are not timed."""


@dataclass(frozen=True)
class Line:
    """A line of the table."""

    what: str
    counted: str
    measured: str


def main() -> None:
    """Run the checks, and print the table."""
    given = arguments()
    lines = [Line("here", "", engines_here())]
    lines += [Line(f"{name} on a GPU", "works", tried_apart(finding) or "works") for name, finding in TRIALS.items()]
    if not given.no_tests:
        lines.append(Line("tests that need a GPU", "passed", tests()))
    with tempfile.TemporaryDirectory() as folder:
        nd.simulate(f"{folder}/cohort.zarr", cells=given.cells, genes=given.genes, batches=4, seed=0)
        lines += trained(Path(folder), given, workers=1)
        if gpus() > 0:
            lines += trained(Path(folder), given, workers=1, graphs=False)[:1]
        if gpus() > 1:
            lines += trained(Path(folder), given, workers=2)[:1]
    lines += [matched(*given.match, hubs) for hubs in COUNTED_MATCH]
    width = max(len(line.what) for line in lines)
    print(f"\n{'':<{width}}  {'counted (H200)':<28}measured")
    for line in lines:
        print(f"{line.what:<{width}}  {line.counted:<28}{line.measured}")


TRIALS = {"torch": by_torch, "FAISS": by_faiss}


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cells", type=int, default=40_000)
    parser.add_argument("--genes", type=int, default=4000)
    parser.add_argument("--preset", default="paper", choices=["paper", "small"])
    parser.add_argument("--steps", type=int, default=300, help="minimum number of training steps")
    parser.add_argument("--match", type=shape, default=(1_378_211, 89), metavar="CELLS/GROUPS")
    parser.add_argument("--no-tests", action="store_true")
    return parser.parse_args(words)


def shape(text: str) -> tuple[int, int]:
    """Read `cells/groups`."""
    cells, groups = text.split("/")
    return int(cells), int(groups)


def gpus() -> int:
    """Return the number of GPUs that torch sees."""
    import torch

    return torch.cuda.device_count()


def tests() -> str:
    """Run the tests that need a GPU, and return the last line that they print."""
    words = [sys.executable, "-m", "pytest", "-n", "0", "-q", "-m", "gpu"]
    said = subprocess.run(words, capture_output=True, text=True, cwd=Path(__file__).parent.parent, check=False).stdout
    return said.strip().splitlines()[-1]


def trained(folder: Path, given: argparse.Namespace, workers: int, *, graphs: bool = True) -> list[Line]:
    """Run the job on the simulated cohort; return the speed of training, and the device of every stage."""
    out = folder / f"run_{workers}_{graphs}"
    asked = {
        "train.workers": workers, "train.passes": 1, "train.epochs": -(-given.steps // 4), "run.serial": False,
        "train.graphs": graphs,
        "clusters.flavor": "igraph", "effects.store": (), "run.progress": False,
    }  # fmt: skip
    nd.run(
        folder / "cohort.zarr", out=out, condition_key="condition", control="control", batch_key="donor",
        preset=given.preset, settings=asked,
    )  # fmt: skip
    steps = pd.read_csv(out / keys.METRICS)
    steps = steps.iloc[min(WARM_UP, len(steps) // 2) :]
    costs = stage_costs(Storage(str(out))).set_index("stage")
    rate = f"{steps.cells_per_second.median():,.0f} cells/s, {1000 * steps.seconds.median():.1f} ms a step"
    waiting = f"{100 * np.average(steps.waiting, weights=steps.seconds):.0f} % of it for data"
    how = "" if workers > 1 or not gpus() else ", CUDA graph" if graphs else ", no graph"
    name = f"training, {workers} worker{'s' if workers > 1 else ''}, {given.preset}{how}"
    counted = "8 to 9 ms of work" if workers == 1 else "6 to 7 ms of work"
    lines = [Line(name, counted, f"{rate}, {waiting}, on {costs.engine['train']}")]
    return lines + [
        Line(f"  {stage} of the job", "", f"{costs.seconds[stage]:.1f} s on {costs.engine[stage]}")
        for stage in ("embed", "match")
    ]


COUNTED_MATCH = {"none": "15 to 25 s of 1 378 211/89", "csls": "30 to 40 s of 1 378 211/89"}
"""Time computed for one H200, by `match.hubs`."""


def matched(cells: int, groups: int, hubs: str) -> Line:
    """Run the match stage, every group against every group, with its files; return the time."""
    size = cells // groups
    points = np.random.default_rng(0).normal(size=(size * groups, DIMS)).astype(np.float32)
    made = tuple(
        Group(code, f"d{code}|c", code % 2, code, (code,), code * size, (code + 1) * size) for code in range(groups)
    )
    names = tuple(f"d{code}" for code in range(groups))
    design = Design("condition", ("donor",), ("control", "treated"), (names,), names, made)
    asked = {"match.edges": "all", "match.hubs": hubs, "run.serial": False, "run.progress": False}
    settings = Settings.build(overrides=asked)
    with tempfile.TemporaryDirectory() as folder, choose_runtime(settings.run) as runtime:
        run = RunDirectory.at(folder)
        write_array(run.storage / keys.EMBEDDING, keys.PCA, points, chunks=(4096, DIMS))
        begun = time.perf_counter()
        with metered(run.storage, keys.STAGE_MATCH, len(points)):
            run_match(run, settings, design, runtime, "check")
        seconds = time.perf_counter() - begun
        summary = json.loads(run.storage.read(keys.MATCH_SUMMARY))
        engine = stage_costs(run.storage).set_index("stage").engine[keys.STAGE_MATCH]
    what = f"matching, {len(points):,} cells in {groups} groups, all edges, hubs {hubs}"
    share = f"{summary['widened_share']:.2%} beyond the first candidates"
    return Line(what, COUNTED_MATCH[hubs], f"{seconds:.1f} s on {engine}, {share}")


if __name__ == "__main__":
    main()
