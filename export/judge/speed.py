"""Is a variant faster than fp32 where it is to run? Asked only if this host is the target.

Int8 can be slower than fp32: the shares of a model's time that it speeds up and slows down depend
on the operators and on the CPU. Both are run in turns, so that whatever else the machine does
strikes both.
"""

import dataclasses
import math
import statistics
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploy.errors import CheckFailedError
from export.onnx_file.run_onnx import open_run

__all__ = ["Speed", "assert_not_slower", "compare_speed"]

_ROUNDS = 41
_WARM_UP = 5
_Z = 1.96


@dataclass(frozen=True)
class Speed:
    """The time of one image, one thread, as a ratio to that of the fp32 file.

    Attributes:
        ratio: Median of the rounds; below 1 is faster.
        interval: Of the median, at least 95 %, by order statistics.
        ms: Median time of the variant.
        fp32_ms: Median time of the fp32 file.
        rounds: How many.
    """

    ratio: float
    interval: tuple[float, float]
    ms: float
    fp32_ms: float
    rounds: int

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return dataclasses.asdict(self) | {"interval": list(self.interval)}

    def to_text(self) -> str:
        """Return it as a line."""
        low, high = self.interval
        return (
            f"{self.ms:.2f} ms an image, fp32 {self.fp32_ms:.2f} ms: {self.ratio:.2f}x "
            f"[{low:.2f}, {high:.2f}], one thread, n = {self.rounds}"
        )


def compare_speed(model: bytes, fp32: bytes, image: NDArray[np.float32]) -> Speed:
    """Time two files in turns on one image, (1, 3, H, W)."""
    ours, theirs = open_run(model), open_run(fp32)
    pairs = []
    for _ in range(_WARM_UP + _ROUNDS):
        begun = time.perf_counter()
        ours(image)
        between = time.perf_counter()
        theirs(image)
        pairs.append((between - begun, time.perf_counter() - between))
    pairs = pairs[_WARM_UP:]
    ratios = sorted(a / b for a, b in pairs)
    reach = math.ceil(_Z * len(ratios) ** 0.5 / 2)  # ranks on each side of the median
    middle = len(ratios) // 2
    return Speed(
        ratio=ratios[middle],
        interval=(ratios[middle - reach], ratios[middle + reach]),
        ms=1e3 * statistics.median(a for a, _ in pairs),
        fp32_ms=1e3 * statistics.median(b for _, b in pairs),
        rounds=_ROUNDS,
    )


def assert_not_slower(precision: str, speed: Speed) -> None:
    """Refuse a variant whose whole interval lies above 1.

    Raises:
        CheckFailedError: It is slower.
    """
    if speed.interval[0] > 1:
        raise CheckFailedError(
            "a lower precision is shipped to this kind of machine if it is no slower than fp32",
            found=f"{precision}: {speed.to_text()}",
            remedy="export fp32 only, or ship it all the same with --allow-slower",
        )
