"""Read damaged and hostile files at random: annotations, proposals, splits, checkpoints and images.

    python tools/fuzz.py --target coco --cases 10000 --seed 0

Each file must load, or be refused with one line. A traceback, a warning of Python, a hang, more memory than `--memory`
or code that runs is a finding: the script prints its seed, which makes the same file again with `--cases 1`, and exits
with status 1.
"""

import faulthandler
import re
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

# `python tools/NAME.py` works from any directory.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools.fuzzing.targets import TARGETS
from util.errors import UserError
from util.logger import log
from util.runs.session import run_script
from util.settings import Parser
from util.settings.value_types import positive

CPU_SECONDS = 10  # of one file; a valid one takes milliseconds
# Audit events of Python that reading a file never causes.
FORBIDDEN = re.compile(
    r"os\.(system|exec|posix_spawn|fork|forkpty|spawn|startfile|remove|rmdir|putenv)|subprocess\.Popen|pty\.spawn"
    r"|socket\.(connect|bind)|ctypes\.dlopen|webbrowser\.open"
)


class Finding(Exception):
    """A file did what no file may do."""


class _Guard:
    """Records forbidden events, and limits time and memory of a case."""

    def __init__(self) -> None:
        self.is_active = False
        self.events: list[str] = []
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.is_active and FORBIDDEN.fullmatch(event):
            self.events.append(f"{event} {str(arguments)[:100]}")
            raise Finding(self.events[-1])

    @contextmanager
    def case(self) -> Iterator[None]:
        def stop(*_: Any) -> None:
            raise Finding(f"more than {CPU_SECONDS} s")

        previous = signal.signal(signal.SIGPROF, stop)
        self.events.clear()
        self.is_active = True
        # Processor time, so that a busy machine is no finding.
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                for hidden in (DeprecationWarning, ResourceWarning):  # as by default
                    warnings.simplefilter("ignore", hidden)
                yield
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.signal(signal.SIGPROF, previous)
            self.is_active = False
            if self.events:  # even if the code that reads the file has caught it
                raise Finding(self.events[0])
            if caught:  # Python prints them with a line of source code
                raise Finding(f"a warning: {caught[0].message}")


_guard: list[_Guard] = []  # one for the process: an audit hook can't be removed


def run_case(target: str, seed: int, folder: Path) -> str:
    """Make and read one file. Return "loaded", or the line that refuses it.

    Args:
        folder: is emptied before and holds the file afterwards.

    Raises:
        Finding: the file ran code, took too long or caused a warning of Python, or its message does not name it.
        Exception: any other that reading it raised.
    """
    if not _guard:
        _guard.append(_Guard())
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        with _guard[0].case():
            TARGETS[target](folder, Random(f"{target} {seed}"))
    except UserError as error:
        text = str(error)
        # A setting of a checkpoint that is checked like a flag is named like one.
        if str(folder) not in text and not text.startswith("--"):
            raise Finding(f"a message that names no file: {text[:200]!r}") from error
        return text
    return "loaded"


@contextmanager
def limited_memory(gigabytes: float) -> Iterator[None]:
    """Let this process use so much more address space than now."""
    try:
        import resource
    except ImportError:  # Windows
        log.warning("memory is not limited on this system")
        yield
        return
    status = Path("/proc/self/statm")
    used = int(status.read_text().split()[0]) * resource.getpagesize() if status.exists() else 0
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + int(gigabytes * 2**30), limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def parse(argv: list[str]) -> Namespace:
    parser = Parser("tools/fuzz.py", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--target",
        choices=[*TARGETS, "all"],
        default="all",
        help="what kind of file to damage (all)",
    )
    parser.add_argument(
        "--cases", type=positive(), default=1000, metavar="N", help="files of each kind (1000)"
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="seed of the first file; the next has seed + 1 (0)",
    )
    parser.add_argument(
        "--memory", type=positive(float), default=4.0, metavar="GB", help="memory for a file (4)"
    )
    return parser.parse_args(argv)


def main(args: Namespace) -> None:
    faulthandler.enable()  # the trace of a crash
    targets = list(TARGETS) if args.target == "all" else [args.target]
    num_findings = 0
    for target in targets:
        with limited_memory(args.memory):
            findings, loaded = _fuzz(target, range(args.seed, args.seed + args.cases))
        num_findings += len(findings)
        for seed, trace in findings.items():
            log.info("%s\n--target %s --seed %d --cases 1", trace, target, seed)
        log.info(
            "%s: %d files, %d loaded, %d refused, %d findings",
            target,
            args.cases,
            loaded,
            args.cases - loaded - len(findings),
            len(findings),
        )
    if num_findings:
        raise UserError(f"{num_findings} findings: run each again with its --target and --seed")


def _fuzz(target: str, seeds: range) -> tuple[dict[int, str], int]:
    """Return (seed -> traceback of each finding, number of files that loaded)."""
    findings: dict[int, str] = {}
    loaded, level = 0, log.level
    log.setLevel("ERROR")  # warnings of thousands of damaged files
    with tempfile.TemporaryDirectory() as folder:
        for seed in seeds:
            try:
                loaded += run_case(target, seed, Path(folder, "case")) == "loaded"
            except Exception:  # noqa: BLE001 - whatever it is, it is a finding
                findings[seed] = "".join(traceback.format_exc(limit=-4)).rstrip()
    log.setLevel(level)
    return findings, loaded


if __name__ == "__main__":
    run_script(main, parse)
