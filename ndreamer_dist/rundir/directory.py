"""Read and write a run directory and the markers of its finished shards.

A stage is split into shards, the units of work, retry and resume. The driver writes the array metadata of a stage. A
task writes the files of its shard and then the marker `done/<stage>/<shard>.json`. A marker is valid only if it has the
key of the stage and every file that it lists exists at its full size, so a deleted or truncated shard is done again.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ndreamer_dist import keys
from ndreamer_dist.compute import events
from ndreamer_dist.errors import DamagedError, RunError
from ndreamer_dist.rundir.lock import file_lock, lease
from ndreamer_dist.storage.checksums import seal, unseal
from ndreamer_dist.storage.files import Storage, open_storage


@dataclass(frozen=True)
class Shard:
    """One unit of work of a stage.

    Attributes
    ----------
    name
        Name of the shard, unique in its stage.
    files
        Files that the shard writes, as paths in the run directory.
    task
        What the task function is called with, for example the number of a row block.
    """

    name: str
    files: tuple[str, ...]
    task: Any = field(default=None, compare=False)


@dataclass(frozen=True)
class RunDirectory:
    """The local or remote folder of a run; cheap to create and safe to send to a task.

    Attributes
    ----------
    before
        Name of a stage that is run alone. `pending` then raises an error if a stage before it has unfinished shards.
    home
        For a matching space that was added to a run: the run's folder, which holds what all spaces share.
    onto
        For cells that are mapped onto a finished run: the directories of the cells whose rows precede theirs.
    """

    storage: Storage
    before: str | None = None
    home: Storage | None = None
    onto: tuple[RunDirectory, ...] = ()

    @classmethod
    def at(cls, address: str | os.PathLike[str] | Storage) -> RunDirectory:
        """Return the run directory at an address; the folder need not exist."""
        return cls(open_storage(address))

    @property
    def url(self) -> str:
        """The directory's address."""
        return self.storage.url

    @property
    def name(self) -> str:
        """The last part of the address."""
        return self.storage.name

    def space(self, method: str) -> RunDirectory:
        """Return the directory of a matching space that is added to this run; the folder need not exist."""
        return RunDirectory(self.storage / keys.space_folder(method), self.before, home=self.storage)

    def spaces(self) -> dict[str, RunDirectory]:
        """Return the directories of a run's matching spaces by name, beginning with the space of the run itself."""
        content = self.read_run()
        first = content["settings"].get("embed", {}).get("method", keys.NDREAMER)
        return {first: self, **{name: self.space(name) for name in content.get("spaces", ())}}

    def embedding(self, array: str) -> Storage:
        """Return the store of an array of coordinates; all spaces of a run share those of the trained network."""
        trained = array in (keys.MU, keys.PCA)
        return ((self.home or self.storage) if trained else self.storage) / keys.EMBEDDING

    def read_json(self, name: str) -> dict[str, Any]:
        """Return the content of a JSON file; raise `DamagedError` if its checksum does not fit."""
        return unseal(self.storage.read(name), f"{self.url}/{name}")

    def read_run(self) -> dict[str, Any]:
        """Return the content of run.json.

        Raises
        ------
        DamagedError
            The file is damaged, or one of its entries `input`, `settings` and `keys` is not a JSON object.
        """
        content, url = self.read_json(keys.RUN_JSON), f"{self.url}/{keys.RUN_JSON}"
        for name in ("input", "settings", "keys"):
            if not isinstance(content.get(name), dict):
                raise DamagedError.of(url, f"it holds no object '{name}'")
        return content

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Write a JSON file atomically, with its checksum."""
        self.storage.write_atomic(name, seal(value))

    def free_disk(self) -> int:
        """Return the bytes that this directory may occupy: free disk space, and what its files occupy already."""
        if not self.storage.is_local:
            return 2**62
        folder = Path(self.storage.root)
        while not folder.is_dir():  # the nearest existing parent
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
        """Write the marker of a shard, whose files must be complete.

        Parameters
        ----------
        facts
            Results of the shard to keep in its marker, as JSON; the method `facts` returns them.
        sizes
            Sizes of the files in bytes by path, if the caller knows them; otherwise they are looked up.
        """
        sizes = dict(sizes or self.storage.sizes(shard.files))
        marker = {"key": key, "attempt": _attempt(), "bytes": sum(sizes.values()), "files": sizes}
        if facts is not None:
            marker["facts"] = dict(facts)
        self.write_json(f"{keys.DONE}/{stage}/{shard.name}.json", marker)
        events.wrote(self.name, stage, sum(sizes.values()))

    def facts(self, stage: str, shard: Shard) -> dict[str, Any]:
        """Return the facts in the marker of a finished shard."""
        return dict(self.read_json(f"{keys.DONE}/{stage}/{shard.name}.json")["facts"])

    def unmark(self, stage: str) -> None:
        """Delete all markers of a stage."""
        self.storage.delete(f"{keys.DONE}/{stage}")

    def done_key(self, stage: str) -> str | None:
        """Return the key in the first readable marker of a stage; `None` if there is no such marker."""
        for name in self.storage.list(f"{keys.DONE}/{stage}"):
            try:
                return str(self.read_json(name)["key"])
            except (DamagedError, KeyError):
                continue
        return None

    def pending(self, stage: str, key: str, shards: Sequence[Shard]) -> list[Shard]:
        """Return the unfinished shards: those without a marker of this key, and those with missing or truncated files.

        Raises
        ------
        RunError
            A shard is unfinished, but only a later stage is to be run (`before`).
        """
        return self.pending_and_there(stage, key, shards)[0]

    def pending_and_there(self, stage: str, key: str, shards: Sequence[Shard]) -> tuple[list[Shard], Collection[str]]:
        """Return the result of `pending`, and the paths of all files in the stores of the shards."""
        markers = self.storage.list(f"{keys.DONE}/{stage}")
        tops = sorted({name.split("/")[0] for shard in shards for name in shard.files})
        sizes: dict[str, int] = {}
        for top in tops:
            sizes.update(self.storage.list(top))
        names = {shard.name: f"{keys.DONE}/{stage}/{shard.name}.json" for shard in shards}
        contents = self.storage.read_all([name for name in names.values() if name in markers])
        todo = [shard for shard in shards if not _is_done(key, shard, contents.get(names[shard.name]), sizes)]
        if todo and self.before:
            msg = f"stage {stage!r} of {self.url} is not finished; run it before {self.before!r}, or the whole job"
            raise RunError(msg)
        if now := events.stage_now():
            now.note_shards(stage, len(shards), len(todo))
        return todo, sizes.keys()

    def refuse_unwritable(self) -> None:
        """Raise `RunError` if the address is on a web server, is a file, or is below a file."""
        if self.storage.is_read_only:
            msg = f"{self.url} can only be read; choose a folder or an object store (s3://, gs://, az://) to write to"
            raise RunError(msg)
        if not self.storage.is_local:
            return
        root = Path(self.storage.root)
        existing = next(path for path in (root, *root.parents) if path.exists())
        if not existing.is_dir():
            msg = f"{self.url} cannot be created: {existing} is a file and no folder; choose another --out"
            raise RunError(msg)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the lock of the directory in the `with` block; raise `RunError` if another live process holds it."""
        self.refuse_unwritable()
        with file_lock(self.storage) if self.storage.is_local else lease(self.storage), self._deleting_damage():
            yield

    @contextmanager
    def _deleting_damage(self) -> Iterator[None]:
        """Delete a file of this directory that the block finds damaged, so that the same command makes it again."""
        try:
            yield
        except DamagedError as error:
            if not error.url.startswith(f"{self.url}/"):
                raise
            self.remove_damaged(error.url.removeprefix(f"{self.url}/"))
            raise DamagedError(error.what, error.url, "the same command makes it again") from error

    def remove_damaged(self, name: str) -> None:
        """Delete a damaged file that the run made, and the files that must be rebuilt with it.

        With a checkpoint, all checkpoints are deleted. With the metadata of an array, one of its chunks is deleted,
        since some stages write metadata only if they have shards to do. Files that the run did not make are kept.
        """
        top = name.partition("/")[0]
        if top == keys.SPACES_DIR:
            folder, _, rest = name.removeprefix(f"{top}/").partition("/")
            RunDirectory(self.storage / f"{top}/{folder}", home=self.storage).remove_damaged(rest)
            return
        if top == keys.TRAIN_DIR:
            self.storage.delete(keys.TRAIN_DIR)
        elif top in keys.MADE:
            file = ArrayFile.of(name)
            # A damaged chunk that does not exist is one that damaged metadata claims.
            if file and (file.chunk is None or not self.storage.exists(name)):
                array = f"{file.store}/{file.array}"
                chunks = (other for other in self.storage.list(array) if not other.endswith("zarr.json"))
                for other in (f"{array}/zarr.json", *itertools.islice(chunks, 1)):
                    self.storage.delete_file(other)
            self.storage.delete_file(name)


@dataclass(frozen=True)
class ArrayFile:
    """A file of an array of a run.

    Attributes
    ----------
    store, array
        Name of the store in the run directory, and path of the array in the store.
    chunk
        Position of the file's chunk (or shard) in the array; `None` for the file of the metadata.
    """

    store: str
    array: str
    chunk: tuple[int, ...] | None

    @classmethod
    def of(cls, name: str) -> ArrayFile | None:
        """Parse a path below the run directory; `None` for a file that belongs to no array."""
        match = re.fullmatch(r"([^/]+\.zarr)/(.+?)/(zarr\.json|c((?:/\d+)*))", name)
        if match is None:
            return None
        chunk = None if match[4] is None else tuple(int(part) for part in match[4].split("/")[1:])
        return cls(match[1], match[2], chunk)


def _is_done(key: str, shard: Shard, data: bytes | None, sizes: Mapping[str, int]) -> bool:
    """Return whether a shard's marker has this key and lists the shard's files with the sizes that they have.

    Parameters
    ----------
    data
        Bytes of the marker; `None` if there is none.
    sizes
        Sizes of the existing files by path.
    """
    try:
        marker = unseal(data or b"{}", "")
        files = dict(marker.get("files", {}))
    except (DamagedError, ValueError, TypeError):
        return False
    whole = all(sizes.get(path) == size for path, size in files.items())
    return bool(marker.get("key") == key and set(files) == set(shard.files) and whole)


def _attempt() -> int:
    """Return the number of the current Ray task's attempt; 0 for the first one and outside Ray."""
    if "ray" not in sys.modules:
        return 0
    import ray

    if not ray.is_initialized():
        return 0
    worker = ray.get_runtime_context().worker
    if worker.mode != ray.WORKER_MODE:
        return 0
    return int(worker.core_worker.get_current_task_attempt_number())
