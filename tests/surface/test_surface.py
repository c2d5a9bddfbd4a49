"""What users rely on changes only on purpose: names, signatures, commands, settings, the files and keys of a run."""

from __future__ import annotations

from pathlib import Path

import pytest

import ndreamer_dist as nd
from tests.surface import surface
from tests.tiny import NAMES, SETTINGS, tiny_cohort


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("surface")
    run = nd.run(tiny_cohort(folder), out=folder / "run", preset="small", settings=SETTINGS, **NAMES)
    return surface.texts(Path(run.url))


@pytest.mark.parametrize(
    "name", ["commands.txt", "names.txt", "figures.txt", "settings.yaml", "run_files.txt", "results_tree.txt"]
)
def test_what_users_rely_on_is_as_it_was(name: str, texts: dict[str, str]) -> None:
    kept = (surface.HERE / name).read_text()
    assert texts[name] == kept, "if this is meant, write the texts anew: python -m tests.surface.surface"
