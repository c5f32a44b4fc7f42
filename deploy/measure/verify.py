"""Does a bundle compute here what it computed where it was exported? Judged stage by stage.

A wrong answer at the end says little. The stage that fails says where to look: decoding and
pre-processing, the model, or both together. Without Pillow nothing is decoded: the stored tensors
are the start, and the report says what was not checked.
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
from deploy.measure.holdout import HoldoutReport, measure_holdout
from deploy.runtime.decode import decode, has_pillow, is_exact
from deploy.runtime.preprocess import preprocess
from deploy.runtime.runner import Runner

__all__ = [
    "DECODING",
    "STAGES",
    "StageReport",
    "VerifyReport",
    "decode_tolerance",
    "end_to_end_tolerance",
    "golden_images",
    "verify",
]

STAGES = ("decode+preprocess", "inference", "end to end")
DECODING = ("decode+preprocess", "end to end")
"""Those of STAGES that need Pillow."""

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
    """Every stage of one variant on one backend.

    Attributes:
        bundle: The bundle's name.
        backend: What ran it.
        precision: Which variant.
        stages: Those of STAGES that were run.
        holdout: The accuracy on the labelled sample; None without one, or where it was not run.
        not_checked: What was left out, and why.
    """

    bundle: str
    backend: str
    precision: str
    stages: tuple[StageReport, ...]
    holdout: HoldoutReport | None
    not_checked: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether all that was checked did."""
        stages = all(stage.comparison.passed for stage in self.stages)
        return stages and (self.holdout is None or self.holdout.passed)

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
            "holdout": None if self.holdout is None else self.holdout.to_json(),
            "not_checked": list(self.not_checked),
        }


def verify(
    bundle: Bundle,
    runner: Runner,
    *,
    with_holdout: bool = False,
    on_progress: Callable[[str], None] | None = None,
) -> VerifyReport:
    """Run the golden images through every stage and compare with what the bundle holds.

    Images go through one at a time, as they do in `edgereg infer`.

    Args:
        bundle: The opened bundle.
        runner: One of its variants, loaded.
        with_holdout: Whether to measure the accuracy on the bundle's labelled sample, too.
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
    decodes = has_pillow()
    own_inputs, from_stored, from_images = [], [], []
    for i, (name, data) in enumerate(zip(golden.images, encoded, strict=True)):
        from_stored.append(runner(stored_inputs[i : i + 1]))
        if decodes:
            own_inputs.append(preprocess([decode(data, name=name)], spec))
            from_images.append(runner(own_inputs[-1]))
        if on_progress is not None:
            on_progress(f"{i + 1} of {golden.count} images")
    allowed = bundle.manifest.variants[runner.precision].tolerance
    of_inputs, of_outputs = decode_tolerance(encoded), end_to_end_tolerance(allowed, encoded)
    first, second, third = STAGES
    stages = [
        _judge(second, f"stored tensor -> {stored}", from_stored, reference, allowed, references)
    ]
    if decodes:
        whole = f"images -> {stored}"
        stages = [
            _judge(first, "images -> stored tensor", own_inputs, stored_inputs, of_inputs),
            *stages,
            _judge(third, whole, from_images, reference, of_outputs, references),
        ]
    has_holdout = with_holdout and bundle.manifest.holdout is not None
    holdout = None
    if has_holdout and decodes:
        holdout = measure_holdout(bundle, runner, on_progress=on_progress)
    left_out = () if decodes else ("decode stage", *(("hold-out",) if has_holdout else ()))
    return VerifyReport(
        bundle=bundle.path.name,
        backend=runner.name,
        precision=runner.precision,
        stages=tuple(stages),
        holdout=holdout,
        not_checked=tuple(f"{what} not checked: no Pillow here" for what in left_out),
    )


def golden_images(bundle: Bundle) -> list[bytes]:
    """The encoded golden images, in order."""
    return [bundle.read(name) for name in bundle.manifest.golden.images]


def decode_tolerance(encoded: Sequence[bytes]) -> Tolerance:
    """What decoded and pre-processed images may differ by: nothing, unless coded with loss."""
    if all(map(is_exact, encoded)):
        return Tolerance(0.0, 1.0, "PNG decodes exactly, and resizing is integer arithmetic")
    return Tolerance(0.03, 1.0, _LOSSY_REASON)


def end_to_end_tolerance(allowed: AnyTolerance, encoded: Sequence[bytes]) -> AnyTolerance:
    """The variant's own tolerance, and a wider one for outputs where the input may differ."""
    if all(map(is_exact, encoded)):
        return allowed
    error, reason = max(allowed.max_scaled_error, 0.1), f"{allowed.reason}; {_LOSSY_REASON}"
    if isinstance(allowed, Tolerance):
        return Tolerance(error, allowed.min_top1_agreement, reason)
    return EmbeddingTolerance(
        error, min(allowed.min_cosine, 0.99), min(allowed.min_neighbour_agreement, 0.9), reason
    )


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
