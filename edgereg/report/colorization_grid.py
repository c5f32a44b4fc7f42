"""A picture of what colorization has learnt: grey images, the model's colours, the true ones."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deploy.publish import check_new_file, publish_bytes
from deploy.runtime.decode import encode_png, load_pillow
from edgereg.ssl.colorization import Colorization
from edgereg.ssl.lab import grey_of, rgb_to_lab

__all__ = ["ColorizationGrid", "write_colorization_grid"]

_ACROSS = 8  # images in a row
_TILE = 96  # least side of a picture, in pixels
_GAP = 4
_MARGIN = 16
_FONT = 12
_LINE = 18
_TITLES = 56  # width of the rows' titles
_PAGE = "#eeeeee"


@dataclass(frozen=True)
class ColorizationGrid:
    """What was drawn, and where.

    Args:
        path: The PNG file.
        images: How many.
        chroma: Mean of sqrt(a^2 + b^2) of the model's colours; 0 is grey.
        true_chroma: That of the true colours.
        divergence: Mean KL divergence of the model's colours from the true ones, in nats; None of a
            model that answers with no distribution.
    """

    path: Path
    images: int
    chroma: float
    true_chroma: float
    divergence: float | None

    def to_json(self) -> dict[str, Any]:
        """Return the result as JSON values."""
        return {
            "colorization": str(self.path),
            "images": self.images,
            "chroma": self.chroma,
            "true_chroma": self.true_chroma,
            "kl_nats": self.divergence,
        }


def write_colorization_grid(
    model: Colorization, images: Tensor, out: Path, *, force: bool = False
) -> ColorizationGrid:
    """Draw images as the model sees them, as it colours them, and as they are.

    Args:
        model: On any device; left in its mode.
        images: (N, 3, H, W) uint8, one or more; best some that it was not trained on.
        out: The PNG file to write.
        force: Whether an earlier file may be replaced.

    Raises:
        BadInputError: `out` exists, or Pillow is missing.
    """
    check_new_file(out, what="a picture", force=force)
    truth = images.to(model.prior.device).float() / 255
    painted = model.paint(truth)
    divergence = model.divergence(truth)
    result = ColorizationGrid(
        path=out,
        images=len(images),
        chroma=_chroma(model.predict_ab(truth)),
        true_chroma=_chroma(rgb_to_lab(truth)[:, 1:]),
        divergence=None if divergence is None else divergence.mean().item(),
    )
    publish_bytes(
        out, _draw(_heading(result), {"grey": grey_of(truth), "model": painted, "true": truth})
    )
    return result


def _chroma(ab: Tensor) -> float:
    return float(ab.norm(dim=1).mean())


def _heading(result: ColorizationGrid) -> str:
    text = f"mean chroma: model {result.chroma:.1f}, true {result.true_chroma:.1f}"
    return text if result.divergence is None else f"{text}; KL {result.divergence:.2f} nats"


def _draw(heading: str, rows: dict[str, Tensor]) -> bytes:
    """Return a PNG file: the heading, and blocks of titled rows of images (N, 3, H, W)."""
    load_pillow()  # which says what to install
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(_FONT)
    count, _, height, width = next(iter(rows.values())).shape
    scale = math.ceil(_TILE / min(height, width))
    height, width = height * scale, width * scale
    across, blocks = min(count, _ACROSS), math.ceil(count / _ACROSS)
    block = len(rows) * (height + _GAP) + _MARGIN
    left, top = _MARGIN + _TITLES, _MARGIN + _LINE + _GAP
    size = (left + across * (width + _GAP) + _MARGIN, top + blocks * block)
    page = Image.new("RGB", size, _PAGE)
    pen = ImageDraw.Draw(page)
    pen.text((_MARGIN, _MARGIN), heading, "black", font)
    for row, (title, images) in enumerate(rows.items()):
        pixels = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        for place, picture in enumerate(pixels):
            above = top + place // _ACROSS * block + row * (height + _GAP)
            if place % _ACROSS == 0:
                pen.text((_MARGIN, above + height // 2), title, "black", font)
            tile = Image.fromarray(picture).resize((width, height), Image.Resampling.NEAREST)
            page.paste(tile, (left + place % _ACROSS * (width + _GAP), above))
    return encode_png(np.asarray(page))
