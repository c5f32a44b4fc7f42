"""The images of each batch, loaded ahead of their use."""

from collections.abc import Generator, Iterable

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from edgereg.data.pixels import Pixels, as_batch
from edgereg.data.workers import in_order

__all__ = ["feed"]


def feed(
    pixels: Pixels, batches: Iterable[NDArray[np.int64]], *, workers: int
) -> Generator[tuple[NDArray[np.int64], Tensor], None, None]:
    """Yield the indices and the images of each batch, in order; the same for any `workers`.

    Args:
        pixels: The images. Where they are kept in memory no worker is started: to hand a batch over
            from another process takes longer than to copy it here.
        batches: Index arrays (B,).
        workers: Processes that decode; 0 decodes in this one.

    Yields:
        The index array, and its images (B, 3, H, W) uint8.

    Raises:
        BadInputError: An image is damaged; it is named.
    """
    loaded = in_order(
        lambda indices: (indices, pixels.fitted(indices)),
        batches,
        workers=0 if pixels.is_kept else workers,
    )
    for indices, images in loaded:
        yield indices, as_batch(images)
