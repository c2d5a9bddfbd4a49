"""Decide when a checkpoint is due, and store checkpoints of the serial runtime.

Under Ray Train all workers write a checkpoint together, so all must learn at the same step that one is due. All workers
count the same steps; for a limit in minutes, the clock of the first worker decides.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ndreamer_dist import keys
from ndreamer_dist.model.collectives import Collective
from ndreamer_dist.model.transfer import Copied
from ndreamer_dist.settings import TrainSettings
from ndreamer_dist.storage.files import Storage
from ndreamer_dist.training.loop import STATE_FILE

ASK_EVERY = 8
"""Steps between looks at the clock: with several workers each look takes a small all-reduce."""
MOST_COST = 0.02
"""Largest fraction of the training time that checkpoints by time may take on a slow disk or object store."""


class Schedule:
    """Decides after which steps a checkpoint is due: every so many steps or minutes, and when training must stop.

    Parameters
    ----------
    collective, device
        The workers, and the device of tensors that they exchange.
    stop
        Returns whether training must stop; its answer counts on the first worker only.

    Attributes
    ----------
    stopping
        Whether training must stop after the last step passed to `due`.
    """

    def __init__(
        self,
        settings: TrainSettings,
        collective: Collective,
        device: Any = "cpu",
        clock: Callable[[], float] = time.monotonic,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self._steps, self._minutes = settings.checkpoint_steps, settings.checkpoint_minutes
        self._collective, self._device, self._clock = collective, device, clock
        self._stop = stop
        self._last = clock()
        self._cost = 0.0
        self._pending: Copied | None = None
        self._pending_is_old = False
        self.stopping = False

    def due(self, step: int) -> bool:
        """Return whether a checkpoint follows this step, equally on all workers; all must call it after every step."""
        late, self.stopping = self._agreed(step)
        by_steps = self._steps is not None and step % self._steps == 0
        if not by_steps and not late and not self.stopping:
            return False
        self._last = self._clock()
        self._pending_is_old = self._pending is not None
        return True

    def _agreed(self, step: int) -> tuple[bool, bool]:
        """Return whether a checkpoint is overdue and whether training must stop, equally on all workers."""
        if self._collective.world == 1:
            return self._overdue(step), self._stop()
        if step % ASK_EVERY:
            return False, False
        flags = [float(self._collective.rank == 0 and flag) for flag in (self._overdue(step), self._stop())]
        sums = self._collective.all_sum(torch.tensor(flags).to(self._device, non_blocking=True))
        answer: Copied | None = Copied.of(sums)
        if sums.is_cuda:  # do not wait for the GPU: read the previous answer
            answer, self._pending = self._pending, answer
        late, stopping = (value > 0 for value in (answer.tolist() if answer is not None else (0.0, 0.0)))
        # An answer that was pending at the last checkpoint calls for that checkpoint, not for another one.
        late, self._pending_is_old = late and not self._pending_is_old, False
        return late, stopping

    def _overdue(self, step: int) -> bool:
        if self._minutes is None or step % ASK_EVERY:
            return False
        return self._clock() - self._last >= max(60 * self._minutes, self._cost / MOST_COST)

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Measure how long training waits for a checkpoint, which sets the least time to the next one (`MOST_COST`)."""
        began = self._clock()
        yield
        self._last = self._clock()
        self._cost = self._last - began


def save_serial(storage: Storage, step: int, files: dict[str, bytes]) -> None:
    """Write a checkpoint of the serial runtime, then delete the earlier ones."""
    before = _complete(storage)
    name = f"{keys.TRAIN_SERIAL}/{step:09d}"
    for file in sorted(files, key=STATE_FILE.__eq__):
        storage.write_atomic(f"{name}/{file}", files[file])
    for old in before:
        if old != name:
            storage.delete(old)


@dataclass(frozen=True)
class Checkpoint:
    """The files of a checkpoint by name, and its address."""

    url: str
    files: Mapping[str, bytes]


def latest_serial(storage: Storage) -> Checkpoint | None:
    """Return the last complete checkpoint of the serial runtime, if any."""
    folders = _complete(storage)
    if not folders:
        return None
    names = storage.list(folders[-1])
    return Checkpoint(f"{storage.url}/{folders[-1]}", {name.rpartition("/")[2]: storage.read(name) for name in names})


def _complete(storage: Storage) -> list[str]:
    """Return the folders of complete checkpoints, oldest first."""
    names = storage.list(keys.TRAIN_SERIAL)
    return sorted(name.rpartition("/")[0] for name in names if name.endswith(f"/{STATE_FILE}"))
