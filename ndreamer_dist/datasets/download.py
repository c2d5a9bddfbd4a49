"""Downloading a public cohort: to the end, whatever interrupts it, and nothing but the bytes that were meant.

A name in a registry, or a URL and its checksum, come in; a file whose sha256 is the expected one goes out, or none.
A registry is a YAML or JSON file: for each name `url` and `sha256`, and if known `size` (bytes), `what`, `source` and
`licence`. What was downloaded before an interruption lies beside the file, under the checksum's name, and is resumed.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import re
import urllib.error
import urllib.request
from pathlib import Path
from typing import IO, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from tqdm import tqdm

from ndreamer_dist.errors import CohortError, listing, quoted, suggest
from ndreamer_dist.settings import read_yaml

PIECE = 2**20
"""Bytes read at a time."""
SECONDS = 60.0
"""A server that is silent for as long is taken for away."""


class Entry(BaseModel):
    """A cohort that can be downloaded."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    url: str = Field(pattern=r"^https?://")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    size: int | None = Field(None, ge=1)
    what: str = ""
    source: str = ""
    licence: str = ""


def fetch(
    name: str,
    *,
    out: str | os.PathLike[str] | None = None,
    registry: str | os.PathLike[str] | None = None,
    sha256: str | None = None,
    progress: bool | None = None,
) -> Path:
    """Download a public cohort and check that it is the one that was meant; one that is there already is checked only.

    Parameters
    ----------
    name
        The cohort's name in the registry, or the URL (`https://`) of a file.
    out
        File to write; the URL's own name in this folder if not given.
    registry
        YAML or JSON file that says for each name `url` and `sha256`.
    sha256
        Checksum of the file that a URL names, in hexadecimal.
    progress
        Show a bar; by default only on a terminal.

    Returns
    -------
    Path of the file.

    Raises
    ------
    CohortError
        The name is unknown, no checksum is given, the server cannot be reached, what came is something else, or another
        file has the name. What has come so far is kept, and the same call goes on with it.
    """
    entry = _entry(name, registry, sha256)
    target = Path(out or entry.url.partition("?")[0].rstrip("/").rpartition("/")[2]).expanduser().absolute()
    if target.exists():
        _check(target, entry, f"{target} is there already and is another file; delete it, or choose another name")
        return target
    if not target.parent.is_dir():
        msg = f"{target.parent} is no folder; make it, or choose another file"
        raise CohortError(msg)
    part = target.with_name(f".{entry.sha256[:16]}.part")
    _download(entry, part, progress)
    try:
        _check(part, entry, f"{entry.url} holds something else than was meant; nothing is kept")
    except CohortError:
        part.unlink()
        raise
    part.replace(target)
    return target


def load_registry(path: str | os.PathLike[str]) -> dict[str, Entry]:
    """Return the cohorts of a registry file by name; `CohortError` says what is wrong with it."""
    try:
        values = read_yaml(Path(path).read_text(), f"{path}:")
        if not isinstance(values, dict):
            msg = f"{path}: expected cohorts by name, found {type(values).__name__}"
            raise CohortError(msg)
        return {str(name): Entry.model_validate(told) for name, told in values.items()}
    except OSError as error:
        msg = f"{path}: cannot be read ({error.strerror})"
        raise CohortError(msg) from error
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        msg = f"{path}: {field or 'an entry'}: {first['msg']}; an entry needs url and sha256"
        raise CohortError(msg) from error


def _entry(name: str, registry: str | os.PathLike[str] | None, sha256: str | None) -> Entry:
    if re.match(r"https?://", name):
        if sha256 is None or not re.fullmatch(r"[0-9a-fA-F]{64}", sha256):
            msg = f"{name}: give the file's sha256 (64 hexadecimal digits), as whoever publishes it states it"
            raise CohortError(msg)
        return Entry(url=name, sha256=sha256.lower())
    if registry is None:
        msg = (
            f"{quoted(name)} is no URL, and no registry is given: no cohort's checksum comes with this package; name a "
            "file that says `url` and `sha256` for each name (--registry FILE)"
        )
        raise CohortError(msg)
    known = load_registry(registry)
    if name not in known:
        msg = f"there is no cohort {quoted(name)} in {registry}; there are {listing(known)}.{suggest(name, known)}"
        raise CohortError(msg)
    return known[name]


def _download(entry: Entry, part: Path, progress: bool | None) -> None:
    """Bring a file to its end, from where it is."""
    have = part.stat().st_size if part.exists() else 0
    try:
        with _asked(entry.url, have) as answer, part.open("ab") as file:
            if answer.status != http.client.PARTIAL_CONTENT:  # a server without ranges sends all of it
                have = 0
                file.truncate(0)
            total = have + int(answer.headers["Content-Length"]) if "Content-Length" in answer.headers else entry.size
            with tqdm(
                total=total, initial=have, unit="B", unit_scale=True, desc=part.name, disable=_off(progress)
            ) as bar:
                _copy(answer, file, bar)
    except urllib.error.HTTPError as error:
        if error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
            return  # all of it is there, or too much, which the checksum will tell
        msg = f"{entry.url} cannot be downloaded: the server answers {error.code} {error.reason}"
        raise CohortError(msg) from error
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        msg = f"{entry.url} cannot be reached ({reason}); without a network, bring the file here by other means"
        raise CohortError(msg) from error
    found = part.stat().st_size
    if total is not None and found < total:
        msg = f"{entry.url} stopped after {found} of {total} bytes; the same command goes on from there"
        raise CohortError(msg)


def _asked(url: str, start: int) -> Any:
    headers = {"Range": f"bytes={start}-"} if start else {}
    # Entries' addresses begin with http, so no other protocol can be asked for.
    return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=SECONDS)  # noqa: S310


def _copy(answer: Any, file: IO[bytes], bar: Any) -> None:
    while piece := answer.read(PIECE):
        file.write(piece)
        bar.update(len(piece))


def _off(progress: bool | None) -> bool | None:
    return None if progress is None else not progress


def _check(path: Path, entry: Entry, complaint: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != entry.sha256:
        msg = f"{complaint} (sha256 {found}, expected {entry.sha256})"
        raise CohortError(msg)
