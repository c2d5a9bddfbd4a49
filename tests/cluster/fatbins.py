"""Which GPUs a shared library holds code for, read from its file: no CUDA is needed."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

MAGIC = b"\x50\xed\x55\xba"
KINDS = {1: "PTX", 2: "SASS"}


def sections(data: bytes) -> Iterator[tuple[str, int, int]]:
    """Give name, offset and size of every section of an ELF file."""
    (table,) = struct.unpack_from("<Q", data, 0x28)
    size, count, names = struct.unpack_from("<HHH", data, 0x3A)
    headers = [struct.unpack_from("<IIQQQQIIQQ", data, table + index * size) for index in range(count)]
    for header in headers:
        start = headers[names][4] + header[0]
        yield data[start : data.index(b"\0", start)].decode(), header[4], header[5]


def architectures(library: Path) -> set[tuple[str, int]]:
    """Return the kinds of code and the compute capabilities, times ten, that a library is built for."""
    data = library.read_bytes()
    found: set[tuple[str, int]] = set()
    for name, offset, size in sections(data):
        at = offset if "nv_fatbin" in name else offset + size
        while at < offset + size - 16:
            if data[at : at + 4] != MAGIC:
                at += 8
                continue
            _, _, header, body = struct.unpack_from("<IHHQ", data, at)
            entry, at = at + header, at + header + body
            while entry < at:
                kind, _, length, content = struct.unpack_from("<HHIQ", data, entry)
                (capability,) = struct.unpack_from("<I", data, entry + 28)
                found.add((KINDS.get(kind, str(kind)), capability))
                if length == 0:
                    break
                entry += length + content
    return found
