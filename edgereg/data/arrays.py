"""Images that lie in memory as one array: those of idx and npz files."""

import numpy as np
from numpy.typing import NDArray

from deploy.runtime.decode import encode_png

__all__ = ["ArrayImages"]


class ArrayImages:
    """Images of one size.

    Args:
        pixels: (N, H, W) grey or (N, H, W, 3) RGB, uint8.
        name: What the user called them.
        labels: (N,) in 0..C-1, or None.
        class_names: C of them; empty without labels.
    """

    shards = None  # all lie in memory: any order is as quick

    def __init__(
        self,
        pixels: NDArray[np.uint8],
        *,
        name: str,
        labels: NDArray[np.int64] | None,
        class_names: tuple[str, ...],
    ) -> None:
        self._pixels = pixels
        self.name = name
        self.labels = labels
        self.class_names = class_names

    def __len__(self) -> int:
        return len(self._pixels)

    def load(self, index: int) -> NDArray[np.uint8]:
        """Return one image, (H, W, 3) RGB; a grey one thrice."""
        image: NDArray[np.uint8] = self._pixels[index]
        return image if image.ndim == 3 else np.repeat(image[:, :, np.newaxis], 3, axis=2)

    def encoded(self, index: int) -> bytes:
        """Return one image as PNG."""
        return encode_png(self.load(index))

    def content(self, index: int) -> bytes:
        """Return size and pixels, as a PGM or PPM file: no two compressors agree on a PNG."""
        image: NDArray[np.uint8] = self._pixels[index]
        kind = "P5" if image.ndim == 2 else "P6"
        header = f"{kind}\n{image.shape[1]} {image.shape[0]}\n255\n"
        return header.encode() + image.tobytes()

    def image_name(self, index: int) -> str:
        """Return the index, as no image has a name of its own."""
        return str(index)
