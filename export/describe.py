"""What the manifest of a bundle says of an export."""

from collections.abc import Mapping

import numpy as np
import onnx
import onnxruntime
import onnxscript
import torch

from deploy.bundle.index import describe_index
from deploy.bundle.manifest import (
    FORMAT_VERSION,
    Accuracy,
    Golden,
    Holdout,
    Manifest,
    TensorSpec,
    Variant,
)
from deploy.bundle.tolerance import AnyTolerance
from deploy.runtime.neighbours import ReferenceIndex
from export.judge.judging import VariantResult
from export.request import ExportRequest
from export.targets import Precision, Target

__all__ = ["describe", "output_name"]


def describe(
    request: ExportRequest,
    target: Target,
    *,
    golden_names: tuple[str, ...],
    sample_names: tuple[str, ...],
    width: int,
    index: ReferenceIndex | None,
    results: Mapping[Precision, VariantResult],
    tolerances: Mapping[Precision, AnyTolerance],
) -> Manifest:
    """Return the manifest of an export, without the list of its files.

    Args:
        request: What was asked for.
        target: What it is for.
        golden_names: The files of the golden images.
        sample_names: The files of the held-out images that the bundle carries.
        width: Of the model's output.
        index: Of an encoder.
        results: What was found of each variant.
        tolerances: Of each.
    """
    spec = request.preprocessing
    batch = 1 if request.max_batch == 1 else "batch"
    return Manifest(
        format_version=FORMAT_VERSION,
        name=request.name,
        task="classification" if index is None else "embedding",
        max_batch=request.max_batch,
        target=target.to_json(),
        inputs=(TensorSpec("images", spec.input_dtype, (batch, *spec.input_shape)),),
        outputs=(TensorSpec(output_name(request), "float32", (batch, width)),),
        preprocessing=spec,
        labels=request.labels,
        variants={
            precision: _variant(precision, result, tolerances[precision])
            for precision, result in results.items()
        },
        golden=Golden(
            count=len(golden_names),
            images=golden_names,
            labels=None if request.golden_labels is None else "golden/labels.npy",
            preprocessed="golden/preprocessed.npy",
            outputs=f"golden/{output_name(request)}.npy",
        ),
        provenance={**request.provenance, "exporter": _versions()},
        files=(),
        index=None if index is None else describe_index(index),
        holdout=_holdout(sample_names, output_name(request), results),
    )


def output_name(request: ExportRequest) -> str:
    """Return what the model's output is called."""
    return "logits" if request.references is None else "embedding"


def _holdout(
    names: tuple[str, ...], output: str, results: Mapping[Precision, VariantResult]
) -> Holdout | None:
    if not names:
        return None
    return Holdout(
        count=len(names),
        images=names,
        labels="holdout/labels.npy",
        outputs=f"holdout/{output}.npy",
        net_lost={
            precision: result.net_lost
            for precision, result in results.items()
            if result.net_lost is not None
        },
    )


def _variant(precision: Precision, result: VariantResult, tolerance: AnyTolerance) -> Variant:
    paired, verdict, accuracy = result.paired, result.verdict, None
    if paired is not None and verdict is not None:
        accuracy = Accuracy(
            top1=paired.top1,
            reference_top1=paired.reference_top1,
            count=paired.count,
            lost=paired.lost,
            gained=paired.gained,
            interval=paired.interval,
            gate=verdict.limit,
            is_overridden=verdict.is_overridden,
            is_certified=verdict.certified,
        )
    file = f"model.{precision}.onnx"
    return Variant(file, precision, tolerance, result.conformance, accuracy)


def _versions() -> dict[str, str]:
    modules = (torch, onnx, onnxscript, onnxruntime, np)
    return {module.__name__: module.__version__ for module in modules}
