"""Each loss equals its reference value, equals brute force, and is defined at its edges."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

from ndreamer_dist.model import batch as batches
from ndreamer_dist.model import losses
from ndreamer_dist.model import noise as noises
from ndreamer_dist.model.batch import Labels, MiniBatch, gather_labels
from ndreamer_dist.model.codebooks import Quantised, row_negentropy, segment_sums
from ndreamer_dist.model.collectives import Single
from ndreamer_dist.settings import LossSettings
from tests.model.helpers import (
    CONDITIONS,
    TINY,
    close,
    golden,
    literal_neighbourhood,
    literal_nmi,
    literal_triplet,
    random_batch,
    tiny_network,
)  # fmt: skip

LOSSES = {name: torch.from_numpy(array) for name, array in golden("losses").items()}


def golden_batch() -> MiniBatch:
    names = ("condition", "batch", "low", "high")
    condition, batch, low, high = (LOSSES[name] for name in names)
    return MiniBatch(LOSSES["x"], condition, batch[:, None], condition * 100 + batch, low, high, 0, 1, len(batch))


def quantised_of(probs: Tensor, labels: Labels) -> Quantised:
    segments = labels.segments
    tables = segment_sums(probs, segments.order, segments.offsets)
    groups = segment_sums(tables, segments.low_order, segments.group_offsets)
    sizes = labels.group_cells[segments.row_group, None].float()
    rows, _ = row_negentropy(tables / sizes)
    nothing = probs.new_zeros(())
    return Quantised(nothing, nothing, nothing, nothing, rows, groups)


@pytest.mark.parametrize(
    ("found", "name"),
    [
        pytest.param(losses.squared_error(LOSSES["x"], LOSSES["x_rec"]).mean(), "mse", id="mse"),
        pytest.param(losses.one_minus_cosine(LOSSES["x"], LOSSES["x_rec"]).mean(), "one_minus_cosine", id="cosine"),
        pytest.param(losses.correlation_penalty(LOSSES["z"], 120, Single()), "correlation_penalty_z", id="corr_z"),
        pytest.param(
            losses.correlation_penalty(LOSSES["var"], 120, Single()), "correlation_penalty_var", id="corr_var"
        ),
        pytest.param(
            losses.kl_to_standard_normal(LOSSES["z"], LOSSES["var"]).mean()
            + losses.correlation_penalty(LOSSES["z"], 120, Single())
            + losses.correlation_penalty(LOSSES["var"], 120, Single()),
            "kl_plus_correlation",
            id="kl",
        ),
    ],
)
def test_pointwise_losses_equal_the_reference(found: Tensor, name: str) -> None:
    close(found, LOSSES[f"value_{name}"].item())


@pytest.mark.parametrize("covariates", [pytest.param(0, id="condition"), pytest.param(1, id="condition_and_batch")])
def test_independence_equals_the_reference(covariates: int) -> None:
    batch = golden_batch()
    batch = replace(batch, batch=batch.batch[:, :covariates])
    labels = gather_labels(batch, Single())
    quantised = quantised_of(LOSSES["probs"], labels)
    close(losses.independence_condition(quantised, labels), LOSSES["value_nmi_condition"].item())
    close(losses.independence_batch(quantised, labels), covariates * LOSSES["value_nmi_batch"].item())


def test_independence_of_the_batch_inside_conditions_equals_the_sum_over_cells() -> None:
    batch = random_batch(120, dtype=torch.float64)
    labels = gather_labels(batch, Single())
    probs = torch.rand(3, 120, 7, dtype=torch.float64).square()
    probs = probs / probs.sum(-1, keepdim=True)
    names = batch.condition.unique()
    expected = sum(
        literal_nmi(covariate[batch.condition == name], probs[:, batch.condition == name]) / len(names)
        for covariate in batch.batch.T
        for name in names
    )
    # The helper sums in float32, hence the tolerance of the golden values.
    close(losses.independence_batch_within(quantised_of(probs, labels), labels), float(expected))


@pytest.mark.parametrize(
    ("batch_of", "expected"),
    [
        pytest.param([0, 0, 1, 1], 0.0, id="one_batch_per_condition"),
        pytest.param([0, 1, 2, 3], 1.0, id="codes_name_the_batch"),
    ],
)
def test_batches_inside_a_condition_count_and_the_condition_itself_does_not(
    batch_of: list[int], expected: float
) -> None:
    condition, donors = torch.tensor([0, 0, 1, 1]), torch.tensor(batch_of)
    batch = MiniBatch(torch.rand(4, 3), condition, donors[:, None], donors, condition, condition, 0, 1, 4)
    labels = gather_labels(batch, Single())
    found = losses.independence_batch_within(quantised_of(torch.eye(4)[None], labels), labels)
    close(found, expected, atol=1e-5)


def test_each_information_has_its_own_weight_and_the_common_one_stands_for_those_without() -> None:
    zero = {field.name: torch.tensor(0.0) for field in fields(losses.Terms)}
    terms = losses.Terms(
        **zero | {"independence_condition": torch.tensor(1.0), "independence_batch": torch.tensor(2.0),
                  "independence_batch_within": torch.tensor(4.0)}
    )  # fmt: skip
    totals = [
        losses.weigh(terms, LossSettings(**weights), CONDITIONS).total
        for weights in (
            {}, {"independence": 3.0}, {"independence_batch": 0.0}, {"independence": 3.0, "independence_condition": 0.0},
            {"independence": 0.0, "independence_batch_within": 5.0},
        )
    ]  # fmt: skip
    assert totals == [3000, 9, 1000, 6, 20]


def test_an_information_without_weight_is_measured_and_moves_nothing() -> None:
    batch = random_batch(70, dtype=torch.float32)
    network, noise = tiny_network(dtype=torch.float32), noises.draw(batch, TINY, 0)
    weightless = LossSettings(
        **dict.fromkeys(("reconstruction", "cosine", "kl", "dependence", "triplet", "neighbourhood", "commitment"), 0.0)
    )
    gradients = {}
    for name, weights in {
        "none": {"independence": 0.0},
        "within": {"independence": 0.0, "independence_batch_within": 1.0},
    }.items():
        network.zero_grad()
        found = losses.total_loss(
            network(batch, noise, Single()), batch, noise, weightless.model_copy(update=weights),
            conditions=CONDITIONS, collective=Single(),
        )  # fmt: skip
        found.total.backward()
        assert found.unweighted.independence_condition > 0
        assert found.unweighted.independence_batch_within > 0
        gradients[name] = network.quantiser.embedding.grad.abs().max().item()
    assert gradients["none"] == 0 < gradients["within"]


@pytest.mark.parametrize(
    ("kept", "names"),
    [
        pytest.param("low", ["low"], id="low"),
        pytest.param("high", ["high"], id="high"),
        pytest.param("both", ["low", "high"], id="both"),
    ],
)
def test_dependence_equals_the_reference(kept: str, names: list[str]) -> None:
    batch = golden_batch()
    if kept != "both":
        other = {"low": "high", "high": "low"}[kept]
        batch = replace(batch, **{other: torch.zeros_like(batch.low)})
    labels = gather_labels(batch, Single())
    expected = sum(LOSSES[f"value_nmi_{name}_within_groups"].item() for name in names)
    close(losses.dependence(quantised_of(LOSSES["probs"], labels), labels), expected)


@pytest.mark.parametrize(("k", "sigma", "across"), [(5, 1.0, 20.0), (3, 0.5, 1.0), (50, 1.0, 20.0)])
def test_neighbourhood_equals_the_reference(k: int, sigma: float, across: float) -> None:
    labels = gather_labels(golden_batch(), Single())
    loss = LossSettings(neighbours=k, sigma=sigma, across=across)
    z, x = LOSSES["z"], LOSSES["x"]
    found = losses.pair_losses(z, z, x, x, labels, torch.rand(120, 120), loss)[2]
    close(found, LOSSES[f"value_neighborhood_k{k}_sigma{sigma}_across{across}"].item())


def test_triplet_equals_the_reference() -> None:
    stored = {name: torch.from_numpy(array) for name, array in golden("triplet").items()}
    z, group = stored["z"], stored["group"]
    batch = MiniBatch(z, group, group[:, None], group, stored["low"], stored["high"], 0, 1, len(z))
    loss = LossSettings(margin=stored["margin"].item())
    total, pairs, _ = losses.pair_losses(z, z, z, z, gather_labels(batch, Single()), torch.rand(60, 60), loss)
    close(total / pairs, stored["value"].item())


def test_commitment_equals_the_reference() -> None:
    stored = {name: torch.from_numpy(array) for name, array in golden("commitment").items()}
    best = stored["probs"].argmax(-1)
    nearest = stored["embeddings"][torch.arange(len(best))[:, None], best]
    q, nothing = stored["quantised"], best.new_zeros(())
    value = losses.commitment(Quantised(q, q, nearest, nothing, nothing, nothing)) / q[0].numel()
    close(value, stored["value_before_1_over_K"].item())


def test_correlation_of_small_variances_equals_the_reference() -> None:
    stored = golden("correlation_small_variance")
    z = torch.from_numpy(stored["z"])
    close(losses.correlation_penalty(z, len(z), Single()), stored["value"])


@pytest.mark.parametrize("at_once", [1, 300, 10**9], ids=["group_by_group", "some_groups", "all_groups_padded"])
@pytest.mark.parametrize("cross_cluster", ["published", "clusters"])
def test_pair_losses_equal_brute_force(cross_cluster: str, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(batches.LEAST_RELATIVE_SIZE, "cpu", 0.0)
    batch = random_batch(130)
    loss = LossSettings.model_validate({"cross_cluster": cross_cluster, "neighbours": 4, "triplet_pairs": 3})
    z, keys = torch.randn(130, 4, dtype=torch.float64), torch.rand(130, 130)
    z[5] = z[6]
    found = losses.pair_losses(
        z, z, batch.x, batch.x, gather_labels(batch, Single()), keys, loss, at_once=at_once
    )  # fmt: skip
    groups = batch.group.unique()
    near = [
        literal_neighbourhood(*(part[batch.group == group] for part in (batch.x, z, batch.low, batch.high)), loss)
        for group in groups
    ]
    close(found[2], torch.stack(near).mean(), rtol=1e-9)
    close(found[0] / found[1], literal_triplet(z, batch, keys, loss), rtol=1e-9)


def test_published_and_meant_crossing_differ() -> None:
    labels = gather_labels(golden_batch(), Single())
    z, x, keys = LOSSES["z"], LOSSES["x"], torch.rand(120, 120)
    values = [
        losses.pair_losses(z, z, x, x, labels, keys, LossSettings(cross_cluster=mode))[2]
        for mode in ("published", "clusters")
    ]
    assert values[0] > values[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_distances_of_near_copies_keep_their_digits(dtype: torch.dtype) -> None:
    a = 10 + torch.randn(40, 30, dtype=torch.float64)
    a[20:] = a[:20] + 1e-2 * torch.randn(20, 30, dtype=torch.float64)
    a[0] = a[1]
    a = a.to(dtype)
    expected = (a.double()[:, None] - a.double()).square().sum(-1).sqrt()
    found = losses.pairwise_distance(a[None], a[None])[0]
    close(found, expected, rtol=1e-4 if dtype == torch.float32 else 1e-10)
    assert found[0, 1] == 0


def test_both_ways_to_a_squared_distance_agree() -> None:
    a = torch.randn(3, 20, 30)
    a[:, 10:] = a[:, :10] + 1e-3 * torch.randn(3, 10, 30)
    expected = (a.double()[:, :, None] - a.double()[:, None]).square().sum(-1)
    for found in (
        losses.squared_with_repairs(a, a, torch.ones(3, 20, 20, dtype=torch.bool)),
        losses.squared_in_double(a, a),
    ):
        close(found, expected, rtol=1e-5, atol=1e-12)


def test_distance_gradient_is_right_and_zero_between_copies() -> None:
    a = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    b = torch.randn(2, 7, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(losses.pairwise_distance, (a, b))
    copies = torch.ones(1, 3, 4, dtype=torch.float64, requires_grad=True)
    losses.pairwise_distance(copies, copies).sum().backward()
    assert torch.equal(copies.grad, torch.zeros(1, 3, 4, dtype=torch.float64))


def test_of_equally_near_cells_the_first_are_neighbours() -> None:
    distance = torch.tensor([[0.0, 2.0, 1.0, 2.0, 2.0 - 1e-12, 0.0]], dtype=torch.float64)
    others = torch.tensor([[False, True, True, True, True, True]])
    found = losses.nearest_mask(distance, others, torch.tensor([3]), 4)
    assert found.tolist() == [[False, True, True, False, False, True]]


def test_nmi_equals_brute_force() -> None:
    probs = torch.randn(3, 40, 7, dtype=torch.float64).softmax(-1)
    labels = torch.randint(4, (40,))
    joint = torch.nn.functional.one_hot(labels).double().T @ probs
    close(losses.nmi(joint).mean(), literal_nmi(labels, probs), rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nmi_of_one_label_and_one_code_is_zero_with_zero_gradient(dtype: torch.dtype) -> None:
    joint = torch.tensor([[[5.0, 0.0, 0.0]]], dtype=dtype, requires_grad=True)
    value = losses.nmi(joint)
    value.sum().backward()
    assert value.item() == 0
    assert joint.grad.abs().max() == 0


EDGES = {
    "one_group": {"group": 0, "condition": 0, "batch": 0},
    "one_label": {"low": 0, "high": 0},
    "every_cell_its_own_group": {"group": None},
    "every_cell_its_own_cluster": {"low": None, "high": None},
    "copies_of_one_cell": {"x": 1},
    "empty_cells": {"x": 0},
}


@pytest.mark.parametrize("edge", EDGES)
def test_no_edge_case_makes_the_loss_or_a_gradient_undefined(edge: str) -> None:
    batch = random_batch(70, dtype=torch.float32)
    for field, value in EDGES[edge].items():
        old = getattr(batch, field)
        new = torch.arange(len(old)) if value is None else torch.full_like(old, value)
        batch = replace(batch, **{field: new})
    network, noise = tiny_network(dtype=torch.float32), noises.draw(batch, TINY, 0)
    terms = losses.total_loss(
        network(batch, noise, Single()), batch, noise, LossSettings(), conditions=CONDITIONS, collective=Single()
    )
    terms.total.backward()
    assert all(value == value for value in terms.as_floats().values())
    assert all(parameter.grad.isfinite().all() for parameter in network.parameters())


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        pytest.param([0, 0, 0, 0], 0, id="no_negative"),
        pytest.param([0, 1, 2, 3], 0, id="no_positive"),
        pytest.param([0, 0, 1, 1], 4, id="one_of_each"),
    ],
)
def test_triplets_are_counted_where_there_are_any(labels: list[int], expected: int) -> None:
    label = torch.tensor(labels)
    batch = MiniBatch(torch.randn(4, 3), label * 0, label[:, None] * 0, label * 0, label, label, 0, 1, 4)
    z = torch.randn(4, 2)
    found = losses.pair_losses(z, z, batch.x, batch.x, gather_labels(batch, Single()), torch.rand(4, 4), LossSettings())
    assert found[1] == expected
    assert expected or found[0] == 0


def test_terms_and_total_are_clamped_from_above() -> None:
    names = [field.name for field in fields(losses.Terms)]
    huge = losses.Terms(**{name: torch.tensor(1e9 if name in ("kl", "reconstruction") else 0.0) for name in names})
    loss = LossSettings(kl=1.0, ceiling=10.0)
    found = losses.weigh(huge, loss, CONDITIONS)
    assert found.weighted.kl == 10
    assert found.total == 10
    # 10 (reconstruction) + 10 (kl) - 25 (dependence): each term is clamped before the sum.
    assert losses.weigh(replace(huge, dependence=torch.tensor(1.0)), loss, CONDITIONS).total == -5
