"""The run directory: what has been done, under which settings, and by whom it is being worked on now.

A stage is cut into shards: the units of work, of retry and of resume. The driver makes a stage's array metadata; a
task writes its shard's files and then its marker `done/<stage>/<shard>.json`. A marker counts only if it carries the
stage's key and if every file it lists is there at its full size, so a deleted or truncated shard is simply work to do.

A stage key is the sha256 of the stage's result-bearing settings, the keys of the stages it reads and the format
version; the first one also takes the input's fingerprint.
"""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import json
import logging
import os
import re
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ndreamer_dist import keys, watching
from ndreamer_dist.errors import DamagedError, RunError, StoreError
from ndreamer_dist.remote import hurry
from ndreamer_dist.sealed import seal, unseal
from ndreamer_dist.settings import Settings, canonical_json
from ndreamer_dist.storage import Storage, open_storage

logger = logging.getLogger(__name__)

LEASE_SECONDS = 120.0
"""A lock on object storage that was not renewed for this long is taken over."""
LOOKS = 40
"""How often a lock is looked at while it is waited for; its holder renews it ten times as seldom."""


@dataclass(frozen=True)
class Stage:
    """What a stage reads, and which settings bear on it: whole parts, less those that only later stages heed."""

    name: str
    settings: tuple[str, ...]
    reads: tuple[str, ...]
    seeded: bool = False
    unheeded: tuple[str, ...] = ()

    def bearing(self, settings: Settings) -> dict[str, dict[str, Any]]:
        """Return the settings that bear on this stage, by part."""
        return {
            part: {
                name: value
                for name, value in getattr(settings, part).bearing().items()
                if f"{part}.{name}" not in self.unheeded
            }
            for part in self.settings
        }


GRAPH: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage(keys.STAGE_COHORT, ("cohort", "hvg"), ()),
        Stage(keys.STAGE_PACK, ("pack",), (keys.STAGE_COHORT,), seeded=True),
        Stage(keys.STAGE_CLUSTERS, ("clusters",), (keys.STAGE_PACK,), seeded=True),
        Stage(keys.STAGE_TRAIN, ("model", "loss", "train"), (keys.STAGE_CLUSTERS,), seeded=True),
        Stage(keys.STAGE_EMBED, ("embed",), (keys.STAGE_PACK, keys.STAGE_TRAIN)),
        Stage(keys.STAGE_PCA, ("embed",), (keys.STAGE_EMBED,)),
        Stage(keys.STAGE_MATCH, ("match",), (keys.STAGE_PCA,), unheeded=("match.edges", "match.bandwidth")),
        Stage(keys.STAGE_EFFECTS, ("effects", "match"), (keys.STAGE_CLUSTERS, keys.STAGE_MATCH)),
    )
}


def stage_keys(settings: Settings, fingerprint: Mapping[str, Any]) -> dict[str, str]:
    """Return the key of every stage, in the order of the flow."""
    found: dict[str, str] = {}
    for name in keys.STAGES:
        stage = GRAPH[name]
        content: dict[str, Any] = {
            "format": keys.FORMAT_VERSION,
            "stage": name,
            "settings": stage.bearing(settings),
            "reads": {other: found[other] for other in stage.reads},
        }
        if stage.seeded:
            content["seed"] = settings.seed
        if name == keys.STAGE_COHORT:
            content["input"] = dict(fingerprint)
        found[name] = hashlib.sha256(canonical_json(content).encode()).hexdigest()
    return found


@dataclass(frozen=True)
class Shard:
    """One unit of work: its name, and the files it writes, by their path in the run directory."""

    name: str
    files: tuple[str, ...]
    task: Any = field(default=None, compare=False)


@dataclass(frozen=True)
class RunDirectory:
    """A run's folder, local or remote; cheap to make, safe to send to a task.

    Attributes
    ----------
    before
        The stage that is run alone: those before it must be finished, so that `pending` refuses where they are not.
    """

    storage: Storage
    before: str | None = None

    @classmethod
    def at(cls, address: str | os.PathLike[str] | Storage) -> RunDirectory:
        """Return the run directory of an address, whether or not anything is there yet."""
        return cls(open_storage(address))

    @property
    def url(self) -> str:
        """The directory's address."""
        return self.storage.url

    @property
    def name(self) -> str:
        """The last part of the address."""
        return self.url.rpartition("/")[2]

    def read_json(self, name: str) -> dict[str, Any]:
        """Return a JSON file's content; `DamagedError` where it is not what was written."""
        return unseal(self.storage.read(name), f"{self.url}/{name}")

    def read_run(self) -> dict[str, Any]:
        """Return what run.json says: `input`, `settings` and `keys`, each an object; `DamagedError` where it does not."""
        told, url = self.read_json(keys.RUN_JSON), f"{self.url}/{keys.RUN_JSON}"
        for name in ("input", "settings", "keys"):
            if not isinstance(told.get(name), dict):
                raise DamagedError.of(url, f"it holds no object '{name}'")
        return told

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Write a JSON file, whole or not at all, with its checksum."""
        self.storage.write_atomic(name, seal(value))

    def free_disk(self) -> int:
        """Return the bytes that may be written here, those of what is there already included."""
        if not self.storage.is_local:
            return 2**62
        folder = Path(self.storage.root)
        while not folder.is_dir():  # the nearest that exists
            folder = folder.parent
        used = sum(self.storage.list().values()) if self.storage.exists() else 0
        return shutil.disk_usage(folder).free + used

    def mark(
        self,
        stage: str,
        key: str,
        shard: Shard,
        facts: Mapping[str, Any] | None = None,
        *,
        sizes: Mapping[str, int] | None = None,
    ) -> None:
        """Write a shard's marker, with facts for `facts` to give back; the shard's files must be complete.

        Parameters
        ----------
        sizes
            Bytes of the files, by path, where the caller knows them; else they are asked for.
        """
        sizes = dict(sizes or self.storage.sizes(shard.files))
        marker = {"key": key, "attempt": _attempt(), "bytes": sum(sizes.values()), "files": sizes}
        if facts is not None:
            marker["facts"] = dict(facts)
        self.write_json(f"{keys.DONE}/{stage}/{shard.name}.json", marker)
        watching.wrote(self.name, stage, sum(sizes.values()))

    def facts(self, stage: str, shard: Shard) -> dict[str, Any]:
        """Return the facts that were put into a finished shard's marker."""
        return dict(self.read_json(f"{keys.DONE}/{stage}/{shard.name}.json")["facts"])

    def unmark(self, stage: str) -> None:
        """Forget all that a stage has done."""
        self.storage.delete(f"{keys.DONE}/{stage}")

    def pending(self, stage: str, key: str, shards: Sequence[Shard]) -> list[Shard]:
        """Return the shards still to be done: without a marker of this key, or with files missing or cut short.

        Raises
        ------
        RunError
            There are some, and only a later stage is to be run.
        """
        markers = self.storage.list(f"{keys.DONE}/{stage}")
        tops = sorted({name.split("/")[0] for shard in shards for name in shard.files})
        sizes: dict[str, int] = {}
        for top in tops:
            sizes.update(self.storage.list(top))
        names = {shard.name: f"{keys.DONE}/{stage}/{shard.name}.json" for shard in shards}
        told = self.storage.read_all([name for name in names.values() if name in markers])
        todo = [shard for shard in shards if not _is_done(key, shard, told.get(names[shard.name]), sizes)]
        if todo and self.before:
            msg = f"stage {stage!r} of {self.url} is not finished; run it before {self.before!r}, or the whole job"
            raise RunError(msg)
        if now := watching.stage_now():
            now.found(stage, len(shards), len(todo))
        return todo

    def refuse_read_only(self) -> None:
        """Raise `RunError` where nothing can be written."""
        if self.storage.is_read_only:
            msg = f"{self.url} can only be read; choose a folder or an object store (s3://, gs://, az://) to write to"
            raise RunError(msg)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the directory's one lock; `RunError` where another live process holds it."""
        self.refuse_read_only()
        with _file_lock(self.storage) if self.storage.is_local else _lease(self.storage), self._mending():
            yield

    @contextmanager
    def _mending(self) -> Iterator[None]:
        """Remove a file of this directory that turns out to be damaged, so that the same command makes it again."""
        try:
            yield
        except DamagedError as error:
            if not error.url.startswith(f"{self.url}/"):
                raise
            self.remove_damaged(error.url.removeprefix(f"{self.url}/"))
            raise DamagedError(error.what, error.url, "the same command makes it again") from error

    def remove_damaged(self, name: str) -> None:
        """Remove a damaged file that the run made, with what else must go so that the run makes it again.

        A checkpoint goes with all of its training's, and an array's metadata, which some stages write only where there
        is work, with a chunk of the array. What the run did not make stays.
        """
        top = name.partition("/")[0]
        if name.startswith(f"{keys.ROWS}/"):
            self.storage.delete(keys.ROWS)
            self.unmark(keys.STAGE_ROWS)
        elif top == keys.TRAIN_DIR:
            self.storage.delete(keys.TRAIN_DIR)
        elif top in keys.MADE:
            file = ArrayFile.of(name)
            # A chunk that never was is one that damaged metadata asks for.
            if file and (file.chunk is None or not self.storage.exists(name)):
                array = f"{file.store}/{file.array}"
                chunks = (other for other in self.storage.list(array) if not other.endswith("zarr.json"))
                for other in (f"{array}/zarr.json", *itertools.islice(chunks, 1)):
                    self.storage.delete_file(other)
            self.storage.delete_file(name)


@dataclass(frozen=True)
class ArrayFile:
    """A file of an array of a run, by its name below the run directory; no chunk: its metadata."""

    store: str
    array: str
    chunk: tuple[int, ...] | None

    @classmethod
    def of(cls, name: str) -> ArrayFile | None:
        """Return what a name means; none for a file of no array."""
        found = re.fullmatch(r"([^/]+\.zarr)/(.+?)/(zarr\.json|c((?:/\d+)*))", name)
        if found is None:
            return None
        place = None if found[4] is None else tuple(int(part) for part in found[4].split("/")[1:])
        return cls(found[1], found[2], place)


def _is_done(key: str, shard: Shard, told: bytes | None, sizes: Mapping[str, int]) -> bool:
    """Return whether a shard's marker is one of this key, and the files that it lists have the sizes it lists."""
    try:
        marker = unseal(told or b"{}", "")
        files = dict(marker.get("files", {}))
    except (DamagedError, ValueError, TypeError):
        return False
    whole = all(sizes.get(path) == size for path, size in files.items())
    return bool(marker.get("key") == key and set(files) == set(shard.files) and whole)


def _attempt() -> int:
    """Return which attempt of its Ray task this is; 0 outside Ray."""
    import ray

    worker = ray._private.worker.global_worker  # Ray tells the attempt nowhere else
    if not ray.is_initialized() or worker.mode != ray.WORKER_MODE:
        return 0
    return int(worker.core_worker.get_current_task_attempt_number())


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
def _file_lock(storage: Storage) -> Iterator[None]:
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
def _lease(storage: Storage) -> Iterator[None]:
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


def run_task(run: RunDirectory, stage: str, key: str, function: Callable[..., None], shard: Shard, *args: Any) -> str:
    """Do one shard and then mark it; this is what runs in a task. Returns the shard's name."""
    function(shard.task, *args)
    run.mark(stage, key, shard)
    return shard.name


def begin_stage(
    run: RunDirectory, stage: str, key: str, shards: Sequence[Shard], create: Callable[[bool], None]
) -> list[Shard]:
    """Return a stage's pending shards, after making its array metadata where there is anything to do.

    `create(fresh)` writes the metadata: over whatever is there where no shard is done under this key (fresh), otherwise
    without touching what finished shards wrote.
    """
    todo = run.pending(stage, key, shards)
    if todo:
        fresh = len(todo) == len(shards)
        if fresh:
            run.unmark(stage)
        create(fresh)
    return todo
