"""Harm a small job again and again; every round must end with the bits of an undisturbed run.

    python jobs/chaos.py --rounds 200 --seed 1 [--cells 500] [--folder DIR]
    python jobs/chaos.py --rounds 20 --seed 1 --ray [--faults raylet,trainer] [--stages train,effects]

A round begins from a run that has come as far as a stage drawn at random, half of which is done where it has several
shards, and does one of these to it: SIGKILL of the job at a random moment; with --ray also of a worker, a training
worker, or the raylet; a flipped byte, a cut or a lost file of what is done. The job must then end with the right bits,
or with one line that names the cause; and the same command, given once more (for a flipped byte: after the named chunk
was deleted), must end with the right bits. With --ray no process that a job has started may be alive, and none of its
segments of /dev/shm be left, two minutes after it; without, jobs run in forked processes, which takes a second each.
One line of JSON per round goes to standard output.
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
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
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
KILLS = ("job", "worker", "raylet", "trainer")
TITLES = {"worker": r"^ray::", "trainer": r"^ray::.*TrainWorker", "raylet": r"/raylet/raylet"}
"""What Ray's processes are called; a worker is any of its Python processes: a task's, a reader's, an actor's."""
PATIENCE_SECONDS = 300.0
RAY_SECONDS, FIT_SECONDS = 6.0, 20.0
"""What a job on Ray takes longer, at its start and for its training."""
LINGER_SECONDS = 120.0
"""How long a process of a job may outlive it."""
MARK = "NDREAMER_CHAOS"
"""Environment variable of a job and of all that it starts: whose a process is can be told when its parent is gone."""
CHUNK = re.compile(r"array '([^']+)', chunk \(([\d, ]+)\)")


@dataclass(frozen=True)
class Outcome:
    """What a round did and how it ended."""

    round: int
    stage: str
    fault: str
    struck: str  # what was killed, or which file was harmed; empty if there was nothing any more
    code: int  # how the harmed job ended: 0, 2 after a refusal, -9 after a kill
    said: str
    seconds: float
    lingered: float  # seconds that processes of a job on Ray were alive after it, at most


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
    faults: Sequence[str] = ()
    stages: Sequence[str] = ()
    _ends: list[Future[float]] = field(default_factory=list)
    _begun: int = 0

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
        self._watchers = ThreadPoolExecutor()

    def compare(self, run: Path) -> None:
        """Fail where a value of a finished run differs from the undisturbed one's by a bit."""
        for store, expected in self.expected.items():
            found = arrays(run / store)
            assert found.keys() == expected.keys(), store
            for name, values in expected.items():
                same = np.array_equal(values, found[name], equal_nan=values.dtype.kind == "f")
                assert same, f"{store}/{name} differs{self._how(run, values, found[name])}"

    def _how(self, run: Path, expected: np.ndarray, found: np.ndarray) -> str:
        """Say how an array differs: the weights, or what was made with them."""
        weights = (run / keys.MODEL_WEIGHTS).read_bytes() == (self.reference / keys.MODEL_WEIGHTS).read_bytes()
        model = f"the weights are {'the same' if weights else 'others'}"
        if expected.shape != found.shape:
            return f" in shape: {expected.shape} and {found.shape}; {model}"
        rows = np.flatnonzero((expected != found).reshape(len(expected), -1).any(axis=1))
        return f" in {len(rows)} of {len(expected)} rows, {rows[:3]} first; {model}"

    def begun(self, run: Path, *, serial: bool) -> Any:
        """Start a job on a run directory."""
        self._said = run.with_suffix(".said")
        if serial:
            process = self._processes.Process(target=job, args=(str(self.cohort), str(run), JOB, str(self._said)))
            process.start()
            return process
        settings = {name: value for name, value in JOB.items() if name != "run.serial"}
        words = run_words(self.cohort, run, settings | {"run.cpus": 2, "run.object_store_gb": 0.1})
        self._begun += 1
        env = os.environ | {"RAY_worker_niceness": "0", MARK: f"{self.folder}/{self._begun}/"}
        with self._said.open("w") as log:
            command = [sys.executable, "-m", "ndreamer_dist.cli", *words]
            return subprocess.Popen(command, stdout=log, stderr=log, env=env)

    def ended(self, process: Any) -> tuple[int, str]:
        """Wait for a job; return its exit code and the last line that it said."""
        if isinstance(process, subprocess.Popen):
            code = process.wait(PATIENCE_SECONDS)
            self._ends.append(self._watchers.submit(lingering, f"{self.folder}/{self._begun}/"))
        else:
            process.join(PATIENCE_SECONDS)
            assert process.exitcode is not None, "a job hangs"
            code = process.exitcode
        said = self._said.read_text()
        assert "Traceback" not in said, said
        last = (said.strip().splitlines() or [""])[-1]
        assert code != 2 or last.startswith("error: "), said
        return code, last

    def as_far_as(self, stage: str, run: Path, draw: random.Random) -> None:
        """Make a run that has done all stages before one, which is half done where it has several shards."""
        shutil.copytree(self.reference, run)
        later = keys.STAGES[keys.STAGES.index(stage) :]
        for name in later:
            done = sorted((run / keys.DONE / name).iterdir())
            for marker in draw.sample(done, (len(done) + 1) // 2) if name == stage else done:
                marker.unlink()
        if keys.STAGE_TRAIN in later:
            shutil.rmtree(run / keys.TRAIN_DIR)
            shutil.rmtree(run / "model")
        (run / keys.RESULTS / "zarr.json").unlink()

    def play(self, number: int, draw: random.Random) -> Outcome:
        """Play one round; an `AssertionError` says what was not as it must be."""
        started, run, segments = time.monotonic(), self.folder / f"round{number}", shared_segments()
        kills = KILLS if self.on_ray else KILLS[:1]
        faults = [*kills, *kills, *HARMS]
        fault = draw.choice([name for name in faults if name in (self.faults or faults)])
        # Before the packing there is nothing that could be damaged.
        stages = [keys.STAGE_TRAIN] if fault == "trainer" else keys.STAGES if fault in kills else keys.STAGES[2:]
        stage = draw.choice([name for name in stages if name in (self.stages or stages)] or stages)
        self.as_far_as(stage, run, draw)
        harm = self._killed if fault in kills else self._damaged
        code, said, struck = harm(run, stage, fault, draw)
        if code != 0:
            again, told = self.ended(self.begun(run, serial=not self.on_ray))
            assert again == 0, told
        self.compare(run)
        shutil.rmtree(run)
        seconds, lingered = time.monotonic() - started, max((end.result() for end in self._ends), default=0.0)
        self._ends.clear()
        left = {name for name in shared_segments() - segments if self.on_ray and not is_open(name)}
        assert not left, f"left in /dev/shm: {left}"
        return Outcome(number, stage, fault, struck, code, said, round(seconds, 1), round(lingered, 1))

    def _killed(self, run: Path, stage: str, fault: str, draw: random.Random) -> tuple[int, str, str]:
        """Start the job, and kill it or a process of it at a random moment of its first seconds of work."""
        process = self.begun(run, serial=not self.on_ray)
        wait_while(lambda: f'"pid": {process.pid}' not in _text(run / keys.LOCK) and _alive(process))
        span = self.seconds[stage] * 1.5 + 0.2
        if self.on_ray and fault != "worker":
            span += RAY_SECONDS + (FIT_SECONDS if stage == keys.STAGE_TRAIN else 0)
        victims = {process.pid: "job"}
        if fault != "job":
            wait_while(lambda: not titled(process.pid, fault) and _alive(process))
            time.sleep(draw.uniform(0, span))
            victims = titled(process.pid, fault)
        else:
            time.sleep(draw.uniform(0, span))
        victim = draw.choice(sorted(victims)) if victims else None
        if victim is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(victim, signal.SIGKILL)
        code, said = self.ended(process)
        assert code in (0, 2, -signal.SIGKILL), said
        finished = (run / keys.RESULTS / "zarr.json").exists()
        assert finished or code != 0
        if finished and code != 0:
            self.compare(run)
        return code, said, victims.get(victim, "")

    def _damaged(self, run: Path, stage: str, fault: str, draw: random.Random) -> tuple[int, str, str]:
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
        return code, said, str(file.relative_to(run))

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


def wait_while(condition: Callable[[], bool]) -> None:
    """Wait until something is not so any more; an `AssertionError` where that takes too long."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def titled(job: int, fault: str) -> dict[int, str]:
    """Return the processes that a job has started and a fault is for: number and title."""
    from ndreamer_dist.metering import _descendants

    titles = {pid: _text(Path(f"/proc/{pid}/cmdline")).replace("\0", " ").strip() for pid in _descendants(job)}
    return {pid: title[:80] for pid, title in titles.items() if re.search(TITLES[fault], title)}


def marked(mark: str) -> dict[int, str]:
    """Return the living processes that a job has started, whoever their parent is by now: number and title."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended
            if f"{MARK}={mark}".encode() in (process / "environ").read_bytes():
                found[int(process.name)] = (process / "cmdline").read_text().replace("\0", " ")[:80]
    return found


def lingering(mark: str) -> float:
    """Return the seconds from now until no process of a job is alive; an `AssertionError` where they are too many."""
    started = time.monotonic()
    while left := marked(mark):
        assert time.monotonic() - started < LINGER_SECONDS, f"alive {LINGER_SECONDS:.0f} s after the job: {left}"
        time.sleep(0.2)
    return time.monotonic() - started


def shared_segments() -> set[str]:
    """Return the names of shared memory."""
    return {path.name for path in Path("/dev/shm").iterdir()}


def is_open(segment: str) -> bool:
    """Return whether a living process has a segment of shared memory mapped: another job's."""
    return any(f"/dev/shm/{segment}" in _text(maps) for maps in Path("/proc").glob("[0-9]*/maps"))


def main() -> None:
    """Play the rounds and say how many were survived."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cells", type=int, default=500)
    parser.add_argument("--ray", action="store_true")
    parser.add_argument("--faults", default="", help="only these, separated by commas: job, worker, raylet, flip, ...")
    parser.add_argument("--stages", default="", help="only at these, separated by commas")
    parser.add_argument("--folder", type=Path, default=None)
    asked = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="nd-chaos-", dir=asked.folder))
    faults, stages = ([word for word in words.split(",") if word] for words in (asked.faults, asked.stages))
    chaos = Chaos(folder, asked.cells, asked.ray, faults, stages)
    lingered = 0.0
    for number in range(asked.rounds):
        outcome = chaos.play(number, random.Random(f"{asked.seed} {number}"))
        lingered = max(lingered, outcome.lingered)
        print(json.dumps(asdict(outcome)), flush=True)
    told = {"rounds survived": asked.rounds, "seed": asked.seed, "ray": asked.ray, "lingered at most": lingered}
    print(json.dumps(told))
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
