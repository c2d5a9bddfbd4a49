"""Several matching spaces of one cohort in one run directory."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

import ndreamer_dist as nd
from ndreamer_dist import keys
from ndreamer_dist.commands.info import describe
from ndreamer_dist.errors import RunError, StoreError
from ndreamer_dist.storage.arrays import open_array
from ndreamer_dist.storage.files import open_storage
from tests.embedding.spaces import GIVEN, SPACES, folder, run
from tests.tiny import assert_same_bits

ALONE = {"run.serial": True}


def test_a_space_that_is_there_is_not_made_again(cohort, finished):
    before = arrays_of(finished)
    run(cohort, finished, keys.HARMONY)
    run(cohort, finished, keys.SPACE_PCA)
    assert arrays_of(finished) == before


def arrays_of(run: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in run.rglob("*.zarr/**/c/**") if path.is_file()}


def test_the_first_space_stays_the_default_and_absent_ones_are_refused(finished):
    assert nd.open_results(finished).space == SPACES[0]
    with pytest.raises(StoreError, match="has no space 'ndreamer'; it has 'pca', 'harmony'"):
        nd.open_results(finished, embedding="ndreamer")
    with pytest.raises(StoreError, match="matched in 'pca'"):
        nd.open_results(finished / keys.RESULTS, embedding=keys.HARMONY)


def test_a_space_is_added_only_to_a_finished_run_of_the_same_settings(cohort, finished, tmp_path):
    with pytest.raises(RunError, match=r"hvg.num_hvg: 150 -> 140"):
        run(cohort, finished, keys.STATE, **{"hvg.num_hvg": 140})
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / keys.RESULTS / "zarr.json").unlink()
    with pytest.raises(RunError, match="begun in the space 'pca' and is not finished"):
        run(cohort, tmp_path / "run", keys.STATE)


def test_other_settings_of_a_space_redo_it_alone(cohort, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    with pytest.raises(RunError, match=r"state.k: None -> 2.*--redo"):
        run(cohort, tmp_path / "run", keys.STATE, **{"state.k": 2})
    run(cohort, tmp_path / "run", keys.STATE, redo=True, **{"state.k": 2})
    assert nd.open_results(tmp_path / "run", embedding="state").embedding().shape[1] == 2
    assert_same_bits(finished, tmp_path / "run", (keys.PACKED, keys.EMBEDDING, keys.MATCHES))


def test_coordinates_that_changed_are_told_from_those_of_before(cohort, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    other = cohort.copy()
    other.obsm["X_mine"] = cohort.obsm["X_mine"] * 2
    with pytest.raises(RunError, match="--redo"):
        run(other, tmp_path / "run", GIVEN)


def test_info_lists_the_spaces_and_where_each_was_matched(finished):
    told = describe(str(finished))
    assert "matched in pca (obsm X_pca)" in told
    for name in SPACES[1:]:
        assert f"{name:<24}{keys.space_folder(name)}\n" in told
    assert "matched in state" in describe(str(folder(finished, keys.STATE)))


@pytest.mark.parametrize("name", [keys.HARMONY, GIVEN])
def test_check_finds_damage_in_every_space_and_the_run_makes_it_again(cohort, finished, tmp_path, name):
    shutil.copytree(finished, tmp_path / "run")
    whole = nd.check(tmp_path / "run", settings=ALONE)
    assert whole.damage == ()
    lost = folder(tmp_path / "run", name) / keys.EMBEDDING / keys.embedding_key(name) / "c/2/0"
    lost.write_bytes(lost.read_bytes()[:-9] + b"scrambled")
    (damage,) = nd.check(tmp_path / "run", mend=True, settings=ALONE).damage
    assert f"{keys.space_folder(name)}/{keys.EMBEDDING}: array '{keys.embedding_key(name)}', chunk (2, 0)" in damage
    run(cohort, tmp_path / "run", name)
    assert nd.check(tmp_path / "run", settings=ALONE) == whole
    assert_same_bits(folder(finished, name), folder(tmp_path / "run", name), (keys.MATCHES, keys.RESULTS))


def test_check_reads_a_run_whose_added_space_has_only_begun(finished, tmp_path):
    out = Path(shutil.copytree(finished, tmp_path / "run"))
    shutil.rmtree(out / keys.SPACES_DIR / "harmony" / keys.DONE)
    checked = nd.check(out, settings=ALONE)
    assert not checked.damage
    assert 0 < checked.files < nd.check(finished, settings=ALONE).files


def test_matches_are_added_to_the_space_that_is_named(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    name = f"{keys.block_name(0)}/{keys.MATCH_ROW}"
    stores = [open_storage(folder(tmp_path / "run", space) / keys.MATCHES) for space in SPACES]
    before = [np.asarray(open_array(store, name)[...]) for store in stores]
    assert nd.add_matches(tmp_path / "run", embedding=keys.STATE, settings=ALONE) > 0
    after = [np.asarray(open_array(store, name)[...]) for store in stores]
    changed = [not np.array_equal(one, other) for one, other in zip(before, after, strict=True)]
    assert changed == [space == keys.STATE for space in SPACES]
    with pytest.raises(RunError, match=r"no space 'stat'; it has pca, .*Did you mean 'state'"):
        nd.add_matches(tmp_path / "run", embedding="stat", settings=ALONE)


def test_other_shared_settings_of_the_first_space_delete_the_others(cohort, finished, tmp_path, caplog):
    shutil.copytree(finished, tmp_path / "run")
    run(cohort, tmp_path / "run", keys.SPACE_PCA, redo=True, **{"hvg.num_hvg": 140})
    assert "since stages that it needs run again" in caplog.text
    assert not (tmp_path / "run" / keys.SPACES_DIR / "harmony").exists()
    with pytest.raises(StoreError, match="it has 'pca'"):
        nd.open_results(tmp_path / "run", embedding=keys.HARMONY)
    run(cohort, tmp_path / "run", keys.HARMONY, **{"hvg.num_hvg": 140})
    assert len(nd.open_results(tmp_path / "run", embedding=keys.HARMONY).embedding()) == 900


def test_results_without_effect_modifiers_are_not_exported_as_if_they_had_some(finished, tmp_path):
    with pytest.raises(StoreError, match="matched in 'pca'"):
        nd.export(finished, out=tmp_path / "exported")
