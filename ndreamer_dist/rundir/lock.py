"""Hold the one lock of a run directory: `flock` on a local disk, a renewed lease on object storage."""

from __future__ import annotations

import ctypes
import fcntl
import json
import logging
import os
import signal
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
"""How often a waiting run reads the lock; the holder renews it a tenth as often."""


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


def _lease_in(storage: Storage, name: str = keys.LOCK) -> dict[str, Any]:
    """Return the lease that a file holds, by default the lock; empty if there is none that can be read."""
    try:
        return dict(json.loads(storage.read_if_there(name) or b"{}"))
    except ValueError:
        return {}


def _seconds_left(held: Mapping[str, Any]) -> float:
    """Return the seconds that a lease still lasts; at most those of a new one, however the clocks differ."""
    return min(LEASE_SECONDS, float(held.get("time", 0)) + LEASE_SECONDS - time.time())


def _is_of_here(held: Mapping[str, Any]) -> bool:
    """Return whether a lease's holder is of this machine and container, so that its process can be seen."""
    return bool(held.get("space")) and (held.get("host"), held["space"]) == (socket.gethostname(), _process_space())


def _is_held(held: Mapping[str, Any]) -> bool:
    """Return whether the holder of a lease may be alive; on this machine and in this container, whether its process is."""
    gone = _is_of_here(held) and not Path(f"/proc/{held.get('pid')}").exists()
    return _seconds_left(held) > 0 and not gone


def _await_holder(storage: Storage) -> dict[str, Any]:
    """Wait until a lease is let go or has run out, so that a retry on another machine goes on after a killed run.

    Returns the lease that has run out; nothing where there is none.

    Raises
    ------
    RunError
        The holder lives: it can be seen, or it renews the lease meanwhile.
    """
    first = held = _lease_in(storage)
    seconds = _seconds_left(first)
    until = time.monotonic() + seconds
    while _is_held(held) and time.monotonic() < until:
        if _is_of_here(held) or held != first:
            raise RunError(_locked_message(storage, canonical_json(held)))
        if held is first:
            holder = f"process {held.get('pid')} on {held.get('host')}"
            logger.warning("%s is locked by %s; waiting %.0f s for a sign of life", storage.url, holder, seconds)
        time.sleep(LEASE_SECONDS / LOOKS)
        held = _lease_in(storage)
    return held


class _Lease:
    """A lease on a remote directory: a file that its holder renews, and that says who the holder is."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._token = uuid.uuid4().hex
        self.lost = False

    def is_ours(self) -> bool:
        """Return whether the lock names this holder."""
        return _lease_in(self._storage).get("token") == self._token

    def write(self) -> None:
        """Write or renew the lock."""
        self._storage.write_atomic(keys.LOCK, self._content())

    def _content(self) -> bytes:
        return json.dumps(_holder() | {"token": self._token}).encode()

    def take(self, expired: Mapping[str, Any]) -> None:
        """Write the lock in place of one that has run out, unless another run writes it at the same moment.

        A run first announces itself in a file of its own, then looks for other announcements and for a lock. Of two
        runs, the one that announces itself later sees the other's announcement or, once that is gone, its lock; so
        never do both go on.

        Raises
        ------
        RunError
            Another run holds the lock, or is about to.
        """
        own = f"{keys.LOCK_ANNOUNCED}/{self._token}"
        self._storage.write_atomic(own, self._content())
        try:
            others = [name for name in self._storage.list(keys.LOCK_ANNOUNCED) if name != own]
            for held in (*(_lease_in(self._storage, name) for name in others), _lease_in(self._storage)):
                if held and held != expired and _is_held(held):
                    raise RunError(_locked_message(self._storage, canonical_json(held)))
            self.write()
        finally:
            self._storage.delete_file(own)

    def renew_until(self, stop: threading.Event) -> None:
        """Renew the lock until `stop`; where another run has taken it over, interrupt this one."""
        while not stop.wait(LEASE_SECONDS / 4):
            try:
                with hurry():
                    if self.is_ours():
                        self.write()
                        continue
            except Exception as error:  # noqa: BLE001 - a store that is away for a moment must not end the lease
                logger.warning("the lock of %s could not be renewed; trying again (%s)", self._storage.url, error)
                continue
            self.lost = True
            _interrupt()
            return


def _interrupt() -> None:
    """Interrupt the main thread; where Ctrl-C is ignored, as under nohup, at its next step in Python."""
    if callable(signal.getsignal(signal.SIGINT)):
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        return
    main = ctypes.c_ulong(threading.main_thread().ident or 0)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(main, ctypes.py_object(KeyboardInterrupt))


@contextmanager
def lease(storage: Storage) -> Iterator[None]:
    """Lock a remote directory by a lease that is renewed while its holder lives.

    Raises
    ------
    RunError
        Another run holds the lock, or took it over because this one could not renew it.
    """
    held, stop = _Lease(storage), threading.Event()
    held.take(_await_holder(storage))
    renewal = threading.Thread(target=held.renew_until, args=(stop,), daemon=True, name="ndreamer-lease")
    renewal.start()
    try:
        yield
    except KeyboardInterrupt:
        if not held.lost:
            raise
        msg = f"{storage.url} was taken over by another run, since this one could not renew its lock; it has stopped"
        raise RunError(msg) from None
    finally:
        stop.set()
        renewal.join()
        _let_go(storage, held.is_ours)


def _let_go(storage: Storage, is_ours: Callable[[], bool]) -> None:
    """Delete a lease; where the store does not answer it runs out by itself, and must not hide why the run ended."""
    try:
        with hurry():
            if is_ours():
                storage.delete(keys.LOCK)
    except StoreError as error:
        logger.warning("the lock of %s runs out in %.0f s (%s)", storage.url, LEASE_SECONDS, error)
