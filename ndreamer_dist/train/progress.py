"""How far training is, shown while it runs: one bar, and warnings as soon as there is reason for one.

The serial runtime shows these directly. On Ray, workers and driver share no screen and workers' log lines stay in
their files, so the first worker tells an actor and the driver asks it once a second.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

from tqdm.auto import tqdm

from ndreamer_dist.runtime import Runtime
from ndreamer_dist.stream.plan import SamplingPlan

POLL_SECONDS = 1.0

logger = logging.getLogger(__name__)


@dataclass
class Told:
    """What is known of a running training: the last step done, its loss, its speed, and the warnings by kind."""

    step: int = 0
    loss: float | None = None
    cells_per_second: float | None = None
    warnings: dict[str, str] = field(default_factory=dict)


class Display(Protocol):
    """Where a training worker shows how it gets on."""

    def reached(self, step: int, loss: float | None = None, cells_per_second: float | None = None) -> None:
        """Note that a step is done."""

    def warn(self, kind: str, text: str) -> None:
        """Note that something is wrong; a kind is told once."""


class Screen:
    """One bar on this process's screen, and warnings in its log."""

    def __init__(self, plan: SamplingPlan, runtime: Runtime) -> None:
        hidden = None if runtime.progress is None else not runtime.progress
        self._plan, self._warned = plan, set[str]()
        self.bar = tqdm(total=plan.steps, desc="train", disable=hidden)

    def reached(self, step: int, loss: float | None = None, cells_per_second: float | None = None) -> None:
        """See `Display.reached`."""
        if loss is not None and not self.bar.disable:
            epoch = (step - 1) // self._plan.steps_per_epoch + 1
            told = f"epoch {epoch}/{self._plan.epochs}, loss {loss:.4g}, {cells_per_second:.0f} cells/s"
            self.bar.set_postfix_str(told, refresh=False)
        self.bar.update(step - self.bar.n)

    def warn(self, kind: str, text: str) -> None:
        """See `Display.warn`."""
        if kind not in self._warned:
            self._warned.add(kind)
            with tqdm.external_write_mode():
                logger.warning("%s", text)

    def show(self, told: Told) -> None:
        """Show what an actor was told."""
        self.reached(told.step, told.loss, told.cells_per_second)
        for kind, text in told.warnings.items():
            self.warn(kind, text)


@contextmanager
def screen(plan: SamplingPlan, runtime: Runtime) -> Iterator[Screen]:
    """Show a bar until the block ends."""
    shown = Screen(plan, runtime)
    with shown.bar:
        yield shown


class ToldActor:
    """Keeps what the first worker told until the driver asks."""

    def __init__(self) -> None:
        self._told = Told()

    def reached(self, step: int, loss: float | None = None, cells_per_second: float | None = None) -> None:
        """See `Display.reached`."""
        self._told.step, self._told.loss, self._told.cells_per_second = step, loss, cells_per_second

    def warn(self, kind: str, text: str) -> None:
        """See `Display.warn`."""
        self._told.warnings.setdefault(kind, text)

    def told(self) -> Told:
        """Return all that was told so far."""
        return self._told


@dataclass(frozen=True)
class RemoteDisplay:
    """A worker's way to the driver's screen. That the actor is gone is no reason to stop training."""

    actor: Any

    def reached(self, step: int, loss: float | None = None, cells_per_second: float | None = None) -> None:
        """See `Display.reached`; nothing is waited for."""
        self.actor.reached.remote(step, loss, cells_per_second)

    def warn(self, kind: str, text: str) -> None:
        """See `Display.warn`; rare, so it is waited for: training may end right after."""
        import ray

        with suppress(ray.exceptions.RayActorError):
            ray.get(self.actor.warn.remote(kind, text))


@contextmanager
def remote_screen(plan: SamplingPlan, runtime: Runtime) -> Iterator[RemoteDisplay]:
    """Show, in the driver, what workers tell the display that is given, until the block ends."""
    import ray

    actor: Any = ray.remote(ToldActor).options(num_cpus=0).remote()
    stop = threading.Event()
    with screen(plan, runtime) as shown:

        def show() -> None:
            with suppress(ray.exceptions.RayActorError):
                shown.show(ray.get(actor.told.remote()))

        def watch() -> None:
            while not stop.wait(POLL_SECONDS):
                show()

        watcher = threading.Thread(target=watch, daemon=True, name="ndreamer-progress")
        watcher.start()
        try:
            yield RemoteDisplay(actor)
        finally:
            stop.set()
            watcher.join()
            show()
            ray.kill(actor)
