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
    """Mean over the seeds that both have; half_width: of the 95 % interval by Student's t, None of a single seed. what:
    is counted.
    """

    mean: float
    half_width: float | None
    count: int
    what: str = "seeds"

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


def paired_difference(
    values: Mapping[int, float],
    baseline: Mapping[int, float],
    origins: Mapping[int, int] | None = None,
) -> Difference | None:
    """values - baseline, both seed -> value, over the seeds that both have; None where there is none.

    origins: seed -> pre-training that it started from. Runs of one pre-training share its luck: where there are several
    pre-trainings, their means are what is compared. Of a single one, the interval is over its seeds and holds for it
    alone.
    """
    from scipy.stats import t

    differences = {seed: values[seed] - baseline[seed] for seed in sorted(values.keys() & baseline.keys())}
    if not differences:
        return None
    groups: dict[int, list[float]] = {}
    for seed, difference in differences.items():
        groups.setdefault((origins or {}).get(seed, 0), []).append(difference)
    shared = 1 < len(groups) < len(differences)
    points = [sum(group) / len(group) for group in groups.values()] if shared else list(differences.values())
    count, mean, what = len(points), sum(points) / len(points), "pre-trainings" if shared else "seeds"
    if count == 1:
        return Difference(mean, None, 1, what)
    half = float(t.ppf((1 + CONFIDENCE) / 2, count - 1)) * _deviation(points, mean) / math.sqrt(count)
    return Difference(mean, half, count, what)


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
        return f"{text}: no difference that {difference.count} {difference.what} can show"
    return f"{text}: {'higher' if difference.mean > 0 else 'lower'} over {difference.count} {difference.what}"


def signed(value: float) -> str:
    """One digit with its sign; nothing is -0.0."""
    return f"{round(value, 1) + 0.0:+.1f}"
