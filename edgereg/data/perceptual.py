"""A 64-bit hash that images which look alike share, but for a few bits.

The grey image is scaled to 32 x 32 and its discrete cosine transform taken; each of the 8 x 8
lowest frequencies, the mean left out, gives one bit: whether it is above their median (C. Zauner,
"Implementation and Benchmarking of Perceptual Image Hash Functions", 2010: the DCT-based hash).
Re-compressed and re-scaled copies differ in few of the bits. So do pictures that are alike in their
large shapes only, as icons on one background are: a match is a hint, no proof.
"""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from deploy.runtime.preprocess import Preprocessing, fit

__all__ = ["BITS", "near_pairs", "perceptual_hash"]

BITS = 64

_SIDE = 32
_SPEC = Preprocessing(_SIDE, _SIDE, "stretch", 1.0, (0.5,) * 3, (0.5,) * 3)
_LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601
# rows 1 to 8 of the DCT-II: row 0 is the mean, which says how bright and not what
_COSINES = np.cos(np.pi / _SIDE * np.outer(np.arange(1, 9), np.arange(_SIDE) + 0.5))
_ONES = np.array([bin(byte).count("1") for byte in range(256)], np.uint8)
_BLOCK = 1024  # hashes compared with all others of their band at once


def perceptual_hash(image: NDArray[np.uint8]) -> int:
    """Return the hash of an image (h, w, 3), in 0..2^64-1."""
    grey = fit(image, _SPEC) @ _LUMA
    # rounded: in an image of one colour all are zero, and rounding errors must not be its hash
    frequencies = (_COSINES @ grey @ _COSINES.T).ravel().round(6)
    bits = frequencies > np.median(frequencies)
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def near_pairs(hashes: NDArray[np.uint64], max_distance: int) -> Iterator[tuple[int, int, int]]:
    """Yield (i, j, distance) for i < j whose hashes differ in at most `max_distance` bits, once.

    Of max_distance + 1 bands of bits two such hashes share one at least, so only hashes that share
    a band are compared.

    Args:
        hashes: (N,).
        max_distance: 0 to 15.
    """
    edges = np.linspace(0, BITS, max_distance + 2).astype(int)
    bands = [
        (hashes >> np.uint64(low)) & np.uint64((1 << int(high - low)) - 1)
        for low, high in pairwise(edges)
    ]
    for number, band in enumerate(bands):
        order = np.argsort(band, kind="stable")
        starts = np.flatnonzero(np.r_[True, np.diff(band[order]) != 0, True])
        for first, last in pairwise(starts):
            members = order[first:last]
            for at in range(0, len(members) - 1, _BLOCK):
                for i, j, distance in _compare(hashes, members, at, max_distance):
                    # a pair that shares several bands is met in the first of them
                    if not any(earlier[i] == earlier[j] for earlier in bands[:number]):
                        yield i, j, distance


def _compare(
    hashes: NDArray[np.uint64], members: NDArray[np.intp], at: int, max_distance: int
) -> Iterator[tuple[int, int, int]]:
    """Yield the near pairs of some members with those that stand behind them."""
    rows, columns = members[at : at + _BLOCK], members[at:]
    differing = hashes[rows, np.newaxis] ^ hashes[np.newaxis, columns]
    bytes_ = differing.view(np.uint8).reshape(*differing.shape, BITS // 8)
    distance = _ONES[bytes_].sum(axis=2, dtype=np.uint8)
    is_near = (distance <= max_distance) & (rows[:, np.newaxis] < columns[np.newaxis])
    for row, column in np.argwhere(is_near):
        yield int(rows[row]), int(columns[column]), int(distance[row, column])
