"""The progress of training, shown while it runs: one bar, and warnings as soon as there is a reason.

The serial runtime shows them directly. On Ray, workers and driver share no screen, and log lines of workers stay in their
files. So the first worker reports to an actor, and the driver asks the actor once a second.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

from tqdm.auto import tqdm

from ndreamer_dist.compute.events import peak_bytes, stage_now, titled
from ndreamer_dist.compute.executor import Runtime
from ndreamer_dist.training.sampling import SamplingPlan

POLL_SECONDS = 1.0
TELL_SECONDS = 0.5
"""A worker tells of a step at most this often: a step may be shorter than the call."""

logger = logging.getLogger(__name__)


@dataclass
class Told:
    """What is known of a running training: the last step done, what it measured, the worker's memory, warnings and their levels by kind."""

    step: int = 0
    measures: dict[str, float] = field(default_factory=dict)
    peak: int = 0
    warnings: dict[str, tuple[str, int]] = field(default_factory=dict)


class Display(Protocol):
    """Where a training worker shows how it gets on."""

    def reached(self, step: int, measures: Mapping[str, float] | None = None) -> None:
        """Note that a step is done, and what it measured."""

    def warn(self, kind: str, text: str, level: int = logging.WARNING) -> None:
        """Note that something is wrong, or, at another level of the log, is to be known; a kind is told once."""

    def stop_asked(self) -> bool:
        """Return whether training must stop after this step."""


class OwnScreen:
    """One bar on this process's screen, and warnings in its log; `stop_asked` says whether training must stop."""

    def __init__(self, plan: SamplingPlan, runtime: Runtime, stop_asked: Callable[[], bool]) -> None:
        self.stop_asked = stop_asked
        hidden = None if runtime.progress is None else not runtime.progress
        self._plan, self._warned, self._stage = plan, set[str](), stage_now()
        self.bar = tqdm(total=plan.steps, desc=titled("train"), disable=hidden)

    def reached(self, step: int, measures: Mapping[str, float] | None = None) -> None:
        """See `Display.reached`."""
        if measures and not self.bar.disable:
            epoch = (step - 1) // self._plan.steps_per_epoch + 1
            speed = f"loss {measures['total']:.4g}, {measures['cells_per_second']:.0f} cells/s"
            self.bar.set_postfix_str(f"epoch {epoch}/{self._plan.epochs}, {speed}", refresh=False)
        self.bar.update(step - self.bar.n)
        if self._stage is not None:
            self._stage.note_step(step, self._plan.steps, measures or {})

    def warn(self, kind: str, text: str, level: int = logging.WARNING) -> None:
        """See `Display.warn`."""
        if kind not in self._warned:
            self._warned.add(kind)
            with tqdm.external_write_mode():
                logger.log(level, "%s", text)

    def show(self, told: Told) -> None:
        """Show what an actor was told."""
        if self._stage is not None:
            self._stage.note_peak(told.peak)
        self.reached(told.step, told.measures)
        for kind, (text, level) in told.warnings.items():
            self.warn(kind, text, level)


@contextmanager
def own_screen(plan: SamplingPlan, runtime: Runtime, stop_asked: Callable[[], bool]) -> Iterator[OwnScreen]:
    """Show a bar until the block ends."""
    shown = OwnScreen(plan, runtime, stop_asked)
    with shown.bar:
        yield shown


class TrainingProgress:
    """Keeps what the first worker told until the driver asks."""

    def __init__(self) -> None:
        self._told = Told()
        self._stop_asked = False

    def reached(self, step: int, measures: Mapping[str, float] | None = None, peak: int = 0) -> bool:
        """See `Display.reached`; `peak` is the most memory that the worker has held. Return whether it must stop."""
        self._told.step, self._told.measures, self._told.peak = step, dict(measures or {}), peak
        return self._stop_asked

    def stop(self) -> None:
        """Let training stop after its next step."""
        self._stop_asked = True

    def warn(self, kind: str, text: str, level: int = logging.WARNING) -> None:
        """See `Display.warn`."""
        self._told.warnings.setdefault(kind, (text, level))

    def told(self) -> Told:
        """Return all that was told so far."""
        return self._told


@dataclass
class RemoteDisplay:
    """A worker's way to the driver's screen, for a training of so many steps. That the actor is gone is no reason to stop it."""

    actor: Any
    steps: int
    answers: list[Any] = field(default_factory=list)
    told_at: float = 0.0

    def reached(self, step: int, measures: Mapping[str, float] | None = None) -> None:
        """See `Display.reached`; nothing is waited for."""
        if step == self.steps or time.monotonic() - self.told_at >= TELL_SECONDS:
            self.told_at = time.monotonic()
            self.answers.append(self.actor.reached.remote(step, measures, peak_bytes()))

    def stop_asked(self) -> bool:
        """See `Display.stop_asked`; it is what the actor has answered by now."""
        import ray

        if not self.answers:
            return False
        ready, self.answers[:] = ray.wait(self.answers, num_returns=len(self.answers), timeout=0)
        with suppress(ray.exceptions.RayActorError):
            return any(ray.get(ready))
        return False

    def warn(self, kind: str, text: str, level: int = logging.WARNING) -> None:
        """See `Display.warn`; rare, so it is waited for: training may end right after."""
        import ray

        with suppress(ray.exceptions.RayActorError):
            ray.get(self.actor.warn.remote(kind, text, level))


@contextmanager
def remote_screen(
    plan: SamplingPlan, runtime: Runtime, run: str, stop_asked: Callable[[], bool]
) -> Iterator[RemoteDisplay]:
    """Show, in the driver, what workers tell the display that is given, until the block ends.

    The actor between them is named after the run; of two that began at once each has a name of its own.
    """
    import ray

    name = f"training progress of {run} ({uuid.uuid4().hex[:6]})"
    actor: Any = ray.remote(TrainingProgress).options(name=name, num_cpus=0).remote()
    stop = threading.Event()
    with own_screen(plan, runtime, stop_asked) as shown:

        def show() -> None:
            with suppress(ray.exceptions.RayActorError):
                if stop_asked():
                    actor.stop.remote()
                shown.show(ray.get(actor.told.remote()))

        def watch() -> None:
            while not stop.wait(POLL_SECONDS):
                show()

        watcher = threading.Thread(target=watch, daemon=True, name="ndreamer-progress")
        watcher.start()
        try:
            yield RemoteDisplay(actor, plan.steps)
        finally:
            stop.set()
            watcher.join()
            show()
            ray.kill(actor)
