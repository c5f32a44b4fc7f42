"""The images of a data set, fitted to the model's input size and served in batches."""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from deploy.runtime.preprocess import Preprocessing, fit
from edgereg.data.images import Images
from edgereg.data.workers import in_order

__all__ = ["CACHE_LIMIT_BYTES", "Pixels", "as_batch"]

CACHE_LIMIT_BYTES = 4 * 2**30

_CHUNK = 32  # images decoded between two reports of progress, and handed over by a worker at once


class Pixels:
    """Fitted images: decoded once and kept while they fit into memory, else decoded at each use.

    They are fitted by the device's own resize, so a model is trained on what it will be served.

    Args:
        images: The data set.
        spec: The input size and the resize.
        workers: Processes that decode what is kept; 0 decodes in this one.
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
        workers: int = 0,
        progress: Callable[[int], None] | None = None,
        cache_limit_bytes: int = CACHE_LIMIT_BYTES,
    ) -> None:
        self._images, self._spec = images, spec
        self._kept: NDArray[np.uint8] | None = None
        shape = (len(images), spec.height, spec.width, 3)
        if np.prod(shape, dtype=np.int64) <= cache_limit_bytes:
            kept, done = np.empty(shape, np.uint8), 0
            chunks = (
                np.arange(at, min(at + _CHUNK, len(images))) for at in range(0, len(images), _CHUNK)
            )
            for fitted in in_order(self.fitted, chunks, workers=workers):
                kept[done : done + len(fitted)] = fitted
                done += len(fitted)
                if progress is not None:
                    progress(done)
            self._kept = kept

    def __len__(self) -> int:
        return len(self._images)

    @property
    def is_kept(self) -> bool:
        """Return whether the images lie decoded in memory."""
        return self._kept is not None

    def fitted(self, indices: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Return (B, H, W, 3) uint8.

        Raises:
            BadInputError: An image is damaged; it is named.
        """
        if self._kept is not None:
            return self._kept[indices]
        # not stack: `fit` may return columns first, and the layout decides how sums are rounded
        images = np.empty((len(indices), self._spec.height, self._spec.width, 3), np.uint8)
        for place, index in zip(images, indices, strict=True):
            place[:] = fit(self._images.load(int(index)), self._spec)
        return images

    def batch(self, indices: NDArray[np.int64]) -> torch.Tensor:
        """Return (B, 3, H, W) uint8."""
        return as_batch(self.fitted(indices))


def as_batch(images: NDArray[np.uint8]) -> torch.Tensor:
    """Return (B, 3, H, W) uint8 from (B, H, W, 3), without a copy: the memory stays as it lies."""
    return torch.from_numpy(images).permute(0, 3, 1, 2)
