"""Signals stop a program at once, or when deferred work ends; ignored signals stay ignored."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from ndreamer_dist.compute.signals import deferred_stop, stop_signals


@pytest.fixture(autouse=True)
def _heard() -> Iterator[None]:
    """Restore the default handler of Ctrl-C, which shells ignore in background processes."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_interrupts_and_its_exit_code_is_that_of_shells(number: int, code: int) -> None:
    before = signal.getsignal(number)
    with stop_signals() as stop:
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
        assert stop.exit_code == code
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_deferred_work_goes_on_to_its_end_and_then_the_signal_comes(number: int) -> None:
    done = []

    def work() -> None:
        with deferred_stop() as stop:
            signal.raise_signal(number)
            assert stop()
            done.append("the rest of the step")

    with stop_signals() as outer, pytest.raises(KeyboardInterrupt):
        work()
    assert done
    assert outer.exit_code == 128 + number


def test_a_second_signal_does_not_wait() -> None:
    done = []

    def work() -> None:
        with deferred_stop():
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGINT)
            done.append("not reached")

    with stop_signals(), pytest.raises(KeyboardInterrupt):
        work()
    assert not done


SECOND = """
import signal
from ndreamer_dist.compute.signals import deferred_stop
with deferred_stop():
    signal.raise_signal(signal.SIGTERM)
    print("goes on", flush=True)
    signal.raise_signal(signal.SIGTERM)
    print("not reached", flush=True)
"""


def test_a_second_signal_ends_a_program_that_handles_none() -> None:
    ended = subprocess.run([sys.executable, "-c", SECOND], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (-signal.SIGTERM, "goes on\n"), ended.stderr


def test_what_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as under nohup
    try:
        with stop_signals(), deferred_stop() as stop:
            signal.raise_signal(signal.SIGINT)
            assert not stop()
    finally:
        signal.signal(signal.SIGINT, before)


def test_other_threads_leave_signals_alone() -> None:
    before, seen = signal.getsignal(signal.SIGTERM), []

    def work() -> None:
        with stop_signals(), deferred_stop() as stop:
            seen.append((signal.getsignal(signal.SIGTERM), stop()))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(before, False)]
