"""The site: its contents name every page, and it is built without a warning."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.docs.pages import ROOT

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


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("mkdocs") is None, reason="mkdocs is not installed: .github/docs-requirements.txt")
def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    words = ["mkdocs", "build", "--strict", "--config-file", str(ROOT / ".github/mkdocs.yml"), "--site-dir"]
    done = subprocess.run([*words, str(tmp_path / "site")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "NDreamer at scale" in (tmp_path / "site/index.html").read_text()
    assert "donor" in (tmp_path / "site/reference/index.html").read_text()
