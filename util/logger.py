"""The project's logger, and a progress bar that works in terminals and log files."""

import contextlib
import logging
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from tqdm import tqdm

Item = TypeVar("Item")

log = logging.getLogger("predetr")

# A line of `Progress` without a terminal: tqdm's own format without the bar.
LINE_FORMAT = "{desc}: {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"

NOTEBOOK_COLUMNS = 130  # a wider bar would wrap in the output of a notebook's cell


def _is_main_process() -> bool:
    from util.distributed import is_main_process  # here, so that --help does not wait for PyTorch

    return is_main_process()


class _MainProcessOnly(logging.Filter):
    """Pass everything on rank 0, and errors on every rank."""

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR or _is_main_process()


class _ProgressBarHandler(logging.StreamHandler):
    """Clear the progress bars of a terminal for a log line, and draw them again below it."""

    def emit(self, record: logging.LogRecord) -> None:
        with tqdm.external_write_mode(self.stream):
            super().emit(record)


def setup_logger() -> None:
    """Send the log to standard output, from rank 0 only. Errors come from every rank."""
    if log.handlers:
        return
    if hasattr(sys.stdout, "reconfigure"):
        # File names may have characters that the terminal's encoding lacks.
        sys.stdout.reconfigure(errors="backslashreplace")
    # tqdm's own lock is shared with dataloader workers: one that is killed while holding it would stop this process.
    tqdm.set_lock(threading.RLock())

    handler = _ProgressBarHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    handler.addFilter(_MainProcessOnly())
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False  # a root handler, if any, would print each line twice


@contextlib.contextmanager
def logging_to_stdout() -> Iterator[None]:
    """Do the same for one run in a user's program, and undo it at the end. Handlers of the user's own are kept."""
    if log.handlers:
        yield
        return
    level, propagate, lock, stdout = log.level, log.propagate, tqdm.get_lock(), sys.stdout
    errors = stdout.errors
    setup_logger()
    try:
        yield
    finally:
        log.handlers.clear()
        log.setLevel(level)
        log.propagate = propagate
        tqdm.set_lock(lock)
        if hasattr(stdout, "reconfigure"):
            stdout.reconfigure(errors=errors)


def format_seconds(seconds: float) -> str:
    """Format a duration as in a progress bar: `3725.2` -> `1:02:05`, `65` -> `01:05`."""
    return tqdm.format_interval(round(seconds))


class _LineWriter:
    """A file for tqdm that prints what it would redraw as lines on standard output."""

    def write(self, text: str) -> None:
        if text.strip():
            sys.stdout.write(f"{text.strip()}\n")

    def flush(self) -> None:
        sys.stdout.flush()


def _output() -> dict[str, Any]:
    """Return how tqdm shows the progress on standard output."""
    if sys.stdout.isatty():
        return {"file": sys.stdout, "mininterval": 0.2, "dynamic_ncols": True}
    if type(sys.stdout).__module__.startswith("ipykernel"):
        # Not tqdm's widget: it needs ipywidgets, and is lost when the notebook is opened again.
        return {"file": sys.stdout, "mininterval": 1.0, "ncols": NOTEBOOK_COLUMNS}
    return {
        "file": _LineWriter(),
        "bar_format": LINE_FORMAT,
        "delay": 1e-9,  # any delay suppresses the line for 0 steps
        "leave": False,  # else tqdm prints the last line again when it closes
    }


class Progress(tqdm):
    """Progress of a long job, on rank 0: a tqdm bar in a terminal or notebook, plain lines elsewhere, such as in a
    log file.

    It closes itself after the last step.

    Args:
        total: Number of steps.
        description: Start of the line.
        start: Number of steps that were done before, by an earlier process of a resumed job.
        unit: Name of a step in the rate, as in "12.5 images/s".
        seconds_between_lines: Interval of the plain lines. The last step always has one.
    """

    monitor_interval = 0  # no thread: with miniters=1 every step looks at the clock

    def __init__(
        self,
        total: int,
        description: str,
        start: int = 0,
        *,
        unit: str = "it",
        seconds_between_lines: float = 15.0,
    ) -> None:
        super().__init__(
            total=total,
            desc=description,
            initial=start,
            unit=unit,
            disable=not (_is_main_process() and log.isEnabledFor(logging.INFO)),
            miniters=1,
            smoothing=0,  # rate and remaining time from the mean over all steps of this process
            **{"mininterval": seconds_between_lines, **_output()},
        )

    def step(self, text: str | None = None, steps: int = 1) -> None:
        """Advance by some steps. A text, such as the losses, replaces the one at the end of the line."""
        if text is not None:
            self.set_postfix_str(text, refresh=False)
        is_finished = self.n + steps >= self.total
        if is_finished:
            self.mininterval = 0  # show the last step, however soon it comes
        self.update(steps)
        if is_finished:
            self.close()

    def will_display(self) -> bool:
        """Return whether the next step will be shown, so that its text is only made when it is read."""
        if self.disable:
            return False
        return time.time() - self.last_print_t >= self.mininterval or self.n + 1 >= self.total


def progress(items: Sequence[Item], description: str) -> Iterator[Item]:
    """Iterate over a sequence and show the progress."""
    bar = Progress(len(items), description)
    for item in items:
        yield item
        bar.step()
