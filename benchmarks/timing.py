"""Two runs timed in turns, and what their ratio is worth."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from deploy.measure.statistics import median_interval

__all__ = ["Row", "compare", "in_turns", "row_of"]


@dataclass(frozen=True)
class Row:
    """A comparison of the times of two runs.

    Args:
        name: What was compared.
        ratio: Median over the rounds of the second run's time / the first's.
        low: Lower end of its 95 % interval; of fewer than 6 rounds, the smallest ratio.
        high: Upper end.
        wanted: The ratio wanted, or None where it is only reported.
        is_limit: Whether `wanted` is the most, and not the least.
        first_ms: Median time of the first run.
        second_ms: Likewise.
        n: Rounds.
    """

    name: str
    ratio: float
    low: float
    high: float
    wanted: float | None
    is_limit: bool
    first_ms: float
    second_ms: float
    n: int

    @property
    def passed(self) -> bool:
        """Return whether the ratio is as wanted."""
        if self.wanted is None:
            return True
        return self.ratio <= self.wanted if self.is_limit else self.ratio >= self.wanted

    def to_text(self) -> str:
        """Return the comparison as a line."""
        sign = "<=" if self.is_limit else ">="
        wanted = "reported" if self.wanted is None else f"wanted {sign} {self.wanted:g}"
        return (
            f"{self.name}: {self.ratio:.2f}x [{self.low:.2f}, {self.high:.2f}], n = {self.n}, "
            f"{self.first_ms:.1f} ms and {self.second_ms:.1f} ms; {wanted}"
        )


def compare(
    name: str,
    first: Callable[[], object],
    second: Callable[[], object],
    *,
    rounds: int,
    wanted: float | None,
    is_limit: bool = False,
) -> Row:
    """Time two runs in turns; both have been warmed up."""
    ones, others = in_turns([first, second], rounds)
    return row_of(name, ones, others, wanted=wanted, is_limit=is_limit)


def row_of(
    name: str,
    ones: Sequence[float],
    others: Sequence[float],
    *,
    wanted: float | None,
    is_limit: bool = False,
) -> Row:
    """Compare the seconds of two runs, round by round."""
    ratios = sorted(other / one for one, other in zip(ones, others, strict=True))
    low, high = median_interval(ratios, confidence=0.95) or (ratios[0], ratios[-1])
    return Row(
        name=name,
        ratio=statistics.median(ratios),
        low=low,
        high=high,
        wanted=wanted,
        is_limit=is_limit,
        first_ms=1e3 * statistics.median(ones),
        second_ms=1e3 * statistics.median(others),
        n=len(ratios),
    )


def in_turns(runs: Sequence[Callable[[], object]], rounds: int) -> list[list[float]]:
    """Return the seconds of each run in each round; what disturbs a round disturbs all its runs."""
    seconds: list[list[float]] = [[] for _ in runs]
    for _ in range(rounds):
        for run, times in zip(runs, seconds, strict=True):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
    return seconds
