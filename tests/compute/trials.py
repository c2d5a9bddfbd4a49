"""What a trial of a GPU may meet; in a module that loads nothing, since each runs in a process of its own."""

from __future__ import annotations

import os
import time


def fit() -> None:
    """Find nothing wrong."""


def aborts() -> None:
    """End as FAISS does where a wheel holds no code for the GPU."""
    os.abort()


def hangs() -> None:
    """Never answer."""
    time.sleep(60)
