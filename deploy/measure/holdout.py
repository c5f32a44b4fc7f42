"""The accuracy of a bundle on this device, on the labelled sample that it carries.

The gate of a variant limits the net loss: images that the reference answers right and the variant
wrong, less the reverse. At export it was held against thousands of images, here against a few
hundred: by chance the variant may have lost more of these than of all. So it may lose as many here
as the gate allows, or as it lost of the very same images at export, whichever is more; and one
more, because another processor or JPEG decoder rounds otherwise: but for fp32 on images that decode
exactly, of which no answer may differ. A flip at which the reference itself hardly prefers its
answer is a tie, and not held against the device.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from deploy.bundle.index import read_index
from deploy.bundle.manifest import Accuracy, Holdout
from deploy.bundle.read import Bundle
from deploy.errors import BadInputError
from deploy.measure.paired import PairedAccuracy, compare_answers
from deploy.runtime.decode import decode, is_exact
from deploy.runtime.preprocess import preprocess
from deploy.runtime.runner import Runner

__all__ = ["HoldoutReport", "measure_holdout"]

_ROUNDING = 1e-9  # of an allowed count: 0.01 * 300 may be less than 3 in float64


@dataclass(frozen=True)
class HoldoutReport:
    """What the sample says.

    Attributes:
        paired: The answers here beside the reference's.
        gate: The largest net loss that was allowed at export, a share of the images.
        allowed: How many images may be lost here, less those gained, ties apart.
    """

    paired: PairedAccuracy
    gate: float
    allowed: int

    @property
    def passed(self) -> bool:
        """Whether no more is lost than is allowed."""
        return self.paired.lost - self.paired.gained - self.paired.ties <= self.allowed

    def __str__(self) -> str:
        paired = self.paired
        low, high = (100 * end for end in paired.interval)
        return (
            f"top-1 {paired.top1:.2%} (reference {paired.reference_top1:.2%}) on {paired.count} "
            f"images, {paired.lost} lost, {paired.gained} gained, {paired.ties} ties; net loss "
            f"{100 * paired.net_loss:.2f} points [{low:.2f}, {high:.2f}]; at most {self.allowed} "
            f"may be lost net: the gate of {100 * self.gate:.2f} points, what was lost of them at "
            "export, rounding"
        )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            **self.paired.to_json(),
            "gate": self.gate,
            "allowed_net_lost": self.allowed,
            "passed": self.passed,
        }


def measure_holdout(
    bundle: Bundle, runner: Runner, *, on_progress: Callable[[str], None] | None = None
) -> HoldoutReport | None:
    """Answer the held-out images, one at a time, and compare with the reference and the labels.

    Args:
        bundle: The opened bundle.
        runner: One of its variants, loaded.
        on_progress: Told how far it is.

    Returns:
        None if the bundle carries no such sample.

    Raises:
        BadInputError: Pillow is missing, or the sample is not what the manifest says.
    """
    holdout, index = bundle.manifest.holdout, read_index(bundle)
    accuracy = bundle.manifest.variants[runner.precision].accuracy
    if holdout is None or accuracy is None:  # the manifest has both or neither
        return None
    labels, reference = bundle.array(holdout.labels), bundle.array(holdout.outputs)
    expected = (holdout.count, bundle.manifest.outputs[0].shape[-1])
    if (
        labels.dtype.kind not in "iu"
        or reference.dtype != np.float32
        or reference.shape != expected
    ):
        raise BadInputError(
            f"the held-out sample of bundle '{bundle.path.name}' must be what its manifest says",
            found=f"labels {labels.dtype}, outputs {reference.dtype} {reference.shape}",
            remedy="export the bundle again",
        )
    rows, exact = [], True
    for place, name in enumerate(holdout.images):
        data = bundle.read(name)
        exact = exact and is_exact(data)
        image = decode(data, name=name)
        rows.append(runner(preprocess([image], bundle.manifest.preprocessing)))
        if on_progress is not None:
            on_progress(f"{place + 1} of {holdout.count} held-out images")
    outputs = np.concatenate(rows)
    if index is not None:
        outputs, reference = index.vote_logits(outputs), index.vote_logits(reference)
    allowed = _allowed(holdout, accuracy, precision=runner.precision, exact=exact)
    return HoldoutReport(compare_answers(outputs, reference, labels), accuracy.gate, allowed)


def _allowed(holdout: Holdout, accuracy: Accuracy, *, precision: str, exact: bool) -> int:
    """Return how many images may be lost net, ties apart."""
    within_gate = math.floor(accuracy.gate * holdout.count + _ROUNDING)
    rounding = 0 if precision == "fp32" and exact else 1
    return max(within_gate, holdout.net_lost[precision]) + rounding
