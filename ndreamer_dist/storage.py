"""One layer for every place a byte can live: a local path, `s3://`, `gs://`, `az://` or `https://` (read-only).

`Storage` is a root address with five verbs (exists, read, write_atomic, list, delete), and no rename and no append, so
that a local disk and an object store are one code path. zarr arrays are created here and only here, so that every
chunk of every array ends in `crc32c`, and read here, so that a damaged or missing chunk is an error that names store,
array and chunk, never a wrong number.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import zarr
from fsspec.asyn import sync
from zarr.abc.store import ByteRequest, Store
from zarr.codecs import BloscCodec, Crc32cCodec
from zarr.core.array import AsyncArray
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.core.metadata import ArrayV3Metadata
from zarr.storage import LocalStore, MemoryStore, StorePath, WrapperStore

from ndreamer_dist.chunks import HttpStore, Place, Position, Reads, count, read_chunks
from ndreamer_dist.errors import DamagedError, StoreError, has_controls
from ndreamer_dist.ranged import RangedFile
from ndreamer_dist.remote import ABSENT, RemoteStore, alone, options, patiently, reason, short_limit, upload_limit

METADATA_SEAL = "ndreamer_sha256"
"""Attribute of arrays that are ours alone: the checksum of their metadata."""
COMPRESSORS = (BloscCodec(cname="lz4", clevel=5, shuffle="shuffle"), Crc32cCodec())
"""Codec chain of our arrays. The checksum comes last, so it covers the very bytes that are stored.

They are read and written by zarr's own codec pipeline: zarrs 0.2.3 lets flipped bits through when it decodes a whole
shard, and leaves empty chunks out whatever the setting.
"""


EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs", "az": "az", "abfs": "az", "abfss": "az"}
"""The extra of this package that brings what an address needs."""


MOST_CHUNKS = 2**31
"""No array has more chunks than that; one that claims them would be walked through for ever."""


@dataclass(frozen=True)
class Storage:
    """A folder, local or remote, by its address; cheap to make, safe to pickle."""

    url: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "url", str(self.url).rstrip("/") or "/")

    @property
    def is_local(self) -> bool:
        """Whether the address is a path on this machine."""
        return "://" not in self.url or self.url.startswith("file://")

    @cached_property
    def _fs_and_root(self) -> tuple[fsspec.AbstractFileSystem, str]:
        fs, root = self._connect(options(self.url))
        return alone(fs), root

    def _connect(self, how: dict[str, Any]) -> tuple[fsspec.AbstractFileSystem, str]:
        try:
            fs, root = fsspec.core.url_to_fs(self.url, **how)
        except ImportError as error:
            extra = EXTRAS.get(self.url.partition("://")[0])
            help_with = f"pip install 'ndreamer-dist[{extra}]'" if extra else str(error)
            msg = f"{self.url} cannot be reached: a package for such addresses is missing: {help_with}"
            raise StoreError(msg) from error
        except ValueError as error:
            msg = f"{self.url} cannot be reached: {error}; there are paths, s3://, gs://, az:// and https://"
            raise StoreError(msg) from error
        return fs, root

    @property
    def is_read_only(self) -> bool:
        """Whether the address is a web server's, which only gives."""
        return self.url.startswith(("http://", "https://"))

    @property
    def filesystem(self) -> fsspec.AbstractFileSystem:
        """The fsspec file system, for those that ask it directly, as Ray Train does; it tries again by itself."""
        return self._connect(options(self.url, own_tries=True))[0]

    @property
    def root(self) -> str:
        """The address without its protocol."""
        return self._fs_and_root[1]

    def __truediv__(self, name: str) -> Storage:
        return Storage(f"{self.url}/{name}")

    def __getstate__(self) -> dict[str, str]:
        return {"url": self.url}  # the file system of a process stays in that process

    def __setstate__(self, state: dict[str, str]) -> None:
        object.__setattr__(self, "url", state["url"])

    def path(self, name: str) -> str:
        """Return the file system's path of a name below this folder."""
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
        """Make a request of the file system, patiently; an error says what cannot be done with a name."""
        fs = self._fs_and_root[0]

        def ask() -> Any:
            if not fs.async_impl:
                return getattr(fs, verb)(*args, **more)
            return sync(fs.loop, getattr(fs, f"_{verb}"), *args, timeout=limit or short_limit(), **more)

        return patiently(fs, self._cannot(name, cannot), ask, absent)

    def _cannot(self, name: str, what: str) -> str:
        """Return how an error about a name begins."""
        return f"{self.url}/{name} cannot be {what}" if name else f"{self.url} cannot be {what}"

    def _refresh(self) -> None:
        """Forget what was listed before: others write here too."""
        self._fs_and_root[0].invalidate_cache()

    def exists(self, name: str = "") -> bool:
        """Return whether a file or a folder of this name is there."""
        return self._kind(name) is not None

    def is_file(self, name: str = "") -> bool:
        """Return whether a file of this name is there."""
        return self._kind(name) == "file"

    def _kind(self, name: str) -> str | None:
        """Return `file` or `directory`; none where there is neither."""
        self._refresh()
        try:
            return str(self._ask(name, "looked for", "info", self.path(name))["type"])
        except ABSENT:
            return None

    def read(self, name: str) -> bytes:
        """Return a file's bytes; `StoreError` where there is none."""
        data = self.read_if_there(name)
        if data is None:
            msg = f"{self.url}/{name} does not exist"
            raise StoreError(msg)
        return data

    def read_if_there(self, name: str) -> bytes | None:
        """Return a file's bytes; none where there is no such file."""
        data = self._fetched(name)
        count(Reads(requests=1, bytes=len(data or b"")))
        return data

    def _fetched(self, name: str) -> bytes | None:
        """Return a file's bytes, uncounted; none where there is no such file."""
        try:
            return bytes(self._ask(name, "read", "cat_file", self.path(name)))
        except ABSENT:
            return None

    def metadata(self, name: str) -> dict[str, Any]:
        """Return the metadata of an array, uncounted as when zarr asks for it; `FileNotFoundError` where there is none."""
        return metadata_of(self._fetched(f"{name}/zarr.json"))

    def read_all(self, names: Sequence[str]) -> dict[str, bytes]:
        """Return the bytes of those of some files that are there, read side by side."""
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
            patiently(self._fs_and_root[0], self._cannot(os.path.commonpath(left), "read"), ask, ())
        count(Reads(requests=len(names), bytes=sum(map(len, found.values()))))
        return {name: found[name] for name in names if name in found}

    def _cat(self, paths: list[str]) -> list[Any]:
        """Return the bytes of files, or the errors that came instead."""
        return list(self._fs_and_root[0].cat_ranges(paths, None, None, on_error="return"))

    def sizes(self, names: Sequence[str]) -> dict[str, int]:
        """Return the bytes of files that are all there, asked for side by side."""
        what = os.path.commonpath(names) if names else ""
        found = self._ask(what, "looked for", "sizes", [self.path(name) for name in names], absent=())
        return dict(zip(names, map(int, found), strict=True))

    def node(self, name: str) -> dict[str, Any] | None:  # noqa: ARG002 - for those that know
        """Return the metadata of an array or a group where it is known without a request; here it is not."""
        return None

    def write_atomic(self, name: str, data: bytes) -> None:
        """Write a file so that a reader sees all of it or none.

        An object store does this by itself; on a local disk the bytes go to a neighbour that takes the name at the end.
        """
        target = self.path(name)
        if not self.is_local:
            self._ask(name, "written", "pipe_file", target, data, limit=upload_limit(len(data)), absent=())
            return
        try:
            _write_whole(Path(target), data)
        except OSError as error:
            msg = f"{self._cannot(name, 'written')} ({reason(error)})"
            raise StoreError(msg) from error

    def list(self, name: str = "") -> dict[str, int]:
        """Return every file below a name with its size in bytes, in one listing; empty where there is nothing."""
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
        # s3fs answers with the folder itself where its first file comes between two of its requests.
        files = {path: entry for path, entry in found.items() if entry.get("type") != "directory"}
        return {path[cut:]: int(entry["size"] or 0) for path, entry in sorted(files.items())}

    def delete(self, name: str = "") -> None:
        """Delete a file or a folder with all below it; nothing happens where there is none."""
        self._refresh()
        with suppress(*ABSENT):
            self._ask(name, "deleted", "rm", self.path(name), recursive=True)
            # S3 answers "done" for many files at once, whatever became of each.
            if not self.is_local and (left := self.list(name)):
                msg = f"{self._cannot(next(iter(left)), 'deleted')} (it is still there: is deleting permitted?)"
                raise StoreError(msg)

    def delete_file(self, name: str) -> None:
        """Delete one file, in one request; nothing happens where there is none."""
        with suppress(*ABSENT):
            self._ask(name, "deleted", "rm_file", self.path(name))

    def open_file(self, block: int, blocks: int) -> RangedFile:
        """Open the one file that this address is, to be read by ranges; the last `blocks` blocks are kept."""
        fs, root = self._fs_and_root
        what = self._cannot("", "read")

        def open_it() -> Any:
            return fs.open(root, "rb", block_size=block, cache_type="none")

        file = patiently(fs, what, open_it, ())

        def fetch(start: int, stop: int) -> bytes:
            file.seek(start)
            try:
                data = bytes(file.read(stop - start))
            except ValueError as error:  # fsspec's, of a web server that sends all of a file for a part of it
                msg = f"{what} by ranges (the server sends whole files alone); download it first"
                raise StoreError(msg) from error
            if len(data) != stop - start:
                msg = f"{len(data)} bytes came in place of {stop - start}"
                raise ConnectionError(msg)
            count(Reads(requests=1, bytes=len(data)))
            return data

        size = getattr(file, "size", None)
        if size is None:
            msg = f"{what} by ranges (the server does not say how long it is); download it first"
            raise StoreError(msg)
        return RangedFile(lambda a, b: patiently(fs, what, lambda: fetch(a, b), ()), int(size), block, blocks)

    def version(self) -> str:
        """Return what changes when the one file that this address is does: size, dates and checksums, as far as told."""
        self._refresh()
        try:
            told = self._ask("", "looked for", "info", self.root)
        except ABSENT:
            msg = f"{self.url} does not exist"
            raise StoreError(msg) from None
        return str(sorted((name, str(value)) for name, value in told.items()))

    def store(self, name: str = "", *, read_only: bool = False) -> Store:
        """Return the zarr store of a folder."""
        where = self / name if name else self
        if where.is_local:
            return LocalStore(where.root, read_only=read_only)
        kind = HttpStore if where.url.startswith("http") else RemoteStore
        made = kind.from_url(where.url, storage_options=options(where.url), read_only=read_only)
        alone(made.fs)
        return made


def _write_whole(target: Path, data: bytes) -> None:
    """Write a local file by a neighbour that takes its name at the end."""
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, neighbour = tempfile.mkstemp(dir=target.parent, prefix=".", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        Path(neighbour).chmod(0o644)
        Path(neighbour).replace(target)
    except BaseException:
        Path(neighbour).unlink(missing_ok=True)
        raise


def _files_below(top: str) -> Iterator[tuple[str, int]]:
    """Give the local files below a folder, or the one that it is, with their sizes; a folder that may not be read raises."""
    with suppress(*ABSENT):
        if not Path(top).is_dir():
            yield top, Path(top).stat().st_size
            return
        with os.scandir(top) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    yield from _files_below(entry.path)
                else:
                    with suppress(FileNotFoundError):  # it was there a moment ago
                        yield entry.path, entry.stat().st_size


class ConsolidatedStorage(Storage):
    """A finished zarr store, whose root holds the metadata of all below it: arrays open without a request."""

    @cached_property
    def root_metadata(self) -> dict[str, Any] | None:
        """The root's `zarr.json`; none where there is none. `StoreError` where it cannot be read."""
        found = self.read_if_there("zarr.json")
        try:
            return None if found is None else _root_of(json.loads(found))
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise DamagedError.of(self.url + "/zarr.json", error) from error

    @property
    def nodes(self) -> dict[str, dict[str, Any]]:
        """Metadata of every array and group, by path; empty where the root holds none."""
        return ((self.root_metadata or {}).get("consolidated_metadata") or {}).get("metadata", {})

    def node(self, name: str) -> dict[str, Any] | None:
        """Return the metadata of an array or a group; none where there is no such."""
        return self.nodes.get(name)


def _root_of(told: Any) -> dict[str, Any]:
    """Return a root's metadata, where objects are what is read as objects."""
    nodes = (told.get("consolidated_metadata") or {}).get("metadata", {})
    for part in (told.get("attributes", {}), *nodes.values()):
        if not isinstance(part, dict):
            msg = f"an object is expected, found {type(part).__name__}"
            raise TypeError(msg)
    return dict(told)


def open_storage(address: str | os.PathLike[str] | Storage) -> Storage:
    """Return the storage of an address; a relative path becomes absolute, since tasks run in other folders."""
    if isinstance(address, Storage):
        return address
    text = os.fspath(address)
    if has_controls(text):
        msg = f"address {text!r} holds characters that no address has"
        raise StoreError(msg)
    if re.match(r"(?!https?:)[^/]*://.*[*?\[\]]", text):
        msg = f"address {text!r} holds one of * ? [ ], which file systems read as a pattern of several names"
        raise StoreError(msg)
    if re.match(r"[^/]*://[^/@]*:[^/@]*@", text):
        msg = f"a {text.partition(':')[0]}:// address holds a password; credentials come from the environment alone"
        raise StoreError(msg)
    return Storage(text if "://" in text else str(Path(text).expanduser().absolute()))


def create_array(
    storage: Storage,
    name: str,
    *,
    shape: Sequence[int],
    dtype: Any,
    chunks: Sequence[int],
    shards: Sequence[int] | None = None,
    fill_value: Any = 0,
    attributes: dict[str, Any] | None = None,
) -> None:
    """Write an array's metadata over whatever stood there; its shards are written by their owners, each whole.

    Parameters
    ----------
    storage, name
        The store and the array's path in it. No parent's metadata is touched, so the root stays unmade until the end.
    chunks, shards
        Shapes of the unit of reading and of the unit of writing (whole chunks; none: a chunk is its own shard).
    attributes
        Of an array that other tools read or change too; none: it is ours alone, and its metadata carries a checksum.
    """
    if storage.is_local:  # on object storage, where each look costs, what stood there is written over or not read
        storage.delete(name)
    layout = {"shape": shape, "dtype": dtype, "chunks": chunks, "shards": shards, "fill_value": fill_value}
    storage.write_atomic(f"{name}/zarr.json", _metadata(**layout, attributes=attributes))


def _metadata(
    shape: Sequence[int],
    dtype: Any,
    chunks: Sequence[int],
    shards: Sequence[int] | None = None,
    fill_value: Any = 0,
    attributes: dict[str, Any] | None = None,
) -> bytes:
    """Return the `zarr.json` of an array."""
    files: dict[str, Any] = {}
    zarr.create_array(
        MemoryStore(files),
        shape=tuple(shape),
        dtype=dtype,
        chunks=tuple(max(1, c) for c in chunks),
        shards=None if shards is None else tuple(max(1, s) for s in shards),
        fill_value=fill_value,
        compressors=COMPRESSORS,
        attributes=attributes,
        zarr_format=3,
    )
    if attributes is not None:
        return bytes(files["zarr.json"].to_bytes())
    told = json.loads(files["zarr.json"].to_bytes())
    told["attributes"][METADATA_SEAL] = metadata_digest(told)
    return json.dumps(told, indent=2).encode()


def metadata_digest(told: Mapping[str, Any]) -> str:
    """Return the checksum of an array's metadata, itself left out."""
    own = {name: value for name, value in told.get("attributes", {}).items() if name != METADATA_SEAL}
    text = json.dumps({**told, "attributes": own}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def metadata_of(data: bytes | None) -> dict[str, Any]:
    """Return the metadata that a `zarr.json` holds; `FileNotFoundError` where there is none."""
    if data is None:
        msg = "there is no zarr.json"
        raise FileNotFoundError(msg)
    return dict(json.loads(data))


def opened_with(told: Mapping[str, Any], where: StorePath) -> AsyncArray[Any]:
    """Open an array by its metadata, which must be what was written; `ValueError` where it is not."""
    if told.get("attributes", {}).get(METADATA_SEAL, "") not in ("", metadata_digest(told)):
        msg = "the metadata's checksum is that of another content"
        raise ValueError(msg)
    return AsyncArray(ArrayV3Metadata.from_dict(dict(told)), where)


def ensure_array(storage: Storage, name: str, **layout: Any) -> None:
    """Make sure that an array's metadata is what `create_array` would write; its chunks are left as they are.

    So a stage that was interrupted, or lost a shard, goes on without disturbing what is done.
    """
    wanted = _metadata(**layout)
    path = f"{name}/zarr.json"
    if storage.read_if_there(path) != wanted:
        storage.write_atomic(path, wanted)


class _Unseen(WrapperStore[Store]):
    """A store that shows metadata and no chunks: zarr reads a shard before it writes it, and it may be damaged."""

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        """See zarr's `Store.get`."""
        return await super().get(key, prototype, byte_range) if key.endswith("zarr.json") else None


def write_part(
    storage: Storage,
    name: str,
    selection: Any,
    values: np.ndarray[Any, Any],
    *,
    opened: zarr.Array[Any] | None = None,
) -> None:
    """Write the whole shards of a selection by slices, whatever, damaged or not, stood there before.

    Parameters
    ----------
    opened
        The array, where the caller has opened it before with mode `w`; opening takes a request.
    """
    array = open_array(storage, name, mode="w") if opened is None else opened
    with _writing(storage, name):
        array[selection] = values


@contextmanager
def _writing(storage: Storage, name: str) -> Iterator[None]:
    """Say of an error of the system which array was being written."""
    try:
        yield
    except OSError as error:
        msg = f"{storage.url}: array '{name}' cannot be written ({reason(error)})"
        raise StoreError(msg) from error


def open_array(storage: Storage, name: str, *, mode: str = "r") -> zarr.Array[Any]:
    """Open an array by its path; `StoreError` names it where it is missing or its metadata cannot be read.

    Parameters
    ----------
    mode
        `r`, `r+`, or `w` to write whole shards only, without a look at what stands there.
    """
    try:
        store = _Unseen(storage.store(name)) if mode == "w" else storage.store(name, read_only=mode == "r")
        known = storage.node(name) if mode == "r" else None
        if known is None:
            known = storage.metadata(name)
        array = sensible(zarr.Array(opened_with(known, StorePath(store))))
        return array if mode == "r" else _writable(array)
    except StoreError:
        raise
    except Exception as error:
        raise unopened(Place(storage.url, name), error) from error


def unopened(where: Place, error: Exception) -> StoreError:
    """Return what to raise where an array cannot be opened: its metadata is damaged, or may not be read."""
    what = f" cannot be opened ({type(error).__name__}: {error})"
    if isinstance(error, OSError) and not isinstance(error, ABSENT):
        return StoreError(f"{where}{what}")
    return where.damaged(what, "zarr.json")


def sensible(array: zarr.Array[Any]) -> zarr.Array[Any]:
    """Return an array whose metadata can be true: what it says comes from a file."""
    if min((*array.chunks, *(array.shards or ())), default=1) < 1:
        msg = f"its chunks are {array.chunks}"
        raise ValueError(msg)
    if array.nchunks > MOST_CHUNKS:
        msg = f"it claims {array.nchunks} chunks"
        raise ValueError(msg)
    return array


def _writable(array: zarr.Array[Any]) -> zarr.Array[Any]:
    """Return an array that stores empty chunks too, so that a missing one can be told from one full of zeros."""
    return array.with_config({"write_empty_chunks": True})


def shard_files(name: str, *positions: int) -> str:
    """Return the path, below the store, of the shard (or unsharded chunk) at a position of an array."""
    return f"{name}/c/{'/'.join(str(p) for p in positions)}" if positions else f"{name}/c"


def read_array(
    storage: Storage, name: str, selection: Any = ..., *, opened: zarr.Array[Any] | None = None
) -> np.ndarray[Any, Any]:
    """Read a part of an array, or all of it, from the chunks that hold it.

    Parameters
    ----------
    selection
        Slices, one per axis (a single slice for the first), or `...` for everything.
    opened
        The array, where the caller has opened it before; opening takes a request.

    Raises
    ------
    StoreError
        A chunk is missing, truncated or fails its checksum: the message names store, array and chunk.
    """
    array = open_array(storage, name) if opened is None else opened
    spans = _spans(array, selection)
    values = np.empty([span.stop - span.start for span in spans], dtype=array.dtype)

    def place(position: Position, chunk: np.ndarray[Any, Any]) -> None:
        cuts = [
            (max(p * size, span.start), min((p + 1) * size, span.stop))
            for p, size, span in zip(position, array.chunks, spans, strict=True)
        ]
        there = tuple(slice(a - span.start, b - span.start) for (a, b), span in zip(cuts, spans, strict=True))
        here = tuple(slice(a - p * n, b - p * n) for (a, b), p, n in zip(cuts, position, array.chunks, strict=True))
        values[there] = chunk[here]

    read_chunks(array, Place(storage.url, name), _touched(spans, array.chunks), place)
    return values


def write_array(storage: Storage, name: str, values: np.ndarray[Any, Any], **kwargs: Any) -> None:
    """Create an array and write all of it: for what is small and has one writer."""
    chunks = kwargs.pop("chunks", values.shape)
    layout = {"shape": values.shape, "dtype": values.dtype, "chunks": chunks, **kwargs}
    create_array(storage, name, **layout)
    known = ArrayV3Metadata.from_dict(json.loads(_metadata(**layout)))  # written just now, so it need not be read
    array = _writable(zarr.Array(AsyncArray(known, StorePath(storage.store(name)))))
    with _writing(storage, name):
        array[...] = values


def touched_shards(array: zarr.Array[Any], selection: Any) -> list[Position]:
    """Return the positions of the shards (chunks where there are none) that a selection by slices touches."""
    return _touched(_spans(array, selection), array.shards or array.chunks)


def _touched(spans: Sequence[range], unit: Sequence[int]) -> list[Position]:
    touched = (
        range(span.start // size, -(-span.stop // size) if span.stop > span.start else span.start // size)
        for span, size in zip(spans, unit, strict=True)
    )
    return list(itertools.product(*touched))


def _spans(array: zarr.Array[Any], selection: Any) -> list[range]:
    """Return the first place and the one after the last that a selection by slices means on each axis."""
    given = [] if selection is ... else list(selection if isinstance(selection, tuple) else (selection,))
    given += [slice(None)] * (array.ndim - len(given))
    spans = [range(*part.indices(length)) for part, length in zip(given, array.shape, strict=True)]
    if any(span.step != 1 for span in spans):
        msg = f"a selection is slices without steps, found {selection!r}"
        raise ValueError(msg)
    return [range(span.start, max(span.start, span.stop)) for span in spans]
