"""The batches of an epoch."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

__all__ = ["epoch_batches", "steps_per_epoch"]


def steps_per_epoch(size: int, batch_size: int) -> int:
    """Return the number of batches; a data set smaller than a batch is one batch."""
    return max(1, size // batch_size)


def epoch_batches(order: NDArray[np.int64], batch_size: int) -> Iterator[NDArray[np.int64]]:
    """Yield the indices of each batch of one epoch.

    The last, incomplete batch is left out: its BatchNorm statistics would be noise. What is left
    out differs from epoch to epoch.

    Args:
        order: The indices of the data set in the order of this epoch.
        batch_size: Images a batch.
    """
    for step in range(steps_per_epoch(len(order), batch_size)):
        yield order[step * batch_size : (step + 1) * batch_size]
