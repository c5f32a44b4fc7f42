"""From a decoded image to the model's input; evaluation, export and the device all call this code.

Resizing is the antialiased triangle filter: within one grey level, Pillow's `resize(..., BILINEAR)`
and torch's `interpolate(mode="bilinear", antialias=True)`. As in Pillow (libImaging/Resample.c)
weights are 22-bit fixed-point integers. In integers the order of a sum does not matter, so every
machine gives the same bytes, and golden tensors can be compared exactly.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploy.bundle.preprocessing import Preprocessing
from deploy.errors import BadInputError
from deploy.runtime.decode import MAX_SIDE

__all__ = ["Preprocessing", "fit", "normalize", "preprocess", "scaled_size"]

# 8 bits of pixel + 22 of weight leave two of 32 free: sums cannot overflow. Of millions of weights,
# more than MAX_SIDE allows, each would round to nothing.
_WEIGHT_BITS = 22
_BLOCK = 1 << 17  # products at a time: half a MiB, which a core's cache holds
_NARROWEST = 64  # columns at a time, however many rows are combined


def fit(image: NDArray[np.uint8], spec: Preprocessing) -> NDArray[np.uint8]:
    """Resize and crop an image to the model's input size.

    Args:
        image: (h, w, 3) uint8.
        spec: The size, and how to reach it.

    Returns:
        (height, width, 3) uint8: the image itself if it has this size and nothing is cropped.

    Raises:
        BadInputError: The image has another shape or type, or is larger than `decode` allows.
    """
    is_rgb = image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
    if not is_rgb or image.size == 0 or max(image.shape) > MAX_SIDE:
        raise BadInputError(
            "an image must be (height, width, 3) uint8, not empty, "
            f"and at most {MAX_SIDE} on a side",
            found=f"{image.shape} {image.dtype}",
            remedy="decode it to RGB first; scale a larger one down",
        )
    scaled_height, scaled_width = scaled_size(image.shape[0], image.shape[1], spec)
    columns = _triangle_weights(image.shape[1], scaled_width, keep=spec.width)
    rows = _triangle_weights(image.shape[0], scaled_height, keep=spec.height)
    # Columns that no output needs are not worth combining.
    image = image[rows.first : rows.last, columns.first : columns.last]
    image = _weigh(image, rows)
    if columns.fixed is None:
        return image
    # Again as rows: only what lies in a row is combined fast.
    turned: NDArray[np.uint8] = np.ascontiguousarray(image.transpose(1, 2, 0))
    fitted: NDArray[np.uint8] = _weigh(turned, columns).transpose(2, 0, 1)
    return fitted


def normalize(images: NDArray[np.uint8], spec: Preprocessing) -> NDArray[np.float32]:
    """Scale grey levels to [0, 1], then subtract the mean and divide by the standard deviation.

    Args:
        images: (N, H, W, 3) uint8.
        spec: The mean and the standard deviation.

    Returns:
        (N, 3, H, W) float32, contiguous.
    """
    result = np.empty((len(images), 3, *images.shape[1:3]), np.float32)
    for image, place in zip(images, result, strict=True):
        _normalize_into(place, image, spec)
    return result


def preprocess(images: Sequence[NDArray[np.uint8]], spec: Preprocessing) -> NDArray[Any]:
    """Turn decoded images of any size into the model's input.

    Args:
        images: At least one (h, w, 3) uint8 RGB image; sizes may differ.
        spec: What to do.

    Returns:
        (N, 3, H, W) float32, or (N, H, W, 3) uint8, as the layout says.

    Raises:
        BadInputError: There is no image, or one has another shape or type.
    """
    if not images:
        raise BadInputError("a batch must hold an image", found="none", remedy="pass one or more")
    batch = np.empty((len(images), *spec.input_shape), spec.input_dtype)
    for image, place in zip(images, batch, strict=True):
        if spec.layout == "nhwc-uint8":
            place[:] = fit(image, spec)
        else:
            _normalize_into(place, fit(image, spec), spec)
    return batch


@dataclass(frozen=True)
class _Weights:
    """How output row i is made: the sum over k of fixed[i, k] × row sources[i, k] of a part.

    Attributes:
        first: The first row of the input's part that is needed.
        last: The row after it.
        sources: (out, taps), counted from `first`.
        fixed: (out, taps), each row summing to about 1 << _WEIGHT_BITS; None where the output is
            the part itself.
    """

    first: int
    last: int
    sources: NDArray[np.intp]
    fixed: NDArray[np.int32] | None


def _normalize_into(
    place: NDArray[np.float32], image: NDArray[np.uint8], spec: Preprocessing
) -> None:
    """Fill (3, H, W) from (H, W, 3).

    A table of 256 values for each channel would give the same bits, at 224 pixels more slowly; one
    product and one sum in place of the divisions would not.
    """
    np.copyto(place, image.transpose(2, 0, 1))
    place /= np.float32(255)
    place -= np.asarray(spec.mean, np.float32)[:, np.newaxis, np.newaxis]
    place /= np.asarray(spec.std, np.float32)[:, np.newaxis, np.newaxis]


def scaled_size(height: int, width: int, spec: Preprocessing) -> tuple[int, int]:
    """The size of the whole image before the crop; rounded down, as torchvision and timm do."""
    if spec.resize == "stretch":
        return spec.height, spec.width
    target_height = math.floor(spec.height / spec.crop_fraction)
    target_width = math.floor(spec.width / spec.crop_fraction)
    if target_height * width >= target_width * height:
        return target_height, max(target_width, target_height * width // height)
    return max(target_height, target_width * height // width), target_width


@functools.lru_cache(maxsize=16)  # of a camera, a film or a folder the sizes hardly vary
def _triangle_weights(size: int, scaled_size: int, *, keep: int) -> _Weights:
    """The weights of the `keep` central rows when `size` rows are scaled to `scaled_size`."""
    offset = round((scaled_size - keep) / 2)  # as torchvision's center_crop
    if size == scaled_size:
        return _Weights(offset, offset + keep, np.arange(keep)[:, np.newaxis], None)
    scale = size / scaled_size
    # The triangle spans two input pixels when enlarging, two output pixels when reducing.
    support = max(scale, 1.0)
    centre = (np.arange(offset, offset + keep) + 0.5) * scale
    first = np.maximum((centre - support + 0.5).astype(np.intp), 0)
    last = np.minimum((centre + support + 0.5).astype(np.intp), size)
    sources = first + np.arange(np.max(last - first))[:, np.newaxis]
    weights = np.maximum(1.0 - np.abs((sources - centre + 0.5) / support), 0.0)
    weights[sources >= last] = 0.0
    weights /= weights.sum(axis=0)
    fixed = (weights * (1 << _WEIGHT_BITS) + 0.5).astype(np.int32)
    start, stop = int(first[0]), int(last[-1])
    sources = np.ascontiguousarray((np.minimum(sources, stop - 1) - start).T)
    fixed = np.ascontiguousarray(fixed.T)
    for array in (sources, fixed):
        array.flags.writeable = False  # they are kept, and shared between threads
    return _Weights(start, stop, sources, fixed)


def _weigh(image: NDArray[np.uint8], weights: _Weights) -> NDArray[np.uint8]:
    """Combine the rows of (in, a, b) into those of (out, a, b)."""
    if weights.fixed is None:  # a copy or a crop
        return image
    flat = image.reshape(len(image), -1)
    (count, taps), width = weights.fixed.shape, flat.shape[1]
    wide = min(width, max(_BLOCK // taps, _NARROWEST))
    high = max(_BLOCK // (taps * wide), 1)
    result = np.empty((count, width), np.uint8)
    for left in range(0, width, wide):
        part = flat[:, left : left + wide]
        for top in range(0, count, high):
            these = slice(top, top + high)
            taken = part[weights.sources[these]].astype(np.int32)  # (out, taps, columns)
            total = np.einsum("ok,okx->ox", weights.fixed[these], taken)
            total += 1 << (_WEIGHT_BITS - 1)  # rounds
            total >>= _WEIGHT_BITS
            # Thousands of rounded weights can add up to a little more than one.
            np.minimum(total, 255, out=total)
            result[these, left : left + wide] = total
    return result.reshape(count, *image.shape[1:])
