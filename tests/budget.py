"""What every test file costs: processor seconds of the tests and of all processes that they start.

Wall time says little on a shared machine. A file of the gate may cost LIMIT_SECONDS, and SLACK times its number in
`budget.json`. On a slower machine both grow by the ratio of what most files cost to their numbers. With
`NDREAMER_BUDGET=enforce`, which the gate sets, the tests fail if a file costs more: make it cheaper, mark its most
expensive tests `slow`, or write a new number down. `NDREAMER_DURATIONS=FILE` writes all costs, by file and by test.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

LIMIT_SECONDS = 90.0
"""Processor seconds that a file of the gate may cost."""
SLACK, LEAST_SECONDS = 3.0, 15.0
"""A file may cost SLACK times its budget, and LEAST_SECONDS if that is more."""
BUDGET = Path(__file__).parent / "budget.json"
PRINTED = 20
"""Most expensive files, which are printed."""
EVERY_SECONDS = 1.0
"""How often processes are looked at: the last second of one that nobody waits for is not seen."""
QUICK_SECONDS = 0.3
"""Tests that take less are measured together with the next of their file."""
TICK = os.sysconf("SC_CLK_TCK")
PARENT, STARTED = 1, 19
OWN, WAITED = slice(11, 13), slice(13, 15)
"""Fields of /proc/PID/stat, counted from the third."""

Costs = dict[str, dict[str, float]]
Stats = dict[int, list[bytes]]


class Process:
    """A process as it was last seen: its own seconds, those of children that it waited for, and its children."""

    def __init__(self) -> None:
        self.alive = True
        self.own = self.waited = 0.0
        self.children: list[Process] = []

    def note(self, stat: list[bytes]) -> None:
        """Take over what the system says of it now."""
        self.alive = True
        self.own, self.waited = (sum(map(int, stat[fields])) / TICK for fields in (OWN, WAITED))

    def seconds(self) -> float:
        """Return what it and all below it have used; an ended child that it did not wait for counts as last seen."""
        alive = sum(child.seconds() for child in self.children if child.alive)
        ended = sum(child.seconds() for child in self.children if not child.alive)
        return self.own + alive + max(self.waited, ended)


class Meter:
    """Watch this process and all that it starts; a process whose parent has ended stays known."""

    def __init__(self) -> None:
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._known: dict[tuple[int, bytes], Process] = {}  # by number and start
        self._thread = threading.Thread(target=self._watch, daemon=True, name="processor-seconds")

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._ended.set()

    def _watch(self) -> None:
        while not self._ended.wait(EVERY_SECONDS):
            self.seconds()

    def seconds(self) -> float:
        """Return the processor seconds of this process and of all that it has started."""
        with self._lock:
            stats, below = _stats(), defaultdict(list)
            for pid, stat in stats.items():
                below[int(stat[PARENT])].append(pid)
            for process in self._known.values():
                process.alive = False
            own = os.getpid(), stats[os.getpid()][STARTED]
            waiting = [own, *(key for key in self._known if stats.get(key[0], [b""] * 20)[STARTED] == key[1])]
            for pid, started in waiting:  # grows meanwhile
                process = self._known.setdefault((pid, started), Process())
                process.note(stats[pid])
                for child in below[pid]:
                    key = child, stats[child][STARTED]
                    if key not in self._known:
                        self._known[key] = Process()
                        process.children.append(self._known[key])
                        waiting.append(key)
            return self._known[own].seconds()


def _stats() -> Stats:
    """Return the fields of /proc/PID/stat from the third on (state, parent, ...), of every process."""
    stats = {}
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            with contextlib.suppress(OSError), open(f"/proc/{entry.name}/stat", "rb") as file:  # noqa: PTH123 (quick)
                stats[int(entry.name)] = file.read().rpartition(b")")[2].split()
    return stats


class Budget:
    """Measure tests in the process that runs them; the process that the user started adds up, prints and judges."""

    def __init__(self, config: pytest.Config) -> None:
        self.tests: Costs = defaultdict(lambda: {"processor": 0.0, "wall": 0.0})
        self._config, self._meter = config, Meter()
        self._seconds, self._time = 0.0, 0.0

    def pytest_collection_finish(self) -> None:
        """Begin to measure; what is loaded to find the tests is not theirs."""
        if not (getattr(self._config.option, "tx", None) and not hasattr(self._config, "workerinput")):
            self._meter.start()
            self._seconds, self._time = self._meter.seconds(), time.monotonic()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
        """Measure a test, with the fixtures that are made for it."""
        outcome = yield
        same = nextitem is not None and nextitem.path == item.path
        if not same or time.monotonic() - self._time > QUICK_SECONDS:
            seconds, now = self._meter.seconds(), time.monotonic()
            _add(self.tests[item.nodeid], seconds - self._seconds, now - self._time)
            self._seconds, self._time = seconds, now
        return outcome

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Send what was measured to the process that the user started, or judge it there."""
        self._meter.stop()
        output = getattr(self._config, "workeroutput", None)
        if output is not None:
            output["budget"] = {name: dict(cost) for name, cost in self.tests.items()}
            return
        if (file := os.environ.get("NDREAMER_DURATIONS")) and self.tests:
            Path(file).write_text(json.dumps({"files": by_file(self.tests), "tests": self.tests}, indent=1))
        if enforced() and too_dear(by_file(self.tests), budgets()) and not session.exitstatus:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """Take over what a process of pytest-xdist has measured."""
        for name, cost in getattr(node, "workeroutput", {}).get("budget", {}).items():
            _add(self.tests[name], cost["processor"], cost["wall"])

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """Print the most expensive files, and those that cost too much."""
        files = by_file(self.tests)
        if len(files) > 1:
            terminalreporter.section(f"processor seconds of the {PRINTED} most expensive of {len(files)} files")
            for name, cost in sorted(files.items(), key=lambda entry: -entry[1]["processor"])[:PRINTED]:
                terminalreporter.write_line(f"{cost['processor']:7.1f} s ({cost['wall']:.0f} s of wall time) {name}")
            total = sum(cost["processor"] for cost in files.values())
            terminalreporter.write_line(f"{total:7.1f} s in all")
        for line in too_dear(files, budgets()) if enforced() else ():
            terminalreporter.write_line(f"TOO EXPENSIVE {line}", red=True)


def _add(cost: dict[str, float], processor: float, wall: float) -> None:
    cost["processor"] = round(cost["processor"] + processor, 2)
    cost["wall"] = round(cost["wall"] + wall, 2)


def enforced() -> bool:
    """Return whether a file that costs too much fails the tests."""
    return os.environ.get("NDREAMER_BUDGET") == "enforce"


def budgets() -> dict[str, float]:
    """Return the processor seconds that files were measured to cost."""
    return dict(json.loads(BUDGET.read_text()))


def by_file(tests: Costs) -> Costs:
    """Add up tests by their file."""
    files: Costs = defaultdict(lambda: {"processor": 0.0, "wall": 0.0})
    for name, cost in tests.items():
        _add(files[name.partition("::")[0]], cost["processor"], cost["wall"])
    return dict(files)


def too_dear(files: Costs, budget: dict[str, float]) -> list[str]:
    """Return a line for every file that costs too much for the gate, on a machine as slow as this one."""
    paces = [cost["processor"] / budget[name] for name, cost in files.items() if name in budget]
    pace = max(1.0, statistics.median(paces)) if paces else 1.0
    lines = []
    for name, cost in sorted(files.items()):
        most = pace * min(LIMIT_SECONDS, max(SLACK * budget.get(name, 0.0), LEAST_SECONDS))
        if cost["processor"] > most:
            lines.append(f"{name}: {cost['processor']:.1f} processor seconds, at most {most:.0f} in the gate")
    return lines
