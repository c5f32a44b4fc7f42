"""The one comparator: tests, export and the device all judge outputs with it.

Absolute and relative tolerances do not carry over between models: logits near zero make any
relative error large, and a network's scale is arbitrary. So the error is scaled to the reference's
range, and the decision that the task is about, the top-1 class, is judged beside it.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploy.bundle.manifest import Tolerance
from deploy.errors import BadInputError

__all__ = ["Comparison", "compare"]


@dataclass(frozen=True)
class Comparison:
    """How far outputs are from a reference, and whether a tolerance allows it.

    Attributes:
        max_abs_error: max |a - r|; infinite if a value is not finite.
        max_scaled_error: max |a - r| / (max r - min r).
        sqnr_db: Signal to quantization noise, 10 log10(sum r² / sum (a - r)²); infinite if equal.
        top1_agreement: Share of rows with the same largest entry; None unless (N, classes).
        count: How many rows were compared.
        finite: Whether every value on both sides is finite.
        passed: Whether the tolerance holds.
        reasons: Why not, one sentence for each broken limit.
    """

    max_abs_error: float
    max_scaled_error: float
    sqnr_db: float
    top1_agreement: float | None
    count: int
    finite: bool
    passed: bool
    reasons: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; a number that is not finite becomes None, as JSON has none."""
        return {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in dataclasses.asdict(self).items()
        }


def compare(actual: NDArray[Any], reference: NDArray[Any], tolerance: Tolerance) -> Comparison:
    """Judge outputs against a reference.

    Args:
        actual: (N, ...) numbers; (N, classes) logits are judged by their top-1 class too.
        reference: The same shape.
        tolerance: What is allowed.

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
    finite = bool(np.isfinite(actual).all() and np.isfinite(reference).all())
    if not finite:
        bad = int((~np.isfinite(actual)).sum()), int((~np.isfinite(reference)).sum())
        reason = f"{bad[0]} outputs and {bad[1]} reference values are not finite"
        agreement = 0.0 if reference.ndim == 2 else None
        return Comparison(
            math.inf, math.inf, -math.inf, agreement, len(reference), False, False, (reason,)
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
    agreement = float((a.argmax(axis=1) == r.argmax(axis=1)).mean()) if r.ndim == 2 else None
    reasons = []
    if scaled_error > tolerance.max_scaled_error:
        reasons.append(f"scaled error {scaled_error:.3g} > {tolerance.max_scaled_error:.3g}")
    if agreement is not None and agreement < tolerance.min_top1_agreement:
        reasons.append(f"top-1 agreement {agreement:.4f} < {tolerance.min_top1_agreement:.4f}")
    return Comparison(
        max_abs_error=max_abs_error,
        max_scaled_error=scaled_error,
        sqnr_db=_decibel(float(np.sum(r**2)), float(np.sum((a - r) ** 2))),
        top1_agreement=agreement,
        count=len(r),
        finite=True,
        passed=not reasons,
        reasons=tuple(reasons),
    )


def _decibel(signal: float, noise: float) -> float:
    return 10 * math.log10(signal / noise) if noise > 0 else math.inf
