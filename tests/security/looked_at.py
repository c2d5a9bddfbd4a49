"""What a run or a Ray left behind, looked at: no pickle, and no secret."""

from __future__ import annotations

import pickletools
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

MAGIC = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


def files_in(folder: Path) -> list[Path]:
    """Return the files below a folder; sockets and what is gone meanwhile are none."""
    return [path for path in folder.rglob("*") if path.is_file()]


def assert_no_pickle(folder: Path) -> None:
    """Fail where a file of a run is a pickle, or an archive that torch would load one from."""
    files = files_in(folder)
    assert files
    for path in files:
        data = path.read_bytes()
        assert not data.startswith(MAGIC), path
        assert not is_pickle(data), path


def is_pickle(data: bytes) -> bool:
    """Return whether bytes take themselves apart as a pickle, up to its stop code; nothing is run."""
    try:
        operations = [operation.name for operation, _, _ in pickletools.genops(data)]
    except Exception:
        return False
    return len(operations) > 2


def contents(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Yield name and content of the files below a folder; a Ray that still runs may take some away meanwhile."""
    for path in files_in(folder):
        with suppress(FileNotFoundError):
            yield str(path), path.read_bytes()


def assert_no_secret(secrets: Iterable[str], *places: Path | bytes | str) -> None:
    """Fail where a secret is in a file below one of some folders, or in what was said."""
    wanted = [secret.encode() for secret in secrets]
    assert min(map(len, wanted)) >= 16
    for place in places:
        told = dict(contents(place)) if isinstance(place, Path) else {"said": place}
        assert told
        for name, data in told.items():
            found = [secret for secret in wanted if secret in (data.encode() if isinstance(data, str) else data)]
            assert not found, f"{name} holds a secret"
