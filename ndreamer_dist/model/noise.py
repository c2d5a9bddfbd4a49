"""All randomness of a training step, drawn so that it depends neither on workers nor on threads.

A mini-batch is cut into blocks of `NOISE_ROWS` cells. Each block has its own generator, keyed by (seed, stage, step,
block), and a worker draws the blocks it owns. On a CPU the numbers come from numpy's SFC64, in threads over blocks. On a
GPU they are made from their places and the step's key (`draw_on_device`): other numbers, the same ones on every GPU.

The Gumbel noise of the code assignment is drawn as a *race* (see `codebooks.race`). At a low temperature only the first
few codes to arrive can have a weight. So a few numbers per cell and codebook, `race_draws`, replace one per code.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ndreamer_dist.model.batch import MiniBatch
from ndreamer_dist.settings import NOISE_ROWS, ModelSettings

Noise = NDArray[np.float32]

RACE_TEMPERATURE = 0.1
"""Temperature up to which the assignment is drawn as a race; above it there is one number per code."""
SMALLEST_EXPONENTIAL = 2.0**-25
"""Exponentials are drawn on a grid of about 2**-24 that includes 0, whose logarithm must stay finite."""


@dataclass(frozen=True)
class StepNoise:
    """The random numbers of one worker's cells in one step.

    Attributes
    ----------
    exponentials
        (codebooks, cells, draws), standard exponential: waiting times of the race, or one per code (no `marks` then).
    marks
        (codebooks, cells, draws), uniform on [0, 1): which code each arrival is. No draws above `RACE_TEMPERATURE`.
    latent
        (2, cells, z), standard normal: eps and eta of the latent sample.
    keys
        (cells, global cells), uniform: the order in which a cell's positives and negatives are taken.
    """

    exponentials: Tensor
    marks: Tensor
    latent: Tensor
    keys: Tensor

    def of_books(self, books: slice) -> StepNoise:
        """Return the same for some of the codebooks."""
        return replace(self, exponentials=self.exponentials[books], marks=self.marks[books])


def block_generator(seed: int, stage: str, step: int, block: int = 0) -> np.random.Generator:
    """Return the generator of one block of one step of a stage; blocks of a step are independent streams."""
    key = (zlib.crc32(stage.encode()), step, block)
    return np.random.Generator(np.random.SFC64(np.random.SeedSequence(seed, spawn_key=key)))


def race_draws(temperature: float) -> int:
    """Return how many arrivals of the race are needed, or 0 where one number per code is.

    A code that arrives at f = exp(17 temperature) times the first arrival has weight exp(-17), less than float32's
    rounding. n further arrivals all come before that with probability (1 - 1/f)**n; one in a million is accepted.
    """
    if temperature > RACE_TEMPERATURE:
        return 0
    earlier = -math.expm1(-17 * temperature)
    return 1 + math.ceil(math.log(1e-6) / math.log(earlier))


def draw(batch: MiniBatch, model: ModelSettings, seed: int, *, stage: str = "train") -> StepNoise:
    """Return the noise of the cells of `batch`, on their device and in their floating type (METHOD sections 2, 3)."""
    draws = race_draws(model.temperature)
    if batch.x.is_cuda:
        return draw_on_device(batch, model, seed, stage=stage)

    def block_noise(rng: np.random.Generator) -> tuple[Noise, ...]:
        # A short block draws for all its rows, so that a cell's noise never depends on how many cells follow it.
        latent = rng.standard_normal((NOISE_ROWS, 2, model.latent), np.float32)
        waits = rng.standard_exponential((NOISE_ROWS, model.codebooks, draws or model.codes), np.float32)
        marks = rng.random((NOISE_ROWS, model.codebooks, draws), np.float32)
        return latent, waits, marks, rng.random((NOISE_ROWS, batch.cells), np.float32)

    parts = _per_block(block_noise, [block_generator(seed, stage, batch.step, block) for block in batch.blocks])
    shapes = ((2, model.latent), (model.codebooks, draws or model.codes), (model.codebooks, draws), (batch.cells,))
    latent, waits, marks, keys = (
        _rows([part[i] for part in parts], shape, batch.x) for i, shape in enumerate(shapes)
    )  # fmt: skip
    return StepNoise(
        exponentials=waits.transpose(0, 1).contiguous().clamp_min_(SMALLEST_EXPONENTIAL),
        marks=marks.transpose(0, 1).contiguous(),
        latent=latent.transpose(0, 1),
        keys=keys,
    )


def draw_on_device(batch: MiniBatch, model: ModelSettings, seed: int, *, stage: str = "train") -> StepNoise:
    """Return what `draw` does, other numbers from the same distributions, drawn where the cells of `batch` are.

    Each pair of numbers is made from its place (cell, column) and the step's key by whole-number operations, so the
    numbers depend neither on the device nor on which cells a worker owns.
    """
    draws, like = race_draws(model.temperature), batch.x
    widths = (2 * model.latent, model.codebooks * (draws or model.codes), model.codebooks * draws, batch.cells)
    width = sum(widths) + sum(widths) % 2
    start = batch.first_block * NOISE_ROWS if len(like) else 0
    places = torch.arange(start * width // 2, (start + len(like)) * width // 2, device=like.device)
    uniform = uniforms(places, step_key(seed, stage, batch.step) if batch.key is None else batch.key).view(
        len(like), width
    )
    latent, waits, marks, keys = (
        part.unflatten(1, shape)
        for part, shape in zip(
            uniform[:, : sum(widths)].split(widths, 1),
            ((2, model.latent), (model.codebooks, -1), (model.codebooks, draws), (batch.cells,)),
            strict=True,
        )
    )
    exponentials = waits.double().neg_().log1p_().neg_().float()
    return StepNoise(
        exponentials=exponentials.transpose(0, 1).contiguous().clamp_min_(SMALLEST_EXPONENTIAL).to(like.dtype),
        marks=marks.transpose(0, 1).contiguous().to(like.dtype),
        latent=_normals(latent.flatten(1)).view(latent.shape).transpose(0, 1).to(like.dtype),
        keys=keys.to(like.dtype),
    )


def uniforms(places: Tensor, key: int | Tensor) -> Tensor:
    """Return two uniform numbers in [0, 1), multiples of 2**-24, for each place: (2 places,) float32.

    SplitMix64 with the place as its counter: 64 bits of the key and the place, of which 48 are used.
    """
    mixed = places * _signed(0x9E3779B97F4A7C15) + key
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ _shifted(mixed, shift)) * _signed(factor)
    mixed = mixed ^ _shifted(mixed, 31)
    return (torch.stack([_shifted(mixed, 40), _shifted(mixed, 8) & (2**24 - 1)], -1) * 2.0**-24).flatten()


def _shifted(bits: Tensor, by: int) -> Tensor:
    """Shift 64 bits to the right; torch's own shift would draw the sign along."""
    return (bits >> by) & (2 ** (64 - by) - 1)


def _signed(bits: int) -> int:
    """Return the int64 of some 64 bits."""
    return bits - 2**64 if bits >= 2**63 else bits


def _normals(uniform: Tensor) -> Tensor:
    """Return standard normal numbers of as many uniform ones, (cells, even number), by Box and Muller.

    In float64 and then rounded, so that the last bit of a logarithm or a cosine, which devices compute otherwise, does not show.
    """
    first, second = uniform.double().unflatten(1, (-1, 2)).unbind(-1)
    radius, angle = (first.neg().log1p() * -2).sqrt(), second * (2 * math.pi)
    return torch.stack([radius * angle.cos(), radius * angle.sin()], -1).flatten(1).float()


def step_key(seed: int, stage: str, step: int) -> int:
    """Return the key of a step's noise on a GPU, 63 bits."""
    sequence = np.random.SeedSequence(seed, spawn_key=(zlib.crc32(stage.encode()), step))
    return int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))


def _per_block(
    work: Callable[[np.random.Generator], tuple[Noise, ...]], generators: Sequence[np.random.Generator]
) -> list[tuple[Noise, ...]]:
    with ThreadPoolExecutor(max_workers=torch.get_num_threads()) as pool:
        return list(pool.map(work, generators))


def _rows(blocks: list[Noise], shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Join blocks, cut them to the cells of `like`, and bring them to its device and type."""
    joined = np.concatenate(blocks) if blocks else np.empty((0, *shape), np.float32)
    return torch.from_numpy(joined[: len(like)]).to(device=like.device, dtype=like.dtype)
