"""From a trained model to a bundle, or to an error: nothing is written before all checks passed.

The reference of everything is the model that was handed in: in float64 for the golden images, in
float32, as it was trained, for the accuracy. It is not the simplified model, and not the fp32 file.
"""

import io
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from deploy.bundle.index import index_contents
from deploy.bundle.manifest import DIGEST_NAME, MANIFEST_NAME, Manifest
from deploy.bundle.write import write_bundle
from deploy.errors import BadInputError
from deploy.publish import check_free
from deploy.runtime.decode import decode
from deploy.runtime.preprocess import preprocess
from export.describe import describe, output_name
from export.judge.holdout import as_float
from export.judge.judging import Judging, VariantResult
from export.judge.resize_ablation import ResizeAblation
from export.model_card import model_card
from export.onnx_file.to_onnx import to_onnx
from export.passes.pixels import read_pixels
from export.passes.simplify import simplify
from export.precision.variants import TOLERANCES, make_variant
from export.request import ExportRequest, check_request
from export.targets import Precision, find_target
from export.traced.report import SimplifyReport
from export.traced.sites import assert_simplified
from export.traced.trace import floating_dtype

__all__ = ["BUNDLE_MEMBERS", "ExportRequest", "ExportResult", "export_bundle"]

BUNDLE_MEMBERS = (
    MANIFEST_NAME,
    DIGEST_NAME,
    "golden",
    "holdout",
    "index",
    "labels.txt",
    "licenses.txt",
    *(f"model.{precision}.onnx" for precision in TOLERANCES),
    "readme.md",
    "simplify.json",
    "variants.json",
)


@dataclass(frozen=True)
class ExportResult:
    """What was written, and what was found on the way."""

    path: Path
    manifest: Manifest
    report: SimplifyReport
    variants: dict[Precision, VariantResult]
    ablation: ResizeAblation | None

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "bundle": self.path.name,
            "target": self.manifest.target,
            "variants": {name: result.to_json() for name, result in self.variants.items()},
            "resize_ablation": None if self.ablation is None else self.ablation.to_json(),
            "simplify": self.report.to_json(),
        }


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
            logits or, where the request has references, (N, D) embeddings. It is not changed.
        destination: The directory to appear.
        request: What else goes into the bundle.
        force: Whether an earlier bundle may be replaced.
        on_stage: Is told, in a phrase, what comes next, what was simplified, and each verdict.

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
    inputs = _preprocess(request, request.golden_images, names)
    floats = as_float(inputs, request.preprocessing)

    on_stage("simplifying, and proving it in float64")
    example = (torch.from_numpy(floats[:2]),)
    simplified = simplify(model, example)
    width = _width(simplified.model(*example), request)
    assert_simplified(simplified.model, skipped=simplified.report.skipped)
    on_stage(_summary(simplified.report))

    on_stage(f"writing ONNX, opset {target.opset}")
    output = output_name(request)
    fp32 = to_onnx(
        simplified.model,
        example,
        target=target,
        max_batch=request.max_batch,
        output_names=(output,),
    )
    if request.preprocessing.layout == "nhwc-uint8":
        fp32 = read_pixels(fp32, request.preprocessing)
    judging = Judging(model, inputs, request, target, on_stage)
    files: dict[Precision, bytes] = {}
    results: dict[Precision, VariantResult] = {}
    for precision in dict.fromkeys(("fp32", *request.precisions)):
        begun = time.perf_counter()
        made = make_variant(
            precision,
            fp32,
            target=target,
            golden=inputs,
            calibration=request.calibration,
            preprocess=lambda encoded, first: _preprocess(
                request, encoded, [f"calibration image {first + i}" for i in range(len(encoded))]
            ),
            is_good=judging.is_good_int8,
            on_stage=on_stage,
        )
        files[precision] = made.file
        results[precision] = judging.judge(precision, made, fp32=files["fp32"], begun=begun)
    ablation = judging.resize_ablation(fp32)
    files = {precision: files[precision] for precision in request.precisions}
    results = {precision: results[precision] for precision in request.precisions}

    sample = _sample_files(request)
    manifest = describe(
        request,
        target,
        golden_names=names,
        sample_names=tuple(sample),
        width=width,
        index=judging.index,
        results=results,
        tolerances=judging.tolerances,
    )
    contents = {
        **{f"model.{precision}.onnx": file for precision, file in files.items()},
        **dict(zip(names, request.golden_images, strict=True)),
        **sample,
        "golden/preprocessed.npy": _npy(inputs),
        f"golden/{output}.npy": _npy(judging.golden_outputs),
        "simplify.json": _json(simplified.report.to_json()),
        "variants.json": _json({p: result.details for p, result in results.items()}),
        "readme.md": model_card(
            manifest, simplified.report, {p: r.comparison for p, r in results.items()}
        ).encode(),
        "licenses.txt": request.licenses.encode(),
    }
    if request.labels:
        contents["labels.txt"] = "".join(f"{label}\n" for label in request.labels).encode()
    if judging.index is not None:
        contents |= index_contents(judging.index)
    if request.holdout is not None and judging.sample_outputs is not None:
        labels = [request.holdout[1][place] for place in sorted(request.sample)]
        contents["holdout/labels.npy"] = _npy(np.asarray(labels, np.int64))
        contents[f"holdout/{output}.npy"] = _npy(judging.sample_outputs)
    if request.golden_labels is not None:
        contents["golden/labels.npy"] = _npy(np.asarray(request.golden_labels, np.int64))
    on_stage(f"writing {destination}")
    written = write_bundle(destination, manifest, contents, force=force)
    return ExportResult(destination, written, simplified.report, results, ablation)


def _sample_files(request: ExportRequest) -> dict[str, bytes]:
    """Return the held-out images that the bundle carries, by their names there."""
    encoded = (request.sample[place] for place in sorted(request.sample))
    return {f"holdout/{i:04d}.{_extension(data)}": data for i, data in enumerate(encoded)}


def _preprocess(
    request: ExportRequest, encoded: Sequence[bytes], names: Sequence[str]
) -> NDArray[Any]:
    decoded = [decode(data, name=name) for data, name in zip(encoded, names, strict=True)]
    return preprocess(decoded, request.preprocessing)


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


def _width(outputs: Any, request: ExportRequest) -> int:
    """Return how many numbers the model gives for an image: a fixed number for a classifier."""
    shape = tuple(outputs.shape) if isinstance(outputs, torch.Tensor) else type(outputs).__name__
    classes = len(request.labels)
    if request.references is not None and (len(shape) != 2 or shape[0] != 2):
        raise BadInputError(
            "an encoder returns (N, D) embeddings, one for each image",
            found=f"{shape} for a batch of 2",
            remedy="pool the feature map in the model",
        )
    if request.references is None and shape != (2, classes):
        raise BadInputError(
            f"a classifier returns (N, {classes}) logits, one for each label",
            found=f"{shape} for a batch of 2",
            remedy="export with the labels of the data set that the model was trained on",
        )
    return int(outputs.shape[1])


def _summary(report: SimplifyReport) -> str:
    """Say what was simplified; a dropout that was live is the model's bug, and named."""
    changes = [change for done in report.passes.values() for change in done.changed]
    live = [f"; {change.site}: {change.what}" for change in changes if "live" in change.what]
    summary = f"simplified {len(changes)} sites; relative error {report.model_error:.1g}"
    return summary + "".join(live)


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, allow_nan=False) + "\n").encode()


def _npy(array: NDArray[Any]) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()


def _extension(data: bytes) -> str:
    """Return the file name extension of an encoded image; what it is not, `decode` refuses."""
    magic = {b"\x89PNG": "png", b"\xff\xd8": "jpg", b"RIFF": "webp", b"BM": "bmp"}
    return next((name for start, name in magic.items() if data.startswith(start)), "image")
