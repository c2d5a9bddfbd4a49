"""Handle Ctrl-C and SIGTERM: end the program, or finish a training step first.

`stop_signals` is for the command line; `deferred_stop` is for work that must not be interrupted in the middle. Both do
nothing outside the main thread, where Python allows no signal handlers, and leave ignored signals (`nohup`) alone.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
FATAL = 128
"""Shells add this to the number of the signal that ended a program."""
Handler = Callable[[int, FrameType | None], object]


@dataclass
class StopRequest:
    """The number of the signal that asked the program to stop; 0 before one has arrived."""

    number: int = 0

    def __call__(self) -> bool:
        """Return whether a signal has arrived."""
        return self.number != 0

    @property
    def exit_code(self) -> int:
        """The exit code that shells expect; that of Ctrl-C if a `KeyboardInterrupt` came without a signal."""
        return FATAL + (self.number or signal.SIGINT)


@contextmanager
def stop_signals() -> Iterator[StopRequest]:
    """Raise `KeyboardInterrupt` on SIGTERM as on Ctrl-C until the block ends, and record the first signal."""
    request = StopRequest()

    def interrupt(number: int, frame: FrameType | None) -> None:
        del frame
        request.number = request.number or number
        raise KeyboardInterrupt

    with _handled(interrupt):
        yield request


@contextmanager
def deferred_stop() -> Iterator[StopRequest]:
    """Record the first signal and deliver it when the block ends; pass a second one on at once."""
    request = StopRequest()

    def note(number: int, frame: FrameType | None) -> None:
        del frame
        if request():
            signal.signal(number, before[number])
            signal.raise_signal(number)
        request.number = request.number or number

    try:
        with _handled(note) as before:
            yield request
    finally:
        if request():
            signal.raise_signal(request.number)


@contextmanager
def _handled(handler: Handler) -> Iterator[dict[int, Any]]:
    """Replace the handlers of both signals until the block ends; yield the replaced ones by signal."""
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        earlier = {number: signal.getsignal(number) for number in STOP_SIGNALS}
        # A handler of None was not set from Python and could not be restored.
        before |= {number: old for number, old in earlier.items() if old not in (None, signal.SIG_IGN)}
    for number in before:
        signal.signal(number, handler)
    try:
        yield before
    finally:
        for number, old in before.items():
            signal.signal(number, old)
