"""Lazy results equal the reader's bit by bit, and scanpy, anndata and dask can use them."""

from __future__ import annotations

import cloudpickle
import dask
import dask.array as da
import numpy as np
import pytest
import scanpy as sc

from ndreamer_dist.errors import QueryError, StoreError
from ndreamer_dist.stats.results import open_results
from tests.cohort.inputs import counts, settings_of

from .conftest import finish
from .fabricate import from_cohort

LAYERS = ("denoised", "batch_effect", "ite")


@pytest.fixture(scope="module")
def results(every_edge):
    return open_results(every_edge.run.url)


def test_every_layer_has_the_readers_bits_and_the_stores_chunks(results):
    lazy = results.lazy(effects=results.conditions[1:2])
    assert all(isinstance(lazy.layers[name], da.Array) for name in LAYERS)
    for name in LAYERS:
        whole = results.layer(name, order="packed")
        np.testing.assert_array_equal(lazy.layers[name].compute(), whole.X)
        assert list(lazy.obs_names) == list(whole.obs_names)
        stored = results.storage.node(f"layers/{name}")
        assert lazy.layers[name].chunksize[0] == 64
        assert stored is not None
    np.testing.assert_array_equal(lazy.X.compute().toarray(), results.expression(order="packed").X.toarray())
    np.testing.assert_array_equal(
        lazy.obsm["X_ndreamer_pca"].compute(), results.embedding(pca=True, order="packed").to_numpy()
    )
    condition = results.conditions[1]
    np.testing.assert_array_equal(
        lazy.layers[f"effect_{condition}"].compute(), results.effect(condition, order="packed").X
    )


def test_layers_that_are_not_stored_are_computed(results):
    bare = open_results(results.url)
    bare.__dict__["layers"] = ()
    for name in LAYERS:
        np.testing.assert_array_equal(bare.lazy().layers[name].compute(), results.layer(name, order="packed").X)


def test_cells_genes_and_order_may_be_chosen(results):
    genes = list(results.var_names[[3, 0]])
    cells = f'ndreamer_condition != "{results.control}"'
    condition = results.conditions[-1]
    lazy = results.lazy(cells, genes, order="input", counterfactuals=[condition])
    whole = results.ite(cells, genes)
    assert list(lazy.var_names) == genes
    assert list(lazy.obs_names) == list(whole.obs_names)
    np.testing.assert_array_equal(lazy.layers["ite"].compute(), whole.X)
    np.testing.assert_array_equal(
        lazy.layers[f"counterfactual_{condition}"].compute(), results.counterfactual(condition, cells, genes).X
    )
    with pytest.raises(QueryError, match="there is no condition"):
        results.lazy(effects=["nothing"])


def test_any_gene_of_the_cohort_is_there(tmp_path_factory):
    cohort = counts(200, 60)
    made = finish(from_cohort(tmp_path_factory.mktemp("cohort"), cohort, settings_of()))
    results = open_results(made.run.url)
    lazy = results.lazy(cohort=cohort)
    assert lazy.n_vars == 60
    np.testing.assert_array_equal(lazy.layers["ite"].compute(), results.layer("ite", cohort=cohort, order="packed").X)


def test_nothing_is_read_before_it_is_wanted(results, monkeypatch):
    from ndreamer_dist.results import lazy as module

    read = []
    monkeypatch.setattr(module, "read_dense", lambda storage, name, rows, columns: read.append(name))
    lazy = results.lazy()
    assert not read
    with dask.config.set(scheduler="synchronous"):
        assert lazy.layers["ite"][:3].shape == (3, lazy.n_vars)
    assert not read


def test_it_can_be_sent_to_another_process(results):
    lazy = results.lazy()
    again = cloudpickle.loads(cloudpickle.dumps(lazy.layers["denoised"]))
    np.testing.assert_array_equal(again.compute(), lazy.layers["denoised"].compute())


def test_matches_that_are_not_there_are_said_when_they_are_wanted(finished):
    results = open_results(finished.run.url)
    lazy = results.lazy(effects=[results.conditions[2]])
    with pytest.raises(StoreError, match=r"have not been searched|not in"):
        lazy.layers[f"effect_{results.conditions[2]}"].compute()


def test_scanpy_goes_on_with_it(results, tmp_path):
    lazy, whole = results.lazy(), results.layer("denoised", order="packed")
    # scanpy aggregates in memory only: one span of genes at a time, as in the store.
    genes = lazy.n_vars // 2
    for span in (slice(0, genes), slice(genes, lazy.n_vars)):
        part = lazy[:, span].to_memory()
        means = sc.get.aggregate(part, by="ndreamer_group", func="mean", layer="denoised")
        expected = whole.to_df().groupby(whole.obs["ndreamer_group"], observed=True).mean().iloc[:, span]
        np.testing.assert_allclose(means.to_df("mean"), expected.loc[means.obs_names], rtol=1e-5, atol=1e-6)
    made = results.lazy()
    made.X = made.layers["denoised"].rechunk({1: -1})  # scanpy needs all genes of a block of cells
    sc.pp.pca(made, n_comps=3, svd_solver="covariance_eigh")
    dense = whole.copy()
    sc.pp.pca(dense, n_comps=3, svd_solver="full")
    np.testing.assert_allclose(
        np.abs(np.asarray(made.obsm["X_pca"])), np.abs(dense.obsm["X_pca"]), rtol=1e-2, atol=1e-3
    )
    sums = dask.compute(lazy.layers["denoised"].sum(axis=0))[0]
    np.testing.assert_allclose(sums, whole.X.sum(axis=0), rtol=1e-4)
