"""Noise depends on seed, stage, step and block only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from ndreamer_dist.model import noise as noises
from ndreamer_dist.model.noise import StepNoise
from tests.model.helpers import TINY, random_batch, share_of

Draw = Callable[..., StepNoise]


def parts(noise: StepNoise) -> dict[str, Tensor]:
    cells_first = {"exponentials": 1, "marks": 1, "latent": 1, "keys": 0}
    return {name: getattr(noise, name).movedim(axis, 0) for name, axis in cells_first.items()}


DRAWS = pytest.mark.parametrize("draw", [noises.draw, noises.draw_on_device], ids=["host", "device"])


@DRAWS
@pytest.mark.parametrize("blocks", [(3, 2), (1, 1, 0, 3), (5, 0)], ids=str)
def test_a_cell_has_the_same_noise_whoever_owns_it(blocks: tuple[int, ...], draw: Draw) -> None:
    batch = random_batch(300)
    whole = parts(draw(batch, TINY, 0))
    shares = [parts(draw(share_of(batch, blocks, rank), TINY, 0)) for rank in range(len(blocks))]
    for name, values in whole.items():
        assert torch.equal(torch.cat([share[name] for share in shares]), values), name


def test_threads_do_not_change_the_noise() -> None:
    batch = random_batch(300)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = parts(noises.draw(batch, TINY, 0))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(value, alone[name]) for name, value in parts(noises.draw(batch, TINY, 0)).items())


@DRAWS
@pytest.mark.parametrize("change", ["seed", "step", "stage"])
def test_noise_changes_with_its_key(change: str, draw: Draw) -> None:
    batch = random_batch(128)
    first = draw(batch, TINY, 0)
    other = draw(
        replace(batch, step=2 if change == "step" else 1), TINY, 1 if change == "seed" else 0,
        stage="other" if change == "stage" else "train",
    )  # fmt: skip
    assert not any((value == parts(other)[name]).any(0).all() for name, value in parts(first).items())


@DRAWS
def test_blocks_differ(draw: Draw) -> None:
    noise = draw(random_batch(128), TINY, 0)
    assert not torch.equal(noise.latent[:, :64], noise.latent[:, 64:])


@DRAWS
def test_noise_has_its_distributions(draw: Draw) -> None:
    noise = draw(random_batch(2000), TINY, 0)
    expected = {"exponentials": (1, 1), "marks": (1 / 2, 1 / 12), "latent": (0, 1), "keys": (1 / 2, 1 / 12)}
    for name, (mean, variance) in expected.items():
        values = getattr(noise, name)
        assert abs(values.mean() - mean) < 5 * (variance / values.numel()) ** 0.5, name
        assert abs(values.var() - variance) < 0.05 * variance, name
    assert noise.exponentials.min() > 0
    assert noise.marks.max() < 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_draws_the_same_noise_for_every_share() -> None:
    batch = random_batch(300, dtype=torch.float32)
    on_gpu = [replace(part, x=part.x.cuda()) for part in (batch, share_of(batch, (3, 2), 1))]
    whole, share = (parts(noises.draw(part, TINY, 0)) for part in on_gpu)
    assert all(value.is_cuda and torch.equal(value[192:], share[name]) for name, value in whole.items())


@pytest.mark.parametrize("temperature", [0.001, 0.01, 0.05, 0.1])
def test_the_race_is_long_enough_for_single_precision(temperature: float) -> None:
    rng = np.random.default_rng(0)
    times = rng.standard_exponential((200_000, noises.race_draws(temperature)), np.float32).cumsum(1)
    last_weight = (times[:, 0] / times[:, -1]) ** (1 / temperature)
    assert (last_weight > np.exp(-17)).mean() < 1e-4


def test_a_warm_assignment_has_one_number_per_code() -> None:
    batch = random_batch(100)
    noise = noises.draw(batch, TINY.model_copy(update={"temperature": 1.0}), 0)
    assert noise.exponentials.shape == (TINY.codebooks, 100, TINY.codes)
    assert noise.marks.shape[-1] == 0
    assert noise.exponentials.min() > 0
