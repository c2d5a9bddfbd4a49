"""New cells on a finished run: results follow the definition, whatever else is mapped; the run stays as it is."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest
from scipy.spatial.distance import cdist

import ndreamer_dist as nd
from ndreamer_dist import keys
from ndreamer_dist.commands.info import describe
from ndreamer_dist.errors import CohortError, RunError, SettingsError, StoreError
from ndreamer_dist.report.page import PageData, _warnings
from ndreamer_dist.stats.results import Results
from tests.tiny import NAMES, SETTINGS, as_memory, assert_same_bits, dense

HOW = {"run.serial": True, "run.progress": False}
SPACES = ("pca", "harmony", "state")


def new_donors(tiny: Path, **names: str) -> anndata.AnnData:
    """Return cells of the tiny cohort as cells of new donors, with counts thinned to four fifths."""
    cohort = as_memory(tiny)
    parts = []
    for new, old in names.items():
        part = cohort[cohort.obs["donor"].astype(str) == old][::2].copy()
        counts = dense(part.X).astype(np.int64)
        part.X = np.random.default_rng(len(parts)).binomial(counts, 0.8).astype(np.float32)
        part.obs["donor"] = new
        part.obs_names = [f"{new}_{name}" for name in part.obs_names]
        parts.append(part)
    return anndata.concat(parts, merge="same")


@pytest.fixture(scope="module")
def cohort(tiny: Path) -> anndata.AnnData:
    return new_donors(tiny, new_1="donor_01", new_2="donor_02")


@dataclass
class Runs:
    """Finished runs of the tiny cohort, by space; made at first use. No test may change them."""

    cohort: Path
    folder: Path

    def __getitem__(self, space: str) -> Path:
        out = self.folder / space
        if not out.exists():
            nd.run(self.cohort, out=out, **NAMES, embedding=space, preset="small", settings=SETTINGS)
        return out


@pytest.fixture(scope="module")
def runs(tiny: Path, tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("runs")
    (folder / "ndreamer").symlink_to(tiny_run)
    return Runs(tiny, folder)


@pytest.fixture(scope="module")
def mapped(runs: Runs, cohort: anndata.AnnData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The new donors, mapped onto the run in principal components."""
    out = tmp_path_factory.mktemp("mapped") / "both"
    nd.map(cohort, onto=runs["pca"], out=out, settings=HOW)
    return out


@pytest.fixture(scope="module")
def extended(runs: Runs, cohort: anndata.AnnData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, mapped with `extend`."""
    out = tmp_path_factory.mktemp("extended") / "both"
    nd.map(cohort, onto=runs["pca"], out=out, extend=True, settings=HOW)
    return out


@pytest.fixture(scope="module")
def results(mapped: Path) -> Results:
    return nd.open_results(mapped)


def tree(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Return times and contents of all files of a folder."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


@pytest.mark.parametrize("space", ["ndreamer", *(pytest.param(space, marks=pytest.mark.slow) for space in SPACES)])
def test_together_or_one_by_one_the_bits_are_the_same(
    space: str, runs: Runs, cohort: anndata.AnnData, tmp_path: Path
) -> None:
    before = tree(runs[space])
    both = nd.map(cohort, onto=runs[space], out=tmp_path / "both", settings=HOW).results
    for donor in ("new_2", "new_1"):
        part = cohort[cohort.obs["donor"] == donor]
        one = nd.map(part, onto=runs[space], out=tmp_path / donor, settings=HOW).results
        cells = list(part.obs_names)
        for read in ("denoised", "batch_effect", "ite"):
            asked = (
                cells
                if read != "ite"
                else [c for c, v in zip(cells, part.obs["condition"], strict=True) if v != "control"]
            )
            np.testing.assert_array_equal(getattr(one, read)(asked).X, getattr(both, read)(asked).X)
        np.testing.assert_array_equal(one.embedding(cells), both.embedding(cells))
        for column in (keys.OBS_MATCH_DISTANCE, keys.OBS_OVERLAP, keys.OBS_GROUP):
            np.testing.assert_array_equal(one.obs.loc[cells, column], both.obs.loc[cells, column])
    assert tree(runs[space]) == before
    assert both.mapped.belongs


def test_effects_are_those_of_the_definition(results: Results, runs: Runs) -> None:
    """Compare with brute force: nearest stored cells in each group, the cell itself in its own group, equal weights."""
    run = nd.open_results(runs["pca"])
    stored, x = (
        run.embedding(order="packed", pca=True).to_numpy(float),
        dense(run.expression(order="packed").X).astype(float),
    )
    new, own = results.embedding(pca=True).to_numpy(float), dense(results.expression().X).astype(float)
    condition = results.obs["condition"].astype(str).to_numpy()

    def expected(name: str) -> np.ndarray:
        groups = run.design.with_condition(run.design.condition_code(name))
        found = [x[g.start : g.stop][cdist(new, stored[g.start : g.stop]).argmin(1)] for g in groups]
        mean_with_own = (np.sum(found, axis=0) + own) / (len(found) + 1)
        return np.where((condition == name)[:, None], mean_with_own, np.mean(found, axis=0))

    by = {name: expected(name) for name in run.conditions}
    treated = condition == "treated"
    np.testing.assert_allclose(results.ite().X, (by["treated"] - by["control"])[treated], atol=1e-5)
    np.testing.assert_allclose(results.counterfactual("control").X, by["control"], atol=1e-5)
    np.testing.assert_allclose(results.effect("treated").X, by["treated"] - by["control"], atol=1e-5)


def test_donors_old_and_new_are_tested_together(results: Results, runs: Runs) -> None:
    table = results.cate("cell_type", min_cells=5, genes=list(results.var_names[:8]))
    alone = nd.open_results(runs["pca"]).cate("cell_type", min_cells=5, genes=list(results.var_names[:8]))
    assert (alone["treated_donors"] <= 3).all()
    assert table["treated_donors"].max() == 5
    matches = results.matches(str(results.obs.index[0]))
    assert set(matches["batch"]) == {"donor_01", "donor_02", "donor_03", str(results.obs["donor"].iloc[0])}
    assert results.diagnostics("cell_type", cells=200).layout == "crossed"
    assert results.lazy(effects=["treated"]).layers["effect_treated"][:5].compute().shape == (5, len(results.var_names))


def test_what_is_mapped_is_told(mapped: Path, results: Results) -> None:
    assert results.mapped.unlike < 0.1
    assert "of the mapped cells" in describe(str(mapped))
    page = Path(nd.report(mapped, by="cell_type", cells=200)).read_text(encoding="utf-8")
    assert f"{results.design.own_cells} cells, mapped onto a run of {results.design.first_row:,} cells" in page
    assert "Of the mapped cells" in page
    assert page.count("<img") > 5
    with pytest.raises(RunError, match="mapped onto a run"):
        nd.add_matches(mapped)


@pytest.mark.slow
def test_mapping_goes_on_where_it_was_interrupted(mapped: Path, runs: Runs, cohort: anndata.AnnData) -> None:
    again = Path(shutil.copytree(mapped, mapped.with_name("again")))  # the run is on the same way from there
    (again / keys.RESULTS / "zarr.json").unlink()
    lost = sorted((again / keys.DONE).rglob("*.json"))
    for marker in lost[:: max(1, len(lost) // 5)]:
        marker.unlink()
    nd.map(cohort, onto=runs["pca"], out=again, settings=HOW)
    assert_same_bits(mapped, again, (keys.PACKED, keys.MATCHES, keys.RESULTS))
    times = {path: path.stat().st_mtime_ns for path in (again / keys.RESULTS).rglob("*")}
    nd.map(cohort, onto=runs["pca"], out=again, settings=HOW)
    assert times == {path: path.stat().st_mtime_ns for path in (again / keys.RESULTS).rglob("*")}


def test_other_tissue_is_said_to_be_one(
    runs: Runs, cohort: anndata.AnnData, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Use the same counts with genes permuted; in principal components these cells lie amid the run's cells."""
    other = cohort.copy()
    other.X = dense(other.X)[:, np.random.default_rng(0).permutation(other.n_vars)]
    results = nd.map(other, onto=runs["pca"], out=tmp_path / "out", settings=HOW).results
    found = results.mapped
    assert not found.belongs
    assert found.unlike > 0.9
    assert found.far < 0.5  # what the space sees of it is not enough
    assert str(found).startswith("these cells do not belong to the run")
    caplog.clear()
    table = results.cate(genes=list(results.var_names[:2]))
    next(results.cate_parts(genes=list(results.var_names[:2])))
    assert [text.partition(":")[0] for text in caplog.messages if f"{found}" in text] == ["cate", "cate"]
    page = PageData(results, None, False, None, table, results.diagnostics(cells=50), 50)
    assert next(_warnings(page)).startswith("These cells do not belong to the run")


def test_missing_genes_are_named_and_filled_on_request(runs: Runs, cohort: anndata.AnnData, tmp_path: Path) -> None:
    run = nd.open_results(runs["pca"])
    gone = list(run.var_names[:3])
    shuffled = cohort[:, np.random.default_rng(0).permutation(cohort.n_vars)]
    fewer = shuffled[:, ~shuffled.var_names.isin(gone)]
    with pytest.raises(CohortError, match=rf"lacks 3 of the 150 genes .*{gone[0]}.*--fill-missing-genes 0.02"):
        nd.map(fewer, onto=runs["pca"], out=tmp_path / "refused", settings=HOW)
    filled = nd.map(fewer, onto=runs["pca"], out=tmp_path / "filled", fill_missing_genes=0.02, settings=HOW).results
    assert list(filled.var_names) == list(run.var_names)
    assert not dense(filled.expression(genes=gone).X).any()
    whole = nd.map(shuffled, onto=runs["pca"], out=tmp_path / "whole", settings=HOW).results
    kept = [name for name in run.var_names if name not in gone][:20]
    cells = list(whole.obs.index[:20])
    ratio = dense(whole.expression(cells, kept).X), dense(cohort[cells, kept].X)
    totals = dense(cohort[cells].X).sum(1, keepdims=True)
    np.testing.assert_allclose(ratio[0], np.log1p(ratio[1] / totals * 1e4), rtol=1e-5)


def test_a_new_condition_is_compared_with_the_runs_control(runs: Runs, cohort: anndata.AnnData, tmp_path: Path) -> None:
    drug = cohort[(cohort.obs["condition"] == "treated") & (cohort.obs["donor"] == "new_1")].copy()
    drug.obs["condition"] = "other_drug"
    found = nd.map(drug, onto=runs["pca"], out=tmp_path / "drug", settings=HOW).results
    assert found.conditions == ("control", "treated", "other_drug")
    expression = dense(found.expression().X)
    np.testing.assert_allclose(found.denoised().X, expression, atol=1e-6)  # no stored cell has the condition
    np.testing.assert_allclose(found.ite().X, expression - found.counterfactual("control").X, atol=1e-5)
    table = found.cate(
        "cell_type", condition="other_drug", baseline="treated", min_cells=5, genes=list(found.var_names[:3])
    )
    assert table["effect"].notna().any()


def test_with_extend_new_controls_come_first_and_count(
    extended: Path, mapped: Path, runs: Runs, cohort: anndata.AnnData, tmp_path: Path
) -> None:
    """Compare the bits of one command with those of two: map the controls first, then the other cells."""
    is_control = (cohort.obs["condition"] == "control").to_numpy()
    controls, treated = cohort[is_control].copy(), cohort[~is_control].copy()
    nd.map(controls, onto=runs["pca"], out=tmp_path / "controls", extend=True, settings=HOW)
    after = nd.map(treated, onto=tmp_path / "controls", out=tmp_path / "treated", settings=HOW).results
    together, plain = nd.open_results(extended), nd.open_results(mapped)
    cells = list(treated.obs_names)
    np.testing.assert_array_equal(together.ite(cells).X, after.ite(cells).X)
    np.testing.assert_array_equal(together.denoised(cells).X, after.denoised(cells).X)
    np.testing.assert_array_equal(
        together.denoised(list(controls.obs_names)).X, plain.denoised(list(controls.obs_names)).X
    )
    assert not np.array_equal(together.ite(cells).X, plain.ite(cells).X)
    told = together.matches(cells[0])
    assert {"new_1", "new_2"} <= set(told.loc[told["condition"] == "control", "batch"])


@pytest.mark.slow
def test_what_was_mapped_with_extend_is_mapped_onto(extended: Path, runs: Runs, tiny: Path, tmp_path: Path) -> None:
    mapped, results = extended, nd.open_results(extended)
    third = new_donors(tiny, new_3="donor_03")
    before = tree(mapped)
    found = nd.map(third, onto=mapped, out=tmp_path / "third", settings=HOW).results
    assert [group.name for group in found.design.groups[: found.design.onto]] == [
        group.name for group in results.design.groups
    ]
    assert set(found.matches(str(found.obs.index[0]))["batch"]) >= {"donor_01", "new_1", "new_2", "new_3"}
    plain = nd.map(third, onto=runs["pca"], out=tmp_path / "plain", settings=HOW).results
    assert not np.array_equal(found.denoised().X, plain.denoised().X)
    np.testing.assert_array_equal(found.embedding(), plain.embedding())
    table = found.cate("cell_type", min_cells=5, genes=list(found.var_names[:3]))
    assert table["treated_donors"].max() == 6
    assert tree(mapped) == before
    with pytest.raises(RunError, match="without --extend"):
        nd.map(new_donors(tiny, new_4="donor_01"), onto=tmp_path / "plain", out=tmp_path / "fourth", settings=HOW)


def known_group(cohort: anndata.AnnData) -> anndata.AnnData:
    made = cohort.copy()
    made.obs["donor"] = "donor_01"
    return made


def known_cells(cohort: anndata.AnnData) -> anndata.AnnData:
    made = cohort.copy()
    made.obs_names = [name.split("_", 2)[2] for name in made.obs_names]
    return made


def otherwise_spelt(cohort: anndata.AnnData) -> anndata.AnnData:
    made = cohort.copy()
    made.obs["condition"] = made.obs["condition"].astype(str).str.capitalize()
    return made


def logarithms(cohort: anndata.AnnData) -> anndata.AnnData:
    made = cohort.copy()
    x = dense(made.X)
    made.X = np.log1p(x / x.sum(1, keepdims=True) * 1e4)
    return made


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(known_group, "is in the run already", id="group"),
        pytest.param(known_cells, "cells are in the run already", id="cells"),
        pytest.param(lambda c: c[:, ::-1][:8].copy(), "groups of fewer than 20 cells", id="few_cells"),
        pytest.param(logarithms, "the run was made of counts.*look log-normalised", id="values"),
        pytest.param(otherwise_spelt, "'(Control' is not in the run, which has 'control|Treated' is not in the run, which has 'treated)'", id="spelling"),
        pytest.param(lambda c: anndata.AnnData(c.X, c.obs.drop(columns="donor"), c.var), "column 'donor' is not in", id="column"),
        pytest.param(lambda c: anndata.AnnData(c.X, c.obs.drop(columns="condition"), c.var), "column 'condition' is not in", id="condition"),
    ],
)  # fmt: skip
def test_what_cannot_be_mapped_is_refused(
    change: Callable[[anndata.AnnData], anndata.AnnData], message: str, runs: Runs, cohort: anndata.AnnData,
    tmp_path: Path,
) -> None:  # fmt: skip
    with pytest.raises(CohortError, match=message):
        nd.map(change(cohort), onto=runs["pca"], out=tmp_path / "out", extend=True, settings=HOW)


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        pytest.param({"settings": {"match.neighbours": 3}}, SettingsError, "settings of the run", id="setting"),
        pytest.param({"embedding": "harmony"}, RunError, "has no space 'harmony'", id="space"),
    ],
)
def test_what_is_the_runs_cannot_be_changed(
    how: dict[str, Any], error: type[Exception], message: str, runs: Runs, cohort: anndata.AnnData,
    tmp_path: Path,
) -> None:  # fmt: skip
    with pytest.raises(error, match=message):
        nd.map(cohort, onto=runs["pca"], out=tmp_path / "out", **{"settings": HOW, **how})


@pytest.mark.slow
def test_directories_are_not_mixed_up(mapped: Path, runs: Runs, cohort: anndata.AnnData, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="the run itself"):
        nd.map(cohort, onto=runs["pca"], out=runs["pca"], settings=HOW)
    with pytest.raises(RunError, match="holds no run"):
        nd.map(cohort, onto=tmp_path / "nothing", out=tmp_path / "out", settings=HOW)
    with pytest.raises(RunError, match="mapped in another way"):
        nd.map(cohort, onto=runs["harmony"], out=mapped, settings=HOW)
    alone = Path(shutil.copytree(mapped, tmp_path / "deep" / "alone"))
    assert nd.open_results(alone).counterfactual("control", genes=list(nd.open_results(alone).var_names[:1])).n_obs
    gone = Path(shutil.copytree(runs["pca"], tmp_path / "run"))
    nd.map(cohort, onto=gone, out=tmp_path / "lost", settings=HOW)
    shutil.rmtree(gone)
    with pytest.raises(StoreError, match="which is needed and cannot be opened"):
        nd.open_results(tmp_path / "lost").counterfactual("control")


@pytest.mark.slow
def test_a_run_that_has_not_kept_its_clusters_is_refused(runs: Runs, cohort: anndata.AnnData, tmp_path: Path) -> None:
    old = Path(shutil.copytree(runs["harmony"], tmp_path / "old"))
    shutil.rmtree(old / keys.EMBEDDING / keys.HARMONY_SUMS)
    with pytest.raises(RunError, match="did not keep what mapping needs"):
        nd.map(cohort, onto=old, out=tmp_path / "out", settings=HOW)
