"""`simulate` writes a plain AnnData store with the requested design, negative binomial counts and an exact truth."""

from __future__ import annotations

import subprocess
import sys
from statistics import NormalDist

import anndata
import numpy as np
import pytest
import zarr

from ndreamer_dist.datasets import BALLAST, load_truth, simulate, truth_path
from ndreamer_dist.datasets.expectation import (
    DISPERSIONS,
    LIBRARY_MEDIAN,
    LIBRARY_SIGMA,
    expectation_tables,
    expected_log1p,
)
from ndreamer_dist.datasets.model import Model
from ndreamer_dist.datasets.parameters import CohortShape, SimulatedCells, StateLaw, draw_parameters
from ndreamer_dist.datasets.sampling import DIRECT_MEAN, _draw_counts, _positive_counts, generator
from ndreamer_dist.errors import CohortError, QueryError


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    path = tmp_path_factory.mktemp("cohort") / "c.zarr"
    truth = simulate(path, cells=3000, genes=400, batches=3, conditions=3, seed=4)
    return path, truth, anndata.read_zarr(path)


def log_normalised(counts) -> np.ndarray:
    dense = counts.toarray().astype(np.float64)
    return np.log1p(1e4 * dense / dense.sum(1, keepdims=True))


def model_of(**kwargs) -> Model:
    sizes = {"genes": 400, "donors": 4, "conditions": 2, "cell_types": 6, "nested": False} | kwargs
    return Model(draw_parameters(generator(0, 0), CohortShape(**sizes)))


def test_store_is_a_plain_anndata_with_names(cohort):
    _, truth, adata = cohort
    assert adata.shape == (3000, 400) == (len(truth), len(truth.genes))
    assert adata.X.format == "csr"
    assert adata.X.dtype == np.float32
    assert adata.X.indptr.dtype == adata.X.indices.dtype  # scipy refuses to compute otherwise
    assert adata.X.has_canonical_format
    assert (adata.X.data >= 1).all()
    assert (adata.X.data % 1 == 0).all()
    assert list(adata.obs) == ["cell_type", "condition", "donor"]
    assert list(adata.obs["condition"].cat.categories) == ["control", "treated", "treated_2"]
    assert adata.obs_names.is_unique
    assert list(adata.var_names) == truth.genes
    assert truth.genes[-1] == BALLAST
    for key in adata.obs:
        assert (adata.obs[key].astype(str).to_numpy() == truth.obs()[key]).all()


def test_counts_look_like_cells(tmp_path):
    simulate(tmp_path / "c.zarr", cells=1000, seed=2)
    counts = anndata.read_zarr(tmp_path / "c.zarr").X
    assert 2000 < counts.sum(1).mean() < 5000
    assert 0.8 < 1 - counts.nnz / (1000 * 2000) < 0.95


@pytest.mark.parametrize("change", [pytest.param({"chunk_rows": 100, "threads": 3}, id="other_chunks_and_threads")])
def test_result_depends_on_the_seed_alone(cohort, tmp_path, change):
    _, truth, adata = cohort
    same = simulate(tmp_path / "same.zarr", cells=3000, genes=400, batches=3, conditions=3, seed=4, **change)
    again = anndata.read_zarr(tmp_path / "same.zarr")
    assert (adata.X != again.X).nnz == 0
    assert adata.obs.equals(again.obs)
    assert (truth.batch_effect([5, 2999]) == same.batch_effect([5, 2999])).all()
    simulate(tmp_path / "other.zarr", cells=3000, genes=400, batches=3, conditions=3, seed=5)
    assert (adata.X != anndata.read_zarr(tmp_path / "other.zarr").X).nnz > 0


@pytest.mark.parametrize("design", ["crossed", "nested"])
def test_designs_are_what_they_claim(tmp_path, design):
    simulate(tmp_path / "c.zarr", cells=1500, genes=200, batches=4, design=design)
    obs = anndata.read_zarr(tmp_path / "c.zarr").obs
    conditions_per_donor = obs.groupby("donor", observed=True)["condition"].nunique()
    assert len(conditions_per_donor) == 4
    assert set(conditions_per_donor) == ({2} if design == "crossed" else {1})
    assert set(obs.groupby("condition", observed=True)["donor"].nunique()) == ({4} if design == "crossed" else {2})


def test_donors_have_unequal_proportions_of_cell_types(cohort):
    obs = cohort[2].obs
    table = obs.groupby(["donor", "cell_type"], observed=True).size().unstack()
    shares = table.div(table.sum(1), axis=0)
    assert (shares.max() - shares.min()).max() > 0.05


@pytest.mark.parametrize(("mean", "size"), [(0.05, 1.0), (0.8, 2.0), (3.9, 1.0), (3.9, 4.0), (4.5, 1.0), (30.0, 2.0)])
def test_counts_are_negative_binomial(mean, size):
    from scipy import stats

    n = 200_000
    rng = np.random.default_rng(1)
    zero = np.exp(-size * np.log1p(mean / size))
    direct = np.full(n, mean > DIRECT_MEAN)
    hit = (rng.random(n) >= zero) | direct
    counts = np.zeros(n, int)
    full = np.full(hit.sum(), mean, np.float32)
    counts[hit] = _positive_counts(rng, full, np.full(hit.sum(), size, np.float32), direct[hit])
    law = stats.nbinom(size, size / (size + mean))
    edges = np.unique(law.ppf([0.0, 0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99, 0.999]))
    bins = np.concatenate([[-1], edges[edges >= 0], [np.inf]])
    expected = n * np.diff(np.concatenate([law.cdf(bins[:-1]), [1.0]]))
    observed = np.histogram(counts, np.append(bins[:-1] + 0.5, 1e9))[0]
    assert ((observed - expected) ** 2 / expected)[expected > 0].sum() < stats.chi2(len(expected) - 1).ppf(0.9999)


def test_variance_of_stored_counts_follows_the_dispersion():
    model = model_of(genes=200)
    kinds = SimulatedCells(
        *(np.zeros(64, np.intp) for _ in range(3)), np.zeros(64, np.float32), np.full(64, 2500.0, np.float32)
    )
    shares = model.observed_shares(kinds, np.arange(200))
    rng = np.random.default_rng(3)
    dense = np.zeros((64 * 60, 200))
    for i in range(60):
        data, column, nnz = _draw_counts(model, rng, kinds, shares.copy())
        dense[64 * i + np.repeat(np.arange(64), nnz), column] = data
    mean = 2500 * shares[0].astype(float)
    size = DISPERSIONS[model.parameters.dispersion]
    use = np.arange(199)[mean[:199] > 0.5]
    assert dense[:, use].mean(0) == pytest.approx(mean[use], rel=0.15)
    excess = (dense[:, use].var(0) - mean[use]) / mean[use] ** 2 * size[use]  # 1 for a negative binomial, 0 for Poisson
    assert np.median(excess) == pytest.approx(1, abs=0.06)


@pytest.mark.parametrize("nested", [False, True])
def test_batch_effect_is_centred_over_the_donors_of_a_condition(nested):
    model = model_of(donors=6, nested=nested)
    genes = np.arange(399)
    for condition in (0, 1):
        donors = np.flatnonzero(model.parameters.group_weight[:, condition])
        assert len(donors) == (3 if nested else 6)
        n = len(donors)
        for kind, state in [(0, -1.5), (4, 0.7)]:
            cells = SimulatedCells(
                np.full(n, kind), np.full(n, condition), donors, np.full(n, state, np.float32), np.ones(n, np.float32)
            )
            effect = model.observed_expression(cells, genes) - model.true_expression(cells, genes)
            assert np.abs(effect.mean(0)).max() < 1e-5
            assert effect.std(0).mean() > 0.02


def test_batch_effect_depends_on_the_cell_type_and_saturates():
    model = model_of()
    genes = np.arange(399)
    cells = SimulatedCells(
        np.array([0, 1]), np.zeros(2, int), np.zeros(2, int), np.zeros(2, np.float32), np.ones(2, np.float32)
    )
    for true in (0.5, 3.0):
        same = np.full((2, 399), true, np.float32)
        effect = model._distortion(same, cells, genes)
        assert np.abs(effect[0] - effect[1]).mean() > 0.02
    small, large = (model._distortion(np.full((2, 399), t, np.float32), cells, genes) for t in (1.0, 4.0))
    assert np.abs(large).mean() < 2 * np.abs(small).mean()  # a linear effect would be four times as large


def test_effects_are_on_named_genes_of_responding_types_only(cohort):
    _, truth, _ = cohort
    named = np.array([gene.startswith("EFFECT") for gene in truth.genes])
    assert named.sum() == len(truth.effect_genes) > 0
    hit = {kind: {c: truth.mean_ite(kind, c) != 0 for c in truth.conditions[1:]} for kind in truth.cell_types}
    for kind in truth.cell_types:
        for mask in hit[kind].values():
            assert not mask[~named].any()
            assert mask.any() == (kind not in ("type_5", "type_6"))
    first, second = hit["type_1"]["treated"], hit["type_2"]["treated"]
    assert (first & second).any()
    assert (first & ~second).any()
    rows = np.arange(0, 3000, 7)
    obs, ite = truth.obs(rows), truth.ite(rows)
    control = obs["condition"] == "control"
    assert np.isnan(ite[control]).all()
    assert not ite[~control & np.isin(obs["cell_type"], ["type_5", "type_6"])].any()
    one = ~control & (obs["cell_type"] == "type_1") & (obs["condition"] == "treated_2")
    assert ite[one] == pytest.approx(np.tile(truth.mean_ite("type_1", "treated_2"), (one.sum(), 1)), abs=1e-6)


def test_fold_changes_have_both_signs_and_cancel():
    p = model_of(conditions=3).parameters
    for condition in (1, 2):
        for kind in range(4):
            fold = p.fold[condition, kind]
            assert np.abs(fold[fold != 0]).min() > 0.69
            assert np.abs(fold).max() < 3.01
            assert min((fold > 0).sum(), (fold < 0).sum()) >= 5
            assert abs(np.exp(p.log_share[kind]) @ np.expm1(fold)) < 1e-5


def test_expression_is_what_counts_average_to():
    """Brute force: draw many counts of the same three cells, normalise and average them."""
    model = model_of(genes=300)
    kinds = np.array([0, 2, 5])
    base = SimulatedCells(
        kinds, np.array([1, 0, 1]), np.array([0, 1, 3]), np.array([0.5, -1, 0], np.float32), np.ones(3, np.float32)
    )
    expected = model.observed_expression(base, np.arange(300))
    rng = np.random.default_rng(0)
    draws = 12_000
    for i in range(3):
        total, squares, many = np.zeros(300), np.zeros(300), base[np.full(64, i)]
        shares = model.observed_shares(base[np.array([i])], np.arange(300))
        for _ in range(draws // 64):
            library = LIBRARY_MEDIAN * np.exp(LIBRARY_SIGMA * rng.standard_normal(64))
            cells = SimulatedCells(many.cell_type, many.condition, many.donor, many.state, library.astype(np.float32))
            data, column, nnz = _draw_counts(model, rng, cells, np.tile(shares, (64, 1)))
            dense = np.zeros((64, 300))
            dense[np.repeat(np.arange(64), nnz), column] = data
            value = np.log1p(1e4 * dense / dense.sum(1, keepdims=True))
            total += value.sum(0)
            squares += (value**2).sum(0)
        n = draws // 64 * 64
        mean = total / n
        error = np.sqrt(np.maximum(squares / n - mean**2, 0) / n)
        assert (np.abs(mean - expected[i]) < 5 * error + 0.008).all()


def test_expectation_equals_the_sum_over_counts():
    from scipy import stats

    y = np.arange(0, 20_000)
    nodes, weights = np.polynomial.hermite_e.hermegauss(21)
    for share, size in [(1e-6, 1.0), (3e-4, 2.0), (0.02, 4.0), (0.2, 200.0)]:
        value = 0.0
        for node, weight in zip(nodes, weights / weights.sum(), strict=True):
            library = LIBRARY_MEDIAN * np.exp(LIBRARY_SIGMA * node)
            law = stats.nbinom(size, size / (size + share * library)).pmf(y)
            value += weight * (law @ np.log1p(1e4 * y / library))
        assert expected_log1p(np.array([share]), size)[0] == pytest.approx(value, rel=1e-4)
        tables = expectation_tables()
        kind = np.flatnonzero(size == DISPERSIONS)
        looked_up = tables.value(np.log([[share]]).astype(np.float32), kind)
        assert looked_up[0, 0] == pytest.approx(value, rel=2e-4)
        assert tables.inverse(looked_up, kind)[0, 0] == pytest.approx(np.log(share), abs=1e-3)


def test_difference_of_means_within_a_type_finds_the_effects(tmp_path):
    truth = simulate(tmp_path / "c.zarr", cells=20_000, genes=500, seed=1)
    adata = anndata.read_zarr(tmp_path / "c.zarr")
    value, obs = log_normalised(adata.X), adata.obs
    for kind in truth.cell_types[:4]:
        control, treated = (
            value[((obs.cell_type == kind) & (obs.condition == c)).to_numpy()].mean(0) for c in truth.conditions
        )
        assert np.corrcoef(treated - control, truth.mean_ite(kind, "treated"))[0, 1] > 0.95


PEAKS = """
import sys, tracemalloc
from ndreamer_dist.datasets import simulate, writing

writing.CELLS_CHUNK, writing.ENTRIES_CHUNK = 512, 4096
for cells in (600, 2000, 16_000):  # the first run fills imports and caches
    tracemalloc.start()
    simulate(f"{sys.argv[1]}/{cells}.zarr", cells=cells, genes=200, chunk_rows=512, threads=1)
    print(tracemalloc.get_traced_memory()[1])
    tracemalloc.stop()
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_cells(tmp_path):
    # In its own process, because tracemalloc counts the memory of all threads.
    told = subprocess.run([sys.executable, "-c", PEAKS, str(tmp_path)], capture_output=True, text=True, check=True)
    _, few, many = map(int, told.stdout.split())
    assert many < few * 1.15


def test_truth_opens_again_and_refuses_what_is_not_there(cohort, tmp_path):
    path, truth, _ = cohort
    opened = load_truth(path)
    assert (opened.expression(slice(10, 14)) == truth.expression([10, 11, 12, 13])).all()
    genes = [BALLAST, truth.effect_genes[0]]
    columns = [truth.genes.index(g) for g in genes]
    assert (opened.expression([7, 3], "treated", genes) == truth.expression([7, 3], "treated")[:, columns]).all()
    with pytest.raises(QueryError, match="Did you mean 'treated'"):
        opened.expression([0], "treatd")
    with pytest.raises(QueryError, match="no gene 'NOPE'"):
        opened.expression([0], genes=["NOPE"])
    with pytest.raises(QueryError, match="3000 cells"):
        opened.expression([3000])
    with pytest.raises(QueryError, match="mask of cells has shape"):
        opened.expression(np.ones(5, bool))
    mask = np.isin(np.arange(3000), [2990, 2995])
    last, back = opened.expression([2990, 2995]), opened.expression([9, 7, 5])
    for rows, expected in ((mask, last), (slice(-10, None, 5), last), (slice(9, 3, -2), back)):
        assert (opened.expression(rows) == expected).all()
    with pytest.raises(CohortError, match="was not simulated"):
        load_truth(tmp_path / "none.zarr")
    with pytest.raises(CohortError, match="exists already"):
        simulate(path, cells=10)
    assert truth_path("/a/b.zarr") == "/a/b.truth.zarr"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"conditions": 1}, "conditions is 1", id="one_condition"),
        pytest.param({"design": "nested", "batches": 1}, "at least as many batches", id="fewer_donors_than_conditions"),
        pytest.param({"design": "croszed"}, "Did you mean 'crossed'", id="unknown_design"),
        pytest.param({"state_effects": 1.2}, "state_effects is 1.2", id="more_than_all_of_an_effect"),
        pytest.param({"state_shift": -3.0}, "state_shift is -3", id="a_state_beyond_all_states"),
        pytest.param({"genes": 60, "cell_types": 30}, "too few", id="no_room_for_effects"),
    ],
)
def test_impossible_sizes_are_refused_before_anything_is_written(tmp_path, change, message):
    with pytest.raises(CohortError, match=message):
        simulate(tmp_path / "c.zarr", **change)
    assert not list(tmp_path.iterdir())


def test_an_unfinished_cohort_does_not_open(tmp_path):
    def stop(done: int, _: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate(tmp_path / "c.zarr", cells=200, genes=100, progress=stop)
    with pytest.raises(CohortError, match="not finished"):
        load_truth(tmp_path / "c.zarr")
    assert len(simulate(tmp_path / "c.zarr", cells=200, genes=100)) == 200
    assert anndata.read_zarr(tmp_path / "c.zarr").n_obs == 200


# --- effects and conditions that depend on the state -----------------------------------------------------------------


@pytest.fixture(scope="module")
def stateful(tmp_path_factory):
    path = tmp_path_factory.mktemp("stateful") / "c.zarr"
    truth = simulate(path, cells=12_000, genes=400, seed=4, state_effects=0.8, state_shift=1.0)
    return path, truth, anndata.read_zarr(path)


def test_gains_and_losses_of_counts_grow_with_the_state_and_cancel():
    """Brute force: shares are those of the control plus a part of the condition's change that depends on the state."""
    plain = model_of()
    model = Model(plain.parameters, StateLaw(effects=0.8))
    states = np.array([-2, -1, 0, 1, 2], np.float32)
    zero = np.zeros(5, np.intp)
    cells = SimulatedCells(zero, zero + 1, zero, states, np.ones(5, np.float32))
    genes = np.flatnonzero(plain.parameters.fold[1, 0])
    control, whole = (np.exp(plain._log_share(cells.under(c), genes)) for c in (0, 1))
    response = np.array([1 - 0.8 * (1 - NormalDist().cdf(2 * state)) for state in states.tolist()])
    expected = control + response[:, None] * (whole - control)
    np.testing.assert_allclose(np.exp(model._log_share(cells, genes)), expected, rtol=1e-5)
    everything = np.arange(399)
    kept = np.exp(model._log_share(cells, everything).astype(float)).sum(1)
    np.testing.assert_allclose(
        kept, np.exp(model._log_share(cells.under(0), everything).astype(float)).sum(1), rtol=1e-5
    )


def test_counts_of_every_state_average_to_its_own_effect(stateful):
    _, truth, adata = stateful
    obs, genes = truth.obs(), truth.effect_genes
    value = log_normalised(adata.X)[:, [truth.genes.index(gene) for gene in genes]]
    cells = (obs["cell_type"] == "type_1") & (obs["condition"] == "treated")
    expected, noise = truth.expression(slice(None), genes=genes) + truth.batch_effect(slice(None), genes), []
    for low, high in [(-1.0, 0.3), (0.3, 1.2), (1.2, 3.1)]:
        part = cells & (obs["state"] > low) & (obs["state"] < high)
        error = value[part].mean(0) - expected[part].mean(0)
        noise.append(error / (value[part].std(0) / np.sqrt(part.sum())))
    assert np.abs(np.concatenate(noise)).mean() < 1.1  # 0.8 in expectation


def test_the_mean_effect_is_that_of_the_cells_in_the_condition(stateful):
    _, truth, _ = stateful
    obs = truth.obs()
    rows = np.flatnonzero((obs["cell_type"] == "type_2") & (obs["condition"] == "treated"))
    effects, mean = truth.ite(rows), truth.mean_ite("type_2", "treated")
    error = effects.std(0) / np.sqrt(len(rows))
    assert (np.abs(effects.mean(0) - mean) < 4 * error + 1e-5).all()
    named = [truth.genes.index(gene) for gene in truth.effect_genes]
    moving = effects[:, named].std(0) > 0.05
    assert moving.sum() > 5
    assert not effects[:, np.setdiff1d(np.arange(400), named)].any()


def test_a_shift_of_the_state_moves_conditions_and_is_no_effect(stateful):
    _, truth, _ = stateful
    obs = truth.obs()
    state = {name: obs["state"][obs["condition"] == name].mean() for name in truth.conditions}
    assert state["treated"] - state["control"] == pytest.approx(1, abs=0.05)
    inside = {name: (obs["cell_type"] == "type_6") & (obs["condition"] == name) for name in truth.conditions}
    f = {name: truth.expression(np.flatnonzero(mask)) for name, mask in inside.items()}
    shift = truth.mean_state_shift("type_6", "treated")
    assert np.abs(shift).max() > 0.3
    assert not truth.mean_ite("type_6", "treated").any()
    error = np.sqrt(sum(value.var(0) / len(value) for value in f.values()))
    assert (np.abs(f["treated"].mean(0) - f["control"].mean(0) - shift) < 4.5 * error + 1e-4).all()


def test_a_states_law_is_kept_with_the_truth_and_not_written_where_there_is_none(stateful, cohort):
    path, truth, _ = stateful
    opened = load_truth(path)
    assert opened.law == truth.law == StateLaw(effects=0.8, shift=1.0)
    assert (opened.ite(slice(0, 50), "treated") == truth.ite(slice(0, 50), "treated")).all()
    assert load_truth(cohort[0]).law == StateLaw()
    assert set(zarr.open_group(truth_path(cohort[0]), mode="r").attrs) == {"format", "cells"}


def test_knock_outs_of_a_pathway_change_the_same_genes_and_no_ballast(tmp_path):
    truth = simulate(tmp_path / "c.zarr", cells=400, genes=600, conditions=13, pathways=3, seed=1)
    assert truth.conditions[:5] == ["control", "P01_KO01", "P02_KO01", "P03_KO01", "P01_KO02"]
    effects = {name: truth.mean_ite("type_1", name) for name in truth.conditions[1:]}
    likeness = np.corrcoef(list(effects.values()))
    same = np.array([[a[:3] == b[:3] for a in effects] for b in effects])
    assert likeness[same].min() > 0.6 > 0.4 > likeness[~same].max()
    ballast = truth.genes.index(BALLAST)
    assert max(abs(effect[ballast]) for effect in effects.values()) < 1e-4
    again = load_truth(tmp_path / "c.zarr")
    assert again.conditions == truth.conditions
    with pytest.raises(CohortError, match="pathways is 2; 1 knock-outs"):
        simulate(tmp_path / "d.zarr", conditions=2, pathways=2)
