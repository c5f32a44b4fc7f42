"""Weighted k-nearest-neighbour classification of frozen features.

Each of the k neighbours votes for its class with the weight exp(s / t), s its cosine similarity and
t the temperature (Wu et al., 1805.01978, section 3.4).
"""

import numpy as np
import torch
from numpy.typing import NDArray

from edgereg.evaluation.neighbours import nearest

__all__ = ["knn_predict", "leave_one_out", "usual_k"]

_LARGE = 10_000  # images from which 200 neighbours are usual


def usual_k(count: int) -> int:
    """Return how many neighbours to ask among `count` images: 200, 20 among fewer than 10,000."""
    return min(200 if count >= _LARGE else 20, count)


def knn_predict(
    features: NDArray[np.float32],
    bank: NDArray[np.float32],
    labels: NDArray[np.int64],
    *,
    num_classes: int,
    k: int | None = None,
    temperature: float = 0.1,
) -> NDArray[np.int64]:
    """Return the class (N,) that each vector's neighbours vote for; of equals the first.

    Args:
        features: (N, D) float32, of any length each.
        bank: (M, D) float32.
        labels: (M,) in 0..C-1, of the bank.
        num_classes: C.
        k: Neighbours, 1 to M; None is `usual_k(M)`.
        temperature: Above 0; the lower, the more the nearest count.

    Raises:
        DataError: k is out of its range, or the features are not finite.
    """
    k = usual_k(len(bank)) if k is None else k
    cosines, indices = nearest(features, bank, k=k)
    return _vote(cosines, labels[indices], num_classes, temperature)


def leave_one_out(
    features: NDArray[np.float32],
    labels: NDArray[np.int64],
    *,
    num_classes: int,
    k: int | None = None,
    temperature: float = 0.1,
) -> float:
    """Return the share of vectors whose neighbours among the others vote for the right class.

    Args:
        features: (N, D) float32; N is 2 or more.
        labels: (N,) in 0..C-1.
        num_classes: C.
        k: Neighbours, 1 to N - 1; None is `usual_k(N - 1)`.
        temperature: Above 0.

    Raises:
        DataError: k is out of its range, or the features are not finite.
    """
    k = usual_k(len(features) - 1) if k is None else k
    cosines, indices = nearest(features, None, k=k)
    return float((_vote(cosines, labels[indices], num_classes, temperature) == labels).mean())


def _vote(
    cosines: NDArray[np.float32], classes: NDArray[np.int64], num_classes: int, temperature: float
) -> NDArray[np.int64]:
    # less the row's largest: the votes' order is the same, and exp cannot overflow
    weights = torch.from_numpy(np.exp((cosines - cosines[:, :1]) / temperature))
    votes = torch.zeros(len(cosines), num_classes)
    return votes.scatter_add_(1, torch.from_numpy(classes), weights).argmax(dim=1).numpy()
