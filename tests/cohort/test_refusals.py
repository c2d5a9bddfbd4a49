"""Each bad input is refused on the command line with the line that docs/refusals.md shows, and nothing is written."""

from __future__ import annotations

from pathlib import Path

import pytest

from ndreamer_dist import keys
from tests.cohort.refusals import CASES, IN_PYTHON, ON_THE_WAY, TABLES, TAIL, Case, row_of
from tests.fuzz.helpers import SECONDS, files_of, said

PAGE = Path(__file__).parents[2] / "docs" / "refusals.md"
BEFORE = {**CASES, **IN_PYTHON}
pytestmark = pytest.mark.timeout(SECONDS)


def named(cases: dict[str, Case]) -> list[object]:
    return [pytest.param(name, case, id=name.replace(" ", "_")) for name, case in cases.items()]


@pytest.mark.parametrize(("name", "case"), named(BEFORE))
def test_a_refusal_is_one_line_that_the_page_shows_and_writes_nothing(name: str, case: Case, tmp_path: Path) -> None:
    work = case(tmp_path)
    before = files_of(tmp_path)
    told = said(work)
    assert told.err == told.refusal + "\n"
    assert row_of(name, told, tmp_path) in PAGE.read_text().splitlines()
    changed = {path for path, seen in files_of(tmp_path).items() if before.get(path) != seen}
    assert changed <= {f"run/{keys.LOCK}"} & before.keys()


@pytest.mark.parametrize(("name", "case"), named(ON_THE_WAY))
def test_a_refusal_on_the_way_leaves_no_stage_done(name: str, case: Case, tmp_path: Path) -> None:
    told = said(case(tmp_path))
    assert row_of(name, told, tmp_path) in PAGE.read_text().splitlines()
    made = {path.relative_to(tmp_path / "run").parts[0] for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert made <= {keys.RUN_JSON, keys.LOCK, "logs"}


def test_the_page_shows_nothing_else() -> None:
    rest = PAGE.read_text()
    for head, cases in TABLES:
        assert rest.startswith(head)
        rows = rest.removeprefix(head).splitlines(keepends=True)[: len(cases)]
        assert [row.split(" | ")[0] for row in rows] == [f"| {name}" for name in cases]
        rest = rest.removeprefix(head + "".join(rows))
    assert rest == TAIL
