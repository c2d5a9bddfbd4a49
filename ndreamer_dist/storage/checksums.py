"""Write and verify checksums (sha256) of files that are not zarr arrays.

A JSON file ends in its own checksum (`seal`, `unseal`). The checksum of any other file is an entry of a JSON file
(`digest`, `check_digest`). A flipped byte in weights, a checkpoint, a marker or `run.json` thus raises an error that
names the file. Files without a checksum, which other versions wrote, are read unchecked.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

from ndreamer_dist import keys
from ndreamer_dist.errors import DamagedError
from ndreamer_dist.storage.files import Storage

SEAL = "sha256"
WEIGHTS_DIGEST = "weights_sha256"
"""Entry of model.json: the checksum of the weights file, which holds none itself."""
_TAIL = re.compile(rb',\s*"([^"]{6})": "([0-9a-f]{64})"(\s*)\}\Z')  # any name of six letters: the name may be damaged


def digest(data: bytes) -> str:
    """Return the sha256 of a file's bytes."""
    return hashlib.sha256(data).hexdigest()


def seal(value: Mapping[str, Any], *, indent: int | None = 1) -> bytes:
    """Return the text of a JSON object, with the checksum of that text as an added last entry."""
    text = json.dumps(dict(value), indent=indent, sort_keys=True).encode()
    end = b"}" if indent is None else b"\n}"
    space = b" " if indent is None else b"\n" + b" " * indent
    return b'%s,%s"%s": "%s"%s' % (text.removesuffix(end), space, SEAL.encode(), digest(text).encode(), end)


def unseal(data: bytes, url: str) -> dict[str, Any]:
    """Return the JSON object in a text of `seal`, without the checksum.

    Raises
    ------
    DamagedError
        The text is not a JSON object, or its checksum does not fit; the message names the file.
    """
    try:
        value = dict(json.loads(data))
    except (ValueError, TypeError, RecursionError) as error:
        raise DamagedError.of(url, error) from error
    checksum, entry = value.pop(SEAL, None), _TAIL.search(data)
    if entry or checksum is not None:
        text = data[: entry.start()] + entry[3] + b"}" if entry else b""
        if checksum != digest(text):
            raise DamagedError.of(url, "its checksum does not match")
    return value


def check_digest(data: bytes, expected: str | None, url: str) -> bytes:
    """Return a file's bytes; raise `DamagedError` if their sha256 is not `expected` (`None`: not checked)."""
    if expected is not None and digest(data) != expected:
        raise DamagedError.of(url, "its sha256 is not the one that was written down")
    return data


def read_model(storage: Storage) -> tuple[dict[str, Any], bytes]:
    """Return the description of a network (`model/model.json`) and the bytes of its weights, both verified.

    Raises
    ------
    DamagedError
        One of the two files is damaged.
    """
    model = unseal(storage.read(keys.MODEL_JSON), f"{storage.url}/{keys.MODEL_JSON}")
    weights = storage.read(keys.MODEL_WEIGHTS)
    return model, check_digest(weights, model.get(WEIGHTS_DIGEST), f"{storage.url}/{keys.MODEL_WEIGHTS}")
