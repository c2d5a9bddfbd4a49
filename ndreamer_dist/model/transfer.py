"""What travels between the host and a GPU.

Expression goes there as a CSR and becomes dense there. All that a step needs goes by one copy. What a step measured comes
back while the host goes on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

ALIGNED = 64
"""Bytes at whose multiples tensors begin that travel together."""


def dense(x: sparse.csr_matrix, device: Any) -> Tensor:
    """Return a CSR as a dense tensor on a device, (cells, genes) float32."""
    if torch.device(device).type == "cpu":
        return torch.from_numpy(x.toarray())
    return spread([part.to(device, non_blocking=True) for part in of_csr(x)], x.shape)


def spread(csr: Sequence[Tensor], shape: tuple[int, int]) -> Tensor:
    """Return a CSR, in parts as `of_csr` gives them, as a dense tensor where these are."""
    counts, indices, data = csr
    rows = torch.repeat_interleave(torch.arange(len(counts), device=data.device), counts, output_size=len(data))
    flat = torch.zeros(shape[0] * shape[1], dtype=torch.float32, device=data.device)
    return flat.index_put_((rows * shape[1] + indices,), data).view(shape)


def of_csr(x: sparse.csr_matrix) -> list[Tensor]:
    """Return what travels of a CSR: how many values each row has, their columns, and the values."""
    return [torch.tensor(part) for part in (np.diff(x.indptr), x.indices, x.data)]


def room(part: Tensor) -> int:
    """Return how many bytes a tensor takes among those that travel together."""
    return -(-part.nbytes // ALIGNED) * ALIGNED


def sent_together(parts: Sequence[Tensor], device: torch.device) -> tuple[list[Tensor], Tensor]:
    """Bring tensors to a GPU by one copy, from memory that it reads by itself while the host goes on.

    Returns them, and the bytes in which they lie.
    """
    starts = np.cumsum([0, *map(room, parts)]).tolist()
    pinned = device.type == "cuda" and torch.cuda.is_available()
    host = torch.empty(starts[-1], dtype=torch.uint8, pin_memory=pinned)
    for part, start in zip(parts, starts, strict=False):
        host[start : start + part.nbytes] = part.contiguous().flatten().view(torch.uint8)
    there = host.to(device, non_blocking=True)
    views = [
        there[start : start + part.nbytes].view(part.dtype).view(part.shape)
        for part, start in zip(parts, starts, strict=False)
    ]
    return views, there


@dataclass(frozen=True)
class Copied:
    """A tensor on its way to the host, which waits for it only when it is read."""

    values: Tensor
    there: torch.cuda.Event | None

    @classmethod
    def of(cls, tensor: Tensor) -> Copied:
        """Send a tensor on its way."""
        values, there = tensor.to("cpu", non_blocking=True), None
        if tensor.is_cuda and torch.cuda.is_available():
            there = torch.cuda.current_stream().record_event()
        return cls(values, there)

    def tolist(self) -> list[float]:
        """Return the numbers, (n,), when they have come."""
        if self.there is not None:
            self.there.synchronize()
        numbers: list[float] = self.values.tolist()
        return numbers
