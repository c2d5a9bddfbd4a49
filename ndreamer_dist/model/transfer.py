"""Copies between the host and a GPU.

Expression is sent as a CSR and made dense on the device. All inputs of a step are sent in one copy. The measures of a
step are copied back asynchronously.
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
"""Alignment, in bytes, of the tensors in one copy."""


def dense(x: sparse.csr_matrix, device: Any) -> Tensor:
    """Return a CSR as a dense tensor, (cells, genes) float32, on a device."""
    if torch.device(device).type == "cpu":
        return torch.from_numpy(x.toarray())
    return spread([part.to(device, non_blocking=True) for part in of_csr(x)], x.shape)


def spread(csr: Sequence[Tensor], shape: tuple[int, int]) -> Tensor:
    """Return the dense tensor of a CSR, given by its parts (see `of_csr`), on the device of the parts."""
    counts, indices, data = csr
    rows = torch.repeat_interleave(torch.arange(len(counts), device=data.device), counts, output_size=len(data))
    flat = torch.zeros(shape[0] * shape[1], dtype=torch.float32, device=data.device)
    return flat.index_put_((rows * shape[1] + indices,), data).view(shape)


def of_csr(x: sparse.csr_matrix) -> list[Tensor]:
    """Return the parts of a CSR that are sent: the number of values of each row, their columns, and the values."""
    return [torch.tensor(part) for part in (np.diff(x.indptr), x.indices, x.data)]


def room(part: Tensor) -> int:
    """Return how many bytes a tensor takes in `sent_together`, alignment included."""
    return -(-part.nbytes // ALIGNED) * ALIGNED


def sent_together(parts: Sequence[Tensor], device: torch.device) -> tuple[list[Tensor], Tensor]:
    """Send tensors to a GPU in one asynchronous copy from pinned memory.

    Returns
    -------
    The tensors on the device, and the bytes that they are views of.
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
    """A tensor that is being copied to the host; only reading it waits for the copy."""

    values: Tensor
    there: torch.cuda.Event | None

    @classmethod
    def of(cls, tensor: Tensor) -> Copied:
        """Start to copy a tensor to the host."""
        values, there = tensor.to("cpu", non_blocking=True), None
        if tensor.is_cuda and torch.cuda.is_available():
            there = torch.cuda.current_stream().record_event()
        return cls(values, there)

    def tolist(self) -> list[float]:
        """Wait for the copy and return the numbers, (n,)."""
        if self.there is not None:
            self.there.synchronize()
        numbers: list[float] = self.values.tolist()
        return numbers
