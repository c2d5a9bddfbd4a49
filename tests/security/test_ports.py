"""A local Ray that a run starts is heard by this machine alone, and tells its makers nothing."""

from __future__ import annotations

import ipaddress
import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from ndreamer_dist.compute.local_ray import USAGE
from ndreamer_dist.compute.monitors import process_tree

STARTED = """
import json, os, sys
from ndreamer_dist.compute.executor import choose_runtime
from ndreamer_dist.compute.local_ray import USAGE
from ndreamer_dist.settings import RunSettings
from tests.security.test_ports import listening
with choose_runtime(RunSettings(cpus=1, object_store_gb=0.1, progress=False)) as runtime:
    (asked,) = runtime.map(os.getenv, [USAGE], title="a task")
    print(json.dumps({"sockets": listening(os.getpid()), "asked for usage": asked, "after": os.getenv(USAGE)}))
"""


def address_of(text: str) -> str:
    """Return an address as /proc/net/tcp and tcp6 write it, words of 32 bits in the machine's order."""
    words = bytes.fromhex(text)
    return str(ipaddress.ip_address(b"".join(words[i : i + 4][::-1] for i in range(0, len(words), 4))))


def is_loopback(text: str) -> bool:
    address = ipaddress.ip_address(text)
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


def listening(pid: int) -> list[tuple[str, int, str]]:
    """Return address, port and command of every socket on which a process or one that it started listens."""
    owners = {}
    for process in [one.pid for one in process_tree(pid)]:
        try:
            files = list(Path(f"/proc/{process}/fd").iterdir())
            command = Path(f"/proc/{process}/cmdline").read_text().replace("\0", " ")[:80]
        except OSError:
            continue  # it has ended
        for file in files:
            with suppress(OSError):  # it has been closed meanwhile
                link = str(file.readlink())
                owners |= {link[8:-1]: command} if link.startswith("socket:[") else {}
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in owners:
                address, _, port = fields[1].partition(":")
                found.append((address_of(address), int(port, 16), owners[fields[9]]))
    return found


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("ray_token")
@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="sockets are read from Linux's /proc")
def test_a_local_ray_listens_on_loopback_alone_and_reports_no_use() -> None:
    env = {name: value for name, value in os.environ.items() if name != USAGE}
    command = [sys.executable, "-c", STARTED]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["asked for usage"], found["after"]) == ("0", None)
    sockets = found["sockets"]
    assert len(sockets) > 3
    assert [socket for socket in sockets if not is_loopback(socket[0])] == []
