"""The job on several machines that share S3 and nothing else: the bits of one machine, though two are lost.

Each machine has an address, disks and a process table of its own (`tests/machines.py`), so what one has written no
other can read. One job goes over a head without processors, where the driver is, and three machines with one processor,
two of which train. Another, which is slow, is killed in the middle of its training, started again, loses a machine that
trains, goes on with the third, and loses another in the middle of the effects.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ndreamer_dist import keys
from ndreamer_dist.compute.monitors import process_tree
from tests.machines import CannotBe, Machine, join, machine, make_hub, wait_until
from tests.servers import S3_ENVIRONMENT
from tests.tiny import PROMPT, SETTINGS, assert_same_bits, run_words
from tests.two_workers import WORKERS, run_with_two_workers

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(600), pytest.mark.usefixtures("ray_token")]
ROOT = Path(__file__).parent.parent
JOB = SETTINGS | {"pack.block_rows": 64, "embed.tile_rows": 64, "train.epochs": 16, "train.checkpoint_steps": 8}
ON_RAY = {name: value for name, value in JOB.items() if name != "run.serial"} | {"train.workers": WORKERS}
PATIENCE_SECONDS = 240
LINGER_SECONDS = 120
"""How long the workers of a driver that was killed may outlive it."""
PORT = "6379"
QUICK = {
    # A machine that is silent for three seconds is lost; by Ray's defaults it takes 15 s and more.
    "RAY_health_check_initial_delay_ms": "1000", "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "1000", "RAY_health_check_failure_threshold": "3",
}  # fmt: skip
WRITTEN_BY_TASKS = {
    keys.STAGE_PACK: f"{keys.PACKED}/{keys.PACKED_X}/", keys.STAGE_EMBED: f"{keys.EMBEDDING}/{keys.MU}/",
    keys.STAGE_PCA: f"{keys.EMBEDDING}/{keys.PCA}/", keys.STAGE_MATCH: f"{keys.MATCHES}/",
    keys.STAGE_EFFECTS: f"{keys.RESULTS}/layers/",
}  # fmt: skip
"""What of each stage's store the tasks write: all that grows with cells times genes, and more."""
OF_THE_CLUSTER = re.compile(r"ray::(DashboardAgent|RuntimeEnvAgent|PlacementGroupCleaner|_[A-Z])")
"""Processes of Ray that belong to no job: a node's agents, and detached actors of Ray Data and Ray Train."""
PUT = "import sys, s3fs; files = s3fs.S3FileSystem(); files.mkdir('bucket'); files.put(*sys.argv[1:], recursive=True)"
GET = "import sys, s3fs; s3fs.S3FileSystem().get(*sys.argv[1:], recursive=True)"


@dataclass
class Cluster:
    """A Ray of several machines, and the machine of the S3 that they share."""

    store: Machine
    head: Machine
    nodes: list[Machine]
    logs: Path
    read: int = 0

    @property
    def address(self) -> str:
        return f"{self.head.address}:{PORT}"

    def asked(self) -> list[dict[str, Any]]:
        """Return the requests that S3 has had since this was last asked."""
        with (self.store.disk() / "requests").open() as log:
            log.seek(self.read)
            lines = log.read()
        lines = lines[: lines.rfind("\n") + 1]
        self.read += len(lines)
        return [json.loads(line) for line in lines.splitlines()]

    def start_ray(self, place: Machine, *words: str) -> Callable[[], None]:
        """Start Ray on a machine; what is returned waits until it is there."""
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"]
        command += ["--node-ip-address", place.address, "--object-store-memory", str(90 * 2**20), *words]
        said = self.logs / f"{place.name}.ray"
        with said.open("wb") as log:
            node = place.start(*command, stdout=log, stderr=subprocess.STDOUT)

        def wait() -> None:
            wait_until(lambda: "Ray runtime started" in said.read_text(), node, PATIENCE_SECONDS, said)

        return wait

    def start_driver(self, out: str, settings: dict[str, Any], *more: str) -> tuple[subprocess.Popen[bytes], Path]:
        """Start the job on the head; return it and the file that holds what it says."""
        words = run_words("s3://bucket/cohort.zarr", out, settings, "--address", self.address, *more)  # type: ignore[arg-type]
        said = self.logs / "driver"
        with said.open("wb") as log:
            command = [sys.executable, "-m", "ndreamer_dist.cli", *words]
            return self.head.start(*command, stdout=log, stderr=subprocess.STDOUT), said

    def lose(self, address: str) -> Machine:
        """Cut the power of the machine that has an address, and return it."""
        (lost,) = [place for place in self.nodes if place.address == address]
        lost.cut_power()
        return lost

    def fetched(self, name: str, folder: Path) -> Path:
        """Copy a run from S3 to a folder."""
        self.store.run(sys.executable, "-c", GET, f"bucket/{name}", name)
        return Path(shutil.copytree(self.store.disk() / name, folder / name))


@contextlib.contextmanager
def made(env: dict[str, str], home: Path, logs: Path) -> Iterator[Cluster]:
    """Make the machines, serve S3 on one of them and start Ray on the others."""
    with contextlib.ExitStack() as stack:
        machines = [
            stack.enter_context(machine(name, number, home, env))
            for number, name in enumerate(("store", "head", "node1", "node2", "node3"), 1)
        ]
        store, head, *nodes = machines
        make_hub(store)
        join(store, [head, *nodes])
        words = [str(ROOT / "tests/servers.py"), "s3", store.address, str(home / "requests")]
        serving = store.start(sys.executable, *words, stdout=subprocess.PIPE)
        assert serving.stdout is not None
        env["AWS_ENDPOINT_URL"] = serving.stdout.readline().decode().strip()
        cluster = Cluster(store, head, nodes, logs)
        own = ["--head", "--port", PORT, "--num-cpus", "0", "--temp-dir", str(home / "ray")]
        own += ["--include-dashboard", "false"]
        cluster.start_ray(head, *own)()
        waits = [cluster.start_ray(node, "--address", cluster.address, "--num-cpus", "1") for node in nodes]
        for wait in waits:
            wait()
        yield cluster


@pytest.fixture(scope="module")
def cohort(tiny: Path) -> Path:
    return tiny


@pytest.fixture(scope="module")
def undisturbed(cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on this machine, from disk to disk, with as many training workers."""
    return run_with_two_workers(cohort, tmp_path_factory.mktemp("undisturbed") / "run", JOB)


@pytest.fixture(scope="module")
def cluster(cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """The machines, and the cohort in S3; the tests are skipped where machines cannot be made."""
    token = tmp_path_factory.mktemp("token") / "token"
    token.write_text(secrets.token_hex(32))
    env = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "AWS_"))}
    env |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), **PROMPT, **QUICK}
    env |= {"PYTHONPATH": str(ROOT), **S3_ENVIRONMENT}
    # Sockets below a folder of pytest's would have names longer than the system takes.
    with tempfile.TemporaryDirectory(prefix="nd-", dir="/tmp") as home, contextlib.ExitStack() as stack:
        try:
            cluster = stack.enter_context(made(env, Path(home), tmp_path_factory.mktemp("logs")))
        except CannotBe as error:
            pytest.skip(f"machines cannot be made here: {error}")
        cluster.store.run(sys.executable, "-c", PUT, str(cohort), "bucket/cohort.zarr")
        yield cluster


@dataclass(frozen=True)
class Lived:
    """What was seen of a job; of one that was killed, of the same job after it."""

    run: Path  # as it lies in S3 at the end
    asked: list[dict[str, Any]]  # of S3, by the job that came to its end
    trained: list[int]  # training workers of each machine, at the first checkpoint
    lost: list[Machine]  # one in the training and one in the effects, or none


def workers_on(*places: Machine) -> list[str]:
    """Return the titles of the job's workers on some machines."""
    titles = [title for place in places for title in place.processes().values()]
    return [title for title in titles if title.startswith("ray::") and not OF_THE_CLUSTER.match(title)]


def training_workers_on(place: Machine) -> int:
    """Return how many training workers a machine has."""
    return sum("TrainWorker" in title for title in workers_on(place))


def kill_driver(cluster: Cluster, driver: subprocess.Popen[bytes]) -> float:
    """Kill a driver; return the seconds until none of its workers is left."""
    os.kill(process_tree(driver.pid)[1].pid, signal.SIGKILL)  # the first is `nsenter`
    killed = time.monotonic()
    while left := workers_on(cluster.head, *cluster.nodes):
        assert time.monotonic() < killed + PATIENCE_SECONDS, left
        time.sleep(0.05)
    driver.wait()
    return time.monotonic() - killed


def first_to_put(requests: list[dict[str, Any]], place: str, chunk: str = "") -> str | None:
    """Return the address that first wrote to a place of the run."""
    return next(
        (r["from"] for r in requests if r["method"] == "PUT" and place in r["path"] and chunk in r["path"]), None
    )


def writers_of(requests: list[dict[str, Any]], place: str) -> set[str]:
    """Return the addresses that wrote chunks to a place of the run."""
    return {r["from"] for r in requests if r["method"] == "PUT" and place in r["path"] and "/c/" in r["path"]}


@pytest.fixture(
    scope="module",
    params=[pytest.param(False, id="undisturbed"), pytest.param(True, id="losses")],
)
def lived(request: pytest.FixtureRequest, cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Lived:
    asked: list[dict[str, Any]] = []
    losses, name = request.param, f"run_{request.param}"

    def wait_for_a_put(place: str, chunk: str = "") -> str:
        def writer() -> str | None:
            asked.extend(new := cluster.asked())
            return first_to_put(new, f"/{name}/{place}", chunk)

        return str(wait_until(writer, driver, PATIENCE_SECONDS, said))

    cluster.asked()
    driver, said = cluster.start_driver(f"s3://bucket/{name}", ON_RAY)
    wait_for_a_put(keys.METRICS)  # once there is a checkpoint
    trained, lost = [training_workers_on(node) for node in cluster.nodes], []
    if losses:
        assert kill_driver(cluster, driver) < LINGER_SECONDS
        cluster.asked()
        asked.clear()
        driver, said = cluster.start_driver(f"s3://bucket/{name}", ON_RAY)
        lost = [cluster.lose(wait_for_a_put(f"{keys.TRAIN_DIR}/checkpoint"))]
        lost.append(cluster.lose(wait_for_a_put(WRITTEN_BY_TASKS[keys.STAGE_EFFECTS], "/c/")))
    assert driver.wait(PATIENCE_SECONDS) == 0, said.read_text()
    asked += cluster.asked()
    return Lived(cluster.fetched(name, tmp_path_factory.mktemp("run")), asked, trained, lost)


def test_the_bits_are_those_of_one_machine(undisturbed: Path, lived: Lived) -> None:
    assert_same_bits(undisturbed, lived.run)
    assert (lived.run / keys.MODEL_WEIGHTS).read_bytes() == (undisturbed / keys.MODEL_WEIGHTS).read_bytes()


def test_the_training_workers_are_on_different_machines(lived: Lived) -> None:
    assert sorted(lived.trained) == [0, 1, 1]


def test_every_machine_with_processors_takes_part_and_the_lost_ones_did(cluster: Cluster, lived: Lived) -> None:
    writers = {stage: writers_of(lived.asked, part) for stage, part in WRITTEN_BY_TASKS.items()}
    later = {node.address for node in cluster.nodes} - {place.address for place in lived.lost[:1]}
    assert set().union(*writers.values()) <= later  # never the head, where the driver is
    assert writers[keys.STAGE_EFFECTS] == later
    reads = {r["from"] for r in lived.asked if r["method"] == "GET" and f"/{keys.PACKED}/" in r["path"]}
    assert {place.address for place in lived.lost} <= reads


def test_no_matrix_goes_through_the_driver(cluster: Cluster, lived: Lived) -> None:
    # Numbers a cell, not a cell and gene, it may have: the 50 dimensions to match in, and where a cell's values begin.
    matrices = [part for stage, part in WRITTEN_BY_TASKS.items() if stage != keys.STAGE_PCA]
    asked = {r["path"] for r in lived.asked if r["from"] == cluster.head.address and "/c/" in r["path"]}
    assert asked
    assert {path for path in asked if any(part in path for part in matrices) and "/indptr/" not in path} == set()
