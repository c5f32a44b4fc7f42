"""What was measured of an encoder, as a table and as JSON."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgereg.evaluation.collapse import Spread
from edgereg.evaluation.retrieval import RetrievalResult

__all__ = ["EncoderEvaluation", "Measurement"]


@dataclass(frozen=True)
class Measurement:
    """How often one way of reading the features is right on the test images.

    Args:
        name: Such as "knn" or "finetune 10%".
        labels: Training images whose labels were used.
        top1: Share of the test images, in [0, 1].
        per_class: The share for each class; NaN where it has no test image.
        settings: What was chosen, by name.
    """

    name: str
    labels: int
    top1: float
    per_class: tuple[float, ...]
    settings: Mapping[str, float]


@dataclass(frozen=True)
class EncoderEvaluation:
    """What was measured.

    Args:
        path: The checkpoint.
        kind: "encoder", or "classifier", of which the backbone alone was looked at.
        data: The test data's name.
        train: The training data's name.
        class_names: C of them.
        counts: Test images of each class.
        feature_dim: Width D of a feature vector.
        seen: Test images that are training images, too, byte for byte.
        spread: Of the training images' features.
        measurements: In the order in which they were taken.
        retrieval: Of the picture, if one was drawn.
    """

    path: Path
    kind: str
    data: str
    train: str
    class_names: tuple[str, ...]
    counts: tuple[int, ...]
    feature_dim: int
    seen: int
    spread: Spread
    measurements: tuple[Measurement, ...]
    retrieval: RetrievalResult | None

    def to_json(self) -> dict[str, Any]:
        """Return all figures as JSON values."""
        # JSON has no NaN: a class without an image has no accuracy
        measured = [
            {
                **dataclasses.asdict(m),
                "count": sum(self.counts),
                "per_class": {
                    name: None if share != share else share
                    for name, share in zip(self.class_names, m.per_class, strict=True)
                },
            }
            for m in self.measurements
        ]
        return {
            "checkpoint": str(self.path),
            "kind": self.kind,
            "data": self.data,
            "train": self.train,
            "counts": dict(zip(self.class_names, self.counts, strict=True)),
            "feature_dim": self.feature_dim,
            "seen": self.seen,
            "spread": dataclasses.asdict(self.spread),
            "measurements": measured,
            "retrieval": None if self.retrieval is None else self.retrieval.to_json(),
        }

    def to_text(self) -> str:
        """Return a line for each measurement, and one for each class."""
        count, wide = sum(self.counts), max(map(len, (*self.class_names, "finetune 100%")))
        lines = [
            f"{self.path}: {self.kind}, {self.feature_dim} features an image",
            f"spread {self.spread.relative_std:.2f} of random directions' (1), "
            f"effective rank {self.spread.effective_rank:.1f} of {self.feature_dim}",
        ]
        if self.seen:
            lines.append(f"{self.seen} of {count} test images are training images, too")
        if not self.measurements:
            return "\n".join(lines)
        lines.append(f"{'':{wide}}  labels       n   top-1")
        for m in self.measurements:
            chosen = ", ".join(f"{key} {value:.3g}" for key, value in m.settings.items())
            lines.append(f"{m.name:{wide}} {m.labels:7} {count:7}  {m.top1:6.1%}  {chosen}")
        names = [f"{m.name:>6}" for m in self.measurements]
        lines.append(f"{'':{wide}}               n  {'  '.join(names)}")
        for row, (name, n) in enumerate(zip(self.class_names, self.counts, strict=True)):
            cells = [
                f"{'no image' if not n else f'{m.per_class[row]:.1%}':>{len(title)}}"
                for m, title in zip(self.measurements, names, strict=True)
            ]
            lines.append(f"{name:{wide}}         {n:7}  {'  '.join(cells)}")
        return "\n".join(lines)
