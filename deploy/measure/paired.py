"""How much worse does one model answer than another, on the same labelled images?

Two accuracies on the same images are not independent: what tells is the images that one model gets
right and the other wrong. With p the share that the variant loses and q the share that it gains,
the net loss is p - q. Its interval must hold for few images and for none that differ, so it is not
conditioned on how many do (at none, such an interval is a point).

    p in [p0, p1], q in [q0, q1]  ->  p - q in [p0 - q1, p1 - q0]

Each of the four ends is Clopper and Pearson's for a quarter of the allowed error, so that the
interval misses with that error at most, whatever p and q are (Bonferroni).

Sources: Clopper and Pearson 1934, doi:10.1093/biomet/26.4.404; McNemar 1947,
doi:10.1007/BF02295996; Guo et al., "On calibration of modern neural networks", arXiv:1706.04599.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploy.errors import BadInputError

__all__ = ["PairedAccuracy", "compare_answers", "count_needed"]

_BINS = 15  # of the calibration error
_HALVINGS = 60  # of [0, 1]: below the spacing of float64


@dataclass(frozen=True)
class PairedAccuracy:
    """A variant's answers beside the reference's; shares in [0, 1].

    Attributes:
        count: How many images.
        reference_top1: The reference's accuracy.
        top1: The variant's.
        lost: Images that the reference got right and the variant did not.
        gained: The reverse.
        flips: Images on which the two answer differently, right or wrong.
        ties: Those of the flips at which the reference itself hardly preferred its class.
        net_loss: (lost - gained) / count.
        interval: Of the net loss.
        confidence: That the interval holds, at least.
        p_value: McNemar's exact two-sided test that neither model is better.
        reference_ece: The reference's expected calibration error, 15 equal bins.
        ece: The variant's.
    """

    count: int
    reference_top1: float
    top1: float
    lost: int
    gained: int
    flips: int
    ties: int
    net_loss: float
    interval: tuple[float, float]
    confidence: float
    p_value: float
    reference_ece: float
    ece: float

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return dataclasses.asdict(self) | {"interval": list(self.interval)}


def compare_answers(
    logits: NDArray[np.floating[Any]],
    reference: NDArray[np.floating[Any]],
    labels: NDArray[np.integer[Any]],
    *,
    confidence: float = 0.95,
    tie: float = 1e-4,
) -> PairedAccuracy:
    """Compare the top-1 answers of two models.

    Args:
        logits: (N, classes) of the variant; a row that is not finite is a wrong answer.
        reference: (N, classes), finite.
        labels: (N,) classes.
        confidence: Of the interval, in (0, 1).
        tie: A flip is a tie if the reference's logits of the two classes differ by at most this
            share of the range of all its logits: less than float32 rounding may move them.

    Raises:
        BadInputError: The shapes do not belong together, or the reference is not finite.
    """
    if logits.shape != reference.shape or reference.ndim != 2 or labels.shape != logits.shape[:1]:
        raise BadInputError(
            "two models are compared on the same images, each with a label",
            found=f"logits {logits.shape} and {reference.shape}, labels {labels.shape}",
            remedy="give both models the same images in the same order",
        )
    if not len(labels) or not np.isfinite(reference).all():
        raise BadInputError(
            "the reference answers at least one image, with finite logits",
            found="no images" if not len(labels) else "logits that are not finite",
            remedy="check the model and the images",
        )
    count, rows = len(labels), np.arange(len(labels))
    theirs = reference.argmax(axis=1)
    is_finite = np.isfinite(logits).all(axis=1)
    ours = np.where(is_finite, np.where(np.isfinite(logits), logits, 0).argmax(axis=1), -1)
    is_flip = ours != theirs
    margin = reference[rows, theirs] - reference[rows, np.maximum(ours, 0)]
    is_tie = is_flip & is_finite & (margin <= tie * np.ptp(reference))
    lost = int(np.sum((theirs == labels) & (ours != labels)))
    gained = int(np.sum((theirs != labels) & (ours == labels)))
    tail = (1 - confidence) / 4
    (p0, p1), (q0, q1) = _interval(lost, count, tail), _interval(gained, count, tail)
    return PairedAccuracy(
        count=count,
        reference_top1=float(np.mean(theirs == labels)),
        top1=float(np.mean(ours == labels)),
        lost=lost,
        gained=gained,
        flips=int(is_flip.sum()),
        ties=int(is_tie.sum()),
        net_loss=(lost - gained) / count,
        interval=(p0 - q1, p1 - q0),
        confidence=confidence,
        p_value=min(1.0, 2 * _at_most(min(lost, gained), lost + gained, 0.5)),
        reference_ece=_calibration_error(reference, labels),
        ece=_calibration_error(logits, labels) if is_finite.all() else 1.0,
    )


def count_needed(limit: float, *, confidence: float = 0.95) -> int:
    """Return how many images certify a net loss of at most `limit` if not one is lost or gained."""
    return math.ceil(math.log((1 - confidence) / 4) / math.log1p(-limit))


def _interval(hits: int, count: int, tail: float) -> tuple[float, float]:
    """Return Clopper and Pearson's bounds of a share, each missed with probability `tail`."""
    upper = 1.0 if hits == count else _share_at_which(hits, count, tail)
    lower = 0.0 if hits == 0 else 1 - _share_at_which(count - hits, count, tail)
    return lower, upper


def _share_at_which(hits: int, count: int, tail: float) -> float:
    """Return the share at which so few hits or fewer have the probability `tail`."""
    low, high = 0.0, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if _at_most(hits, count, middle) > tail:
            low = middle
        else:
            high = middle
    return high


def _at_most(hits: int, count: int, share: float) -> float:
    """Return the probability of at most so many hits of a share in (0, 1), by binomial sums."""
    i = np.arange(1, hits + 1)
    choices = np.concatenate([[0.0], np.cumsum(np.log(count - i + 1) - np.log(i))])
    k = np.arange(hits + 1)
    logs = choices + k * math.log(share) + (count - k) * math.log1p(-share)
    return min(1.0, float(np.exp(logs).sum()))


def _calibration_error(
    logits: NDArray[np.floating[Any]], labels: NDArray[np.integer[Any]]
) -> float:
    """Return the mean distance of confidence and accuracy over bins of confidence."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    odds = np.exp(shifted)
    confidence = 1 / odds.sum(axis=1)  # of the largest, whose odds are 1
    is_right = logits.argmax(axis=1) == labels
    bins = np.minimum((confidence * _BINS).astype(int), _BINS - 1)
    gaps = np.bincount(bins, confidence - is_right, minlength=_BINS)
    return float(np.abs(gaps).sum() / len(labels))
