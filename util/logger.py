"""One logger for the project, and a progress bar."""

import logging
import sys
import time
from collections.abc import Iterable, Iterator

from util.distributed import is_main_process

log = logging.getLogger("predetr")


class _MainProcessOnly(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR or is_main_process()


def setup_logger() -> None:
    """Sends the log to standard output, from the first process only (errors come from every process)."""
    if log.handlers:
        return
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names may hold what the terminal's encoding does not
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    handler.addFilter(_MainProcessOnly())
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False


def format_seconds(seconds: float) -> str:
    """`3725.2` -> `1:02:05`, `65` -> `1:05`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class Progress:
    """Progress of a long job: a bar that is redrawn on a terminal, plain lines (`plain_seconds` apart) elsewhere.

    `total` counts steps. `text(str)` sets what stands behind the time left, such as losses and images/s.
    """

    def __init__(self, total: int, description: str, start: int = 0, plain_seconds: float = 15.0) -> None:
        self.total, self.description, self.done, self.start = total, description, start, start
        self.tail = ""
        self.began = self.last_shown = time.monotonic()
        self.shows = is_main_process() and log.isEnabledFor(logging.INFO)
        self.terminal = sys.stdout.isatty()
        self.every = 0.2 if self.terminal else plain_seconds
        self.has_shown = False

    def step(self, tail: str | None = None, steps: int = 1) -> None:
        """`steps` more are done; `tail`, if given, replaces the text at the end of the line."""
        self.done += steps
        self.tail = self.tail if tail is None else tail
        now = time.monotonic()
        if self.shows and (now - self.last_shown >= self.every or self.done >= self.total):
            self.last_shown = now
            self._show(now)

    def wants_text(self) -> bool:
        """True when the next step will be shown, so that text is only made when it is read."""
        due = time.monotonic() - self.last_shown >= self.every or self.done + 1 >= self.total
        return self.shows and due

    def _show(self, now: float) -> None:
        elapsed = now - self.began
        left = elapsed / max(self.done - self.start, 1) * (self.total - self.done)
        counts = f"{self.done}/{self.total}"
        times = f"{format_seconds(elapsed)}<{format_seconds(left)}"
        if self.terminal:
            filled = round(20 * self.done / max(self.total, 1))
            line = f"{self.description} [{'#' * filled}{'.' * (20 - filled)}] {counts} {times} {self.tail}"
            end = "\n" if self.done >= self.total else ""
            sys.stdout.write(f"\r\x1b[2K{line}{end}")
        else:
            sys.stdout.write(f"{self.description} {counts} {times} {self.tail}\n")
        sys.stdout.flush()
        self.has_shown = True


def progress(iterable: Iterable, total: int, description: str) -> Iterator:
    """Iterates with a `Progress` beside it."""
    bar = Progress(total, description)
    for item in iterable:
        yield item
        bar.step()
