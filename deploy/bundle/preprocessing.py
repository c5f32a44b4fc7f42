"""What is done to an image before the model sees it, as data; `runtime/preprocess` does it.

Without numpy: the manifest, which holds it, is read before anything large is imported.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from deploy import strict_json
from deploy.errors import BadInputError

__all__ = ["Preprocessing"]


@dataclass(frozen=True)
class Preprocessing:
    """What is done to an image before the model sees it.

    Attributes:
        height: Of the model's input, in pixels.
        width: Of the model's input, in pixels.
        resize: "stretch" scales both sides to fit; "cover" keeps the shape and cuts out the centre.
        crop_fraction: For "cover", the part of the scaled image's tighter side that is kept:
            224 / 256 = 0.875 is torchvision's Resize(256), CenterCrop(224). 1.0 for "stretch".
        mean: Of each colour channel, in [0, 1], R G B.
        std: Of each colour channel.
        layout: What the model takes: "nchw-float32" is normalised here; "nhwc-uint8" are the
            pixels themselves, which the model's graph normalises.

    Raises:
        BadInputError: A value is out of its range.
    """

    height: int
    width: int
    resize: Literal["stretch", "cover"]
    crop_fraction: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    layout: Literal["nchw-float32", "nhwc-uint8"] = "nchw-float32"

    def __post_init__(self) -> None:
        rules = {
            "height must be 1 to 16384": 1 <= self.height <= 16384,
            "width must be 1 to 16384": 1 <= self.width <= 16384,
            "resize must be 'stretch' or 'cover'": self.resize in ("stretch", "cover"),
            # of a smaller one the scaled side is no number any more
            "crop_fraction must be above 0.000001 and at most 1": 1e-6 < self.crop_fraction <= 1,
            "crop_fraction must be 1 for 'stretch'": self.resize == "cover"
            or self.crop_fraction == 1,
            "layout must be 'nchw-float32' or 'nhwc-uint8'": self.layout
            in ("nchw-float32", "nhwc-uint8"),
            "mean must be three finite numbers": _are_three_finite(self.mean),
            "std must be three positive numbers": _are_three_finite(self.std) and min(self.std) > 0,
        }
        for rule, holds in rules.items():
            if not holds:
                raise BadInputError(rule, found=str(self), remedy="correct the pre-processing")

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """The shape of one image as the model takes it."""
        if self.layout == "nhwc-uint8":
            return self.height, self.width, 3
        return 3, self.height, self.width

    @property
    def input_dtype(self) -> str:
        """The type of the model's input."""
        return "uint8" if self.layout == "nhwc-uint8" else "float32"

    def to_json(self) -> dict[str, Any]:
        """The same as plain JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: Any) -> "Preprocessing":
        """Read what `to_json` wrote.

        Raises:
            BadInputError: A key is unknown or missing, or a value is wrong; it is named.
        """
        return strict_json.decode(cls, value, source="the pre-processing")


def _are_three_finite(values: Sequence[float]) -> bool:
    return len(values) == 3 and all(math.isfinite(value) for value in values)
