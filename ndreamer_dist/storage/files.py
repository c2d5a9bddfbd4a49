"""Read, write, list and delete files at an address: a path, `s3://`, `gs://`, `az://` or `https://` (read-only).

`Storage` is an address with five verbs (exists, read, write_atomic, list, delete), so that local disks and object
stores share one code path. There is no rename, since object stores have none. `append_at` appends to a log; on object
storage it writes the whole file again.
"""

from __future__ import annotations

import errno
import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import fsspec
from fsspec.asyn import sync
from zarr.abc.store import Store
from zarr.storage import LocalStore

from ndreamer_dist.errors import DamagedError, StoreError, has_controls
from ndreamer_dist.storage.ranged_file import RangedFile
from ndreamer_dist.storage.retries import (
    ABSENT,
    RemoteStore,
    options,
    reason,
    short_limit,
    upload_limit,
    with_retries,
    without_own_retries,
)
from ndreamer_dist.storage.shards import HttpStore, Reads, count

EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs", "az": "az", "abfs": "az", "abfss": "az"}
"""Extra of this package that installs the file system of a protocol."""
NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, 524})
"""Error numbers of local file systems that do not support locks; 524 is the Linux kernel's ENOTSUPP."""


@dataclass(frozen=True)
class Storage:
    """A local or remote folder, given by its address; cheap to create and safe to pickle."""

    url: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "url", str(self.url).rstrip("/") or "/")

    @property
    def name(self) -> str:
        """The last part of the address."""
        return self.url.rpartition("/")[2]

    @property
    def is_local(self) -> bool:
        """Whether the address is a path on this machine."""
        return "://" not in self.url or self.url.startswith("file://")

    @cached_property
    def _fs_and_root(self) -> tuple[fsspec.AbstractFileSystem, str]:
        fs, root = self._connect(options(self.url))
        return without_own_retries(fs), root

    def _connect(self, how: dict[str, Any]) -> tuple[fsspec.AbstractFileSystem, str]:
        try:
            fs, root = fsspec.core.url_to_fs(self.url, **how)
        except ImportError as error:
            extra = EXTRAS.get(self.url.partition("://")[0])
            help_with = f"pip install 'ndreamer-dist[{extra}]'" if extra else str(error)
            msg = f"{self.url} cannot be reached: a package for such addresses is missing: {help_with}"
            raise StoreError(msg) from error
        except ValueError as error:
            msg = f"{self.url} cannot be reached: {error}; expected a path, s3://, gs://, az:// or https://"
            raise StoreError(msg) from error
        return fs, root

    @property
    def is_read_only(self) -> bool:
        """Whether the address is on a web server, which cannot be written to."""
        return self.url.startswith(("http://", "https://"))

    @property
    def filesystem(self) -> fsspec.AbstractFileSystem:
        """The fsspec file system with its own retries, for callers that use it directly, such as Ray Train."""
        return self._connect(options(self.url, own_tries=True))[0]

    @property
    def root(self) -> str:
        """The address without its protocol."""
        return self._fs_and_root[1]

    def __truediv__(self, name: str) -> Storage:
        return Storage(f"{self.url}/{name}")

    def __getstate__(self) -> dict[str, str]:
        return {"url": self.url}  # every process opens its own file system

    def __setstate__(self, state: dict[str, str]) -> None:
        object.__setattr__(self, "url", state["url"])

    def path(self, name: str) -> str:
        """Return the path of a name below this folder, as the file system spells it."""
        return f"{self.root}/{name}" if name else self.root

    def _ask(
        self,
        name: str,
        cannot: str,
        verb: str,
        *args: Any,
        limit: float | None = None,
        absent: Any = ABSENT,
        **more: Any,
    ) -> Any:
        """Call a method of the file system with retries.

        Parameters
        ----------
        name, cannot
            For the error message: the file, and what cannot be done with it, for example "read".
        verb
            Name of the method; the other arguments are passed on.
        limit
            Timeout of the whole call in seconds; by default none, or the short one inside `hurry`.
        absent
            Exceptions that are answers: they are raised unchanged.
        """
        fs = self._fs_and_root[0]

        def ask() -> Any:
            if not fs.async_impl:
                return getattr(fs, verb)(*args, **more)
            return sync(fs.loop, getattr(fs, f"_{verb}"), *args, timeout=limit or short_limit(), **more)

        return with_retries(fs, self._cannot(name, cannot), ask, absent)

    def _cannot(self, name: str, what: str) -> str:
        """Return the beginning of an error message about a name."""
        return f"{self.url}/{name} cannot be {what}" if name else f"{self.url} cannot be {what}"

    def _refresh(self) -> None:
        """Drop cached listings: other processes write here too."""
        self._fs_and_root[0].invalidate_cache()

    def exists(self, name: str = "") -> bool:
        """Return whether a file or a folder of this name exists."""
        return self._kind(name) is not None

    def is_file(self, name: str = "") -> bool:
        """Return whether a file of this name exists."""
        return self._kind(name) == "file"

    def _kind(self, name: str) -> str | None:
        """Return `file` or `directory`; `None` if nothing has this name."""
        self._refresh()
        try:
            return str(self._ask(name, "looked for", "info", self.path(name))["type"])
        except ABSENT:
            return None

    def read(self, name: str) -> bytes:
        """Return a file's bytes; raise `StoreError` if there is no such file."""
        data = self.read_if_there(name)
        if data is None:
            msg = f"{self.url}/{name} does not exist"
            raise StoreError(msg)
        return data

    def read_if_there(self, name: str, *, counted: bool = True) -> bytes | None:
        """Return a file's bytes; `None` if there is no such file.

        Parameters
        ----------
        counted
            Add the request to the counts of a query. Metadata, and files beside a store, are not counted.
        """
        data = None
        with suppress(*ABSENT):
            data = bytes(self._ask(name, "read", "cat_file", self.path(name)))
        if counted:
            count(Reads(requests=1, bytes=len(data or b"")))
        return data

    def metadata(self, name: str) -> dict[str, Any]:
        """Return the metadata of an array, without counting the request; `FileNotFoundError` if there is none."""
        return metadata_of(self.read_if_there(f"{name}/zarr.json", counted=False))

    def read_all(self, names: Sequence[str]) -> dict[str, bytes]:
        """Read files concurrently and return their bytes by name; files that do not exist are left out."""
        found: dict[str, bytes] = {}
        left = list(names)

        def ask() -> None:
            answers = self._cat([self.path(name) for name in left])
            failed: dict[str, Exception] = {}
            for name, answer in zip(left, answers, strict=True):
                if not isinstance(answer, Exception):
                    found[name] = bytes(answer)
                elif not isinstance(answer, ABSENT):
                    failed[name] = answer
            left[:] = failed
            for error in failed.values():
                raise error

        if left:
            with_retries(self._fs_and_root[0], self._cannot(os.path.commonpath(left), "read"), ask, ())
        count(Reads(requests=len(names), bytes=sum(map(len, found.values()))))
        return {name: found[name] for name in names if name in found}

    def _cat(self, paths: list[str]) -> list[Any]:
        """Return, for every path, the file's bytes or the exception of its request."""
        return list(self._fs_and_root[0].cat_ranges(paths, None, None, on_error="return"))

    def sizes(self, names: Sequence[str]) -> dict[str, int]:
        """Return the sizes in bytes of files, all of which must exist; the requests are concurrent."""
        what = os.path.commonpath(names) if names else ""
        found = self._ask(what, "looked for", "sizes", [self.path(name) for name in names], absent=())
        return dict(zip(names, map(int, found), strict=True))

    def node(self, name: str) -> dict[str, Any] | None:  # noqa: ARG002 - subclasses use it
        """Return the metadata of an array or a group if it is cached, else `None`; this class caches none."""
        return None

    def write_atomic(self, name: str, data: bytes, *more: bytes) -> None:
        """Write a file, given as one or more consecutive pieces, so that a reader sees all of it or nothing.

        Object stores write atomically. On a local disk a temporary file is renamed at the end.
        """
        target = self.path(name)
        if not self.is_local:
            whole = b"".join((data, *more)) if more else data
            self._ask(name, "written", "pipe_file", target, whole, limit=upload_limit(len(whole)), absent=())
            return
        try:
            _write_whole(Path(target), (data, *more))
        except OSError as error:
            msg = f"{self._cannot(name, 'written')} ({reason(error)})"
            raise StoreError(msg) from error

    def list(self, name: str = "") -> dict[str, int]:
        """List the files below a name: size in bytes by path, sorted; empty if there are none."""
        top, cut = self.path(name), len(self.root) + 1
        if self.is_local:
            try:
                return dict(sorted((path[cut:], size) for path, size in _files_below(top)))
            except OSError as error:
                msg = f"{self._cannot(name, 'listed')} ({reason(error)})"
                raise StoreError(msg) from error
        self._refresh()
        try:
            found = self._ask(name, "listed", "find", top, detail=True)
        except ABSENT:
            found = {}
        # s3fs returns the folder itself if its first file is written between two of its requests.
        files = {path: entry for path, entry in found.items() if entry.get("type") != "directory"}
        return {path[cut:]: int(entry["size"] or 0) for path, entry in sorted(files.items())}

    def delete(self, name: str = "") -> None:
        """Delete a file, or a folder with all files below it; do nothing if there is none."""
        self._refresh()
        with suppress(*ABSENT):
            self._ask(name, "deleted", "rm", self.path(name), recursive=True)
            # S3 reports success for a bulk deletion even if single files could not be deleted.
            if not self.is_local and (left := self.list(name)):
                msg = f"{self._cannot(next(iter(left)), 'deleted')} (it is still there: is deleting permitted?)"
                raise StoreError(msg)

    def delete_file(self, name: str) -> None:
        """Delete one file in one request; do nothing if there is none."""
        with suppress(*ABSENT):
            self._ask(name, "deleted", "rm_file", self.path(name))

    def open_file(self, block: int, blocks: int) -> RangedFile:
        """Open the file at this address for reading by byte ranges.

        Parameters
        ----------
        block
            Bytes of a block, the unit of requests.
        blocks
            Number of the last used blocks that are cached.

        Raises
        ------
        StoreError
            The server cannot send ranges, or does not say how long the file is.
        """
        fs, root = self._fs_and_root
        what = self._cannot("", "read")

        def open_it() -> Any:
            return fs.open(root, "rb", block_size=block, cache_type="none")

        file = with_retries(fs, what, open_it, ())

        def fetch(start: int, stop: int) -> bytes:
            file.seek(start)
            try:
                data = bytes(file.read(stop - start))
            except ValueError as error:  # from fsspec: the web server ignores ranges and sends the whole file
                msg = f"{what} by ranges (the server does not support range requests); download it first"
                raise StoreError(msg) from error
            if len(data) != stop - start:
                msg = f"{len(data)} bytes came instead of {stop - start}"
                raise ConnectionError(msg)
            count(Reads(requests=1, bytes=len(data)))
            return data

        size = getattr(file, "size", None)
        if size is None:
            msg = f"{what} by ranges (the server does not say how long it is); download it first"
            raise StoreError(msg)
        return RangedFile(lambda a, b: with_retries(fs, what, lambda: fetch(a, b), ()), int(size), block, blocks)

    def version(self) -> str:
        """Return a text that changes whenever the file does: the size, dates and checksums that the server reports."""
        self._refresh()
        try:
            facts = self._ask("", "looked for", "info", self.root)
        except ABSENT:
            msg = f"{self.url} does not exist"
            raise StoreError(msg) from None
        return str(sorted((name, str(value)) for name, value in facts.items()))

    def store(self, name: str = "", *, read_only: bool = False) -> Store:
        """Return the zarr store of a folder below this one, by default of this one."""
        where = self / name if name else self
        if where.is_local:
            return LocalStore(where.root, read_only=read_only)
        kind = HttpStore if where.url.startswith("http") else RemoteStore
        made = kind.from_url(where.url, storage_options=options(where.url), read_only=read_only)
        without_own_retries(made.fs)
        return made


def _write_whole(target: Path, pieces: Iterable[bytes]) -> None:
    """Write a temporary file in the same folder and rename it, so that the target is never incomplete."""
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, neighbour = tempfile.mkstemp(dir=target.parent, prefix=".", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            file.writelines(pieces)
        Path(neighbour).chmod(0o644)
        Path(neighbour).replace(target)
    except BaseException:
        Path(neighbour).unlink(missing_ok=True)
        raise


def append_at(storage: Storage, name: str, start: int, data: bytes) -> None:
    """Write `data` after the first `start` bytes of a file; drop what follows them.

    So half a line, written by a process that was killed, is dropped. A local file is extended in place; with `start` 0
    it is written atomically. An object cannot grow: its first bytes are read and the whole object is written again.
    """
    if not start or not storage.is_local:
        storage.write_atomic(name, storage.read(name)[:start] if start else b"", data)
        return
    path = Path(storage.path(name))
    try:
        with path.open("r+b") as file:
            file.truncate(start)
            file.seek(start)
            file.write(data)
    except OSError as error:
        msg = f"{storage.url}/{name} cannot be written ({reason(error)})"
        raise StoreError(msg) from error


def _files_below(top: str) -> Iterator[tuple[str, int]]:
    """Yield path and size of the local files below a folder, or of the file itself; an unreadable folder raises."""
    with suppress(*ABSENT):
        if not Path(top).is_dir():
            yield top, Path(top).stat().st_size
            return
        with os.scandir(top) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    yield from _files_below(entry.path)
                else:
                    with suppress(FileNotFoundError):  # deleted since the folder was listed
                        yield entry.path, entry.stat().st_size


class ConsolidatedStorage(Storage):
    """A finished zarr store: its root holds all metadata, so arrays open without further requests."""

    @cached_property
    def root_metadata(self) -> dict[str, Any] | None:
        """The root's `zarr.json`, or `None` if there is none; raises `StoreError` if it cannot be read."""
        data = self.read_if_there("zarr.json")
        try:
            return None if data is None else _root_of(json.loads(data))
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise DamagedError.of(self.url + "/zarr.json", error) from error

    @property
    def nodes(self) -> dict[str, dict[str, Any]]:
        """Metadata of every array and group by path; empty if the root holds none."""
        return ((self.root_metadata or {}).get("consolidated_metadata") or {}).get("metadata", {})

    def node(self, name: str) -> dict[str, Any] | None:
        """Return the metadata of an array or a group; `None` if there is no such node."""
        return self.nodes.get(name)


def _root_of(root: Any) -> dict[str, Any]:
    """Return a root's metadata; raise `TypeError` if its attributes or nodes are not JSON objects."""
    nodes = (root.get("consolidated_metadata") or {}).get("metadata", {})
    for part in (root.get("attributes", {}), *nodes.values()):
        if not isinstance(part, dict):
            msg = f"an object is expected, found {type(part).__name__}"
            raise TypeError(msg)
    return dict(root)


def open_storage(address: str | os.PathLike[str] | Storage) -> Storage:
    """Return the storage of an address; a relative path becomes absolute, because tasks run in other folders.

    Raises
    ------
    StoreError
        The address holds control characters, a pattern of file names, or a password.
    """
    if isinstance(address, Storage):
        return address
    text = os.fspath(address)
    if has_controls(text):
        msg = f"address {text!r} holds control characters"
        raise StoreError(msg)
    if re.match(r"(?!https?:)[^/]*://.*[*?\[\]]", text):
        msg = f"address {text!r} holds one of * ? [ ], which file systems read as a pattern of several names"
        raise StoreError(msg)
    if re.match(r"[^/]*://[^/@]*:[^/@]*@", text):
        msg = f"a {text.partition(':')[0]}:// address holds a password; credentials come from the environment alone"
        raise StoreError(msg)
    return Storage(text if "://" in text else str(Path(text).expanduser().absolute()))


def metadata_of(data: bytes | None) -> dict[str, Any]:
    """Return the metadata in the bytes of a `zarr.json`; raise `FileNotFoundError` for `None`, a missing file."""
    if data is None:
        msg = "there is no zarr.json"
        raise FileNotFoundError(msg)
    return dict(json.loads(data))
