"""Is a model faster on an input that it has just seen? Then a cache is measured, not the model.

Each round makes an input that was never there before, times it, and times it again. Whatever
remembers inputs, one or all of them, answers the second time sooner.
"""

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploy.bundle.read import Bundle
from deploy.measure.statistics import Ratio, median_ratio
from deploy.runtime.runner import Runner

__all__ = ["RepeatedInput", "check_repeated_input"]

_ROUNDS, _LEAST_ROUNDS, _BUDGET_S = 101, 11, 5.0
_WARM_UP = 3
_FASTEST = 0.9


@dataclass(frozen=True)
class RepeatedInput:
    """The time of a repeated input over that of the same when it was new."""

    ratio: Ratio

    @property
    def passed(self) -> bool:
        """Unless it is surely faster by more than 10 %."""
        return self.ratio.interval[1] >= _FASTEST

    def __str__(self) -> str:
        outcome = "no cache" if self.passed else "FASTER by more than 10 %: a cache was measured"
        return f"a repeated input takes {self.ratio} times a new one's time: {outcome}"


def check_repeated_input(bundle: Bundle, runner: Runner) -> RepeatedInput:
    """Time new inputs and repeated ones in turns, for some seconds at most."""
    stored = bundle.array(bundle.manifest.golden.preprocessed)
    pairs, started = [], time.perf_counter()
    for number in range(_WARM_UP + _ROUNDS):
        new_s = _time(runner, _new_input(stored, number))
        again_s = _time(runner, _new_input(stored, number))  # made anew: before both, the same work
        pairs.append((again_s, new_s))
        late = time.perf_counter() - started > _BUDGET_S
        if late and len(pairs) >= _WARM_UP + _LEAST_ROUNDS:
            break
    return RepeatedInput(median_ratio(pairs[_WARM_UP:]))


def _new_input(stored: NDArray[Any], number: int) -> NDArray[Any]:
    """A golden input, changed a little, each number otherwise."""
    image = stored[number % len(stored)][np.newaxis]
    if image.dtype == np.uint8:
        pixels: NDArray[Any] = np.add(image, np.uint8(number % 255 + 1), dtype=np.uint8)
        return pixels
    floats: NDArray[Any] = np.add(image, 1e-3 * (number + 1), dtype=np.float32)
    return floats


def _time(runner: Runner, batch: NDArray[Any]) -> float:
    begun = time.perf_counter()
    runner(batch)
    return time.perf_counter() - begun
