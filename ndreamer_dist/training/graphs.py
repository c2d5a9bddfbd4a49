"""Training steps as CUDA graphs: a step's thousand operations are recorded once, and then started by one call.

A graph does what was recorded on the memory that was recorded, so the inputs of each step are copied to where those of the
recorded one lay: one copy of the labels, and one of expression. It needs shapes that do not change. Mini-batches are
padded (`model.batch.Sizes`), so that nearly all have the same; those of a size that was not seen before take their step
plainly, which also warms up what a recording needs to be warm. A recording is trusted after it has left the bits of a plain
step. What cannot be recorded, or does not, is said in one line, and all steps are plain from then on.
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
from ndreamer_dist.model.codebooks import Quantised
from ndreamer_dist.model.collectives import Collective
from ndreamer_dist.model.losses import LossTerms
from ndreamer_dist.settings import Settings
from ndreamer_dist.training.loop import TrainState, finish_step, optimise, training_step

MOST_GRAPHS = 8
"""Sizes of mini-batches whose step is recorded; what is recorded shares its memory."""

logger = logging.getLogger(__name__)

Outcome = tuple[LossTerms, Quantised]
Recorder = Callable[[Callable[[], Outcome]], Callable[[], Outcome]]
"""Records a step without taking it, and returns what takes it."""


@dataclass(frozen=True)
class Recorded:
    """A recorded step, and the mini-batch on whose memory it works."""

    inputs: MiniBatch
    replay: Callable[[], Outcome]

    def take(self, batch: MiniBatch) -> Outcome:
        """Take the step of a mini-batch of the same sizes."""
        for known, new in ((self.inputs.x, batch.x), (self.inputs.sent, batch.sent)):
            if known is not None and new is not None:
                known.copy_(new, non_blocking=True)
        return self.replay()


class GraphedSteps:
    """Takes training steps, recorded ones where a mini-batch has sizes that were seen before.

    Parameters
    ----------
    record
        For tests without a GPU.
    """

    def __init__(self, record: Recorder | None = None) -> None:
        self._record = record or CudaRecorder()
        self._known: dict[Hashable, Recorded | None] = {}
        self._plain = False

    def __call__(
        self, state: TrainState, batch: MiniBatch, settings: Settings, collective: Collective
    ) -> tuple[LossTerms, Quantised]:
        """Do what `training_step` does."""
        recorded = self._recorded(state, batch, settings, collective)
        if recorded is None:
            return training_step(state, batch, settings, collective)
        terms, quantised = recorded.take(batch)
        finish_step(state, batch.step, quantised, settings, collective)
        return terms, quantised

    def _recorded(
        self, state: TrainState, batch: MiniBatch, settings: Settings, collective: Collective
    ) -> Recorded | None:
        """Return the recorded step of such mini-batches, recorded now where this is the second; none where it is to be plain."""
        sizes = sizes_of(batch)
        if self._plain or batch.sent is None:
            return None
        if sizes not in self._known:
            if len(self._known) < MOST_GRAPHS:
                self._known[sizes] = None
            return None
        if self._known[sizes] is None:
            inputs = of_own_memory(batch, batch.sent)
            try:
                with capturable(state.optimiser):
                    replay = self._record(lambda: detached(optimise(state, inputs, settings, collective)))
                if not leaves_the_same(state, replay, lambda: optimise(state, inputs, settings, collective)):
                    msg = "a recorded step had other bits than a plain one"
                    raise RuntimeError(msg)  # noqa: TRY301 - as where it cannot be recorded
            except RuntimeError as error:
                logger.warning("train: steps are taken without a CUDA graph: %s", str(error).partition("\n")[0])
                self._plain = True
                return None
            self._known[sizes] = Recorded(inputs, replay)
        return self._known[sizes]


class CudaRecorder:
    """Records on the stream that all steps are taken on; all graphs have their memory from one pool."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, step: Callable[[], Outcome]) -> Callable[[], Outcome]:
        """Record a step."""
        graph = torch.cuda.CUDAGraph()
        # The thread that makes the next mini-batches may go on with its copies: `thread_local`.
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
    """Let an optimiser be recorded. The fused one is the same either way, and warns of a plain step where this is always set."""
    before = [group["capturable"] for group in optimiser.param_groups]
    for group in optimiser.param_groups:
        group["capturable"] = group["params"][0].is_cuda
    try:
        yield
    finally:
        for group, known in zip(optimiser.param_groups, before, strict=True):
            group["capturable"] = known


def leaves_the_same(state: TrainState, one: Callable[[], Outcome], other: Callable[[], Outcome]) -> bool:
    """Return whether two ways of a step give the same loss, weights and moments, bit for bit; these are put back."""
    moments = itertools.chain(*(known.values() for known in state.optimiser.state.values()))
    held = [*state.network.parameters(), *state.network.buffers(), *filter(torch.is_tensor, moments)]
    before, ends = [tensor.detach().clone() for tensor in held], []
    for step in (one, other):
        loss = step()[0].total
        ends.append([tensor.detach().clone() for tensor in (*held, loss)])
        with torch.no_grad():
            for tensor, known in zip(held, before, strict=True):
                tensor.copy_(known)
    return all(map(torch.equal, *ends))


def detached(outcome: Outcome) -> Outcome:
    """Return what a step gives, without what was needed to differentiate it."""
    return with_tensors(outcome, torch.Tensor.detach)


def of_own_memory(batch: MiniBatch, sent: torch.Tensor) -> MiniBatch:
    """Return a mini-batch whose tensors on the device lie in memory of its own, at the same places of its `sent`."""
    there, base = sent.clone(), sent.data_ptr()

    def moved(part: torch.Tensor) -> torch.Tensor:
        start = part.data_ptr() - base
        if not 0 <= start < there.nbytes:  # a code that the host alone reads
            return part
        return there[start : start + part.nbytes].view(part.dtype).view(part.shape)

    return replace(with_tensors(replace(batch, x=batch.x.new_empty(0)), moved), x=batch.x.clone(), sent=there)


def sizes_of(thing: Any) -> Hashable:
    """Return the shapes of all tensors, and all whole numbers but the number of the step."""
    if isinstance(thing, torch.Tensor):
        return tuple(thing.shape), thing.dtype
    if isinstance(thing, tuple):
        return tuple(map(sizes_of, thing))
    if is_dataclass(thing) and not isinstance(thing, type):
        return tuple(sizes_of(getattr(thing, field.name)) for field in fields(thing) if field.name != "step")
    return thing if isinstance(thing, Hashable) else None
