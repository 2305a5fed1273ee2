"""SIGINT and SIGTERM in the hands of a block of code."""
import signal
import threading


class SignalHandler:
    """`with handler:` calls its `_handle` for both signals, and puts back what was there. Does nothing outside the main thread."""

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
