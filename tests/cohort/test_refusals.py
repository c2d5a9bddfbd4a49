"""Every bad input is refused in one line, the one that docs/refusals.md shows."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cohort.refusals import CASES, HEAD, PIPELINE, message_of, row

PAGE = Path(__file__).parents[2] / "docs" / "refusals.md"


@pytest.mark.parametrize("name", [pytest.param(name, id=name.replace(" ", "_")) for name in CASES])
def test_the_page_shows_the_message_that_is_given(name: str, tmp_path: Path) -> None:
    message = message_of(name, tmp_path)
    assert "\n" not in message
    assert row(name, message) in PAGE.read_text().splitlines()
    assert not list((tmp_path / "run" / "done").rglob("*.json"))


def test_the_page_shows_nothing_else() -> None:
    shown = PAGE.read_text()
    assert shown.startswith(HEAD)
    assert shown.endswith(PIPELINE)
    assert len(shown[len(HEAD) : -len(PIPELINE)].strip().splitlines()) == len(CASES)
