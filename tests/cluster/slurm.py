"""Stand in for SLURM: start a batch script with the variables of its job, pass signals on, take requeues down.

    python slurm.py srun OPTIONS COMMAND    what the shim `srun` runs: the command on every node of the job

A node is this machine, or a `tests.machines.Machine`. Like SLURM, the shim `srun` passes a signal on to its tasks and,
once they have ended, kills what they have left on their nodes.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

OPTIONS = re.compile(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", re.MULTILINE)
JOB_ID = 4711
SPACES = ("--mount", "--net", "--pid", "--uts", "--ipc")
Process = subprocess.Popen[bytes]


def directives(script: Path) -> dict[str, str]:
    """Return the options that a batch script asks for."""
    return {name: value or "" for name, value in OPTIONS.findall(script.read_text())}


@dataclass(frozen=True)
class Node:
    """A machine made of namespaces that takes tasks: its first process, its home, its address."""

    pid: int
    home: str
    address: str

    def start(self, words: Sequence[str]) -> Process:
        """Start a command on the node."""
        enter = ["nsenter", f"--target={self.pid}", *SPACES, "env", f"--chdir={self.home}", f"HOME={self.home}"]
        return subprocess.Popen([*enter, *words], stdin=subprocess.DEVNULL, start_new_session=True)

    def end(self) -> None:
        """Kill every process of the node but the one that it lives by."""
        space = Path(f"/proc/{self.pid}/ns/pid").readlink()
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if (process / "ns/pid").readlink() == space and int(process.name) != self.pid:
                    os.kill(int(process.name), signal.SIGKILL)
            except OSError:  # it has ended
                continue


@dataclass(frozen=True)
class Slurm:
    """A queue of one job.

    Attributes
    ----------
    folder
        Where the shims, the log and the requeues go.
    env
        The environment that the job is submitted from.
    """

    folder: Path
    env: Mapping[str, str]
    nodes: tuple[Node, ...] = ()

    @property
    def log(self) -> Path:
        """What the job has said."""
        return self.folder / "log"

    @property
    def requeued(self) -> list[str]:
        """Return the jobs that `scontrol requeue` has put back."""
        path = self.folder / "requeued"
        return path.read_text().split() if path.exists() else []

    def sbatch(self, script: Path, *words: str, seconds_left: int = 120, **changes: str) -> Process:
        """Start a job's script, as SLURM does once there are nodes for it; `changes` replace its options."""
        asked = directives(script) | {name.replace("_", "-"): value for name, value in changes.items()}
        cpus, count = asked["cpus-per-task"], max(1, len(self.nodes))
        memory = {"G": 1024, "M": 1}[asked["mem"][-1]] * int(asked["mem"][:-1]) if asked["mem"] != "0" else 0
        job = {
            "SLURM_JOB_ID": str(JOB_ID), "SLURM_NNODES": str(count), "SLURM_CPUS_PER_TASK": cpus,
            "SLURM_CPUS_ON_NODE": cpus, "SLURM_MEM_PER_NODE": str(memory), "SLURM_RESTART_COUNT": str(len(self.requeued)),
            "SLURM_JOB_END_TIME": str(int(time.time()) + seconds_left),
        }  # fmt: skip
        shims = self._shims()
        env = {**self.env, **job, "PATH": f"{shims}:{Path(sys.executable).parent}:{self.env['PATH']}"}
        # SLURM copies the script to a place of its own, so what lies beside it cannot be read from there.
        spooled = self.folder / "slurm_script"
        spooled.write_bytes(script.read_bytes())
        with self.log.open("ab") as log:
            return subprocess.Popen(
                ["bash", str(spooled), *words], env=env, cwd=self.folder, stdout=log, stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
            )  # fmt: skip

    def _shims(self) -> Path:
        """Write the programs that a script calls, and return their folder."""
        shims = self.folder / "shims"
        shims.mkdir(exist_ok=True)
        (self.folder / "nodes.json").write_text(json.dumps([vars(node) for node in self.nodes]))
        programs = {
            "scontrol": f'[ "$1" = requeue ] && echo "$2" >> {self.folder}/requeued',
            "srun": f'exec {sys.executable} {__file__} {self.folder}/nodes.json "$@"',
        }
        if self.nodes:
            programs["hostname"] = f"echo {self.nodes[0].address} 192.0.2.1"
        for name, text in programs.items():
            (shims / name).write_text(f"#!/bin/bash\n{text}\n")
            (shims / name).chmod(0o755)
        return shims


def srun(nodes: list[Node], words: list[str]) -> int:
    """Run a command on every node; return the highest exit code."""
    while words[0].startswith("--"):
        words = words[1:]
    print("srun:", shlex.join(words), flush=True)
    tasks = [node.start(words) for node in nodes]

    def forward(number: int, _: object) -> None:
        for node, task in zip(nodes, tasks, strict=True):
            for child in Path(f"/proc/{task.pid}/task/{task.pid}/children").read_text().split():
                os.kill(int(child), number)  # `nsenter` itself is none of SLURM's
            del node

    signal.signal(signal.SIGTERM, forward)
    codes = [task.wait() for task in tasks]
    for node in nodes:
        node.end()
    return max(abs(code) for code in codes)


if __name__ == "__main__":
    sys.exit(srun([Node(**each) for each in json.loads(Path(sys.argv[1]).read_text())], sys.argv[2:]))
