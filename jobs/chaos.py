"""Kill and damage a small job again and again; every round must end with the bits of an undisturbed run.

    python jobs/chaos.py --rounds 200 --seed 1 [--cells 500] [--folder DIR]
    python jobs/chaos.py --rounds 20 --seed 1 --ray [--faults raylet,trainer] [--stages train,effects]
    python jobs/chaos.py --rounds 10 --seed 1 --nodes 2

A round starts with a run whose stages before one stage are finished, and half of that stage if it has several shards. One fault
follows: SIGKILL of the job at a random moment; with --ray also of a worker, a training worker, or the raylet; or a flipped byte,
a truncation or the loss of a finished file (after the last stage, of the results). In every 16 rounds each stage meets a kill
and a damaged file, in an order that the seed draws. The job must then end with the right bits, or with one line that names the
cause; and the same command, given once more, must end with the right bits. `check` must find damage that no stage reads. Two
minutes after a job none of its processes may be alive, and none of its segments of /dev/shm may be left. Without Ray jobs run in
forked processes, which takes a second each; with --nodes they share a Ray of this many raylets of one processor and a head
without any, and lose one raylet at a time. Every round prints one line of JSON to standard output.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import multiprocessing
import multiprocessing.forkserver
import os
import random
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from ndreamer_dist import keys  # noqa: E402
from ndreamer_dist.cohort.graph import LIBRARIES  # noqa: E402
from ndreamer_dist.commands.verify import check  # noqa: E402
from ndreamer_dist.rundir.directory import ArrayFile  # noqa: E402
from tests.tiny import PROMPT, SETTINGS, STORES, arrays, run_words, tiny_cohort  # noqa: E402

JOB: dict[str, Any] = SETTINGS | {
    "pack.block_rows": 128, "embed.tile_rows": 64, "cohort.min_group_cells": 5, "train.epochs": 6, "train.checkpoint_steps": 2,
}  # fmt: skip
PRELOADED = (
    "ndreamer_dist.cli", "ndreamer_dist.pipeline", "ndreamer_dist.embedding.stage", "ndreamer_dist.training.trainer", *LIBRARIES,
)  # fmt: skip
"""Modules that the fork server loads once for all serial jobs."""
FINISHED = "finished"
"""Pseudo-stage after the last one, for damage to the results."""
KILLS = ("job", "worker", "raylet", "trainer")
TITLES = {"worker": r"^ray::", "trainer": r"^ray::.*TrainWorker", "raylet": r"/raylet/raylet"}
"""Patterns of the titles of Ray's processes; a worker is any Python process of a task, reader or actor."""
PATIENCE_SECONDS = 300.0
RAY_SECONDS, FIT_SECONDS = 6.0, 20.0
"""Additional seconds of a job on Ray, for its start and for its training."""
LINGER_SECONDS = 120.0
"""Maximum time that a process of a job may outlive it."""
MARK = "NDREAMER_CHAOS"
"""Environment variable of a job and of all processes that it starts, which identifies them after their parent is gone."""
OF_THE_NODE = re.compile(r"^ray::(?!IDLE|DashboardAgent|RuntimeEnvAgent|PlacementGroupCleaner|_[A-Z])")
"""Titles of processes of a shared Ray that work for a job; the others belong to a node."""
QUICK = {
    "health_check_initial_delay_ms": 1000, "health_check_period_ms": 500, "health_check_timeout_ms": 2000,
    "health_check_failure_threshold": 3,
}  # fmt: skip
"""Ray's health checks, so that a silent raylet is lost early; with Ray's defaults this takes 15 s and more."""
LOOPBACK_ALONE = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
HOLDER = """
import json, sys, threading, time
from ray.cluster_utils import Cluster

nodes = []

def bury():  # workers hold a raylet that was killed for alive until somebody has asked how it ended
    while True:
        for process in [each.process for node in list(nodes) for kind in node.all_processes.values() for each in kind]:
            process.poll()
        time.sleep(0.2)

threading.Thread(target=bury, daemon=True).start()
common = {"node_ip_address": "127.0.0.1", "object_store_memory": 90 * 2**20}
head = {"num_cpus": 0, "include_dashboard": False, "temp_dir": sys.argv[1], "_system_config": json.loads(sys.argv[2])}
cluster = Cluster(initialize_head=True, head_node_args=head | common)
print(cluster.address, flush=True)
for _ in sys.stdin:
    node = cluster.add_node(num_cpus=1, **common)
    nodes.append(node)
    print(node.all_processes["raylet"][0].process.pid, flush=True)
cluster.shutdown()
"""


@dataclass(frozen=True)
class Outcome:
    """The fault and the outcome of a round."""

    round: int
    stage: str
    fault: str
    struck: str  # the killed process or the damaged file; empty if there was none left
    code: int  # exit code of the disturbed job: 0, 2 after a refusal, -9 after a kill
    said: str
    seconds: float
    lingered: float  # maximum seconds that processes of a job on Ray were alive after it


def job(cohort: str, out: str, settings: dict[str, Any], said: str) -> None:
    """Run the job as the command line does, in a process of its own."""
    from ndreamer_dist import cli

    with open(said, "w") as log:  # noqa: PTH123
        os.dup2(log.fileno(), 2)
        os.dup2(log.fileno(), 1)
    cli.main(run_words(Path(cohort), Path(out), settings))


def cases(seed: int, kills: Sequence[str], faults: Sequence[str], stages: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield stage and fault of every round: in each deck of 16 every stage meets a kill and a damaged file, kinds in turn."""
    draw = random.Random(seed)
    turns = {kinds: itertools.cycle(kinds) for kinds in (tuple(kills), tuple(HARMS))}
    while True:
        deck = [
            (stage, next(turn))
            for turn, met in zip(turns.values(), (keys.STAGES, (*keys.STAGES[1:], FINISHED)), strict=True)
            for stage in draw.sample(met, len(met))
        ]
        # Only the train stage has training workers to kill.
        deck = [
            (stage, "worker" if fault == "trainer" and stage != keys.STAGE_TRAIN else fault) for stage, fault in deck
        ]
        for stage, fault in draw.sample(deck, len(deck)):
            if stage in (stages or (stage,)) and fault in (faults or (fault,)):
                yield stage, fault


class Nodes:
    """A Ray on this machine that jobs share: a head without processors, and raylets of one processor each.

    Processes of their own run it, since Ray reads only once, on import, whether a token is required.
    """

    def __init__(self, raylets: int, folder: Path, mark: str) -> None:
        token, self._mark = folder / "token", mark
        token.write_text(secrets.token_hex(32))
        self.env = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), **PROMPT}
        self.env[LOOPBACK_ALONE] = "0"  # else Ray puts the machine's own address in the place of 127.0.0.1
        self._home = tempfile.mkdtemp(prefix="nd-ray-")  # where no other Ray looks, and short enough for sockets
        self._holder = subprocess.Popen(
            [sys.executable, "-c", HOLDER, self._home, json.dumps(QUICK)], text=True, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, env=os.environ | self.env | {MARK: mark},
        )  # fmt: skip
        self.address = self._told()
        self._raylets = [self._started() for _ in range(raylets)]

    def _told(self) -> str:
        assert self._holder.stdout is not None
        return self._holder.stdout.readline().strip()

    def _started(self) -> int:
        """Start a raylet; return its process id."""
        assert self._holder.stdin is not None
        self._holder.stdin.write("\n")
        self._holder.stdin.flush()
        return int(self._told())

    def victims(self, fault: str) -> dict[int, str]:
        """Return id and title of the processes that a fault may kill. The head's raylet is not among them."""
        if fault == "raylet":
            return dict.fromkeys(self._raylets, "raylet")
        own = {pid: title for pid, title in marked(self._mark).items() if OF_THE_NODE.match(title)}
        return {pid: title for pid, title in own.items() if re.search(TITLES[fault], title)}

    def mend(self) -> None:
        """Start a raylet for each killed one."""
        alive = [pid for pid in self._raylets if pid in marked(self._mark)]
        self._raylets = alive + [self._started() for _ in range(len(self._raylets) - len(alive))]

    def close(self) -> None:
        """Stop Ray; raise an `AssertionError` if a process of it remains."""
        assert self._holder.stdin is not None
        self._holder.stdin.close()
        self._holder.wait(LINGER_SECONDS)
        lingering(lambda: marked(self._mark))
        shutil.rmtree(self._home)


@contextlib.contextmanager
def environment(name: str, value: str) -> Iterator[None]:
    """Set an environment variable for processes that are started in the block."""
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]


@dataclass
class Chaos:
    """A cohort, an undisturbed run of it, and the folder of the rounds."""

    folder: Path
    cells: int = 500
    on_ray: bool = False
    nodes: Nodes | None = None
    _ends: list[Future[float]] = field(default_factory=list)
    _begun: int = 0
    _own: set[int] = field(default_factory=set)
    _segments: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.cohort = tiny_cohort(self.folder, cells=self.cells, batches=2)
        self.reference = self.folder / "reference"
        self._processes = multiprocessing.get_context("forkserver")
        self._processes.set_forkserver_preload([*PRELOADED, "tests.tiny"])
        with environment(MARK, self._mark("serial")):
            multiprocessing.forkserver.ensure_running()
        first = self._processes.Process(target=int)
        first.start()
        first.join()  # the server is there for certain now, and with it its mark
        self._watchers = ThreadPoolExecutor()
        self._own = set(marked(self._mark("serial")))
        assert self._own, "what serial jobs leave could not be told: the server that forks them has no mark"
        code, said = self.ended(self.begun(self.reference, serial=True))
        assert code == 0, said
        lines = [json.loads(line) for line in (self.reference / keys.STAGES_LOG).read_text().splitlines()]
        self.seconds = {line["stage"]: line["seconds"] for line in lines}
        self.expected = {store: arrays(self.reference / store) for store in STORES}

    def _mark(self, job: object) -> str:
        """Return the mark of a job; a serial job has that of its fork server."""
        return f"{self.folder}/{job}/"

    def compare(self, run: Path) -> None:
        """Raise an `AssertionError` if a finished run differs from the undisturbed one by a bit."""
        for store, expected in self.expected.items():
            found = arrays(run / store)
            assert found.keys() == expected.keys(), store
            for name, values in expected.items():
                same = np.array_equal(values, found[name], equal_nan=values.dtype.kind == "f")
                assert same, f"{store}/{name} differs{self._how(run, values, found[name])}"

    def _how(self, run: Path, expected: np.ndarray, found: np.ndarray) -> str:
        """Describe how an array differs: the weights, or what was computed with them."""
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
        settings: dict[str, Any] = {name: value for name, value in JOB.items() if name != "run.serial"}
        where = (
            {"run.cpus": 2, "run.object_store_gb": 0.1} if self.nodes is None else {"run.address": self.nodes.address}
        )
        words = run_words(self.cohort, run, settings | where)
        self._begun += 1
        env = os.environ | PROMPT | {MARK: self._mark(self._begun)}
        env |= {} if self.nodes is None else self.nodes.env
        with self._said.open("w") as log:
            command = [sys.executable, "-m", "ndreamer_dist.cli", *words]
            return subprocess.Popen(command, stdout=log, stderr=log, env=env)

    def ended(self, process: Any) -> tuple[int, str]:
        """Wait for a job; return its exit code and its last line of output."""
        mark = self._mark(self._begun if isinstance(process, subprocess.Popen) else "serial")
        deadline = time.monotonic() + PATIENCE_SECONDS
        while _alive(process):
            assert time.monotonic() < deadline, "a job hangs"
            self._segments |= mapped(marked(mark))
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(1) if isinstance(process, subprocess.Popen) else process.join(1)
        code = process.returncode if isinstance(process, subprocess.Popen) else process.exitcode
        self._ends.append(self._watchers.submit(lingering, lambda: self._left(mark)))
        said = self._said.read_text()
        assert "Traceback" not in said, said
        last = (said.strip().splitlines() or [""])[-1]
        assert code != 2 or last.startswith("error: "), said
        return code, last

    def _left(self, mark: str) -> dict[int, str]:
        """Return id and title of the processes of a finished job that are still alive."""
        workers = {} if self.nodes is None else self.nodes.victims("worker")
        return {pid: title for pid, title in (marked(mark) | workers).items() if pid not in self._own}

    def as_far_as(self, stage: str, run: Path, draw: random.Random, *, trained: bool) -> None:
        """Make a run whose stages before one stage are finished, and half of that stage if it has several shards.

        Parameters
        ----------
        trained
            Whether unfinished training continues from its checkpoint.
        """
        shutil.copytree(self.reference, run)
        if stage == FINISHED:
            return
        later = keys.STAGES[keys.STAGES.index(stage) :]
        for name in later:
            done = sorted((run / keys.DONE / name).iterdir())
            for marker in draw.sample(done, (len(done) + 1) // 2) if name == stage else done:
                marker.unlink()
        if keys.STAGE_TRAIN in later:
            shutil.rmtree(run / keys.MODEL_DIR)
            if not (trained and stage == keys.STAGE_TRAIN):
                shutil.rmtree(run / keys.TRAIN_DIR)
        (run / keys.RESULTS / "zarr.json").unlink()

    def play(self, number: int, stage: str, fault: str, draw: random.Random) -> Outcome:
        """Play one round; an `AssertionError` says which expectation failed."""
        started, run = time.monotonic(), self.folder / f"round{number}"
        if self.nodes is not None:
            self.nodes.mend()
        self.as_far_as(stage, run, draw, trained=fault in HARMS)
        harm = self._damaged if fault in HARMS else self._killed
        code, said, struck = harm(run, stage, fault, draw)
        self.compare(run)
        shutil.rmtree(run)
        seconds, lingered = time.monotonic() - started, max((end.result() for end in self._ends), default=0.0)
        self._ends.clear()
        left = {name for name in self._segments & shared_segments() if not is_open(name)}
        assert not left, f"left in /dev/shm: {left}"
        return Outcome(number, stage, fault, struck, code, said, round(seconds, 1), round(lingered, 1))

    def _again(self, run: Path) -> None:
        """Run the same command once more; it must succeed."""
        code, said = self.ended(self.begun(run, serial=not self.on_ray))
        assert code == 0, said

    def _killed(self, run: Path, stage: str, fault: str, draw: random.Random) -> tuple[int, str, str]:
        """Start the job, and kill it or a process of it at a random moment of its first seconds of work."""
        process = self.begun(run, serial=not self.on_ray)
        wait_while(lambda: f'"pid": {process.pid}' not in _text(run / keys.LOCK) and _alive(process))
        span = self.seconds[stage] * 1.5 + 0.2
        if self.on_ray and fault != "worker":
            span += RAY_SECONDS + (FIT_SECONDS if stage == keys.STAGE_TRAIN else 0)
        victims = {process.pid: "job"}
        if fault != "job":
            wait_while(lambda: not self._victims(process.pid, fault) and _alive(process))
            time.sleep(draw.uniform(0, span))
            victims = self._victims(process.pid, fault)
        else:
            time.sleep(draw.uniform(0, span))
        victim = draw.choice(sorted(victims)) if victims else None
        if victim is not None:
            self._segments |= mapped([*victims])
            with contextlib.suppress(ProcessLookupError):
                os.kill(victim, signal.SIGKILL)
        code, said = self.ended(process)
        assert code in (0, 2, -signal.SIGKILL), said
        finished = (run / keys.RESULTS / "zarr.json").exists()
        assert finished or code != 0
        if finished and code != 0:
            self.compare(run)
        if code != 0:
            self._again(run)
        return code, said, victims.get(victim, "") if victim is not None else ""

    def _victims(self, job: int, fault: str) -> dict[int, str]:
        """Return the processes that a fault is for: number and title."""
        return titled(job, fault) if self.nodes is None else self.nodes.victims(fault)

    def _damaged(self, run: Path, stage: str, fault: str, draw: random.Random) -> tuple[int, str, str]:
        """Damage a file of the finished stages, and run the job."""
        file = draw.choice(self._made(run, stage, draw))
        HARMS[fault](file, draw)
        code, said = self.ended(self.begun(run, serial=not self.on_ray))
        assert code in (0, 2), said
        if code == 2:
            assert names(said, run, file), (str(file), said)
            assert said.endswith("the same command makes it again"), said
            self._again(run)
        # `check` must find damage that no stage reads.
        if check(run, mend=True, settings={"run.serial": True}).damage:
            self._again(run)
            assert not check(run, settings={"run.serial": True}).damage
        return code, said, str(file.relative_to(run))

    @staticmethod
    def _made(run: Path, stage: str, draw: random.Random) -> list[Path]:
        """Return the files of one kind that the earlier stages wrote."""
        kinds = {}
        tops = [top for top in keys.MADE if (stage == FINISHED) == (top == keys.RESULTS)]
        for top in [*tops, keys.TRAIN_DIR] if stage == keys.STAGE_TRAIN else tops:
            kinds[top] = sorted(path for path in (run / top).rglob("*") if path.is_file()) or [run / top]
        return kinds[draw.choice([top for top, files in kinds.items() if files[0].is_file()])]


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
    """Wait until a condition is false; raise an `AssertionError` if that takes too long."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def titled(job: int, fault: str) -> dict[int, str]:
    """Return id and title of the child processes of a job that a fault may kill."""
    from ndreamer_dist.compute.monitors import process_tree

    titles = {
        pid: _text(Path(f"/proc/{pid}/cmdline")).replace("\0", " ").strip()
        for pid in (process.pid for process in process_tree(job))
    }
    return {pid: title[:80] for pid, title in titles.items() if re.search(TITLES[fault], title)}


def marked(mark: str) -> dict[int, str]:
    """Return id and title of the living processes that a job has started, even if their parent has changed."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended
            if f"{MARK}={mark}".encode() in (process / "environ").read_bytes():
                found[int(process.name)] = (process / "cmdline").read_text().replace("\0", " ")[:80]
    return found


def lingering(left: Callable[[], dict[int, str]]) -> float:
    """Return the seconds until no process of a job is alive; raise an `AssertionError` after `LINGER_SECONDS`."""
    started = time.monotonic()
    while alive := left():
        assert time.monotonic() - started < LINGER_SECONDS, f"alive {LINGER_SECONDS:.0f} s after the job: {alive}"
        time.sleep(0.2)
    return time.monotonic() - started


def mapped(processes: Iterable[int]) -> set[str]:
    """Return the names of the shared memory segments that some processes have mapped."""
    held = "".join(_text(Path(f"/proc/{process}/maps")) for process in processes)
    return set(re.findall(r"/dev/shm/(\S+)", held))


def names(said: str, run: Path, file: Path) -> bool:
    """Return whether a message names a file of a run, by its path or by store, array and chunk."""
    part = ArrayFile.of(str(file.relative_to(run)))
    if part is None:
        return str(file) in said
    chunk = "" if part.chunk is None else f", chunk {part.chunk} "
    return f"{run / part.store}: array '{part.array}'{chunk}" in said


def shared_segments() -> set[str]:
    """Return the names of all shared memory segments."""
    return {path.name for path in Path("/dev/shm").iterdir()}


def is_open(segment: str) -> bool:
    """Return whether a living process, of another job, has a shared memory segment mapped."""
    return any(f"/dev/shm/{segment}" in _text(maps) for maps in Path("/proc").glob("[0-9]*/maps"))


def main() -> None:
    """Play the rounds and print how many were survived."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cells", type=int, default=500)
    parser.add_argument("--ray", action="store_true", help="a Ray for each job")
    parser.add_argument("--nodes", type=int, default=0, help="a Ray of so many raylets that the jobs share")
    parser.add_argument("--faults", default="", help="only these, separated by commas: job, worker, raylet, flip, ...")
    parser.add_argument("--stages", default="", help="only at these, separated by commas")
    parser.add_argument("--folder", type=Path, default=None)
    asked = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="nd-chaos-", dir=asked.folder))
    faults, stages = ([word for word in words.split(",") if word] for words in (asked.faults, asked.stages))
    nodes = Nodes(asked.nodes, folder, f"{folder}/nodes/") if asked.nodes else None
    chaos = Chaos(folder, asked.cells, asked.ray or nodes is not None, nodes)
    drawn = cases(asked.seed, KILLS if chaos.on_ray else KILLS[:1], faults, stages)
    met: Counter[str] = Counter()
    lingered = 0.0
    for number, (stage, fault) in zip(range(asked.rounds), drawn, strict=False):
        outcome = chaos.play(number, stage, fault, random.Random(f"{asked.seed} {number}"))
        lingered, met[fault] = max(lingered, outcome.lingered), met[fault] + 1
        print(json.dumps(asdict(outcome)), flush=True)
    told = {"rounds survived": asked.rounds, "seed": asked.seed, "ray": asked.ray, "nodes": asked.nodes, "faults": met}
    print(json.dumps(told | {"lingered at most": lingered}))
    if nodes is not None:
        nodes.close()
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
