"""The training loop (METHOD sections 2 to 4).

Input: mini-batches in the order of the plan. Output: a trained network, and one row of measures per step. This module
uses neither Ray nor zarr. With several workers, each runs this loop on its share of the mini-batch and computes the
gradient of the global mini-batch. All random numbers are keyed by the step, so the state of a run is the network, the
optimiser, the number of finished steps and the measures that the logs lack.
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


Outcome = tuple[LossTerms, Quantised]
"""What a step returns."""
Step = Callable[["TrainState", MiniBatch, Settings, Collective], Outcome]
"""Takes one training step, see `training_step`."""
MEASURED = ("step", "total", *(term.name for term in fields(Terms)), "learning_rate", "perplexity", *RATES, "seconds")
"""Names of a step's measures in the order of the logs; the JSON of a checkpoint sorts them."""
STATE_FILE = "state.json"
"""The file of a checkpoint with the checksums of the others; written last, so a checkpoint without it is incomplete."""


class TrainingError(NDreamerError, RuntimeError):
    """Training cannot go on: a loss is not finite, or the workers' losses differ."""


class TrainingStopped(Exception):  # noqa: N818 - not an error
    """Training ended before its last step because a stop was requested."""


@dataclass
class TrainState:
    """The state of a training; a checkpoint holds all of it except what is still unread.

    Attributes
    ----------
    step
        Number of finished steps.
    measures, perplexities
        The row and the perplexity of each codebook, for every step that the logs still need.
    logged
        What the log files hold.
    unread
        Measures of the last steps, which may still be on their way from a GPU.
    read_at
        Time at which measures were last read.
    """

    network: NDreamerNetwork
    optimiser: torch.optim.AdamW
    step: int = 0
    measures: list[Row] = field(default_factory=list)
    perplexities: list[list[float]] = field(default_factory=list)
    logged: Logged = field(default_factory=Logged)
    unread: deque[Measured] = field(default_factory=deque)
    read_at: float = 0.0

    @classmethod
    def fresh(
        cls, settings: Settings, *, genes: int, conditions: int, batch_levels: tuple[int, ...], device: Any = "cpu"
    ) -> TrainState:
        """Return an untrained state; the initial weights depend on the seed alone."""
        network = NDreamerNetwork(genes, conditions, batch_levels, settings.model, seed=settings.seed).to(device)
        schedule = settings.train
        network.bf16 = schedule.precision == "bf16"
        optimiser = torch.optim.AdamW(
            network.parameters(), lr=schedule.learning_rate, weight_decay=schedule.weight_decay, fused=True
        )
        return cls(network, optimiser)

    @property
    def device(self) -> str:
        """Type of the training device."""
        return next(self.network.parameters()).device.type

    def catch_up(self, but: int = 0) -> None:
        """Read the measures of all steps except the last `but`.

        Raises
        ------
        TrainingError
            The loss of a step is not finite, or the workers' losses differ.
        """
        while len(self.unread) > but:
            measured = self.unread.popleft()
            losses, books = measured.read()
            now = time.perf_counter()  # on a GPU a step is finished when its numbers have arrived
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
        """Drop the measures of finished epochs; the logs hold them."""
        if self.measures:
            ended = len(self.measures) - int(self.measures[-1]["step"]) % steps_per_epoch
            del self.measures[:ended], self.perplexities[:ended]

    def to_bytes(self) -> dict[str, bytes]:
        """Return the files of a checkpoint: two of tensors and one of JSON, without pickle."""
        self.catch_up()
        moments = {
            f"{index}.{name}": value.detach().cpu().contiguous()
            for index, values in self.optimiser.state_dict()["state"].items()
            for name, value in values.items()
        }
        weights = {name: value.detach().cpu().contiguous() for name, value in self.network.state_dict().items()}
        files = {"weights.safetensors": save_tensors(weights), "optimiser.safetensors": save_tensors(moments)}
        record = {name: getattr(self, name) for name in ("step", "measures", "perplexities", "device")}
        record |= {"logged": asdict(self.logged), "files": {name: digest(data) for name, data in files.items()}}
        return files | {STATE_FILE: seal(record, indent=None)}

    def load_bytes(self, files: Mapping[str, bytes], where: str = "") -> None:
        """Restore the state from the files of `to_bytes`.

        Parameters
        ----------
        where
            Address of the checkpoint, for error messages.

        Raises
        ------
        DamagedError
            A file is missing or fails its checksum.
        """
        record = unseal(files.get(STATE_FILE, b""), f"{where}/{STATE_FILE}")
        for name, checksum in dict(record.get("files", {})).items():
            check_digest(files.get(name, b""), checksum, f"{where}/{name}")
        self.network.load_state_dict(load_tensors(files["weights.safetensors"]))
        state: dict[int, dict[str, torch.Tensor]] = {}
        for name, value in load_tensors(files["optimiser.safetensors"]).items():
            index, _, moment = name.partition(".")
            state.setdefault(int(index), {})[moment] = value
        groups = self.optimiser.state_dict()["param_groups"]
        self.optimiser.load_state_dict({"state": state, "param_groups": groups})
        self.step, self.perplexities = record["step"], record["perplexities"]
        self.measures = [{name: row[name] for name in MEASURED} for row in record["measures"]]
        self.logged = Logged(**record.get("logged", {}))
        if (before := record.get("device", self.device)) != self.device:
            logger.warning(
                "%s was written on %s and training resumes on %s: noise and rounding differ there",
                where, before, self.device,
            )  # fmt: skip


def train(
    state: TrainState,
    batches: Iterable[MiniBatch],
    settings: Settings,
    collective: Collective,
    after_step: Callable[[TrainState], object] = lambda _: None,
    take: Step | None = None,
) -> None:
    """Take one optimiser step per mini-batch, from `state.step` on.

    Parameters
    ----------
    after_step
        Called after each step.
    take
        Takes one step; by default `training_step`.

    Raises
    ------
    TrainingError
        The loss of a step is not finite, or the workers' losses differ.
    """
    state.network.train()
    take = take or training_step
    for batch, waited, started in _timed(batches):
        terms, quantised = take(state, batch, settings, collective)
        state.unread.append(Measured.of(batch, terms, quantised, collective, started=started, waited=waited))
        state.catch_up(but=1 if batch.x.is_cuda else 0)  # a GPU computes the next step while the host reads
        after_step(state)
    state.catch_up()


def training_step(state: TrainState, batch: MiniBatch, settings: Settings, collective: Collective) -> Outcome:
    """Take one optimiser step, count the usage of codes, and reset rarely used codes when a reset is due."""
    terms, quantised = optimise(state, batch, settings, collective)
    finish_step(state, batch.step, quantised, settings, collective)
    return terms, quantised


def optimise(state: TrainState, batch: MiniBatch, settings: Settings, collective: Collective) -> Outcome:
    """Take one optimiser step, and count the usage of codes.

    On a GPU this never waits for the host, and runs the same operations on the same memory for all mini-batches of one
    size, so a CUDA graph can record and repeat it (`graphs`).
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
    """Reset rarely used codes if a reset is due, and count the step."""
    schedule = settings.train
    if schedule.reset_every and step % schedule.reset_every == 0:
        state.network.quantiser.reset(
            quantised.projections, collective, seed=settings.seed, step=step, below=schedule.reset_below
        )
    state.step = step


def add_in_order() -> None:
    """Make GPU operations add in a fixed order instead of by atomics, so that a repeated run gives the same bits.

    torch warns of operations without a deterministic implementation; a training step uses none of them.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def _timed(batches: Iterable[MiniBatch]) -> Iterator[tuple[MiniBatch, float, float]]:
    """Yield each mini-batch, the seconds spent waiting for it, and the start time of its step (wait included)."""
    stream = iter(batches)
    while True:
        started = time.perf_counter()
        batch = next(stream, None)
        if batch is None:
            return
        yield batch, time.perf_counter() - started, started


@dataclass(frozen=True)
class Measured:
    """The measures of a step that have not been read yet.

    Attributes
    ----------
    step, cells
        Number of the step, and of cells in its mini-batch.
    names, books
        Names of the losses, and number of codebooks.
    values
        The losses, and the perplexity of each codebook. If workers share the codebooks, the total loss of the worker of
        each codebook follows.
    started, waited
        Start time of the step, and seconds spent waiting for its mini-batch.
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
        """Start to copy the measures of a step to the host."""
        named, books = terms.as_tensors(), len(quantised.projections)
        values = torch.stack(list(named.values())).detach().double()
        of_books = perplexities(quantised)
        if isinstance(collective, ByBooks):
            own = torch.stack([of_books, values[0].expand_as(of_books)], 1)
            of_books = collective.joined(own, books).T.flatten()
        copied = Copied.of(torch.cat([values, of_books]))
        return cls(batch.step, batch.cells, tuple(named), books, copied, started, waited)

    def read(self) -> tuple[dict[str, float], list[float]]:
        """Return the losses by name, and the perplexities.

        Raises
        ------
        TrainingError
            A loss is not finite, or the workers' losses differ.
        """
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
