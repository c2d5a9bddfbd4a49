"""Machines made of Linux namespaces: each with a name, an address, disks and a process table of its own.

They are joined by a bridge and reach nothing else. A machine can read this one's files and write none of them: all it
can write is its home and its /dev/shm, disks in memory that no other machine sees. Killing its first process cuts its
power. Only root may make machines.
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
# Every file system but its own is made read-only; /proc, /sys and /dev are the kernel's.
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
    """Machines cannot be made here."""


@dataclass(frozen=True)
class Machine:
    """A running machine.

    Attributes
    ----------
    pid
        Its first process, as this machine counts processes.
    home
        Where its own disk is; the path is the same on every machine, the disk is not.
    env
        Environment of what is started on it, where its home is added.
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
        """Run a command on the machine and return what it said; `CalledProcessError` where it fails."""
        with self.start(*words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as command:
            out, error = command.communicate(timeout=300)
        if command.returncode:
            raise subprocess.CalledProcessError(command.returncode, words, out, error)
        return out.decode()

    def disk(self) -> Path:
        """Return the machine's home as this machine can see it."""
        return Path(f"/proc/{self.pid}/root{self.home}")

    def processes(self) -> dict[int, str]:
        """Return the title of every process that runs on the machine, by its number here."""
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
    """Make a machine without a network, until the block ends.

    Raises
    ------
    CannotBe
        The system does not let us.
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
            unshare.kill()  # and its child, and so all of the machine
            for process in made.started:
                with process:
                    process.wait(30)


def join(hub: Machine, others: Sequence[Machine]) -> None:
    """Lay a cable from every machine to a bridge on the hub; `CannotBe` where the system does not let us."""
    ours = ["nsenter", f"--target={hub.pid}", "--net"]  # without its process table: cables go by number
    lines = [f"link add {other.name} type veth peer name eth0 netns {other.pid}" for other in others]
    lines += [f"link set {other.name} master bridge up" for other in others]
    try:
        for line in lines:
            subprocess.run([*ours, "ip", *line.split()], check=True, capture_output=True)
        for other in others:
            other.run("ip", "address", "add", f"{other.address}/24", "dev", "eth0")
            other.run("ip", "link", "set", "eth0", "up")
            other.run("ip", "route", "add", "default", "via", hub.address)  # Ray asks for the way out, and takes none
    except subprocess.CalledProcessError as error:
        raise CannotBe(error.stderr.decode().strip()) from None


def make_hub(hub: Machine) -> None:
    """Give a machine the bridge that cables come together in."""
    try:
        hub.run("ip", "link", "add", "bridge", "type", "bridge")
        hub.run("ip", "address", "add", f"{hub.address}/24", "dev", "bridge")
        hub.run("ip", "link", "set", "bridge", "up")
    except subprocess.CalledProcessError as error:
        raise CannotBe(error.stderr.decode().strip()) from None


def wait_until(condition: Any, process: subprocess.Popen[bytes], seconds: float, said: Path) -> Any:
    """Wait for something to be true while a process runs, and return it."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert process.poll() is None, said.read_text()
        assert time.monotonic() < deadline, f"waited in vain; {said.read_text()}"
        time.sleep(0.05)
    return found
