"""What the whole job takes as the cohort grows: per stage wall time, peak memory, bytes read and written.

    python jobs/benchmark_scale.py --out /tmp/scale [--cells 50000 100000 200000 400000] [--genes 20000] [--donors 80]
        [--preset small] [--cpus 2] [--set stage.name=value] [--keep]

Of each size a nested case-control cohort is simulated (its time told apart) and the job runs on it in a process of its
own, as `ndreamer-dist run` does, on a local Ray. Memory is the sum over all its processes, shared memory counted once,
sampled all along; bytes are those that passed the processes' read and write calls, pipes and sockets among them. An
interrupted call goes on: finished stages keep their figures. Lines are appended to OUT/scale.csv as sizes end, and the
table of a run that is under way is printed by `ndreamer-dist info OUT/<cells>/run`. At the end: how memory and time per
cell grow from the size before. `--cells 1000000` is the million.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

import ndreamer_dist as nd
from ndreamer_dist import keys
from ndreamer_dist.metering import tree_memory

INTERVAL_SECONDS = 0.5


def main() -> None:
    """Run every size and print the tables."""
    given = arguments()
    given.out.mkdir(parents=True, exist_ok=True)
    tables = [of_size(given, cells) for cells in given.cells]
    whole = pd.concat(tables, ignore_index=True)
    whole.to_csv(given.out / "scale.csv", index=False)
    print(markdown(whole))
    print(growth(whole))


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
    watched = run_job(given, cohort, run)
    table = stage_table(run, watched).assign(cells=cells)
    promised = nd.plan(
        cohort, out=run, condition_key="condition", control="control", batch_key="donor", preset=given.preset,
        settings={"run.cpus": given.cpus},
    )  # fmt: skip
    table["promised_gb"] = [{s.name: s.memory / 1e9 for s in promised.stages}[stage] for stage in table["stage"]]
    print(markdown(table), flush=True)
    if not given.keep:
        subprocess.run(["rm", "-rf", str(folder)], check=True)
    return table


@dataclass(frozen=True)
class Watched:
    """What the sampler saw: (seconds since the epoch, bytes held, bytes read, bytes written)."""

    samples: list[tuple[float, int, int, int]]

    def between(self, start: float, stop: float) -> tuple[int, int, int]:
        """Return peak memory, bytes read and bytes written in a span of time; zeros where nothing was seen of it."""
        inside = [sample for sample in self.samples if start <= sample[0] <= stop]
        if not inside:
            return 0, 0, 0
        return max(s[1] for s in inside), inside[-1][2] - inside[0][2], inside[-1][3] - inside[0][3]


def run_job(given: argparse.Namespace, cohort: Path, run: Path) -> Watched:
    """Run the job in a process of its own and watch its process tree."""
    command = [
        sys.executable, "-m", "ndreamer_dist.cli", "run", str(cohort), "--out", str(run), "--condition-key", "condition",
        "--control", "control", "--batch-key", "donor", "--preset", given.preset, "--set", f"run.cpus={given.cpus}",
        *(word for setting in given.settings for word in ("--set", setting)),
    ]  # fmt: skip
    process = subprocess.Popen(command)
    samples: list[tuple[float, int, int, int]] = []
    seen: dict[int, tuple[int, int]] = {}
    stop = threading.Event()

    def sample() -> None:
        while not stop.wait(INTERVAL_SECONDS):
            seen.update(io_of_tree(process.pid))
            read, written = (sum(values) for values in zip(*seen.values(), strict=True)) if seen else (0, 0)
            samples.append((time.time(), tree_memory(process.pid), read, written))

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    code = process.wait()
    stop.set()
    thread.join()
    if code:
        raise SystemExit(code)
    return Watched(samples)


def io_of_tree(pid: int) -> dict[int, tuple[int, int]]:
    """Return bytes read and written so far by a process and by each of its descendants that is alive."""
    found: dict[int, tuple[int, int]] = {}
    waiting = [pid]
    while waiting:
        process = waiting.pop()
        try:
            lines = dict(line.split(": ") for line in Path(f"/proc/{process}/io").read_text().splitlines())
            tasks = list(Path(f"/proc/{process}/task").iterdir())
            waiting += [int(child) for task in tasks for child in (task / "children").read_text().split()]
        except OSError:
            continue  # it has ended
        found[process] = int(lines["rchar"]), int(lines["wchar"])
    return found


def stage_table(run: Path, watched: Watched) -> pd.DataFrame:
    """Return a row per stage from the run's own log and from what was watched.

    A call that finds a stage finished logs it with next to no time, so the longest line of a stage is its own.
    """
    lines = [json.loads(line) for line in (run / keys.STAGES_LOG).read_text().splitlines()]
    rows = []
    for stage in keys.STAGES:
        line = max((line for line in lines if line["stage"] == stage), key=lambda line: line["seconds"])
        peak, read, written = watched.between(line["started"], line["started"] + line["seconds"])
        rows.append(
            {
                "stage": stage, "seconds": line["seconds"], "peak_gb": max(peak, line["peak_bytes"]) / 1e9,
                "read_gb": read / 1e9, "written_gb": written / 1e9,
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


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
