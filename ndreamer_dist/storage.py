"""One layer for every place a byte can live: a local path, `s3://`, `gs://`, `az://` or `https://` (read-only).

`Storage` is a root address with five verbs (exists, read, write_atomic, list, delete), and no rename and no append, so
that a local disk and an object store are one code path. zarr arrays are created here and only here, so that every
chunk of every array ends in `crc32c`, and read here, so that a damaged or missing chunk is an error that names store,
array and chunk, never a wrong number.
"""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import zarr
from zarr.abc.store import ByteRequest, RangeByteRequest, Store, SuffixByteRequest
from zarr.codecs import BloscCodec, Crc32cCodec
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.core.sync import sync
from zarr.storage import FsspecStore, LocalStore

from ndreamer_dist.errors import StoreError

COMPRESSORS = (BloscCodec(cname="lz4", clevel=5, shuffle="shuffle"), Crc32cCodec())
"""Codec chain of our arrays. The checksum comes last, so it covers the very bytes that are stored.

They are read and written by zarr's own codec pipeline: zarrs 0.2.3 lets flipped bits through when it decodes a whole
shard, and leaves empty chunks out whatever the setting.
"""


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
        fs, root = fsspec.core.url_to_fs(self.url)
        return fs, root

    @property
    def filesystem(self) -> fsspec.AbstractFileSystem:
        """The fsspec file system, as Ray Train's `storage_filesystem` and h5py want it."""
        return self._fs_and_root[0]

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

    def exists(self, name: str = "") -> bool:
        """Return whether a file or a folder of this name is there."""
        self.filesystem.invalidate_cache()
        return bool(self.filesystem.exists(self.path(name)))

    def read(self, name: str) -> bytes:
        """Return a file's bytes; `StoreError` where there is none."""
        try:
            return bytes(self.filesystem.cat_file(self.path(name)))
        except FileNotFoundError:
            msg = f"{self.url}/{name} does not exist"
            raise StoreError(msg) from None

    def write_atomic(self, name: str, data: bytes) -> None:
        """Write a file so that a reader sees all of it or none.

        An object store does this by itself; on a local disk the bytes go to a neighbour that takes the name at the end.
        """
        target = self.path(name)
        if not self.is_local:
            self.filesystem.pipe_file(target, data)
            return
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        handle, neighbour = tempfile.mkstemp(dir=Path(target).parent, prefix=".", suffix=".part")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            Path(neighbour).chmod(0o644)
            Path(neighbour).replace(target)
        except BaseException:
            Path(neighbour).unlink(missing_ok=True)
            raise

    def list(self, name: str = "") -> dict[str, int]:
        """Return every file below a name with its size in bytes, in one listing; empty where there is nothing."""
        top = self.path(name)
        self.filesystem.invalidate_cache()
        found = self.filesystem.find(top, detail=True)
        cut = len(self.root) + 1
        return {path[cut:]: int(entry["size"] or 0) for path, entry in sorted(found.items())}

    def delete(self, name: str = "") -> None:
        """Delete a file or a folder with all below it; nothing happens where there is none."""
        if self.exists(name):
            self.filesystem.rm(self.path(name), recursive=True)

    def store(self, name: str = "", *, read_only: bool = False) -> Store:
        """Return the zarr store of a folder."""
        where = self / name if name else self
        if where.is_local:
            return LocalStore(where.root, read_only=read_only)
        kind = _HttpStore if where.url.startswith("http") else FsspecStore
        return kind.from_url(where.url, read_only=read_only)


class _HttpStore(FsspecStore):
    """A store behind a web server, which may ignore that only a part of a file is asked for and send all of it."""

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        """Return a file's bytes, or the range asked for."""
        found = await super().get(key, prototype, byte_range)
        if found is None or byte_range is None:
            return found
        if isinstance(byte_range, RangeByteRequest):
            asked = byte_range.end - byte_range.start
            return found if len(found) <= asked else found[byte_range.start : byte_range.end]
        if isinstance(byte_range, SuffixByteRequest):
            return found[-byte_range.suffix :] if len(found) > byte_range.suffix else found
        return found


def open_storage(address: str | os.PathLike[str] | Storage) -> Storage:
    """Return the storage of an address; a relative path becomes absolute, since tasks run in other folders."""
    if isinstance(address, Storage):
        return address
    text = os.fspath(address)
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
    """Write an array's metadata, and nothing else, over whatever stood there; its shards are written by their owners.

    Parameters
    ----------
    storage, name
        The store and the array's path in it. No parent's metadata is touched, so the root stays unmade until the end.
    chunks, shards
        Shapes of the unit of reading and of the unit of writing (whole chunks; none: a chunk is its own shard).
    """
    zarr.create_array(
        storage.store(name),
        shape=tuple(shape),
        dtype=dtype,
        chunks=tuple(max(1, c) for c in chunks),
        shards=None if shards is None else tuple(max(1, s) for s in shards),
        fill_value=fill_value,
        compressors=COMPRESSORS,
        attributes=attributes,
        overwrite=True,
    )


def ensure_array(storage: Storage, name: str, **layout: Any) -> None:
    """Make sure that an array's metadata is what `create_array` would write; its chunks are left as they are.

    So a stage that was interrupted, or lost a shard, goes on without disturbing what is done.
    """
    with tempfile.TemporaryDirectory() as folder:
        scratch = Storage(folder)
        create_array(scratch, name, **layout)
        wanted = scratch.read(f"{name}/zarr.json")
    path = f"{name}/zarr.json"
    if not storage.exists(path) or storage.read(path) != wanted:
        storage.write_atomic(path, wanted)


def write_part(storage: Storage, name: str, selection: Any, values: np.ndarray[Any, Any]) -> None:
    """Write the whole shards of a selection by slices, whatever, damaged or not, stood there before."""
    array = open_array(storage, name, mode="r+")
    for position in touched_shards(array, selection):
        storage.delete(f"{name}/{array.metadata.encode_chunk_key(position)}")
    array[selection] = values


def open_array(storage: Storage, name: str, *, mode: str = "r") -> zarr.Array[Any]:
    """Open an array by its path; `StoreError` names it where it is missing or its metadata cannot be read."""
    try:
        array = zarr.open_array(storage.store(name, read_only=mode == "r"), mode=mode)
        # Empty chunks are stored, so that a missing one can be told from one full of zeros.
        return array.with_config({"write_empty_chunks": True})
    except Exception as error:
        msg = f"{storage.url}: array '{name}' cannot be opened ({type(error).__name__}: {error})"
        raise StoreError(msg) from error


def shard_files(name: str, *positions: int) -> str:
    """Return the path, below the store, of the shard (or unsharded chunk) at a position of an array."""
    return f"{name}/c/{'/'.join(str(p) for p in positions)}" if positions else f"{name}/c"


def read_array(storage: Storage, name: str, selection: Any = ...) -> np.ndarray[Any, Any]:
    """Read a part of an array, or all of it.

    Parameters
    ----------
    selection
        Slices, one per axis (a single slice for the first), or `...` for everything.

    Raises
    ------
    StoreError
        A chunk is missing, truncated or fails its checksum: the message names store, array and chunk.
    """
    array = open_array(storage, name)
    try:
        values = np.asarray(array[selection])
    except Exception as error:
        raise _named_damage(storage, name, array, selection, error) from error
    missing = _missing_shard(array, selection)
    if missing is not None:
        msg = f"{storage.url}: array '{name}', chunk {missing} is missing; run the same command again to repair it"
        raise StoreError(msg)
    return values


def write_array(storage: Storage, name: str, values: np.ndarray[Any, Any], **kwargs: Any) -> None:
    """Create an array and write all of it: for what is small and has one writer."""
    chunks = kwargs.pop("chunks", values.shape)
    create_array(storage, name, shape=values.shape, dtype=values.dtype, chunks=chunks, **kwargs)
    open_array(storage, name, mode="r+")[...] = values


def touched_shards(array: zarr.Array[Any], selection: Any) -> list[tuple[int, ...]]:
    """Return the positions of the shards (chunks where there are none) that a selection by slices touches."""
    unit = array.shards or array.chunks
    slices = _as_slices(array, selection)
    ranges = []
    for part, size, length in zip(slices, unit, array.shape, strict=True):
        start, stop, _ = part.indices(length)
        ranges.append(range(start // size, -(-stop // size) if stop > start else start // size))
    return list(itertools.product(*ranges))


def _as_slices(array: zarr.Array[Any], selection: Any) -> list[slice]:
    given = [] if selection is ... else list(selection if isinstance(selection, tuple) else (selection,))
    given = [part if isinstance(part, slice) else slice(int(part), int(part) + 1) for part in given]
    return given + [slice(None)] * (array.ndim - len(given))


def _missing_shard(array: zarr.Array[Any], selection: Any) -> tuple[int, ...] | None:
    store = array.store
    for position in touched_shards(array, selection):
        key = array.metadata.encode_chunk_key(position)
        if not sync(store.exists(f"{array.path}/{key}".lstrip("/"))):
            return position
    return None


def _named_damage(storage: Storage, name: str, array: zarr.Array[Any], selection: Any, error: Exception) -> StoreError:
    """Find which chunk of a failed read is at fault by reading them one by one."""
    for position in touched_shards(array, selection):
        unit = array.shards or array.chunks
        part = tuple(slice(p * u, (p + 1) * u) for p, u in zip(position, unit, strict=True))
        try:
            array[part]
        except Exception as cause:  # noqa: BLE001 - whatever the codec says of this chunk is the finding
            return StoreError(
                f"{storage.url}: array '{name}', chunk {position} is damaged ({cause}); "
                "delete it and run the same command again to repair it"
            )
    return StoreError(f"{storage.url}: array '{name}' cannot be read ({type(error).__name__}: {error})")
