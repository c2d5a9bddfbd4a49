"""The whole job: the same bits however it is run, stopped or harmed, and directories that are never mixed up."""

from __future__ import annotations

import copy
import json
import logging
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ndreamer_dist as nd
from ndreamer_dist import keys
from ndreamer_dist.errors import CohortError, ResourceError, RunError, SettingsError, StoreError
from ndreamer_dist.pipeline import check_owner
from ndreamer_dist.rundir.directory import RunDirectory
from ndreamer_dist.storage.arrays import read_array
from ndreamer_dist.storage.files import open_storage
from tests.fuzz.helpers import command
from tests.results.brute_force import check
from tests.tiny import NAMES, SETTINGS, arrays, as_memory, assert_same_bits, dense, run_words, tiny_cohort, undone

IN_THE_GATE = (keys.STAGE_TRAIN, keys.STAGE_EFFECTS)
STOPPED_BEFORE = [
    pytest.param(stage, marks=() if stage in IN_THE_GATE else pytest.mark.slow) for stage in keys.STAGES[1:]
]


@pytest.fixture(scope="module")
def cohort(tiny: Path) -> Path:
    return tiny


@pytest.fixture(scope="module")
def finished(tiny_run: Path) -> Path:
    """A finished run; tests that change it work on a copy."""
    return tiny_run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def again(cohort: Any, out: Path, *, settings: dict | None = None, **options: Any) -> nd.Run:
    return nd.run(cohort, out=out, preset="small", settings={**SETTINGS, **(settings or {})}, **{**NAMES, **options})


def test_results_follow_from_themselves_by_brute_force(finished: Path) -> None:
    check(finished / keys.RESULTS)


def test_the_input_is_kept_in_the_results(cohort: Path, finished: Path) -> None:
    given, results = as_memory(cohort), nd.open_results(finished)
    assert list(results.obs.index) == list(given.obs_names)
    for column in given.obs:
        assert list(results.obs[column].astype(str)) == list(given.obs[column].astype(str))
    totals = dense(given.X).sum(1, keepdims=True)
    expected = np.log1p(dense(given.X) / totals * 1e4)[:, given.var_names.get_indexer(results.var_names)]
    assert np.allclose(dense(results.expression().X), expected, rtol=1e-5, atol=1e-6)


def test_a_second_run_gives_the_same_bits(cohort: Path, finished: Path, tmp_path: Path) -> None:
    again(cohort, tmp_path / "second")
    assert_same_bits(finished, tmp_path / "second")


def test_an_anndata_object_gives_the_same_bits_and_is_left_as_it_was(
    cohort: Path, finished: Path, tmp_path: Path
) -> None:
    given = as_memory(cohort)
    before = copy.deepcopy(given)
    again(given, tmp_path / "memory")
    assert_same_bits(finished, tmp_path / "memory")
    assert (given.X != before.X).nnz == 0
    assert given.obs.equals(before.obs)
    assert given.var.equals(before.var)
    assert not given.layers
    assert not given.obsm


def test_a_finished_run_does_nothing(cohort: Path, run: Path) -> None:
    def times() -> dict[Path, int]:
        own = (keys.RUN_JSON, keys.STAGES_LOG, keys.LOCK)
        files = (file for file in run.rglob("*") if file.is_file())
        return {file: file.stat().st_mtime_ns for file in files if str(file.relative_to(run)) not in own}

    before = times()
    again(cohort, run)
    assert times() == before


def lose_a_shard(run: Path, stage: str) -> list[Path]:
    """Delete the last marker of a stage and the files that it names; return them."""
    marker = sorted((run / keys.DONE / stage).iterdir())[-1]
    lost = [marker, *(run / name for name in json.loads(marker.read_text())["files"])]
    for file in lost:
        file.unlink()
    return lost


def test_lost_shards_of_all_stages_are_made_again_with_the_same_bits(cohort: Path, finished: Path, run: Path) -> None:
    lost = [file for stage in keys.STAGES for file in lose_a_shard(run, stage)]
    again(cohort, run)
    assert_same_bits(finished, run)
    assert all(file.exists() for file in lost)


@pytest.mark.slow
@pytest.mark.parametrize("stage", keys.STAGES)
def test_a_lost_shard_of_any_stage_is_made_again_with_the_same_bits(
    cohort: Path, finished: Path, run: Path, stage: str
) -> None:
    lost = lose_a_shard(run, stage)
    again(cohort, run)
    assert_same_bits(finished, run)
    assert all(file.exists() for file in lost)


@pytest.mark.parametrize("stage", STOPPED_BEFORE)
def test_a_run_that_was_stopped_after_any_stage_goes_on(cohort: Path, finished: Path, run: Path, stage: str) -> None:
    stopped_at = keys.STAGES.index(stage)
    for later in keys.STAGES[stopped_at:]:
        shutil.rmtree(run / keys.DONE / later)
    (run / keys.RESULTS / "zarr.json").unlink()
    with pytest.raises(StoreError, match="has not finished; give the same `run` command again"):
        nd.open_results(run)
    again(cohort, run)
    assert_same_bits(finished, run)


@pytest.mark.parametrize("store", [keys.PACKED, keys.EMBEDDING])
def test_a_flipped_bit_in_any_array_is_an_error_that_names_its_chunk(run: Path, store: str) -> None:
    draw, folder = random.Random(0), run / store
    chunks = [file for file in folder.rglob("*") if file.is_file() and file.name != "zarr.json"]
    assert {file.relative_to(folder).parts[0] for file in chunks} >= set(
        {keys.PACKED: {"X", "input_row", "cluster_low", "cluster_high"}, keys.EMBEDDING: {keys.MU, keys.PCA}}[store]
    )
    for file in chunks:
        whole = file.read_bytes()
        damaged = bytearray(whole)
        damaged[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        file.write_bytes(damaged)
        name, _, place = str(file.relative_to(folder)).partition("/c/")
        position = tuple(int(part) for part in place.split("/"))
        with pytest.raises(StoreError) as raised:
            read_array(open_storage(folder), name)
        assert f"{folder}: array '{name}', chunk {position} is damaged" in str(raised.value)
        file.write_bytes(whole)


def test_other_result_settings_are_refused_and_redone_on_request(cohort: Path, run: Path) -> None:
    kept = (run / keys.MODEL_WEIGHTS).stat().st_mtime_ns
    change = {"match.neighbours": 3}
    with pytest.raises(RunError, match=r"match\.neighbours: 1 -> 3.*--redo runs these stages again: match, effects;"):
        again(cohort, run, settings=change)
    again(cohort, run, settings=change, redo=True)
    assert (run / keys.MODEL_WEIGHTS).stat().st_mtime_ns == kept
    check(run / keys.RESULTS)
    assert json.loads(nd.open_results(run).uns["settings"])["match"]["neighbours"] == 3


def test_other_ways_of_working_are_not_other_settings(cohort: Path, run: Path) -> None:
    before = arrays(run / keys.RESULTS)
    again(cohort, run, settings={"train.threads": 1, "run.task_threads": 1, "cohort.chunk_rows": 100})
    assert arrays(run / keys.RESULTS).keys() == before.keys()


def test_more_edges_are_matched_later_and_results_stay_as_they_are(cohort: Path, run: Path) -> None:
    def times(store: str) -> dict[Path, int]:
        return {file: file.stat().st_mtime_ns for file in (run / store).rglob("*") if file.is_file()}

    matches, results = times(keys.MATCHES), times(keys.RESULTS)
    assert nd.add_matches(run, edges="treated") == 9  # from every donor's controls to every donor's treated cells
    assert nd.add_matches(run, edges="all") == 0
    assert {file: time for file, time in times(keys.MATCHES).items() if file in matches} == matches
    assert len(times(keys.MATCHES)) == len(matches) + 2 * 9
    again(cohort, run)
    assert times(keys.RESULTS) == results


def test_more_edges_are_refused_where_there_is_no_such_run(run: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="holds no run"):
        nd.add_matches(tmp_path)
    with pytest.raises(RunError, match="only settings that say how to work"):
        nd.add_matches(run, settings={"match.neighbours": 2})
    assert nd.add_matches(run, edges="control", settings={"run.task_threads": 2}) == 0


def test_another_input_is_refused_and_started_over_on_request(run: Path, tmp_path: Path) -> None:
    other = tiny_cohort(tmp_path / "other", seed=2)
    with pytest.raises(RunError, match="holds a run of another input"):
        again(other, run)
    old = run / keys.REPORT
    old.parent.mkdir()
    old.write_text("of the other input")
    again(other, run, fresh=True)
    assert not old.exists()
    assert list(nd.open_results(run).obs.index) == list(as_memory(other).obs_names)
    check(run / keys.RESULTS)


def test_a_directory_that_holds_something_else_is_refused_and_left_alone(cohort: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    for fresh in (False, True):
        with pytest.raises(RunError, match="holds files that are not a run's"):
            again(cohort, tmp_path, fresh=fresh)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_directory_below_a_file_is_refused_by_name(cohort: Path, tmp_path: Path) -> None:
    file = tmp_path / "cells.h5ad"
    file.write_text("cells")
    for out in (file, file / "sub", file / "sub" / "run"):
        with pytest.raises(
            RunError, match=rf"^{out} cannot be created: {file} is a file and no folder; choose another --out$"
        ):
            again(cohort, out)
    assert file.read_text() == "cells"


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ({"control": False}, "^control is False; expected a name as text: 'False' where that is one$"),
        ({"batch_key": ["donor", True]}, r"^batch_key is \['donor', True\]; .* 'True' where"),
    ],
)
def test_yes_and_no_among_the_arguments_are_refused_as_arguments(
    cohort: Path, tmp_path: Path, names: dict, said: str
) -> None:
    with pytest.raises(SettingsError, match=said):
        nd.run(cohort, out=tmp_path / "run", **{**NAMES, **names})


def test_a_refused_cohort_leaves_the_directory_free_for_the_mended_one(cohort: Path, tmp_path: Path) -> None:
    given = as_memory(cohort)
    given.X.data[1000] = np.nan
    with pytest.raises(CohortError, match="holds NaN"):
        again(given, tmp_path / "run")
    again(cohort, tmp_path / "run", settings={"train.epochs": 1})


def test_a_run_directory_is_not_named_like_a_file(tmp_path: Path) -> None:
    directory = RunDirectory.at(tmp_path / "results.h5ad")
    with pytest.raises(
        RunError, match=r"results\.h5ad would be a run directory, but is named like a file; name a folder"
    ):
        check_owner(directory, {}, fresh=False)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        pytest.param({"condition_key": None}, CohortError, "no condition key was given", id="no_condition_key"),
        pytest.param({"control": None}, CohortError, "no control was given", id="no_control"),
        pytest.param({"control": "contrl"}, CohortError, "Did you mean 'control'", id="misspelt_control"),
        pytest.param({"batch_key": "doner"}, CohortError, "Did you mean 'donor'", id="misspelt_batch"),
        pytest.param({"settings": {"run.memory_gb": 0.1}}, ResourceError, "GB of memory", id="memory"),
        pytest.param({"settings": {"train.device": "cuda"}}, ResourceError, "need 1 GPUs and Ray has 0", id="no_gpu"),
        pytest.param(
            {"settings": {"run.serial": False, "train.workers": 99}}, ResourceError,
            "leave none to the readers", id="no_processor_for_readers",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_before_anything_is_written(
    cohort: Path, tmp_path: Path, options: dict, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        again(cohort, tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_no_batch_three_conditions_and_fewer_layers(tmp_path: Path) -> None:
    cohort = tiny_cohort(tmp_path, conditions=3)
    again(cohort, tmp_path / "run", batch_key=None, settings={"effects.store": ["ite", "denoised"]})
    check(tmp_path / "run" / keys.RESULTS)
    results = nd.open_results(tmp_path / "run")
    seen = as_memory(cohort).obs["condition"].astype(str)
    assert results.conditions == ("control", *(name for name in seen.unique() if name != "control"))
    assert np.array_equal(dense(results.denoised().X), dense(results.expression().X))


def test_a_loss_that_is_not_finite_ends_the_job_in_one_line(cohort: Path, finished: Path, tmp_path: Path) -> None:
    run = undone(finished, tmp_path / "run", keys.STAGE_TRAIN)
    shutil.rmtree(run / keys.TRAIN_DIR)
    words = run_words(cohort, run, SETTINGS | {"train.learning_rate": 1e30}, "--redo")
    refusal = command(words).refusal
    assert refusal.startswith("error: the loss is not finite at step ")
    assert "train.learning_rate" in refusal


def test_stages_are_logged_with_what_they_cost(finished: Path) -> None:
    lines = [json.loads(line) for line in (finished / keys.STAGES_LOG).read_text().splitlines()]
    assert [line["stage"] for line in lines] == list(keys.STAGES)
    assert all(line["peak_bytes"] > 1e7 and line["seconds"] > 0 for line in lines)


def test_small_groups_are_reported_and_their_cells_listed(
    cohort: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    given = as_memory(cohort)
    few = np.flatnonzero((given.obs["donor"] == "donor_01") & (given.obs["condition"] == "treated"))[7:]
    given = given[np.setdiff1d(np.arange(given.n_obs), few)].copy()
    with caplog.at_level(logging.WARNING):
        again(given, tmp_path / "run", settings={"train.epochs": 1})
    assert "donor_01|treated" in caplog.text
    assert len(nd.open_results(tmp_path / "run").obs) == given.n_obs - 7
    import pandas as pd

    dropped = pd.read_parquet(tmp_path / "run" / keys.DROPPED)
    assert len(dropped) == 7
    assert set(dropped["name"]) <= set(given.obs_names)
