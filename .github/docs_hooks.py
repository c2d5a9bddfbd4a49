"""What the site makes of the pages: the README as its first, links to files of the repository that are no pages as code."""

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
"""Room for lines of code; figures no larger than a screen; commands that wrap."""
NOTEBOOKS = {f"tutorials/{path.name}": path for path in Path(os.environ.get("NOTEBOOKS", "/nowhere")).glob("*.ipynb")}
"""The tutorials with their outputs, as `python -m tests.docs.notebooks $NOTEBOOKS` makes them; without them, pages stand alone."""
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\((?!https?://|#)([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the README as the site's first page, its links as seen from docs/, and the tutorials' notebooks."""
    text = (ROOT / "README.md").read_text().replace("](docs/", "](").replace('src="docs/', 'src="')
    files.append(File.generated(config, "index.md", content=text))
    files.append(File.generated(config, "style.css", content=STYLE))
    for name, path in NOTEBOOKS.items():
        files.append(File.generated(config, name, content=path.read_bytes()))
    return files


def on_page_markdown(markdown: str, page: Page, **others: Any) -> str:
    """Write links that lead out of docs/ as code; they lead to files of the repository."""
    del others
    folder = (ROOT / "docs" / page.file.src_uri).parent

    def kept(link: re.Match[str]) -> str:
        inside = (folder / link[2]).resolve().is_relative_to(ROOT / "docs") and (folder / link[2]).exists()
        return link[0] if inside else link[1] if link[1].startswith("`") else f"`{link[1]}`"

    made = LINK.sub(kept, markdown)
    if (notebook := page.file.src_uri.replace(".md", ".ipynb")) in NOTEBOOKS:
        link = f"[This page as a notebook, with all outputs]({Path(notebook).name})"
        made = made.replace("\n\n", f"\n\n{link}\n\n", 1)
    return made
