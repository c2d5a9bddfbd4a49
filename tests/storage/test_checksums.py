"""A file with a checksum is read as it was written, or refused with an error that names it."""

from __future__ import annotations

import json
import pickle
from typing import Any

import pytest

from ndreamer_dist.errors import DamagedError
from ndreamer_dist.storage.checksums import seal, unseal


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("value", [{"a": [1.5, {"c": "x"}], "sha1": "b" * 64}, {"z": None}])
def test_a_sealed_file_is_the_same_json_or_damaged_whichever_bit_is_flipped(value: Any, indent: int | None) -> None:
    whole = seal(value, indent=indent)
    assert unseal(whole, "file") == value
    assert {name: told for name, told in json.loads(whole).items() if name in value} == value
    for bit in range(8 * len(whole)):
        harmed = bytearray(whole)
        harmed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(DamagedError, match=r"^folder/file is damaged "):
            unseal(bytes(harmed), "folder/file")


@pytest.mark.parametrize("text", [b"", b"{", b"[1]", b"3", b'"', b"\xff{}", b"[" * 10_000])
def test_what_is_no_json_object_is_damaged(text: bytes) -> None:
    with pytest.raises(DamagedError, match=r"^file is damaged "):
        unseal(text, "file")


def test_files_of_before_are_read_without_a_checksum() -> None:
    assert unseal(b'{"key": 3}', "file") == {"key": 3}


def test_damage_can_be_told_across_processes() -> None:
    error = pickle.loads(pickle.dumps(DamagedError("x is missing", "folder/x", "look for it")))
    assert (str(error), error.url) == ("x is missing; look for it", "folder/x")
