"""Queries by name return the values of the full arrays, and read only the chunks that they need."""

import functools
import http.server
import threading

import anndata
import numpy as np
import pandas as pd
import pytest

from ndreamer_dist import keys
from ndreamer_dist.errors import QueryError, StoreError
from ndreamer_dist.stats.results import open_results
from ndreamer_dist.storage import shards


@pytest.fixture(scope="module")
def results(finished):
    return open_results(finished.run.url)


@pytest.fixture(scope="module")
def whole(finished):
    """The whole store in input order, read with anndata."""
    stored = anndata.read_zarr(f"{finished.run.url}/{keys.RESULTS}")
    with anndata.settings.override(remove_unused_categories=False):
        return stored[np.argsort(stored.obs[keys.OBS_INPUT_ROW])].copy()


def test_names_are_the_cohort_s(results, whole, finished):
    pd.testing.assert_frame_equal(results.obs, whole.obs)
    kept = np.sort(finished.packed.input_row)
    assert list(results.obs.index) == list(finished.source.cell_names[kept])
    assert list(results.var_names) == list(finished.packed.genes)
    assert results.conditions == ("ctrl", "stim", "sick")
    assert results.control == "ctrl"
    assert results.layers == ("denoised", "batch_effect", "ite")
    assert results.design == finished.design


def test_a_column_is_that_of_obs_and_the_others_are_not_read(finished):
    results = open_results(finished.run.url)
    for name in results.obs.columns:
        alone = open_results(finished.run.url)
        found = alone.column(name)
        assert "_cells" not in vars(alone)
        expected = results.obs.set_index(keys.OBS_INPUT_ROW, drop=False)[name].rename_axis(None)
        pd.testing.assert_series_equal(found, expected)
    with pytest.raises(QueryError, match=r"obs has no column 'agee'; .*Did you mean 'age'"):
        results.column("agee")


@pytest.mark.parametrize("name", ["denoised", "batch_effect"])
@pytest.mark.parametrize("order", ["input", "packed"])
def test_a_layer_is_the_stored_one(results, whole, name, order):
    part = getattr(results, name)(order=order)
    places = np.arange(len(whole)) if order == "input" else packed_order(results)
    np.testing.assert_array_equal(part.X, whole.layers[name][places])
    assert part.X.dtype == np.float32
    pd.testing.assert_frame_equal(part.obs, whole.obs.iloc[places])
    pd.testing.assert_frame_equal(part.var, whole.var)


def packed_order(results):
    """Return the positions in input order of the cells in packed order."""
    stored = anndata.read_zarr(results.url)
    return np.argsort(np.argsort(stored.obs[keys.OBS_INPUT_ROW]))


@pytest.mark.parametrize(
    ("query", "select"),
    [
        ('kind == "B cell"', lambda obs: obs["kind"] == "B cell"),
        ('kind in ["NK", "T cell"] and score > 0', lambda obs: obs["kind"].isin(["NK", "T cell"]) & (obs["score"] > 0)),
        ('missing == "word"', lambda obs: (obs["missing"] == "word").fillna(False).to_numpy(bool)),
        ("perhaps", lambda obs: obs["perhaps"].fillna(False).to_numpy(bool)),
        ('ndreamer_group == "a|stim"', lambda obs: obs["ndreamer_group"] == "a|stim"),
    ],
)
def test_cells_are_queried_on_obs_and_genes_are_named(results, whole, query, select):
    mask = np.asarray(select(whole.obs))
    genes = [whole.var_names[place] for place in (36, 0, 33, 5)]
    part = results.ite(cells=query, genes=genes, drop_undefined=False)
    np.testing.assert_array_equal(part.X, whole[mask, genes].layers["ite"])
    treated = results.ite(cells=query, genes=genes)
    np.testing.assert_array_equal(treated.X, part[part.obs["ndreamer_condition"] != "ctrl"].X)
    assert not np.isnan(treated.X).any()
    np.testing.assert_array_equal(results.ite(cells=mask, genes=genes).X, treated.X)
    np.testing.assert_array_equal(
        results.expression(cells=query, genes=genes).X.toarray(), whole[mask, genes].X.toarray()
    )


def test_a_mask_that_names_cells_is_aligned_with_obs(results):
    expected = results.denoised(cells='kind == "B cell"')
    for mask in (results.packed_obs["kind"] == "B cell", (results.obs["kind"] == "B cell").astype("boolean")):
        np.testing.assert_array_equal(results.denoised(cells=mask).X, expected.X)
    unnamed = pd.Series((results.obs["kind"] == "B cell").to_numpy())
    np.testing.assert_array_equal(results.denoised(cells=unnamed).X, expected.X)
    gaps = results.obs["perhaps"]
    assert gaps.isna().any()
    np.testing.assert_array_equal(results.denoised(cells=gaps).X, results.denoised(cells="perhaps").X)


def test_listed_cells_come_in_their_order(results, whole):
    names = list(whole.obs_names[[200, 3, 77]])
    part = results.denoised(cells=names, genes=["G10", "G2"] if "G10" in whole.var_names else None)
    assert list(part.obs_names) == names
    np.testing.assert_array_equal(part.X, whole[names, list(part.var_names)].layers["denoised"])
    np.testing.assert_array_equal(results.expression(cells=names).X.toarray(), whole[names].X.toarray())
    np.testing.assert_array_equal(results.embedding(cells=names), whole[names].obsm["X_ndreamer"])
    np.testing.assert_array_equal(results.embedding(pca=True), whole.obsm["X_ndreamer_pca"])
    assert list(results.embedding(cells=names).index) == names


def test_small_reads_change_nothing(results, whole, monkeypatch):
    monkeypatch.setattr(shards, "DECODED_BYTES", 1)
    monkeypatch.setattr(shards, "GAP_BYTES", -1)
    np.testing.assert_array_equal(results.denoised().X, whole.layers["denoised"])
    np.testing.assert_array_equal(results.expression().X.toarray(), whole.X.toarray())


def test_only_the_chunks_that_hold_the_answer_are_read(copied):
    folder = copied.folder / keys.RESULTS / "layers" / "ite" / "c"
    results = open_results(copied.folder)
    stim = copied.design.groups[4]  # the last packed rows, all in block 3
    assert stim.start // 64 == 3
    for block in ("0", "1", "2"):
        (folder / block / "0").unlink()
    assert results.ite(cells='ndreamer_group == "b\\\\+c|sick"').shape == (33, 37)
    with pytest.raises(StoreError, match="missing"):
        results.ite(cells='ndreamer_group == "a|stim"')


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"cells": 'kin == "B"'}, "cannot be read .*'kind'"),
        ({"cells": "kind =="}, "cannot be read"),
        ({"cells": "score"}, "is not true or false"),
        ({"cells": 'kind == "Q"'}, "no cell is selected by"),
        ({"cells": 'kind == "T cell" and kind == "B cel"'}, "Column 'kind' has no 'B cel'. Did you mean 'B cell'"),
        ({"cells": []}, "no cell is selected"),
        ({"cells": ["cell-1x"]}, "there is no cell 'cell-1x'.*Did you mean"),
        ({"cells": [True, False]}, r"needs shape \(244,\)"),
        ({"cells": 'condition == "ctrl"'}, "have no treatment effect"),
        ({"genes": ["G999"]}, "there is no gene 'G999' among the 37.*Did you mean.*modelled"),
        ({"genes": []}, "no gene"),
        ({"order": "sorted"}, "order is"),
    ],
)
def test_a_question_without_an_answer_says_why(results, wanted, message):
    with pytest.raises(QueryError, match=message):
        results.ite(**wanted)


def test_an_unknown_layer_is_refused(results):
    with pytest.raises(QueryError, match=r"no layer 'itee'.*Did you mean 'ite'"):
        results.layer("itee")


def test_a_folder_without_results_says_so(tmp_path):
    with pytest.raises(StoreError, match="holds no results"):
        open_results(tmp_path)
    (tmp_path / keys.RUN_JSON).write_text("{}")
    with pytest.raises(StoreError, match="has not finished"):
        open_results(tmp_path)


def test_a_query_changes_nothing_that_is_returned_later(results):
    before = results.obs
    results.obs["kind"] = "changed"
    part = results.denoised(genes=[results.var_names[0]])
    part.obs["kind"] = "changed"
    part.X[:] = 0
    pd.testing.assert_frame_equal(results.obs, before)


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


def test_results_are_read_over_http(finished, results):
    handler = functools.partial(Quiet, directory=finished.run.url)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            for address in ("", "/results.zarr"):
                remote = open_results(f"http://127.0.0.1:{server.server_port}{address}")
                part = remote.ite(cells='kind == "NK"', genes=list(results.var_names[:3]))
                np.testing.assert_array_equal(part.X, results.ite('kind == "NK"', list(results.var_names[:3])).X)
                np.testing.assert_array_equal(remote.expression().X.toarray(), results.expression().X.toarray())
        finally:
            server.shutdown()
            thread.join()
