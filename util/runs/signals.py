"""SIGINT and SIGTERM in the hands of a block of code, and SIGKILL for what does not heed them."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

from util.errors import StopRequested


class SignalHandler:
    """`with handler:` calls its `_handle` for both signals, and puts back what was there. Does nothing outside the main
    thread.
    """

    def __init__(self) -> None:
        self.previous = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self.previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame) -> None:
        raise NotImplementedError  # the contract


class StopSignal(SignalHandler):
    """Turns SIGTERM and SIGINT into a flag that is read after each step; a second SIGINT stops at once.

    Inside `with stop.at_once():`, where nothing can be lost, the first signal raises `StopRequested`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.requested = False
        self.waits = True

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        self.waits = False
        try:
            if self.requested:
                raise StopRequested("after training")
            yield
        finally:
            self.waits = True

    def _handle(self, number: int, frame) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
        if not self.waits:
            raise StopRequested("during evaluation")


def kill_family(pid: int) -> None:
    """Ends a process and all below it at once, also those in sessions of their own as torchrun's are. Without /proc:
    its session alone.
    """
    with contextlib.suppress(AttributeError):  # Windows has neither sessions nor this signal
        for end, member in [*((os.kill, member) for member in _family(pid)), (os.killpg, pid)]:
            with contextlib.suppress(ProcessLookupError):
                end(member, signal.SIGKILL)


def _family(pid: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(stat.parent.name))
    found = [pid]
    for member in found:  # grows while it is walked
        found += children.get(member, [])
    return found
