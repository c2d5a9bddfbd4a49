"""Differentiable sums and gathers over all training workers, with a stand-in for a single worker.

Losses and batch norm use the `Collective` protocol only; a worker chooses the implementation when it starts. There are
two ways to divide a step among workers.

**By cells** (`Distributed`, for CPUs). Each worker has a share of the cells. Every worker computes the whole loss, and
the gradient of a parameter is the **mean** over workers of their back-propagated gradients (`average_gradients`). A sum
over workers whose backward is again the sum over workers is therefore exact, without a factor.

**By codebooks** (`ByBooks`, for GPUs). Each worker has all cells and computes the whole network on them. Workers divide
the most expensive parts: the codebooks, and the anchors of the losses inside groups. They exchange vectors of the
cells, whose size is small, known in advance, and independent of the number of groups. Dividing by cells would send
tables of all codes and the gradient of every parameter, which takes longer than a GPU takes for most of the network's
products. All workers end up with the same gradients, so there is nothing to average.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor


class Collective(Protocol):
    """The communication between workers that model code uses."""

    rank: int
    world: int

    def all_sum(self, tensor: Tensor) -> Tensor:
        """Return the sum over workers; the gradient is summed over workers too."""

    def loss_sum(self, tensor: Tensor) -> Tensor:
        """Return the sum over workers of a tensor from which all workers compute the same loss.

        The gradient of the sum is then equal on all workers, so the backward pass needs no communication.
        """

    def all_gather_rows(self, tensor: Tensor) -> Tensor:
        """Concatenate the rows of all workers in rank order; row counts may differ. Differentiable if floating."""

    def books(self, count: int) -> slice:
        """Return which of `count` codebooks this worker computes."""

    def own_books(self, tensor: Tensor) -> Tensor:
        """Slice this worker's codebooks out of (codebooks, ...); backward, gather the gradients of all workers."""

    def all_books(self, tensor: Tensor, count: int) -> Tensor:
        """Gather all `count` codebooks from the workers, (codebooks, ...); backward, slice the gradient again."""

    def for_anchors(self, tensor: Tensor) -> Tensor:
        """Return a tensor that each worker uses for its own anchors; backward, sum the gradients over workers."""

    def parts_sum(self, tensor: Tensor) -> Tensor:
        """Sum the workers' parts, each of its own codebooks and anchors; backward, pass the gradient on unchanged."""


class Single:
    """A single worker: every method returns its argument."""

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
        """Return the slice of all codebooks."""
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
    """Workers of a `torch.distributed` group (by default the default group), each with a share of the cells."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.rank = dist.get_rank(group)
        self.world = dist.get_world_size(group)

    def all_sum(self, tensor: Tensor) -> Tensor:
        """Return the sum over workers; the gradient is summed over workers too."""
        summed: Tensor = _AllSum.apply(tensor, self.group)
        return summed

    def loss_sum(self, tensor: Tensor) -> Tensor:
        """Return the sum over workers; its gradient, equal on all workers, is multiplied by their number."""
        summed: Tensor = _LossSum.apply(tensor, partial(_summed, group=self.group), self.world)
        return summed

    def all_gather_rows(self, tensor: Tensor) -> Tensor:
        """Concatenate the rows of all workers in rank order; backward, sum over workers and slice the own rows."""
        counts = torch.zeros(self.world, dtype=torch.int64, device=tensor.device)
        counts[self.rank] = len(tensor)
        dist.all_reduce(counts, group=self.group)
        rows: Tensor = _GatherRows.apply(tensor, self.group, self.rank, counts.tolist())
        return rows


class ByBooks(Single):
    """Workers of a `torch.distributed` group, each with all cells and a share of the codebooks and anchors.

    `rank` and `world` are those of a single worker, since every worker has the whole of each sum over cells.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.place = (dist.get_rank(group), dist.get_world_size(group))

    def books(self, count: int) -> slice:
        """Return which of `count` codebooks this worker computes; shares differ by at most one."""
        return self._share(count, self.place[0])

    def own_books(self, tensor: Tensor) -> Tensor:
        """Slice this worker's codebooks out of (codebooks, ...); backward, gather the gradients of all workers."""
        own: Tensor = _OwnBooks.apply(tensor, self)
        return own

    def all_books(self, tensor: Tensor, count: int) -> Tensor:
        """Gather all `count` codebooks from the workers; backward, slice the gradient, equal on all workers."""
        everyone: Tensor = _AllBooks.apply(tensor, self, count)
        return everyone

    def for_anchors(self, tensor: Tensor) -> Tensor:
        """Return `tensor`; backward, sum the gradients over workers."""
        same: Tensor = _ForAnchors.apply(tensor, self)
        return same

    def parts_sum(self, tensor: Tensor) -> Tensor:
        """Return the sum over workers; backward, pass the gradient on unchanged."""
        summed: Tensor = _LossSum.apply(tensor, self.summed, 1)
        return summed

    def joined(self, tensor: Tensor, count: int) -> Tensor:
        """Gather all `count` codebooks from the workers, without gradient."""
        world = self.place[1]
        shares = [self._share(count, rank) for rank in range(world)]
        own, most = len(tensor), max(share.stop - share.start for share in shares)
        padded = tensor.detach().contiguous() if own == most else torch.cat([tensor, tensor[:1]])
        everyone = self.gathered(padded)
        if most * world == count:
            return everyone
        return torch.cat([everyone[rank * most :][: share.stop - share.start] for rank, share in enumerate(shares)])

    def gathered(self, tensor: Tensor) -> Tensor:
        """Concatenate the rows of all workers in rank order; every worker must have the same number of rows."""
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
    """Replace every gradient by its mean over workers, in one all-reduce; a missing gradient counts as zero."""
    if collective.world == 1:
        return
    held = [parameter for parameter in parameters if parameter.requires_grad]
    flat = torch.cat([gradient_of(parameter).flatten() for parameter in held])
    mean = collective.all_sum(flat).div_(collective.world)
    for parameter, part in zip(held, mean.split([parameter.numel() for parameter in held]), strict=True):
        parameter.grad = part.view_as(parameter)


def gradient_of(parameter: torch.nn.Parameter) -> Tensor:
    """Return the gradient of a parameter, zeros if it has none."""
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
        # Not every backend gathers tensors of different shapes, so shorter shares are padded and cut again.
        padded = tensor.new_zeros((max(counts), *tensor.shape[1:]))
        padded[: len(tensor)] = tensor
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded, group=group)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        return _summed(gradients[0], ctx.group)[ctx.start : ctx.start + ctx.rows], None, None, None
