"""Distribute test files over processes: files that share something expensive run in one process, longest first."""

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
"""Files whose tests use the local Ray of `conftest.py`."""
WITH_UMAP = frozenset({"tests/docs/test_docs.py", "tests/report/test_page.py", "tests/report/test_plots.py"})
"""Files that draw UMAPs, which numba compiles once per process."""
TOGETHER = {"on Ray": ON_RAY, "with UMAP": WITH_UMAP}
LONGEST = (
    "on Ray", "with UMAP", "tests/test_real_cohorts.py", "tests/test_pipeline.py",
    "tests/storage/test_object_storage.py", "tests/faults/test_storage_faults.py", "tests/test_jobs_submission.py",
)  # fmt: skip
"""The longest groups and files; they start first, so that all processes end at about the same time."""


def group(file: str) -> str:
    """Return the group of a file, or the file itself if it belongs to none; a group runs in one process."""
    return next((name for name, files in TOGETHER.items() if file in files), file)


def file_of(item: pytest.Item) -> str:
    """Return the file of a test, relative to the root of the repository."""
    return str(item.path.relative_to(ROOT))


def ordered(items: Iterable[pytest.Item]) -> list[pytest.Item]:
    """Sort tests so that the longest groups come first and the files of a group together."""
    places = {name: place for place, name in enumerate(LONGEST)}
    return sorted(items, key=lambda item: places.get(group(file_of(item)), len(LONGEST)))


class GroupScheduling(LoadFileScheduling):
    """Makes one process of pytest-xdist run all files of a group."""

    def _split_scope(self, nodeid: str) -> str:
        return group(super()._split_scope(nodeid))
