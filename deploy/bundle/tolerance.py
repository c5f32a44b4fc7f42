"""How far a variant's outputs may be from the reference's, for each task."""

from dataclasses import dataclass

__all__ = ["AnyTolerance", "EmbeddingTolerance", "Tolerance"]


@dataclass(frozen=True)
class Tolerance:
    """How far a variant's outputs may be from the reference's, and why this far.

    Attributes:
        max_scaled_error: Largest absolute error over the reference's range.
        min_top1_agreement: Smallest share of images with the same top-1 class, in [0, 1].
        reason: Where the numbers come from.
    """

    max_scaled_error: float
    min_top1_agreement: float
    reason: str


@dataclass(frozen=True)
class EmbeddingTolerance:
    """How far a variant's embeddings may be from the reference's, and why this far.

    Attributes:
        max_scaled_error: Largest absolute error over the reference's range.
        min_cosine: Smallest cosine similarity of an image's embedding to the reference's.
        min_neighbour_agreement: Smallest share of images with the same nearest reference image.
        reason: Where the numbers come from.
    """

    max_scaled_error: float
    min_cosine: float
    min_neighbour_agreement: float
    reason: str


AnyTolerance = Tolerance | EmbeddingTolerance
