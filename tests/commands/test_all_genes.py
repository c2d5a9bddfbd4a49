"""Effects of all genes are a store of their own, with the bits that the same questions to the run have."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import anndata
import numpy as np
import pandas as pd
import pytest

from ndreamer_dist import keys
from ndreamer_dist.commands.all_genes import all_genes
from ndreamer_dist.effects import tables
from ndreamer_dist.errors import CohortError, ResourceError, RunError, StoreError
from ndreamer_dist.stats.results import open_results
from tests.cohort.inputs import counts, settings_of
from tests.results.conftest import finish
from tests.results.fabricate import from_cohort

LAYERS = ("denoised", "batch_effect", "ite")
SERIAL = {"run.serial": True, "run.progress": False}


def run_of(folder: Path, neighbours: int) -> SimpleNamespace:
    settings = settings_of(hvg__num_hvg=20, match__neighbours=neighbours, effects__store="ite")
    return finish(from_cohort(folder, cohort(), settings))


def cohort() -> anndata.AnnData:
    return counts(300, 90, conditions=("stim", "ctrl", "sick"))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    return run_of(tmp_path_factory.mktemp("run"), 1)


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards of 32 genes, so that 90 are three spans."""
    monkeypatch.setattr(tables, "SHARD_GENES", 32)


def write(made: SimpleNamespace, out: Path, **more: object) -> object:
    return all_genes(made.run.url, cohort(), out=out, settings=SERIAL, **more)


@pytest.mark.parametrize("neighbours", [1, 3])
def test_every_gene_has_the_bits_that_the_run_answers_with(
    made: SimpleNamespace, neighbours: int, narrow: None, tmp_path: Path
) -> None:
    made = made if neighbours == 1 else run_of(tmp_path / "run", neighbours)
    wide, run = write(made, tmp_path / "all", layers=LAYERS), open_results(made.run.url)
    assert wide.layers == LAYERS
    assert list(wide.var_names) == list(cohort().var_names)
    assert list(wide.var.index[wide.var["ndreamer_modelled"]]) == list(run.var_names)
    pd.testing.assert_frame_equal(wide.obs, run.obs)
    for name in LAYERS:
        np.testing.assert_array_equal(wide.layer(name).X, run.layer(name, cohort=cohort()).X)
    np.testing.assert_array_equal(wide.ite(genes=list(run.var_names)).X, run.ite().X)
    np.testing.assert_array_equal(wide.expression().X.toarray(), run.expression(cohort=cohort()).X.toarray())
    would = (results.counterfactual(run.control, genes=list(run.var_names)).X for results in (wide, run))
    np.testing.assert_array_equal(*would)  # with several neighbours, from matches that it searches
    assert not (tmp_path / "all" / keys.PACKED).exists()
    stored = anndata.read_zarr(tmp_path / "all" / keys.RESULTS)
    assert stored.shape == (300, 90)
    of_run = anndata.read_zarr(run.url)
    for name in (keys.OBSM_MU, keys.OBSM_PCA, keys.OBSM_MATCH, keys.OBSM_MATCH_DISTANCE):
        np.testing.assert_array_equal(stored.obsm[name], of_run.obsm[name])
    told = stored.uns[keys.UNS]
    assert {name: str(told[name]) for name in ("groups", "seed", "input", "normalise", "dropped")} == {
        name: str(of_run.uns[keys.UNS][name]) for name in ("groups", "seed", "input", "normalise", "dropped")
    }


def test_what_is_there_is_not_written_again_and_what_is_lost_is(
    made: SimpleNamespace, narrow: None, tmp_path: Path
) -> None:
    out = tmp_path / "all"
    before = write(made, out).ite().X
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    write(made, out)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()} == times
    lost = out / keys.RESULTS / "layers" / "ite" / "c" / "1" / "2"
    lost.unlink()
    np.testing.assert_array_equal(write(made, out).ite().X, before)
    layers = [path for path in times if "layers/ite/c" in str(path)]
    assert len(layers) == 5 * 3
    assert [path for path in layers if path.stat().st_mtime_ns != times[path]] == [lost]
    with pytest.raises(RunError, match="holds effects of all genes of another run"):
        write(made, out, layers=("denoised",))


def test_what_was_interrupted_goes_on(
    made: SimpleNamespace, narrow: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written, whole = [], tables.write_layer

    def stop_at_the_seventh(*args: object) -> None:
        if len(written) == 6:
            raise KeyboardInterrupt
        written.append(args)
        whole(*args)

    out = tmp_path / "all"
    with monkeypatch.context() as patch:
        patch.setattr(tables, "write_layer", stop_at_the_seventh)
        with pytest.raises(KeyboardInterrupt):
            write(made, out)
    with pytest.raises(StoreError, match="has not finished"):
        open_results(out)
    times = {path: path.stat().st_mtime_ns for path in (out / keys.RESULTS / "layers/ite/c").rglob("*/*")}
    packed = {path: path.stat().st_mtime_ns for path in (out / keys.DONE / keys.STAGE_PACK).iterdir()}
    assert len(times) == 6
    assert packed
    found = write(made, out).ite().X
    assert all(path.stat().st_mtime_ns == time for path, time in (times | packed).items())
    np.testing.assert_array_equal(found, write(made, tmp_path / "undisturbed").ite().X)


def test_what_cannot_be_is_refused(made: SimpleNamespace, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    with pytest.raises(RunError, match="holds files that are not effects of all genes"):
        write(made, tmp_path / "taken")
    with pytest.raises(CohortError, match="is not the cohort"):
        all_genes(made.run.url, counts(300, 90, seed=1), out=tmp_path / "out", settings=SERIAL)
    with pytest.raises(RunError, match=r"match\.bandwidth would change the results"):
        all_genes(made.run.url, cohort(), out=tmp_path / "out", settings={**SERIAL, "match.bandwidth": 3.0})
    with pytest.raises(RunError, match=r"^seed would change the results"):
        all_genes(made.run.url, cohort(), out=tmp_path / "out", settings={**SERIAL, "seed": 3})
    with pytest.raises(ResourceError, match="GB of memory"):
        all_genes(made.run.url, cohort(), out=tmp_path / "out", settings={**SERIAL, "run.memory_gb": 0.1})
    assert not (tmp_path / "out").exists()
