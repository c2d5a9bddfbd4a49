"""Possible outcomes of a trial of a GPU; the module imports little, since each trial runs in its own process."""

from __future__ import annotations

import os
import time


def fit() -> None:
    """Find nothing wrong."""


def aborts() -> None:
    """Abort the process, as FAISS does if a wheel holds no code for the GPU."""
    os.abort()


def hangs() -> None:
    """Never answer."""
    time.sleep(60)
