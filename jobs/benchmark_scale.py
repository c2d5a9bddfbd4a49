"""Measure the whole job for growing cohorts: wall time, peak memory, bytes read and written, per stage.

    python jobs/benchmark_scale.py --out /tmp/scale [--cells 50000 100000 200000 400000] [--genes 20000] [--donors 80]
        [--preset small] [--cpus 2] [--set stage.name=value] [--keep]

For each size a nested case-control cohort is simulated (timed separately), and the job runs on it in its own process, like
`ndreamer-dist run`, on a local Ray. The figures are those that the job logs (`compute/monitors.py`): memory is the sum over all
its processes, with shared memory counted once; bytes are those of all read and write calls, including pipes and sockets.
`ndreamer-dist info OUT/<cells>/run` prints the table of a running job. OUT/scale.csv gets each finished size, and an interrupted
call continues: finished sizes and stages are not run again. The last table shows how memory and time per cell grow from one
size to the next.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd

import ndreamer_dist as nd
from ndreamer_dist.compute.monitors import stage_costs
from ndreamer_dist.storage.files import open_storage

FILE = "scale.csv"


def main() -> None:
    """Run every size that is not finished and print the tables."""
    given = arguments()
    given.out.mkdir(parents=True, exist_ok=True)
    for cells in given.cells:
        if cells not in set(written(given.out)["cells"]):
            table = pd.concat([written(given.out), of_size(given, cells)], ignore_index=True)
            table.to_csv(given.out / FILE, index=False)
            clean(given, cells)
    whole = written(given.out)
    print(markdown(whole))
    print(growth(whole[whole["cells"].isin(given.cells)]))


def written(out: Path) -> pd.DataFrame:
    """Return the stages of the finished sizes."""
    return pd.read_csv(out / FILE) if (out / FILE).exists() else pd.DataFrame({"cells": pd.Series(dtype="int64")})


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cells", type=int, nargs="+", default=[50_000, 100_000, 200_000, 400_000])
    parser.add_argument("--genes", type=int, default=20_000)
    parser.add_argument("--donors", type=int, default=80)
    parser.add_argument("--preset", default="small")
    parser.add_argument("--cpus", type=int, default=2)
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="STAGE.NAME=VALUE")
    parser.add_argument("--keep", action="store_true", help="leave cohorts and runs where they are")
    return parser.parse_args()


def of_size(given: argparse.Namespace, cells: int) -> pd.DataFrame:
    """Simulate a cohort and run the job on it; return a row per stage."""
    folder = given.out / str(cells)
    cohort, run = folder / "cohort.zarr", folder / "run"
    started = time.perf_counter()
    if not (cohort / "zarr.json").exists():
        nd.simulate(cohort, cells=cells, genes=given.genes, batches=given.donors, design="nested", threads=given.cpus)
        print(f"{cells} cells simulated in {time.perf_counter() - started:.0f} s", flush=True)
    run_job(given, cohort, run)
    table = stage_costs(open_storage(run)).assign(cells=cells)
    print(markdown(table), flush=True)
    return table


def clean(given: argparse.Namespace, cells: int) -> None:
    """Delete the files of a size."""
    if not given.keep:
        shutil.rmtree(given.out / str(cells))


def run_job(given: argparse.Namespace, cohort: Path, run: Path) -> None:
    """Run the job in a new process."""
    command = [
        sys.executable, "-m", "ndreamer_dist.cli", "run", str(cohort), "--out", str(run), "--condition-key", "condition",
        "--control", "control", "--batch-key", "donor", "--preset", given.preset, "--set", f"run.cpus={given.cpus}",
        "--set", "run.serial=false",
        *(word for setting in given.settings for word in ("--set", setting)),
    ]  # fmt: skip
    ended = subprocess.run(command, check=False)
    if ended.returncode:
        raise SystemExit(ended.returncode)


def markdown(table: pd.DataFrame) -> str:
    """Return the stage table, a line per size and stage, and the whole job's line."""
    lines = ["| cells | stage | s | peak GB | promised GB | read GB | written GB |", "|---|---|---|---|---|---|---|"]
    for cells, part in table.groupby("cells", sort=False):
        rows = [(r.stage, r.seconds, r.peak_gb, r.promised_gb, r.read_gb, r.written_gb) for r in part.itertuples()]
        sums, most = part.sum(numeric_only=True), part.max(numeric_only=True)
        rows.append(("**all**", sums.seconds, most.peak_gb, most.promised_gb, sums.read_gb, sums.written_gb))
        lines += [
            f"| {cells:,} | {stage} | {seconds:.0f} | " + " | ".join(f"{value:.1f}" for value in gigabytes) + " |"
            for stage, seconds, *gigabytes in rows
        ]
    return "\n".join(lines)


def growth(table: pd.DataFrame) -> str:
    """Return how memory and time per cell changed from each size to the next."""
    whole = table.groupby("cells").agg(seconds=("seconds", "sum"), peak=("peak_gb", "max"))
    per_cell = whole["seconds"] / whole.index
    lines = []
    for before, after in zip(whole.index[:-1], whole.index[1:], strict=True):
        memory = whole["peak"][after] / whole["peak"][before] - 1
        slower = per_cell[after] / per_cell[before] - 1
        lines.append(f"{before:,} to {after:,} cells: peak memory {memory:+.0%}, time per cell {slower:+.0%}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
