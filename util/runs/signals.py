"""Handle signals, and a limit on the training time, without losing a training step."""

import contextlib
import signal
import threading
import time
from collections.abc import Iterator

from util.errors import StopRequested

# SIGUSR1 is what `sbatch --signal=USR1@120` sends. Windows does not have it.
STOP_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)
)
# Within this time another signal belongs to the same request: torchrun forwards what its process group gets, too.
SAME_REQUEST_SECONDS = 3.0


class StopSignal:
    """A context manager that turns SIGTERM, SIGINT and SIGUSR1 into a flag, `requested`, to be read after each step.

    A second SIGINT, or another signal some seconds later, stops at once by KeyboardInterrupt. The end of `minutes` is
    not counted: a scheduler may send its first signal while the run saves after that. Inside
    `with stop.immediately():`, where nothing can be lost, the first signal raises `StopRequested`. The previous signal
    handlers are restored at the end. Outside the main thread it does nothing, because Python allows signal handlers
    only there.

    Attributes:
        minutes: the flag is also set after this many minutes; None: without a limit.
    """

    def __init__(self, minutes: float | None = None) -> None:
        self.minutes = minutes
        self.previous_handlers = {}
        self.requested = False
        self.signalled_at: float | None = None
        self.deferred = True  # False: raise in the signal handler

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                self.previous_handlers[number] = signal.signal(number, self._handle)
            if self.minutes is not None:
                alarm = signal.signal(signal.SIGALRM, self._handle)
                self.previous_handlers[signal.SIGALRM] = alarm
                signal.setitimer(signal.ITIMER_REAL, self.minutes * 60)
        return self

    def __exit__(self, *_) -> None:
        self._stop_timer()
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

    def _stop_timer(self) -> None:
        if self.minutes is not None and self.previous_handlers:
            signal.setitimer(signal.ITIMER_REAL, 0)

    def _handle(self, number: int, frame) -> None:
        if self.signalled_at is not None:
            passed = time.monotonic() - self.signalled_at
            if number == signal.SIGINT or passed > SAME_REQUEST_SECONDS:
                raise KeyboardInterrupt
            return
        if number in STOP_SIGNALS:
            self.signalled_at = time.monotonic()
        if (
            self.requested
        ):  # by the time limit, which is no signal from outside: the run is being saved
            return
        self.requested = True
        self._stop_timer()
        if not self.deferred:
            raise StopRequested("during evaluation")
