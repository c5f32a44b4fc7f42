"""Three ways to choose the range that int8 spans, from a tensor's histogram.

A wide range rounds coarsely, a narrow one clips. "minmax" clips nothing; "percentile" clips the
outermost values, whatever they are; "entropy" clips where the distribution loses least.
"""

from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from export.precision.calibrate import BINS, Histogram

__all__ = ["METHODS", "PERCENTILE", "Method", "find_range", "find_ranges"]

Method = Literal["minmax", "entropy", "percentile"]
METHODS: tuple[Method, ...] = get_args(Method)
PERCENTILE = 99.99  # of the values lie inside the range
_LEVELS = 128  # the magnitudes of a signed 8-bit number
_ENOUGH = 10  # values for each bin: the gaps of a sparser histogram are chance, not distribution
_STRIDE = 8  # between the thresholds that are tried: 1/240 of the span at most


def find_ranges(histograms: dict[str, Histogram], method: Method) -> dict[str, tuple[float, float]]:
    """Return the range of each tensor."""
    return {tensor: find_range(histogram, method) for tensor, histogram in histograms.items()}


def find_range(histogram: Histogram, method: Method) -> tuple[float, float]:
    """Return the smallest and the largest value that int8 is to represent."""
    if method == "minmax":
        return histogram.lowest, histogram.highest
    low, high = _percentile(histogram) if method == "percentile" else _entropy(histogram)
    return max(low, histogram.lowest), min(high, histogram.highest)


def _percentile(histogram: Histogram) -> tuple[float, float]:
    """Cut half of the share that may be clipped from each end."""
    cumulated = np.cumsum(histogram.counts)
    cut = (1 - PERCENTILE / 100) / 2 * cumulated[-1]
    first = int(np.searchsorted(cumulated, cut, side="right"))
    last = int(np.searchsorted(cumulated, cumulated[-1] - cut, side="left"))
    return (first - BINS) * histogram.bin_width, (last + 1 - BINS) * histogram.bin_width


def _entropy(histogram: Histogram) -> tuple[float, float]:
    """Return -t and t, where t loses the least information, in Kullback and Leibler's measure.

    Source: Migacz, "8-bit inference with TensorRT", GTC 2017, slides 18 to 38.
    """
    magnitudes = histogram.counts[BINS:] + histogram.counts[:BINS][::-1]
    # Zero is represented exactly, in whatever range: half of all values, after a ReLU, say nothing.
    magnitudes[0] = magnitudes[1]
    if magnitudes.sum() < _ENOUGH * BINS:
        return histogram.lowest, histogram.highest
    candidates = [*range(_LEVELS, BINS, _STRIDE), BINS]
    divergences = [_divergence(magnitudes, size) for size in candidates]
    threshold = candidates[int(np.argmin(divergences))] * histogram.bin_width
    return -threshold, threshold


def _divergence(magnitudes: NDArray[np.int64], size: int) -> float:
    """Return KL(P || Q), where P is cut after `size` bins and Q is P in _LEVELS steps."""
    kept = magnitudes[:size]
    p = kept.astype(np.float64)
    p[-1] += magnitudes[size:].sum()
    level = np.arange(size) * _LEVELS // size
    held = np.bincount(level, weights=kept, minlength=_LEVELS)
    occupied = np.bincount(level, weights=p > 0, minlength=_LEVELS)
    q = (held / np.maximum(occupied, 1))[level]
    is_seen = p > 0
    p, q = p[is_seen], q[is_seen]
    if not q.all():  # what is clipped has no counterpart
        return float(np.inf)
    return float(np.sum(p / p.sum() * np.log((p / p.sum()) / (q / q.sum()))))
