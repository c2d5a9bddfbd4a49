"""A disk that fills up in the middle of a job is named in one line, and with room the same command ends with the same bits."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import ndreamer_dist as nd
from ndreamer_dist import keys
from tests.fuzz.helpers import command
from tests.tiny import NAMES, SETTINGS, assert_same_bits, run_words

QUICK = SETTINGS | {"train.epochs": 2}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 64 MB in memory; the test is skipped where none may be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture(scope="module")
def cohort(tiny: Path) -> Path:
    return tiny


@pytest.fixture(scope="module")
def reference(tiny_short_run: Path) -> Path:
    """A run that nothing happened to."""
    return tiny_short_run


@pytest.mark.parametrize("stage", [keys.STAGE_PACK, keys.STAGE_TRAIN, keys.STAGE_EFFECTS])
def test_a_full_disk_is_named_and_room_mends_it(stage: str, cohort: Path, reference: Path, small_disk: Path) -> None:
    run = small_disk / "run"
    shutil.copytree(reference, run)
    for later in keys.STAGES[keys.STAGES.index(stage) :]:
        shutil.rmtree(run / keys.DONE / later)
    shutil.rmtree(run / keys.RESULTS)
    # The plan counts files of the run as room that may be written anew, so it is let through and a write fails.
    filler = run / "logs" / "filler"
    filler.write_bytes(bytes(shutil.disk_usage(small_disk).free - 2**15))
    assert "No space left on device" in command(run_words(cohort, run, QUICK)).refusal
    assert not (run / keys.RESULTS / "zarr.json").exists()
    filler.unlink()
    nd.run(cohort, out=run, preset="small", settings=QUICK, **NAMES)
    assert_same_bits(reference, run)


@pytest.mark.parametrize("where", [{}, {"run.serial": False, "run.address": "nowhere:1"}], ids=["here", "on_a_cluster"])
def test_a_disk_that_the_plan_does_not_fit_on_is_refused_before_anything_is_written(
    where: dict[str, object], cohort: Path, small_disk: Path
) -> None:
    wide = QUICK | {"model.encoder": [2048, 2048]} | where
    refusal = command(run_words(cohort, small_disk / "run", wide)).refusal
    assert re.search(r"needs 0\.2 GB of disk and .*run has 0\.1 GB free; choose another --out", refusal)
    assert not list(small_disk.iterdir())
