"""Rounds of runs in turns, as many as a budget of time has room for."""

import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

from timing import in_turns

from deploy.measure.statistics import median_interval

__all__ = ["Interval", "ratio_of", "time_rounds"]

_REST_S = 0.003
_REST_OF_POOLS_S = 0.1  # in which the threads of a pool, which spin for more work, fall asleep
_SAMPLE_S = 0.002  # a sample of a shorter run is the mean of several in a row
_WARM_UP = 3
_MOST = 101  # rounds
_LEAST = 11

Interval = tuple[float, float, float]
"""A median with the ends of its 95 % interval."""


def time_rounds(
    runs: Mapping[str, Callable[[], object]], budget_s: float, *, threads: int = 1
) -> tuple[dict[str, list[float]], int]:
    """Return the seconds of a run in each round, and how many rounds the budget had.

    Before each sample its run goes once uncounted, after a rest: what the run before it left in
    the caches and on the other cores is its neighbour's doing. Where runs have several threads the
    rest is longer: three ONNX Runtime sessions with the same ViT-Ti, two threads each on two cores,
    took 18 to 19 ms after 3 ms of rest, and 10.8 after 100 (medians, n = 15).
    """
    rest_s = _REST_S if threads == 1 else _REST_OF_POOLS_S
    single: dict[str, float] = {}
    for name, run in runs.items():
        times = []
        for _ in range(_WARM_UP):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        single[name] = min(times)
    counts = {name: max(1, round(_SAMPLE_S / seconds)) for name, seconds in single.items()}
    a_round = sum(single[name] * (1 + counts[name]) + rest_s for name in runs)
    rounds = max(_LEAST, min(_MOST, int(budget_s / a_round)))
    steps: list[Callable[[], object]] = []
    for name, run in runs.items():
        steps += [_rest_then(run, rest_s), _repeat(run, counts[name])]
    samples = in_turns(steps, rounds)[1::2]
    seconds = {
        name: [total / counts[name] for total in totals]
        for name, totals in zip(runs, samples, strict=True)
    }
    return seconds, rounds


def _rest_then(run: Callable[[], object], rest_s: float) -> Callable[[], object]:
    def step() -> object:
        time.sleep(rest_s)
        return run()

    return step


def _repeat(run: Callable[[], object], count: int) -> Callable[[], None]:
    def step() -> None:
        for _ in itertools.repeat(None, count):
            run()

    return step


def ratio_of(numerator: Sequence[float], denominator: Sequence[float]) -> Interval:
    """Return the median of the rounds' ratios, with its interval."""
    ratios = sorted(a / b for a, b in zip(numerator, denominator, strict=True))
    low, high = median_interval(ratios, confidence=0.95) or (ratios[0], ratios[-1])
    return statistics.median(ratios), low, high
