"""Hold the one lock of a run directory: `flock` on a local disk, a renewed lease on storage without locks."""

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
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from ndreamer_dist import keys
from ndreamer_dist.errors import RunError, StoreError
from ndreamer_dist.settings import canonical_json
from ndreamer_dist.storage.files import NO_LOCKS, Storage
from ndreamer_dist.storage.retries import hurry

logger = logging.getLogger(__name__)

LEASE_SECONDS = 120.0
"""Lifetime of a lease; a lease that was not renewed for this long may be taken over."""
LOOKS = 40
"""Number of times that a waiting run reads the lock in a lease's lifetime; the holder renews it four times."""


def _holder() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid(), "space": _process_space(), "time": time.time()}


def _process_space() -> str:
    """Return the name of this process's PID namespace, which tells containers apart; empty if it cannot be read."""
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""


def _locked_message(storage: Storage, holder: str) -> str:
    return f"{storage.url} is being worked on by another run ({holder}); wait for it, or choose another --out"


@contextmanager
def file_lock(storage: Storage) -> Iterator[None]:
    """Lock a local directory with `flock`, which the system releases whenever and however the holder ends.

    On a file system without locks, as some clusters mount theirs, it is locked with a lease.

    Raises
    ------
    RunError
        Another run holds the lock.
    """
    path = Path(storage.path(keys.LOCK))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file, ExitStack() as stack:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                file.seek(0)
                raise RunError(_locked_message(storage, file.read().strip() or "unknown")) from None
            stack.enter_context(lease(storage))
        else:
            file.seek(0)
            file.truncate()
            file.write(json.dumps(_holder()))
            file.flush()
        yield


def _lease_in(storage: Storage, name: str = keys.LOCK) -> dict[str, Any]:
    """Return the lease in a file, by default in the lock; empty if the file is missing or unreadable."""
    try:
        return dict(json.loads(storage.read_if_there(name) or b"{}"))
    except (ValueError, TypeError):
        return {}


def _seconds_left(held: Mapping[str, Any]) -> float:
    """Return the remaining seconds of a lease; at most a whole lifetime, even if the holder's clock is ahead."""
    return min(LEASE_SECONDS, float(held.get("time", 0)) + LEASE_SECONDS - time.time())


def _is_of_here(held: Mapping[str, Any]) -> bool:
    """Return whether the holder of a lease is in this container on this machine, so that its process is visible."""
    return bool(held.get("space")) and (held.get("host"), held["space"]) == (socket.gethostname(), _process_space())


def _is_held(held: Mapping[str, Any]) -> bool:
    """Return whether a lease has time left and its holder may be alive; a visible holder must have a process."""
    gone = _is_of_here(held) and not Path(f"/proc/{held.get('pid')}").exists()
    return _seconds_left(held) > 0 and not gone


def _await_holder(storage: Storage) -> dict[str, Any]:
    """Wait until the lease is released or expires, so that a killed run can be continued on another machine.

    Returns
    -------
    The expired lease; empty if there is none.

    Raises
    ------
    RunError
        The holder is alive: its process is visible, or it renewed the lease while this run waited.
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
    """A lease on a directory: a file that names the holder and that the holder renews."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._token = uuid.uuid4().hex
        self.lost = False

    def is_ours(self) -> bool:
        """Return whether the lock on the store is this lease."""
        return _lease_in(self._storage).get("token") == self._token

    def write(self) -> None:
        """Write or renew the lock."""
        self._storage.write_atomic(keys.LOCK, self._content())

    def _content(self) -> bytes:
        return json.dumps(_holder() | {"token": self._token}).encode()

    def take(self, expired: Mapping[str, Any]) -> None:
        """Replace an expired lock by this one, unless another run takes it at the same moment.

        A run first announces itself in a file of its own and then looks for other announcements and for a lock. Of two
        runs, the one that announces itself later sees either the announcement of the other or, if that has been
        deleted, its lock. So at most one of them continues.

        Raises
        ------
        RunError
            Another run holds the lock or is taking it.
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
        """Renew the lock until `stop` is set; interrupt this run if another one has taken over the lock."""
        while not stop.wait(LEASE_SECONDS / 4):
            try:
                with hurry():
                    if self.is_ours():
                        self.write()
                        continue
            except Exception as error:  # noqa: BLE001 - a temporary failure must not end the lease
                logger.warning("the lock of %s could not be renewed; trying again (%s)", self._storage.url, error)
                continue
            self.lost = True
            _interrupt()
            return


def _interrupt() -> None:
    """Raise `KeyboardInterrupt` in the main thread, even where SIGINT is ignored, as under nohup."""
    if callable(signal.getsignal(signal.SIGINT)):
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        return
    main = ctypes.c_ulong(threading.main_thread().ident or 0)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(main, ctypes.py_object(KeyboardInterrupt))


@contextmanager
def lease(storage: Storage) -> Iterator[None]:
    """Lock a directory with a lease that a thread renews during the `with` block.

    Raises
    ------
    RunError
        Another run holds the lock, or took it over because this run could not renew it.
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
    """Delete the lock if it is ours; if the store fails, only warn, since the lease expires by itself."""
    try:
        with hurry():
            if is_ours():
                storage.delete(keys.LOCK)
    except StoreError as error:
        logger.warning("the lock of %s runs out in %.0f s (%s)", storage.url, LEASE_SECONDS, error)
