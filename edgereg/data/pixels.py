"""The images of a data set, fitted to the model's input size and served in batches."""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from deploy.runtime.preprocess import Preprocessing, fit
from edgereg.data.images import Images

__all__ = ["CACHE_LIMIT_BYTES", "Pixels"]

CACHE_LIMIT_BYTES = 4 * 2**30


class Pixels:
    """Fitted images: decoded once and kept while they fit into memory, else decoded at each use.

    They are fitted by the device's own resize, so a model is trained on what it will be served.

    Args:
        images: The data set.
        spec: The input size and the resize.
        progress: Called with the number of images decoded so far.
        cache_limit_bytes: Above this size nothing is kept.

    Raises:
        BadInputError: An image is damaged; found before the first step where the images are kept.
    """

    def __init__(
        self,
        images: Images,
        spec: Preprocessing,
        *,
        progress: Callable[[int], None] | None = None,
        cache_limit_bytes: int = CACHE_LIMIT_BYTES,
    ) -> None:
        self._images, self._spec = images, spec
        self._kept: NDArray[np.uint8] | None = None
        shape = (len(images), spec.height, spec.width, 3)
        if np.prod(shape, dtype=np.int64) <= cache_limit_bytes:
            kept = np.empty(shape, np.uint8)
            for index in range(len(images)):
                kept[index] = fit(images.load(index), spec)
                if progress is not None:
                    progress(index + 1)
            self._kept = kept

    def __len__(self) -> int:
        return len(self._images)

    def fitted(self, indices: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Return (B, H, W, 3) uint8."""
        if self._kept is not None:
            return self._kept[indices]
        return np.stack([fit(self._images.load(int(index)), self._spec) for index in indices])

    def batch(self, indices: NDArray[np.int64]) -> torch.Tensor:
        """Return (B, 3, H, W) float32 in [0, 1]."""
        pixels = torch.from_numpy(self.fitted(indices)).permute(0, 3, 1, 2)
        return pixels.float() / 255
