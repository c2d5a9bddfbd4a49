"""Measure the cost of a stage from a thread, and write logs/progress.json and logs/stages.jsonl.

The cost is seconds, peak memory, and bytes read and written, of this process and its descendants. Private pages are
summed over the process tree. Shared pages (libraries, Ray's object store) are counted once, by the process that has the
most. Bytes are those of read and write calls, including pipes and sockets. On a cluster this covers the driver's
machine; the largest peak memory of a worker is reported in addition. The progress itself is recorded in `events`.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import pandas as pd
import psutil

from ndreamer_dist import keys
from ndreamer_dist.compute import events
from ndreamer_dist.errors import DamagedError
from ndreamer_dist.storage.checksums import seal, unseal
from ndreamer_dist.storage.files import Storage
from ndreamer_dist.storage.retries import hurry

logger = logging.getLogger(__name__)

INTERVAL_SECONDS = 0.5
LOCAL_SECONDS, REMOTE_SECONDS = 2.0, 15.0
"""Time between two writes of logs/progress.json; on object storage each write is a request."""
LOG_SECONDS = 30.0
"""Time between two log lines about the progress of a stage."""


class PeakMemory:
    """Samples memory and traffic of the process tree until it is closed.

    Parameters
    ----------
    also
        Called after every sample.

    Attributes
    ----------
    bytes, now
        Peak memory, and memory at the last sample, in bytes.
    """

    def __init__(self, also: Callable[[PeakMemory], object] = lambda _: None) -> None:
        self.bytes = self.now = 0
        self._also = also
        self._before = self._moved = tree_traffic(os.getpid())
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True, name="ndreamer-memory")
        self._thread.start()

    @property
    def traffic(self) -> tuple[int, int]:
        """Bytes read and written since the start."""
        return self._moved[0] - self._before[0], self._moved[1] - self._before[1]

    def _sample(self) -> None:
        while True:
            self._look()
            self._also(self)
            if self._stop.wait(INTERVAL_SECONDS):
                return

    def _look(self) -> None:
        self.now = tree_memory(os.getpid())
        self.bytes = max(self.bytes, self.now)
        read, written = tree_traffic(os.getpid())
        self._moved = max(self._moved[0], read), max(self._moved[1], written)

    def close(self) -> None:
        """Stop the thread and take a last sample."""
        self._stop.set()
        self._thread.join()
        self._look()


def tree_memory(pid: int) -> int:
    """Return the memory of a process and its descendants in bytes, with the largest shared part counted once."""
    held = []
    for process in process_tree(pid):
        with suppress(psutil.Error):  # it has ended
            # `memory_full_info` counts shared pages exactly, but it walks all pages and stops the process meanwhile.
            memory = process.memory_info()
            held.append((memory.rss, getattr(memory, "shared", 0)))
    return sum(resident - shared for resident, shared in held) + max((shared for _, shared in held), default=0)


def tree_traffic(pid: int) -> tuple[int, int]:
    """Return the bytes that a process and its descendants, ended ones included, have read and written.

    Linux adds the bytes of an ended process to its parent. Zeros on systems that do not count.
    """
    read = written = 0
    for process in process_tree(pid):
        with suppress(psutil.Error, AttributeError):
            moved = process.io_counters()
            read, written = read + moved.read_chars, written + moved.write_chars
    return read, written


def process_tree(pid: int) -> list[psutil.Process]:
    """Return a process and its descendants; an empty list if it has ended."""
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.Error:
        return []


class Watcher:
    """Writes the progress of a stage to logs/progress.json, to the log and to Ray's metrics."""

    def __init__(self, run: Storage, stage: events.StageProgress) -> None:
        self._run, self._stage = run, stage
        self._exporter = events.Exporter(run.name, stage.name)
        self._every = LOCAL_SECONDS if run.is_local else REMOTE_SECONDS
        self._written, self._logged = 0.0, time.monotonic()

    def look(self, memory: PeakMemory, *, last: bool = False) -> None:
        """Write the outputs that are due; a failed write does not end the stage."""
        now = time.monotonic()
        if not self._stage.has_work or (now - self._written < self._every and not last):
            return
        self._written = now
        sizes = {"memory_bytes": memory.now, "peak_bytes": memory.bytes}
        facts = self._stage.as_facts() | sizes | {"host": socket.gethostname()}
        try:
            with hurry():
                self._run.write_atomic(keys.PROGRESS, seal(facts))
            self._exporter.export(self._stage, memory.now)
        except Exception:
            logger.debug("the progress of the stage could not be written", exc_info=True)
        if last or now - self._logged >= LOG_SECONDS:
            self._logged = now
            events.log_progress(facts)


@contextmanager
def metered(
    run: Storage, stage: str, cells: int = 0, promised: int | None = None, place: str = ""
) -> Iterator[dict[str, Any]]:
    """Watch a stage until the block ends, then append a line to logs/stages.jsonl; the block may add facts to it.

    Parameters
    ----------
    cells
        Cells that the stage processes, for its speed.
    promised
        Memory in bytes that the plan allows the stage, if known.
    place
        Position of the stage in the run, such as `2/8`.
    """
    facts: dict[str, Any] = {"stage": stage, "started": time.time(), "host": socket.gethostname()}
    with events.staged(stage, cells, place) as now:
        watcher, started = Watcher(run, now), time.perf_counter()
        peak = PeakMemory(watcher.look)
        try:
            yield facts
        finally:
            peak.close()
            watcher.look(peak, last=True)
    read, written = peak.traffic
    facts |= {
        "seconds": round(time.perf_counter() - started, 3), "peak_bytes": peak.bytes, "promised_bytes": promised,
        "read_bytes": read, "written_bytes": written,
    }  # fmt: skip
    if now.worker_peak:
        facts["worker_peak_bytes"] = now.worker_peak
    if now.engine:
        facts["engine"] = now.engine
    before = run.read_if_there(keys.STAGES_LOG) or b""
    run.write_atomic(keys.STAGES_LOG, before + (json.dumps(facts) + "\n").encode())


def progress_of(run: Storage) -> dict[str, Any]:
    """Return the content of logs/progress.json; empty if it is missing or damaged."""
    with suppress(DamagedError):
        return unseal(run.read_if_there(keys.PROGRESS) or b"{}", f"{run.url}/{keys.PROGRESS}")
    return {}


def _stage_lines(run: Storage) -> Iterator[dict[str, Any]]:
    """Yield the lines of logs/stages.jsonl; damaged lines are skipped, since the log holds no results."""
    for line in (run.read_if_there(keys.STAGES_LOG) or b"").splitlines():
        with suppress(ValueError, TypeError, RecursionError):
            facts = dict(json.loads(line))
            sizes = (size for name, size in facts.items() if name.endswith("_bytes") and size is not None)
            if "stage" in facts and all(isinstance(number, int | float) for number in (facts.get("seconds"), *sizes)):
                yield facts


def last_call(run: Storage) -> tuple[str, float] | None:
    """Return the input of the last logged call and the end time of its last stage; None without a log."""
    lines = [line for line in _stage_lines(run) if isinstance(line.get("started"), int | float) and line.get("input")]
    return (str(lines[-1]["input"]), lines[-1]["started"] + lines[-1]["seconds"]) if lines else None


def stage_costs(run: Storage) -> pd.DataFrame:
    """Return the cost of the finished stages of a run, one row each in their order, from logs/stages.jsonl.

    A call logs a stage that was already finished with almost no time, so the longest line of a stage is the call that
    computed it. The cost of interrupted calls is missing, since they log nothing.
    """
    lines = list(_stage_lines(run))
    rows = []
    for stage in keys.FLOW:
        own = [line for line in lines if line.get("stage") == stage]
        if own:
            line = max(own, key=lambda line: line["seconds"])
            gigabytes = {
                f"{name}_gb": np.nan if line.get(f"{name}_bytes") is None else line[f"{name}_bytes"] / 1e9
                for name in ("peak", "promised", "read", "written")
            }
            engine = str(line.get("engine", ""))
            rows.append({"stage": stage, "seconds": line["seconds"], **gigabytes, "engine": engine})
    return pd.DataFrame(rows)
