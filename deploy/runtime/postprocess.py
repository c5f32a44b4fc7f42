"""From logits to an answer."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from deploy.errors import CheckFailedError

__all__ = ["Guess", "top_k"]

Guess = tuple[str, float]
"""A label and its probability."""


def top_k(logits: NDArray[np.float32], labels: Sequence[str], *, k: int) -> tuple[Guess, ...]:
    """The most probable classes of one image, best first.

    Args:
        logits: (classes,).
        labels: One for each class.
        k: How many; all of them if there are fewer.

    Raises:
        CheckFailedError: A logit is not finite.
    """
    if not np.isfinite(logits).all():
        raise CheckFailedError(
            "a model's outputs must be finite",
            found=f"{int((~np.isfinite(logits)).sum())} of {logits.size} are not",
            remedy="run `edgereg verify` on the bundle, and try --precision fp32",
        )
    shifted = np.exp(logits.astype(np.float64) - logits.max())
    probabilities = shifted / shifted.sum()
    best = np.argsort(-probabilities, kind="stable")[:k]
    return tuple((labels[i], float(probabilities[i])) for i in best)
