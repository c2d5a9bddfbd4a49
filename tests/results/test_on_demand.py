"""Computed effects equal stored ones bit by bit, agree with brute force, and cover any gene of the cohort."""

import json
import shutil

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from ndreamer_dist import keys
from ndreamer_dist.compute.executor import SerialRuntime
from ndreamer_dist.effects import tables
from ndreamer_dist.errors import CohortError, QueryError, StoreError
from ndreamer_dist.matching.stage import add_edges
from ndreamer_dist.results import cohort as given
from ndreamer_dist.results import on_demand
from ndreamer_dist.results.export import save
from ndreamer_dist.stats.results import open_results
from tests.cohort.inputs import counts, settings_of

from .brute_force import matched_rows, weighed
from .conftest import SIZES, finish
from .fabricate import fabricate, from_cohort

LAYERS = ("denoised", "batch_effect", "ite")


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """The finished run without stored layers, and with expression in small chunks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "CHUNK_ENTRIES", 50)
        patch.setattr(tables, "SHARD_ENTRIES", 500)
        return finish(fabricate(tmp_path_factory.mktemp("bare"), SIZES, overrides={"effects.store": "none"}))


def as_if_not_stored(folder):
    """Open results so that all layers are computed."""
    results = open_results(folder)
    results.__dict__["layers"] = ()
    return results


def by_hand(stored):
    """Return the expected expression F of every cell under every condition, computed from the store by brute force."""
    told = stored.uns["ndreamer"]
    match, names = json.loads(told["settings"])["match"], [str(name) for name in told["groups"]]
    group = np.asarray(stored.obs["ndreamer_group"].astype(str))
    condition = dict(zip(group, stored.obs["ndreamer_condition"].astype(str), strict=True))
    points, x = np.asarray(stored.obsm["X_ndreamer_pca"]), stored.X.toarray().astype(np.float64)
    averages = {}
    for wanted in told["conditions"]:
        targets = [name for name in names if condition[name] == wanted]
        total = np.zeros_like(x)
        for target in targets:
            there = np.flatnonzero(group == target)
            total[there] += x[there]
            for query in {*names} - {target}:
                cells = np.flatnonzero(group == query)
                sought = (match["neighbours"], None, match["hubs"])
                rows, distances = matched_rows(points[cells], points[there], *sought)
                total[cells] += weighed(np.where(rows < 0, -1, there[rows]), distances, match["bandwidth"], x)
        averages[str(wanted)] = total / len(targets)
    return averages


# --- the layers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_that_is_not_stored_is_computed_with_the_same_bits(bare, finished, name):
    computed, stored = open_results(bare.run.url), open_results(finished.run.url)
    assert computed.layers == ()
    assert stored.layers == LAYERS
    listed = list(stored.obs.query("condition != 'ctrl'").index[[70, 3, 41]])
    for cells, genes in ((None, None), ('kind == "NK"', list(stored.var_names[[33, 2]])), (listed, None)):
        one, other = getattr(computed, name)(cells, genes), getattr(stored, name)(cells, genes)
        np.testing.assert_array_equal(one.X, other.X)
        assert one.X.dtype == np.float32
        pd.testing.assert_frame_equal(one.obs, other.obs)
        pd.testing.assert_frame_equal(one.var, other.var)
    both = [getattr(results, name)(order="packed").X for results in (computed, stored)]
    np.testing.assert_array_equal(*both)


@pytest.mark.parametrize("name", LAYERS)
def test_through_any_matches_the_bits_are_the_stored_ones(every_edge, name):
    results = open_results(every_edge.run.url)
    stored = results.layer(name).X
    np.testing.assert_array_equal(as_if_not_stored(every_edge.run.url).layer(name).X, stored)


def test_parts_of_cells_and_spans_of_genes_change_no_bit(every_edge, monkeypatch):
    results = as_if_not_stored(every_edge.run.url)
    whole = {name: results.layer(name).X for name in LAYERS}
    monkeypatch.setattr(on_demand, "HELD_VALUES", 5000)
    monkeypatch.setattr(on_demand, "BATCH_ENTRIES", 300)
    for name, values in whole.items():
        np.testing.assert_array_equal(results.layer(name).X, values)
    monkeypatch.setattr(on_demand, "PART_ENTRIES", 100 * 5 * every_edge.settings.match.neighbours)
    np.testing.assert_array_equal(results.layer("ite").X, whole["ite"])
    monkeypatch.setattr(on_demand, "SUM_VALUES", 37 * 90)
    np.testing.assert_array_equal(results.layer("batch_effect").X, whole["batch_effect"])


def test_one_gene_of_all_cells_holds_a_bounded_number_of_stored_values(every_edge, monkeypatch):
    results, held, read = open_results(every_edge.run.url), [], on_demand.read_sparse
    gene = every_edge.packed.genes[3]

    def watched(*arguments):
        rows = read(*arguments)
        held.append(rows.nnz)
        return rows

    monkeypatch.setattr(on_demand, "read_sparse", watched)
    monkeypatch.setattr(on_demand, "BATCH_ENTRIES", 300)
    one = results.expression(genes=[gene]).X
    assert sum(held) == results.expression().X.nnz
    assert max(held) <= 300 + every_edge.packed.n_genes
    np.testing.assert_array_equal(one.toarray()[:, 0], results.expression().to_df()[gene])


def test_what_is_held_at_a_time_is_bounded(every_edge, monkeypatch):
    results, held, summed = as_if_not_stored(every_edge.run.url), [], []
    whole = on_demand.average_through

    def watched(averages, blocks, genes):
        held.append(sum(block.nnz for _, block in blocks))
        summed.append(len(averages[0].groups) * genes)
        return whole(averages, blocks, genes)

    monkeypatch.setattr(on_demand, "average_through", watched)
    monkeypatch.setattr(on_demand, "HELD_VALUES", 3000)
    monkeypatch.setattr(on_demand, "SUM_VALUES", 4000)
    results.denoised()
    assert max(held) <= 3000
    assert max(summed) <= 4000
    assert len(held) >= 244 * 37 / 4000


def test_only_the_chunks_of_counterparts_are_read(bare):
    results = open_results(bare.run.url)
    cells = list(results.obs.query("condition == 'stim'").index)
    results.ite(cells)
    every = results.last_read
    results.ite(cells[:1])
    assert 0 < results.last_read.chunks < every.chunks / 4
    assert results.last_read.bytes < every.bytes / 4


def test_an_unknown_layer_or_condition_is_refused(finished):
    results = open_results(finished.run.url)
    with pytest.raises(QueryError, match=r"no layer 'itee'.*Did you mean 'ite'"):
        results.layer("itee")
    with pytest.raises(QueryError, match=r"no condition 'stm'.*Did you mean 'stim'"):
        results.effect("stm")
    with pytest.raises(QueryError, match="no condition 'none'"):
        results.effect("stim", baseline="none")


# --- any condition ---------------------------------------------------------------------------------------------------


def test_effects_of_every_condition_on_every_cell_follow_the_method(every_edge):
    results = open_results(every_edge.run.url)
    stored = anndata.read_zarr(results.url)
    averages = by_hand(stored)
    assert set(averages) == {"ctrl", "stim", "sick"}
    for condition, expected in averages.items():
        found = results.counterfactual(condition, order="packed")
        np.testing.assert_allclose(found.X, expected, atol=1e-5)
        assert list(found.obs_names) == list(stored.obs_names)
        for baseline in averages:
            effect = results.effect(condition, order="packed", baseline=baseline)
            np.testing.assert_allclose(effect.X, expected - averages[baseline], atol=1e-5)
    control = results.effect("stim", cells='condition == "ctrl"')
    assert np.isfinite(control.X).all()
    assert np.abs(control.X).max() > 0.1


def test_on_its_own_cells_an_effect_is_the_ite_and_a_counterfactual_the_denoised(every_edge):
    results = open_results(every_edge.run.url)
    settings = every_edge.settings
    for condition in ("stim", "sick"):
        cells = f"condition == {condition!r}"
        np.testing.assert_array_equal(results.effect(condition, cells).X, results.ite(cells).X)
        if settings.match.neighbours == settings.denoise.neighbours:
            np.testing.assert_array_equal(results.counterfactual(condition, cells).X, results.denoised(cells).X)


def test_edges_that_were_not_searched_are_asked_for_by_their_command(copied):
    results = open_results(copied.folder)
    np.testing.assert_array_equal(results.effect("stim", 'condition == "stim"').X, results.ite('condition == "stim"').X)
    command = f"ndreamer-dist match {copied.folder} --edges 'stim'"
    with pytest.raises(
        StoreError, match=rf"'a\|ctrl' in group 'a\|stim' have not been searched; `{command}` adds them"
    ):
        results.effect("stim", 'condition == "ctrl"')
    runtime = SerialRuntime(copied.settings.run)
    add_edges(copied.run, copied.settings, copied.design, runtime, "key of match", "stim")
    added = open_results(copied.folder)
    expected = by_hand(anndata.read_zarr(added.url))
    np.testing.assert_allclose(added.effect("stim", order="packed").X, expected["stim"] - expected["ctrl"], atol=1e-5)
    with pytest.raises(StoreError, match="--edges 'sick'"):
        added.effect("sick")


def test_results_apart_from_their_run_search_the_matches_they_lack(every_edge, tmp_path):
    alone = tmp_path / "alone.zarr"
    shutil.copytree(f"{every_edge.run.url}/{keys.RESULTS}", alone)
    whole, results = open_results(every_edge.run.url), open_results(alone)
    np.testing.assert_array_equal(results.effect("sick").X, whole.effect("sick").X)
    np.testing.assert_array_equal(results.ite().X, whole.ite().X)


def test_matches_of_another_run_are_refused(copied, tmp_path):
    other = finish(fabricate(tmp_path / "other", SIZES, seed=1, overrides={"match.edges": "all"}))
    shutil.rmtree(copied.folder / keys.MATCHES)
    shutil.copytree(f"{other.run.url}/{keys.MATCHES}", copied.folder / keys.MATCHES)
    with pytest.raises(StoreError, match="does not belong to"):
        open_results(copied.folder).effect("stim", 'condition == "ctrl"')


# --- any gene --------------------------------------------------------------------------------------------------------


def cohort_of():
    """Return counts of more genes than are modelled; one cell is empty and gets dropped."""
    adata = counts(400, 90, conditions=("stim", "ctrl", "sick"))
    x = adata.X.toarray()
    x[7] = 0
    adata.X = sparse.csr_matrix(x)
    return adata


@pytest.fixture(scope="module")
def from_counts(tmp_path_factory):
    """A run on counts with a gene filter, and its cohort."""
    adata = cohort_of()
    settings = settings_of(hvg__num_hvg=20, cohort__min_cells=150, match__edges="all")
    made = finish(from_cohort(tmp_path_factory.mktemp("from_counts"), adata, settings))
    made.adata = adata
    return made


def written(adata, folder, how):
    """Return the cohort in one of the forms that users may pass."""
    if how == "memory":
        return adata
    made = adata.copy()
    path = folder / ("cohort.zarr" if how == "zarr" else "cohort.h5ad")
    save(made, path)
    return path


def normalised_by_hand(made):
    """Return all genes of the kept cells in packed order, normalised by the genes that passed the filter, float32."""
    adata, table = made.adata.copy(), pd.read_parquet(f"{made.run.url}/{keys.GENES_TABLE}")
    left = (table["cells"] >= made.settings.cohort.min_cells).to_numpy()
    assert 20 < left.sum() < 90
    totals = np.asarray(adata.X[:, left].sum(axis=1), dtype=np.float64).ravel()
    factors = totals.astype(np.float32) / np.float32(1e4)
    factors[factors == 0] = 1
    scaled = made.adata.X[made.packed.input_row].toarray() / factors[made.packed.input_row][:, None]
    return np.log1p(scaled)


@pytest.mark.parametrize("how", ["memory", "h5ad", "zarr"])
def test_any_gene_of_the_cohort_has_effects(from_counts, tmp_path, how, monkeypatch):
    monkeypatch.setattr(given, "READ_ROWS_AT_ONCE", 37)
    cohort = written(from_counts.adata, tmp_path, how)
    results = open_results(from_counts.run.url)
    genes = list(from_counts.adata.var_names)
    modelled = list(results.var_names)
    assert len(modelled) == 20
    x = results.expression(order="packed", cohort=cohort)
    assert list(x.var_names) == genes
    np.testing.assert_array_equal(x.X.toarray(), normalised_by_hand(from_counts))
    for name in LAYERS:
        every = results.layer(name, cohort=cohort)
        np.testing.assert_array_equal(every[:, modelled].X, results.layer(name).X)
    wanted = [next(gene for gene in genes if gene not in modelled), modelled[3], genes[-1], modelled[0]]
    opened = results.open_cohort(cohort)
    part = results.effect("stim", 'condition != "sick"', wanted, cohort=opened)
    assert list(part.var_names) == wanted
    np.testing.assert_array_equal(part.X, results.effect("stim", 'condition != "sick"', cohort=cohort)[:, wanted].X)


def test_effects_of_all_genes_follow_the_method(from_counts):
    results = open_results(from_counts.run.url)
    stored = anndata.read_zarr(results.url)
    whole = anndata.AnnData(
        sparse.csr_matrix(normalised_by_hand(from_counts)), obs=stored.obs, obsm=dict(stored.obsm), uns=stored.uns
    )
    averages = by_hand(whole)
    found = results.effect("stim", cohort=from_counts.adata, order="packed", baseline="sick")
    np.testing.assert_allclose(found.X, averages["stim"] - averages["sick"], atol=1e-5)


def test_log_normalised_values_are_taken_as_they_are(from_counts, tmp_path):
    adata = from_counts.adata[from_counts.packed.input_row].copy()
    adata.X = sparse.csr_matrix(normalised_by_hand(from_counts))
    settings = settings_of(hvg__num_hvg=20, cohort__normalise="none")
    made = finish(from_cohort(tmp_path, adata, settings))
    results = open_results(made.run.url)
    assert "ndreamer_total_counts" not in results.obs
    every = results.denoised(cohort=adata)
    np.testing.assert_array_equal(every[:, results.var_names].X, results.denoised().X)


def test_totals_are_stored_and_another_cohort_is_refused(from_counts):
    results, adata = open_results(from_counts.run.url), from_counts.adata
    left = pd.read_parquet(f"{from_counts.run.url}/{keys.GENES_TABLE}")["cells"] >= 150
    kept = adata[results.obs.index].X[:, left.to_numpy()]
    np.testing.assert_array_equal(results.obs["ndreamer_total_counts"], np.asarray(kept.sum(axis=1)).ravel())
    with pytest.raises(CohortError, match="is not the cohort of these results: it has 100 cells, too few"):
        results.ite(genes=["g0"], cohort=adata[:100].copy())
    with pytest.raises(CohortError, match=r"its cell in row (\d+) is 'cell\d+', theirs was 'cell\1'"):
        results.ite(genes=["g0"], cohort=adata[::-1].copy())
    changed = adata.copy()
    changed.X = changed.X * 2
    with pytest.raises(CohortError, match="differs in 'rows'"):
        results.ite(genes=["g0"], cohort=changed)
    with pytest.raises(QueryError, match=r"no gene 'g999' among the 90 here\.* Did you mean"):
        results.ite(genes=["g999"], cohort=adata)
    absent = next(gene for gene in adata.var_names if gene not in results.var_names)
    with pytest.raises(QueryError, match="not modelled are found in the input cohort"):
        results.ite(genes=[absent])
