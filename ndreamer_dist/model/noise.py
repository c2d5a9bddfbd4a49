"""All random numbers of a training step, independent of the number of workers and threads.

A mini-batch is cut into blocks of `NOISE_ROWS` cells. On a CPU each block has its own SFC64 generator, keyed by (seed,
stage, step, block); a worker draws the blocks that it owns, in threads. On a GPU a counter-based generator computes
each number from its position and the step's key (`draw_on_device`). CPU and GPU numbers differ; all GPUs give the same
ones.

The Gumbel noise of the code assignment is drawn as a *race* (see `codebooks`). At a low temperature only the first few
codes to arrive can have a weight, so `race_draws` numbers per cell and codebook replace one number per code.
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
"""Highest temperature at which the assignment is drawn as a race; above it, one number per code is drawn."""
SMALLEST_EXPONENTIAL = 2.0**-25
"""Lower bound of exponentials: their grid of about 2**-24 includes 0, and their logarithm must be finite."""


@dataclass(frozen=True)
class StepNoise:
    """The random numbers of one worker's cells in one step.

    Attributes
    ----------
    exponentials
        (codebooks, cells, draws), standard exponential: waiting times of the race; above `RACE_TEMPERATURE` one per
        code.
    marks
        (codebooks, cells, draws), uniform on [0, 1): select the code of each arrival. No draws above
        `RACE_TEMPERATURE`.
    latent
        (2, cells, z), standard normal: eps and eta of the latent sample.
    keys
        (cells, global cells), uniform: the triplet loss takes the positives and negatives of the smallest keys.
    """

    exponentials: Tensor
    marks: Tensor
    latent: Tensor
    keys: Tensor

    def of_books(self, books: slice) -> StepNoise:
        """Return the noise of some of the codebooks."""
        return replace(self, exponentials=self.exponentials[books], marks=self.marks[books])


def block_generator(seed: int, stage: str, step: int, block: int = 0) -> np.random.Generator:
    """Return the generator of one block of a step; every (seed, stage, step, block) has an independent stream."""
    key = (zlib.crc32(stage.encode()), step, block)
    return np.random.Generator(np.random.SFC64(np.random.SeedSequence(seed, spawn_key=key)))


def race_draws(temperature: float) -> int:
    """Return how many arrivals of the race to draw, or 0 if one number per code is drawn instead.

    An arrival at f = exp(17 temperature) times the first arrival time has weight exp(-17), below the rounding error of
    float32. All of n further arrivals come before that with probability (1 - 1/f)**n; n makes it at most 1e-6.
    """
    if temperature > RACE_TEMPERATURE:
        return 0
    earlier = -math.expm1(-17 * temperature)
    return 1 + math.ceil(math.log(1e-6) / math.log(earlier))


def draw(batch: MiniBatch, model: ModelSettings, seed: int, *, stage: str = "train") -> StepNoise:
    """Return the noise of the cells of `batch`, with the device and dtype of `batch.x` (METHOD sections 2, 3)."""
    draws = race_draws(model.temperature)
    if batch.x.is_cuda:
        return draw_on_device(batch, model, seed, stage=stage)

    def block_noise(rng: np.random.Generator) -> tuple[Noise, ...]:
        # A short block draws numbers for all `NOISE_ROWS` rows, so a cell's noise does not depend on the cells after
        # it.
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
    """Return noise of the same distributions as `draw`, computed on the device of `batch.x`.

    Integer operations on the step's key and a number's position (cell, column) give each pair of numbers, so the
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
    """Return two uniform numbers in [0, 1), multiples of 2**-24, for each place: (2 * places,) float32.

    SplitMix64 with the place as its counter; 48 of its 64 bits are used.
    """
    mixed = places * _signed(0x9E3779B97F4A7C15) + key
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ _shifted(mixed, shift)) * _signed(factor)
    mixed = mixed ^ _shifted(mixed, 31)
    return (torch.stack([_shifted(mixed, 40), _shifted(mixed, 8) & (2**24 - 1)], -1) * 2.0**-24).flatten()


def _shifted(bits: Tensor, by: int) -> Tensor:
    """Shift 64 bits to the right and fill with zeros; torch's own shift fills with the sign bit."""
    return (bits >> by) & (2 ** (64 - by) - 1)


def _signed(bits: int) -> int:
    """Reinterpret an unsigned 64-bit number as int64."""
    return bits - 2**64 if bits >= 2**63 else bits


def _normals(uniform: Tensor) -> Tensor:
    """Turn uniform numbers, (cells, even number), into as many standard normal ones by the Box-Muller transform.

    Computed in float64 and rounded to float32: devices differ in the last bit of a logarithm or cosine.
    """
    first, second = uniform.double().unflatten(1, (-1, 2)).unbind(-1)
    radius, angle = (first.neg().log1p() * -2).sqrt(), second * (2 * math.pi)
    return torch.stack([radius * angle.cos(), radius * angle.sin()], -1).flatten(1).float()


def step_key(seed: int, stage: str, step: int) -> int:
    """Return the 63-bit key of a step's noise on a GPU."""
    sequence = np.random.SeedSequence(seed, spawn_key=(zlib.crc32(stage.encode()), step))
    return int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))


def _per_block(
    work: Callable[[np.random.Generator], tuple[Noise, ...]], generators: Sequence[np.random.Generator]
) -> list[tuple[Noise, ...]]:
    with ThreadPoolExecutor(max_workers=torch.get_num_threads()) as pool:
        return list(pool.map(work, generators))


def _rows(blocks: list[Noise], shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Concatenate blocks, cut them to the cells of `like`, and convert them to its device and dtype."""
    joined = np.concatenate(blocks) if blocks else np.empty((0, *shape), np.float32)
    return torch.from_numpy(joined[: len(like)]).to(device=like.device, dtype=like.dtype)
