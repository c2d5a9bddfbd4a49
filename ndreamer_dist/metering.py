"""What a stage cost: seconds, and the peak memory of this process and all it started, shared pages counted once.

Private pages are added up over the process tree, and of the shared ones (libraries, Ray's object store) the largest
process's are taken once. On a cluster this is the driver's share only.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ndreamer_dist import keys
from ndreamer_dist.rundir import RunDirectory

INTERVAL_SECONDS = 0.5


class PeakMemory:
    """Samples the process tree's memory until closed."""

    def __init__(self) -> None:
        self.bytes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True, name="ndreamer-memory")
        self._thread.start()

    def _sample(self) -> None:
        while True:
            self.bytes = max(self.bytes, tree_memory(os.getpid()))
            if self._stop.wait(INTERVAL_SECONDS):
                return

    def close(self) -> None:
        """Take no more samples."""
        self._stop.set()
        self._thread.join()


def tree_memory(pid: int) -> int:
    """Return the bytes that a process and its descendants hold together; 0 where the system does not tell."""
    held = [_resident_and_shared(process) for process in _descendants(pid)]
    return sum(resident - shared for resident, shared in held) + max(shared for _, shared in held)


def _resident_and_shared(pid: int) -> tuple[int, int]:
    try:
        # smaps_rollup would tell shares exactly, but it walks all pages and stops the process meanwhile.
        fields = Path(f"/proc/{pid}/statm").read_text().split()
    except OSError:
        return 0, 0  # the process has ended
    page = os.sysconf("SC_PAGE_SIZE")
    return int(fields[1]) * page, int(fields[2]) * page


def _descendants(pid: int) -> list[int]:
    found, waiting = [], [pid]
    while waiting:
        process = waiting.pop()
        found.append(process)
        try:
            tasks = list(Path(f"/proc/{process}/task").iterdir())
            children = [(task / "children").read_text().split() for task in tasks]
        except OSError:
            continue
        waiting += [int(child) for line in children for child in line]
    return found


@contextmanager
def metered(run: RunDirectory, stage: str) -> Iterator[dict[str, Any]]:
    """Add a line to logs/stages.jsonl when a stage ends; the block may put more facts into what it is given."""
    facts: dict[str, Any] = {"stage": stage, "started": time.time(), "host": socket.gethostname()}
    peak, started = PeakMemory(), time.perf_counter()
    try:
        yield facts
    finally:
        peak.close()
    facts |= {"seconds": round(time.perf_counter() - started, 3), "peak_bytes": peak.bytes}
    storage = run.storage
    before = storage.read(keys.STAGES_LOG) if storage.exists(keys.STAGES_LOG) else b""
    storage.write_atomic(keys.STAGES_LOG, before + (json.dumps(facts) + "\n").encode())
