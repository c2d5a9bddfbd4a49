"""Scores are 1 for the truth and lower for noise; variances between donors exclude sampling variance."""

from __future__ import annotations

import numpy as np
import pytest

from ndreamer_dist.datasets import simulate
from ndreamer_dist.datasets.score import recovery, score_effects
from ndreamer_dist.errors import QueryError


@pytest.fixture(scope="module")
def truth(tmp_path_factory):
    return simulate(tmp_path_factory.mktemp("r") / "c.zarr", cells=3000, genes=400, seed=3)


def labels(truth, rows=slice(None)) -> dict:
    obs = truth.obs(rows)
    return {"cell_type": obs["cell_type"], "condition": obs["condition"], "donor": obs["donor"]}


def perfect(truth, genes):
    def read(layer: str, start: int, stop: int) -> np.ndarray:
        rows = slice(start, stop)
        if layer == "ite":
            return truth.ite(rows, genes=genes)
        denoised = truth.expression(rows, genes=genes)
        return denoised if layer == "denoised" else denoised + truth.batch_effect(rows, genes)

    return read


def test_truth_scores_one(truth):
    genes = truth.genes[:-1]
    scores = recovery(truth, perfect(truth, genes), genes=genes, chunk_rows=700, **labels(truth))
    responding = [e for e in scores.effects if e.affected]
    assert {e.cell_type for e in responding} == {"type_1", "type_2", "type_3", "type_4"}
    assert all(
        e.correlation == pytest.approx(1, abs=1e-6) and e.slope == pytest.approx(1, abs=1e-5) for e in responding
    )
    assert all(np.isnan(e.correlation) and e.largest_false == 0 for e in scores.effects if not e.affected)
    assert scores.correlation == pytest.approx(1, abs=1e-6)
    assert scores.false_genes == 0
    assert scores.batch_variance_removed > 0.98  # states differ a little between donors
    assert all(line in scores.table() for line in ("type_6", "Mean correlation 1.000"))


def test_noise_scores_lower_and_calls_genes_where_there_is_no_effect(truth):
    genes, inner = truth.genes[:-1], perfect(truth, truth.genes[:-1])
    offset = np.random.default_rng(0).normal(0, 0.3, len(genes))

    def read(layer: str, start: int, stop: int) -> np.ndarray:
        return inner(layer, start, stop) + (offset if layer == "ite" else 0)

    scores = recovery(truth, read, genes=genes, **labels(truth))
    assert 0 < scores.correlation < 0.9
    null = [e for e in scores.effects if not e.affected]
    expected = int((np.abs(offset) > 0.25).sum())
    assert [e.false_genes for e in null] == [expected, expected]
    assert scores.false_genes == 2 * expected
    assert null[0].largest_false == pytest.approx(np.abs(offset).max(), abs=1e-5)
    assert null[0].false_share == pytest.approx(expected / len(genes))


def test_genes_that_are_called_by_chance_are_counted(truth):
    """Without any effect, the number of false genes is the number that `by_chance` expects from sampling noise."""
    obs, genes = truth.obs(), truth.genes[:300]
    values = np.random.default_rng(4).normal(0, 2, (len(truth), 300))
    control = obs["condition"] == "control"
    means = {kind: values[control & (obs["cell_type"] == kind)].mean(0) for kind in truth.cell_types}
    matched = np.stack([means[kind] for kind in obs["cell_type"]])

    def read(layer: str, start: int, stop: int) -> np.ndarray:
        return (values - matched if layer == "ite" else values)[start:stop]

    scores = recovery(truth, read, genes=genes, **labels(truth))
    assert scores.false_by_chance > 20
    assert abs(scores.false_genes - scores.false_by_chance) < 3 * np.sqrt(scores.false_by_chance)
    assert f"({scores.false_by_chance:.0f} or more by chance" in scores.table()


def test_shrunken_effects_show_in_the_slope_not_in_the_correlation(truth):
    genes = truth.genes
    scores = score_effects(truth, {("type_1", "treated"): truth.mean_ite("type_1", "treated") / 2}, genes=genes)
    assert scores[0].correlation == pytest.approx(1)
    assert scores[0].slope == pytest.approx(0.5)


def test_nothing_removed_scores_zero(truth):
    genes, inner = truth.genes[:50], perfect(truth, truth.genes[:50])
    scores = recovery(
        truth, lambda layer, a, b: inner("X" if layer == "denoised" else layer, a, b), genes=genes, **labels(truth)
    )
    assert scores.batch_variance_removed == pytest.approx(0)


def test_sampling_variance_is_taken_off_the_variance_between_donors(truth):
    """For independent cells without donor effects the plain variance is positive and the corrected one about 0."""
    values = np.random.default_rng(1).normal(0, 1, (len(truth), 300))
    scores = recovery(truth, lambda layer, a, b: values[a:b], genes=truth.genes[:300], **labels(truth))
    plain = np.mean([b.before_plain for b in scores.batches])
    corrected = np.mean([b.before for b in scores.batches])
    assert plain > 0.005
    assert abs(corrected) < 0.1 * plain


def test_rows_may_be_dropped_and_reordered(truth):
    rows = np.random.default_rng(2).permutation(3000)[:2000]
    genes = truth.genes[:-1]

    def read(layer: str, start: int, stop: int) -> np.ndarray:
        part = rows[start:stop]
        return truth.ite(part, genes=genes) if layer == "ite" else truth.expression(part, genes=genes)

    scores = recovery(truth, read, genes=genes, **labels(truth, rows))
    assert scores.correlation == pytest.approx(1, abs=1e-6)
    assert sum(e.cells for e in scores.effects) == (truth.obs(rows)["condition"] == "treated").sum()


def test_wrong_names_and_shapes_are_refused(truth):
    genes, given = truth.genes[:5], labels(truth)
    read = perfect(truth, genes)
    with pytest.raises(QueryError, match="no gene"):
        recovery(truth, read, genes=["NOPE"], **given)
    with pytest.raises(QueryError, match="'neuron' is no name"):
        recovery(truth, read, genes=genes, **(given | {"cell_type": np.full(3000, "neuron")}))
    with pytest.raises(QueryError, match="they must agree"):
        recovery(truth, read, genes=genes, **(given | {"donor": given["donor"][:5]}))
    with pytest.raises(QueryError, match="expected"):
        recovery(truth, read, genes=truth.genes[:6], **given)
