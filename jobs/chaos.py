"""Harm a small job again and again; every round must end with the bits of an undisturbed run.

    python jobs/chaos.py --rounds 200 --seed 1 [--cells 500] [--ray] [--folder DIR]

A round begins from a run that has come as far as a stage drawn at random, and does one of these to it: SIGKILL of the job
at a random moment; with --ray also of a task's worker, a training worker, or the raylet; a flipped byte, a cut or a lost
file of what is done. The job must then end with the right bits, or with one line that names the cause; and the same
command, given once more (for a flipped byte: after the named chunk was deleted), must end with the right bits. Without
--ray jobs run in forked processes, which takes a second each. One line of JSON per round goes to standard output.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from ndreamer_dist import keys  # noqa: E402
from ndreamer_dist.errors import StoreError  # noqa: E402
from tests.tiny import SETTINGS, STORES, arrays, run_words, tiny_cohort  # noqa: E402

JOB: dict[str, Any] = SETTINGS | {
    "pack.block_rows": 128, "embed.tile_rows": 64, "cohort.min_group_cells": 5, "train.epochs": 6, "train.checkpoint_steps": 2,
}  # fmt: skip
STORE_OF = {
    keys.STAGE_PACK: keys.PACKED, keys.STAGE_CLUSTERS: keys.PACKED, keys.STAGE_EMBED: keys.EMBEDDING,
    keys.STAGE_PCA: keys.EMBEDDING, keys.STAGE_MATCH: keys.MATCHES, keys.STAGE_EFFECTS: keys.RESULTS,
}  # fmt: skip
PATIENCE_SECONDS = 300.0
CHUNK = re.compile(r"array '([^']+)', chunk \(([\d, ]+)\)")


@dataclass(frozen=True)
class Outcome:
    """What a round did and how it ended."""

    round: int
    stage: str
    fault: str
    code: int  # how the harmed job ended: 0, 2 after a refusal, -9 after a kill
    said: str
    seconds: float


def job(cohort: str, out: str, settings: dict[str, Any], said: str) -> None:
    """Run the job as the command line does, in a process of its own."""
    from ndreamer_dist import cli

    with open(said, "w") as log:  # noqa: PTH123
        os.dup2(log.fileno(), 2)
        os.dup2(log.fileno(), 1)
    cli.main(run_words(Path(cohort), Path(out), settings))


@dataclass
class Chaos:
    """A cohort, an undisturbed run of it, and where rounds are played."""

    folder: Path
    cells: int = 500
    on_ray: bool = False

    def __post_init__(self) -> None:
        self.cohort = tiny_cohort(self.folder, cells=self.cells, batches=2)
        self.reference = self.folder / "reference"
        self._processes = multiprocessing.get_context("forkserver")
        self._processes.set_forkserver_preload(["ndreamer_dist.pipeline", "ndreamer_dist.cli", "scanpy", "tests.tiny"])
        code, said = self.ended(self.begun(self.reference, serial=True))
        assert code == 0, said
        lines = [json.loads(line) for line in (self.reference / keys.STAGES_LOG).read_text().splitlines()]
        self.seconds = {line["stage"]: line["seconds"] for line in lines}
        self.expected = {store: arrays(self.reference / store) for store in STORES}

    def compare(self, run: Path) -> None:
        """Fail where a value of a finished run differs from the undisturbed one's by a bit."""
        for store, expected in self.expected.items():
            found = arrays(run / store)
            assert found.keys() == expected.keys(), store
            for name, values in expected.items():
                same = np.array_equal(values, found[name], equal_nan=values.dtype.kind == "f")
                assert same, f"{store}/{name} differs"

    def begun(self, run: Path, *, serial: bool) -> Any:
        """Start a job on a run directory."""
        self._said = run.with_suffix(".said")
        if serial:
            process = self._processes.Process(target=job, args=(str(self.cohort), str(run), JOB, str(self._said)))
            process.start()
            return process
        settings = {name: value for name, value in JOB.items() if name != "run.serial"}
        words = run_words(self.cohort, run, settings | {"run.cpus": 2, "run.object_store_gb": 0.1})
        with self._said.open("w") as log:
            command = [sys.executable, "-m", "ndreamer_dist.cli", *words]
            return subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"RAY_worker_niceness": "0"})

    def ended(self, process: Any) -> tuple[int, str]:
        """Wait for a job; return its exit code and the last line that it said."""
        if isinstance(process, subprocess.Popen):
            code = process.wait(PATIENCE_SECONDS)
        else:
            process.join(PATIENCE_SECONDS)
            assert process.exitcode is not None, "a job hangs"
            code = process.exitcode
        said = self._said.read_text()
        assert "Traceback" not in said, said
        return code, (said.strip().splitlines() or [""])[-1]

    def as_far_as(self, stage: str, run: Path) -> None:
        """Make a run that has done all stages before one, which is half done where it has several shards."""
        shutil.copytree(self.reference, run)
        later = keys.STAGES[keys.STAGES.index(stage) :]
        for name in later:
            shutil.rmtree(run / keys.DONE / name)
        if keys.STAGE_TRAIN in later:
            shutil.rmtree(run / keys.TRAIN_DIR)
            shutil.rmtree(run / "model")
        (run / keys.RESULTS / "zarr.json").unlink()

    def play(self, number: int, draw: random.Random) -> Outcome:
        """Play one round; an `AssertionError` says what was not as it must be."""
        started, run = time.monotonic(), self.folder / f"round{number}"
        kills: list[str] = ["job", *(["worker", "raylet", "trainer"] if self.on_ray else [])]
        fault = draw.choice([*kills, *kills, "flip", "cut", "lose"])
        # Before the packing there is nothing that could be damaged.
        stage = draw.choice(keys.STAGES if fault in kills else keys.STAGES[2:])
        stage = keys.STAGE_TRAIN if fault == "trainer" else stage
        self.as_far_as(stage, run)
        if fault in kills:
            code, said = self._killed(run, stage, fault, draw)
        else:
            code, said = self._damaged(run, stage, fault, draw)
        if code != 0:
            again, told = self.ended(self.begun(run, serial=not self.on_ray))
            assert again == 0, told
        self.compare(run)
        shutil.rmtree(run)
        return Outcome(number, stage, fault, code, said, round(time.monotonic() - started, 1))

    def _killed(self, run: Path, stage: str, fault: str, draw: random.Random) -> tuple[int, str]:
        """Start the job, and kill it or a process of it at a random moment of its first seconds of work."""
        process = self.begun(run, serial=not self.on_ray)
        deadline = time.monotonic() + PATIENCE_SECONDS
        while f'"pid": {process.pid}' not in _text(run / keys.LOCK) and _alive(process):
            assert time.monotonic() < deadline
            time.sleep(0.001)
        moment = draw.uniform(0, self.seconds[stage] * 1.5 + 0.2)
        if self.on_ray:
            moment += draw.uniform(0, 6)
        time.sleep(moment)
        if victim := process.pid if fault == "job" else _victim(process.pid, fault, draw):
            os.kill(victim, signal.SIGKILL)
        code, said = self.ended(process)
        assert code in (0, 2, -signal.SIGKILL), said
        finished = (run / keys.RESULTS / "zarr.json").exists()
        assert finished or code != 0
        if finished and code != 0:
            self.compare(run)
        return code, said

    def _damaged(self, run: Path, stage: str, fault: str, draw: random.Random) -> tuple[int, str]:
        """Harm a file of what is done before a stage, and run the job."""
        before = keys.STAGES[: keys.STAGES.index(stage)]
        stores = sorted({STORE_OF[name] for name in before if name in STORE_OF})
        files = sorted(p for p in (run / draw.choice(stores)).rglob("*") if p.is_file() and "/c/" in str(p))
        file = draw.choice(files)
        HARMS[fault](file, draw)
        code, said = self.ended(self.begun(run, serial=not self.on_ray))
        assert code in (0, 2), said
        if code == 2:
            named = CHUNK.search(said)
            assert named, said
            place = "/".join(named[2].replace(" ", "").rstrip(",").split(","))
            assert str(file).endswith(f"{named[1]}/c/{place}"), (str(file), said)
            file.unlink()
        else:  # it was made again, or is not needed any more
            self._restore_unread(run, file)
        return code, said

    def _restore_unread(self, run: Path, file: Path) -> None:
        """Show that a reader names a flipped byte in what no later stage reads, and make the file anew."""
        kept = self.reference / file.relative_to(run)
        if kept.read_bytes() == file.read_bytes():
            return
        with contextlib.suppress(StoreError):
            arrays(next(parent for parent in file.parents if parent.suffix == ".zarr"))
            return  # other bytes, the same values
        file.unlink()
        code, said = self.ended(self.begun(run, serial=not self.on_ray))
        assert code == 0, said


def _flip(file: Path, draw: random.Random) -> None:
    data = bytearray(file.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    file.write_bytes(data)


def _cut(file: Path, draw: random.Random) -> None:
    file.write_bytes(file.read_bytes()[: draw.randrange(file.stat().st_size)])


HARMS: dict[str, Callable[[Path, random.Random], object]] = {
    "flip": _flip, "cut": _cut, "lose": lambda file, _: file.unlink(),
}  # fmt: skip


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _alive(process: Any) -> bool:
    return (process.poll() if isinstance(process, subprocess.Popen) else process.exitcode) is None


def _victim(job: int, fault: str, draw: random.Random) -> int | None:
    """Return a process that a job has started: a worker of Ray, a training worker, or the raylet; none if there is none."""
    from ndreamer_dist.metering import _descendants

    wanted = {"worker": r"^ray::", "trainer": r"^ray::.*TrainWorker", "raylet": r"/raylet/raylet"}[fault]
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        found = [pid for pid in _descendants(job) if re.search(wanted, _text(Path(f"/proc/{pid}/cmdline")))]
        if found:
            return draw.choice(sorted(found))
        if not Path(f"/proc/{job}").exists():
            return None
        time.sleep(0.05)
    return None


def main() -> None:
    """Play the rounds and say how many were survived."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cells", type=int, default=500)
    parser.add_argument("--ray", action="store_true")
    parser.add_argument("--folder", type=Path, default=None)
    asked = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="nd-chaos-", dir=asked.folder))
    chaos = Chaos(folder, asked.cells, asked.ray)
    for number in range(asked.rounds):
        print(json.dumps(asdict(chaos.play(number, random.Random(f"{asked.seed} {number}")))), flush=True)
    print(json.dumps({"rounds survived": asked.rounds, "seed": asked.seed, "ray": asked.ray}))
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
