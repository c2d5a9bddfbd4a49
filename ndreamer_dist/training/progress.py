"""Show the progress of training: one bar, and warnings as soon as they arise.

The serial runtime shows them directly. On Ray, workers have no access to the driver's terminal, and their log lines
stay in files. So the first worker reports to an actor, which the driver polls once a second.
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
REPORT_SECONDS = 0.5
"""Least time between two reports of a worker: a step may be shorter than the remote call."""

logger = logging.getLogger(__name__)


@dataclass
class Progress:
    """The progress of a training, as the first worker reported it.

    Attributes
    ----------
    step, measures
        The last finished step, and its measures.
    peak
        Peak memory of the worker, bytes.
    warnings
        Text and log level of each warning, by kind.
    """

    step: int = 0
    measures: dict[str, float] = field(default_factory=dict)
    peak: int = 0
    warnings: dict[str, tuple[str, int]] = field(default_factory=dict)


class Display(Protocol):
    """Where a training worker reports its progress."""

    def reached(self, step: int, measures: Mapping[str, float] | None = None) -> None:
        """Report a finished step and its measures."""

    def warn(self, kind: str, text: str, level: int = logging.WARNING) -> None:
        """Log a text at the given level, the first one of each kind only."""

    def stop_asked(self) -> bool:
        """Return whether training must stop after this step."""


class OwnScreen:
    """Shows a progress bar on this process's terminal, and logs warnings."""

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

    def show(self, progress: Progress) -> None:
        """Show the progress that an actor received."""
        if self._stage is not None:
            self._stage.note_peak(progress.peak)
        self.reached(progress.step, progress.measures)
        for kind, (text, level) in progress.warnings.items():
            self.warn(kind, text, level)


@contextmanager
def own_screen(plan: SamplingPlan, runtime: Runtime, stop_asked: Callable[[], bool]) -> Iterator[OwnScreen]:
    """Show a progress bar until the block ends."""
    shown = OwnScreen(plan, runtime, stop_asked)
    with shown.bar:
        yield shown


class TrainingProgress:
    """Actor that keeps the reports of the first worker for the driver, and the driver's stop request for the worker."""

    def __init__(self) -> None:
        self._progress = Progress()
        self._stop_asked = False

    def reached(self, step: int, measures: Mapping[str, float] | None = None, peak: int = 0) -> bool:
        """Note a finished step, its measures and the worker's peak memory; return whether the worker must stop."""
        self._progress.step, self._progress.measures, self._progress.peak = step, dict(measures or {}), peak
        return self._stop_asked

    def stop(self) -> None:
        """Ask training to stop after its next step."""
        self._stop_asked = True

    def warn(self, kind: str, text: str, level: int = logging.WARNING) -> None:
        """See `Display.warn`."""
        self._progress.warnings.setdefault(kind, (text, level))

    def progress(self) -> Progress:
        """Return the progress reported so far."""
        return self._progress


@dataclass
class RemoteDisplay:
    """Reports a worker's progress to the `TrainingProgress` actor; training goes on if the actor has died.

    Attributes
    ----------
    actor
        Handle of the actor.
    steps
        Number of steps of the training.
    answers
        Handles of the calls of `reached` that were not read yet.
    reported_at
        Time of the last report.
    """

    actor: Any
    steps: int
    answers: list[Any] = field(default_factory=list)
    reported_at: float = 0.0

    def reached(self, step: int, measures: Mapping[str, float] | None = None) -> None:
        """See `Display.reached`; this does not wait for the actor."""
        if step == self.steps or time.monotonic() - self.reported_at >= REPORT_SECONDS:
            self.reported_at = time.monotonic()
            self.answers.append(self.actor.reached.remote(step, measures, peak_bytes()))

    def stop_asked(self) -> bool:
        """See `Display.stop_asked`; this reads the answers that have arrived."""
        import ray

        if not self.answers:
            return False
        ready, self.answers[:] = ray.wait(self.answers, num_returns=len(self.answers), timeout=0)
        with suppress(ray.exceptions.RayActorError):
            return any(ray.get(ready))
        return False

    def warn(self, kind: str, text: str, level: int = logging.WARNING) -> None:
        """See `Display.warn`; this waits for the actor, since training may end right after."""
        import ray

        with suppress(ray.exceptions.RayActorError):
            ray.get(self.actor.warn.remote(kind, text, level))


@contextmanager
def remote_screen(
    plan: SamplingPlan, runtime: Runtime, run: str, stop_asked: Callable[[], bool]
) -> Iterator[RemoteDisplay]:
    """Yield a display for workers, and show what they report in the driver until the block ends.

    The name of the actor holds the run's name and a random part, since runs may have the same name.
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
                shown.show(ray.get(actor.progress.remote()))

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
