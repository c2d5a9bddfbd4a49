"""The SLURM scripts: a job that meets its time limit goes back into the queue, and ends with the bits of one not stopped."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import ndreamer_dist as nd
from ndreamer_dist import keys
from ndreamer_dist.training.loop import STATE_FILE
from tests.cluster.manifests import CLUSTER, ROOT
from tests.cluster.slurm import JOB_ID, Node, Process, Slurm, directives
from tests.machines import CannotBe, Machine, join, machine, make_hub, wait_until
from tests.tiny import NAMES, PROMPT, SETTINGS, assert_same_bits, run_words, tiny_cohort

SCRIPTS = sorted((CLUSTER / "slurm").glob("*.sbatch"))
ONE, SEVERAL = CLUSTER / "slurm/one-node.sbatch", CLUSTER / "slurm/nodes.sbatch"
JOB = SETTINGS | {"train.epochs": 16, "train.checkpoint_steps": 4}
ON_RAY = {name: value for name, value in JOB.items() if name != "run.serial"}
PATIENCE_SECONDS = 600
KNOWN = {
    "job-name", "nodes", "ntasks", "ntasks-per-node", "cpus-per-task", "mem", "time", "signal", "requeue", "open-mode",
    "output", "exclusive",
}  # fmt: skip
LONGEST_SOCKET = 107
"""Bytes of a socket's path, as Linux limits them."""


@pytest.fixture
def slurm(tmp_path: Path) -> Slurm:
    env = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "SLURM_"))}
    return Slurm(tmp_path, {**env, "PYTHONPATH": str(ROOT)})


def doing(text: str, slurm: Slurm, tmp_path: Path) -> Path:
    """Return the script for one node, where `ndreamer-dist` is a program of ours."""
    (tmp_path / "shims").mkdir()
    program = tmp_path / "shims/ndreamer-dist"
    program.write_text(f"#!/bin/bash\n{text}\n")
    program.chmod(0o755)
    return ONE


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_asks_slurm_for_a_warning_and_a_new_try(script: Path) -> None:
    asked = directives(script)
    assert set(asked) <= KNOWN
    assert len(asked) == script.read_text().count("\n#SBATCH")
    assert asked["signal"] == "B:TERM@120"
    assert {"requeue", "open-mode", "time", "cpus-per-task"} <= set(asked)
    subprocess.run(["bash", "-n", str(script)], check=True)


def test_several_nodes_are_the_jobs_own_and_have_one_task_each() -> None:
    asked = directives(SEVERAL)
    assert "exclusive" in asked
    assert asked["ntasks-per-node"] == "1"
    assert "RAY_AUTH_MODE=token" in SEVERAL.read_text()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_the_sockets_of_ray_have_short_names(script: Path) -> None:
    (folder,) = re.findall(r"RAY_TMPDIR=(\S+)", script.read_text())
    longest = folder.replace("$SLURM_JOB_ID", "4294967295")  # SLURM's numbers have 32 bits
    longest += "/ray/session_2026-12-31_23-59-59_999999_4194304/sockets/plasma_store.1"
    assert len(longest) < LONGEST_SOCKET


def test_a_job_ends_with_the_code_of_its_run(slurm: Slurm, tmp_path: Path) -> None:
    script = doing('echo "$@"; [ -d "$RAY_TMPDIR" ] && exit 2', slurm, tmp_path)
    assert slurm.sbatch(script, "cohort.h5ad", "--out", "a b").wait(30) == 2
    assert slurm.log.read_text() == "run cohort.h5ad --out a b\n"
    assert slurm.requeued == []
    assert not Path(f"/tmp/nd{JOB_ID}").exists()


@pytest.mark.parametrize(
    ("seconds_left", "ends", "requeued"),
    [
        pytest.param(120, "trap 'exit 130' TERM", [str(JOB_ID)], id="at_the_time_limit"),
        pytest.param(3600, "trap 'exit 130' TERM", [], id="cancelled"),
        pytest.param(120, "trap 'exit 0' TERM", [], id="finished_just_in_time"),
    ],
)
def test_only_a_job_without_time_goes_back_into_the_queue(
    slurm: Slurm, tmp_path: Path, seconds_left: int, ends: str, requeued: list[str]
) -> None:
    script = doing(f"{ends}; touch begun; while sleep 0.05; do :; done", slurm, tmp_path)
    job = slurm.sbatch(script, seconds_left=seconds_left)
    wait_until((tmp_path / "begun").exists, job, 30, slurm.log)
    job.send_signal(signal.SIGTERM)
    assert job.wait(30) == int(re.findall(r"\d+", ends)[0])
    assert slurm.requeued == requeued


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_cohort(tmp_path_factory.mktemp("cohort"))


@pytest.fixture(scope="module")
def undisturbed(cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process that nothing stops."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    nd.run(cohort, out=out, preset="small", settings=JOB, **NAMES)
    return out


def stop_in_training(slurm: Slurm, job: Process, out: Path) -> None:
    """Send the signal that comes before the time limit once the training has a checkpoint; wait for the end."""
    wait_until(lambda: any(out.glob(f"{keys.TRAIN_DIR}/**/{STATE_FILE}")), job, PATIENCE_SECONDS, slurm.log)
    job.send_signal(signal.SIGTERM)
    assert job.wait(120) != 0, slurm.log.read_text()
    assert slurm.requeued == [str(JOB_ID)]
    assert not (out / keys.RESULTS / "zarr.json").exists()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_stopped_job_on_one_node_ends_with_the_same_bits(
    slurm: Slurm, cohort: Path, undisturbed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    words, asked = run_words(cohort, out, JOB)[1:], {"cpus_per_task": "1", "mem": "4G"}
    stop_in_training(slurm, slurm.sbatch(ONE, *words, **asked), out)
    assert slurm.sbatch(ONE, *words, **asked).wait(PATIENCE_SECONDS) == 0, slurm.log.read_text()
    assert "4.3 GB of memory (SLURM_MEM_PER_NODE)" in slurm.log.read_text()
    assert_same_bits(undisturbed, out)


@contextlib.contextmanager
def two_nodes(home: Path, shared: Path) -> Iterator[list[Machine]]:
    """Make two machines on one network that share a folder."""
    with contextlib.ExitStack() as stack:
        hub, *nodes = [
            stack.enter_context(machine(name, number, home, os.environ))
            for number, name in enumerate(("hub", "node1", "node2"), 1)
        ]
        make_hub(hub)
        join(hub, nodes)
        for node in nodes:
            node.run("mount", "--bind", str(shared), str(shared))
            node.run("mount", "-o", "remount,bind,rw", str(shared))
            node.run("mount", "-t", "tmpfs", "tmp", "/mnt")
        yield nodes


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(2400)
def test_a_stopped_job_on_two_nodes_ends_with_the_same_bits(cohort: Path, undisturbed: Path, tmp_path: Path) -> None:
    env = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "SLURM_"))}
    with tempfile.TemporaryDirectory(prefix="nd-", dir="/tmp") as home, contextlib.ExitStack() as stack:
        try:
            machines = stack.enter_context(two_nodes(Path(home), tmp_path))
        except (CannotBe, subprocess.CalledProcessError) as error:
            pytest.skip(f"machines cannot be made here: {error}")
        nodes = tuple(Node(each.pid, str(each.home), each.address) for each in machines)
        slurm = Slurm(tmp_path, {**env, **PROMPT, "PYTHONPATH": str(ROOT)}, nodes)
        # /tmp is not the machines' own, so the folder of the sockets lies in their homes.
        script = tmp_path / "nodes.sbatch"
        script.write_text(SEVERAL.read_text().replace("RAY_TMPDIR=/tmp/nd", f"RAY_TMPDIR={home}/"))
        shared = shutil.copytree(cohort, tmp_path / "cohort.zarr")
        out = tmp_path / "run"
        words, asked = run_words(shared, out, ON_RAY)[1:], {"cpus_per_task": "1", "mem": "720M"}
        stop_in_training(slurm, slurm.sbatch(script, *words, **asked), out)
        assert slurm.sbatch(script, *words, **asked).wait(PATIENCE_SECONDS) == 0, slurm.log.read_text()
    said = slurm.log.read_text()
    assert said.count("On head node") == said.count("On worker node") == 2
    assert not list(tmp_path.glob(".ray-token*"))
    assert_same_bits(undisturbed, out)
