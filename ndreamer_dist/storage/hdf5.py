"""Open HDF5 files that other programs wrote; they may be locked, damaged, or compressed by filters that HDF5 lacks.

Input: a path. Output: an open `h5py.File`, or an error that says what to do.
"""

from __future__ import annotations

import importlib
import importlib.util
import mmap
import re
import subprocess
import sys
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import h5py

from ndreamer_dist.errors import CohortError
from ndreamer_dist.storage.files import NO_LOCKS

HDF5_SECONDS = 60.0
"""Seconds that HDF5 may take to read the attributes of a file that looks damaged."""
WALK = """
import sys, h5py
with h5py.File(sys.argv[1], "r") as file:
    dict(file.attrs)
    file.visititems(lambda name, item: dict(item.attrs) and None)
"""
LOOKED_AT = 2**27
"""Bytes at the beginning and at the end of a file that are searched for global heaps."""
HEAP = b"GCOL\x01\0\0\0"
"""Signature and version of a global heap, in which HDF5 keeps texts of variable length."""


def open_file(path: str, url: str) -> h5py.File:
    """Open a local HDF5 file, read-only.

    Raises
    ------
    CohortError
        Another program has the file open for writing, or HDF5 hangs or crashes on the file.
    """
    use_plugins()
    if looks_damaged(path):
        let_another_read(path, url)
    try:
        return h5py.File(path, "r")
    except OSError as error:
        number = lock_error(error)
        if number in NO_LOCKS:
            return h5py.File(path, "r", locking=False)
        if number is None and "already open" not in str(error):
            raise
        msg = (
            f"{url} is open for writing in another program, a notebook that reads it with backed='r+', say; close it there "
            "(adata.file.close()), or copy the file. If nothing writes to it, HDF5_USE_FILE_LOCKING=FALSE in the "
            "environment reads it as it is"
        )
        raise CohortError(msg) from error


def lock_error(error: BaseException) -> int | None:
    """Return the system's error number if an error says that HDF5 could not lock a file; `None` for other errors."""
    match = re.search(r"unable to lock file, errno = (\d+)", str(error))
    return int(match.group(1)) if match else None


@lru_cache(maxsize=1)
def use_plugins() -> None:
    """Import hdf5plugin if it is installed, so that HDF5 can read data that its filters compressed."""
    if importlib.util.find_spec("hdf5plugin") is not None:
        with suppress(ImportError):
            importlib.import_module("hdf5plugin")


def missing_filter(element: Any) -> str | None:
    """Return the name of a filter that HDF5 lacks and that a dataset, or one in a group, needs; `None` without one."""
    if isinstance(element, h5py.Dataset):
        return _missing(element)
    lacking: list[str] = []

    def look(_: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset) and (name := _missing(item)):
            lacking.append(name)

    element.visititems(look)
    return lacking[0] if lacking else None


def _missing(dataset: h5py.Dataset) -> str | None:
    plan = dataset.id.get_create_plist()
    for place in range(plan.get_nfilters()):
        code, _, _, name = plan.get_filter(place)
        if not h5py.h5z.filter_avail(code):
            return f"{name.decode(errors='replace').split(';')[0] or 'filter'} ({code})"
    return None


def looks_damaged(path: str) -> bool:
    """Return whether a global heap of a file is inconsistent, which can send HDF5 into an endless loop.

    HDF5 reports other damage as an error.
    """
    if not Path(path).is_file() or not Path(path).stat().st_size:
        return False
    with Path(path).open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        size = len(data)
        parts = [(0, min(size, LOOKED_AT)), (max(LOOKED_AT, size - LOOKED_AT), size)]
        return any(not _heap_adds_up(data, place) for part in parts for place in _heaps(data, *part))


def _heaps(data: Any, start: int, stop: int) -> list[int]:
    """Return where global heaps begin in the bytes `start:stop`."""
    places, place = [], data.find(HEAP, start, stop)
    while place >= 0:
        places.append(place)
        place = data.find(HEAP, place + len(HEAP), stop)
    return places


def _heap_adds_up(data: Any, start: int) -> bool:
    """Return whether the objects of a global heap fill it without gaps (HDF5 file format, III.E)."""
    end = start + int.from_bytes(data[start + 8 : start + 16], "little")
    if not start + 16 <= end <= len(data):
        return False
    place = start + 16
    while place + 16 <= end:
        index = int.from_bytes(data[place : place + 2], "little")
        size = int.from_bytes(data[place + 8 : place + 16], "little")
        step = 16 + -(-size // 8) * 8 if index else size  # the size of free space includes its own header
        if step < 16 or place + step > end:
            return False
        place += step
    return True


def let_another_read(path: str, url: str) -> None:
    """Read a file's attributes in a subprocess first, since HDF5 loops or crashes on some damaged files.

    Raises
    ------
    CohortError
        The subprocess crashed or ran into the timeout. Other errors are left to the reader, which explains them better.
    """
    command = [sys.executable, "-P", "-c", WALK, path]
    quiet: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
    try:
        crashed = subprocess.run(command, **quiet, timeout=HDF5_SECONDS, check=False).returncode < 0
    except subprocess.TimeoutExpired:
        how = f"after {HDF5_SECONDS:.0f} s HDF5 still reads its attributes"
    else:
        if not crashed:
            return
        how = "HDF5 crashes when it reads its attributes"
    msg = f"{url} cannot be opened as an h5ad file: it is damaged ({how})"
    raise CohortError(msg)
