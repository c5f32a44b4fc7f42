"""Calibration: which images it is done on, and what values they cause in a model.

The images must not be those on which accuracy is measured, so each is known by its hash. Their
activations are not kept: a histogram of each tensor is, from which every method takes its range.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from deploy.errors import BadInputError
from export.onnx_file.run_onnx import open_session

__all__ = [
    "BINS",
    "CalibrationProvenance",
    "Histogram",
    "assert_disjoint",
    "calibration_provenance",
    "collect_histograms",
]

BINS = 2048  # on each side of zero; half of them are in use at least
_IMAGES = 4  # in one run: all activations of these are in memory together
_SMALLEST = -110  # so that BINS / 2^e is a finite float32


@dataclass(frozen=True)
class CalibrationProvenance:
    """Which images a model was calibrated on.

    Attributes:
        sha256: Of each encoded image, in order, as hexadecimal digits.
        digest: The SHA-256 of that list, one digest a line.
        count: How many images.
    """

    sha256: tuple[str, ...]
    digest: str
    count: int

    def to_json(self) -> dict[str, Any]:
        """Return what a manifest says: the list itself would be longer than the rest."""
        return {"count": self.count, "sha256": self.digest}


def calibration_provenance(encoded_images: Iterable[bytes]) -> CalibrationProvenance:
    """Hash the images of a calibration set, one at a time.

    Raises:
        BadInputError: There are none.
    """
    hashes = tuple(hashlib.sha256(image).hexdigest() for image in encoded_images)
    if not hashes:
        raise _no_images()
    digest = hashlib.sha256("".join(f"{line}\n" for line in hashes).encode()).hexdigest()
    return CalibrationProvenance(hashes, digest, len(hashes))


def assert_disjoint(calibration_hashes: Iterable[str], validation_hashes: Iterable[str]) -> None:
    """Insist that no image serves for both: ranges fitted to it would flatter the accuracy on it.

    Raises:
        BadInputError: There are such images.
    """
    held_out = set(validation_hashes)
    shared = [(i, h) for i, h in enumerate(calibration_hashes) if h in held_out]
    if shared:
        index, first = shared[0]
        raise BadInputError(
            "a model is calibrated on other images than those that its accuracy is measured on",
            found=f"{len(shared)} images in both, first calibration image {index} ({first[:12]})",
            remedy="calibrate on images of the training set; `edgereg data check --against` finds "
            "those that are in both, and writes an index that skips them",
        )


class Histogram:
    """How often a tensor took which values, without keeping them.

    The bins span [-2^e, 2^e) and are equally wide. A larger value doubles the span, and
    neighbouring bins merge in pairs: as the edges are powers of two, the counts are the same
    whatever order the values came in.

    Attributes:
        counts: (2 * BINS,) int64; zero is the first value of bin number BINS.
        exponent: The e above.
        lowest: The smallest value that was seen.
        highest: The largest.
    """

    def __init__(self) -> None:
        self.counts: NDArray[np.int64] = np.zeros(2 * BINS, np.int64)
        self.exponent = _SMALLEST
        self.lowest, self.highest = np.inf, -np.inf

    @property
    def bin_width(self) -> float:
        """The width of a bin."""
        return float(2.0**self.exponent / BINS)

    def add(self, values: NDArray[np.float32]) -> None:
        """Count finite values of any shape."""
        low, high = float(values.min()), float(values.max())
        self.lowest, self.highest = min(self.lowest, low), max(self.highest, high)
        peak = max(-low, high)
        if peak > 0:  # frexp calls zero 0 * 2^0, and it fits any span
            self._widen(int(np.frexp(peak)[1]))
        scale = np.float32(2.0**-self.exponent * BINS)
        bins = np.floor(values.ravel() * scale).astype(np.int32) + BINS
        self.counts += np.bincount(bins, minlength=2 * BINS)

    def _widen(self, exponent: int) -> None:
        for _ in range(exponent - self.exponent):
            merged = self.counts.reshape(-1, 2).sum(axis=1)
            self.counts[:] = 0
            self.counts[BINS // 2 : 3 * BINS // 2] = merged
        self.exponent = max(self.exponent, exponent)


def collect_histograms(
    model: bytes, batches: Iterable[NDArray[np.float32]], tensors: Sequence[str]
) -> dict[str, Histogram]:
    """Run images through a model and return the histogram of each tensor.

    Args:
        model: The float32 ONNX file.
        batches: (N, 3, H, W) pre-processed images; read once, one batch at a time.
        tensors: Of the graph, float32.

    Raises:
        BadInputError: There are no images, or a tensor takes values that are not finite.
    """
    proto = onnx.load_model_from_string(model)
    (image_input,) = (value.name for value in proto.graph.input)
    ends = {image_input, *(value.name for value in proto.graph.output)}
    proto.graph.output.extend(onnx.ValueInfoProto(name=t) for t in tensors if t not in ends)
    session = open_session(proto.SerializeToString())
    (spec,) = session.get_inputs()
    names = [output.name for output in session.get_outputs()]
    histograms = {tensor: Histogram() for tensor in tensors}
    seen = 0
    for images in _split(batches, spec.shape[0] if isinstance(spec.shape[0], int) else _IMAGES):
        seen += len(images)
        values = dict(zip(names, session.run(names, {image_input: images}), strict=True))
        values[image_input] = images
        for tensor, histogram in histograms.items():
            _check_finite(tensor, values[tensor])
            histogram.add(values[tensor])
    if not seen:
        raise _no_images()
    return histograms


def _split(batches: Iterable[NDArray[np.float32]], size: int) -> Iterator[NDArray[np.float32]]:
    for batch in batches:
        for start in range(0, len(batch), size):
            yield batch[start : start + size]


def _check_finite(tensor: str, values: NDArray[np.float32]) -> None:
    if not np.isfinite(values).all():
        raise BadInputError(
            "a model is calibrated on finite values",
            found=f"{int((~np.isfinite(values)).sum())} others in tensor '{tensor}'",
            remedy="check the images and their pre-processing",
        )


def _no_images() -> BadInputError:
    return BadInputError(
        "a model is calibrated on images", found="none", remedy="give some, 100 to 500 are usual"
    )
