"""All codebooks as one batched computation: projections in, quantised vectors and statistics of the codes out.

Three ideas make it fast.

1. The squared norm of x is the same for all codes of a codebook. One product of x with the codes gives the logits
   `2 x e - |e|^2`, which have the same softmax, Gumbel-softmax and arg-max as `-||x - e||^2`.
2. The information losses need the probabilities only summed over the cells of a cluster, so the whole (codebooks,
   cells, codes) tensor is never held. `CodeStatistics` computes a few codebooks at a time, as many as suit the cache of
   a CPU or the launch times of a GPU, and computes their probabilities again in the backward pass.
3. The Gumbel-softmax is drawn as a race.

**The race.** Gumbel noise is `-log E` with E standard exponential, so a Gumbel-softmax weighs code j by
`t_j ** (-1/tau)`, where `t_j = E_j / exp(l_j)` is the first arrival of a Poisson process of rate `exp(l_j)`. The J
processes together are one process whose arrivals belong to code j with probability p_j, independently. It is enough to
draw that one process: waiting times, and a code from p for each arrival. At tau = 0.01 a code that arrives at 1.2 times
the first arrival time has a weight below the rounding error of float32, so nine arrivals replace 1024 Gumbel draws from
the same distribution. Arrival times do not depend on the codes, so codes are drawn only for arrivals that are early
enough to have a weight: 1.2 per cell.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ndreamer_dist.model import noise as noises
from ndreamer_dist.model.batch import Segments
from ndreamer_dist.model.batch_norm import BatchNorm
from ndreamer_dist.model.collectives import ByBooks, Collective, gradient_of
from ndreamer_dist.model.noise import StepNoise
from ndreamer_dist.settings import CodeChoice, ModelSettings

LOG_FLOOR = 1e-10
"""Added to probabilities inside the logarithm of an entropy (METHOD section 3)."""
NO_WEIGHT = 1 / 64
"""Assignment weights below this fraction of the floating-point epsilon are set to 0."""
CODE_BLOCK = 32
"""Codes per block of the two-level arg-max (block maxima first) and the two-level draw (block sums first)."""
LOG2_E = 1 / math.log(2)
"""Probabilities are computed as powers of 2, in half the time of powers of e."""
BYTES_AT_ONCE = {"cpu": 2**23, "cuda": 2**30}
"""Size of the (codebooks, cells, codes) tensor held at a time: what fits a CPU's cache, or keeps a GPU busy."""


@dataclass(frozen=True)
class Arrivals:
    """The arrivals that can have a weight, sorted by race and inside a race by time.

    Attributes
    ----------
    race
        (arrivals,), index of the race: codebook * cells + cell.
    marks
        (arrivals,), uniform on [0, 1): selects the code of the arrival.
    weights
        (arrivals,), weight relative to the first arrival of the race.
    starts
        Start of each codebook's arrivals, and the end of the last one's.
    shape
        Codebooks, cells, and the largest number of arrivals of a race.
    whole
        Whether every race has that number of arrivals, including those without weight.
    """

    race: Tensor
    marks: Tensor
    weights: Tensor
    starts: Sequence[int]
    shape: torch.Size
    whole: bool = False

    def of_books(self, books: slice) -> slice:
        """Return the slice of the arrivals of some codebooks."""
        return slice(self.starts[books.start], self.starts[books.stop])


@dataclass(frozen=True)
class Quantised:
    """Quantised vectors of a worker's cells, and statistics of the codes, some of them over the global mini-batch.

    If workers share the codebooks, everything but the projections covers the worker's own codebooks only.

    Attributes
    ----------
    vectors
        q, (codebooks, cells, dim).
    projections
        x after batch norm, (codebooks, cells, dim).
    nearest
        e*, the embedding of the most probable code, (codebooks, cells, dim).
    usage
        Sum of the assignments of the worker's cells, (codebooks, codes), without gradient.
    negentropy
        (codebooks, rows), `sum over codes of p log p` of each row of the joint tables (`Segments`), where a row is
        divided by the number of cells of its group; over the global mini-batch.
    group_probs
        (codebooks, groups, codes), sum of the probabilities of a group's cells, over the global mini-batch.
    """

    vectors: Tensor
    projections: Tensor
    nearest: Tensor
    usage: Tensor
    negentropy: Tensor
    group_probs: Tensor


@torch.no_grad()
def perplexities(quantised: Quantised) -> Tensor:
    """Return the perplexity of each codebook in the mini-batch, (codebooks,): exp(entropy of mean probabilities)."""
    probs = quantised.group_probs.double().sum(1)  # (codebooks, codes)
    probs = probs / probs.sum(-1, keepdim=True)
    return torch.special.entr(probs).sum(-1).exp()


class Quantiser(nn.Module):
    """The K codebooks (METHOD section 2): `x_k = BN(W_k h)`, assignment by distance to the codes.

    Attributes
    ----------
    at_once
        Number of codebooks computed together, by default `books_at_once`; the result does not depend on it.
    usage
        (codebooks, codes) float64, sum of the assignments since the start of training.
    """

    usage: Tensor

    def __init__(self, width: int, settings: ModelSettings) -> None:
        super().__init__()
        self.temperature = settings.temperature
        self.at_once: int | None = None
        books, dim = settings.codebooks, settings.code_dim
        bound = 1 / math.sqrt(width)
        self.projection = nn.Parameter(torch.empty(books, dim, width).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(books, dim).uniform_(-bound, bound))
        self.norm = BatchNorm(books * dim)
        self.embedding = nn.Parameter(torch.randn(books, settings.codes, dim))
        self.register_buffer("usage", torch.zeros(books, settings.codes, dtype=torch.float64))

    def project(self, h: Tensor, collective: Collective | None) -> Tensor:
        """Project h, (cells, width), to x, (codebooks, cells, dim); without a collective, by running statistics."""
        flat = functional.linear(h, self.projection.flatten(0, 1), self.bias.flatten())
        normed: Tensor = self.norm(flat, collective)
        return normed.unflatten(1, self.bias.shape).transpose(0, 1).contiguous()

    def forward(self, h: Tensor, segments: Segments, noise: StepNoise, collective: Collective) -> Quantised:
        """Quantise h, (cells, width), with noise, and compute the statistics that the losses need."""
        projections = self.project(h, collective)
        mine = collective.books(len(projections))
        x, noise = collective.own_books(projections), noise.of_books(mine)
        embedding = self.embedding if len(x) == len(projections) else self.embedding[mine]
        columns = code_columns(embedding)
        at_once = self.at_once or books_at_once(x, columns)
        arrivals = in_time(noise.exponentials, noise.marks, self.temperature, keep_all=x.is_cuda)
        negentropy, group_probs, best, codes = CodeStatistics.apply(
            augment(x), columns, segments, arrivals, collective, at_once
        )
        if noise.marks.shape[-1]:
            vectors, usage = race(x, embedding, arrivals, codes, self.temperature)
        else:
            vectors, usage = gumbel_softmax(x, embedding, noise.exponentials, self.temperature)
        nearest = look_up(embedding, best)
        return Quantised(vectors, projections, nearest, usage, negentropy, group_probs)

    def codes(self, x: Tensor) -> Tensor:
        """Return the most probable code of each x, (codebooks, cells); the first one of ties (METHOD section 8)."""
        if x.is_cuda:  # one large operation is faster than one per codebook
            return first_maximum(augment(x) @ code_columns(self.embedding).mT)[0]
        pairs = zip(augment(x), code_columns(self.embedding), strict=True)
        return torch.stack([first_maximum(book @ codes.T)[0] for book, codes in pairs])

    @torch.no_grad()
    def vectors(self, x: Tensor, choice: CodeChoice, generator: torch.Generator | None = None) -> Tensor:
        """Return the quantised vectors of projections x at inference, (codebooks, cells, dim).

        `choice` is `EmbedSettings.codes`; `generator` draws `sampled` codes.
        """
        if choice == "expected":
            return self.probabilities(x) @ self.embedding
        if choice == "probable":
            return look_up(self.embedding, self.codes(x))
        drawn = [torch.multinomial(book, 1, generator=generator)[:, 0] for book in self.probabilities(x).cpu()]
        return look_up(self.embedding, torch.stack(drawn).to(x.device))

    def probabilities(self, x: Tensor) -> Tensor:
        """Return p, (codebooks, cells, codes), of projections x: the softmax of negative squared distances."""
        return (augment(x) @ code_columns(self.embedding).mT).softmax(-1)

    @torch.no_grad()
    def join(self, quantised: Quantised, workers: ByBooks) -> Quantised:
        """Gather the gradient of the codes and their usage from workers that share the codebooks."""
        own, gradient = workers.books(len(self.embedding)), gradient_of(self.embedding)
        shares = torch.cat([gradient[own], quantised.usage[..., None].to(gradient.dtype)], -1)
        everyone = workers.joined(shares, len(self.embedding))
        self.embedding.grad = everyone[..., :-1].contiguous()
        return replace(quantised, usage=everyone[..., -1])

    @torch.no_grad()
    def count_usage(self, used: Tensor, collective: Collective) -> None:
        """Add a step's assignments, summed over workers, to the usage since the start of training."""
        self.usage += collective.all_sum(used.double())

    @torch.no_grad()
    def reset(self, projections: Tensor, collective: Collective, *, seed: int, step: int, below: float) -> Tensor:
        """Re-initialise the codes whose share of their codebook's usage is less than `below / codes`.

        Each becomes the projection of a cell drawn with replacement from the global mini-batch, and its usage becomes 0
        (METHOD sections 4, 8). All codes of a codebook without any usage are re-initialised. All workers re-initialise
        the same codes from the same cells.

        Parameters
        ----------
        projections
            `Quantised.projections` of the step, (codebooks, own cells, dim).

        Returns
        -------
        The number of re-initialised codes, ().
        """
        books, codes = self.usage.shape
        unused = self.usage < below / codes * self.usage.sum(1, keepdim=True)
        unused |= self.usage.sum(1, keepdim=True) == 0
        cells = collective.all_gather_rows(projections.detach().transpose(0, 1).contiguous())
        drawn = noises.block_generator(seed, "reset", step).integers(len(cells), size=(books, codes))
        rows = torch.from_numpy(drawn).to(cells.device, non_blocking=True)
        replacement = cells[rows, torch.arange(books, device=cells.device)[:, None]]
        self.embedding.copy_(torch.where(unused[..., None], replacement, self.embedding))
        self.usage.masked_fill_(unused, 0)
        return unused.sum()


def augment(x: Tensor) -> Tensor:
    """Return (2x, 1), whose product with `code_columns` gives the logits `2 x e - |e|^2`."""
    return torch.cat([2 * x, torch.ones_like(x[..., :1])], -1)


def code_columns(embedding: Tensor) -> Tensor:
    """Return (e, -|e|^2) of every code, (codebooks, codes, dim + 1)."""
    return torch.cat([embedding, -embedding.square().sum(-1, keepdim=True)], -1)


def look_up(embedding: Tensor, codes: Tensor) -> Tensor:
    """Return the embeddings, (codebooks, ..., dim), of codes, (codebooks, ...)."""
    return functional.embedding(_flat_codes(embedding, codes), embedding.flatten(0, 1))


def _flat_codes(embedding: Tensor, codes: Tensor) -> Tensor:
    """Return the indices of codes among the codes of all codebooks."""
    books, size = embedding.shape[:2]
    first = torch.arange(0, books * size, size, device=codes.device)
    return codes + first.view(-1, *[1] * (codes.dim() - 1))


def gumbel_softmax(x: Tensor, embedding: Tensor, exponentials: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return q, (codebooks, cells, dim), and usage, (codebooks, codes), given one exponential per code."""
    logits = augment(x) @ code_columns(embedding).mT
    assignment = ((logits - exponentials.log()) / temperature).softmax(-1)
    return assignment @ embedding, assignment.detach().sum(1)


def in_time(exponentials: Tensor, marks: Tensor, temperature: float, *, keep_all: bool = False) -> Arrivals:
    """Return the arrivals early enough to have a weight: the first of each race, and rarely more.

    Parameters
    ----------
    exponentials, marks
        As in `StepNoise`, (codebooks, cells, draws).
    keep_all
        Keep arrivals without weight, too; the number of arrivals is then known without waiting for a GPU.
    """
    books, cells, draws = marks.shape
    times = exponentials[..., :draws].cumsum(-1)
    weights = ((times[..., :1] / times).log_() / temperature).exp_().flatten()
    if keep_all:
        chosen = torch.arange(marks.numel(), device=marks.device)
        starts = [book * cells * draws for book in range(books + 1)]
    else:
        chosen = (weights >= torch.finfo(weights.dtype).eps * NO_WEIGHT).nonzero().squeeze(1)
        starts = torch.searchsorted(chosen, torch.arange(books + 1, device=chosen.device) * (cells * draws)).tolist()
    race = torch.div(chosen, max(draws, 1), rounding_mode="floor")
    if keep_all:
        return Arrivals(race, marks.flatten(), weights, starts, marks.shape, whole=True)
    return Arrivals(race, marks.flatten()[chosen], weights[chosen], starts, marks.shape)


def race(x: Tensor, embedding: Tensor, arrivals: Arrivals, codes: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return q, (codebooks, cells, dim), and usage, (codebooks, codes), of the Gumbel-softmax drawn as a race.

    Parameters
    ----------
    codes
        (arrivals,), the code of each arrival, drawn from p.
    """
    vectors: Tensor
    of_race = arrivals.shape[2] if arrivals.whole else 0
    vectors, usage = Race.apply(x, embedding, race_weights(arrivals, codes), arrivals.race, codes, temperature, of_race)
    return vectors, usage


def race_weights(arrivals: Arrivals, codes: Tensor) -> Tensor:
    """Return the assignment weight of each arrival, (arrivals,); later arrivals of the same code in a race get 0."""
    race, weights = arrivals.race, arrivals.weights.clone()
    if arrivals.whole:
        of_race = codes.view(-1, arrivals.shape[2])
        again = (of_race[:, :, None] == of_race[:, None, :]).tril(-1).any(-1).flatten()
        weights.masked_fill_(again, 0)
    else:
        for lag in range(1, arrivals.shape[2]):
            again = (race[lag:] == race[:-lag]) & (codes[lag:] == codes[:-lag])
            weights[lag:].masked_fill_(again, 0)
    totals = summed_by_race(weights, race, arrivals.shape[:2].numel(), arrivals.shape[2] if arrivals.whole else 0)
    weights.div_(totals[race])
    return weights.masked_fill_(weights < torch.finfo(weights.dtype).eps * NO_WEIGHT, 0)


def summed_by_race(values: Tensor, race: Tensor, races: int, of_race: int) -> Tensor:
    """Sum values, (arrivals, ...), over the arrivals of each race: (races, ...).

    If every race has `of_race` arrivals (0: their number varies), they are added in a fixed order; `index_add_` on a
    GPU adds by atomics, in no fixed order.
    """
    if of_race:
        return values.unflatten(0, (races, of_race)).sum(1)
    return values.new_zeros((races, *values.shape[1:])).index_add_(0, race, values)


class Race(torch.autograd.Function):
    """`q = sum of a_j e_j` over the arrivals with weight, with the gradient of the Gumbel-softmax.

    The noise of an arrival, `log t + l`, is constant, so `da/dl = (diag(a) - a a^T) / tau`.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, embedding: Tensor, weights: Tensor, race: Tensor, codes: Tensor, temperature: float,
        of_race: int,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Return q and usage."""
        numbered = torch.div(race, max(x.shape[1], 1), rounding_mode="floor") * embedding.shape[1] + codes
        terms = functional.embedding(numbered, embedding.flatten(0, 1)) * weights[:, None]
        vectors = summed_by_race(terms, race, x.shape[:2].numel(), of_race)
        usage = weights.new_zeros(embedding.shape[:2].numel()).index_add_(0, numbered, weights)
        ctx.save_for_backward(x, embedding, race, numbered, weights)
        ctx.temperature, ctx.of_race = temperature, of_race
        usage = usage.view(embedding.shape[:2])
        ctx.mark_non_differentiable(usage)
        return vectors.view_as(x), usage

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None, None, None, None]:
        """Return the gradients of x and embedding."""
        x, embedding, race, numbered, weight = ctx.saved_tensors
        upstream = functional.embedding(race, gradients[0].flatten(0, 1))
        e = functional.embedding(numbered, embedding.flatten(0, 1))
        pull = (upstream * e).sum(1) * weight
        total = summed_by_race(pull, race, x.shape[:2].numel(), ctx.of_race)
        d_logit = (pull - weight * total[race])[:, None] / ctx.temperature
        apart = 2 * (functional.embedding(race, x.flatten(0, 1)) - e)
        d_x = summed_by_race(d_logit * 2 * e, race, x.shape[:2].numel(), ctx.of_race)
        d_terms = d_logit * apart + weight[:, None] * upstream
        d_e = torch.zeros_like(embedding).flatten(0, 1).index_add_(0, numbered, d_terms)
        return d_x.view_as(x), d_e.view_as(embedding), None, None, None, None, None


class CodeStatistics(torch.autograd.Function):
    """Statistics of the code probabilities, computed a few codebooks at a time.

    Inputs are `augment(x)`, `code_columns(embedding)`, the rows of the joint tables, the arrivals of the race, the
    collective, and how many codebooks to hold at a time. Outputs are `Quantised.negentropy`, `Quantised.group_probs`,
    the most probable codes, (codebooks, cells), and the arrivals' codes drawn from p, (arrivals,). Tables are summed
    over workers. Every worker computes the same loss from them, so the sum over workers of their gradients is the
    worker's own gradient times the number of workers.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        columns: Tensor,
        segments: Segments,
        arrivals: Arrivals,
        collective: Collective,
        at_once: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Compute the statistics, holding the probabilities of `at_once` codebooks at a time."""
        logits, powers = _buffers(x, columns, at_once)
        sizes = rows_per_group(segments).to(x.dtype)[segments.row_group, None]
        parts, slopes, log_totals = [], [], []
        for books in runs(len(x), at_once):
            held = slice(books.stop - books.start)
            torch.bmm(x[books] * LOG2_E, columns[books].mT, out=logits[held])
            best, top = first_maximum(logits[held])
            powers_held = torch.sub(logits[held], top[..., None], out=powers[held]).exp2_()
            below = block_sums(powers_held).cumsum(-1)
            total = below[..., -1]
            mine = arrivals.of_books(books)
            codes = draw_codes(
                powers_held, below, arrivals.race[mine] - books.start * x.shape[1], arrivals.marks[mine]
            )  # fmt: skip
            table = collective.all_sum(segment_sums(powers_held, segments.order, segments.offsets, total.reciprocal()))
            groups = segment_sums(table, segments.low_order, segments.group_offsets)
            negentropy, slope = row_negentropy(table.div_(sizes))
            parts.append((negentropy, groups, best, codes))
            slopes.append(slope)
            log_totals.append(top + total.log2())
        ctx.save_for_backward(x, columns, torch.cat(log_totals), *slopes)
        ctx.segments, ctx.world, ctx.at_once = segments, collective.world, at_once
        negentropy, group_probs, best, codes = (torch.cat(part) for part in zip(*parts, strict=True))
        ctx.mark_non_differentiable(best, codes)
        return negentropy, group_probs, best, codes

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        """Compute the probabilities again, and return the gradients of x and columns."""
        x, columns, log_totals, *slopes = ctx.saved_tensors
        segments: Segments = ctx.segments
        sizes = rows_per_group(segments).to(x.dtype)
        d_rows = gradients[0] * (ctx.world / sizes[segments.row_group])
        d_groups = gradients[1] * ctx.world
        # The logarithm of the total enters as one more column, so one product gives the log-probabilities.
        log_x = torch.cat([x * LOG2_E, -log_totals[..., None]], -1)
        log_columns = torch.cat([columns, torch.ones_like(columns[..., :1])], -1)
        probs, d_logits = _buffers(x, columns, ctx.at_once)
        d_x, d_columns = [], []
        for books, slope in zip(runs(len(x), ctx.at_once), slopes, strict=True):
            held = slice(books.stop - books.start)
            d_table = torch.cat([slope * d_rows[books, :, None], d_groups[books]], 1)
            torch.bmm(log_x[books], log_columns[books].mT, out=probs[held]).exp2_()
            d_probs = cell_sums(d_table, segments.rows_of_cell)
            softmax_gradient(d_probs, probs[held], out=d_logits[held])
            d_x.append(torch.bmm(columns[books].mT, d_logits[held].mT).mT)
            d_columns.append(torch.bmm(x[books].mT, d_logits[held]).mT)
        return torch.cat(d_x), torch.cat(d_columns), None, None, None, None


def books_at_once(x: Tensor, columns: Tensor) -> int:
    """Return how many codebooks' logits, (cells, codes) each, fit into `BYTES_AT_ONCE`; at least one, at most all."""
    one = x.shape[1] * columns.shape[1] * x.element_size()
    return min(max(BYTES_AT_ONCE.get(x.device.type, BYTES_AT_ONCE["cpu"]) // max(one, 1), 1), len(x))


def runs(count: int, at_once: int) -> Iterator[slice]:
    """Cut `count` codebooks into runs of `at_once`; the last may be shorter."""
    return (slice(first, min(first + at_once, count)) for first in range(0, count, at_once))


def _buffers(x: Tensor, columns: Tensor, at_once: int) -> tuple[Tensor, Tensor]:
    """Return two (codebooks, cells, codes) tensors to reuse: allocating fresh pages takes longer than the sums."""
    shape = (min(at_once, len(x)), x.shape[1], columns.shape[1])
    return x.new_empty(shape), x.new_empty(shape)


def softmax_gradient(upstream: Tensor, probs: Tensor, *, out: Tensor) -> Tensor:
    """Return `p (g - sum g p)`, the gradient of a softmax over the last dimension, written to `out` in one pass."""
    # torch has no public function for it; elementary operations would take three passes over the probabilities.
    gradient: Tensor = torch.ops.aten._softmax_backward_data.out(upstream, probs, -1, probs.dtype, grad_input=out)
    return gradient


def _blocks(values: Tensor) -> Tensor:
    """Reshape (..., codes) to (..., blocks, codes of a block); one block if `CODE_BLOCK` does not divide the codes."""
    codes = values.shape[-1]
    size = CODE_BLOCK if codes % CODE_BLOCK == 0 else codes
    return values.unflatten(-1, (codes // size, size))


def block_sums(values: Tensor) -> Tensor:
    """Return the sums of blocks of codes, (..., blocks)."""
    return _blocks(values).sum(-1)


def first_maximum(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return `values.argmax(-1)`, the first one of ties, and the maximum.

    Three times as fast as `argmax`, since block maxima are vectorised and index searches are not.
    """
    blocks = _blocks(values)
    maxima = blocks.amax(-1)
    block = maxima.argmax(-1)
    inside = _rows_of(blocks, block).argmax(-1)
    return block * blocks.shape[-1] + inside, maxima.gather(-1, block[..., None]).squeeze(-1)


def _rows_of(blocks: Tensor, block: Tensor) -> Tensor:
    """Return the block with index `block`, (...,), of each row of blocks, (..., blocks, size)."""
    first = torch.arange(block.numel(), device=block.device).view_as(block) * blocks.shape[-2]
    return functional.embedding(first + block, blocks.flatten(0, -2))


def segment_sums(values: Tensor, order: Tensor, offsets: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return the weighted sums of `values[:, order]` over segments that start at `offsets`, (books, segments, codes).

    Parameters
    ----------
    values
        (books, rows, codes).
    weights
        (books, rows); by default 1.
    """
    books, rows, codes = values.shape
    if len(order) == 0:
        return values.new_zeros((books, len(offsets), codes))
    number = torch.arange(books, device=order.device)[:, None]
    sums = functional.embedding_bag(
        (order + number * rows).flatten(), values.flatten(0, 1), (offsets + number * len(order)).flatten(), mode="sum",
        per_sample_weights=None if weights is None else weights[:, order].flatten(),
    )  # fmt: skip
    return sums.view(books, len(offsets), codes)


def cell_sums(table: Tensor, rows_of_cell: Tensor) -> Tensor:
    """Sum the rows of each cell, (cells, rows of a cell), of a table, (books, rows, codes): (books, cells, codes)."""
    books, rows, codes = table.shape
    number = torch.arange(books, device=table.device)[:, None, None]
    numbered = (rows_of_cell + number * rows).flatten(0, 1)
    return functional.embedding_bag(numbered, table.flatten(0, 1), mode="sum").view(books, len(rows_of_cell), codes)


def row_negentropy(probs: Tensor) -> tuple[Tensor, Tensor]:
    """Return `sum of p log(p + 1e-10)` of each row of probs, (..., rows, codes), and its derivative.

    Returns
    -------
    The sums, (..., rows), and the derivative by each entry of probs, `log(p + 1e-10) + p / (p + 1e-10)`.
    """
    logs = probs + LOG_FLOOR
    slope = probs / logs
    slope.add_(logs.log_())
    return logs.mul_(probs).sum(-1), slope


def rows_per_group(segments: Segments) -> Tensor:
    """Return the number of cells of each group, (groups,), float64, which is the sum of the group's probabilities."""
    sizes = segments.row_cells.new_zeros(len(segments.group_offsets))
    low = slice(segments.low_rows)
    return sizes.index_add_(0, segments.row_group[low], segments.row_cells[low])


def draw_codes(powers: Tensor, below: Tensor, race: Tensor, marks: Tensor) -> Tensor:
    """Draw one code per mark, (arrivals,), with probabilities in proportion to the powers of the mark's race.

    Parameters
    ----------
    powers, below
        (books, cells, codes), unnormalised probabilities, and the cumulative sums of their `block_sums`, (books, cells,
        blocks).
    race, marks
        (arrivals,): index of the race, book * cells + cell, and a uniform number in [0, 1).
    """
    blocks = _blocks(powers)
    summed = functional.embedding(race, below.flatten(0, 1))
    mark = _short_of(marks, 1)[:, None] * summed[:, -1:]
    block = (summed <= mark).sum(-1, keepdim=True).clamp_max(blocks.shape[-2] - 1)
    before = functional.pad(summed, (1, 0)).gather(1, block)
    rows = functional.embedding(race * blocks.shape[-2] + block.squeeze(1), blocks.flatten(0, -2))
    inside = rows.cumsum(-1)
    code = (inside <= _short_of(mark - before, inside[:, -1:])).sum(-1)
    return block.squeeze(1) * blocks.shape[-1] + code


def _short_of(mark: Tensor, end: Tensor | float) -> Tensor:
    """Keep a mark below `end`: rounding could move it past the last code with a probability above 0."""
    short = 1 - torch.finfo(mark.dtype).eps
    return torch.minimum(mark, short * end) if isinstance(end, Tensor) else mark.clamp_max(short * end)
