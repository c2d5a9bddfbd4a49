"""Start Ray on this machine: loopback only, without usage statistics, with a modest object store."""

from __future__ import annotations

import atexit
import logging
import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from ndreamer_dist.compute.machine import GIB, cpu_count, home_is_writable, memory_limit
from ndreamer_dist.errors import RunError
from ndreamer_dist.settings import RunSettings

USAGE = "RAY_USAGE_STATS_ENABLED"
TOKEN_VARIABLES = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE")
ANSWER_SECONDS = 10.0
"""Timeout of the connection to a cluster."""
LONGEST_FOLDER = 40
"""Longest path of Ray's folder: with the names that Ray appends, a socket's path has at most 107 characters."""
IDLE_WORKER_SECONDS = 60
"""How long a local Ray keeps an idle worker process. Ray's default of one second ends the readers of a training between
two of their tasks, and each new process spends seconds of processor time on imports."""

logger = logging.getLogger(__name__)


@contextmanager
def sigterm_kept() -> Iterator[None]:
    """Restore the SIGTERM handler after the block, since `ray.init` replaces it by a silent one."""
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
        check_reachable(address)
        try:
            ray.init(address=address, **common)
        except ConnectionError as error:
            raise _unreachable(address, error) from error
        return
    folder = _ray_folder()
    with _on_loopback(), _unless_set(USAGE, "0"), _token():
        ray.init(
            address="local",
            _temp_dir=folder,
            num_cpus=settings.cpus or cpu_count(),
            object_store_memory=object_store_bytes(settings),
            include_dashboard=False,
            _system_config={"idle_worker_killing_time_threshold_ms": IDLE_WORKER_SECONDS * 1000},
            **common,
        )


def check_reachable(address: str) -> None:
    """Raise an error if no Ray cluster answers at an address; Ray itself would try for ten minutes.

    Raises
    ------
    RunError
        There was no connection within `ANSWER_SECONDS`.
    """
    where = address if address != "auto" else _started_here()
    host, _, port = where.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return  # Ray's own error is clear
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_SECONDS).close()
    except OSError as error:
        raise _unreachable(address, error) from error


def _unreachable(address: str, error: Exception) -> RunError:
    what = " ".join(str(error).split())[:200]
    msg = (
        f"no Ray answers at {address} ({what}); start the cluster again, name another (--address, RAY_ADDRESS), or unset "
        "RAY_ADDRESS for a Ray on this machine"
    )
    return RunError(msg)


def _started_here() -> str:
    """Return the address of the cluster that `ray start` started on this machine; empty if there is none."""
    try:
        return (Path(_default_folder()) / "ray/ray_current_cluster").read_text().strip()
    except OSError:
        return ""


def _default_folder() -> str:
    return os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"  # noqa: S108 - as Ray chooses it


def _ray_folder() -> str | None:
    """Return a folder for a local Ray, or None if Ray's default folder is suitable.

    Raises
    ------
    RunError
        `RAY_TMPDIR` is too long for Ray's sockets or not writable, or no folder is writable.
    """
    if _is_fit(Path(_default_folder()) / "ray"):
        return None
    if "RAY_TMPDIR" in os.environ:
        msg = (
            f"Ray cannot keep its files in RAY_TMPDIR={os.environ['RAY_TMPDIR']}: it must be writable and at most "
            f"{LONGEST_FOLDER} characters long; set RAY_TMPDIR to another folder"
        )
        raise RunError(msg)
    for parent in ("/tmp", "/var/tmp", "/dev/shm"):  # noqa: S108 - short paths, as sockets need
        if os.access(parent, os.W_OK | os.X_OK):
            folder = tempfile.mkdtemp(prefix="ray-", dir=parent)
            atexit.register(_leave, folder)
            logger.info("Ray keeps its files in %s: %s is too long or not writable", folder, _default_folder())
            return folder
    msg = "Ray finds no folder to keep its files in; set RAY_TMPDIR to a short one that can be written"
    raise RunError(msg)


def _leave(folder: str) -> None:
    """Shut Ray down and delete its folder."""
    import ray

    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


def _is_fit(folder: Path) -> bool:
    """Return whether Ray can create its sockets below a folder."""
    there = folder if folder.exists() else folder.parent
    return (
        len(str(folder)) <= LONGEST_FOLDER and os.access(there, os.W_OK | os.X_OK) and there.is_dir() and _writes(there)
    )


def _writes(folder: Path) -> bool:
    """Return whether a file can be created in a folder; permissions do not show a read-only file system."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


@contextmanager
def _unless_set(name: str, value: str) -> Iterator[None]:
    """Set an environment variable until the block ends, unless the user has set it."""
    if name in os.environ:
        yield
        return
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]


def _token() -> AbstractContextManager[None]:
    """Give a local Ray an authentication token if it cannot write one to the home folder."""
    if any(name in os.environ for name in TOKEN_VARIABLES) or home_is_writable():
        return nullcontext()
    return _unless_set(TOKEN_VARIABLES[0], secrets.token_hex(32))


@contextmanager
def _on_loopback() -> Iterator[None]:
    """Make a local Ray listen on loopback only, as on macOS and Windows, unless the user has set Ray's switch for it.

    On Linux Ray listens at the machine's address on all interfaces, even with the address 127.0.0.1; this switch is the
    only way to change that.
    """
    from ray._private import ray_constants

    switch, before = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR, ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = before and switch in os.environ
    try:
        with _unless_set(switch, "0"):
            yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def on_a_cluster(settings: RunSettings) -> bool:
    """Return whether tasks will run on an existing Ray, whose machines may differ from this one."""
    if settings.serial:
        return False
    connected = "ray" in sys.modules and sys.modules["ray"].is_initialized()
    return bool(settings.address or os.environ.get("RAY_ADDRESS") or connected)


def object_store_bytes(settings: RunSettings) -> int:
    """Return the size of a local Ray's object store: an eighth of the memory, at most 2 GiB and half of /dev/shm."""
    if settings.object_store_gb is not None:
        return int(settings.object_store_gb * 1e9)
    shm = Path("/dev/shm")  # noqa: S108 - where Ray keeps its objects
    room = shutil.disk_usage(shm).free // 2 if shm.exists() else 2 * GIB
    return max(128 * 2**20, min(2 * GIB, memory_limit() // 8, room))
