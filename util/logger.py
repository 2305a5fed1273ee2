"""One logger for the project, and a progress bar."""

import logging
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

from tqdm import tqdm

from util.distributed import is_main_process

Item = TypeVar("Item")

log = logging.getLogger("predetr")

# A line of `Progress` where there is no terminal: tqdm's own without the bar.
LINE = "{desc}: {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"


class _MainProcessOnly(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR or is_main_process()


class _BesideBars(logging.StreamHandler):
    """Clears the progress bars of a terminal for a line of the log, and draws them again below it."""

    def emit(self, record: logging.LogRecord) -> None:
        with tqdm.external_write_mode(self.stream):
            super().emit(record)


def setup_logger() -> None:
    """Sends the log to standard output, from rank 0 only (errors come from every process)."""
    if log.handlers:
        return
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(
            errors="backslashreplace"
        )  # file names may hold what the terminal's encoding does not
    # tqdm's own lock is shared with dataloader workers: one that is killed while it holds the lock would stop us too.
    tqdm.set_lock(threading.RLock())
    handler = _BesideBars(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    handler.addFilter(_MainProcessOnly())
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False


def format_seconds(seconds: float) -> str:
    """`3725.2` -> `1:02:05`, `65` -> `01:05`, as in a progress bar."""
    return tqdm.format_interval(round(seconds))


class _Lines:
    """A file for tqdm that turns what it would redraw into lines of standard output."""

    def write(self, text: str) -> None:
        if text.strip():
            sys.stdout.write(f"{text.strip()}\n")

    def flush(self) -> None:
        sys.stdout.flush()


class Progress(tqdm):
    """Progress of a long job, on rank 0: tqdm's bar on a terminal, elsewhere (log files) a plain line every
    `seconds_between_lines` and one at the end.

    `total` counts steps, `start` are those that were done before this process. It closes itself after the last one.
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
        # A delay, however short, leaves out the bar at 0 steps, and leave=False a second line at the end.
        lines = {
            "file": _Lines(),
            "mininterval": seconds_between_lines,
            "delay": 1e-9,
            "leave": False,
        }
        bar = {"file": sys.stdout, "mininterval": 0.2, "dynamic_ncols": True}
        super().__init__(
            total=total,
            desc=description,
            initial=start,
            unit=unit,
            disable=not (is_main_process() and log.isEnabledFor(logging.INFO)),
            miniters=1,
            smoothing=0,  # speed and time left from the mean over all steps of this process
            **(bar if sys.stdout.isatty() else {**lines, "bar_format": LINE}),
        )

    def step(self, text: str | None = None, steps: int = 1) -> None:
        """`steps` more are done; `text`, if given, replaces the one at the end of the line, such as losses."""
        if text is not None:
            self.set_postfix_str(text, refresh=False)
        finished = self.n + steps >= self.total
        if finished:
            self.mininterval = 0  # the last step is shown whenever it comes
        self.update(steps)
        if finished:
            self.close()

    def wants_text(self) -> bool:
        """True when the next step will be shown, so that text is only made when it is read."""
        if self.disable:
            return False
        return time.time() - self.last_print_t >= self.mininterval or self.n + 1 >= self.total


def progress(items: Sequence[Item], description: str) -> Iterator[Item]:
    """Iterates with a `Progress` beside it."""
    bar = Progress(len(items), description)
    for item in items:
        yield item
        bar.step()
