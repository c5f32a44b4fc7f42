"""How much worse does one model answer than another, on the same labelled images?

Two accuracies on the same images are not independent: what tells is the images that one model gets
right and the other wrong. With p the share that the variant loses and q the share that it gains,
the net loss is p - q. Its interval must hold for few images and for none that differ, so it is not
conditioned on how many do (at none, such an interval is a point).

    p in [p0, p1], q in [q0, q1]  ->  p - q in [p0 - q1, p1 - q0]

Each of the four ends is Clopper and Pearson's for a quarter of the allowed error, so that the
interval misses with that error at most, whatever p and q are and however they depend on each other
(Bonferroni). It is wider than it need be: a certificate errs on the side of asking for more images.

Sources: Clopper and Pearson 1934, doi:10.1093/biomet/26.4.404; McNemar 1947,
doi:10.1007/BF02295996; Guo et al., "On calibration of modern neural networks", arXiv:1706.04599.
"""

import dataclasses
import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploy.errors import BadInputError

__all__ = ["PairedAccuracy", "compare_answers", "count_needed"]

_BINS = 15  # of the calibration error
_HALVINGS = 52  # of [0, 1]: to the spacing of float64 below 1, which is never reached


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
        ece: The variant's; 1, the worst there is, if a logit of it is not finite.
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
        labels: (N,) classes, each from 0 to classes - 1.
        confidence: Of the interval, in (0, 1).
        tie: A flip is a tie if the reference's logits of the two classes differ by at most this
            share of the range of all its logits: less than float32 rounding may move them. The two
            are those that were answered, not its best two: a flip to a third class is no tie. The
            range is that by which the comparator scales an error, not the row's own, which is
            small where the network says little.

    Raises:
        BadInputError: The shapes do not belong together, there is no image, the reference is not
            finite, a label is no class, or the confidence is no share.
    """
    _check(logits, reference, labels, confidence)
    count, rows = len(labels), np.arange(len(labels))
    theirs = reference.argmax(axis=1)
    is_finite = np.isfinite(logits).all(axis=1)
    ours = np.where(is_finite, logits.argmax(axis=1), -1)
    is_flip = ours != theirs
    # In Python's float64: the range of float16 logits may not be a float16.
    largest_tie = tie * (float(reference.max()) - float(reference.min()))
    best, other = reference[rows, theirs], reference[rows, np.maximum(ours, 0)]
    is_tie = is_flip & is_finite & (np.subtract(best, other, dtype=np.float64) <= largest_tie)
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


def count_needed(limit: float, *, discordant: float = 0.0, confidence: float = 0.95) -> int:
    """Return about how many images it takes until the interval of no net loss ends within a limit.

    With s = discordant / 2 lost and as many gained, the interval ends at about

        z √(4 s (1 - s) / n) - log(tail) / n,    z the normal quantile of 1 - tail,

    which is set equal to -log(1 - limit) and solved for n. It is exact where nothing is lost or
    gained; elsewhere so many suffice, and a third of them does not.

    Args:
        limit: In (0, 1).
        discordant: The share of images that only one of the two models gets right.
        confidence: Of the interval.
    """
    tail, s = (1 - confidence) / 4, discordant / 2
    linear = 2 * NormalDist().inv_cdf(1 - tail) * math.sqrt(s * (1 - s))
    square, constant = -math.log(tail), -math.log1p(-limit)
    root = (linear + math.sqrt(linear**2 + 4 * square * constant)) / (2 * constant)  # of n
    return math.ceil(root**2)


def _check(
    logits: NDArray[np.floating[Any]],
    reference: NDArray[np.floating[Any]],
    labels: NDArray[np.integer[Any]],
    confidence: float,
) -> None:
    if logits.shape != reference.shape or reference.ndim != 2 or labels.shape != logits.shape[:1]:
        raise BadInputError(
            "two models are compared on the same images, each with a label",
            found=f"logits {logits.shape} and {reference.shape}, labels {labels.shape}",
            remedy="give both models the same images in the same order",
        )
    if not reference.size or not np.isfinite(reference).all():
        raise BadInputError(
            "the reference answers at least one image, with finite logits",
            found="logits that are not finite" if reference.size else "no images",
            remedy="check the model and the images",
        )
    # A label that is no class would make both models wrong, and a broken row of -1 right.
    outside = labels[(labels < 0) | (labels >= reference.shape[1])]
    if len(outside):
        raise BadInputError(
            f"a label is a class from 0 to {reference.shape[1] - 1}",
            found=f"{len(outside)} others, the first {outside[0]}",
            remedy="check that the images and the labels come from the model's data set",
        )
    if not 0 < confidence < 1:
        raise BadInputError(
            "a confidence is a share between 0 and 1",
            found=f"{confidence}",
            remedy="such as 0.95",
        )


def _interval(hits: int, count: int, tail: float) -> tuple[float, float]:
    """Return Clopper and Pearson's bounds of a share, each missed with probability `tail`."""
    lower = 0.0 if hits == 0 else _share_at_which(hits - 1, count, 1 - tail)
    upper = 1.0 if hits == count else _share_at_which(hits, count, tail)
    return lower, upper


def _share_at_which(hits: int, count: int, probability: float) -> float:
    """Return the share at which so few hits, fewer than `count`, or less have a probability."""
    low, high = 0.0, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if _at_most(hits, count, middle) > probability:
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
    """Return the mean distance of confidence and accuracy over bins (i / 15, (i + 1) / 15]."""
    odds = np.subtract(logits, logits.max(axis=1, keepdims=True), dtype=np.float64)
    np.exp(odds, out=odds)
    confidence = 1 / odds.sum(axis=1)  # of the largest, whose odds are 1
    is_right = logits.argmax(axis=1) == labels
    bins = np.ceil(confidence * _BINS).astype(int) - 1
    gaps = np.bincount(bins, confidence - is_right, minlength=_BINS)
    return float(np.abs(gaps).sum() / len(labels))
