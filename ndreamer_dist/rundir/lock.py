"""The one lock of a run directory: `flock` on a local disk, a renewed lease on object storage."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ndreamer_dist import keys
from ndreamer_dist.errors import RunError, StoreError
from ndreamer_dist.settings import canonical_json
from ndreamer_dist.storage.files import Storage
from ndreamer_dist.storage.retries import hurry

logger = logging.getLogger(__name__)

LEASE_SECONDS = 120.0
"""A lock on object storage that was not renewed for this long is taken over."""
LOOKS = 40
"""How often a lock is looked at while it is waited for; its holder renews it ten times as seldom."""


def _holder() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid(), "space": _process_space(), "time": time.time()}


def _process_space() -> str:
    """Return what tells this container's process ids from those of others; empty where the system does not tell."""
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""


def _locked_message(storage: Storage, holder: str) -> str:
    return f"{storage.url} is being worked on by another run ({holder}); wait for it, or choose another --out"


@contextmanager
def file_lock(storage: Storage) -> Iterator[None]:
    """Lock a local directory by `flock`, which the system lets go when its holder dies, however it dies."""
    path = Path(storage.path(keys.LOCK))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            raise RunError(_locked_message(storage, file.read().strip() or "unknown")) from None
        file.seek(0)
        file.truncate()
        file.write(json.dumps(_holder()))
        file.flush()
        yield


def _lock_of(storage: Storage) -> dict[str, Any]:
    """Return what a remote directory's lock says; nothing where there is none, or none that can be read."""
    try:
        return dict(json.loads(storage.read_if_there(keys.LOCK) or b"{}"))
    except ValueError:
        return {}


def _seconds_left(held: Mapping[str, Any]) -> float:
    """Return how long a lease lasts that is not renewed; no longer than any lease, whatever its holder's clock says."""
    return min(LEASE_SECONDS, float(held.get("time", 0)) + LEASE_SECONDS - time.time())


def _is_of_here(held: Mapping[str, Any]) -> bool:
    """Return whether a lease's holder is of this machine and container, so that its process can be seen."""
    return bool(held.get("space")) and (held.get("host"), held["space"]) == (socket.gethostname(), _process_space())


def _is_held(held: Mapping[str, Any]) -> bool:
    """Return whether a lease's holder may be alive; of one of this machine and container that can be seen at once."""
    gone = _is_of_here(held) and not Path(f"/proc/{held.get('pid')}").exists()
    return _seconds_left(held) > 0 and not gone


def _await_holder(storage: Storage) -> None:
    """Wait until a lease is let go or has run out, so that a retry on another machine goes on after a killed run.

    Raises
    ------
    RunError
        The holder lives: it can be seen, or it renews the lease meanwhile.
    """
    first = held = _lock_of(storage)
    seconds = _seconds_left(first)
    until = time.monotonic() + seconds
    while _is_held(held) and time.monotonic() < until:
        if _is_of_here(held) or held != first:
            raise RunError(_locked_message(storage, canonical_json(held)))
        if held is first:
            holder = f"process {held.get('pid')} on {held.get('host')}"
            logger.warning("%s is locked by %s; waiting %.0f s for a sign of life", storage.url, holder, seconds)
        time.sleep(LEASE_SECONDS / LOOKS)
        held = _lock_of(storage)


@contextmanager
def lease(storage: Storage) -> Iterator[None]:
    """Lock a remote directory by a lease that is renewed while its holder lives."""
    _await_holder(storage)
    stop = threading.Event()
    token = uuid.uuid4().hex

    def is_ours() -> bool:
        return _lock_of(storage).get("token") == token

    def write() -> None:
        storage.write_atomic(keys.LOCK, json.dumps(_holder() | {"token": token}).encode())

    def renew() -> None:
        while not stop.wait(LEASE_SECONDS / 4):
            try:
                with hurry():
                    if is_ours():
                        write()
            except Exception as error:  # noqa: BLE001 - a store that is away for a moment must not end the lease
                logger.warning("the lock of %s could not be renewed; trying again (%s)", storage.url, error)

    write()
    if not is_ours():  # of two that began at once the later one has it
        raise RunError(_locked_message(storage, canonical_json(_lock_of(storage))))
    renewal = threading.Thread(target=renew, daemon=True, name="ndreamer-lease")
    renewal.start()
    try:
        yield
    finally:
        stop.set()
        renewal.join()
        _let_go(storage, is_ours)


def _let_go(storage: Storage, is_ours: Callable[[], bool]) -> None:
    """Delete a lease; where the store does not answer it runs out by itself, and must not hide why the run ended."""
    try:
        with hurry():
            if is_ours():
                storage.delete(keys.LOCK)
    except StoreError as error:
        logger.warning("the lock of %s runs out in %.0f s (%s)", storage.url, LEASE_SECONDS, error)
