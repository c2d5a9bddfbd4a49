"""Record the progress of the current stage, and export it as log lines and as Prometheus metrics of Ray.

In the driver, the runtime and the training progress report to a `StageProgress`; the answer of each task brings the
peak memory of its process along. Every few seconds a thread of the driver (`monitors`) writes the progress to a file
and to the metrics, where `ndreamer-dist info` and Prometheus read it, also from other machines. Log lines are text, or
JSON objects with `run.log_format=json`.
"""

from __future__ import annotations

import json
import logging
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ndreamer_dist.errors import printable

logger = logging.getLogger(__name__)

FACTS = "facts"
"""Attribute of a log record with the extra fields of its JSON line."""


class Lines(logging.Formatter):
    """Formats a log record as its message or as a JSON object, in one line."""

    as_json = False

    def format(self, record: logging.LogRecord) -> str:
        """Return the line; a traceback follows the text, or is a field of the JSON."""
        if not self.as_json:
            text = printable(record.getMessage())
            return f"{text}\n{self.formatException(record.exc_info)}" if record.exc_info else text
        entries = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created)),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, FACTS, {}),
        }
        if record.exc_info:
            entries["trace"] = self.formatException(record.exc_info)
        return json.dumps(entries)


def choose_format(log_format: Literal["text", "json"]) -> None:
    """Set the format of the command line's log handlers."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler.formatter, Lines):
            handler.formatter.as_json = log_format == "json"


@dataclass
class StageProgress:
    """The progress of a stage, as its tasks and the training report it.

    Attributes
    ----------
    name, cells
        Name of the stage, and number of cells that it processes.
    place
        Position of the stage in the run, such as `2/8`; empty outside a run.
    started
        Time at which the stage started, in seconds since the epoch.
    shards, had
        Number of shards of the stage, and how many of them existed before it started.
    title, done, total, began
        The current round of tasks: its title, the numbers of finished and of all tasks, and its start time.
    step, steps
        The last finished training step, and the number of all steps.
    before
        The training step from which the training continued, and the time of its report.
    measures
        Measures of the last training step.
    worker_peak
        Largest peak memory of a worker process on any machine, bytes; 0 before the first report.
    engine
        Processors or GPUs, if there is a choice.
    """

    name: str
    cells: int = 0
    place: str = ""
    started: float = field(default_factory=time.time)
    shards: int = 0
    had: int = 0
    title: str = ""
    done: int = 0
    total: int = 0
    began: float = field(default_factory=time.time)
    step: int = 0
    steps: int = 0
    before: tuple[int, float] | None = None
    measures: dict[str, float] = field(default_factory=dict)
    worker_peak: int = 0
    engine: str = ""

    @property
    def has_work(self) -> bool:
        """Whether the stage has tasks or training steps."""
        return self.total > 0 or self.steps > 0

    def note_shards(self, stage: str, shards: int, todo: int) -> None:
        """Note how many shards a stage has, and how many of them it has to write."""
        if stage == self.name:
            self.shards, self.had = shards, shards - todo

    def begin(self, title: str, total: int) -> None:
        """Start a round of tasks."""
        self.title, self.done, self.total, self.began = title, 0, total, time.time()

    def advance(self) -> None:
        """Count a finished task."""
        self.done += 1

    def note_peak(self, peak: int) -> None:
        """Note the peak memory of a worker."""
        self.worker_peak = max(self.worker_peak, peak)

    def note_step(self, step: int, steps: int, measures: Mapping[str, float]) -> None:
        """Note a finished training step."""
        self.before = self.before or (step, time.time())
        self.step, self.steps = step, steps
        self.measures.update(measures)

    @property
    def new_cells(self) -> int:
        """Cells that this round of tasks has processed."""
        fresh = self.cells * (self.shards - self.had) / self.shards if self.shards else self.cells
        return int(fresh * self.done / self.total) if self.total else 0

    @property
    def cells_per_second(self) -> float:
        """Cells per second of the last training step, or of this round of tasks so far."""
        if self.steps:
            return float(self.measures.get("cells_per_second", 0.0))
        return self.new_cells / max(time.time() - self.began, 1e-3)

    @property
    def seconds_left(self) -> float | None:
        """Seconds that this round of tasks or the training will still take; None before anything is finished."""
        if self.steps:
            first, started = self.before or (self.step, 0.0)
            done, left = self.step - first, self.steps - self.step
        else:
            started, done, left = self.began, self.done, self.total - self.done
        return (time.time() - started) / done * left if done > 0 else None

    def as_facts(self) -> dict[str, Any]:
        """Return the progress as plain values."""
        facts: dict[str, Any] = {"stage": self.name, "started": self.started, "seen": time.time()}
        if self.total:
            facts |= {"round": self.title, "done": self.done, "total": self.total}
        if self.shards:
            facts |= {"shards": self.shards, "shards_before": self.had}
        if self.steps:
            facts |= {"step": self.step, "steps": self.steps, "measures": dict(self.measures)}
        if self.worker_peak:
            facts["worker_peak_bytes"] = self.worker_peak
        if self.engine:
            facts["engine"] = self.engine
        if (left := self.seconds_left) is not None:
            facts["seconds_left"] = round(left, 1)
        return facts | {"cells_per_second": round(self.cells_per_second, 1)}


_now: ContextVar[StageProgress | None] = ContextVar("stage", default=None)


def stage_now() -> StageProgress | None:
    """Return the current stage of this thread, if any."""
    return _now.get()


@contextmanager
def staged(name: str, cells: int, place: str = "") -> Iterator[StageProgress]:
    """Make a stage the current one until the block ends."""
    stage = StageProgress(name, cells, place)
    token = _now.set(stage)
    try:
        yield stage
    finally:
        _now.reset(token)


def duration(seconds: float) -> str:
    """Format a duration in days, hours, minutes or seconds."""
    for unit, size in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 1.5 * size:
            amount = seconds / size
            return f"{amount:.1f} {unit}" if amount < 10 else f"{amount:.0f} {unit}"
    return f"{seconds:.0f} s"


def titled(title: str) -> str:
    """Return the title of a progress bar, prefixed by the position of the current stage in the run."""
    stage = stage_now()
    return f"{stage.place} {title}" if stage and stage.place else title


def bars_disabled() -> bool | None:
    """Return tqdm's `disable` for the bars of a command: hidden with `--quiet`, else shown on a terminal only."""
    return None if logging.getLogger("ndreamer_dist").isEnabledFor(logging.INFO) else True


def log_progress(facts: Mapping[str, Any]) -> None:
    """Log the progress of a stage in one line."""
    done, total, what = facts.get("done", 0), facts.get("total", 0), "tasks"
    if "steps" in facts:
        done, total, what = facts["step"], facts["steps"], "steps"
    text = f"{facts['stage']}: {done} of {total} {what}"
    if facts["cells_per_second"]:
        text += f", {facts['cells_per_second']:,.0f} cells/s"
    if "total" in facts.get("measures", {}):
        text += f", loss {facts['measures']['total']:.4g}"
    if "worker_peak_bytes" in facts:
        text += f", largest worker {facts['worker_peak_bytes'] / 1e9:.1f} GB"
    left = f", about {duration(facts['seconds_left'])} left" if facts.get("seconds_left") else ""
    logger.info("%s, %.1f GB%s", text, facts["memory_bytes"] / 1e9, left, extra={FACTS: dict(facts)})


# --- a worker's memory -----------------------------------------------------------------------------------------------


_counted = ""
"""The stage in which the peak memory of this process is measured."""


def count_peak(stage: str) -> None:
    """Reset the peak memory of this process if `stage` is another one than before (Linux only)."""
    global _counted
    if stage != _counted:
        _counted = stage
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """Return the peak memory of this process in bytes, shared pages included; on Linux since the last reset."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


# --- Prometheus ------------------------------------------------------------------------------------------------------


class Metric(NamedTuple):
    """Definition of a Ray metric; the label `run` is the last part of the run directory's path."""

    kind: Literal["Counter", "Gauge"]
    name: str
    description: str
    labels: tuple[str, ...] = ("run", "stage")


PROMETHEUS_METRICS = {
    "cells": Metric("Counter", "ndreamer_cells_done", "Cells that a stage has done."),
    "bytes": Metric("Counter", "ndreamer_bytes_written", "Bytes of finished shards."),
    "progress": Metric("Gauge", "ndreamer_stage_progress", "Share of a stage's tasks or steps that is done."),
    "speed": Metric("Gauge", "ndreamer_cells_per_second", "Cells a second."),
    "memory": Metric("Gauge", "ndreamer_memory_bytes", "Memory of the driver and all it started on its machine."),
    "worker": Metric("Gauge", "ndreamer_worker_peak_bytes", "The most memory of one worker so far, on any machine."),
    "step_seconds": Metric("Gauge", "ndreamer_step_seconds", "Seconds of the last training step."),
    "loss": Metric("Gauge", "ndreamer_loss", "Losses of the last training step.", ("run", "stage", "term")),
}


@lru_cache(maxsize=1)
def _metrics() -> dict[str, Any]:
    """Return this process's metrics, which Ray exports to Prometheus."""
    from ray.util import metrics

    return {
        short: getattr(metrics, metric.kind)(metric.name, metric.description, metric.labels)
        for short, metric in PROMETHEUS_METRICS.items()
    }


def on_ray() -> bool:
    """Return whether this process is connected to Ray."""
    return "ray" in sys.modules and bool(sys.modules["ray"].is_initialized())


def wrote(run: str, stage: str, size: int) -> None:
    """Count the bytes of a finished shard; this takes microseconds."""
    if size and on_ray():
        _metrics()["bytes"].inc(size, {"run": run, "stage": stage})


class Exporter:
    """Sets the Prometheus metrics of a stage."""

    def __init__(self, run: str, stage: str) -> None:
        self._tags = {"run": run, "stage": stage}
        self._cells = 0

    def export(self, stage: StageProgress, memory: int) -> None:
        """Set the metrics."""
        if not on_ray():
            return
        metrics, tags = _metrics(), self._tags
        done, total = (stage.step, stage.steps) if stage.steps else (stage.done, stage.total)
        if stage.new_cells > self._cells:
            metrics["cells"].inc(stage.new_cells - self._cells, tags)
            self._cells = stage.new_cells
        metrics["progress"].set(done / max(total, 1), tags)
        metrics["speed"].set(stage.cells_per_second, tags)
        metrics["memory"].set(memory, tags)
        if stage.worker_peak:
            metrics["worker"].set(stage.worker_peak, tags)
        for name, value in stage.measures.items():
            if name == "seconds":
                metrics["step_seconds"].set(value, tags)
            elif name not in NO_LOSSES:
                metrics["loss"].set(value, {**tags, "term": name})


NO_LOSSES = {"step", "seconds", "cells_per_second", "waiting", "learning_rate", "perplexity"}
"""Measures of a training step that are not losses."""
