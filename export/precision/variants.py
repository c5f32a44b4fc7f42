"""Each precision of a model: how its file is made from fp32, and how it is run to be judged.

fp32   as it is, by ONNX Runtime; for x86 with channels kept in blocks, as is int8 there
fp16   casts in the graph; judged emulated, as a CPU has no fp16 arithmetic
int8   Q/DQ in the graph; judged by ONNX Runtime's integer kernels where this host is the
       target, else emulated: an x86 may saturate where a GPU does not
"""

import dataclasses
import math
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from deploy.bundle.tolerance import EmbeddingTolerance, Tolerance
from export.onnx_file.blocks import OLDEST_RUNTIME, keep_blocks
from export.onnx_file.run_onnx import Run, open_run
from export.precision.calibrate import calibration_provenance
from export.precision.emulate_fp16 import emulate_fp16
from export.precision.mixed_precision import to_fp16
from export.precision.partition import layers_in_float
from export.precision.sensitivity import quantize_until
from export.targets import Precision, Target

__all__ = [
    "EMBEDDING_TOLERANCES",
    "TOLERANCES",
    "Made",
    "is_host",
    "make_variant",
    "open_variant",
]

_HELD_BACK = 0.125  # of the calibration images, by which the method is chosen
_RANGED_ON = 64  # images for the ranges of fp16

TOLERANCES: dict[Precision, Tolerance] = {
    "fp32": Tolerance(
        max_scaled_error=1e-4,
        min_top1_agreement=1.0,
        reason="float32 rounding against float64 is 1e-6; 1e-4 leaves room for another order of "
        "sums",
    ),
    "fp16": Tolerance(
        max_scaled_error=0.02,
        min_top1_agreement=0.95,
        reason="half precision rounds by 5e-4 at each operator; deep models were seen to sum it "
        "up to 5e-3, and a GPU's own sums may be fp16 too",
    ),
    "int8": Tolerance(
        max_scaled_error=0.25,
        min_top1_agreement=0.85,
        reason="logits in int8 move by a few per cent of their range; the gate on the accuracy, "
        "not this, says whether that is too far",
    ),
}
EMBEDDING_TOLERANCES: dict[Precision, EmbeddingTolerance] = {
    "fp32": EmbeddingTolerance(
        max_scaled_error=1e-4,
        min_cosine=0.999999,
        min_neighbour_agreement=1.0,
        reason=TOLERANCES["fp32"].reason,
    ),
    "fp16": EmbeddingTolerance(
        max_scaled_error=0.02,
        min_cosine=0.999,
        min_neighbour_agreement=0.95,
        reason=f"{TOLERANCES['fp16'].reason}; cosine distances of 5e-6 and one neighbour in 64 "
        "were seen to change",
    ),
    "int8": EmbeddingTolerance(
        max_scaled_error=0.25,
        min_cosine=0.95,
        min_neighbour_agreement=0.75,
        reason="embeddings in int8 were seen to turn by cosine distances of 1e-3, and one "
        "neighbour in seven to change for another that is nearly as near; where there are labels, "
        "the gate on the vote says whether that is too far",
    ),
}


@dataclass(frozen=True)
class Made:
    """A variant's file, and what is to be told of how it was made, as JSON values."""

    file: bytes
    details: dict[str, Any] = field(default_factory=dict)


def make_variant(
    precision: Precision,
    fp32: bytes,
    *,
    target: Target,
    golden: NDArray[Any],
    calibration: Sequence[bytes],
    preprocess: Callable[[Sequence[bytes], int], NDArray[Any]],
    is_good: Callable[[bytes], bool],
    on_stage: Callable[[str], None],
) -> Made:
    """Write a precision of a model.

    Args:
        precision: Which.
        fp32: The fp32 ONNX file.
        target: Gives the scheme of int8.
        golden: Pre-processed images as the file takes them, for the ranges of fp16.
        calibration: Encoded images, for those of int8.
        preprocess: From encoded calibration images, and the number of the first, to the model's
            input.
        is_good: The gate on the accuracy, which decides how many layers int8 leaves in float.
        on_stage: Is told what comes next.

    Raises:
        BadInputError: The calibration images cannot be used.
        CheckFailedError: There is no such variant that is finite and passes its gate.
    """
    if precision == "fp32":
        return Made(_for_target(fp32, target))
    if precision == "fp16":
        # Golden images lie in the order of their classes: evenly spaced ones show them all.
        spaced = np.linspace(0, len(golden) - 1, min(len(golden), _RANGED_ON)).round().astype(int)
        images = preprocess(calibration[:_RANGED_ON], 0) if calibration else golden[spaced]
        mixed = to_fp16(fp32, images)
        on_stage(
            f"fp16: {mixed.fp16_nodes} nodes, {len(mixed.islands)} stay fp32; scaled error "
            f"{mixed.scaled_error:.1e}, emulated"
        )
        return Made(mixed.model, mixed.to_json())
    held = max(1, round(len(calibration) * _HELD_BACK))
    quantized = quantize_until(
        fp32,
        (preprocess(calibration[i : i + 1], i) for i in range(held, len(calibration))),
        scheme=target.scheme,
        held_back=preprocess(calibration[:held], 0),
        is_good=is_good,
        in_float=layers_in_float(fp32) if target.places_layers else {},
        on_stage=on_stage,
    )
    details: dict[str, Any] = {
        "scheme": target.scheme,
        "method": quantized.method,
        "layers": quantized.layers,
        "left_in_float": quantized.left,
        "sqnr_db": _finite(quantized.sqnr_db),
        "tried": [
            dataclasses.asdict(trial) | {"sqnr_db": _finite(trial.sqnr_db)}
            for trial in quantized.tried
        ],
        "calibration": calibration_provenance(calibration).to_json() | {"held_back": held},
        "judged_by": "integer kernels" if is_host(target) else "emulation",
    }
    return Made(_for_target(quantized.model, target), details)


def open_variant(precision: Precision, file: bytes, target: Target) -> Run:
    """Load a variant as it is judged."""
    if precision == "fp16":
        return open_run(emulate_fp16(file))
    return open_run(file, integers=precision != "int8" or is_host(target))


def _for_target(file: bytes, target: Target) -> bytes:
    """Rewrite a file for the CPU that it is for, if the ONNX Runtime that is here gains by it."""
    release = tuple(int(number) for number in onnxruntime.__version__.split(".")[:2])
    return keep_blocks(file) if target.blocked and release >= OLDEST_RUNTIME else file


def _finite(decibels: float) -> float | None:
    return decibels if math.isfinite(decibels) else None


def is_host(target: Target) -> bool:
    """Say whether this machine is one that the target means."""
    kinds = {"onnxruntime-x86": ("x86_64", "AMD64"), "onnxruntime-arm": ("aarch64", "arm64")}
    return platform.machine() in kinds.get(target.name, ())
