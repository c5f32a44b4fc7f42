"""What another resize would cost: the same images and model, scaled without antialiasing.

The commonest slip on a device: a library's fast resize takes the four nearest pixels, whatever the
scale, where training averaged over all that a pixel of the output covers.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from deploy.measure.paired import PairedAccuracy
from deploy.runtime.preprocess import Preprocessing, scaled_size
from export.judge.holdout import Holdout
from export.onnx_file.run_onnx import Run

__all__ = ["ResizeAblation", "measure_resize"]

_METHOD = "bilinear without antialiasing, as OpenCV's INTER_LINEAR"


@dataclass(frozen=True)
class ResizeAblation:
    """The accuracy with another resize, beside that of the model with its own."""

    method: str
    paired: PairedAccuracy

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {"method": self.method, **self.paired.to_json()}

    def to_text(self) -> str:
        """Return it as a line."""
        low, high = (100 * end for end in self.paired.interval)
        return (
            f"with another resize ({self.method}) the net loss would be "
            f"{100 * self.paired.net_loss:.2f} points [{low:.2f}, {high:.2f}], "
            f"{self.paired.flips} of {self.paired.count:,} answers would differ"
        )


def measure_resize(holdout: Holdout, run: Run, spec: Preprocessing) -> ResizeAblation:
    """Compare a variant's answers, with images resized otherwise, with the model's own."""
    paired = holdout.compare(run, alter=lambda image: _resized(image, spec))
    return ResizeAblation(_METHOD, paired)


def _resized(image: NDArray[np.uint8], spec: Preprocessing) -> NDArray[np.uint8]:
    size = scaled_size(image.shape[0], image.shape[1], spec)
    if size == image.shape[:2]:
        return image
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    scaled = F.interpolate(pixels, size=size, mode="bilinear", align_corners=False)
    rounded: NDArray[np.uint8] = scaled.round().byte()[0].permute(1, 2, 0).numpy()
    return np.ascontiguousarray(rounded)
