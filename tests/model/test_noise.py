"""Noise depends on seed, stage, step and block alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from ndreamer_dist.model import noise as noises
from ndreamer_dist.model.noise import StepNoise
from tests.model.helpers import TINY, random_batch, share_of


def parts(noise: StepNoise) -> dict[str, Tensor]:
    cells_first = {"exponentials": 1, "marks": 1, "latent": 1, "keys": 0}
    return {name: getattr(noise, name).movedim(axis, 0) for name, axis in cells_first.items()}


@pytest.mark.parametrize("blocks", [(3, 2), (1, 1, 0, 3), (5, 0)], ids=str)
def test_a_cell_has_the_same_noise_whoever_owns_it(blocks: tuple[int, ...]) -> None:
    batch = random_batch(300)
    whole = parts(noises.draw(batch, TINY, 0))
    shares = [parts(noises.draw(share_of(batch, blocks, rank), TINY, 0)) for rank in range(len(blocks))]
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


@pytest.mark.parametrize("change", ["seed", "step", "stage"])
def test_noise_changes_with_its_key(change: str) -> None:
    batch = random_batch(128)
    first = noises.draw(batch, TINY, 0)
    other = noises.draw(
        replace(batch, step=2 if change == "step" else 1), TINY, 1 if change == "seed" else 0,
        stage="other" if change == "stage" else "train",
    )  # fmt: skip
    assert not any((value == parts(other)[name]).any(0).all() for name, value in parts(first).items())


def test_blocks_differ() -> None:
    noise = noises.draw(random_batch(128), TINY, 0)
    assert not torch.equal(noise.latent[:, :64], noise.latent[:, 64:])


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
