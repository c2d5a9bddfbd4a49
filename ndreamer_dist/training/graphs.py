"""Training steps as CUDA graphs: the thousand operations of a step are recorded once and then started by one call.

A graph repeats the recorded operations on the recorded memory. So the inputs of each step are copied to the memory of
the recorded inputs: one copy for labels, one for expression. A graph also needs fixed shapes. Mini-batches are padded
(`model.batch.Sizes`), so nearly all have the same shapes. The first mini-batch of new shapes takes an ordinary step,
which also serves as the warm-up that recording requires; the second is recorded. A recording is used only if it gives
the same bits as an ordinary step. If recording fails or the bits differ, a warning is logged, and all later steps are
ordinary.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch

from ndreamer_dist.model.batch import MiniBatch, with_tensors
from ndreamer_dist.model.collectives import Collective
from ndreamer_dist.settings import Settings
from ndreamer_dist.training.loop import Outcome, TrainState, finish_step, optimise, training_step

MOST_GRAPHS = 8
"""Largest number of different mini-batch sizes to record; all graphs share one memory pool."""

logger = logging.getLogger(__name__)

Recorder = Callable[[Callable[[], Outcome]], Callable[[], Outcome]]
"""Records a step without executing it, and returns a function that executes it."""


@dataclass(frozen=True)
class Recorded:
    """A recorded step, and the mini-batch whose memory it reads."""

    inputs: MiniBatch
    replay: Callable[[], Outcome]

    def take(self, batch: MiniBatch) -> Outcome:
        """Take a step on a mini-batch of the same sizes."""
        for target, new in ((self.inputs.x, batch.x), (self.inputs.device_bytes, batch.device_bytes)):
            if target is not None and new is not None:
                target.copy_(new, non_blocking=True)
        return self.replay()


class GraphedSteps:
    """Takes training steps, by a CUDA graph if the sizes of the mini-batch have occurred before.

    Parameters
    ----------
    record
        Replaces `CudaRecorder` in tests without a GPU.
    """

    def __init__(self, record: Recorder | None = None) -> None:
        self._record = record or CudaRecorder()
        self._graphs: dict[Hashable, Recorded | None] = {}
        self._plain = False

    def __call__(self, state: TrainState, batch: MiniBatch, settings: Settings, collective: Collective) -> Outcome:
        """Take one step, as `training_step` does."""
        recorded = self._recorded(state, batch, settings, collective)
        if recorded is None:
            return training_step(state, batch, settings, collective)
        terms, quantised = recorded.take(batch)
        finish_step(state, batch.step, quantised, settings, collective)
        return terms, quantised

    def _recorded(
        self, state: TrainState, batch: MiniBatch, settings: Settings, collective: Collective
    ) -> Recorded | None:
        """Return the recorded step for the sizes of a mini-batch, or None; record the second one of each size."""
        sizes = sizes_of(batch)
        if self._plain or batch.device_bytes is None:
            return None
        if sizes not in self._graphs:
            if len(self._graphs) < MOST_GRAPHS:
                self._graphs[sizes] = None
            return None
        if self._graphs[sizes] is None:
            inputs = of_own_memory(batch, batch.device_bytes)
            try:
                with capturable(state.optimiser):
                    replay = self._record(lambda: detached(optimise(state, inputs, settings, collective)))
                if not leaves_the_same(state, replay, lambda: optimise(state, inputs, settings, collective)):
                    msg = "a recorded step differs from an ordinary one"
                    raise RuntimeError(msg)  # noqa: TRY301 - handled like a failed recording
            except RuntimeError as error:
                logger.warning("train: steps are taken without a CUDA graph: %s", str(error).partition("\n")[0])
                self._plain = True
                return None
            self._graphs[sizes] = Recorded(inputs, replay)
        return self._graphs[sizes]


class CudaRecorder:
    """Records CUDA graphs on the current stream, with one memory pool for all."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, step: Callable[[], Outcome]) -> Callable[[], Outcome]:
        """Record a step."""
        graph = torch.cuda.CUDAGraph()
        # `thread_local` lets the thread that prepares the next mini-batches go on with its copies.
        with torch.cuda.graph(
            graph, pool=self._pool, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"
        ):
            outcome = step()

        def replay() -> Outcome:
            graph.replay()
            return outcome

        return replay


@contextmanager
def capturable(optimiser: torch.optim.Optimizer) -> Iterator[None]:
    """Set `capturable` of an optimiser until the block ends; if it were always set, ordinary steps would warn."""
    before = [group["capturable"] for group in optimiser.param_groups]
    for group in optimiser.param_groups:
        group["capturable"] = group["params"][0].is_cuda
    try:
        yield
    finally:
        for group, value in zip(optimiser.param_groups, before, strict=True):
            group["capturable"] = value


def leaves_the_same(state: TrainState, one: Callable[[], Outcome], other: Callable[[], Outcome]) -> bool:
    """Return whether two step functions give the same loss, weights and moments, bit for bit; restore the state."""
    moments = itertools.chain(*(values.values() for values in state.optimiser.state.values()))
    held = [*state.network.parameters(), *state.network.buffers(), *filter(torch.is_tensor, moments)]
    before, ends = [tensor.detach().clone() for tensor in held], []
    for step in (one, other):
        loss = step()[0].total
        ends.append([tensor.detach().clone() for tensor in (*held, loss)])
        with torch.no_grad():
            for tensor, value in zip(held, before, strict=True):
                tensor.copy_(value)
    return all(map(torch.equal, *ends))


def detached(outcome: Outcome) -> Outcome:
    """Return the outcome of a step without its autograd graph."""
    return with_tensors(outcome, torch.Tensor.detach)


def of_own_memory(batch: MiniBatch, device_bytes: torch.Tensor) -> MiniBatch:
    """Copy the device tensors of a mini-batch to new memory, at the same offsets of its `device_bytes`."""
    copy, base = device_bytes.clone(), device_bytes.data_ptr()

    def moved(part: torch.Tensor) -> torch.Tensor:
        start = part.data_ptr() - base
        if not 0 <= start < copy.nbytes:  # a label that stays on the host
            return part
        return copy[start : start + part.nbytes].view(part.dtype).view(part.shape)

    return replace(with_tensors(replace(batch, x=batch.x.new_empty(0)), moved), x=batch.x.clone(), device_bytes=copy)


def sizes_of(thing: Any) -> Hashable:
    """Return the shapes and dtypes of all tensors, and all other hashable fields except `step`."""
    if isinstance(thing, torch.Tensor):
        return tuple(thing.shape), thing.dtype
    if isinstance(thing, tuple):
        return tuple(map(sizes_of, thing))
    if is_dataclass(thing) and not isinstance(thing, type):
        return tuple(sizes_of(getattr(thing, field.name)) for field in fields(thing) if field.name != "step")
    return thing if isinstance(thing, Hashable) else None
