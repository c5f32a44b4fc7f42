"""Whether features vary: an encoder that maps all images to one vector, or to a line, learned less.

Both figures need no label. Of N much larger than D vectors drawn from a Gaussian, `relative_std` is
about 1 and `effective_rank` about D.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgereg.errors import DataError
from edgereg.evaluation.neighbours import unit_rows

__all__ = ["Spread", "spread"]


@dataclass(frozen=True)
class Spread:
    """How far features spread.

    Args:
        std: Standard deviation of each dimension of the vectors of length 1, averaged over the
            dimensions; 0 where all point the same way.
        relative_std: The same in units of 1/sqrt(D), that of random directions; in [0, 1].
        effective_rank: Over how many dimensions they spread; 1 to D, 0 where all are the same.
    """

    std: float
    relative_std: float
    effective_rank: float


def spread(features: NDArray[np.float32]) -> Spread:
    """Measure how far features spread.

    Args:
        features: (N, D) float32; N is 2 or more.

    Raises:
        DataError: There are fewer than two vectors, or they are not finite.
    """
    unit = unit_rows(features).double().numpy()
    if len(unit) < 2:
        raise DataError(
            "a spread is that of two images or more", found=f"{len(unit)}", remedy="give more"
        )
    std = float(unit.std(axis=0).mean())
    return Spread(std, std * unit.shape[1] ** 0.5, _effective_rank(features.astype(np.float64)))


def _effective_rank(features: NDArray[np.float64]) -> float:
    """Return exp(-sum p log p), p the centred matrix's singular values over their sum.

    Source: Roy and Vetterli, The effective rank, EUSIPCO 2007, definition 1.
    """
    centred = features - features.mean(axis=0)
    # the eigenvalues of the smaller Gram matrix are the singular values' squares
    gram = centred.T @ centred if centred.shape[0] > centred.shape[1] else centred @ centred.T
    singular = np.sqrt(np.linalg.eigvalsh(gram).clip(min=0))
    # what rounding to float32 alone would leave of vectors that are all the same
    singular = singular[singular > np.finfo(np.float32).eps * np.linalg.norm(features)]
    if not len(singular):
        return 0.0
    p = singular / singular.sum()
    return float(np.exp(-(p * np.log(p)).sum()))
