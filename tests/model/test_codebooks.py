"""Codebooks: the race is a Gumbel-softmax, statistics equal literal ones, resets and usage do what METHOD says."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from ndreamer_dist.model import codebooks
from ndreamer_dist.model.batch import gather_labels
from ndreamer_dist.model.codebooks import CodeStatistics, Quantiser
from ndreamer_dist.model.collectives import Single
from ndreamer_dist.model.noise import race_draws
from tests.model.helpers import TINY, close, literal_gumbel, random_batch

BOOKS, CODES, DIM = 2, 6, 3


def projections(cells: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(BOOKS, cells, DIM, generator=rng, dtype=torch.float64)
    return x.requires_grad_(), torch.randn(BOOKS, CODES, DIM, generator=rng, dtype=torch.float64).requires_grad_()


def logits_of(x: Tensor, embedding: Tensor) -> Tensor:
    return -(x[:, :, None] - embedding[:, None]).square().sum(-1)


def race_noise(x: Tensor, embedding: Tensor, temperature: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng(seed)
    shape = (*x.shape[:2], race_draws(temperature))
    probs = logits_of(x, embedding).softmax(-1).detach()
    marks = torch.from_numpy(rng.random(shape))
    arrivals = torch.stack([codebooks.draw_codes(p.cumsum(-1), mark) for p, mark in zip(probs, marks, strict=True)])
    return arrivals, torch.from_numpy(rng.standard_exponential(shape)).cumsum(-1)


@pytest.mark.parametrize("temperature", [0.01, 0.03, 0.1])
def test_the_race_has_the_value_and_gradient_of_its_gumbel_softmax(temperature: float) -> None:
    x, embedding = projections(40)
    arrivals, times = race_noise(x, embedding, temperature)
    found, usage = codebooks.race(x, embedding, arrivals, times, temperature)
    logits = logits_of(x, embedding)
    assignment = torch.stack(
        [literal_gumbel(*parts, temperature) for parts in zip(logits, arrivals, times, strict=True)]
    )
    close(found, (assignment @ embedding).detach(), rtol=1e-10)
    close(usage, assignment.sum(1).detach(), rtol=1e-10)
    upstream = torch.randn_like(found)
    ours = torch.autograd.grad(found, (x, embedding), upstream)
    theirs = torch.autograd.grad(assignment @ embedding, (x, embedding), upstream)
    for left, right in zip(ours, theirs, strict=True):
        close(left, right, rtol=1e-8, atol=1e-10)


def test_the_race_and_the_gumbel_softmax_have_the_same_distribution() -> None:
    cells, temperature = 20_000, 0.1
    x, embedding = (side.detach() for side in projections(1))
    x = x.expand(-1, cells, -1)
    raced, _ = codebooks.race(x, embedding, *race_noise(x, embedding, temperature), temperature)
    exponentials = torch.from_numpy(np.random.default_rng(1).standard_exponential((BOOKS, cells, CODES)))
    dense, _ = codebooks.gumbel_softmax(x, embedding, exponentials, temperature)
    # First and second moments of q depend on how often each code wins and on how the weight is shared.
    for moment in (raced, dense), (raced.square(), dense.square()), (raced.prod(2), dense.prod(2)):
        left, right = (side.flatten(2) if side.dim() > 2 else side[..., None] for side in moment)
        spread = (left.var(1) + right.var(1)).sqrt() / cells**0.5
        assert ((left.mean(1) - right.mean(1)).abs() < 4.5 * spread).all()


def test_winners_follow_the_probabilities() -> None:
    x, embedding = (side.detach() for side in projections(1))
    x = x.expand(-1, 50_000, -1)
    arrivals, times = race_noise(x, embedding, 0.01)
    _, usage = codebooks.race(x, embedding, arrivals, times, 0.01)
    probs = logits_of(x[:, :1], embedding).softmax(-1)[:, 0]
    assert ((usage / 50_000 - probs).abs() < 4.5 * (probs * (1 - probs) / 50_000).sqrt() + 1e-3).all()


def test_a_code_that_arrives_twice_counts_once() -> None:
    weights = codebooks.race_weights(torch.tensor([[[3, 3, 1]]]), torch.tensor([[[1.0, 1.01, 1.02]]]), 0.1)
    assert weights[0, 0, 1] == 0
    close(weights[0, 0, 2] / weights[0, 0, 0], 1.02**-10)
    close(weights.sum(), 1)


def statistics(x: Tensor, embedding: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    segments = gather_labels(random_batch(x.shape[1]), Single()).segments
    marks = torch.zeros(BOOKS, x.shape[1], 0, dtype=torch.float64)
    found: tuple[Tensor, Tensor, Tensor, Tensor] = CodeStatistics.apply(
        codebooks.augment(x), codebooks.code_columns(embedding), segments, marks, Single()
    )
    return found


def test_code_statistics_equal_one_hot_products() -> None:
    x, embedding = projections(100)
    batch = random_batch(100)
    negentropy, group_probs, best, _ = statistics(x, embedding)
    probs = logits_of(x, embedding).softmax(-1)
    for i, group in enumerate(batch.group.unique()):
        close(group_probs[:, i], probs[:, batch.group == group].sum(1).detach(), rtol=1e-10)
    rows = []
    for labels in (batch.low, batch.high):
        for pair in torch.stack([batch.group, labels], 1).unique(dim=0):
            inside = (batch.group == pair[0]) & (labels == pair[1])
            table = probs[:, inside].sum(1) / (batch.group == pair[0]).sum()
            rows.append((table * (table + 1e-10).log()).sum(1))
    close(negentropy, torch.stack(rows, 1).detach(), rtol=1e-9)
    assert torch.equal(best, probs.argmax(-1))


def test_code_statistics_have_the_right_gradient() -> None:
    x, embedding = projections(10)
    assert torch.autograd.gradcheck(lambda *inputs: statistics(*inputs)[:2], (x, embedding))


def test_codes_are_the_nearest_and_of_equals_the_first() -> None:
    quantiser = Quantiser(4, TINY.model_copy(update={"codes": 4})).double()
    with torch.no_grad():
        quantiser.embedding.copy_(torch.tensor([[5.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [1.0, 0.0]]))
    x = torch.tensor([[0.9, 0.3], [0.0, 0.0], [4.0, 0.0]], dtype=torch.float64).expand(3, -1, -1)
    assert quantiser.codes(x).tolist() == [[1, 1, 0]] * 3


@pytest.mark.parametrize("codes", [7, 64, 96])
def test_the_first_maximum_is_the_arg_max(codes: int) -> None:
    values = torch.randint(4, (200, codes)).float()
    assert torch.equal(codebooks.first_maximum(values), values.argmax(-1))


def quantiser_with_usage(usage: list[list[float]]) -> Quantiser:
    quantiser = Quantiser(4, TINY.model_copy(update={"codebooks": len(usage), "codes": len(usage[0])})).double()
    quantiser.usage.copy_(torch.tensor(usage))
    return quantiser


def test_reset_replaces_exactly_the_rarely_used_codes_by_projections_of_their_codebook() -> None:
    quantiser = quantiser_with_usage([[0.0, 24.0, 25.0, 51.0], [0.0, 0.0, 0.0, 0.0]])
    before = quantiser.embedding.detach().clone()
    x = torch.randn(2, 9, 2, dtype=torch.float64)
    assert quantiser.reset(x, Single(), seed=1, step=30, below=1.0) == 6
    changed = (quantiser.embedding != before).any(-1)
    assert changed.tolist() == [[True, True, False, False], [True] * 4]
    assert quantiser.usage.tolist() == [[0, 0, 25, 51], [0, 0, 0, 0]]
    for book in range(2):
        for code in quantiser.embedding[book][changed[book]]:
            assert (x[book] == code).all(-1).any()


def test_reset_is_keyed_by_seed_and_step() -> None:
    x = torch.randn(1, 500, 2, dtype=torch.float64)

    def codes(seed: int, step: int) -> Tensor:
        quantiser = quantiser_with_usage([[0.0] * 8])
        quantiser.reset(x, Single(), seed=seed, step=step, below=1.0)
        return quantiser.embedding.detach()

    assert torch.equal(codes(0, 30), codes(0, 30))
    assert not torch.equal(codes(0, 30), codes(0, 60))
    assert not torch.equal(codes(0, 30), codes(1, 30))


def test_usage_adds_up_over_steps_and_is_saved() -> None:
    quantiser = quantiser_with_usage([[1.0, 2.0]])
    quantiser.count_usage(torch.tensor([[0.5, 0.25]]), Single())
    assert quantiser.state_dict()["usage"].tolist() == [[1.5, 2.25]]


@pytest.mark.parametrize("codes", [32, 33, 1024])
def test_a_worker_without_cells_has_no_nearest_codes(codes: int) -> None:
    assert codebooks.first_maximum(torch.zeros(0, codes)).shape == (0,)
