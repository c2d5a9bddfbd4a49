"""Read what this process may use of the machine: processors and memory, within the limits of its container."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from ndreamer_dist.errors import ResourceError

GIB = 2**30
CGROUP = Path("/sys/fs/cgroup")


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
