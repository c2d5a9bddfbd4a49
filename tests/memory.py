"""Memory of a piece of work, whatever other threads of the tests do."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable

TIMES = 3


def peak_bytes(work: Callable[[], object]) -> int:
    """Return the peak of the memory that work allocates: the least of a few calls, since other threads allocate as well."""
    peaks = []
    for _ in range(TIMES):
        tracemalloc.start()
        try:
            work()
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    return min(peaks)
