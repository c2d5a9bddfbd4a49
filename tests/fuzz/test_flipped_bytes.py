"""Random damage to stored cohorts: whatever is done to their bytes, they are read or refused in one line.

Users' files carry no checksums, so that some damage cannot be told from data; none may end in a trace, a hang or a
half-written run.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.fuzz.helpers import SECONDS, copied, files_of, planned, surveyed

ROUNDS = 10
pytestmark = pytest.mark.timeout(SECONDS * 4)


def flip(data: bytearray, draw: random.Random) -> bytearray:
    for _ in range(draw.choice((1, 1, 8, 64))):
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return data


def cut(data: bytearray, draw: random.Random) -> bytearray:
    return data[: draw.randrange(len(data))]


def zero(data: bytearray, draw: random.Random) -> bytearray:
    start = draw.randrange(len(data))
    stop = min(len(data), start + draw.randrange(1, 4096))
    data[start:stop] = bytes(stop - start)
    return data


def swap(data: bytearray, draw: random.Random) -> bytearray:
    """Write a part of the file over another one."""
    size = draw.randrange(1, max(2, len(data) // 4))
    source, target = (draw.randrange(max(1, len(data) - size)) for _ in range(2))
    data[target : target + size] = data[source : source + size]
    return data


def grow(data: bytearray, draw: random.Random) -> bytearray:
    return data + draw.randbytes(draw.randrange(1, 4096))


DAMAGES = (flip, cut, zero, swap, grow)


def damage(path: Path, draw: random.Random) -> str:
    """Damage one file of a store, metadata as often as chunks; say what was done."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file() and p.stat().st_size)
    if draw.random() < 0.5:
        files = [p for p in files if p.name.startswith((".z", "zarr.json"))] or files
    file, how = draw.choice(files), draw.choice(DAMAGES)
    file.write_bytes(how(bytearray(file.read_bytes()), draw))
    return f"{how.__name__} of {file.name}"


@pytest.mark.parametrize("kind", ["h5ad", "zarr", "zarr2"])
def test_a_damaged_store_is_read_or_refused_in_one_line(kind: str, tmp_path: Path) -> None:
    refused = 0
    for seed in range(ROUNDS):
        folder = tmp_path / str(seed)
        folder.mkdir()
        path = copied(kind, folder)
        done = damage(path, random.Random(f"{kind} {seed}"))
        before = files_of(folder)
        told = planned(path)
        assert files_of(folder) == before, done
        if told.code:
            assert told.refusal, done
            refused += 1
        elif (read := surveyed(path, folder / "run")).code:
            assert read.refusal, done
            assert not list((folder / "run").rglob("done/*/*.json"))
            refused += 1
    assert refused
