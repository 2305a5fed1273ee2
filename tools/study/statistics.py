"""Numbers over seeds: mean and spread, and paired differences with what they can show."""
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Summary:
    """Of `count` values; deviation: with count - 1 in the denominator, None of a single value."""

    mean: float
    deviation: float | None
    count: int


@dataclass(frozen=True)
class Difference:
    """Mean over the seeds that both have; half_width: of the 95 % interval by Student's t, None of a single seed."""

    mean: float
    half_width: float | None
    count: int

    @property
    def shown(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.half_width is not None and abs(self.mean) > self.half_width


def summarize(values: Sequence[float]) -> Summary | None:
    """None of no values."""
    if not values:
        return None
    mean, count = sum(values) / len(values), len(values)
    return Summary(mean, _deviation(values, mean) if count > 1 else None, count)


def paired_difference(values: Mapping[int, float], baseline: Mapping[int, float]) -> Difference | None:
    """values - baseline, both seed -> value, over the seeds that both have; None where there is none."""
    from scipy.stats import t

    differences = [values[seed] - baseline[seed] for seed in sorted(values.keys() & baseline.keys())]
    if not differences:
        return None
    count, mean = len(differences), sum(differences) / len(differences)
    if count == 1:
        return Difference(mean, None, 1)
    half = float(t.ppf((1 + CONFIDENCE) / 2, count - 1)) * _deviation(differences, mean) / math.sqrt(count)
    return Difference(mean, half, count)


def _deviation(values: Sequence[float], mean: float) -> float:
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))


def in_words(difference: Difference | None, what: str = "AP") -> str:
    """What a difference says, and no more."""
    if difference is None:
        return "not measured yet"
    if difference.half_width is None:
        return f"{signed(difference.mean)} {what} with one seed: nothing can be said"
    text = f"{signed(difference.mean)} ± {difference.half_width:.1f} {what}"
    if not difference.shown:
        return f"{text}: no difference that {difference.count} seeds can show"
    return f"{text}: {'higher' if difference.mean > 0 else 'lower'} over {difference.count} seeds"


def signed(value: float) -> str:
    """One digit with its sign; nothing is -0.0."""
    return f"{round(value, 1) + 0.0:+.1f}"
