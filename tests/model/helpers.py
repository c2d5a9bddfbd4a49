"""Inputs for the tests of the model, and a literal implementation of the method as reference.

`literal_loss` follows METHOD sections 2 and 3 word by word: a loop over codebooks, squared distances as broadcast
differences, joint tables as products of one-hot matrices, losses inside groups as loops over groups and cells.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from ndreamer_dist.model.batch import MiniBatch
from ndreamer_dist.model.network import NDreamerNetwork
from ndreamer_dist.model.noise import StepNoise
from ndreamer_dist.settings import NOISE_ROWS, LossSettings, ModelSettings

GOLDEN = Path(__file__).parents[1] / "golden"
GENES = 12
CONDITIONS = 2
TINY = ModelSettings(encoder=(10, 9, 8), codebooks=3, codes=16, code_dim=2, latent=4, decoder=(6, 7))


def golden(name: str) -> dict[str, NDArray[np.generic]]:
    """Return the reference arrays of `golden/NAME.npz`."""
    with np.load(GOLDEN / f"{name}.npz") as stored:
        return dict(stored)


def close(found: Tensor | float, expected: object, rtol: float = 1e-4, atol: float = 1e-6) -> None:
    """Assert equality within the tolerance of METHOD's reference values."""
    found = found.detach().cpu().numpy() if isinstance(found, Tensor) else found
    np.testing.assert_allclose(found, expected, rtol=rtol, atol=atol)


def random_batch(cells: int = 300, *, dtype: torch.dtype = torch.float64, seed: int = 0, copies: int = 10) -> MiniBatch:
    """Return a mini-batch of 3 donors x 2 platforms x 2 conditions, a group of one cell, and some copied cells."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((cells, GENES)).clip(0)
    condition, donor, platform = (
        rng.integers(CONDITIONS, size=cells),
        rng.integers(3, size=cells),
        rng.integers(2, size=cells),
    )
    low, high = rng.integers(3, size=cells), rng.integers(4, size=cells)
    group = (donor * 2 + platform) * CONDITIONS + condition
    group[cells // 2] = 99
    copied = rng.integers(cells, size=(2, copies))
    for labels in (x, condition, donor, platform, low, high, group):
        labels[copied[1]] = labels[copied[0]]
    donor[group == 99] = 3
    codes = [torch.from_numpy(labels) for labels in (condition, np.stack([donor, platform], 1), group, low, high)]
    return MiniBatch(torch.from_numpy(x).to(dtype), *codes, first_block=0, step=1, cells=cells)


def share_of(batch: MiniBatch, blocks: tuple[int, ...], rank: int, step: int = 1) -> MiniBatch:
    """Return the share of a worker, where worker r owns `blocks[r]` blocks."""
    first = sum(blocks[:rank])
    rows = slice(first * NOISE_ROWS, (first + blocks[rank]) * NOISE_ROWS)
    parts = (batch.x, batch.condition, batch.batch, batch.group, batch.low, batch.high)
    return MiniBatch(*(part[rows] for part in parts), first_block=first, step=step, cells=batch.cells)


def tiny_network(settings: ModelSettings = TINY, dtype: torch.dtype = torch.float64) -> NDreamerNetwork:
    """Return a small network that fits `random_batch`."""
    return NDreamerNetwork(GENES, CONDITIONS, (4, 2), settings, seed=3).to(dtype)


def literal_entropy(probs: Tensor) -> Tensor:
    """Return `-sum p log(p + 1e-10)` of all entries."""
    return -(probs * (probs + 1e-10).log()).sum()


def literal_nmi(labels: Tensor, probs: Tensor) -> Tensor:
    """Return METHOD's NMI of labels, (cells,), and probs, (codebooks, cells, codes), mean over codebooks."""
    names = labels.unique()
    onehot = (labels[:, None] == names).to(probs.dtype)
    values = []
    for book in probs:
        joint = onehot.T @ book
        joint = joint / joint.sum()
        h_a, h_b, h_ab = literal_entropy(joint.sum(1)), literal_entropy(joint.sum(0)), literal_entropy(joint)
        one_label_one_code = float((h_a + h_b).detach()) < 1e-8
        values.append(h_a * 0 if one_label_one_code else 2 * (h_a + h_b - h_ab) / (h_a + h_b))
    return torch.stack(values).mean()


def literal_neighbourhood(x: Tensor, z: Tensor, low: Tensor, high: Tensor, loss: LossSettings) -> Tensor:
    """Return METHOD's neighbourhood term of one group, mean over its cells."""
    total = z.sum() * 0
    for i in range(len(x) if len(x) > 1 else 0):
        others = [j for j in range(len(x)) if j != i]
        d_x = torch.stack([(x[i] - x[j]).square().sum() for j in others]).sqrt()
        squared = torch.stack([(z[i] - z[j]).square().sum() for j in others])
        d_z = torch.where(squared > 0, squared, 1).sqrt() * (squared > 0)
        k = min(len(others), loss.neighbours) + 1
        near = {int(j) for d in (d_x, d_z) for j in d.detach().float().argsort(stable=True)[:k]}
        picked = torch.tensor(sorted(near))
        p, q = (-d_x[picked] / loss.sigma).softmax(0), (-d_z[picked]).softmax(0)
        cells = torch.tensor(others)[picked]
        second = high[cells] if loss.cross_cluster == "published" else None
        crosses = low[i] != low[cells]
        crosses |= (low[i] != second) if second is not None else (high[i] != high[cells])
        total = total + ((p - q) * (1 + loss.across * crosses)).square().sum()
    return total / len(x)


def literal_triplet(z: Tensor, batch: MiniBatch, keys: Tensor, loss: LossSettings) -> Tensor:
    """Return METHOD's triplet term; positives and negatives are taken in the order of the keys."""
    terms = []
    for i in range(len(z)):
        same = [j for j in range(len(z)) if j != i and batch.group[j] == batch.group[i]]
        alike = [(bool(batch.low[j] == batch.low[i]), bool(batch.high[j] == batch.high[i])) for j in same]
        picks = []
        for wanted in (True, False):
            candidates = [j for j, (low, high) in zip(same, alike, strict=True) if low == high == wanted]
            picks.append(sorted(candidates, key=lambda j: float(keys[i, j])))
        m = min(loss.triplet_pairs, *map(len, picks))
        for p, n in zip(picks[0][:m], picks[1][:m], strict=True):
            apart = (z[i] - z[p]).square().sum() - (z[i] - z[n]).square().sum()
            terms.append(functional.relu(apart + loss.margin))
    return torch.stack(terms).mean() if terms else z.sum() * 0


def literal_correlation(values: Tensor) -> Tensor:
    """Return the mean squared entry of (correlation - I), with 1e-8 added to each variance."""
    centred = values - values.mean(0)
    covariance = centred.T @ centred / (len(values) - 1)
    deviation = (covariance.diagonal() + 1e-8).sqrt()
    return (covariance / deviation / deviation[:, None] - torch.eye(len(deviation))).square().mean()


def literal_gumbel(logits: Tensor, arrivals: Tensor, times: Tensor, temperature: float) -> Tensor:
    """Return the Gumbel-softmax, (cells, codes), with the constant noise of a race, `E_j = t_j exp(l_j)`.

    Codes that do not arrive in the race have an infinite E, and so no weight.
    """
    noise = torch.full_like(logits, torch.inf)
    for late in range(arrivals.shape[1] - 1, -1, -1):
        at = arrivals[:, late, None]
        noise.scatter_(1, at, times[:, late, None] * logits.detach().exp().gather(1, at))
    return ((logits - noise.log()) / temperature).softmax(-1)


def literal_forward(
    network: NDreamerNetwork, batch: MiniBatch, noise: StepNoise
) -> tuple[list[Tensor], Tensor, Tensor, Tensor, Tensor]:
    """Return probabilities per codebook, mean, variance, reconstruction and the commitment term over K."""
    net = network

    def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt() * weight + bias

    h = batch.x
    for layer, bn in zip(net.encoder.layers[:-1], net.encoder.norms, strict=True):
        h = functional.relu(norm(layer(h), bn.weight, bn.bias))
    h = net.encoder.layers[-1](h)
    quantiser = net.quantiser
    weights, biases = (t.view(quantiser.bias.shape) for t in (quantiser.norm.weight, quantiser.norm.bias))
    probs, vectors, commitment = [], [], h.sum() * 0
    for k, codes in enumerate(quantiser.embedding):
        x = norm(h @ quantiser.projection[k].T + quantiser.bias[k], weights[k], biases[k])
        logits = -(x[:, None] - codes[None]).square().sum(-1)
        p = logits.softmax(-1)
        if noise.marks.shape[-1]:
            below = p.detach().cumsum(-1)
            arrivals = (below[:, None] <= noise.marks[k][..., None] * below[:, None, -1:]).sum(-1)
            a = literal_gumbel(logits, arrivals, noise.exponentials[k].cumsum(-1), quantiser.temperature)
        else:
            a = ((logits - noise.exponentials[k].log()) / quantiser.temperature).softmax(-1)
        q, best = a @ codes, codes[p.argmax(-1)]
        commitment = commitment + (q.detach() - best).square().mean() + 0.25 * (q - best.detach()).square().mean()
        probs.append(p)
        vectors.append(q)
    head = net.head
    y = norm(functional.relu(head.merge(torch.cat(vectors, 1))), head.norm_in.weight, head.norm_in.bias)
    inner = head.narrow(functional.gelu(head.widen(y)))
    y = functional.relu(y + norm(inner, head.norm_out.weight, head.norm_out.bias))
    mean, variance = head.mean(y), head.log_variance(y).exp().clamp_min(1e-6)
    s = mean + variance.sqrt() * noise.latent[0] + net.settings.latent_noise * noise.latent[1]
    decoder = net.decoder
    y = decoder.layers[0](s) + decoder.condition(batch.condition)
    for embedding, code in zip(decoder.batch, batch.batch.T, strict=True):
        y = y + embedding(code)
    for layer in decoder.layers[1:]:
        y = layer(functional.relu(y))
    return probs, mean, variance, functional.relu(y), commitment / len(probs)


def literal_loss(network: NDreamerNetwork, batch: MiniBatch, noise: StepNoise, loss: LossSettings) -> Tensor:
    """Return METHOD's total loss of a mini-batch with one worker, without the clamps."""
    per_book, mean, variance, rebuilt, commitment = literal_forward(network, batch, noise)
    probs = torch.stack(per_book)
    cosine = 1 - (batch.x * rebuilt).sum(1) / (
        batch.x.norm(dim=1).clamp_min(1e-12) * rebuilt.norm(dim=1).clamp_min(1e-12)
    )
    kl = 0.5 * (variance + mean.square() - 1 - variance.log()).sum(1).mean()
    kl = kl + literal_correlation(mean) + literal_correlation(variance)
    independence = sum(literal_nmi(labels, probs) for labels in (batch.condition, *batch.batch.T))
    groups = batch.group.unique()
    dependence = neighbourhood = mean.sum() * 0
    for group in groups:
        inside = batch.group == group
        for labels in (batch.low, batch.high):
            dependence = dependence + literal_nmi(labels[inside], probs[:, inside]) / len(groups)
        cells = (batch.x[inside], mean[inside], batch.low[inside], batch.high[inside])
        neighbourhood = neighbourhood + literal_neighbourhood(*cells, loss) / len(groups)
    return (
        loss.reconstruction * (batch.x - rebuilt).square().mean() + loss.cosine * cosine.mean() + loss.kl * kl
        + loss.independence * independence - loss.dependence / CONDITIONS * dependence
        + loss.triplet * literal_triplet(mean, batch, noise.keys, loss)
        + loss.neighbourhood * neighbourhood + loss.commitment * commitment
    )  # fmt: skip
