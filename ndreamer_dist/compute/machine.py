"""Read how many processors and how much memory this process may use, within its container and its SLURM job."""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ndreamer_dist.errors import ResourceError

GIB = 2**30
MIB = 2**20
CGROUP = Path("/sys/fs/cgroup")
CACHES = {"NUMBA_CACHE_DIR": "numba", "MPLCONFIGDIR": "matplotlib"}
"""Environment variables that name cache folders, and the subfolder for each."""
OWN_CGROUP = Path("/proc/self/cgroup")
"""Lines `number:controllers:path`, the control groups of this process."""
NO_LIMIT = 2**60
"""Larger limits mean no limit: control groups of version 1 then write a number near 2^63."""


@dataclass(frozen=True, order=True)
class Allowance:
    """The amount of a resource that this process may use, and the source of the limit (`SLURM_CPUS_PER_TASK`)."""

    amount: int
    source: str


def cpu_allowance() -> Allowance:
    """Return how many processors this process may use: the least of affinity, control groups and SLURM job."""
    if hasattr(os, "sched_getaffinity"):
        own = Allowance(len(os.sched_getaffinity(0)), "affinity")
    else:
        own = Allowance(os.cpu_count() or 1, "machine")
    return min([own, *_cgroup_cpus(), *_slurm_cpus()], key=lambda each: each.amount)


def memory_allowance() -> Allowance:
    """Return how many bytes of memory this process may use: the least of machine, control groups and SLURM job."""
    machine = Allowance(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "machine")
    return min([machine, *_cgroup_memory(), *_slurm_memory()], key=lambda each: each.amount)


def cpu_count() -> int:
    """Return how many processors this process may use."""
    return cpu_allowance().amount


def gpu_is_shown() -> bool:
    """Return whether the system shows an NVIDIA GPU."""
    return any(Path(path).exists() for path in ("/proc/driver/nvidia", "/dev/nvidia0", "/dev/dxg"))


def has_gpu() -> bool:
    """Return whether torch can use a GPU here; torch is imported only if the system shows one."""
    if not gpu_is_shown():
        return False
    import torch

    return bool(torch.cuda.is_available())


def memory_limit() -> int:
    """Return how many bytes of memory this process may use."""
    return memory_allowance().amount


def home_is_writable() -> bool:
    """Return whether the user's home folder is writable; in a container it may not exist."""
    try:
        home = Path.home()
    except RuntimeError:
        return False
    return home.is_dir() and os.access(home, os.W_OK | os.X_OK) and not os.statvfs(home).f_flag & os.ST_RDONLY


@cache
def use_writable_caches() -> None:
    """Give numba and matplotlib a temporary cache folder if the home folder is not writable.

    Without it numba would fail in the middle of a run (`cannot cache function`). The folder is deleted when the process
    ends; workers that the process starts use it, too. Variables that are already set keep their values.

    Raises
    ------
    ResourceError
        The folder for temporary files is not writable either.
    """
    if home_is_writable() or all(name in os.environ for name in CACHES):
        return
    try:
        folder = tempfile.mkdtemp(prefix="ndreamer-")
    except OSError as error:
        msg = (
            f"neither the home folder nor a folder for temporary files is writable ({error}); set TMPDIR to one that is"
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


def _slurm_cpus() -> Iterator[Allowance]:
    """Yield the processors of a SLURM task, and of all of the job's tasks on this node."""
    for name in ("SLURM_CPUS_PER_TASK", "SLURM_CPUS_ON_NODE"):
        if count := _slurm_number(name):
            yield Allowance(count, name)


def _slurm_memory() -> Iterator[Allowance]:
    """Yield the memory of a SLURM job on this node; SLURM counts in MiB, and 0 (`--mem=0`) means the whole node."""
    if size := _slurm_number("SLURM_MEM_PER_NODE"):
        yield Allowance(size * MIB, "SLURM_MEM_PER_NODE")
    size, count = _slurm_number("SLURM_MEM_PER_CPU"), _slurm_number("SLURM_CPUS_ON_NODE")
    if size and count:
        yield Allowance(size * count * MIB, "SLURM_MEM_PER_CPU")


def _slurm_number(name: str) -> int:
    """Return a number that SLURM sets in a job; 0 outside jobs, or if the variable is not a number."""
    text = os.environ.get(name, "") if "SLURM_JOB_ID" in os.environ else ""
    return int(text) if text.isascii() and text.isdigit() else 0


def _cgroup_cpus() -> Iterator[Allowance]:
    """Yield the processor quotas of this process's control groups, rounded up to whole processors."""
    for folder in _cgroup_folders("cpu"):
        quota = _words(folder / "cpu.max") or [
            *_words(folder / "cpu.cfs_quota_us"), *_words(folder / "cpu.cfs_period_us")
        ]  # fmt: skip
        if len(quota) == 2 and quota[0] not in ("max", "-1"):
            yield Allowance(max(1, -(-int(quota[0]) // int(quota[1]))), "cgroup")


def _cgroup_memory() -> Iterator[Allowance]:
    """Yield the memory limits of this process's control groups."""
    for folder in _cgroup_folders("memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            limit = _words(folder / name)
            if limit and limit[0] != "max" and int(limit[0]) < NO_LIMIT:
                yield Allowance(int(limit[0]), "cgroup")


def _cgroup_folders(controller: str) -> Iterator[Path]:
    """Yield the folders of this process's control group and of all groups above it, root first, for versions 2 and 1.

    The group of a SLURM job lies deep below the root; a container usually sees its own group as the root.
    """
    try:
        lines = [line.split(":", 2) for line in OWN_CGROUP.read_text().splitlines()]
    except OSError:
        lines = []
    for mount, listed in ((CGROUP, ""), (CGROUP / controller, controller)):
        paths = [path for _, controllers, path in lines if listed in controllers.split(",")]
        folder = mount
        yield folder
        for part in Path(paths[0].lstrip("/")).parts if paths else ():
            folder /= part
            yield folder


def _words(path: Path) -> list[str]:
    """Return the words of a file; an empty list if it cannot be read."""
    try:
        return path.read_text().split()
    except OSError:
        return []


@dataclass(frozen=True)
class Needs:
    """The memory and disk space that a plan needs, in bytes."""

    memory: int
    disk: int
    savings: tuple[str, ...] = ()  # what would take less memory


def check_resources(needs: Needs, *, memory: Allowance, disk: int, where: str) -> None:
    """Check that memory and disk are large enough for a plan.

    Raises
    ------
    ResourceError
        They are not; the message says what is needed, what is available, and what to change.
    """
    if needs.memory > memory.amount:
        msg = (
            f"the plan needs {needs.memory / 1e9:.1f} GB of memory and may use {memory.amount / 1e9:.1f} GB "
            f"({memory.source}); take {' or '.join([*needs.savings, 'more memory'])}"
        )
        raise ResourceError(msg)
    if needs.disk > disk:
        msg = (
            f"the plan needs {needs.disk / 1e9:.1f} GB of disk and {where} has {disk / 1e9:.1f} GB free; choose another "
            "--out, or store fewer layers (--set effects.store=ite)"
        )
        raise ResourceError(msg)
