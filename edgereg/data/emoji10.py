"""emoji-10: 1,243 emoji in ten classes, each drawn by two vendors, 32x32 RGB; embedded.

A model trained on one vendor's drawings and tested on the other's meets what every deployed model
meets: the same things, seen otherwise. The images were made by recipes/make_emoji10.py; licences in
NOTICE.
"""

from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from deploy.runtime.decode import encode_png
from edgereg.errors import DataError, nearest

__all__ = ["SPLITS", "VENDORS", "Emoji10"]

VENDORS = ("twitter", "google", "both")
SPLITS = ("train", "test")


class Emoji10:
    """One vendor's drawings, or both, of the training or the held-out glyphs.

    A glyph is held out for both vendors or for none, so no test image has been seen in another
    hand.

    Args:
        vendor: One of VENDORS.
        split: One of SPLITS; "test" is the held-out fifth of each class.

    Raises:
        DataError: Unknown vendor or split.
    """

    shards = None  # all lie in memory: any order is as quick

    def __init__(self, *, vendor: str, split: str) -> None:
        for word, known, what in ((vendor, VENDORS, "vendor"), (split, SPLITS, "split")):
            if word not in known:
                raise DataError(
                    f"the {what} of emoji-10 is one of {', '.join(known)}",
                    found=f"'{word}'",
                    remedy=nearest(word, known),
                )
        archive = _archive()
        chosen = archive["held_out"] == (split == "test")
        vendors = VENDORS[:2] if vendor == "both" else (vendor,)
        self.name = f"emoji-10:{vendor}:{split}"
        self.class_names: tuple[str, ...] = tuple(str(name) for name in archive["class_names"])
        self._pixels: NDArray[np.uint8] = np.concatenate([archive[v][chosen] for v in vendors])
        self.labels: NDArray[np.int64] | None = np.tile(archive["labels"][chosen], len(vendors))

    def __len__(self) -> int:
        return len(self._pixels)

    def load(self, index: int) -> NDArray[np.uint8]:
        """Return one image, (32, 32, 3) RGB."""
        image: NDArray[np.uint8] = self._pixels[index]
        return image

    def encoded(self, index: int) -> bytes:
        """Return one image as PNG."""
        return encode_png(self._pixels[index])

    def content(self, index: int) -> bytes:
        """Return one image as PNG, over which earlier checkpoints took their digest."""
        return self.encoded(index)

    def image_name(self, index: int) -> str:
        """Return the index, as no image has a name of its own."""
        return str(index)


@cache
def _archive() -> dict[str, NDArray[np.generic]]:
    with np.load(Path(__file__).parent / "emoji10.npz", allow_pickle=False) as archive:
        return {key: archive[key] for key in archive.files}
