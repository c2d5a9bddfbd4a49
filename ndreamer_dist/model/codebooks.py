"""All codebooks as one batched computation: projections in, quantised vectors and information about the codes out.

Three things make it fast. The squared norm of x is the same for all codes of a codebook, so one product of x with the
codes gives logits that softmax, Gumbel-softmax and arg-max cannot tell from `-||x - e||^2`. The information losses
need the probabilities only summed over the cells of a cluster, so the (codebooks, cells, codes) tensor is never held:
`CodeStatistics` walks over codebooks and computes each one's probabilities again on the way back. And the
Gumbel-softmax is drawn as a race.

**The race.** Gumbel noise is `-log E` with E standard exponential, so a Gumbel-softmax weighs code j by `t_j **
(-1/tau)`, where `t_j = E_j / exp(l_j)` is the first arrival of a Poisson process of rate `exp(l_j)`. All J processes
together are one process whose arrivals fall to code j with probability p_j, independently. So it is enough to draw that
one process: waiting times, and a code for each arrival from p. At tau = 0.01 a code that comes 1.2 times as late as
the first has weight below float32's rounding, and nine arrivals stand for 1024 Gumbel draws, from the same distribution.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ndreamer_dist.model import noise as noises
from ndreamer_dist.model.batch import Segments
from ndreamer_dist.model.collectives import Collective
from ndreamer_dist.model.noise import StepNoise
from ndreamer_dist.model.normalise import BatchNorm
from ndreamer_dist.settings import ModelSettings

LOG_FLOOR = 1e-10
"""Added to probabilities inside the logarithm of an entropy (METHOD section 3)."""
NO_WEIGHT = 1 / 64
"""Assignment weights below this share of a rounding are 0."""
MAXIMUM_BLOCK = 32
"""Codes whose maximum is taken together on the way to the arg-max."""


@dataclass(frozen=True)
class Quantised:
    """What the codebooks say about a worker's cells, and, summed over all workers, about the mini-batch.

    Attributes
    ----------
    vectors
        q, (codebooks, cells, dim).
    projections
        x after batch norm, (codebooks, cells, dim).
    nearest
        e*, the most probable code's embedding, (codebooks, cells, dim).
    usage
        Soft assignments of own cells, (codebooks, codes), without gradient.
    negentropy
        (codebooks, rows), `sum over codes of p log p` of each row of the joint tables (`Segments`), where a row is
        divided by the cells of its group; the same on all workers.
    group_probs
        (codebooks, groups, codes), probabilities summed over the cells of a group; the same on all workers.
    """

    vectors: Tensor
    projections: Tensor
    nearest: Tensor
    usage: Tensor
    negentropy: Tensor
    group_probs: Tensor


class Quantiser(nn.Module):
    """The K codebooks (METHOD section 2): `x_k = BN(W_k h)`, assignment by distance to the codes."""

    usage: Tensor

    def __init__(self, width: int, settings: ModelSettings) -> None:
        super().__init__()
        self.temperature = settings.temperature
        books, dim = settings.codebooks, settings.code_dim
        bound = 1 / math.sqrt(width)
        self.projection = nn.Parameter(torch.empty(books, dim, width).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(books, dim).uniform_(-bound, bound))
        self.norm = BatchNorm(books * dim)
        self.embedding = nn.Parameter(torch.randn(books, settings.codes, dim))
        self.register_buffer("usage", torch.zeros(books, settings.codes, dtype=torch.float64))

    def project(self, h: Tensor, collective: Collective | None) -> Tensor:
        """Return x, (codebooks, cells, dim), of h, (cells, width); without collective by the running statistics."""
        flat = functional.linear(h, self.projection.flatten(0, 1), self.bias.flatten())
        normed: Tensor = self.norm(flat, collective)
        return normed.unflatten(1, self.bias.shape).transpose(0, 1).contiguous()

    def forward(self, h: Tensor, segments: Segments, noise: StepNoise, collective: Collective) -> Quantised:
        """Quantise h, (cells, width), with noise, and sum up what the losses need."""
        x = self.project(h, collective)
        negentropy, group_probs, best, arrivals = CodeStatistics.apply(
            augment(x), code_columns(self.embedding), segments, noise.marks, collective
        )
        if noise.marks.shape[-1]:
            vectors, usage = race(x, self.embedding, arrivals, noise.exponentials.cumsum(-1), self.temperature)
        else:
            vectors, usage = gumbel_softmax(x, self.embedding, noise.exponentials, self.temperature)
        nearest = look_up(self.embedding, best)
        return Quantised(vectors, x, nearest, usage, negentropy, group_probs)

    def codes(self, x: Tensor) -> Tensor:
        """Return the most probable code of each x, (codebooks, cells); of equals the first (METHOD section 8)."""
        pairs = zip(augment(x), code_columns(self.embedding), strict=True)
        return torch.stack([first_maximum(book @ codes.T) for book, codes in pairs])

    def probabilities(self, x: Tensor) -> Tensor:
        """Return p, (codebooks, cells, codes), of projections x: softmax of the negative squared distances."""
        return (augment(x) @ code_columns(self.embedding).mT).softmax(-1)

    @torch.no_grad()
    def count_usage(self, used: Tensor, collective: Collective) -> None:
        """Add a step's soft assignments, summed over workers, to the usage counted since the start."""
        self.usage += collective.all_sum(used.double())

    @torch.no_grad()
    def reset(self, projections: Tensor, collective: Collective, *, seed: int, step: int, below: float) -> int:
        """Re-initialise the codes whose share of their codebook's usage is less than `below / codes`.

        Each becomes the projection of a cell of the global mini-batch, drawn with replacement, and its usage 0
        (METHOD sections 4, 8). In a codebook that was never used all codes are re-initialised.

        Parameters
        ----------
        projections
            `Quantised.projections` of the step, (codebooks, own cells, dim).

        Returns
        -------
        How many codes were re-initialised; the same codes, from the same cells, on every worker.
        """
        books, codes = self.usage.shape
        unused = self.usage < below / codes * self.usage.sum(1, keepdim=True)
        unused |= self.usage.sum(1, keepdim=True) == 0
        cells = collective.all_gather_rows(projections.detach().transpose(0, 1).contiguous())
        drawn = noises.generator(seed, "reset", step).integers(len(cells), size=(books, codes))
        rows = torch.from_numpy(drawn).to(cells.device)
        replacement = cells[rows, torch.arange(books, device=cells.device)[:, None]]
        self.embedding.copy_(torch.where(unused[..., None], replacement, self.embedding))
        self.usage.masked_fill_(unused, 0)
        return int(unused.sum())


def augment(x: Tensor) -> Tensor:
    """Return (2x, 1): with `code_columns` one product gives `2 x e - |e|^2`."""
    return torch.cat([2 * x, torch.ones_like(x[..., :1])], -1)


def code_columns(embedding: Tensor) -> Tensor:
    """Return (e, -|e|^2) for every code, (codebooks, codes, dim + 1)."""
    return torch.cat([embedding, -embedding.square().sum(-1, keepdim=True)], -1)


def look_up(embedding: Tensor, codes: Tensor) -> Tensor:
    """Return the embeddings, (codebooks, ..., dim), of codes, (codebooks, ...)."""
    return functional.embedding(_flat_codes(embedding, codes), embedding.flatten(0, 1))


def _flat_codes(embedding: Tensor, codes: Tensor) -> Tensor:
    """Return codes numbered through all codebooks."""
    books, size = embedding.shape[:2]
    first = torch.arange(0, books * size, size, device=codes.device)
    return codes + first.view(-1, *[1] * (codes.dim() - 1))


def gumbel_softmax(x: Tensor, embedding: Tensor, exponentials: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return q, (codebooks, cells, dim), and usage, (codebooks, codes), with one exponential per code."""
    logits = augment(x) @ code_columns(embedding).mT
    assignment = ((logits - exponentials.log()) / temperature).softmax(-1)
    return assignment @ embedding, assignment.detach().sum(1)


def race(x: Tensor, embedding: Tensor, arrivals: Tensor, times: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return q, (codebooks, cells, dim), and usage, (codebooks, codes), of the Gumbel-softmax drawn as a race.

    Parameters
    ----------
    arrivals
        Codes in their order of arrival, (codebooks, cells, draws), drawn from p.
    times
        When they arrive, (codebooks, cells, draws), ascending; only ratios matter.
    """
    vectors: Tensor
    vectors, usage = Race.apply(x, embedding, race_weights(arrivals, times, temperature), arrivals, temperature)
    return vectors, usage


def race_weights(arrivals: Tensor, times: Tensor, temperature: float) -> Tensor:
    """Return the assignment weight of each arrival, (codebooks, cells, draws); only a code's first arrival counts."""
    weights = ((times[..., :1] / times).log_() / temperature).exp_()
    in_order = arrivals.movedim(-1, 0).contiguous()
    for later in range(1, len(in_order)):
        again = (in_order[:later] == in_order[later]).any(0)
        weights[..., later].masked_fill_(again, 0)
    weights.div_(weights.sum(-1, keepdim=True))
    return weights.masked_fill_(weights < torch.finfo(weights.dtype).eps * NO_WEIGHT, 0)


class Race(torch.autograd.Function):
    """`q = sum of a_j e_j` over the few arrivals with weight, differentiable as the Gumbel-softmax is.

    The noise of an arrival, `log t + l`, is held fixed, so `da/dl = (diag(a) - a a^T) / tau`.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, embedding: Tensor, weights: Tensor, arrivals: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """Return q and usage; only arrivals with weight are looked at."""
        kept = weights.flatten().nonzero().squeeze(1)
        cell = torch.div(kept, weights.shape[-1], rounding_mode="floor")
        code = _flat_codes(embedding, arrivals).flatten()[kept]
        weight = weights.flatten()[kept]
        terms = embedding.flatten(0, 1)[code] * weight[:, None]
        vectors = torch.zeros_like(x).flatten(0, 1).index_add_(0, cell, terms)
        usage = weight.new_zeros(embedding.shape[:2].numel()).index_add_(0, code, weight)
        ctx.save_for_backward(x, embedding, cell, code, weight)
        ctx.temperature = temperature
        usage = usage.view(embedding.shape[:2])
        ctx.mark_non_differentiable(usage)
        return vectors.view_as(x), usage

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        """Return the gradients of x and embedding."""
        x, embedding, cell, code, weight = ctx.saved_tensors
        upstream = gradients[0].flatten(0, 1)[cell]
        e = embedding.flatten(0, 1)[code]
        pull = (upstream * e).sum(1) * weight
        total = pull.new_zeros(x.shape[:2].numel()).index_add_(0, cell, pull)
        d_logit = (pull - weight * total[cell])[:, None] / ctx.temperature
        apart = 2 * (x.flatten(0, 1)[cell] - e)
        d_x = torch.zeros_like(x).flatten(0, 1).index_add_(0, cell, d_logit * 2 * e)
        d_terms = d_logit * apart + weight[:, None] * upstream
        d_e = torch.zeros_like(embedding).flatten(0, 1).index_add_(0, code, d_terms)
        return d_x.view_as(x), d_e.view_as(embedding), None, None, None


class CodeStatistics(torch.autograd.Function):
    """What is needed of the probabilities, one codebook at a time: joint tables, the best code, codes drawn from p.

    Inputs are `augment(x)`, `code_columns(embedding)`, the rows of the tables, the marks of the race and the
    collective; outputs are `Quantised.negentropy`, `Quantised.group_probs`, best codes (codebooks, cells) and the
    arrivals (codebooks, cells, draws). Tables are summed over workers here; as every worker computes the same loss
    from them, their gradient summed over workers is the own one times their number.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, columns: Tensor, segments: Segments, marks: Tensor, collective: Collective
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Walk over the codebooks, holding one codebook's probabilities at a time."""
        logits, probs, below = _buffers(x, columns, 3)
        sizes = group_sizes(segments).to(x.dtype)
        parts, tables = [], []
        for book, codes, mark in zip(x, columns, marks, strict=True):
            torch.softmax(torch.mm(book, codes.T, out=logits), -1, out=probs)
            table = collective.all_sum(segment_sums(probs, segments.order, segments.offsets))
            groups = segment_sums(table, segments.low_order, segments.group_offsets)
            table.div_(sizes[segments.row_group, None])
            arrivals = draw_codes(torch.cumsum(probs, -1, out=below), mark)
            parts.append((row_negentropy(table), groups, first_maximum(logits), arrivals))
            tables.append(table)
        ctx.save_for_backward(x, columns, *tables)
        ctx.segments, ctx.world = segments, collective.world
        negentropy, group_probs, best, arrivals = (torch.stack(part) for part in zip(*parts, strict=True))
        ctx.mark_non_differentiable(best, arrivals)
        return negentropy, group_probs, best, arrivals

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        """Return the gradients of x and columns, from probabilities computed again."""
        x, columns, *tables = ctx.saved_tensors
        segments: Segments = ctx.segments
        sizes = group_sizes(segments).to(x.dtype)
        d_rows = gradients[0] * (ctx.world / sizes[segments.row_group])
        d_groups = gradients[1] * ctx.world
        d_x, d_columns = torch.empty_like(x), torch.empty_like(columns)
        logits, probs = _buffers(x, columns, 2)
        d_table = torch.empty_like(torch.cat([tables[0], d_groups[0]]))
        for k, table in enumerate(tables):
            negentropy_gradient(table, d_rows[k], out=d_table[: segments.rows])
            d_table[segments.rows :] = d_groups[k]
            torch.softmax(torch.mm(x[k], columns[k].T, out=logits), -1, out=probs)
            d_probs = functional.embedding_bag(segments.rows_of_cell, d_table, mode="sum")
            d_logits = softmax_gradient(d_probs, probs, out=logits)
            torch.mm(d_logits, columns[k], out=d_x[k])
            d_columns[k] = (x[k].T @ d_logits).T
        return d_x, d_columns, None, None, None


def _buffers(x: Tensor, columns: Tensor, count: int) -> list[Tensor]:
    """Return (cells, codes) tensors to be used for one codebook after the other: fresh pages cost more than sums."""
    return [x.new_empty(x.shape[1], columns.shape[1]) for _ in range(count)]


def softmax_gradient(upstream: Tensor, probs: Tensor, *, out: Tensor) -> Tensor:
    """Return `p (g - sum g p)`, the gradient of a softmax over the last dimension, in one pass and in place."""
    gradient: Tensor = torch.ops.aten._softmax_backward_data.out(upstream, probs, -1, probs.dtype, grad_input=out)
    return gradient


def first_maximum(values: Tensor) -> Tensor:
    """Return what `values.argmax(-1)` does, (cells,), three times as fast: maxima of blocks vectorise, indices do not."""
    cells, codes = values.shape
    if codes % MAXIMUM_BLOCK:
        return values.argmax(-1)
    blocks = values.view(cells, codes // MAXIMUM_BLOCK, MAXIMUM_BLOCK)
    block = blocks.amax(-1).argmax(-1)
    inside = blocks[torch.arange(cells, device=values.device), block].argmax(-1)
    return block * MAXIMUM_BLOCK + inside


def segment_sums(values: Tensor, order: Tensor, offsets: Tensor) -> Tensor:
    """Return the sums of `values[order]`, (rows, codes), over the segments that start at `offsets`."""
    if len(order) == 0:
        return values.new_zeros((len(offsets), values.shape[1]))
    return functional.embedding_bag(order, values, offsets, mode="sum")


def row_negentropy(probs: Tensor) -> Tensor:
    """Return `sum of p log(p + 1e-10)` of each row, (rows,), of probs, (rows, codes)."""
    return (probs + LOG_FLOOR).log_().mul_(probs).sum(-1)


def negentropy_gradient(probs: Tensor, upstream: Tensor, *, out: Tensor) -> Tensor:
    """Return the gradient of `row_negentropy` with respect to probs, given that of its values, (rows,)."""
    floored = probs + LOG_FLOOR
    torch.div(probs, floored, out=out)
    return out.add_(floored.log_()).mul_(upstream[:, None])


def group_sizes(segments: Segments) -> Tensor:
    """Return the cells of each group, (groups,), float64: what the probabilities of a group sum to."""
    sizes = segments.row_cells.new_zeros(len(segments.group_offsets))
    low = slice(segments.low_rows)
    return sizes.index_add_(0, segments.row_group[low], segments.row_cells[low])


def draw_codes(below: Tensor, marks: Tensor) -> Tensor:
    """Return codes, (cells, draws), by uniform marks, (cells, draws), from summed probabilities, (cells, codes)."""
    return torch.searchsorted(below, marks * below[:, -1:], right=True).clamp_(max=below.shape[1] - 1)
