"""Compare implementations of the same work: outputs first, then times, interleaved.

Wall time says how long a user waits, CPU time how much was computed: on a machine with other load the second is the one
that repeats.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from util.errors import UserError
from util.logger import Progress

SECONDS_PER_TURN = 0.02  # a turn repeats the call until it lasts about this long
Outputs = Sequence[Tensor]


@dataclass(frozen=True)
class Seconds:
    """Seconds per call. cpu: of all threads of the process; 0 for work of a GPU."""

    wall: float
    cpu: float = 0.0


class Contender(Protocol):
    """One implementation."""

    def outputs(self) -> Outputs:
        """Return what must agree with the other contenders. It is not timed."""

    def time(self, calls: int) -> Seconds:
        """Run the work `calls` times in a row."""

    def peak_mib(self) -> float | None:
        """Return the MiB that a call allocates on a GPU on top of what is in use; None on a CPU."""


@dataclass
class Local:
    """A contender in this process.

    Attributes:
        run: does the work once.
        outputs: see `Contender`.
        device: where the work runs.
    """

    run: Callable[[], Any]
    outputs: Callable[[], Outputs]
    device: torch.device

    def time(self, calls: int) -> Seconds:
        if self.device.type != "cuda":
            wall, cpu = time.perf_counter(), time.process_time()
            for _ in range(calls):
                self.run()
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            return Seconds(wall / calls, cpu / calls)

        # Kernels run asynchronously: events measure on the device, from the first to the last kernel.
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        cpu = time.process_time()
        start.record()
        for _ in range(calls):
            self.run()
        end.record()
        end.synchronize()
        wall_ms = start.elapsed_time(end)
        return Seconds(wall_ms / 1000 / calls, (time.process_time() - cpu) / calls)

    def peak_mib(self) -> float | None:
        if self.device.type != "cuda":
            return None
        torch.cuda.synchronize(self.device)
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        self.run()
        torch.cuda.synchronize(self.device)
        return (torch.cuda.max_memory_allocated(self.device) - before) / 2**20


@dataclass
class Comparison:
    """Contenders that do the same work.

    Attributes:
        name: the work.
        contenders: name -> contender. The first one is the reference of the outputs.
        tolerance: largest difference from the reference, relative to the largest absolute value of each tensor.
        tolerances: contenders with another tolerance, such as those in bfloat16.
        items: images, samples or the like in one call; 0 if a call has none.
        skipped: contenders that can't run here -> the reason.
        finish: returns what else is known of the work, such as its operations; called after the measurement.
    """

    name: str
    contenders: dict[str, Contender]
    tolerance: float
    tolerances: dict[str, float] = field(default_factory=dict)
    items: int = 0
    skipped: dict[str, str] = field(default_factory=dict)
    finish: Callable[[], dict[str, Any]] = dict


@dataclass
class Row:
    """Times of one contender, in milliseconds per call."""

    comparison: str
    contender: str
    median_ms: float  # over turns
    low_ms: float  # lower quartile
    high_ms: float  # upper quartile
    cpu_ms: float  # median over turns
    items: int  # per call, see `Comparison`
    peak_mib: float | None
    difference: float  # see `Comparison.tolerance`
    turns: int
    calls_a_turn: int


def check(comparison: Comparison) -> dict[str, float]:
    """Return each contender's largest relative difference from the reference.

    Raises:
        UserError: a contender differs by more than its tolerance.
    """
    first, *others = comparison.contenders
    expected = [t.double().cpu() for t in comparison.contenders[first].outputs()]
    differences = {first: 0.0}
    for name in others:
        outputs = comparison.contenders[name].outputs()
        differences[name] = difference(outputs, expected)
        tolerance = comparison.tolerances.get(name, comparison.tolerance)
        if not differences[name] <= tolerance:  # written so that NaN is refused too
            raise UserError(
                f"{comparison.name}: {name} differs from {first} by {differences[name]:.2g}, more than "
                f"{tolerance:.2g}; fix or remove it, its time would be meaningless"
            )
    return differences


def difference(outputs: Iterable[Tensor], expected: Iterable[Tensor]) -> float:
    """Return the largest absolute difference of two lists of tensors, each relative to its largest value."""
    found = [
        (a.double().cpu() - b.double().cpu()).abs().max() / b.abs().max().clamp(min=1e-12)
        for a, b in zip(outputs, expected, strict=True)
        if b.numel()
    ]
    return float(torch.stack(found).max()) if found else 0.0


def measure(comparison: Comparison, turns: int) -> list[Row]:
    """Check the contenders, then time them interleaved: each one once per turn."""
    differences = check(comparison)
    contenders = comparison.contenders
    peaks = {name: contender.peak_mib() for name, contender in contenders.items()}
    calls = {}
    for name, contender in contenders.items():
        first = contender.time(1).wall
        # The first call may compile or allocate; a long one is not repeated only to know its length.
        usual = contender.time(1).wall if first < 10 else first
        calls[name] = max(1, math.ceil(SECONDS_PER_TURN / usual))

    times: dict[str, list[Seconds]] = {name: [] for name in contenders}
    progress = Progress(turns * len(contenders), comparison.name)
    for _ in range(turns):
        for name, contender in contenders.items():
            times[name].append(contender.time(calls[name]))
            progress.step()

    # Medians and quartiles, because other load on the machine makes single turns slow.
    rows = []
    for name, seconds in times.items():
        wall_ms = [1000 * s.wall for s in seconds]
        low_ms, high_ms = quartiles(wall_ms)
        rows.append(
            Row(
                comparison=comparison.name,
                contender=name,
                median_ms=statistics.median(wall_ms),
                low_ms=low_ms,
                high_ms=high_ms,
                cpu_ms=statistics.median(1000 * s.cpu for s in seconds),
                items=comparison.items,
                peak_mib=peaks[name],
                difference=differences[name],
                turns=turns,
                calls_a_turn=calls[name],
            )
        )
    return rows


def quartiles(values: list[float]) -> tuple[float, float]:
    """Return the lower and upper quartile."""
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high
