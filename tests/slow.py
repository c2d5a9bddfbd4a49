"""The slow tier: promises that are not looked at in every gate, and the list of them in `tests/README.md`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest

LIST = Path(__file__).parent / "README.md"
UNLISTED = pytest.StashKey[list[str]]()
"""Where a session keeps the slow tests that it collected and that are not in the list."""
LINE = re.compile(
    r"^\| (?P<promise>[^|]+) \| `(?P<test>[^`|]+)` \| (?P<seconds>\d+) \| (?P<seen>[^|]+) \|$", re.MULTILINE
)


@dataclass(frozen=True)
class Promise:
    """A line of the list: what is promised, the test, its processor seconds, and the day when it was last seen to hold."""

    promise: str
    test: str  # file::function
    seconds: str
    seen: str


def promises() -> list[Promise]:
    """Return the list."""
    return [Promise(**found.groupdict()) for found in LINE.finditer(LIST.read_text())]


def unlisted(items: Iterable[pytest.Item]) -> list[str]:
    """Return the slow tests that are not in the list."""
    listed = {promise.test for promise in promises()}
    slow = {item.nodeid.partition("[")[0] for item in items if item.get_closest_marker("slow")}
    return sorted(slow - listed)
