"""From logits to an answer."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from deploy.errors import CheckFailedError

__all__ = ["Guess", "check_finite", "top_k"]

Guess = tuple[str, float]
"""A label and its probability, or its share of the votes."""


def top_k(logits: NDArray[np.float32], labels: Sequence[str], *, k: int) -> tuple[Guess, ...]:
    """The most probable classes of one image, best first.

    Args:
        logits: (classes,).
        labels: One for each class.
        k: How many; all of them if there are fewer.

    Raises:
        CheckFailedError: A logit is not finite.
    """
    check_finite(logits)
    shifted = np.exp(logits.astype(np.float64) - logits.max())
    probabilities = shifted / shifted.sum()
    best = np.argsort(-probabilities, kind="stable")[:k]
    return tuple((labels[i], float(probabilities[i])) for i in best)


def check_finite(outputs: NDArray[np.float32]) -> None:
    """Refuse outputs from which no answer follows.

    Raises:
        CheckFailedError: One is not finite.
    """
    if not np.isfinite(outputs).all():
        raise CheckFailedError(
            "a model's outputs must be finite",
            found=f"{int((~np.isfinite(outputs)).sum())} of {outputs.size} are not",
            remedy="run `edgereg verify` on the bundle, and try --precision fp32",
        )
