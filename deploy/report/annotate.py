"""Write an answer onto its picture. Needs Pillow."""

import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploy.errors import BadInputError
from deploy.runtime.decode import load_pillow

__all__ = ["Annotator"]

_LEAST_SIDE = 240  # a smaller picture is enlarged: its text would cover it
_QUALITY = 90


class Annotator:
    """A folder of annotated pictures, numbered as they come.

    Args:
        folder: Made if it is missing; there may be nothing in it.

    Raises:
        BadInputError: There is something in it, or Pillow is missing.
    """

    def __init__(self, folder: Path) -> None:
        load_pillow()
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise BadInputError(
                "annotated pictures go into a new folder",
                found=f"'{folder}' is not empty, or no folder",
                remedy="name another one with --annotate",
            )
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._count = folder, 0

    def __call__(self, pixels: NDArray[np.uint8] | None, *, name: str, lines: list[str]) -> Path:
        """Write one.

        Args:
            pixels: (h, w, 3).
            name: Of the picture: what of it may stand in a file's name does.
            lines: What to write on it.

        Raises:
            BadInputError: There are no pixels: an array of the model's input is no picture.
        """
        if pixels is None:
            raise BadInputError(
                "an answer is written onto a picture",
                found=f"'{name}' holds the model's input, which is none",
                remedy="leave --annotate out, or save the pixels as uint8",
            )
        stem = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(name).name).strip("-.")
        path = self._folder / f"{self._count:06d}-{stem[:80]}.jpg"
        _draw(pixels, lines).save(path, format="JPEG", quality=_QUALITY)
        self._count += 1
        return path


def _draw(pixels: NDArray[np.uint8], lines: list[str]) -> Any:
    from PIL import ImageDraw, ImageFont

    image = load_pillow().Image.fromarray(pixels)
    scale = max(1, -(-_LEAST_SIDE // min(image.size)))
    image = image.resize((image.width * scale, image.height * scale), 0)
    size = max(12, image.height // 24)
    font = ImageFont.load_default(size)
    draw = ImageDraw.Draw(image)
    height = round(1.4 * size)
    draw.rectangle((0, 0, image.width, height * len(lines) + size // 2), fill=(0, 0, 0))
    for place, line in enumerate(lines):
        draw.text((size // 2, size // 4 + place * height), line, fill=(255, 255, 255), font=font)
    return image
