"""RandAugment and TrivialAugment: a few operations a sample, drawn from one list of fourteen.

The list is that of RandAugment (Cubuk et al., 1909.13719, section 3); TrivialAugment (Müller and
Hutter, 2103.10158), in its "wide" form, has the same with wider ranges. Strengths are whole steps
of a thirtieth of the range. What the papers leave open is as in torchvision: positive and negative
strengths are equally likely, a shear is about the upper left corner, and a shift is by whole
pixels. Turned and slanted images are interpolated bilinearly; torchvision's default is the nearest
pixel.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from edgereg.augment.colour import brightness, contrast, saturation
from edgereg.augment.draws import Draws
from edgereg.augment.filters import sharpness
from edgereg.augment.geometric import Beyond, warp
from edgereg.augment.tone import autocontrast, equalize, posterize, solarize
from edgereg.errors import check_settings

__all__ = ["RandAugment", "TrivialAugment"]

_STEPS = 30


@dataclass(frozen=True)
class RandAugment:
    """Do some operations in turn, all of one strength (Cubuk et al., 1909.13719, section 3).

    Each sample draws its own operations, one and the same perhaps twice, and their signs.

    Args:
        operations: How many in turn; the paper's N.
        magnitude: Their strength, in 0..30; the paper's M.
        beyond: What lies beyond the image, see Affine; black by default.
    """

    operations: int = 2
    magnitude: int = 9
    beyond: Beyond = "zeros"

    def __post_init__(self) -> None:
        check_settings(
            self,
            "",
            {
                "operations": ("1 or more", self.operations >= 1),
                "magnitude": ("in 0..30", 0 <= self.magnitude <= _STEPS),
            },
        )

    def transform(self, images: Tensor, draws: Draws) -> Tensor:
        """Return the images (B, 3, H, W), each after its operations."""
        chosen = draws.integers("operation", len(_OPERATIONS), count=self.operations)
        steps = self.magnitude * _signs(draws, self.operations)
        for turn in range(self.operations):
            images = _operate(images, chosen[:, turn], steps[:, turn], _RAND_AUGMENT, self.beyond)
        return images


@dataclass(frozen=True)
class TrivialAugment:
    """Do one operation of any strength (Müller and Hutter, 2103.10158, section 3).

    Each sample draws its own operation, strength and sign. The ranges are the paper's "wide" ones:
    a shift of up to 32 pixels, whatever the image's size.

    Args:
        beyond: What lies beyond the image, see Affine; black by default.
    """

    beyond: Beyond = "zeros"

    def transform(self, images: Tensor, draws: Draws) -> Tensor:
        """Return the images (B, 3, H, W), each after its operation."""
        chosen = draws.integers("operation", len(_OPERATIONS))
        steps = draws.integers("magnitude", _STEPS + 1) * _signs(draws, 1)
        return _operate(images, chosen[:, 0], steps[:, 0], _TRIVIAL_AUGMENT, self.beyond)


@dataclass(frozen=True)
class _Ranges:
    """What the strongest step does.

    Args:
        shear: Tangent of the angle.
        translate: From the side's length to the shift along it, in pixels.
        degrees: Of rotation.
        factor: Change of the factor of brightness, colour, contrast and sharpness from 1.
        bits: How many fewer than 8 are kept.
    """

    shear: float
    translate: Callable[[int], float]
    degrees: float
    factor: float
    bits: int


_RAND_AUGMENT = _Ranges(
    shear=0.3, translate=lambda side: 150 / 331 * side, degrees=30, factor=0.9, bits=4
)
_TRIVIAL_AUGMENT = _Ranges(shear=0.99, translate=lambda _: 32, degrees=135, factor=0.99, bits=6)


def _signs(draws: Draws, count: int) -> Tensor:
    """Return (B, count) of 1 and -1."""
    return 1 - 2 * draws.integers("sign", 2, count=count)


def _operate(
    images: Tensor, chosen: Tensor, steps: Tensor, ranges: _Ranges, beyond: Beyond
) -> Tensor:
    """Do to each sample the operation of number `chosen` (B,) by `steps` (B,), -30..30."""
    changed = torch.empty_like(images)
    for number, operation in enumerate(_OPERATIONS.values()):
        places = (chosen == number).nonzero()[:, 0]
        if len(places):
            some = operation(images[places], steps[places].to(images.dtype), ranges, beyond)
            changed[places] = some
    return changed


def _by_factor(function: Callable[[Tensor, Tensor], Tensor]) -> "_Operation":
    return lambda images, steps, ranges, _: function(images, 1 + ranges.factor * steps / _STEPS)


def _by_itself(function: Callable[[Tensor], Tensor]) -> "_Operation":
    return lambda images, *_: function(images)


def _posterize(images: Tensor, steps: Tensor, ranges: _Ranges, _: Beyond) -> Tensor:
    return posterize(images, 8 - torch.round(ranges.bits * steps.abs() / _STEPS))


def _solarize(images: Tensor, steps: Tensor, *_: object) -> Tensor:
    # one division, so that thresholds such as 0.8 = 204/255 equal the pixels of this value
    return solarize(images, (_STEPS - steps.abs()) / _STEPS)


def _rotate(images: Tensor, steps: Tensor, ranges: _Ranges, beyond: Beyond) -> Tensor:
    angle = torch.deg2rad(ranges.degrees * steps / _STEPS)
    cos, sin = torch.cos(angle), torch.sin(angle)
    return _warp(images, {(0, 0): cos, (0, 1): -sin, (1, 0): sin, (1, 1): cos}, beyond)


def _shear(axis: int) -> "_Operation":
    """Slant along x (0) or y (1); the image's first row or column stays where it is."""

    def shear(images: Tensor, steps: Tensor, ranges: _Ranges, beyond: Beyond) -> Tensor:
        slope = ranges.shear * steps / _STEPS
        half = images.shape[2 + axis] / 2  # from the centre to the corner, across the slant
        return _warp(images, {(axis, 1 - axis): slope, (axis, 2): slope * half}, beyond)

    return shear


def _translate(axis: int) -> "_Operation":
    """Shift along x (0) or y (1)."""

    def translate(images: Tensor, steps: Tensor, ranges: _Ranges, beyond: Beyond) -> Tensor:
        most = ranges.translate(images.shape[3 - axis])
        return _warp(images, {(axis, 2): -torch.trunc(most * steps / _STEPS)}, beyond)

    return translate


def _warp(images: Tensor, entries: Mapping[tuple[int, int], Tensor], beyond: Beyond) -> Tensor:
    """Move each image by the matrix that differs from the identity in these entries (K,)."""
    matrices = torch.eye(3, dtype=images.dtype, device=images.device).repeat(len(images), 1, 1)
    for (row, column), values in entries.items():
        matrices[:, row, column] = values
    return warp(images, matrices, padding=beyond)


_Operation = Callable[[Tensor, Tensor, _Ranges, Beyond], Tensor]

_OPERATIONS: dict[str, _Operation] = {
    "identity": _by_itself(lambda images: images),
    "autocontrast": _by_itself(autocontrast),
    "equalize": _by_itself(equalize),
    "rotate": _rotate,
    "solarize": _solarize,
    "colour": _by_factor(saturation),
    "posterize": _posterize,
    "contrast": _by_factor(contrast),
    "brightness": _by_factor(brightness),
    "sharpness": _by_factor(sharpness),
    "shear_x": _shear(0),
    "shear_y": _shear(1),
    "translate_x": _translate(0),
    "translate_y": _translate(1),
}
