"""Which process runs which files: those that share something expensive go to one, the longest first."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import pytest
from xdist.scheduler import LoadFileScheduling

ROOT = Path(__file__).parent.parent
ON_RAY = frozenset(
    str(path.relative_to(ROOT))
    for path in (ROOT / "tests").rglob("test_*.py")
    if re.search(r"(?<!\.)\blocal_ray\b", path.read_text())
)
"""Files whose tests use the Ray of `conftest.py`."""
WITH_UMAP = frozenset({"tests/docs/test_docs.py", "tests/report/test_page.py", "tests/report/test_plots.py"})
"""Files that draw UMAPs, which numba compiles once a process."""
TOGETHER = {"on Ray": ON_RAY, "with UMAP": WITH_UMAP}
LONGEST = (
    "on Ray", "with UMAP", "tests/test_real_cohorts.py", "tests/test_pipeline.py",
    "tests/storage/test_object_storage.py", "tests/faults/test_storage_faults.py", "tests/test_jobs_submission.py",
)  # fmt: skip
"""What takes longest; begun first, so that the processes that share the tests end together."""


def group(file: str) -> str:
    """Return what runs in one process: several files by their group's name, or the file itself."""
    return next((name for name, files in TOGETHER.items() if file in files), file)


def file_of(item: pytest.Item) -> str:
    """Return a test's file, from the root of the repository."""
    return str(item.path.relative_to(ROOT))


def ordered(items: Iterable[pytest.Item]) -> list[pytest.Item]:
    """Return tests with the longest groups first, and the files of a group together."""
    places = {name: place for place, name in enumerate(LONGEST)}
    return sorted(items, key=lambda item: places.get(group(file_of(item)), len(LONGEST)))


class GroupScheduling(LoadFileScheduling):
    """A process of pytest-xdist runs a group from its first file to its last."""

    def _split_scope(self, nodeid: str) -> str:
        return group(super()._split_scope(nodeid))
