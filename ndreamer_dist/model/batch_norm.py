"""Batch norm over the global mini-batch, for any number of workers."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from ndreamer_dist.model.collectives import Collective

EPSILON = 1e-5
MOMENTUM = 0.1


class BatchNorm(nn.Module):
    """Batch norm over rows, equal to `torch.nn.BatchNorm1d` for one worker (METHOD section 4: eps 1e-5, momentum 0.1).

    With a collective (training), normalise by the statistics of all workers' rows and update the running statistics.
    Without one (inference), normalise by the running statistics.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(features))
        self.bias = nn.Parameter(torch.zeros(features))
        self.register_buffer("running_mean", torch.zeros(features))
        self.register_buffer("running_var", torch.ones(features))

    def forward(self, x: Tensor, collective: Collective | None) -> Tensor:
        """Normalise `x`, (rows, features), in the precision of the parameters."""
        x = x.to(self.weight.dtype)
        if collective is not None and (collective.world > 1 or len(x) == 1):
            return self._over_workers(x, collective)
        return functional.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias,
            training=collective is not None, momentum=MOMENTUM, eps=EPSILON,
        )  # fmt: skip

    def _over_workers(self, x: Tensor, collective: Collective) -> Tensor:
        rows = x.new_full((1,), len(x))
        sums = collective.all_sum(torch.cat([x.sum(0), rows]))
        count = int(sums[-1].detach())
        mean = sums[:-1] / count
        # The variance takes a second sum, around the mean: E[x^2] - E[x]^2 would suffer from cancellation.
        centred = x - mean
        variance = collective.all_sum(centred.square().sum(0)) / count
        self._update(mean.detach(), variance.detach(), count)
        return centred * (variance + EPSILON).rsqrt() * self.weight + self.bias

    def _update(self, mean: Tensor, variance: Tensor, count: int) -> None:
        # As in torch: in place, with the unbiased variance. The variance of a single row is 0.
        self.running_mean.lerp_(mean, MOMENTUM)
        self.running_var.lerp_(variance * (count / max(count - 1, 1)), MOMENTUM)
