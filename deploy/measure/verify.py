"""Does a bundle compute here what it computed where it was exported? Judged stage by stage.

A wrong answer at the end says little. The stage that fails says where to look: decoding and
pre-processing, the model, or both together.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploy.bundle.index import read_index
from deploy.bundle.read import Bundle
from deploy.bundle.tolerance import AnyTolerance, EmbeddingTolerance, Tolerance
from deploy.measure.compare import Comparison, compare
from deploy.runtime.decode import decode
from deploy.runtime.preprocess import preprocess
from deploy.runtime.runner import Runner

__all__ = [
    "StageReport",
    "VerifyReport",
    "decode_tolerance",
    "end_to_end_tolerance",
    "golden_images",
    "verify",
]

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_LOSSY_REASON = "JPEG and WebP decoders differ by a few grey levels between library versions"


@dataclass(frozen=True)
class StageReport:
    """One stage: what was compared, how it went, and what was allowed."""

    name: str
    compared: str
    comparison: Comparison
    tolerance: AnyTolerance


@dataclass(frozen=True)
class VerifyReport:
    """Every stage of one variant on one backend."""

    bundle: str
    backend: str
    precision: str
    stages: tuple[StageReport, ...]

    @property
    def passed(self) -> bool:
        """Whether every stage did."""
        return all(stage.comparison.passed for stage in self.stages)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        stages = [
            {
                "name": stage.name,
                "compared": stage.compared,
                **stage.comparison.to_json(),
                "tolerance": dataclasses.asdict(stage.tolerance),
            }
            for stage in self.stages
        ]
        return {
            "bundle": self.bundle,
            "backend": self.backend,
            "precision": self.precision,
            "passed": self.passed,
            "stages": stages,
        }


def verify(
    bundle: Bundle, runner: Runner, *, on_progress: Callable[[str], None] | None = None
) -> VerifyReport:
    """Run the golden images through every stage and compare with what the bundle holds.

    Images go through one at a time, as they do in `edgereg infer`.

    Args:
        bundle: The opened bundle.
        runner: One of its variants, loaded.
        on_progress: Told how far it is.

    Raises:
        BadInputError: Golden data that cannot be compared: a shape, or a constant reference; or an
            index of reference images that is none.
    """
    golden, spec = bundle.manifest.golden, bundle.manifest.preprocessing
    index = read_index(bundle)
    references = None if index is None else index.embeddings
    stored = f"stored {'logits' if index is None else 'embeddings'}"
    encoded = golden_images(bundle)
    stored_inputs, reference = bundle.array(golden.preprocessed), bundle.array(golden.outputs)
    own_inputs, from_stored, from_images = [], [], []
    for i, (name, data) in enumerate(zip(golden.images, encoded, strict=True)):
        own_inputs.append(preprocess([decode(data, name=name)], spec))
        from_stored.append(runner(stored_inputs[i : i + 1]))
        from_images.append(runner(own_inputs[-1]))
        if on_progress is not None:
            on_progress(f"{i + 1} of {golden.count} images")
    allowed = bundle.manifest.variants[runner.precision].tolerance
    return VerifyReport(
        bundle=bundle.path.name,
        backend=runner.name,
        precision=runner.precision,
        stages=(
            _judge(
                "decode+preprocess",
                "images -> stored tensor",
                own_inputs,
                stored_inputs,
                decode_tolerance(encoded),
            ),
            _judge(
                "inference",
                f"stored tensor -> {stored}",
                from_stored,
                reference,
                allowed,
                references,
            ),
            _judge(
                "end to end",
                f"images -> {stored}",
                from_images,
                reference,
                end_to_end_tolerance(allowed, encoded),
                references,
            ),
        ),
    )


def golden_images(bundle: Bundle) -> list[bytes]:
    """The encoded golden images, in order."""
    return [bundle.read(name) for name in bundle.manifest.golden.images]


def decode_tolerance(encoded: Sequence[bytes]) -> Tolerance:
    """What decoded and pre-processed images may differ by: nothing, unless coded with loss."""
    if _are_exact(encoded):
        return Tolerance(0.0, 1.0, "PNG decodes exactly, and resizing is integer arithmetic")
    return Tolerance(0.03, 1.0, _LOSSY_REASON)


def end_to_end_tolerance(allowed: AnyTolerance, encoded: Sequence[bytes]) -> AnyTolerance:
    """The variant's own tolerance, and a wider one for outputs where the input may differ."""
    if _are_exact(encoded):
        return allowed
    error, reason = max(allowed.max_scaled_error, 0.1), f"{allowed.reason}; {_LOSSY_REASON}"
    if isinstance(allowed, Tolerance):
        return Tolerance(error, allowed.min_top1_agreement, reason)
    return EmbeddingTolerance(
        error, min(allowed.min_cosine, 0.99), min(allowed.min_neighbour_agreement, 0.9), reason
    )


def _are_exact(encoded: Sequence[bytes]) -> bool:
    return all(data.startswith(_PNG_SIGNATURE) for data in encoded)


def _judge(
    name: str,
    compared: str,
    rows: list[NDArray[np.float32]],
    reference: NDArray[Any],
    tolerance: AnyTolerance,
    references: NDArray[np.float32] | None = None,
) -> StageReport:
    comparison = compare(np.concatenate(rows), reference, tolerance, index=references)
    return StageReport(name, compared, comparison, tolerance)
