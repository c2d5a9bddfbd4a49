"""Batch norm equals torch's for one worker."""

from __future__ import annotations

import pytest
import torch

from ndreamer_dist.model.batch_norm import BatchNorm
from ndreamer_dist.model.collectives import Single
from tests.model.helpers import close


class Claims(Single):
    """A single worker that takes the code path of several."""

    world = 2


@pytest.mark.parametrize("collective", [Single(), Claims()], ids=["fused", "summed"])
def test_batch_norm_equals_torch(collective: Single) -> None:
    ours, theirs = BatchNorm(5).double(), torch.nn.BatchNorm1d(5).double()
    for _ in range(2):
        x = 1000 + torch.randn(30, 5, dtype=torch.float64)
        left, right = x.clone().requires_grad_(), x.clone().requires_grad_()
        found, expected = ours(left, collective), theirs(right)
        close(found, expected.detach(), rtol=1e-9)
        found.pow(3).sum().backward()
        expected.pow(3).sum().backward()
        close(left.grad, right.grad, rtol=1e-7, atol=1e-9)
    for name in ("running_mean", "running_var"):
        close(getattr(ours, name), getattr(theirs, name), rtol=1e-10)
    close(ours(x, None), theirs.eval()(x).detach(), rtol=1e-10)


def test_far_from_zero_single_precision_keeps_the_variance() -> None:
    x = 4096 + torch.randn(500, 3)
    for collective in (Single(), Claims()):
        norm = BatchNorm(3)
        norm(x, collective)
        close(norm.running_var, 0.9 + 0.1 * x.double().var(0), rtol=1e-3)


def test_one_row_becomes_the_bias() -> None:
    norm = BatchNorm(3)
    assert torch.equal(norm(torch.randn(1, 3), Single()), torch.zeros(1, 3))
    assert norm.running_var.isfinite().all()
