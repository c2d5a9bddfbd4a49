"""Make the figures of the tutorials: run their pages as they stand and keep what they save.

    python -m tests.docs.figures [FOLDER]

The runs are those of the presets, in this process. What pages print is printed.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import matplotlib as mpl

from ndreamer_dist import settings
from tests.docs.pages import ROOT, blocks

TUTORIALS = ROOT / "docs" / "tutorials"


def main(folder: str | None = None) -> None:
    """Run every tutorial in a folder, and copy its pictures beside the page."""
    mpl.use("agg")
    for values in settings.PRESETS.values():
        values["run"] = {"serial": True}
    place = Path(folder or tempfile.mkdtemp())
    for page in sorted(TUTORIALS.glob("*.md")):
        (place / page.stem).mkdir(exist_ok=True)
        os.chdir(place / page.stem)
        scope: dict[str, Any] = {}
        for block in blocks(page):
            if not block.reason:
                block.run(scope)
        for picture in Path.cwd().glob("*.png"):
            shutil.copy(picture, TUTORIALS / f"{page.stem}-{picture.name}")


if __name__ == "__main__":
    main(*sys.argv[1:])
