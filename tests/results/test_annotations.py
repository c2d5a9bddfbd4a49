"""Annotations are used everywhere, are checked by cell name, and change no file of the run."""

from __future__ import annotations

import shutil
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import zarr

import ndreamer_dist as nd
from ndreamer_dist import keys
from ndreamer_dist.errors import QueryError, StoreError
from ndreamer_dist.results.annotations import table_of_file
from ndreamer_dist.stats.results import Results
from tests.test_cli import spoken
from tests.tiny import NAMES, SETTINGS, arrays, as_memory, tiny_cohort, write_into


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_cohort(tmp_path_factory.mktemp("cohort"))


@pytest.fixture(scope="module")
def finished(cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "run"
    nd.run(cohort, out=out, preset="small", settings=SETTINGS, **NAMES)
    return out


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def labels_of(results: Results) -> pd.Series:
    """Return labels of all cells but the first ten, not in the order of the results."""
    names = results.obs.index[10:][::-1]
    return pd.Series(np.where(np.arange(len(names)) % 2, "odd", "even"), index=names, name="kind")


def test_annotated_columns_are_found_everywhere_and_nothing_of_the_run_is_changed(run: Path) -> None:
    before, results = arrays(run / keys.RESULTS), nd.open_results(run)
    labels = labels_of(results)
    said = results.annotate(labels)
    assert (said.new, said.changed, said.unlabelled, said.unknown) == (("kind",), (), 10, 0)
    for opened in (results, nd.open_results(run)):
        kept = opened.obs["kind"]
        assert kept.dtype == "category"
        assert kept.iloc[:10].isna().all()
        assert list(kept[labels.index]) == list(labels)
        assert list(opened.column("kind").dropna()) == list(kept.dropna())
        assert opened.ite("kind == 'odd'").obs["kind"].eq("odd").all()
        assert set(opened.cate("kind", min_cells=3)["population"]) == {"odd", "even"}
    after = arrays(run / keys.RESULTS)
    assert before.keys() == after.keys()
    assert nd.check(run).damage == ()


def test_relabelling_replaces_and_says_so(run: Path) -> None:
    results = nd.open_results(run)
    results.annotate(labels_of(results))
    other = pd.DataFrame({"cell_type": "all alike", "score": 1.5}, index=results.obs.index)
    said = results.annotate(other)
    assert (said.new, said.changed) == (("score",), ("cell_type",))
    assert set(results.obs["cell_type"]) == {"all alike"}
    assert {"kind", "score"} <= set(nd.open_results(run).obs.columns)
    assert results.annotate(other).new == results.annotate(other).changed == ()


def test_a_series_of_labels_names_populations_without_being_kept(run: Path) -> None:
    results = nd.open_results(run)
    labels = labels_of(results)
    table = results.cate(labels, min_cells=3)
    assert "kind" not in results.obs
    assert not list(run.glob("*.parquet.tmp"))
    results.annotate(labels)
    pd.testing.assert_frame_equal(table, results.cate("kind", min_cells=3))
    assert results.diagnostics(labels).populations["population"].nunique() == 2
    pd.testing.assert_frame_equal(table, results.cate(labels.to_frame(), min_cells=3))
    assert set(results.donor_means(labels.rename(None), min_cells=3).obs["population"]) == {"odd", "even"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        pytest.param(lambda t: t.set_axis("x" + t.index), "none of the table's", id="other_names"),
        pytest.param(lambda t: t.iloc[:0], "^the table has no rows; expected one per cell$", id="no_rows"),
        pytest.param(lambda t: pd.concat([t, t]), "twice", id="a_cell_twice"),
        pytest.param(lambda t: t.iloc[1:].rename_axis(t.index[0]), "line of column names", id="no_line_of_names"),
        pytest.param(lambda t: t["kind"].rename(None), "no name", id="series_without_a_name"),
        pytest.param(lambda t: t.rename(columns={"kind": "ndreamer_batch"}), "the run's own", id="our_column"),
        pytest.param(lambda t: t.rename(columns={"kind": "condition"}), "what was compared", id="the_condition"),
        pytest.param(lambda t: t.assign(kind=[[1]] * len(t)), "cannot be stored", id="lists"),
    ],
)
def test_labels_that_will_not_do_are_refused(run: Path, change: object, said: str) -> None:
    results = nd.open_results(run)
    with pytest.raises(QueryError, match=said):
        results.annotate(change(labels_of(results).to_frame()))
    assert not (run / f"results.{keys.ANNOTATIONS}").exists()


@pytest.mark.parametrize(("name", "found", "expected"), [("a.csv", ";", "','"), ("a.tsv", ",", r"'\\t'")])
def test_a_file_of_other_separators_is_told_which(tmp_path: Path, name: str, found: str, expected: str) -> None:
    (tmp_path / name).write_text(f"cell{found}kind\na{found}1\n")
    for columns in (None, ["kind"]):
        with pytest.raises(QueryError, match=rf"{name} has '{found}' between its columns; .* has {expected}"):
            table_of_file(tmp_path / name, columns)
    (tmp_path / "names.csv").write_text("cell\na\n")
    assert list(table_of_file(tmp_path / "names.csv").index) == ["a"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        pytest.param(lambda t: t.assign(other=1), "a DataFrame; expected", id="several_columns"),
        pytest.param(lambda t: t["kind"].to_numpy(), "a ndarray; expected", id="labels_without_names"),
    ],
)
def test_populations_that_no_cell_can_be_found_by_are_refused(run: Path, given: object, said: str) -> None:
    results = nd.open_results(run)
    with pytest.raises(QueryError, match=said):
        results.cate(given(labels_of(results).to_frame()), min_cells=3)


def test_a_column_put_into_the_copy_of_obs_is_not_lost_in_silence(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    results = nd.open_results(run)
    results.obs["kind"] = "x"
    assert "results.annotate" in caplog.text
    caplog.clear()
    own = results.obs.copy()
    own["kind"] = "x"
    assert not caplog.text
    assert type(own) is type(results.packed_obs) is type(anndata.AnnData(obs=results.obs).obs) is pd.DataFrame


def test_damaged_annotations_are_named(run: Path) -> None:
    results = nd.open_results(run)
    results.annotate(labels_of(results))
    path = run / f"results.{keys.ANNOTATIONS}"
    data = bytearray(path.read_bytes())
    data[20] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(StoreError, match=r"annotations\.parquet is damaged"):
        _ = nd.open_results(run).obs


def test_the_same_cells_with_other_columns_are_taken_over_by_run(
    cohort: Path, run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    relabelled = as_memory(cohort)
    relabelled.obs["state"] = np.where(np.arange(relabelled.n_obs) % 3, "a", "b")
    relabelled.obs["cell_type"] = relabelled.obs["cell_type"].astype(str) + " (new)"
    times = {path: path.stat().st_mtime_ns for path in (run / keys.DONE).rglob("*.json")}
    made = nd.run(relabelled, out=run, preset="small", settings=SETTINGS, **NAMES)
    assert made.annotation is not None
    assert (made.annotation.new, made.annotation.changed) == (("state",), ("cell_type",))
    assert times == {path: path.stat().st_mtime_ns for path in (run / keys.DONE).rglob("*.json")}
    assert made.results.obs["cell_type"].str.endswith(" (new)").all()
    assert nd.run(relabelled, out=run, preset="small", settings=SETTINGS, **NAMES).annotation is None
    # The unchanged column of the cohort does not undo the later annotation.
    assert nd.run(cohort, out=run, preset="small", settings=SETTINGS, **NAMES).annotation is None
    assert nd.open_results(run).obs["cell_type"].str.endswith(" (new)").all()


@pytest.mark.parametrize("suffix", ["csv", "tsv", "parquet", "h5ad"])
def test_the_command_takes_a_file(run: Path, tmp_path: Path, suffix: str, capsys: pytest.CaptureFixture) -> None:
    labels = labels_of(nd.open_results(run)).to_frame().assign(other=1)
    file = tmp_path / f"labels.{suffix}"
    if suffix == "h5ad":
        anndata.AnnData(obs=labels).write_h5ad(file)
    elif suffix == "parquet":
        labels.to_parquet(file)
    else:
        labels.to_csv(file, sep="\t" if suffix == "tsv" else ",")
    code, said, _ = spoken(["annotate", str(run), str(file), "--columns", "kind"], capsys)
    assert code == 0
    assert "kind (new); 10 cells have no row in the table" in said
    obs = nd.open_results(run).obs
    assert list(obs["kind"][labels.index]) == list(labels["kind"])
    assert "other" not in obs
    code, _, said = spoken(["annotate", str(run), str(file), "--columns", "knd"], capsys)
    assert code == 2
    assert "no column 'knd'" in said


# --- columns that another program wrote into the store -----------------------------------------------------------------


def add_column(run: Path, *, whole: bool, consolidated: bool) -> None:
    """Add a column to the stored obs with anndata: only the column, or by writing all of obs."""
    root = zarr.open_group(str(run / keys.RESULTS), mode="r+", use_consolidated=False)
    obs = anndata.io.read_elem(root["obs"])
    obs["leiden"] = pd.Categorical(np.where(np.arange(len(obs)) % 2, "0", "1"))
    if whole:
        write_into(root, "obs", obs)
    else:
        write_into(root, "obs/leiden", obs["leiden"].array)
        root["obs"].attrs["column-order"] = [*root["obs"].attrs["column-order"], "leiden"]
    if consolidated:
        zarr.consolidate_metadata(root.store)


@pytest.mark.filterwarnings("ignore::zarr.errors.ZarrUserWarning")
def test_chunks_of_nothing_but_zeros_that_another_program_left_out_are_no_damage(run: Path) -> None:
    root = zarr.open_group(str(run / keys.RESULTS), mode="r+", use_consolidated=False)
    obs = anndata.io.read_elem(root["obs"])
    obs["one"], obs["whole"] = pd.Categorical(["all"] * len(obs)), pd.array([0] * len(obs), dtype="Int64")
    write_into(root, "obs", obs)
    zarr.consolidate_metadata(root.store)
    assert not (run / keys.RESULTS / "obs/one/codes/c").exists()
    found = nd.open_results(run).packed_obs
    assert set(found["one"]) == {"all"}
    assert found["whole"].sum() == 0
    assert not found["whole"].isna().any()


@pytest.mark.filterwarnings("ignore::zarr.errors.ZarrUserWarning")
@pytest.mark.parametrize("whole", [pytest.param(False, id="a_column"), pytest.param(True, id="all_of_obs")])
@pytest.mark.parametrize("consolidated", [pytest.param(True, id="consolidated"), pytest.param(False, id="not")])
def test_a_column_that_anndata_added_is_no_damage(run: Path, whole: bool, consolidated: bool) -> None:
    before = nd.open_results(run).cate("cell_type", min_cells=3)
    add_column(run, whole=whole, consolidated=consolidated)
    assert nd.check(run).damage == ()
    results = nd.open_results(run)
    assert list(results.packed_obs["leiden"][:3]) == ["1", "0", "1"]
    pd.testing.assert_frame_equal(before, results.cate("cell_type", min_cells=3))


def test_obs_of_other_cells_is_damage(run: Path) -> None:
    root = zarr.open_group(str(run / keys.RESULTS), mode="r+", use_consolidated=False)
    obs = anndata.io.read_elem(root["obs"])
    write_into(root, "obs", obs.iloc[::-1])
    assert any("obs" in line for line in nd.check(run).damage)
