"""The training loop, on one screen (METHOD sections 2 to 4).

Input: mini-batches in the order of the plan. Output: a trained network, and one row of measures per step. Nothing here
knows Ray or zarr. With several workers, each runs this loop on its share and computes the gradient of the one global
mini-batch. All randomness is keyed by the step, so the state of a run is the network, the optimiser and the number of
finished steps.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from statistics import fmean
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from ndreamer_dist.errors import NDreamerError
from ndreamer_dist.model import noise
from ndreamer_dist.model.batch import MiniBatch
from ndreamer_dist.model.codebooks import Quantised, perplexities
from ndreamer_dist.model.collectives import ByBooks, Collective, average_gradients
from ndreamer_dist.model.losses import LossTerms, Terms, total_loss
from ndreamer_dist.model.network import NDreamerNetwork
from ndreamer_dist.model.transfer import Copied
from ndreamer_dist.settings import Settings
from ndreamer_dist.storage.checksums import check_digest, digest, seal, unseal
from ndreamer_dist.training.log import RATES, Logged, Row

logger = logging.getLogger(__name__)


Step = Callable[["TrainState", MiniBatch, Settings, Collective], tuple[LossTerms, Quantised]]
MEASURED = ("step", "total", *(term.name for term in fields(Terms)), "learning_rate", "perplexity", *RATES, "seconds")
"""What the row of a step holds, in the order in which the logs have it; the file of a checkpoint has another."""
STATE_FILE = "state.json"
"""Of a checkpoint's files the one that holds the checksums of the others; written last: without it none counts."""


class TrainingError(NDreamerError, RuntimeError):
    """Training cannot go on: a loss is not finite."""


class TrainingStopped(Exception):  # noqa: N818 - not an error
    """Training ends before its last step, since it was asked to; its checkpoint is written."""


@dataclass
class TrainState:
    """All that a checkpoint holds.

    Attributes
    ----------
    measures, perplexities
        A row, and the codes in use of each codebook, for each step since the first that the logs still need.
    logged
        What the logs hold.
    """

    network: NDreamerNetwork
    optimiser: torch.optim.AdamW
    step: int = 0
    measures: list[Row] = field(default_factory=list)
    perplexities: list[list[float]] = field(default_factory=list)
    logged: Logged = field(default_factory=Logged)
    unread: deque[Measured] = field(default_factory=deque)  # of the last steps
    read_at: float = 0.0

    @classmethod
    def fresh(
        cls, settings: Settings, *, genes: int, conditions: int, batch_levels: tuple[int, ...], device: Any = "cpu"
    ) -> TrainState:
        """Return an untrained state; the weights depend on the seed alone."""
        network = NDreamerNetwork(genes, conditions, batch_levels, settings.model, seed=settings.seed).to(device)
        schedule = settings.train
        network.bf16 = schedule.precision == "bf16"
        optimiser = torch.optim.AdamW(
            network.parameters(), lr=schedule.learning_rate, weight_decay=schedule.weight_decay, fused=True
        )
        return cls(network, optimiser)

    @property
    def device(self) -> str:
        """Type of the device that trains."""
        return next(self.network.parameters()).device.type

    def catch_up(self, but: int = 0) -> None:
        """Read what steps have measured, but for the last ones.

        Raises
        ------
        TrainingError
            The loss of a step is not finite.
        """
        while len(self.unread) > but:
            measured = self.unread.popleft()
            losses, books = measured.read()
            now = time.perf_counter()  # a GPU has done the step only now that its numbers are here
            seconds = now - max(measured.started, self.read_at)
            self.read_at = now
            self.measures.append({
                "step": measured.step, **losses,
                "learning_rate": float(self.optimiser.param_groups[0]["lr"]),
                "perplexity": fmean(books),
                "cells_per_second": measured.cells / seconds,
                "waiting": measured.waited / seconds,
                "seconds": seconds,
            })  # fmt: skip
            self.perplexities.append(books)

    def forget(self, steps_per_epoch: int) -> None:
        """Drop what was measured in epochs that have ended; the logs have it."""
        if self.measures:
            ended = len(self.measures) - int(self.measures[-1]["step"]) % steps_per_epoch
            del self.measures[:ended], self.perplexities[:ended]

    def to_bytes(self) -> dict[str, bytes]:
        """Return the files of a checkpoint: two of tensors, one of text; nothing is pickled."""
        self.catch_up()
        moments = {
            f"{index}.{name}": value.detach().cpu().contiguous()
            for index, values in self.optimiser.state_dict()["state"].items()
            for name, value in values.items()
        }
        weights = {name: value.detach().cpu().contiguous() for name, value in self.network.state_dict().items()}
        files = {"weights.safetensors": save_tensors(weights), "optimiser.safetensors": save_tensors(moments)}
        told = {name: getattr(self, name) for name in ("step", "measures", "perplexities", "device")}
        told |= {"logged": asdict(self.logged), "files": {name: digest(data) for name, data in files.items()}}
        return files | {STATE_FILE: seal(told, indent=None)}

    def load_bytes(self, files: Mapping[str, bytes], where: str = "") -> None:
        """Take up the state that `to_bytes` gave.

        Parameters
        ----------
        where
            Address of the checkpoint, for the error.

        Raises
        ------
        DamagedError
            A file is missing or not what was written.
        """
        told = unseal(files.get(STATE_FILE, b""), f"{where}/{STATE_FILE}")
        for name, known in dict(told.get("files", {})).items():
            check_digest(files.get(name, b""), known, f"{where}/{name}")
        self.network.load_state_dict(load_tensors(files["weights.safetensors"]))
        state: dict[int, dict[str, torch.Tensor]] = {}
        for name, value in load_tensors(files["optimiser.safetensors"]).items():
            index, _, moment = name.partition(".")
            state.setdefault(int(index), {})[moment] = value
        groups = self.optimiser.state_dict()["param_groups"]
        self.optimiser.load_state_dict({"state": state, "param_groups": groups})
        self.step, self.perplexities = told["step"], told["perplexities"]
        self.measures = [{name: row[name] for name in MEASURED} for row in told["measures"]]
        self.logged = Logged(**told.get("logged", {}))
        if (before := told.get("device", self.device)) != self.device:
            text = f"{where} was made on {before} and training goes on on {self.device}"
            logger.warning("%s: noise and sums have other bits there", text)


def train(
    state: TrainState,
    batches: Iterable[MiniBatch],
    settings: Settings,
    collective: Collective,
    after_step: Callable[[TrainState], object] = lambda _: None,
    take: Step | None = None,
) -> None:
    """Take one optimiser step per mini-batch, from `state.step` on, as `take` does it; by default plainly.

    Raises
    ------
    TrainingError
        The loss of a step is not finite.
    """
    state.network.train()
    take = take or training_step
    for batch, waited, started in _timed(batches):
        terms, quantised = take(state, batch, settings, collective)
        state.unread.append(Measured.of(batch, terms, quantised, collective, started=started, waited=waited))
        state.catch_up(but=1 if batch.x.is_cuda else 0)  # a GPU always has a step to do while the host reads
        after_step(state)
    state.catch_up()


def training_step(
    state: TrainState, batch: MiniBatch, settings: Settings, collective: Collective
) -> tuple[LossTerms, Quantised]:
    """Take one optimiser step; count the use of codes, and reset those that are hardly used when it is time to."""
    terms, quantised = optimise(state, batch, settings, collective)
    finish_step(state, batch.step, quantised, settings, collective)
    return terms, quantised


def optimise(
    state: TrainState, batch: MiniBatch, settings: Settings, collective: Collective
) -> tuple[LossTerms, Quantised]:
    """Take one optimiser step, and count the use of codes.

    On a GPU this asks nothing of the host, and does the same operations on the same memory for all mini-batches of one
    size: so it can be recorded once and done again (`graphs`).
    """
    network = state.network
    draws = noise.draw(batch, settings.model, settings.seed)
    outputs = network(batch, draws, collective)
    terms = total_loss(outputs, batch, draws, settings.loss, conditions=network.conditions, collective=collective)
    state.optimiser.zero_grad(set_to_none=True)
    terms.total.backward()
    quantised, quantiser = outputs.quantised, network.quantiser
    if isinstance(collective, ByBooks):
        quantised = quantiser.join(quantised, collective)
    else:
        average_gradients(network.parameters(), collective)
    state.optimiser.step()
    quantiser.count_usage(quantised.usage, collective)
    return terms, quantised


def finish_step(state: TrainState, step: int, quantised: Quantised, settings: Settings, collective: Collective) -> None:
    """Reset codes that are hardly used, when it is time to."""
    schedule = settings.train
    if schedule.reset_every and step % schedule.reset_every == 0:
        state.network.quantiser.reset(
            quantised.projections, collective, seed=settings.seed, step=step, below=schedule.reset_below
        )
    state.step = step


def add_in_order() -> None:
    """Let operations on GPUs add in a fixed order in place of by atomics, so that a run gives the same bits twice.

    What torch has no ordered way for it says in a warning; the step uses none of it.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def _timed(batches: Iterable[MiniBatch]) -> Iterator[tuple[MiniBatch, float, float]]:
    """Yield each mini-batch with the seconds it was waited for, and when its step (the wait included) began."""
    stream = iter(batches)
    while True:
        started = time.perf_counter()
        batch = next(stream, None)
        if batch is None:
            return
        yield batch, time.perf_counter() - started, started


@dataclass(frozen=True)
class Measured:
    """What a step has measured and nobody has read yet: the names of `values`, and the perplexities of `books` codebooks.

    Where workers share the codebooks, the total that the worker of each codebook has comes behind.
    """

    step: int
    cells: int
    names: tuple[str, ...]
    books: int
    values: Copied
    started: float
    waited: float

    @classmethod
    def of(
        cls, batch: MiniBatch, terms: LossTerms, quantised: Quantised, collective: Collective, *, started: float,
        waited: float,
    ) -> Measured:  # fmt: skip
        """Note what a step measures, without waiting for it."""
        named, books = terms.as_tensors(), len(quantised.projections)
        values = torch.stack(list(named.values())).detach().double()
        of_books = perplexities(quantised)
        if isinstance(collective, ByBooks):
            own = torch.stack([of_books, values[0].expand_as(of_books)], 1)
            of_books = collective.joined(own, books).T.flatten()
        copied = Copied.of(torch.cat([values, of_books]))
        return cls(batch.step, batch.cells, tuple(named), books, copied, started, waited)

    def read(self) -> tuple[dict[str, float], list[float]]:
        """Return losses by name and perplexities; `TrainingError` where a loss is not finite, or not one on all workers."""
        numbers = self.values.tolist()
        losses = dict(zip(self.names, numbers, strict=False))
        perplexity, totals = numbers[len(losses) :][: self.books], numbers[len(losses) + self.books :]
        unfit = [name for name, value in losses.items() if not math.isfinite(value)]
        if unfit:
            msg = (
                f"the loss is not finite at step {self.step} ({', '.join(unfit)}); lower --set train.learning_rate, or look "
                "for extreme values in the input"
            )
            raise TrainingError(msg)
        if any(total != losses["total"] for total in totals):
            msg = (
                f"the workers' GPUs do not compute alike: at step {self.step} their losses are "
                f"{min(totals):.9g} to {max(totals):.9g}; use GPUs of one kind, or --workers 1"
            )
            raise TrainingError(msg)
        return losses, [round(used, 2) for used in perplexity]
