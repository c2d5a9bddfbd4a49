"""A flipped byte in any file of a run: named in one line, removed by the run that meets it, made again by the next."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import ndreamer_dist as nd
from ndreamer_dist import keys
from ndreamer_dist.errors import DamagedError, NDreamerError
from ndreamer_dist.storage.checksums import unseal
from tests.fuzz.helpers import command
from tests.tiny import NAMES, SETTINGS, assert_same_bits, run_words, tiny_cohort, undone

QUICK = SETTINGS | {"train.epochs": 3, "train.checkpoint_steps": 2}
AGAIN = "the same command makes it again"


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_cohort(tmp_path_factory.mktemp("cohort"), cells=400, genes=120, batches=2)


@pytest.fixture(scope="module")
def reference(cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing happened to."""
    out = tmp_path_factory.mktemp("reference") / "run"
    run_again(cohort, out)
    return out


def run_again(cohort: Path, run: Path, *, redo: bool = False) -> None:
    nd.run(cohort, out=run, preset="small", settings=QUICK, redo=redo, **NAMES)


def flip(file: Path) -> None:
    """Change the file's middle: a digit of a JSON file, so that it stays one."""
    data = bytearray(file.read_bytes())
    places = range(len(data) // 2, len(data))
    place = next((p for p in places if chr(data[p]).isdigit()), 0) if file.suffix == ".json" else places[0]
    data[place] ^= 1
    file.write_bytes(data)


def spoil(file: Path) -> None:
    """Make JSON of the same size that is none."""
    file.write_bytes(b"[" + file.read_bytes()[1:])


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


MET = {
    "weights": (keys.STAGE_EMBED, keys.MODEL_WEIGHTS, flip),
    "model": (keys.STAGE_EMBED, keys.MODEL_JSON, flip),
    "design": (keys.STAGE_PACK, keys.DESIGN_JSON, flip),
    "genes": (keys.STAGE_EMBED, keys.GENES_TABLE, flip),
    "cells": (keys.STAGE_PACK, keys.CELLS_TABLE, flip),
    "summary": (keys.STAGE_EFFECTS, keys.COHORT_SUMMARY, flip),
    "match_summary": (keys.STAGE_EFFECTS, keys.MATCH_SUMMARY, flip),
    "packed": (keys.STAGE_TRAIN, f"{keys.PACKED}/X/00001/data/c/0", flip),
    "packed_metadata": (keys.STAGE_EMBED, f"{keys.PACKED}/X/00001/data/zarr.json", spoil),
    "embedding": (keys.STAGE_PCA, f"{keys.EMBEDDING}/{keys.MU}/c/1/0", flip),
    "embedding_metadata": (keys.STAGE_MATCH, f"{keys.EMBEDDING}/{keys.PCA}/zarr.json", cut),
    "matches": (keys.STAGE_EFFECTS, f"{keys.MATCHES}/00000/row/c/0/2/0", flip),
    "matches_metadata": (keys.STAGE_EFFECTS, f"{keys.MATCHES}/00001/row/zarr.json", cut),
    "checkpoint_weights": (keys.STAGE_TRAIN, f"{keys.TRAIN_SERIAL}/*/weights.safetensors", flip),
    "checkpoint_moments": (keys.STAGE_TRAIN, f"{keys.TRAIN_SERIAL}/*/optimiser.safetensors", cut),
    "checkpoint_state": (keys.STAGE_TRAIN, f"{keys.TRAIN_SERIAL}/*/state.json", flip),
}


IN_THE_GATE = ("weights", "genes", "packed", "matches")
"""One file of each kind; the others are slow."""


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=() if case in IN_THE_GATE else pytest.mark.slow) for case in MET]
)
def test_a_damaged_file_is_named_and_removed_and_the_same_command_makes_it_again(
    case: str, cohort: Path, reference: Path, tmp_path: Path
) -> None:
    stage, pattern, harm = MET[case]
    run = undone(reference, tmp_path / "run", stage)
    file = str(next(run.glob(pattern)).relative_to(run))
    harm(run / file)
    line = command(run_words(cohort, run, QUICK)).refusal
    assert file.partition("/c/")[0].removesuffix("/zarr.json").replace(".zarr/", ".zarr: array '") in line
    assert line.endswith(f"; {AGAIN}")
    assert not (run / file).exists()
    run_again(cohort, run)
    assert_same_bits(reference, run)


def test_a_damaged_marker_is_none(cohort: Path, reference: Path, tmp_path: Path) -> None:
    run = undone(reference, tmp_path / "run", keys.STAGE_EFFECTS)
    for number, marker in enumerate(sorted((run / keys.DONE).rglob("*.json"))):
        (flip, cut)[number % 2](marker)
    (run / keys.MATCH_SUMMARY).unlink()
    run_again(cohort, run)
    assert_same_bits(reference, run)


def test_a_damaged_run_json_is_written_anew_on_request(cohort: Path, reference: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(reference, tmp_path / "run"))
    flip(run / keys.RUN_JSON)
    weights = (run / keys.MODEL_WEIGHTS).stat().st_mtime_ns
    with pytest.raises(NDreamerError, match=r"run\.json is damaged .*; --redo writes it anew"):
        run_again(cohort, run)
    run_again(cohort, run, redo=True)
    assert unseal((run / keys.RUN_JSON).read_bytes(), "run.json")["keys"]
    assert (run / keys.MODEL_WEIGHTS).stat().st_mtime_ns == weights
    run_again(cohort, run)


def test_a_damaged_progress_file_is_named_and_hides_nothing_else(reference: Path, tmp_path: Path) -> None:
    run = undone(reference, tmp_path / "run", keys.STAGE_EFFECTS)
    cut(run / keys.PROGRESS)
    told = command(["info", str(run)])
    assert told.code == 0
    assert f"{run}/{keys.PROGRESS} is damaged" in told.out
    assert "pack" in told.out


def test_the_input_is_never_removed(cohort: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(cohort, tmp_path / "cohort.zarr"))
    chunk = copy / "X/data/c/0"
    cut(chunk)
    assert "cohort.zarr" in command(run_words(copy, tmp_path / "run", QUICK)).refusal
    assert chunk.exists()


def test_readers_name_the_chunk_and_never_remove_it(reference: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(reference, tmp_path / "run"))
    for name in ("layers/ite/c/0/0", "obs/cell_type/codes/c/0"):
        flip(run / keys.RESULTS / name)
    said = command(["get", str(run), "--out", str(tmp_path / "part.csv")]).refusal
    assert "check DIR --mend" in said
    with pytest.raises(DamagedError, match=r"array 'obs/cell_type/codes', chunk \(0,\) is damaged"):
        nd.open_results(run).obs  # noqa: B018
    shutil.copy(reference / keys.RESULTS / "obs/cell_type/codes/c/0", run / keys.RESULTS / "obs/cell_type/codes/c/0")
    with pytest.raises(DamagedError, match=r"array 'layers/ite', chunk \(0, 0\) is damaged .*check DIR --mend"):
        nd.open_results(run).ite()
    assert (run / keys.RESULTS / "layers/ite/c/0/0").exists()


# --- ndreamer-dist check ---------------------------------------------------------------------------------------------


def test_a_whole_run_is_found_whole(reference: Path) -> None:
    told = command(["check", str(reference)])
    assert told.code == 0, told
    listed = {name for p in (reference / keys.DONE).rglob("*.json") for name in unseal(p.read_bytes(), str(p))["files"]}
    stores = {str(p.relative_to(reference)) for p in reference.rglob("*.zarr/**/c/**") if p.is_file()}
    assert stores <= listed  # every chunk that is there was read
    assert f"{len(listed)} files" in told.out


def test_all_that_is_damaged_is_named_at_once_and_check_with_run_mends_it(
    cohort: Path, reference: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(reference, tmp_path / "run"))
    results = run / keys.RESULTS
    flipped = [
        results / "layers/ite/c/1/0", results / "obs/_index/c/0", results / "uns/ndreamer/seed/c", results / "X/data/c/0",
        results / "layers/denoised/zarr.json", run / keys.MODEL_WEIGHTS, run / keys.DROPPED,
        run / keys.EMBEDDING / "pca_components/c/0/0", run / keys.DONE / "match/00000-00000-00002.json",
    ]  # fmt: skip
    for file in flipped:
        flip(file)
    cut(run / keys.PACKED / "X/00000/indices/c/0")
    (run / keys.MATCHES / "00001/distance/c/0/3/0").unlink()
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file()}
    found = nd.check(run)
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file()} == before
    named = "\n".join(found.damage)
    for file in flipped:
        name = f"{file.relative_to(run)}/".partition("/c/")[0].rstrip("/")
        assert name.removeprefix(f"{name.partition('.zarr/')[0]}.zarr/") in named
    assert "X/00000/indices/c/0 is damaged (it has" in named
    assert "00001/distance/c/0/3/0 is missing" in named
    assert len(found.damage) >= len(flipped) + 2
    told = command(["check", str(run), "--mend"])
    assert told.code == 2
    assert told.out.splitlines() == list(found.damage)
    assert told.err.endswith("the damaged files are deleted, and the run's own command makes them again\n")
    run_again(cohort, run)
    assert_same_bits(reference, run)
    assert not nd.check(run).damage


def test_what_is_no_run_is_not_checked(tmp_path: Path) -> None:
    assert "holds nothing that a run has made" in command(["check", str(tmp_path / "nothing")]).refusal
