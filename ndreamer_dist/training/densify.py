"""Turn sparse shares into dense mini-batches on the training device.

Input: a worker's share of a step, and the labels of all packed rows. Output: a `MiniBatch`. If the packed matrix fits
into the memory of the GPU, it stays there (`Resident`): then nothing is streamed, and a step sends the places of its
rows in place of expression values. This module is apart from `windows` so that reader processes need not import torch.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from queue import Full, Queue
from typing import Any

import numpy as np
import torch

from ndreamer_dist import keys
from ndreamer_dist.cohort.packed import Packed
from ndreamer_dist.model.batch import UNPADDED, MiniBatch, Sizes, labels_of, tensors_of, with_tensors
from ndreamer_dist.model.noise import step_key
from ndreamer_dist.model.transfer import dense, of_csr, room, sent_together, spread
from ndreamer_dist.settings import NOISE_ROWS
from ndreamer_dist.training.sampling import SamplingPlan
from ndreamer_dist.training.windows import Share

SIZED_STEPS = 64
"""Number of first steps that determine the padded sizes of all mini-batches."""
AHEAD = 2
"""Mini-batches prepared ahead for a GPU."""


@dataclass(frozen=True)
class RowLabels:
    """Labels of all packed rows, as the losses need them: 8 bytes per cell, and one table row per group."""

    group_starts: np.ndarray  # (groups + 1,)
    group_condition: np.ndarray  # (groups,)
    group_batch: np.ndarray  # (groups, covariates)
    low: np.ndarray  # (rows,) int32
    high: np.ndarray  # (rows,) int32

    def codes(self, rows: np.ndarray) -> np.ndarray:
        """Return condition, group, low and high cluster, and batches of packed rows: (rows, 4 + covariates) int64."""
        group = np.searchsorted(self.group_starts, rows, side="right") - 1
        columns = (self.group_condition[group], group, self.low[rows], self.high[rows])
        return np.concatenate([np.stack(columns, axis=1), self.group_batch[group]], axis=1).astype(np.int64)

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


@dataclass(frozen=True)
class Resident:
    """The packed matrix on the training device, as one CSR.

    Attributes
    ----------
    starts
        (rows + 1,) int64 on the host: start of each row's values.
    indices, data
        (values,) on the device: column numbers, int16 or, with more than 32 767 genes, int32; values, float32.
    genes
        Number of columns.
    """

    starts: np.ndarray
    indices: torch.Tensor
    data: torch.Tensor
    genes: int

    @classmethod
    def of(cls, packed: Packed, device: Any, room: int) -> Resident | None:
        """Copy a packed matrix to a device, block by block; return None if it takes more than `room` bytes."""
        names = [f"{keys.PACKED_X}/{keys.block_name(block)}/{keys.DATA}" for block in range(packed.n_blocks)]
        most = sum(int(packed.storage.metadata(name)["shape"][0]) for name in names)
        kind = torch.int16 if packed.n_genes <= torch.iinfo(torch.int16).max else torch.int32
        if most * (4 + kind.itemsize) > room:
            return None
        indices, data = (torch.empty(most, dtype=dtype, device=device) for dtype in (kind, torch.float32))
        starts = [np.zeros(1, dtype=np.int64)]
        for block in range(packed.n_blocks):
            x, first = packed.block(block), int(starts[-1][-1])
            indices[first : first + x.nnz] = torch.from_numpy(x.indices).to(kind).to(device)
            data[first : first + x.nnz] = torch.from_numpy(x.data).to(device)
            starts.append(first + x.indptr[1:].astype(np.int64))
        return cls(np.concatenate(starts), indices, data, packed.n_genes)

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return self.indices.nbytes + self.data.nbytes

    def places(self, rows: np.ndarray) -> list[torch.Tensor]:
        """Return the number of values of each row and where they start, (rows,) int64 each, as `rows` takes them."""
        return [torch.from_numpy(part) for part in (self.starts[rows + 1] - self.starts[rows], self.starts[rows])]

    def rows(self, places: Sequence[torch.Tensor], values: int) -> torch.Tensor:
        """Return the dense rows at some places, (rows, genes), which hold `values` values in total."""
        counts, starts = places
        shift = torch.repeat_interleave(starts - counts.cumsum(0) + counts, counts, output_size=values)
        place = shift + torch.arange(values, device=self.data.device)
        return spread([counts, self.indices[place], self.data[place]], (len(counts), self.genes))


def resident_batches(
    resident: Resident, labels: RowLabels, plan: SamplingPlan, place: tuple[int, int], first_step: int
) -> Iterator[MiniBatch]:
    """Yield a worker's mini-batches from `first_step` on, from the matrix on its device."""
    least = sizes_ahead(labels, plan)
    for step in range(first_step, plan.steps):
        share = Share(step, plan.share_rows(step, 0, 1), resident)
        yield densify(share, labels, plan, place, resident.data.device, least)


def sizes_ahead(labels: RowLabels, plan: SamplingPlan) -> Sizes:
    """Return the sizes to pad a GPU's mini-batches to: the largest of the first ones, so that nearly all are alike."""
    sizes = UNPADDED
    for step in range(min(plan.steps, SIZED_STEPS)):
        codes = torch.from_numpy(labels.codes(plan.share_rows(step, 0, 1)))
        sizes = sizes.at_least(Sizes.of(labels_of(codes, slice(0, len(codes)), "cuda")))
    return sizes


def densify(
    share: Share, labels: RowLabels, plan: SamplingPlan, place: tuple[int, int], device: Any, least: Sizes = UNPADDED
) -> MiniBatch:
    """Turn a sparse share into a mini-batch on a device; expression is sent sparse.

    Parameters
    ----------
    place
        Rank of the worker, and number of workers.
    least
        Minimum sizes to pad labels to for a GPU (`sizes_ahead`).
    """
    if torch.device(device).type != "cpu":
        return densify_for_gpu(share, labels, plan, place, torch.device(device), least)
    condition, group, low, high, *batch = torch.from_numpy(labels.codes(share.rows)).unbind(1)
    return MiniBatch(
        x=dense(share.x, device),
        condition=condition,
        batch=torch.stack(batch, 1) if batch else condition.new_empty((len(condition), 0)),
        group=group,
        low=low,
        high=high,
        first_block=plan.share(share.step, *place).start,
        step=share.step + 1,  # the loop's steps count from 0, the method's from 1
        cells=plan.cells(share.step),
    )


def densify_for_gpu(
    share: Share, labels: RowLabels, plan: SamplingPlan, place: tuple[int, int], device: torch.device, least: Sizes
) -> MiniBatch:
    """Build the mini-batch of a GPU: compute its labels ahead, and send everything in one copy.

    Every GPU worker has all cells; workers share codebooks and anchors, and `place` determines the worker's anchors.
    """
    codes = torch.from_numpy(labels.codes(share.rows))
    anchors = plan.share(share.step, *place)
    own = slice(anchors.start * NOISE_ROWS, anchors.stop * NOISE_ROWS) if place[1] > 1 else None
    ahead = labels_of(codes, slice(0, len(codes)), device.type, anchors=own, least=least)
    key = torch.tensor(step_key(plan.seed, "train", share.step + 1))
    resident = share.x if isinstance(share.x, Resident) else None
    matrix = resident.places(share.rows) if resident else of_csr(share.x)
    parts = [key, codes[:, 0], codes[:, 4:], *tensors_of(ahead), *matrix]  # the matrix comes last: its size varies
    received, device_bytes = sent_together(parts, device)
    others, csr = len(parts) - len(matrix), received[-len(matrix) :]
    by_id = dict(zip(map(id, parts[3:others]), received[3:others], strict=True))
    return MiniBatch(
        x=resident.rows(csr, int(matrix[0].sum())) if resident else spread(csr, share.x.shape),
        condition=received[1],
        batch=received[2],
        group=codes[:, 1],
        low=codes[:, 2],
        high=codes[:, 3],
        first_block=0,
        step=share.step + 1,
        cells=plan.cells(share.step),
        labels=ahead.moved(lambda part: by_id[id(part)]),
        key=received[0],
        device_bytes=device_bytes[: sum(map(room, parts[:others]))],
    )


def prepared_ahead(batches: Iterator[MiniBatch]) -> Iterator[MiniBatch]:
    """Yield mini-batches that a thread prepares, with copies on a CUDA stream of its own, during the steps before."""
    side = torch.cuda.Stream()
    ready: Queue[Any] = Queue(AHEAD)
    stopped = threading.Event()

    def prepare() -> None:
        try:
            with torch.cuda.stream(side):
                for batch in batches:
                    _put(ready, (batch, side.record_event()), stopped)
            _put(ready, None, stopped)
        except BaseException as error:  # noqa: BLE001 - raised again by the consumer
            _put(ready, error, stopped)

    threading.Thread(target=prepare, daemon=True, name="ndreamer-ahead").start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            batch, copied = item
            stream = torch.cuda.current_stream()
            stream.wait_event(copied)
            with_tensors(batch, partial(_used_on, stream=stream))
            yield batch
    finally:
        stopped.set()


def _put(queue: Queue[Any], value: Any, stopped: threading.Event) -> None:
    """Put a value into a queue, unless the consumer has stopped."""
    while not stopped.is_set():
        with suppress(Full):
            queue.put(value, timeout=1.0)
            return


def _used_on(part: torch.Tensor, stream: torch.cuda.Stream) -> torch.Tensor:
    """Keep the memory of a tensor from being reused before the work queued on a stream is done."""
    if part.is_cuda:
        part.record_stream(stream)
    return part
