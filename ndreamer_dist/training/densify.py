"""Turn sparse shares into dense mini-batches on the training device.

Input: a worker's share of a step, and the labels of all packed rows. Output: a `MiniBatch`. This is a separate module so
that processes that only read need not import torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import sparse

from ndreamer_dist import keys
from ndreamer_dist.cohort.packed import Packed
from ndreamer_dist.model.batch import MiniBatch
from ndreamer_dist.training.sampling import SamplingPlan
from ndreamer_dist.training.windows import Share


@dataclass(frozen=True)
class RowLabels:
    """What the losses need to know of every packed row: 8 bytes per cell and the groups' tables."""

    group_starts: np.ndarray  # (groups + 1,)
    group_condition: np.ndarray  # (groups,)
    group_batch: np.ndarray  # (groups, covariates)
    low: np.ndarray  # (rows,) int32
    high: np.ndarray  # (rows,) int32

    @classmethod
    def of(cls, packed: Packed) -> RowLabels:
        """Read the labels of a packed cohort."""
        design = packed.design
        return cls(
            design.starts,
            design.group_conditions,
            design.group_batch_codes,
            packed.clusters(keys.PACKED_LOW),
            packed.clusters(keys.PACKED_HIGH),
        )


def densify(share: Share, labels: RowLabels, plan: SamplingPlan, place: tuple[int, int], device: Any) -> MiniBatch:
    """Turn a sparse share into a mini-batch on a device; what travels there is the sparse form."""
    group = np.searchsorted(labels.group_starts, share.rows, side="right") - 1

    def send(values: np.ndarray) -> torch.Tensor:
        return torch.tensor(values).to(device, non_blocking=True).long()

    own = plan.share(share.step, *place)
    return MiniBatch(
        x=dense(share.x, device),
        condition=send(labels.group_condition[group]),
        batch=send(labels.group_batch[group]),
        group=send(group),
        low=send(labels.low[share.rows]),
        high=send(labels.high[share.rows]),
        first_block=own.start,
        step=share.step + 1,  # the loop's steps count from 0, the method's from 1
        cells=plan.cells(share.step),
    )


def dense(x: sparse.csr_matrix, device: Any) -> torch.Tensor:
    """Return a CSR as a dense tensor on a device, (cells, genes) float32."""
    if torch.device(device).type == "cpu":
        return torch.from_numpy(x.toarray())
    counts, indices, data = (
        torch.tensor(part).to(device, non_blocking=True) for part in (np.diff(x.indptr), x.indices, x.data)
    )
    rows = torch.repeat_interleave(torch.arange(len(counts), device=device), counts, output_size=len(data))
    flat = torch.zeros(x.shape[0] * x.shape[1], dtype=torch.float32, device=device)
    return flat.index_put_((rows * x.shape[1] + indices,), data).view(x.shape)
