"""Make the tutorials' notebooks and figures: run their pages as they stand, each in a kernel of its own.

    python -m tests.docs.notebooks FOLDER

It needs what .github/docs-requirements.txt names. FOLDER gets `PAGE.ipynb` with what every cell printed and drew. Pictures
that a page saves replace those beside it. The runs are those of the presets. Blocks that need real cells run where
$NDREAMER_TEST_DATA has them; elsewhere the notebook shows them and does not run them.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

from tests.docs.pages import FENCE, ROOT, Block, blocks

TUTORIALS = ROOT / "docs" / "tutorials"
REAL = {"kang.h5ad": "kang_pbmc_ifnb.h5ad"}
"""Cohorts that the pages name, and the files of real cells that hold them."""
NEEDS_CELLS = "needs the cells of"
"""How the reason of a block begins that needs one of these cohorts."""


def cells(page: Path, *, real: bool) -> list[dict[str, Any]]:
    """Return a page as a notebook's cells: what runs as code, all else as text.

    Parameters
    ----------
    real
        Run blocks that need real cells too.
    """
    text, made, begin = page.read_text(), [], 0
    for found, block in zip(FENCE.finditer(text), blocks(page), strict=True):
        if block.kind in ("python", "bash") and (not block.reason or (real and block.reason.startswith(NEEDS_CELLS))):
            made += [_text(text[begin : found.start()]), _code(block)]
            begin = found.end()
    return [cell for cell in [*made, _text(text[begin:])] if cell["source"]]


def notebook(page: Path, *, real: bool = False) -> dict[str, Any]:
    """Return a page as a notebook that has not run."""
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    named = [{"id": f"cell-{number}", **cell} for number, cell in enumerate(cells(page, real=real))]
    return {"nbformat": 4, "nbformat_minor": 5, "metadata": {"kernelspec": kernel}, "cells": named}


def execute(page: Path, folder: Path, *, real: bool) -> Any:
    """Run a page's notebook in a folder and return it with its outputs; a cell that fails is an error."""
    import nbformat
    from nbclient import NotebookClient

    made = nbformat.from_dict(notebook(page, real=real))
    NotebookClient(made, timeout=None, kernel_name="python3", resources={"metadata": {"path": str(folder)}}).execute()
    nbformat.validate(made)
    return made


def lay_cohorts(folder: Path) -> bool:
    """Copy the real cohorts that the pages name into a folder; false where there are none here."""
    data = Path(os.environ.get("NDREAMER_TEST_DATA", ""))
    there = all((data / name).is_file() for name in REAL.values())
    for name, file in REAL.items() if there else ():
        shutil.copy(data / file, folder / name)
    return there


def _text(source: str) -> dict[str, Any]:
    return {"cell_type": "markdown", "metadata": {}, "source": source.strip()}


def _code(block: Block) -> dict[str, Any]:
    source = block.text.strip() if block.kind == "python" else f"%%bash\n{block.text.strip()}"
    return {"cell_type": "code", "metadata": {}, "source": source, "execution_count": None, "outputs": []}


def main(folder: str) -> None:
    """Make every tutorial's notebook in a folder, and copy the pictures beside the page."""
    import nbformat

    for page in sorted(TUTORIALS.glob("*.md")):
        place = Path(folder).absolute() / page.stem
        place.mkdir(parents=True, exist_ok=True)
        nbformat.write(execute(page, place, real=lay_cohorts(place)), place.with_suffix(".ipynb"))
        for picture in place.glob("*.png"):
            shutil.copy(picture, TUTORIALS / f"{page.stem}-{picture.name}")


if __name__ == "__main__":
    main(*sys.argv[1:])
