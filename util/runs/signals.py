"""SIGINT and SIGTERM in the hands of a block of code."""

import contextlib
import signal
import threading
from collections.abc import Iterator

from util.errors import StopRequested


class StopSignal:
    """Turns SIGTERM and SIGINT into a flag that is read after each step; a second SIGINT stops at once.

    What handled the signals before is put back at the end of `with stop:`. Does nothing outside the main thread.
    Inside `with stop.immediately():`, where nothing can be lost, the first signal raises `StopRequested`.
    """

    def __init__(self) -> None:
        self.previous = {}
        self.requested = False
        self.waits = True

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self.previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def immediately(self) -> Iterator[None]:
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
