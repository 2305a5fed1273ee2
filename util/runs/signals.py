"""Handle SIGINT and SIGTERM without losing a training step."""

import contextlib
import signal
import threading
from collections.abc import Iterator

from util.errors import StopRequested


class StopSignal:
    """A context manager that turns SIGTERM and SIGINT into a flag, `requested`, to be read after each step.

    A second SIGINT stops immediately. Inside `with stop.immediately():`, where nothing can be lost, the first signal
    raises `StopRequested`. The previous signal handlers are restored at the end. Outside the main thread it does
    nothing, because Python allows signal handlers only there.
    """

    def __init__(self) -> None:
        self.previous_handlers = {}
        self.requested = False
        self.deferred = True  # False: raise in the signal handler

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self.previous_handlers[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.previous_handlers.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def immediately(self) -> Iterator[None]:
        self.deferred = False
        try:
            if self.requested:  # a signal that came before this block
                raise StopRequested("after training")
            yield
        finally:
            self.deferred = True

    def _handle(self, number: int, frame) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
        if not self.deferred:
            raise StopRequested("during evaluation")
