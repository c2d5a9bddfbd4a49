"""Sums and gathers over all training workers, differentiable, with a stand-in for one worker.

Losses and batch norm are written once against `Collective`; the worker chooses the kind when it starts. There are two ways
to share a step.

**By cells** (`Distributed`, for processors). Each worker has a share of the cells. Every worker computes the whole loss, and
the gradient of a parameter is the **mean** over workers of their back-propagated gradients (`average_gradients`). So a sum
whose backward is again the sum over workers is exact, without a factor.

**By codebooks** (`ByBooks`, for GPUs). Each worker has all cells and computes the network on them, as one worker alone
does. Shared is what takes most time there: the codebooks, and the anchors of the losses inside groups. What workers send
each other is then small, of a size that is known, and nothing of it depends on the number of groups: vectors of the cells,
where sharing by cells sends tables of all codes and the gradient of every parameter. A GPU has most of a network's
products done while these would travel. All workers' gradients come out the same, so there is nothing to average.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor


class Collective(Protocol):
    """What model code may ask of the other workers."""

    rank: int
    world: int

    def all_sum(self, tensor: Tensor) -> Tensor:
        """Return the sum over workers; the gradient is summed over workers too."""

    def loss_sum(self, tensor: Tensor) -> Tensor:
        """Return the sum over workers of something from which all workers compute the same loss.

        The gradient that reaches it is then the same on every worker, so their sum needs no communication.
        """

    def all_gather_rows(self, tensor: Tensor) -> Tensor:
        """Return all workers' rows in rank order; row counts may differ. Differentiable where floating."""

    def books(self, count: int) -> slice:
        """Return which of so many codebooks this worker computes."""

    def own_books(self, tensor: Tensor) -> Tensor:
        """Return this worker's codebooks of (codebooks, ...), which all workers have; the gradients are put together."""

    def all_books(self, tensor: Tensor, count: int) -> Tensor:
        """Return all `count` codebooks, (codebooks, ...), of each worker's own; the gradient, equal on all, is cut again."""

    def for_anchors(self, tensor: Tensor) -> Tensor:
        """Return what all workers have, for each to use it for its own anchors; the gradient is summed over workers."""

    def parts_sum(self, tensor: Tensor) -> Tensor:
        """Return the sum over workers of what each has of its own codebooks and anchors; the gradient is passed on."""


class Single:
    """One worker: every sum is what it was given."""

    rank = 0
    world = 1

    def all_sum(self, tensor: Tensor) -> Tensor:
        """Return `tensor`."""
        return tensor

    def loss_sum(self, tensor: Tensor) -> Tensor:
        """Return `tensor`."""
        return tensor

    def all_gather_rows(self, tensor: Tensor) -> Tensor:
        """Return `tensor`."""
        return tensor

    def books(self, count: int) -> slice:
        """Return all."""
        return slice(count)

    def own_books(self, tensor: Tensor) -> Tensor:
        """Return `tensor`."""
        return tensor

    def all_books(self, tensor: Tensor, count: int) -> Tensor:
        """Return `tensor`."""
        del count
        return tensor

    def for_anchors(self, tensor: Tensor) -> Tensor:
        """Return `tensor`."""
        return tensor

    def parts_sum(self, tensor: Tensor) -> Tensor:
        """Return `tensor`."""
        return tensor


class Distributed(Single):
    """Workers of a `torch.distributed` group (the default group where none is given), each with a share of the cells."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.rank = dist.get_rank(group)
        self.world = dist.get_world_size(group)

    def all_sum(self, tensor: Tensor) -> Tensor:
        """Return the sum over workers; the gradient is summed over workers too."""
        summed: Tensor = _AllSum.apply(tensor, self.group)
        return summed

    def loss_sum(self, tensor: Tensor) -> Tensor:
        """Return the sum over workers; the gradient, equal on all of them, is multiplied by their number."""
        summed: Tensor = _LossSum.apply(tensor, partial(_summed, group=self.group), self.world)
        return summed

    def all_gather_rows(self, tensor: Tensor) -> Tensor:
        """Return all workers' rows in rank order; the gradient is summed over workers, each keeps its own rows'."""
        counts = torch.zeros(self.world, dtype=torch.int64, device=tensor.device)
        counts[self.rank] = len(tensor)
        dist.all_reduce(counts, group=self.group)
        rows: Tensor = _GatherRows.apply(tensor, self.group, self.rank, counts.tolist())
        return rows


class ByBooks(Single):
    """Workers of a `torch.distributed` group, each with all cells and a share of the codebooks and anchors.

    Of sums over cells each worker has the whole, so `rank` and `world` are those of one worker alone.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.place = (dist.get_rank(group), dist.get_world_size(group))

    def books(self, count: int) -> slice:
        """Return which of so many codebooks this worker computes; shares differ by one at most."""
        return self._share(count, self.place[0])

    def own_books(self, tensor: Tensor) -> Tensor:
        """Return this worker's codebooks of (codebooks, ...); the gradients of all are put together."""
        own: Tensor = _OwnBooks.apply(tensor, self)
        return own

    def all_books(self, tensor: Tensor, count: int) -> Tensor:
        """Return all `count` codebooks of each worker's own; the gradient, equal on all workers, is cut again."""
        everyone: Tensor = _AllBooks.apply(tensor, self, count)
        return everyone

    def for_anchors(self, tensor: Tensor) -> Tensor:
        """Return `tensor`; its gradient is summed over workers."""
        same: Tensor = _ForAnchors.apply(tensor, self)
        return same

    def parts_sum(self, tensor: Tensor) -> Tensor:
        """Return the sum over workers; the gradient is passed on."""
        summed: Tensor = _LossSum.apply(tensor, self.summed, 1)
        return summed

    def joined(self, tensor: Tensor, count: int) -> Tensor:
        """Return all `count` codebooks of each worker's own, without a gradient."""
        world = self.place[1]
        shares = [self._share(count, rank) for rank in range(world)]
        own, most = len(tensor), max(share.stop - share.start for share in shares)
        padded = tensor.detach().contiguous() if own == most else torch.cat([tensor, tensor[:1]])
        everyone = self.gathered(padded)
        if most * world == count:
            return everyone
        return torch.cat([everyone[rank * most :][: share.stop - share.start] for rank, share in enumerate(shares)])

    def gathered(self, tensor: Tensor) -> Tensor:
        """Return all workers' rows, as many of each, in rank order."""
        everyone = tensor.new_empty((len(tensor) * self.place[1], *tensor.shape[1:]))
        dist.all_gather_into_tensor(everyone, tensor, group=self.group)
        return everyone

    def summed(self, tensor: Tensor) -> Tensor:
        """Return the sum over workers."""
        return _summed(tensor, self.group)

    def _share(self, count: int, rank: int) -> slice:
        world = self.place[1]
        return slice(rank * count // world, (rank + 1) * count // world)


def average_gradients(parameters: Iterable[torch.nn.Parameter], collective: Collective) -> None:
    """Replace every gradient by its mean over workers, in one sum; a parameter without gradient counts as zero."""
    if collective.world == 1:
        return
    held = [parameter for parameter in parameters if parameter.requires_grad]
    flat = torch.cat([gradient_of(parameter).flatten() for parameter in held])
    mean = collective.all_sum(flat).div_(collective.world)
    for parameter, part in zip(held, mean.split([parameter.numel() for parameter in held]), strict=True):
        parameter.grad = part.view_as(parameter)


def gradient_of(parameter: torch.nn.Parameter) -> Tensor:
    """Return a parameter's gradient, zeros where it has none."""
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _summed(tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    total = tensor.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


class _AllSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        return _summed(tensor, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _summed(gradients[0], ctx.group), None


class _LossSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, summed: Callable[[Tensor], Tensor], factor: int) -> Tensor:
        ctx.factor = factor
        return summed(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0] * ctx.factor, None, None


class _OwnBooks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, workers: ByBooks) -> Tensor:
        ctx.workers, ctx.count = workers, len(tensor)
        return tensor[workers.books(len(tensor))].clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.workers.joined(gradients[0], ctx.count), None


class _AllBooks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, workers: ByBooks, count: int) -> Tensor:
        ctx.mine = workers.books(count)
        return workers.joined(tensor, count)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0][ctx.mine], None, None


class _ForAnchors(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, workers: ByBooks) -> Tensor:
        ctx.workers = workers
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.workers.summed(gradients[0]), None


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup | None, rank: int, counts: list[int]) -> Tensor:
        ctx.group, ctx.start, ctx.rows = group, sum(counts[:rank]), counts[rank]
        # Equal shapes are all that every backend gathers, so short shares are padded and cut again.
        padded = tensor.new_zeros((max(counts), *tensor.shape[1:]))
        padded[: len(tensor)] = tensor
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded, group=group)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        return _summed(gradients[0], ctx.group)[ctx.start : ctx.start + ctx.rows], None, None, None
