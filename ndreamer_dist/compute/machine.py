"""Read what this process may use of the machine: processors and memory, within the limits of its container."""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ndreamer_dist.errors import ResourceError

GIB = 2**30
CGROUP = Path("/sys/fs/cgroup")
CACHES = {"NUMBA_CACHE_DIR": "numba", "MPLCONFIGDIR": "matplotlib"}
"""Variables that name the folders of what others cache, and ours for them."""


def cpu_count() -> int:
    """Return the processors this process may use: its affinity and its container's quota."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _cgroup_value("cpu.max")
    if quota and quota[0] != "max":
        allowed = min(allowed, max(1, -(-int(quota[0]) // int(quota[1]))))
    return allowed


def memory_limit() -> int:
    """Return the bytes of memory this process may use: the container's limit (cgroup v1 or v2), else the machine's."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    found = [_cgroup_value("memory.max"), _cgroup_value("memory/memory.limit_in_bytes")]
    limits = [int(value[0]) for value in found if value and value[0] != "max"]
    return min([machine, *limits])


def home_is_writable() -> bool:
    """Return whether this user's home folder can be written; in a container it may not even be there."""
    try:
        home = Path.home()
    except RuntimeError:
        return False
    return home.is_dir() and os.access(home, os.W_OK | os.X_OK) and not os.statvfs(home).f_flag & os.ST_RDONLY


@cache
def use_writable_caches() -> None:
    """Let numba and matplotlib keep what they compile and look up in a folder of this process where home cannot be written.

    numba would otherwise end a job in the middle: `cannot cache function`. The folder goes with the process; workers
    that it starts use it too. A user who sets the variables in the environment is heard.

    Raises
    ------
    ResourceError
        There is no folder for temporary files either.
    """
    if home_is_writable() or all(name in os.environ for name in CACHES):
        return
    try:
        folder = tempfile.mkdtemp(prefix="ndreamer-")
    except OSError as error:
        msg = (
            f"neither the home folder nor one for temporary files can be written ({error}); set TMPDIR to one that can"
        )
        raise ResourceError(msg) from error
    atexit.register(_remove, folder, os.getpid())
    for name, part in CACHES.items():
        os.environ.setdefault(name, f"{folder}/{part}")
    if "numba" in sys.modules:
        sys.modules["numba"].config.CACHE_DIR = os.environ["NUMBA_CACHE_DIR"]


def _remove(folder: str, owner: int) -> None:
    if os.getpid() == owner:
        shutil.rmtree(folder, ignore_errors=True)


def _cgroup_value(name: str) -> list[str] | None:
    path = CGROUP / name
    try:
        return path.read_text().split()
    except OSError:
        return None


@dataclass(frozen=True)
class Needs:
    """What a plan asks of the machine, in bytes."""

    memory: int
    disk: int


def check_resources(needs: Needs, *, memory: int, disk: int, where: str) -> None:
    """Refuse a plan that memory or disk will not hold.

    Raises
    ------
    ResourceError
        The message says what is needed, what there is, and what to change.
    """
    if needs.memory > memory:
        msg = (
            f"the plan needs {needs.memory / 1e9:.1f} GB of memory and {memory / 1e9:.1f} GB may be used; give it fewer "
            "processors (--set run.cpus=1), smaller blocks (--set pack.block_rows=1024), or a larger machine"
        )
        raise ResourceError(msg)
    if needs.disk > disk:
        msg = (
            f"the plan needs {needs.disk / 1e9:.1f} GB of disk and {where} has {disk / 1e9:.1f} GB free; choose another "
            "--out, or store fewer layers (--set effects.store=ite)"
        )
        raise ResourceError(msg)
