"""Sums and gathers over all training workers, differentiable, with a stand-in for one worker.

Losses and batch norm are written once against `Collective`; the worker chooses the kind when it starts. Gradients: every
worker computes the whole loss, and the gradient of a parameter is the **mean** over workers of their back-propagated
gradients (`average_gradients`, or DistributedDataParallel). So a sum whose backward is again the sum over workers is
exact, without a factor.
"""

from __future__ import annotations

from collections.abc import Iterable
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


class Distributed:
    """Workers of a `torch.distributed` group (the default group where none is given)."""

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
        summed: Tensor = _LossSum.apply(tensor, self.group, self.world)
        return summed

    def all_gather_rows(self, tensor: Tensor) -> Tensor:
        """Return all workers' rows in rank order; the gradient is summed over workers, each keeps its own rows'."""
        counts = torch.zeros(self.world, dtype=torch.int64, device=tensor.device)
        counts[self.rank] = len(tensor)
        dist.all_reduce(counts, group=self.group)
        rows: Tensor = _GatherRows.apply(tensor, self.group, self.rank, counts.tolist())
        return rows


def average_gradients(parameters: Iterable[torch.nn.Parameter], collective: Collective) -> None:
    """Replace every gradient by its mean over workers, in one sum; a parameter without gradient counts as zero."""
    if collective.world == 1:
        return
    held = [parameter for parameter in parameters if parameter.requires_grad]
    flat = torch.cat([_gradient(parameter).flatten() for parameter in held])
    mean = collective.all_sum(flat).div_(collective.world)
    for parameter, part in zip(held, mean.split([parameter.numel() for parameter in held]), strict=True):
        parameter.grad = part.view_as(parameter)


def _gradient(parameter: torch.nn.Parameter) -> Tensor:
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
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup | None, world: int) -> Tensor:
        ctx.world = world
        return _summed(tensor, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0] * ctx.world, None, None


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
