"""Effects are the averages that METHOD section 6 defines."""

from pathlib import Path

import numpy as np
import pytest
from scipy import sparse

from ndreamer_dist.effects.averages import (
    Average,
    Term,
    average_over,
    average_through,
    kernel_weights,
    layer_values,
    segments,
)
from ndreamer_dist.matching.stage import nearest
from tests.results.fabricate import design_of

GOLDEN = Path(__file__).parent.parent / "golden" / "matching.npz"


def packed_golden():
    """Return the golden cohort in packed order: design, points, expression, and the order itself."""
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
    parts = (np.arange(start, min(start + rows, len(x))) for start in range(0, len(x), rows))
    return ((part, sparse.csr_matrix(x[part])) for part in parts)


@pytest.mark.parametrize(("k", "bandwidth"), [(1, 1.0), (5, 1.0), (5, 0.3)])
@pytest.mark.parametrize("rows", [64, 1000])
def test_effects_equal_the_reference_values(k, bandwidth, rows):
    golden, design, points, x, order = packed_golden()
    edges = edges_of(design, points, k)
    cells = np.arange(len(x))
    averages = [
        average_over(design, edges, cells, Term(condition, without=condition), bandwidth) for condition in (None, 0, 1)
    ]
    own, control, first = average_through(averages, blocks_of(x, rows), x.shape[1])
    names = ("denoised", "batch_effect", "ite")
    layers = {name: layer_values(name, x, own, control) for name in names}
    expected = {"denoised": "denoised", "batch_effect": "batch_effect", "ite": "own_minus_control"}
    for name, reference in expected.items():
        values = golden[f"{reference}_k{k}_bw{bandwidth}"][order]
        np.testing.assert_allclose(layers[name], values, atol=1e-5, err_msg=name)
    np.testing.assert_allclose(own - first, golden[f"own_minus_condition1_k{k}_bw{bandwidth}"][order], atol=1e-5)
    np.testing.assert_array_equal(layers["batch_effect"], x - layers["denoised"])


@pytest.mark.parametrize("k", [1, 5])
def test_a_condition_s_own_cells_average_themselves_and_their_likes(k):
    _, design, points, x, _ = packed_golden()
    edges, cells = edges_of(design, points, k), np.arange(len(x))
    own = average_over(design, edges, cells, Term(None), 0.7)
    of = [average_over(design, edges, cells, Term(code), 0.7) for code in range(len(design.conditions))]
    own, *of = average_through([own, *of], blocks_of(x, 1000), x.shape[1])
    condition = design.group_conditions[design.group_of(cells)]
    assert set(condition) == {0, 1, 2} & set(range(len(design.conditions)))
    for code, values in enumerate(of):
        assert np.isfinite(values).all()
        np.testing.assert_array_equal(values[condition == code], own[condition == code])


def test_blocks_and_pieces_change_no_bit():
    _, design, points, x, _ = packed_golden()
    edges, cells = edges_of(design, points, 5), np.arange(len(x))
    (whole,) = average_through([average_over(design, edges, cells, Term(None), 0.7)], blocks_of(x, 1000), x.shape[1])

    def some(rows, block):
        average = average_over(design, cut(edges, design, rows), rows, Term(None), 0.7)
        return average_through([average], blocks_of(x, block), x.shape[1])[0]

    np.testing.assert_array_equal(whole, some(cells, 33))
    shifted = [some(cells[low : low + 50], 1000) for low in range(0, len(x), 50)]
    np.testing.assert_array_equal(whole, np.concatenate(shifted))
    scattered = np.sort(np.random.default_rng(0).choice(cells, 70))  # some of them twice
    np.testing.assert_array_equal(whole[scattered], some(scattered, 40))


@pytest.mark.parametrize("rows", [1, 9, 60], ids=lambda rows: f"blocks_of_{rows}")
@pytest.mark.parametrize("gaps", [False, True], ids=["every_row", "rows_with_gaps"])
def test_a_cell_adds_its_counterparts_one_by_one_in_the_order_of_their_rows(rows, gaps):
    rng = np.random.default_rng(0)
    x = rng.gamma(1.0, size=(60, 17)).astype(np.float32) * (rng.random((60, 17)) < 0.5)
    held = np.flatnonzero(rng.random(60) < 0.7) if gaps else np.arange(60)
    cell, row = rng.integers(1, 12, 400), rng.choice(held, 400)  # in no order, some twice; the first cell has none
    groups = np.arange(12)
    average = Average(cell, row, rng.random(400), groups)
    blocks = [held[start : start + rows] for start in range(0, len(held), rows)]
    (found,) = average_through([average], ((part, sparse.csr_matrix(x[part])) for part in blocks), 17)
    expected = np.zeros((12, 17))
    for entry in np.argsort(row, kind="stable"):
        for gene in np.flatnonzero(x[row[entry]]):
            expected[cell[entry], gene] += np.float64(x[row[entry], gene]) * average.weight[entry]
    with np.errstate(invalid="ignore"):
        expected /= groups[:, None]
    np.testing.assert_array_equal(found.view(np.int64), expected.view(np.int64))


@pytest.mark.parametrize(
    ("row", "genes", "said"),
    [
        pytest.param(0, 2, "genes outside the 2", id="more_genes_than_are_averaged"),
        pytest.param(4, 3, "do not hold every row", id="a_row_of_no_block"),
    ],
)
def test_blocks_that_do_not_fit_are_refused(row, genes, said):
    average = Average(np.array([0]), np.array([row]), np.ones(1), np.ones(1, dtype=np.int64))
    with pytest.raises(ValueError, match=said):
        average_through([average], blocks_of(np.ones((3, 3), np.float32), 2), genes)


def cut(edges, design, rows):
    places = {group.code: rows[here] - group.start for group, here in segments(design, rows)}
    return {pair: tuple(part[places[pair[0]]] for part in edge) for pair, edge in edges.items() if pair[0] in places}


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
