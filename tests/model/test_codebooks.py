"""Codebooks: the race is a Gumbel-softmax, statistics equal literal ones, resets and usage do what METHOD says."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from ndreamer_dist.model import codebooks
from ndreamer_dist.model import noise as noises
from ndreamer_dist.model.batch import gather_labels
from ndreamer_dist.model.codebooks import Arrivals, CodeStatistics, Quantiser
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


def race_noise(
    x: Tensor, embedding: Tensor, temperature: float, seed: int = 0, *, keep_all: bool = False
) -> tuple[Arrivals, Tensor]:
    rng = np.random.default_rng(seed)
    shape = (*x.shape[:2], race_draws(temperature))
    probs = logits_of(x, embedding).softmax(-1).detach()
    marks, waits = torch.from_numpy(rng.random(shape)), torch.from_numpy(rng.standard_exponential(shape))
    arrivals = codebooks.in_time(waits, marks, temperature, keep_all=keep_all)
    below = codebooks.block_sums(probs).cumsum(-1)
    return arrivals, codebooks.draw_codes(probs, below, arrivals.race, arrivals.marks)


def dense_noise(arrivals: Arrivals, codes: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return codes and times of arrivals, (codebooks, cells, draws); missing arrivals have infinite times."""
    books, cells, draws = arrivals.shape
    dense_codes = torch.zeros(books * cells, draws, dtype=torch.int64)
    times = torch.full((books * cells, draws), torch.inf, dtype=torch.float64)
    for race in range(books * cells):
        at = (arrivals.race == race).nonzero().squeeze(1)
        dense_codes[race, : len(at)] = codes[at]
        times[race, : len(at)] = arrivals.weights[at] ** -temperature
    return dense_codes.view(books, cells, draws), times.view(books, cells, draws)


@pytest.mark.parametrize("temperature", [0.01, 0.03, 0.1])
@pytest.mark.parametrize("keep_all", [False, True], ids=["in_time", "all"])
def test_the_race_has_the_value_and_gradient_of_its_gumbel_softmax(temperature: float, keep_all: bool) -> None:
    x, embedding = projections(40)
    arrivals, codes = race_noise(x, embedding, temperature, keep_all=keep_all)
    found, usage = codebooks.race(x, embedding, arrivals, codes, temperature)
    logits = logits_of(x, embedding)
    dense = dense_noise(arrivals, codes, temperature)
    assignment = torch.stack([literal_gumbel(*parts, temperature) for parts in zip(logits, *dense, strict=True)])
    close(found, (assignment @ embedding).detach(), rtol=1e-10)
    close(usage, assignment.sum(1).detach(), rtol=1e-10)
    upstream = torch.randn_like(found)
    ours = torch.autograd.grad(found, (x, embedding), upstream)
    theirs = torch.autograd.grad(assignment @ embedding, (x, embedding), upstream)
    for left, right in zip(ours, theirs, strict=True):
        close(left, right, rtol=1e-8, atol=1e-10)


def test_arrivals_that_come_too_late_change_nothing() -> None:
    x, embedding = projections(300)
    early, every = (race_noise(x, embedding, 0.01, keep_all=keep_all) for keep_all in (False, True))
    assert len(early[1]) < 0.6 * len(every[1])
    for left, right in zip(*(codebooks.race(x, embedding, *noise, 0.01) for noise in (early, every)), strict=True):
        close(left, right.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("codes", [6, 32, 96])
def test_codes_are_drawn_where_their_marks_fall(codes: int) -> None:
    powers = torch.rand(2, 50, codes, dtype=torch.float64) ** 8
    powers[..., -3:] = 0
    marks = torch.rand(2, 50, dtype=torch.float64)
    marks[:, :10], marks[:, 10:20] = 0, 1 - 2**-53
    drawn = codebooks.draw_codes(powers, codebooks.block_sums(powers).cumsum(-1), torch.arange(100), marks.flatten())
    drawn, summed = drawn.view(2, 50), powers.cumsum(-1)
    assert (powers.gather(2, drawn[..., None]) > 0).all()
    expected = (summed <= marks[..., None] * summed[..., -1:]).sum(-1)
    assert torch.equal(drawn[:, 20:], expected[:, 20:])
    assert (drawn[:, :10] == 0).all()


def test_the_race_and_the_gumbel_softmax_have_the_same_distribution() -> None:
    cells, temperature = 20_000, 0.1
    x, embedding = (side.detach() for side in projections(1))
    x = x.expand(-1, cells, -1)
    raced, _ = codebooks.race(x, embedding, *race_noise(x, embedding, temperature), temperature)
    exponentials = torch.from_numpy(np.random.default_rng(1).standard_exponential((BOOKS, cells, CODES)))
    dense, _ = codebooks.gumbel_softmax(x, embedding, exponentials, temperature)
    # The first and second moments of q depend on how often each code wins and on how the weight is distributed.
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
    waits = torch.tensor([[[1.0, 0.01, 0.01], [1.0, 0.02, 0.02]]])
    arrivals = codebooks.in_time(waits, torch.zeros_like(waits), 0.1)
    weights = codebooks.race_weights(arrivals, torch.tensor([3, 3, 1, 1, 3, 1]))
    assert weights[1] == weights[5] == 0
    close(weights[2] / weights[0], 1.02**-10)
    close(weights[4] / weights[3], 1.02**-10)
    close(weights.view(2, 3).sum(1), 1)


def statistics(x: Tensor, embedding: Tensor, at_once: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    segments = gather_labels(random_batch(x.shape[1]), Single()).segments
    none = torch.zeros(BOOKS, x.shape[1], 0, dtype=torch.float64)
    found: tuple[Tensor, Tensor, Tensor, Tensor] = CodeStatistics.apply(
        codebooks.augment(x), codebooks.code_columns(embedding), segments, codebooks.in_time(none, none, 0.01), Single(),
        at_once,
    )  # fmt: skip
    return found


@pytest.mark.parametrize("at_once", [1, BOOKS])
def test_code_statistics_equal_one_hot_products(at_once: int) -> None:
    x, embedding = projections(100)
    batch = random_batch(100)
    negentropy, group_probs, best, _ = statistics(x, embedding, at_once)
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


@pytest.mark.parametrize("at_once", [1, BOOKS])
def test_code_statistics_have_the_right_gradient(at_once: int) -> None:
    x, embedding = projections(10)
    assert torch.autograd.gradcheck(lambda *inputs: statistics(*inputs, at_once)[:2], (x, embedding))


@pytest.mark.parametrize("at_once", [2, 3], ids=["the_last_run_is_short", "all"])
@pytest.mark.parametrize("temperature", [0.01, 0.5], ids=["race", "one_number_per_code"])
def test_however_many_codebooks_are_computed_at_once_the_step_is_the_same(at_once: int, temperature: float) -> None:
    settings, batch = TINY.model_copy(update={"temperature": temperature}), random_batch(150)
    noise, segments = noises.draw(batch, settings, 0), gather_labels(batch, Single()).segments

    def step(held: int) -> list[Tensor]:
        torch.manual_seed(0)
        quantiser, h = Quantiser(5, settings).double(), torch.randn(150, 5, dtype=torch.float64, requires_grad=True)
        quantiser.at_once = held
        found = quantiser(h, segments, noise, Single())
        outputs = [found.vectors, found.nearest, found.negentropy, found.group_probs]
        loss = torch.stack([part.square().sum() for part in outputs]).sum()
        return [*outputs, found.usage, *torch.autograd.grad(loss, [h, *quantiser.parameters()])]

    for one, some in zip(step(1), step(at_once), strict=True):
        close(some, one.detach(), rtol=1e-10, atol=1e-12)


def test_a_cpu_holds_what_its_cache_does_and_at_least_one_codebook() -> None:
    assert [
        codebooks.books_at_once(torch.empty(32, cells, 9), torch.empty(32, 1024, 9)) for cells in (64, 2048, 99_999)
    ] == [32, 1, 1]


def test_codes_are_the_nearest_and_of_equals_the_first() -> None:
    quantiser = Quantiser(4, TINY.model_copy(update={"codes": 4})).double()
    with torch.no_grad():
        quantiser.embedding.copy_(torch.tensor([[5.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [1.0, 0.0]]))
    x = torch.tensor([[0.9, 0.3], [0.0, 0.0], [4.0, 0.0]], dtype=torch.float64).expand(3, -1, -1)
    assert quantiser.codes(x).tolist() == [[1, 1, 0]] * 3


@pytest.mark.parametrize("codes", [7, 64, 96])
def test_the_first_maximum_is_the_arg_max(codes: int) -> None:
    values = torch.randint(4, (200, codes)).float()
    assert torch.equal(codebooks.first_maximum(values)[0], values.argmax(-1))
    assert torch.equal(codebooks.first_maximum(values)[1], values.amax(-1))


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
    assert codebooks.first_maximum(torch.zeros(0, codes))[0].shape == (0,)
