"""Simulated machines from Linux namespaces, each with its own name, address, disks and process table.

A bridge connects them to each other and to nothing else. A machine can read the files of the host but not write them;
it can write only to its home and its /dev/shm, in-memory disks that no other machine sees. Killing its first process
ends all of its processes, like a power cut. Only root can create machines.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NETWORK = "10.77.0."
SPACES = ("--mount", "--net", "--pid", "--uts", "--ipc")
# Remount every file system read-only except the machine's own, and /proc, /sys and /dev.
BORN = r"""
set -eo pipefail
hostname "$1"
mount -t tmpfs machine "$2"
mount -t tmpfs machine /dev/shm
awk -v home="$2" '$2 != home && $2 !~ "^/(dev|proc|sys)(/|$)" {print $2}' /proc/self/mounts |
    while read -r place; do mount -o remount,bind,ro "$place"; done
mkdir "$2/tmp"
ip link set lo up
echo born
exec env --ignore-signal=CHLD sleep infinity
"""


class CannotBe(Exception):
    """The system does not allow to create machines."""


@dataclass(frozen=True)
class Machine:
    """A running machine.

    Attributes
    ----------
    pid
        Its first process, by its number on the host.
    home
        Path of its own disk; the path may be the same on every machine, the disk is not.
    env
        Environment of the commands started on it, to which HOME and TMPDIR are added.
    """

    name: str
    address: str
    pid: int
    home: Path
    env: Mapping[str, str]
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self, *words: str, **options: Any) -> subprocess.Popen[bytes]:
        """Start a command on the machine, in its home."""
        enter = ["nsenter", f"--target={self.pid}", *SPACES, "env", f"--chdir={self.home}"]
        env = {**self.env, "HOME": str(self.home), "TMPDIR": f"{self.home}/tmp"}
        self.started.append(subprocess.Popen([*enter, *words], env=env, stdin=subprocess.DEVNULL, **options))
        return self.started[-1]

    def run(self, *words: str) -> str:
        """Run a command on the machine and return its output; raise `CalledProcessError` if it fails."""
        with self.start(*words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as command:
            out, error = command.communicate(timeout=300)
        if command.returncode:
            raise subprocess.CalledProcessError(command.returncode, words, out, error)
        return out.decode()

    def disk(self) -> Path:
        """Return the path of the machine's home on the host."""
        return Path(f"/proc/{self.pid}/root{self.home}")

    def processes(self) -> dict[int, str]:
        """Return the command line of every process of the machine, by its number on the host."""
        space, found = Path(f"/proc/{self.pid}/ns/pid").readlink(), {}
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it has ended
                if (process / "ns/pid").readlink() == space:
                    found[int(process.name)] = (process / "cmdline").read_text().replace("\0", " ").strip()
        return found

    def cut_power(self) -> None:
        """Kill every process of the machine at once."""
        os.kill(self.pid, signal.SIGKILL)


@contextlib.contextmanager
def machine(name: str, number: int, home: Path, env: Mapping[str, str]) -> Iterator[Machine]:
    """Create a machine without a network, which exists until the block ends.

    Raises
    ------
    CannotBe
        The system does not allow it.
    """
    command = ["setpriv", "--pdeathsig=SIGKILL", "unshare", *SPACES, "--fork", "--kill-child", "--mount-proc"]
    try:
        unshare = subprocess.Popen(
            [*command, "bash", "-c", BORN, "bash", name, str(home)],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
    except FileNotFoundError as error:
        raise CannotBe(str(error)) from None
    with unshare:
        assert unshare.stdout is not None
        assert unshare.stderr is not None
        if unshare.stdout.readline() != b"born\n":
            raise CannotBe(unshare.stderr.read().decode().strip())
        pid = int(Path(f"/proc/{unshare.pid}/task/{unshare.pid}/children").read_text())
        made = Machine(name, f"{NETWORK}{number}", pid, home, env)
        try:
            yield made
        finally:
            unshare.kill()  # which kills its child, and so all processes of the machine
            for process in made.started:
                with process:
                    process.wait(30)


def join(hub: Machine, others: Sequence[Machine]) -> None:
    """Connect every machine to the bridge of the hub; raise `CannotBe` if the system does not allow it."""
    ours = ["nsenter", f"--target={hub.pid}", "--net"]  # `netns` takes a process number of the host
    lines = [f"link add {other.name} type veth peer name eth0 netns {other.pid}" for other in others]
    lines += [f"link set {other.name} master bridge up" for other in others]
    try:
        for line in lines:
            subprocess.run([*ours, "ip", *line.split()], check=True, capture_output=True)
        for other in others:
            other.run("ip", "address", "add", f"{other.address}/24", "dev", "eth0")
            other.run("ip", "link", "set", "eth0", "up")
            other.run("ip", "route", "add", "default", "via", hub.address)  # Ray looks for a default route
    except subprocess.CalledProcessError as error:
        raise CannotBe(error.stderr.decode().strip()) from None


def make_hub(hub: Machine) -> None:
    """Create the bridge on a machine."""
    try:
        hub.run("ip", "link", "add", "bridge", "type", "bridge")
        hub.run("ip", "address", "add", f"{hub.address}/24", "dev", "bridge")
        hub.run("ip", "link", "set", "bridge", "up")
    except subprocess.CalledProcessError as error:
        raise CannotBe(error.stderr.decode().strip()) from None


def wait_until(condition: Any, process: subprocess.Popen[bytes], seconds: float, said: Path) -> Any:
    """Wait until a condition is true while a process runs, and return its value."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert process.poll() is None, said.read_text()
        assert time.monotonic() < deadline, f"waited in vain; {said.read_text()}"
        time.sleep(0.05)
    return found
