"""Start Ray on this machine: loopback only, without usage statistics, with a modest object store."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ndreamer_dist.compute.machine import GIB, cpu_count, memory_limit
from ndreamer_dist.settings import RunSettings

USAGE = "RAY_USAGE_STATS_ENABLED"
IDLE_WORKER_SECONDS = 60
"""How long a local Ray keeps a worker that has nothing to do. Ray's own second ends the readers of a training between
two of their tasks, and each new one spends seconds of processor time on imports."""


@contextmanager
def sigterm_kept() -> Iterator[None]:
    """Let the program's own way of ending outlast `ray.init`, which puts one that says nothing in its place."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    if callable(before) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, before)


def start_ray(settings: RunSettings) -> None:
    """Connect to the cluster at `run.address` or `RAY_ADDRESS`; without either, start Ray on this machine."""
    import ray

    address = settings.address or os.environ.get("RAY_ADDRESS")
    common: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if address:
        ray.init(address=address, **common)
        return
    with _loopback_alone(), _untold():
        ray.init(
            address="local",
            num_cpus=settings.cpus or cpu_count(),
            object_store_memory=object_store_bytes(settings),
            include_dashboard=False,
            _system_config={"idle_worker_killing_time_threshold_ms": IDLE_WORKER_SECONDS * 1000},
            **common,
        )


@contextmanager
def _untold() -> Iterator[None]:
    """Let a Ray that is started in the block report nothing to its makers, which it does by itself.

    A user who sets the variable in the environment is heard.
    """
    if USAGE in os.environ:
        yield
        return
    os.environ[USAGE] = "0"
    try:
        yield
    finally:
        del os.environ[USAGE]


@contextmanager
def _loopback_alone() -> Iterator[None]:
    """Let a Ray that is started in the block listen to this machine alone, as Ray does on macOS and Windows.

    On Linux it takes the machine's address and listens on every one, and puts it in the place of a 127.0.0.1 that is
    asked for; this switch of its own is the only way. A user who sets it in the environment is heard.
    """
    from ray._private import ray_constants

    switch = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR
    if switch in os.environ:
        yield
        return
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER, os.environ[switch] = False, "0"
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before
        del os.environ[switch]


def on_a_cluster(settings: RunSettings) -> bool:
    """Return whether tasks will run on a Ray that is there already, whose machines are not known here."""
    import ray

    return not settings.serial and bool(settings.address or os.environ.get("RAY_ADDRESS") or ray.is_initialized())


def object_store_bytes(settings: RunSettings) -> int:
    """Return the size of a local Ray's object store: an eighth of the memory, at most 2 GiB and half of /dev/shm."""
    if settings.object_store_gb is not None:
        return int(settings.object_store_gb * 1e9)
    shm = Path("/dev/shm")  # noqa: S108 - where Ray keeps its objects
    room = shutil.disk_usage(shm).free // 2 if shm.exists() else 2 * GIB
    return max(128 * 2**20, min(2 * GIB, memory_limit() // 8, room))
