"""Effects are the averages that METHOD section 6 defines."""

from pathlib import Path

import numpy as np
import pytest
from scipy import sparse

from ndreamer_dist.match import effects
from ndreamer_dist.match.effects import Average, average_over, average_through, kernel_weights, layer_values
from ndreamer_dist.match.search import nearest
from tests.results.fabricate import design_of

GOLDEN = Path(__file__).parent.parent / "golden" / "matching.npz"


def packed_golden():
    """Return the golden cohort in packed order: design, points, expression and that order."""
    golden = np.load(GOLDEN)
    order = np.lexsort((golden["condition"], golden["batch"]))
    pairs, counts = np.unique(np.stack([golden["batch"], golden["condition"]], axis=1), axis=0, return_counts=True)
    sizes = {(int(batch), int(condition)): int(n) for (batch, condition), n in zip(pairs, counts, strict=True)}
    levels = [f"batch {number}" for number in range(golden["batch"].max() + 1)]
    return golden, design_of(sizes, levels), golden["pca"][order], golden["x"][order], order


def edges_of(design, points, k):
    found = {}
    for query in design.groups:
        for target in design.groups:
            itself = np.arange(query.cells) if query.code == target.code else None
            rows, distances, _ = nearest(
                points[query.start : query.stop], points[target.start : target.stop], k, exclude=itself
            )
            found[query.code, target.code] = (np.where(rows < 0, -1, rows + target.start), distances)
    return found


def blocks_of(x, rows):
    return ((start, sparse.csr_matrix(x[start : start + rows])) for start in range(0, len(x), rows))


@pytest.mark.parametrize(("k", "bandwidth"), [(1, 1.0), (5, 1.0), (5, 0.3)])
@pytest.mark.parametrize("rows", [64, 1000])
def test_effects_equal_the_reference_values(k, bandwidth, rows):
    golden, design, points, x, order = packed_golden()
    edges = edges_of(design, points, k)
    averages = [average_over(design, edges, 0, len(x), bandwidth, condition=condition) for condition in (None, 0, 1)]
    own, control, first = average_through(averages, blocks_of(x, rows), x.shape[1])
    layers = dict(layer_values(("denoised", "batch_effect", "ite"), sparse.csr_matrix(x), own, control))
    expected = {"denoised": "denoised", "batch_effect": "batch_effect", "ite": "own_minus_control"}
    for name, reference in expected.items():
        values = golden[f"{reference}_k{k}_bw{bandwidth}"][order]
        np.testing.assert_allclose(layers[name], values, atol=1e-5, err_msg=name)
    np.testing.assert_allclose(own - first, golden[f"own_minus_condition1_k{k}_bw{bandwidth}"][order], atol=1e-5)
    np.testing.assert_array_equal(layers["batch_effect"], x - layers["denoised"])


def test_blocks_and_pieces_change_no_bit(monkeypatch):
    _, design, points, x, _ = packed_golden()
    edges = edges_of(design, points, 5)
    averages = [average_over(design, edges, 0, len(x), 0.7, condition=None)]
    (whole,) = average_through(averages, blocks_of(x, 1000), x.shape[1])
    monkeypatch.setattr(effects, "ENTRIES", 7)
    (pieces,) = average_through(averages, blocks_of(x, 33), x.shape[1])
    np.testing.assert_array_equal(whole, pieces)
    shifted = [
        average_through(
            [average_over(design, {pair: (r[a:b], d[a:b]) for pair, (r, d, a, b) in cut(edges, design, lo, lo + 50)},
                          lo, lo + 50, 0.7, condition=None)],
            blocks_of(x, 1000), x.shape[1],
        )[0]
        for lo in range(0, len(x), 50)
    ]  # fmt: skip
    np.testing.assert_array_equal(whole, np.concatenate(shifted))


def cut(edges, design, start, stop):
    spans = {g.code: (a - g.start, b - g.start) for g, a, b in effects.segments(design, start, stop)}
    return {pair: (*edge, *spans[pair[0]]) for pair, edge in edges.items() if pair[0] in spans}.items()


def test_one_neighbour_has_weight_one_and_absent_ones_none():
    np.testing.assert_array_equal(kernel_weights(np.array([[3.0], [0.0]], np.float32), 0.1), [[1.0], [1.0]])
    weights = kernel_weights(np.array([[1.0, 2.0, np.nan], [np.nan] * 3], np.float32), 2.0)
    np.testing.assert_allclose(weights, [[1 / (1 + np.exp(-0.5)), 1 / (1 + np.exp(0.5)), 0], [0, 0, 0]])


def test_equal_counterparts_leave_an_effect_of_exactly_zero():
    x = np.full((6, 1), np.float32(0.1))
    same = Average(np.repeat(0, 3), np.array([1, 3, 5]), np.ones(3), np.array([3]))
    two = Average(np.repeat(0, 2), np.array([0, 2]), np.ones(2), np.array([2]))
    own, control = average_through([same, two], blocks_of(x, 2), 1)
    assert own == control == x[0]
