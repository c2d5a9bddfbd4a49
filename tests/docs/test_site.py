"""The site: its contents name every page, and it is built without a warning."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

import ndreamer_dist as nd
from tests.docs.notebooks import NEEDS_CELLS, TUTORIALS, execute, lay_cohorts, notebook
from tests.docs.pages import ROOT, blocks

TEXT = (ROOT / ".github/mkdocs.yml").read_text()


def pages(part: Any) -> list[str]:
    """Return the pages that a part of the site's contents names."""
    if isinstance(part, str):
        return [part]
    values = part.values() if isinstance(part, dict) else part
    return [page for value in values for page in pages(value)]


def test_the_contents_of_the_site_are_the_pages_of_the_docs() -> None:
    docs = ROOT / "docs"
    there = {str(path.relative_to(docs)) for path in docs.rglob("*.md")}
    named = pages(yaml.safe_load(TEXT)["nav"])
    assert set(named) == there | {"index.md"}  # which is made of the README
    assert len(named) == len(set(named))


def test_what_the_site_shows_of_the_package_is_there() -> None:
    for name in re.findall(r"^::: ndreamer_dist\.(\S+)$", (ROOT / "docs/reference.md").read_text(), re.MULTILINE):
        parts = name.split(".")
        module = ROOT / "ndreamer_dist" / Path(*parts)
        assert module.with_suffix(".py").exists() or re.search(
            rf"^(def|class) {parts[-1]}\b", module.parent.with_suffix(".py").read_text(), re.MULTILINE
        ), name


def test_lists_in_sections_of_docstrings_are_indented_as_the_site_wants_them() -> None:
    """The strict build refuses others; it is slow."""
    section = re.compile(
        r"^(?:Returns|Parameters|Raises|Attributes|Yields)\n-+\n(.*?)(?=^\w+\n-+\n|\Z)", re.MULTILINE | re.DOTALL
    )
    for path in (ROOT / "ndreamer_dist").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                for text in section.findall(ast.get_docstring(node) or ""):
                    assert not re.search(r"^- ", text, re.MULTILINE), f"{path}: {getattr(node, 'name', '')}"


@pytest.mark.parametrize("page", sorted(TUTORIALS.glob("*.md")), ids=lambda page: page.stem)
def test_a_notebook_has_all_of_its_page_and_runs_what_the_page_runs(page: Path) -> None:
    made = notebook(page)["cells"]
    run = [block for block in blocks(page) if not block.reason and block.kind in ("python", "bash")]
    code = [cell["source"].removeprefix("%%bash\n") for cell in made if cell["cell_type"] == "code"]
    assert code == [block.text.strip() for block in run]
    assert all(block.text in "\n".join(cell["source"] + "\n" for cell in made) for block in blocks(page))
    with_real = [cell for cell in notebook(page, real=True)["cells"] if cell["cell_type"] == "code"]
    needing = [block for block in blocks(page) if block.reason and block.reason.startswith(NEEDS_CELLS)]
    assert len(with_real) == len(run) + len(needing)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(find_spec("nbclient") is None, reason="nbclient is not installed: .github/docs-requirements.txt")
@pytest.mark.parametrize("page", sorted(TUTORIALS.glob("*.md")), ids=lambda page: page.stem)
def test_a_tutorial_runs_as_a_notebook_and_shows_its_pictures(page: Path, tmp_path: Path) -> None:
    made = execute(page, tmp_path, real=lay_cohorts(tmp_path))
    drawn = [cell for cell in made.cells if "nd.pl." in cell.source and cell.cell_type == "code"]
    assert all(any("image/png" in each.get("data", {}) for each in cell.outputs) for cell in drawn)


@pytest.mark.parametrize("page", ["gallery", "reference"])
def test_every_figure_is_shown_and_described(page: str) -> None:
    text = (ROOT / f"docs/{page}.md").read_text()
    assert [name for name in dir(nd.pl) if not re.search(rf"\b{name}\b", text)] == []


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("mkdocs") is None, reason="mkdocs is not installed: .github/docs-requirements.txt")
def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    words = ["mkdocs", "build", "--strict", "--config-file", str(ROOT / ".github/mkdocs.yml"), "--site-dir"]
    done = subprocess.run([*words, str(tmp_path / "site")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "NDreamer at scale" in (tmp_path / "site/index.html").read_text()
    assert "donor" in (tmp_path / "site/reference/index.html").read_text()
