"""The network: encoder, codebooks, head and decoder (METHOD section 2).

Input: a `MiniBatch` and its noise. Output: `Outputs`, from which `losses.total_loss` computes the loss. At inference
`embed` computes the effect modifiers of any cells, deterministically.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from ndreamer_dist.model.batch import Labels, MiniBatch, gather_labels
from ndreamer_dist.model.batch_norm import BatchNorm
from ndreamer_dist.model.codebooks import Quantised, Quantiser
from ndreamer_dist.model.collectives import Collective
from ndreamer_dist.model.noise import StepNoise
from ndreamer_dist.settings import CodeChoice, ModelSettings

SMALLEST_VARIANCE = 1e-6


@dataclass(frozen=True)
class Outputs:
    """The result of a training step's forward pass for a worker's cells.

    Attributes
    ----------
    mean, variance
        (cells, z); the mean is the effect modifier.
    reconstruction
        (cells, genes), from one sample of the latent.
    quantised
        The quantised vectors, and statistics of the codes.
    labels
        Labels of the global mini-batch.
    """

    mean: Tensor
    variance: Tensor
    reconstruction: Tensor
    quantised: Quantised
    labels: Labels


class NDreamerNetwork(nn.Module):
    """The model of METHOD section 2.

    Parameters
    ----------
    genes, conditions
        Number of genes and of conditions.
    batch_levels
        Number of codes of each batch covariate; empty without a batch covariate.
    settings
        Widths of the layers.
    nonnegative
        Whether expression has no negative values; a final ReLU then keeps the reconstruction nonnegative.
    seed
        Seed of the initial parameters; torch's global generator keeps its state.

    Attributes
    ----------
    bf16
        Whether training takes the matrix products of head and decoder in bfloat16. Everything else keeps the precision
        of the parameters: mean and variance, codebooks, losses, inference, and the encoder. (An encoder in bfloat16
        changed 1 to 3 % of the code assignments, which moved single losses by up to 10 %.)
    """

    def __init__(
        self, genes: int, conditions: int, batch_levels: tuple[int, ...], settings: ModelSettings,
        *, nonnegative: bool = True, seed: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.settings = settings
        self.conditions = conditions
        self.nonnegative = nonnegative
        self.bf16 = False
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.encoder = Encoder((genes, *settings.encoder))
            self.quantiser = Quantiser(settings.encoder[-1], settings)
            self.head = MomentsHead(settings.codebooks * settings.code_dim, settings.latent)
            self.decoder = Decoder(settings.latent, settings.decoder, genes, conditions, batch_levels)

    def forward(self, batch: MiniBatch, noise: StepNoise, collective: Collective) -> Outputs:
        """Run the forward pass of a training step on a worker's share of the mini-batch."""
        labels, dtype = gather_labels(batch, collective), batch.x.dtype
        quantised: Quantised = self.quantiser(self.encoder(batch.x, collective), labels.segments, noise, collective)
        vectors = collective.all_books(quantised.vectors, len(quantised.projections))
        with self._products(batch.x.device):
            mean, variance = self.head(_side_by_side(vectors), collective)
        epsilon, eta = noise.latent
        sample = mean + variance.sqrt() * epsilon + self.settings.latent_noise * eta
        with self._products(batch.x.device):
            reconstruction = self._decode(sample, batch.condition, batch.batch).to(dtype)
        return Outputs(mean, variance, reconstruction, quantised, labels)

    def _products(self, device: torch.device) -> torch.autocast:
        return torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.bf16)

    @torch.no_grad()
    def embed(self, x: Tensor, choice: CodeChoice = "probable", generator: torch.Generator | None = None) -> Tensor:
        """Return the effect modifier, (cells, z), of expression x, (cells, genes), without noise (METHOD section 8).

        `choice` says how codes are chosen, by default the most probable one; `generator` draws `sampled` codes.
        """
        return self.infer(self.project(x), choice, generator)[0]

    @torch.no_grad()
    def project(self, x: Tensor) -> Tensor:
        """Return the projections, (codebooks, cells, dim), of expression x, with the running statistics."""
        return self.quantiser.project(self.encoder(x, None), None)

    @torch.no_grad()
    def infer(
        self, projections: Tensor, choice: CodeChoice = "probable", generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return mean and variance, (cells, z), of projections; see `embed`."""
        vectors = self.quantiser.vectors(projections, choice, generator)
        mean, variance = self.head(_side_by_side(vectors), None)
        return mean, variance

    @torch.no_grad()
    def reconstruct(self, mean: Tensor, condition: Tensor, batch: Tensor) -> Tensor:
        """Decode effect modifiers to expression, (cells, genes), under the given condition and batch codes."""
        return self._decode(mean, condition, batch)

    def _decode(self, latent: Tensor, condition: Tensor, batch: Tensor) -> Tensor:
        decoded: Tensor = self.decoder(latent, condition, batch)
        return functional.relu(decoded) if self.nonnegative else decoded


class Encoder(nn.Module):
    """Map expression, (cells, genes), to h, (cells, width): Linear-BN-ReLU for each width but the last, then Linear."""

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.layers = _linears(widths)
        self.norms = nn.ModuleList(BatchNorm(width) for width in widths[1:-1])

    def forward(self, x: Tensor, collective: Collective | None) -> Tensor:
        """Return h; without a collective, use the running statistics."""
        for layer, norm in zip(self.layers[:-1], self.norms, strict=True):
            x = functional.relu(norm(layer(x), collective))
        h: Tensor = self.layers[-1](x)
        return h


class MomentsHead(nn.Module):
    """Map concatenated quantised vectors, (cells, codebooks * dim), to mean and variance, (cells, z)."""

    def __init__(self, width: int, latent: int) -> None:
        super().__init__()
        self.merge = nn.Linear(width, 2 * latent)
        self.norm_in = BatchNorm(2 * latent)
        self.widen = nn.Linear(2 * latent, 8 * latent)
        self.narrow = nn.Linear(8 * latent, 2 * latent)
        self.norm_out = BatchNorm(2 * latent)
        self.mean = nn.Linear(2 * latent, latent)
        self.log_variance = nn.Linear(2 * latent, latent)

    def forward(self, q: Tensor, collective: Collective | None) -> tuple[Tensor, Tensor]:
        """Return mean and variance; without a collective, use the running statistics."""
        y = self.norm_in(functional.relu(self.merge(q)), collective)
        inner = self.narrow(functional.gelu(self.widen(y)))
        y = functional.relu(y + self.norm_out(inner, collective))
        # The losses take correlations of both, and the variance hardly varies: rounding to bfloat16 would change them.
        with torch.autocast(y.device.type, enabled=False):
            return self.mean(y), self.log_variance(y).exp().clamp_min(SMALLEST_VARIANCE)


class Decoder(nn.Module):
    """Map a latent sample, (cells, z), with condition and batch codes, to (cells, genes) before the last ReLU."""

    def __init__(
        self, latent: int, widths: Sequence[int], genes: int, conditions: int, batch_levels: Sequence[int]
    ) -> None:
        super().__init__()
        self.condition = nn.Embedding(conditions, widths[0])
        self.batch = nn.ModuleList(nn.Embedding(levels, widths[0]) for levels in batch_levels)
        self.layers = _linears((latent, *widths, genes))

    def forward(self, latent: Tensor, condition: Tensor, batch: Tensor) -> Tensor:
        """Return expression, (cells, genes), of condition codes, (cells,), and batch codes, (cells, covariates)."""
        condition, batch = (codes.to(latent.device, non_blocking=True) for codes in (condition, batch))
        y = self.layers[0](latent) + self.condition(condition)
        for embedding, code in zip(self.batch, batch.unbind(1), strict=True):
            y = y + embedding(code)
        for layer in self.layers[1:]:
            y = layer(functional.relu(y))
        decoded: Tensor = y
        return decoded


def _linears(widths: Sequence[int]) -> nn.ModuleList:
    return nn.ModuleList(nn.Linear(before, after) for before, after in itertools.pairwise(widths))


def _side_by_side(vectors: Tensor) -> Tensor:
    """Concatenate the codebooks of each cell: (codebooks, cells, dim) to (cells, codebooks * dim)."""
    return vectors.transpose(0, 1).flatten(1)
