"""Medians of interleaved rounds, and ratios within a round.

Other work of the machine slows everything that runs at the time. Two things measured in one round are slowed much
alike, so that their ratio says more than either of the times; the median over the rounds leaves out what hit only one.
"""

from __future__ import annotations

import gc
import math
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from bnfuse.tools.timing import Measure, interleaved, timed

Clock = Callable[[], float]

Weighted = str | Mapping[str, float]
"""The name of a measure, or several with the factors that they count with."""


@dataclass(frozen=True)
class Spread:
    """The median of several numbers and their quartiles, between which the middle half of them lies."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(numbers: Iterable[float]) -> Spread:
        values = sorted(numbers)
        if len(values) == 1:
            return Spread(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return Spread(median, low, high)

    def __str__(self) -> str:
        return f"{self.median:.3f}"

    @property
    def range(self) -> str:
        return f"{self.low:.3f}-{self.high:.3f}"

    def to_dict(self) -> dict[str, float]:
        return {"median": self.median, "low": self.low, "high": self.high}


@dataclass(frozen=True)
class Rounds:
    """What several measures took.

    Attributes:
        seconds: for each measure by name, its time in every round.
    """

    seconds: Mapping[str, list[float]]

    @property
    def count(self) -> int:
        return len(next(iter(self.seconds.values())))

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name])

    def milliseconds(self, name: str) -> float:
        return 1000 * self.median(name)

    def has(self, weighted: Weighted) -> bool:
        return all(name in self.seconds for name in _factors(weighted))

    def ratio(self, above: Weighted, below: Weighted) -> Spread:
        """The spread of the ratios within the rounds, of measures or of sums of measures."""
        return Spread.of(self.ratios(above, below))

    def ratios(self, above: Weighted, below: Weighted) -> list[float]:
        """The ratio within each round."""
        return [x / y for x, y in zip(self._sums(above), self._sums(below), strict=True)]

    def _sums(self, weighted: Weighted) -> list[float]:
        factors = _factors(weighted)
        return [
            sum(factor * self.seconds[name][turn] for name, factor in factors.items()) for turn in range(self.count)
        ]

    def to_dict(self) -> dict[str, list[float]]:
        return {name: [float(f"{second:.6g}") for second in seconds] for name, seconds in self.seconds.items()}


def _factors(weighted: Weighted) -> Mapping[str, float]:
    return {weighted: 1.0} if isinstance(weighted, str) else weighted


@dataclass(frozen=True)
class Effort:
    """How many rounds to measure: as many as take so many seconds, within bounds."""

    seconds: float
    least: int
    most: int

    def rounds(self, seconds_of_one: float) -> int:
        return max(self.least, min(self.most, math.ceil(self.seconds / max(seconds_of_one, 1e-9))))

    @staticmethod
    def exactly(rounds: int) -> Effort:
        return Effort(0.0, rounds, rounds)


def measured(measures: Mapping[str, Measure], effort: Effort, warm_up: int = 2) -> Rounds:
    """Measure interleaved; the last of the rounds that warm up tells how many there are time for."""
    first = interleaved(measures, rounds=1, warm_up=warm_up - 1)
    rounds = effort.rounds(sum(seconds[0] for seconds in first.values()))
    return Rounds(interleaved(measures, rounds))


def tidied(work: Callable[[], object], clock: Clock) -> Measure:
    """A measure of work that makes garbage: that of the others is collected before the clock starts."""
    measure = timed(work, clock)

    def measure_tidied() -> float:
        gc.collect()
        return measure()

    return measure_tidied


def geometric_mean(numbers: Iterable[float]) -> float:
    return math.exp(statistics.fmean(math.log(number) for number in numbers))
