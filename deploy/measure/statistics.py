"""What a sample of latencies allows one to say, at 99 % confidence.

A percentile near the tail of a small sample is noise. As in MLPerf's early stopping, one is
reported only when the sample is so large that, with 99 % confidence, at least two of its values lie
above the true percentile: from 64 for p90, 130 for p95, 662 for p99, 6,636 for p99.9.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

__all__ = [
    "PERCENTILES",
    "Ratio",
    "Summary",
    "median_interval",
    "median_ratio",
    "minimum_samples",
    "percentile",
    "summarize",
]

PERCENTILES = (50.0, 90.0, 95.0, 99.0, 99.9)
_DOUBT = 0.01


@dataclass(frozen=True)
class Summary:
    """Statistics in the samples' unit.

    Attributes:
        count: How many samples.
        mean: Their mean.
        median_interval: In which the true median lies with 99 % confidence; None if n is too small.
        percentiles: By name, "p50" to "p99.9"; None if n is too small.
    """

    count: int
    mean: float
    median_interval: tuple[float, float] | None
    percentiles: dict[str, float | None]


def summarize(samples: Sequence[float]) -> Summary:
    """Summarize at least one sample."""
    return Summary(
        count=len(samples),
        mean=math.fsum(samples) / len(samples),
        median_interval=median_interval(samples),
        percentiles={f"p{q:g}": percentile(samples, q) for q in PERCENTILES},
    )


def percentile(samples: Sequence[float], q: float) -> float | None:
    """The q-th percentile, as the sample of that rank; None if there are too few for it.

    Args:
        samples: At least one.
        q: Above 0 and below 100.
    """
    if len(samples) < minimum_samples(q):
        return None
    return sorted(samples)[math.ceil(len(samples) * q / 100) - 1]


def minimum_samples(q: float) -> int:
    """The smallest n of which, with 99 % confidence, two or more exceed the true q-th percentile.

    With p = q / 100, at most one does with the probability p^n + n (1 - p) p^(n - 1).
    """
    p, n = q / 100, 2
    while p**n + n * (1 - p) * p ** (n - 1) > _DOUBT:
        n += 1
    return n


def median_interval(
    samples: Sequence[float], *, confidence: float = 1 - _DOUBT
) -> tuple[float, float] | None:
    """The interval between two samples that holds the true median with 99 % confidence.

    The number of samples below the median is binomial (n, 1/2), whatever their distribution, so the
    k-th smallest and the k-th largest enclose it unless fewer than k fall on one side. Samples must
    be independent: neighbours in time are not quite, so on a busy machine the truth is wider.

    Returns:
        The two samples, or None if there are too few: fewer than 8 at 99 %, than 6 at 95 %.
    """
    n = len(samples)
    i = np.arange(1, n // 2 + 1)
    log_ways = np.concatenate(([0.0], np.cumsum(np.log((n - i + 1) / i))))
    cumulative = np.cumsum(np.exp(log_ways - n * math.log(2)))  # P(at most 0, 1, 2 ... below)
    k = int(np.searchsorted(cumulative, (1 - confidence) / 2, side="right"))
    if k == 0:
        return None
    ordered = sorted(samples)
    return ordered[k - 1], ordered[-k]


@dataclass(frozen=True)
class Ratio:
    """How two times compare that were taken in turns; below 1, the first is shorter.

    Attributes:
        median: Of the ratios of the rounds.
        interval: In which the true median lies with 95 % confidence.
        rounds: How many ratios.
    """

    median: float
    interval: tuple[float, float]
    rounds: int

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.median:.3f} [{low:.3f}, {high:.3f}]"


def median_ratio(pairs: Sequence[tuple[float, float]]) -> Ratio:
    """Compare the first of each pair with its second; whatever slows both of a pair cancels.

    Args:
        pairs: At least 6 of positive times, each taken one right after the other.
    """
    ratios = sorted(first / second for first, second in pairs)
    interval = median_interval(ratios, confidence=0.95)
    assert interval is not None, f"{len(pairs)} pairs"
    return Ratio(statistics.median(ratios), interval, len(ratios))
