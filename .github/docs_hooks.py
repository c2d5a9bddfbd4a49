"""Hooks of the documentation site: the README is its first page, and links to other files of the repository become code."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
STYLE = """\
.md-grid { max-width: 76rem; }
.md-typeset img { max-height: 26rem; width: auto; }
.md-typeset .language-bash code { white-space: pre-wrap; }
"""
"""Wide pages for lines of code; figures that fit on a screen; commands that wrap."""
NOTEBOOKS = {f"tutorials/{path.name}": path for path in Path(os.environ.get("NOTEBOOKS", "/nowhere")).glob("*.ipynb")}
"""Notebooks of the tutorials with outputs, made by `python -m tests.docs.notebooks $NOTEBOOKS`; empty without NOTEBOOKS."""
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\((?!https?://|#)([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the README as the first page, with links relative to docs/, the style sheet, and the notebooks of the tutorials."""
    text = (ROOT / "README.md").read_text().replace("](docs/", "](").replace('src="docs/', 'src="')
    files.append(File.generated(config, "index.md", content=text))
    files.append(File.generated(config, "style.css", content=STYLE))
    for name, path in NOTEBOOKS.items():
        files.append(File.generated(config, name, content=path.read_bytes()))
    return files


def on_page_markdown(markdown: str, page: Page, **others: Any) -> str:
    """Turn links to files outside docs/ into code, and link the notebook of a tutorial."""
    del others
    folder = (ROOT / "docs" / page.file.src_uri).parent

    def link_or_code(link: re.Match[str]) -> str:
        inside = (folder / link[2]).resolve().is_relative_to(ROOT / "docs") and (folder / link[2]).exists()
        return link[0] if inside else link[1] if link[1].startswith("`") else f"`{link[1]}`"

    text = LINK.sub(link_or_code, markdown)
    if (notebook := page.file.src_uri.replace(".md", ".ipynb")) in NOTEBOOKS:
        link = f"[This page as a notebook, with all outputs]({Path(notebook).name})"
        text = text.replace("\n\n", f"\n\n{link}\n\n", 1)
    return text
