"""sRGB to CIE Lab and back, under the white of daylight (D65, the 2-degree observer).

    linear  = ((c + 0.055) / 1.055)^2.4             above 0.04045, else c / 12.92  (IEC 61966-2-1)
    X, Y, Z = M linear, over the white's
    f(t)    = t^(1/3)                               above 0.008856, else 7.787 t + 16/116  (CIE 15)
    L       = 116 f(Y) - 16,   a = 500 (f(X) - f(Y)),   b = 200 (f(Y) - f(Z))

L is the lightness in 0..100; (a, b) is the colour, (0, 0) for grey. All of it is arithmetic of
single channels, so that neither autocast nor TF32 rounds it.
"""

import torch
from torch import Tensor

__all__ = ["grey_of", "lab_to_rgb", "rgb_to_lab"]

_TO_XYZ = (
    (0.412453, 0.357580, 0.180423),
    (0.212671, 0.715160, 0.072169),
    (0.019334, 0.119193, 0.950227),
)
_FROM_XYZ = tuple(map(tuple, torch.tensor(_TO_XYZ, dtype=torch.float64).inverse().tolist()))
_WHITE = (0.95047, 1.0, 1.08883)


def rgb_to_lab(images: Tensor) -> Tensor:
    """Return L in [0, 100], a in about [-86, 98] and b in [-108, 94], (B, 3, H, W).

    Args:
        images: (B, 3, H, W) float32 in [0, 1], sRGB.
    """
    x, y, z = (
        _compress(channel / white)
        for channel, white in zip(_mixed(_linear(images), _TO_XYZ), _WHITE, strict=True)
    )
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], dim=1)


def lab_to_rgb(lab: Tensor) -> Tensor:
    """Return sRGB in [0, 1], (B, 3, H, W); what no screen can show is clipped.

    Args:
        lab: (B, 3, H, W) float32.
    """
    y = (lab[:, 0] + 16) / 116
    roots = (y + lab[:, 1] / 500, y, y - lab[:, 2] / 200)
    xyz = [_expand(root) * white for root, white in zip(roots, _WHITE, strict=True)]
    return _gamma(torch.stack(_mixed(torch.stack(xyz, dim=1), _FROM_XYZ), dim=1))


def grey_of(images: Tensor) -> Tensor:
    """Return the grey images (B, 3, H, W) in [0, 1] whose lightness L is that of the colours.

    Args:
        images: (B, 3, H, W) float32 in [0, 1], sRGB.
    """
    (luminance,) = _mixed(_linear(images), _TO_XYZ[1:2])
    return _gamma(luminance[:, None].expand_as(images))


def _mixed(images: Tensor, matrix: tuple[tuple[float, ...], ...]) -> list[Tensor]:
    first, second, third = images.unbind(1)
    return [row[0] * first + row[1] * second + row[2] * third for row in matrix]


def _linear(images: Tensor) -> Tensor:
    return torch.where(images > 0.04045, ((images + 0.055) / 1.055) ** 2.4, images / 12.92)


def _gamma(linear: Tensor) -> Tensor:
    linear = linear.clamp(0, 1)
    return torch.where(linear > 0.0031308, 1.055 * linear ** (1 / 2.4) - 0.055, 12.92 * linear)


def _compress(t: Tensor) -> Tensor:
    return torch.where(t > 0.008856, t.clamp(min=0) ** (1 / 3), 7.787 * t + 16 / 116)


def _expand(root: Tensor) -> Tensor:
    return torch.where(root > 0.008856 ** (1 / 3), root**3, (root - 16 / 116) / 7.787)
