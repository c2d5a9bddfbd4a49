"""Whatever a cohort is or claims to be, it is read or refused: one line, exit code 2, nothing written, no hang."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import zarr
from scipy import sparse

from ndreamer_dist.storage import hdf5
from tests.cohort.inputs import counts
from tests.fuzz.helpers import SECONDS, command, copied, files_of, planned, surveyed

pytestmark = pytest.mark.timeout(SECONDS)


def put(name: str, values: Any) -> Callable[[Any], None]:
    """Return a change that puts other values in an array's place."""

    def change(root: Any) -> None:
        attributes = dict(root[name].attrs)
        del root[name]
        if isinstance(root, h5py.Group):
            root[name] = values
            root[name].attrs.update(attributes)
        else:
            root.create_array(name, data=values)
            root[name].attrs.update(attributes)

    return change


def edit(name: str, values: Callable[[np.ndarray], np.ndarray]) -> Callable[[Any], None]:
    """Return a change of an array's values."""
    return lambda root: put(name, values(root[name][:]))(root)


def attribute(name: str, key: str, value: Any) -> Callable[[Any], None]:
    return lambda root: root[name].attrs.__setitem__(key, value)


def gone(name: str) -> Callable[[Any], None]:
    return lambda root: root.__delitem__(name)


def first(value: float) -> Callable[[np.ndarray], np.ndarray]:
    return lambda values: np.concatenate([[value], values[1:]]).astype(values.dtype)


ANYWHERE: dict[str, tuple[Callable[[Any], None], str]] = {
    "no_obs": (gone("obs"), "holds no obs"),
    "no_var": (gone("var"), "holds no var"),
    "no_data": (gone("X/data"), "X is truncated: it has no data"),
    "no_indices": (gone("X/indices"), "X is truncated: it has no indices"),
    "no_indptr": (gone("X/indptr"), "X is truncated: it has no indptr"),
    "no_condition": (gone("obs/condition"), "obs or var cannot be read"),
    "no_index": (gone("obs/_index"), "obs or var cannot be read"),
    "no_codes": (gone("obs/donor/codes"), "obs or var cannot be read"),
    "codes_beyond_the_categories": (edit("obs/donor/codes", lambda v: v + 100), "obs or var cannot be read"),
    "short_column": (edit("obs/age", lambda v: v[:-5]), "obs or var cannot be read"),
    "encoding_unknown": (attribute("X", "encoding-type", "bsr_matrix"), "expected csr_matrix, csc_matrix or array"),
    "encoding_of_obs_unknown": (attribute("obs", "encoding-type", "spreadsheet"), "obs or var cannot be read"),
    "obs_is_a_dict": (attribute("obs", "encoding-type", "dict"), "obs or var cannot be read"),
    "shape_of_one_number": (attribute("X", "shape", [120]), "cannot be read"),
    "shape_of_words": (attribute("X", "shape", "wide"), "cannot be read"),
    "shape_negative": (attribute("X", "shape", [-1, 30]), "indptr does not fit"),
    "shape_huge": (attribute("X", "shape", [2**61, 30]), "indptr does not fit"),
    "shape_wider_than_var": (attribute("X", "shape", [120, 31]), "obs and var have 120 and 30 rows"),
    "indptr_decreases": (edit("X/indptr", lambda v: np.concatenate([v[:1], v[:0:-1]])), "indptr does not fit"),
    "indptr_unsigned_decreases": (
        edit("X/indptr", lambda v: np.concatenate([v[:9], [v[20]], v[10:]]).astype(np.uint64)), "indptr does not fit",
    ),
    "indptr_too_long": (edit("X/indptr", lambda v: np.append(v, v[-1])), "indptr does not fit"),
    "indptr_of_fractions": (edit("X/indptr", lambda v: v.astype(float)), "indptr does not fit"),
    "indptr_flat": (edit("X/indptr", lambda v: v[:, None]), "indptr does not fit"),
    "more_values_than_genes": (edit("X/indptr", lambda v: np.where(v < v[-1], 0, v)), "indptr does not fit"),
    "indices_beyond_the_genes": (edit("X/indices", first(30)), None),
    "indices_negative": (edit("X/indices", first(-1)), None),
    "indices_of_fractions": (edit("X/indices", lambda v: v + 0.5), "indptr does not fit"),
    "indices_short": (edit("X/indices", lambda v: v[:-3]), "indptr does not fit"),
    "data_complex": (edit("X/data", lambda v: v + 1j), "X holds complex"),
    "data_bool": (edit("X/data", lambda v: v > 0), "X holds bool values"),
    "data_two_dimensional": (edit("X/data", lambda v: v[:, None]), "indptr does not fit"),
    "dense_of_one_dimension": (put("X", np.ones(120, np.float32)), "obs and var have 120 and 30 rows"),
    "dense_of_three": (put("X", np.ones((120, 30, 2), np.float32)), "obs and var have 120 and 30 rows"),
    "dense_complex": (put("X", np.ones((120, 30), np.complex64)), "X holds complex64 values"),
    "dense_transposed": (put("X", np.ones((30, 120), np.float32)), "obs and var have 120 and 30 rows"),
}  # fmt: skip
IN_HDF5: dict[str, tuple[Callable[[Any], None], str]] = {
    "data_of_words": (put("X/data", ["a", "b"]), "X holds object values"),
    "dense_of_words": (put("X", np.full((120, 30), b"x")), "values; expected counts"),
    "dense_of_records": (put("X", np.zeros((120, 30), [("a", "f4")])), "values; expected counts"),
    "obs_is_an_array": (put("obs", np.ones(120)), "obs or var cannot be read"),
    "data_is_a_group": (lambda root: (root.__delitem__("X/data"), root.create_group("X/data")), "cannot be read"),
    "x_is_a_dangling_link": (lambda root: (root.__delitem__("X"), root.__setitem__("X", h5py.SoftLink("/no"))), "cannot be read"),
    "x_is_itself": (lambda root: (root.__delitem__("X"), root.__setitem__("X", h5py.SoftLink("/X"))), "cannot be read"),
    "an_index_that_claims_to_be_huge": (
        lambda root: (root.__delitem__("X/indptr"), root.create_dataset("X/indptr", (2**45,), "i8", chunks=(64,))),
        "indptr does not fit",
    ),
}  # fmt: skip


def refusal_of(path: Path, tmp_path: Path, message: str | None) -> None:
    """Check that a damaged store is refused when it is planned or, where only the values tell, when it is read."""
    before = files_of(tmp_path)
    first_said = planned(path)
    if message is not None:
        assert message in first_said.refusal
        assert files_of(tmp_path) == before
    assert "damaged" in (line := surveyed(path, tmp_path / "run").refusal) or message is not None, line
    assert not list((tmp_path / "run").rglob("done/*/*.json"))


@pytest.mark.parametrize("kind", ["h5ad", "zarr", "zarr2"])
@pytest.mark.parametrize("case", ANYWHERE)
def test_a_store_that_does_not_fit_together_is_refused(case: str, kind: str, tmp_path: Path) -> None:
    change, message = ANYWHERE[case]
    path = copied(kind, tmp_path)
    if kind == "h5ad":
        with h5py.File(path, "r+") as root:
            change(root)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            change(zarr.open_group(path, mode="r+", use_consolidated=False))
            zarr.consolidate_metadata(path)
    refusal_of(path, tmp_path, message)


@pytest.mark.parametrize("case", IN_HDF5)
def test_an_hdf5_file_that_does_not_fit_together_is_refused(case: str, tmp_path: Path) -> None:
    change, message = IN_HDF5[case]
    path = copied("h5ad", tmp_path)
    with h5py.File(path, "r+") as root:
        change(root)
    refusal_of(path, tmp_path, message)


@pytest.mark.parametrize("part", ["X/data", "X/indices"])
@pytest.mark.parametrize("kind", ["zarr", "zarr2"])
def test_a_lost_chunk_is_no_zero(kind: str, part: str, tmp_path: Path) -> None:
    path = copied(kind, tmp_path)
    chunks = [p for p in (path / part).rglob("*") if p.is_file() and p.name not in ("zarr.json", ".zarray", ".zattrs")]
    chunks[0].unlink()
    assert f"1 of {len(chunks)} chunks of {part} are missing" in planned(path).refusal


SURROGATES = pytest.mark.skipif(
    pd.Index(["x"]).dtype != object, reason="this pandas holds text as Unicode, which a surrogate is not"
)


@pytest.mark.parametrize(
    "column",
    [
        "..",
        ".",
        "",
        "a/b",
        "../../escaped",
        "a\\..\\b",
        "a\nb",
        "a\0b",
        "x" * 10_000,
        "zarr.json",
        "\x1b[2J",
        pytest.param("\ud800", marks=SURROGATES),
    ],
    ids=ascii,
)
def test_a_column_whose_name_could_leave_its_folder_is_refused(column: str, tmp_path: Path) -> None:
    adata = counts(120, 30)
    adata.obs[column] = 1
    line = surveyed(adata, tmp_path / "run").refusal
    assert "cannot be stored" in line
    assert not list(tmp_path.iterdir())


NAMES_OF_ALL_KINDS = (
    "a/b", "..", "../../etc/passwd", "Größe µ 细胞 🧬", "x" * 10_000, "two\nlines", "nul\0nul", "-rf", "--out", "|", "+", "\\",
    "a|b+c\\d", " ", "", "%s {0} $HOME", "\x1b]0;title\x07", "<script>alert(1)</script>", "NaN", "None", "true", "\u202eabc",
)  # fmt: skip


@pytest.mark.parametrize("role", ["control", "condition", "donor"])
@pytest.mark.parametrize("name", NAMES_OF_ALL_KINDS, ids=lambda name: ascii(name)[:24])
def test_names_of_all_kinds_are_planned_and_shown_on_one_line(name: str, role: str) -> None:
    adata = counts(120, 30)
    old = {"control": "ctrl", "condition": "stim", "donor": "D0"}[role]
    column = "donor" if role == "donor" else "condition"
    adata.obs[column] = pd.Categorical([name if value == old else value for value in adata.obs[column].astype(str)])
    told = surveyed_plan(adata, control=name if role == "control" else "ctrl")
    assert all(line.isprintable() for line in told.splitlines())
    assert len(told.splitlines()) < 30


def surveyed_plan(adata: ad.AnnData, control: str) -> str:
    import ndreamer_dist as nd
    from tests.fuzz.helpers import SURVEY

    return str(
        nd.plan(
            adata, condition_key="condition", control=control, batch_key="donor", preset="small", settings=SURVEY
        )
    )  # fmt: skip


def test_a_hostile_name_that_is_asked_for_is_quoted_short() -> None:
    from tests.fuzz.helpers import stored

    for control in ("x" * 10_000, "\x1b[2J", "a\nb", "\ud800"):
        line = planned(stored("h5ad"), names=["--condition-key", "condition", "--control", control]).refusal
        assert "no cell has the control" in line
        assert len(line) < 400
    assert "no column of obs" in planned(stored("h5ad"), names=["--condition-key", "../..", "--control", "x"]).refusal


@pytest.mark.parametrize(
    ("obs", "message"),
    [
        pytest.param({"condition": [["a"], ["b"]] * 60}, "holds lists", id="lists"),
        pytest.param({"condition": [np.arange(2)] * 120}, "holds lists", id="arrays"),
        pytest.param({"condition": ["ctrl", "\ud800"] * 60}, "not Unicode text", id="surrogates", marks=SURROGATES),
        pytest.param({"condition": [f"c{i}" for i in range(119)] + ["ctrl"]}, "would vanish", id="all_different"),
        pytest.param({"condition": [None] * 120}, "120 missing values", id="nothing"),
        pytest.param({"condition": [np.nan, 1.0] * 60}, "60 missing values", id="nan"),
        pytest.param({"condition": pd.Categorical(["ctrl"] * 120, ["ctrl", "stim"])}, "one condition", id="unused"),
    ],
)
def test_a_column_of_no_names_is_refused(obs: dict, message: str, tmp_path: Path) -> None:
    adata = counts(120, 30)
    for name, values in obs.items():
        adata.obs[name] = pd.Series(values, index=adata.obs_names) if isinstance(values, list) else values
    assert message in surveyed(adata, tmp_path / "run").refusal
    assert not list(tmp_path.iterdir())


def test_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    adata = counts(120, 30)
    adata.obs = pd.concat([adata.obs, adata.obs[["condition"]]], axis=1)
    assert "more than one column 'condition'" in surveyed(adata, tmp_path / "run").refusal


def test_a_condition_per_cell_is_refused_at_once(tmp_path: Path) -> None:
    cells = 60_000
    names = [f"condition of cell {i}" for i in range(cells)]
    obs = pd.DataFrame({"condition": names, "donor": np.arange(cells)}, index=np.arange(cells).astype(str))
    adata = ad.AnnData(sparse.random(cells, 4, 0.5, "csr", np.float32, 0), obs=obs)
    line = surveyed(adata, tmp_path / "run").refusal
    assert "no cell has the control 'ctrl'" in line
    adata.obs.loc["0", "condition"] = "ctrl"
    assert "the control 'ctrl' would vanish" in surveyed(adata, tmp_path / "run").refusal


def test_a_batch_per_cell_is_refused_at_once(tmp_path: Path) -> None:
    import ndreamer_dist as nd
    from tests.fuzz.helpers import said

    cells = 20_000
    obs = pd.DataFrame({"condition": ["ctrl", "stim"] * (cells // 2), "donor": np.arange(cells)})
    obs.index = obs.index.astype(str)
    adata = ad.AnnData(sparse.random(cells, 4, 0.5, "csr", np.float32, 0), obs=obs)
    names = {"condition_key": "condition", "control": "ctrl", "batch_key": "donor"}
    told = said(lambda: nd.plan(adata, **names, settings={"cohort.small_groups": "keep"}))
    assert "20000 groups" in told.refusal


@pytest.mark.parametrize(
    "values",
    [
        pytest.param(lambda x: x.astype(np.complex64), id="complex"),
        pytest.param(lambda x: x > 0, id="bool"),
        pytest.param(lambda x: x.toarray().astype(str), id="text"),
        pytest.param(lambda x: x.toarray().astype(object), id="object"),
    ],
)
def test_values_of_another_type_are_refused(values: Any, tmp_path: Path) -> None:
    adata = counts(120, 30)
    adata.X = values(adata.X)
    assert "values; expected counts" in surveyed(adata, tmp_path / "run").refusal
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.h5ad")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "empty.h5ad").touch()
    (tmp_path / "folder.h5ad").mkdir()
    (tmp_path / "array.zarr").mkdir()
    (tmp_path / "array.zarr/zarr.json").write_text(json.dumps({"zarr_format": 3, "node_type": "array", "shape": [1]}))
    (tmp_path / "deep.zarr").mkdir()
    (tmp_path / "deep.zarr/zarr.json").write_text("[" * 100_000)
    for name in ("fifo.h5ad", "loop", "empty.h5ad", "folder.h5ad", "array.zarr", "deep.zarr", "none.h5ad", "x" * 5000):
        assert planned(tmp_path / name).refusal
    assert planned("/dev/zero").refusal
    assert planned("/dev/null").refusal


@pytest.fixture
def no_clouds(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if no package of a cloud were installed."""
    for package in ("gcsfs", "adlfs"):
        monkeypatch.setitem(sys.modules, package, None)
    for protocol in ("gs", "az"):
        monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, protocol, raising=False)


@pytest.mark.usefixtures("no_clouds")
@pytest.mark.parametrize(
    ("address", "message"),
    [
        pytest.param("foo://bucket/cohort.h5ad", "s3://, gs://, az:// or https://", id="unknown_protocol"),
        pytest.param("gs://bucket/cohort.h5ad", "pip install 'ndreamer-dist[gs]'", id="gs_without_its_package"),
        pytest.param("az://container/cohort.h5ad", "pip install 'ndreamer-dist[az]'", id="az_without_its_package"),
        pytest.param("https://me:secret@127.0.0.1/cohort.h5ad", "holds a password", id="password"),
        pytest.param("http://127.0.0.1:9/cohort.h5ad", "127.0.0.1:9", id="nobody_there"),
        pytest.param("a\nb.h5ad", "holds control characters", id="newline"),
        pytest.param("a\0b.h5ad", "holds control characters", id="nul"),
    ],
)
def test_an_address_that_will_not_do_is_refused(address: str, message: str) -> None:
    line = planned(address).refusal
    assert message in line
    assert "secret" not in line


@pytest.mark.usefixtures("no_clouds")
@pytest.mark.parametrize(
    ("out", "message"),
    [
        pytest.param("https://127.0.0.1/run", "can only be read", id="https"),
        pytest.param("{file}", "is a file and no folder", id="a_file"),
        pytest.param("{file}/run", "is a file and no folder", id="below_a_file"),
        pytest.param("{tmp}/" + "x" * 300, "File name too long", id="long"),
        pytest.param("{tmp}/a\0b", "holds control characters", id="nul"),
        pytest.param("gs://bucket/run", "ndreamer-dist[gs]", id="gs_without_its_package"),
    ],
)
def test_a_run_directory_that_cannot_be_is_refused(out: str, message: str, tmp_path: Path) -> None:
    from tests.fuzz.helpers import NAMES, SMALL, stored

    (tmp_path / "file").touch()
    out = out.format(file=tmp_path / "file", tmp=tmp_path)
    words = ["run", str(stored("h5ad")), "--out", out, "--preset", "small", *NAMES, *SMALL]
    assert message in command(words).refusal
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def break_heap(path: Path) -> None:
    """Damage the place where HDF5 keeps texts: it goes from one to the next by their sizes."""
    data = bytearray(path.read_bytes())
    heap = data.index(b"GCOL") + 16
    data[heap : heap + 2], data[heap + 8 : heap + 16] = bytes(2), bytes(8)
    path.write_bytes(data)


def test_an_h5ad_that_hdf5_would_read_for_ever_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = copied("h5ad", tmp_path)
    break_heap(path)
    monkeypatch.setattr(hdf5, "HDF5_SECONDS", 3.0)
    assert planned(path).refusal.endswith("it is damaged (after 3 s HDF5 still reads its attributes)")


def test_an_h5ad_that_hdf5_crashes_on_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = copied("h5ad", tmp_path)
    break_heap(path)
    monkeypatch.setattr(hdf5, "WALK", "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)")
    assert planned(path).refusal.endswith("it is damaged (HDF5 crashes when it reads its attributes)")


def test_a_sound_h5ad_is_read_by_this_process_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hdf5, "WALK", "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)")
    assert planned(copied("h5ad", tmp_path)).code == 0
