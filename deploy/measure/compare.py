"""The one comparator: tests, export and the device all judge outputs with it.

Absolute and relative tolerances do not carry over between models: logits near zero make any
relative error large, and a network's scale is arbitrary. So the error is scaled to the reference's
range, and the decision that the task is about is judged beside it: the top-1 class, or of an
embedding its direction and the nearest reference image. A direction alone says little where an
encoder maps all images to nearly the same one; the neighbour alone, little of how near the miss is.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploy.bundle.tolerance import AnyTolerance, EmbeddingTolerance
from deploy.errors import BadInputError
from deploy.runtime.neighbours import cosines

__all__ = ["Comparison", "compare"]

_TIE = 1e-5  # of a cosine: float32 moves an embedding by about 1e-6 of its length


@dataclass(frozen=True)
class Comparison:
    """How far outputs are from a reference, and whether a tolerance allows it.

    Attributes:
        max_abs_error: max |a - r|; infinite if a value is not finite.
        max_scaled_error: max |a - r| / (max r - min r).
        sqnr_db: Signal to quantization noise, 10 log10(sum r² / sum (a - r)²); infinite if equal.
        top1_agreement: Share of rows with the same largest entry; None unless (N, classes) logits.
        count: How many rows were compared.
        finite: Whether every value on both sides is finite.
        passed: Whether the tolerance holds.
        reasons: Why not, one sentence for each broken limit.
        min_cosine: Of embeddings: the smallest cosine similarity of a row to the reference's.
        neighbour_agreement: Of embeddings: share of rows with the reference's nearest image, or
            with one that is as near but for rounding.
    """

    max_abs_error: float
    max_scaled_error: float
    sqnr_db: float
    top1_agreement: float | None
    count: int
    finite: bool
    passed: bool
    reasons: tuple[str, ...]
    min_cosine: float | None = None
    neighbour_agreement: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; a number that is not finite becomes None, as JSON has none."""
        of_embeddings = ("min_cosine", "neighbour_agreement")
        unset = of_embeddings if self.min_cosine is None else ("top1_agreement",)
        return {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in dataclasses.asdict(self).items()
            if key not in unset
        }


def compare(
    actual: NDArray[Any],
    reference: NDArray[Any],
    tolerance: AnyTolerance,
    *,
    index: NDArray[np.float32] | None = None,
) -> Comparison:
    """Judge outputs against a reference.

    Args:
        actual: (N, ...) numbers; (N, classes) logits are judged by their top-1 class too, (N, D)
            embeddings by their cosine and their nearest reference image.
        reference: The same shape.
        tolerance: What is allowed; whether these are embeddings, its kind says.
        index: For embeddings: (R, D) those of the reference images, each of length 1.

    Raises:
        BadInputError: The shapes differ, there are no values, or the reference is constant, so that
            it has no range to which an error could be scaled.
    """
    if actual.shape != reference.shape or reference.ndim < 1 or reference.size == 0:
        raise BadInputError(
            "outputs and reference must have the same shape and not be empty",
            found=f"{actual.shape} and {reference.shape}",
            remedy="compare the same images, in the same order",
        )
    are_embeddings = isinstance(tolerance, EmbeddingTolerance)
    if are_embeddings and (index is None or reference.shape[1:] != index.shape[1:]):
        raise BadInputError(
            "embeddings are compared with those of reference images, of the same width",
            found=f"{reference.shape} and {'none' if index is None else index.shape}",
            remedy="compare with the index of the same bundle",
        )
    finite = bool(np.isfinite(actual).all() and np.isfinite(reference).all())
    if not finite:
        bad = int((~np.isfinite(actual)).sum()), int((~np.isfinite(reference)).sum())
        return Comparison(
            max_abs_error=math.inf,
            max_scaled_error=math.inf,
            sqnr_db=-math.inf,
            top1_agreement=0.0 if reference.ndim == 2 and not are_embeddings else None,
            count=len(reference),
            finite=False,
            passed=False,
            reasons=(f"{bad[0]} outputs and {bad[1]} reference values are not finite",),
            min_cosine=-1.0 if are_embeddings else None,
            neighbour_agreement=0.0 if are_embeddings else None,
        )
    a, r = actual.astype(np.float64), reference.astype(np.float64)
    reference_range = float(np.ptp(r))
    if reference_range == 0:
        raise BadInputError(
            "a reference must not be constant",
            found=f"{r.size} values of {r.flat[0]}",
            remedy="check the golden images and the model: it does not tell them apart",
        )
    max_abs_error = float(np.max(np.abs(a - r)))
    scaled_error = max_abs_error / reference_range
    reasons, top1, cosine, neighbours = [], None, None, None
    if scaled_error > tolerance.max_scaled_error:
        reasons.append(f"scaled error {scaled_error:.3g} > {tolerance.max_scaled_error:.3g}")
    if isinstance(tolerance, EmbeddingTolerance):
        assert index is not None
        cosine, neighbours = _smallest_cosine(a, r), _neighbour_agreement(a, r, index)
        if cosine < tolerance.min_cosine:
            reasons.append(f"cosine similarity {cosine:.6f} < {tolerance.min_cosine:.6f}")
        if neighbours < tolerance.min_neighbour_agreement:
            limit = tolerance.min_neighbour_agreement
            reasons.append(f"neighbour agreement {neighbours:.4f} < {limit:.4f}")
    elif r.ndim == 2:
        top1 = float((a.argmax(axis=1) == r.argmax(axis=1)).mean())
        if top1 < tolerance.min_top1_agreement:
            reasons.append(f"top-1 agreement {top1:.4f} < {tolerance.min_top1_agreement:.4f}")
    return Comparison(
        max_abs_error=max_abs_error,
        max_scaled_error=scaled_error,
        sqnr_db=_decibel(float(np.sum(r**2)), float(np.sum((a - r) ** 2))),
        top1_agreement=top1,
        count=len(r),
        finite=True,
        passed=not reasons,
        reasons=tuple(reasons),
        min_cosine=cosine,
        neighbour_agreement=neighbours,
    )


def _smallest_cosine(a: NDArray[np.float64], r: NDArray[np.float64]) -> float:
    """Return the smallest cosine of two rows; a row of zeros has no direction, and counts as 0."""
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(r, axis=1)
    return float(np.min(np.sum(a * r, axis=1) / np.where(lengths > 0, lengths, 1)))


def _neighbour_agreement(
    a: NDArray[np.float64], r: NDArray[np.float64], index: NDArray[np.float32]
) -> float:
    """Return the share of rows whose nearest image is, for the reference, as near as its own."""
    theirs, chosen = cosines(r, index), cosines(a, index).argmax(axis=1)
    gaps = theirs.max(axis=1) - theirs[np.arange(len(r)), chosen]
    return float((gaps <= _TIE).mean())


def _decibel(signal: float, noise: float) -> float:
    return 10 * math.log10(signal / noise) if noise > 0 else math.inf
