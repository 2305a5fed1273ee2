"""Signals and the limit on time set a flag; a second request stops at once."""

import os
import signal
import time

import pytest

from util.errors import StopRequested
from util.runs import signals
from util.runs.signals import StopSignal


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_second_signal_stops_at_once(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(number)
    with StopSignal() as stop:
        assert not stop.requested
        send(number)
        assert stop.requested
        send(signal.SIGTERM)  # torchrun forwards it to a process that got it from the shell, too
        monkeypatch.setattr(signals, "SAME_REQUEST_SECONDS", 0.0)
        with pytest.raises(KeyboardInterrupt):
            send(number)
    assert signal.getsignal(number) is before


def test_the_second_ctrl_c_stops_at_once_however_soon() -> None:
    with StopSignal() as stop:
        send(signal.SIGINT)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)


def test_the_first_signal_after_the_time_limit_does_not_stop_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A scheduler may send it while the run saves."""
    monkeypatch.setattr(signals, "SAME_REQUEST_SECONDS", 0.0)
    with StopSignal(minutes=60) as stop:
        send(signal.SIGALRM)
        assert stop.requested
        send(signal.SIGUSR1)
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGTERM)


def test_time_limit_sets_the_flag() -> None:
    before = signal.getsignal(signal.SIGALRM)
    with StopSignal(minutes=1e-4) as stop:
        deadline = time.monotonic() + 10
        while not stop.requested and time.monotonic() < deadline:
            time.sleep(0.001)
        assert stop.requested
    assert signal.getsignal(signal.SIGALRM) is before

    with StopSignal(minutes=1e-4) as stop, pytest.raises(StopRequested), stop.immediately():
        time.sleep(10)
    with StopSignal(minutes=60):
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 3000
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0
