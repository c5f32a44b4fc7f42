"""From a trained model to a bundle, or to an error: nothing is written before all checks passed.

The reference of everything is the model that was handed in, in float64: not the simplified one, and
not the ONNX file.
"""

import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import onnxscript
import torch
from numpy.typing import NDArray
from torch import nn

from deploy.bundle.manifest import (
    DIGEST_NAME,
    FORMAT_VERSION,
    MANIFEST_NAME,
    Accuracy,
    Conformance,
    Golden,
    Manifest,
    TensorSpec,
    Tolerance,
    Variant,
)
from deploy.bundle.write import write_bundle
from deploy.errors import BadInputError, CheckFailedError
from deploy.measure.compare import Comparison, compare
from deploy.publish import check_free
from deploy.runtime.decode import decode
from deploy.runtime.preprocess import preprocess
from export.conformance import judge
from export.float64 import evaluate
from export.gates import assert_exportable
from export.model_card import model_card
from export.report import SimplifyReport
from export.request import ExportRequest, check_request
from export.run_onnx import run_batches
from export.simplify import simplify
from export.sites import assert_simplified
from export.targets import Target, find_target
from export.to_onnx import to_onnx
from export.trace import floating_dtype, frozen_copy

__all__ = ["BUNDLE_MEMBERS", "ExportRequest", "ExportResult", "export_bundle"]

FP32_TOLERANCE = Tolerance(
    max_scaled_error=1e-4,
    min_top1_agreement=1.0,
    reason="float32 rounding against float64 is 1e-6; 1e-4 leaves room for another order of sums",
)
_BATCH = 16  # of the float64 reference, and of the images whose accuracy is measured
BUNDLE_MEMBERS = (
    MANIFEST_NAME,
    DIGEST_NAME,
    "golden",
    "labels.txt",
    "licenses.txt",
    "model.fp32.onnx",
    "readme.md",
    "simplify.json",
)


@dataclass(frozen=True)
class ExportResult:
    """What was written, and what was found on the way."""

    path: Path
    manifest: Manifest
    report: SimplifyReport
    comparison: Comparison
    conformance: Conformance
    accuracy: Accuracy | None


def export_bundle(
    model: nn.Module,
    destination: Path,
    *,
    request: ExportRequest,
    force: bool = False,
    on_stage: Callable[[str], None] = lambda stage: None,
) -> ExportResult:
    """Write a model as a bundle, or nothing at all.

    Args:
        model: In evaluation mode, float32; takes (N, 3, H, W) images and returns (N, classes)
            logits. It is not changed.
        destination: The directory to appear.
        request: What else goes into the bundle.
        force: Whether an earlier bundle may be replaced.
        on_stage: Is told, in a phrase, what comes next, what was simplified, and the verdict.

    Raises:
        BadInputError: The destination is taken, or the model or the request cannot be used as it
            is.
        CheckFailedError: A proof, a gate, the judge or the comparison with the reference failed.
    """
    check_free(destination, force=force, members=BUNDLE_MEMBERS)
    target = find_target(request.target)
    _check_model(model)
    check_request(request)

    on_stage("pre-processing the golden images")
    names = tuple(
        f"golden/{i:04d}.{_extension(data)}" for i, data in enumerate(request.golden_images)
    )
    decoded = [
        decode(data, name=name) for data, name in zip(request.golden_images, names, strict=True)
    ]
    inputs = preprocess(decoded, request.preprocessing)

    on_stage("simplifying, and proving it in float64")
    example = (torch.from_numpy(inputs[:2]),)
    simplified = simplify(model, example)
    _check_logits(simplified.model(*example), len(request.labels))
    assert_simplified(simplified.model, skipped=simplified.report.skipped)
    on_stage(_summary(simplified.report))

    on_stage(f"writing ONNX, opset {target.opset}")
    onnx_file = to_onnx(simplified.model, example, target=target, max_batch=request.max_batch)
    assert_exportable(onnx_file, target, max_batch=request.max_batch)

    on_stage(f"judging it for {target.name}")
    conformance = judge(onnx_file, target, max_batch=request.max_batch)
    on_stage(f"{target.name}: {conformance.verdict} ({conformance.judge}: {conformance.detail})")

    on_stage("comparing it with the model, on the golden images")
    reference = _reference_logits(model, inputs)
    comparison = compare(run_batches(onnx_file, inputs), reference, FP32_TOLERANCE)
    if not comparison.passed:
        raise CheckFailedError(
            "an exported file answers as the model does, within its tolerance",
            found=f"{'; '.join(comparison.reasons)}, on {comparison.count} golden images",
            remedy="look for activations so large that float32 loses their differences",
        )
    if request.holdout is not None:
        on_stage(f"measuring the accuracy on {len(request.holdout[0])} held-out images")
    accuracy = _accuracy(onnx_file, request)

    manifest = _manifest(request, target, names, conformance, accuracy)
    contents = {
        "model.fp32.onnx": onnx_file,
        **dict(zip(names, request.golden_images, strict=True)),
        "golden/preprocessed.npy": _npy(inputs),
        "golden/logits.npy": _npy(reference),
        "simplify.json": (json.dumps(simplified.report.to_json(), indent=1) + "\n").encode(),
        "labels.txt": "".join(f"{label}\n" for label in request.labels).encode(),
        "readme.md": model_card(manifest, simplified.report, comparison).encode(),
        "licenses.txt": request.licenses.encode(),
    }
    if request.golden_labels is not None:
        contents["golden/labels.npy"] = _npy(np.asarray(request.golden_labels, np.int64))
    on_stage(f"writing {destination}")
    written = write_bundle(destination, manifest, contents, force=force)
    return ExportResult(destination, written, simplified.report, comparison, conformance, accuracy)


def _manifest(
    request: ExportRequest,
    target: Target,
    golden_names: tuple[str, ...],
    conformance: Conformance,
    accuracy: Accuracy | None,
) -> Manifest:
    height, width = request.preprocessing.height, request.preprocessing.width
    batch = 1 if request.max_batch == 1 else "batch"
    fp32 = Variant("model.fp32.onnx", "fp32", FP32_TOLERANCE, conformance, accuracy)
    return Manifest(
        format_version=FORMAT_VERSION,
        name=request.name,
        task="classification",
        max_batch=request.max_batch,
        target=target.to_json(),
        inputs=(TensorSpec("images", "float32", (batch, 3, height, width)),),
        outputs=(TensorSpec("logits", "float32", (batch, len(request.labels))),),
        preprocessing=request.preprocessing,
        labels=request.labels,
        variants={"fp32": fp32},
        golden=Golden(
            count=len(golden_names),
            images=golden_names,
            labels=None if request.golden_labels is None else "golden/labels.npy",
            preprocessed="golden/preprocessed.npy",
            outputs="golden/logits.npy",
        ),
        provenance={**request.provenance, "exporter": _versions()},
        files=(),
    )


def _check_model(model: nn.Module) -> None:
    """Refuse a module in training mode, wherever it is, and another type than float32."""
    training = [
        name or "the model itself" for name, module in model.named_modules() if module.training
    ]
    if training:
        raise BadInputError(
            "a model is exported in evaluation mode",
            found=f"{len(training)} modules in training mode, first {training[0]}",
            remedy="call model.eval() first",
        )
    dtype = floating_dtype(model)
    if dtype != torch.float32:
        raise BadInputError(
            "a model is exported from float32, against which lower precisions are measured",
            found=str(dtype),
            remedy="call model.float() first",
        )


def _check_logits(logits: Any, classes: int) -> None:
    shape = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
    if shape != (2, classes):
        raise BadInputError(
            f"a classifier returns (N, {classes}) logits, one for each label",
            found=f"{shape} for a batch of 2",
            remedy="export with the labels of the data set that the model was trained on",
        )


def _summary(report: SimplifyReport) -> str:
    """Say what was simplified; a dropout that was live is the model's bug, and named."""
    changes = [change for done in report.passes.values() for change in done.changed]
    live = [f"; {change.site}: {change.what}" for change in changes if "live" in change.what]
    summary = f"simplified {len(changes)} sites; relative error {report.model_error:.1g}"
    return summary + "".join(live)


def _reference_logits(model: nn.Module, inputs: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return what the model itself answers in float64, rounded once."""
    reference = frozen_copy(model).double()
    batches = (
        torch.from_numpy(inputs[i : i + _BATCH]).double() for i in range(0, len(inputs), _BATCH)
    )
    logits = torch.cat([evaluate(reference, (batch,))[0] for batch in batches])
    return logits.float().numpy()


def _accuracy(onnx_file: bytes, request: ExportRequest) -> Accuracy | None:
    if request.holdout is None:
        return None
    images, labels = request.holdout
    right = 0
    for start in range(0, len(labels), _BATCH):  # photographs of a usual size fill the memory
        these = range(start, min(start + _BATCH, len(labels)))
        inputs = preprocess([images[index] for index in these], request.preprocessing)
        answers = run_batches(onnx_file, inputs).argmax(axis=1)
        right += int(np.sum(answers == np.asarray(labels[start : start + _BATCH])))
    return Accuracy(right / len(labels), len(labels))


def _versions() -> dict[str, str]:
    modules = (torch, onnx, onnxscript, onnxruntime, np)
    return {module.__name__: module.__version__ for module in modules}


def _npy(array: NDArray[Any]) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()


def _extension(data: bytes) -> str:
    """Return the file name extension of an encoded image; what it is not, `decode` refuses."""
    magic = {b"\x89PNG": "png", b"\xff\xd8": "jpg", b"RIFF": "webp", b"BM": "bmp"}
    return next((name for start, name in magic.items() if data.startswith(start)), "image")
