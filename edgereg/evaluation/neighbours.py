"""The nearest neighbours of feature vectors by cosine, in chunks that fit into memory."""

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from edgereg.errors import DataError

__all__ = ["nearest", "unit_rows"]

_CHUNK_CELLS = 2**24  # similarities held at once: 64 MiB


def unit_rows(features: NDArray[np.float32]) -> Tensor:
    """Return the vectors, each of length 1; one that is zero stays so.

    Args:
        features: (N, D) float32; N and D 1 or more.

    Raises:
        DataError: They are no matrix, none, or not all finite.
    """
    if features.ndim != 2 or not features.size or not np.isfinite(features).all():
        bad = "NaN or infinity" if features.ndim == 2 and features.size else "another shape"
        raise DataError(
            "features are finite numbers, a vector for each image",
            found=f"{bad} in features of shape {features.shape}",
            remedy="look at the encoder's training log: its loss has diverged, or nothing was read",
        )
    return F.normalize(torch.from_numpy(features).float(), dim=1)


@torch.inference_mode()
def nearest(
    features: NDArray[np.float32], bank: NDArray[np.float32] | None, *, k: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return each vector's k nearest ones in a bank.

    Args:
        features: (N, D) float32.
        bank: (M, D) float32; None is `features` itself, where none is its own neighbour.
        k: 1 to M, or to N - 1 without a bank.

    Returns:
        (N, k) cosines in [-1, 1], falling along a row, and (N, k) indices into the bank.

    Raises:
        DataError: k is out of its range, or the vectors do not go together.
    """
    queries = unit_rows(features)
    others = queries if bank is None else unit_rows(bank)
    available = len(others) - (bank is None)
    if queries.shape[1] != others.shape[1]:
        raise DataError(
            "features are compared with those of the same encoder",
            found=f"vectors of {queries.shape[1]} and of {others.shape[1]} numbers",
            remedy="compute both with one checkpoint",
        )
    if not 1 <= k <= available:
        raise DataError(
            "there are as many images to compare with as neighbours are asked for",
            found=f"k: {k}, and {available} images",
            remedy="ask for fewer, or give more images",
        )
    rows = max(1, _CHUNK_CELLS // len(others))
    cosines, indices = [], []
    for start in range(0, len(queries), rows):
        similarity = queries[start : start + rows] @ others.T
        if bank is None:
            at = torch.arange(len(similarity))
            similarity[at, start + at] = -torch.inf
        top = similarity.topk(k, dim=1)
        cosines.append(top.values)
        indices.append(top.indices)
    return torch.cat(cosines).numpy(), torch.cat(indices).numpy()
