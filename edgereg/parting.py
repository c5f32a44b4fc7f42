"""Compare an export with its checkpoint, module by module: one made for it, or a bundle's."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from deploy.bundle.read import Bundle, open_bundle
from deploy.runtime.decode import decode
from deploy.runtime.preprocess import preprocess
from edgereg.checkpoint import load_backbone, load_classifier
from edgereg.data.images import Images
from edgereg.errors import EdgeregError
from edgereg.ship import draw_calibration
from edgereg.subject import classifier, spread_out
from export.judge.holdout import as_float
from export.judge.module_diff import compare_modules
from export.judge.module_report import ModuleDiff
from export.onnx_file.to_onnx import to_onnx
from export.passes.pixels import read_pixels
from export.passes.simplify import simplify
from export.precision.variants import TOLERANCES, make_variant
from export.request import MIN_GOLDEN, check_precisions
from export.targets import Precision, find_target

__all__ = ["bisect_export", "diff_bundle"]

_COMPARED = 2  # images


def bisect_export(
    checkpoint_path: Path,
    images: Images,
    *,
    target: str,
    precisions: Sequence[Precision],
    calibration: Images | None,
    max_batch: int = 1,
    takes_pixels: bool = False,
    is_encoder: bool = False,
    on_stage: Callable[[str], None],
) -> dict[str, ModuleDiff]:
    """Make each variant without any gate, write nothing, and compare it module by module.

    Args:
        checkpoint_path: A classifier's checkpoint; of an encoder, either kind.
        images: Real ones, for a classifier labelled; two are compared, and 64 give the ranges of
            fp16.
        target: A key of `export.targets.TARGETS`.
        precisions: Which variants.
        calibration: Images that int8 takes its ranges from.
        max_batch: As of the export.
        takes_pixels: As of the export.
        is_encoder: As of the export.
        on_stage: Told what comes next.

    Raises:
        DeployError, EdgeregError: The export fails even so, or the input cannot be used.
    """
    row = find_target(target)
    drawn = () if calibration is None else draw_calibration(calibration)
    check_precisions(row, precisions, calibration=drawn)
    if is_encoder:
        model, _, checkpoint = load_backbone(checkpoint_path)
        labels = images.labels
    else:
        subject = classifier(checkpoint_path, images)
        model, checkpoint, labels = subject.model, subject.checkpoint, subject.labels
    if len(images) < _COMPARED:
        raise EdgeregError(
            f"modules are compared on {_COMPARED} images",
            found=f"'{images.name}' has {len(images)}",
            remedy="add images",
        )
    spec = dataclasses.replace(
        checkpoint.recipe.preprocessing(), layout="nhwc-uint8" if takes_pixels else "nchw-float32"
    )

    def preprocessed(encoded: Sequence[bytes], first: int) -> NDArray[Any]:
        named = ((data, f"calibration image {first + i}") for i, data in enumerate(encoded))
        return preprocess([decode(data, name=name) for data, name in named], spec)

    chosen = spread_out(labels, MIN_GOLDEN, size=len(images))
    golden = preprocess([images.load(int(index)) for index in chosen], spec)
    fed = golden[[0, -1]]  # of different classes
    inputs = torch.from_numpy(as_float(fed, spec))
    on_stage("simplifying, and writing the fp32 file")
    simple = simplify(model, (inputs,)).model
    fp32 = to_onnx(simple, (inputs,), target=row, max_batch=max_batch)
    if takes_pixels:
        fp32 = read_pixels(fp32, spec)
    diffs: dict[str, ModuleDiff] = {}
    for precision in precisions:
        made = make_variant(
            precision,
            fp32,
            target=row,
            golden=golden,
            calibration=drawn,
            preprocess=preprocessed,
            is_good=lambda file: True,
            on_stage=on_stage,
        )
        on_stage(f"comparing {precision} with the model, module by module")
        limit = TOLERANCES[precision].max_scaled_error
        diffs[precision] = compare_modules(
            model, simple, fp32, made.file, inputs=inputs, limit=limit, fed=fed
        )
    return diffs


def diff_bundle(
    bundle_path: Path, checkpoint_path: Path, *, on_stage: Callable[[str], None]
) -> dict[str, ModuleDiff]:
    """Compare every variant of a bundle with the checkpoint that it was exported from.

    The checkpoint is exported again, to know which tensor carries which module's output.

    Raises:
        DeployError, EdgeregError: One of them cannot be read, or they do not belong together.
    """
    bundle = open_bundle(bundle_path)
    manifest = bundle.manifest
    (given,) = manifest.outputs
    if manifest.index is not None:
        model, width, _ = load_backbone(checkpoint_path)
        if given.shape[1:] != (width,):
            raise EdgeregError(
                "a bundle is compared with the checkpoint that it was exported from",
                found=f"{given.shape[1]} numbers an image in the bundle, {width} of the checkpoint",
                remedy="name the checkpoint that was exported",
            )
    else:
        model = _classifier_of(bundle, checkpoint_path)
    fed = np.ascontiguousarray(bundle.array(manifest.golden.preprocessed)[[0, -1]])
    inputs = torch.from_numpy(as_float(fed, manifest.preprocessing))
    on_stage("simplifying the checkpoint, and writing its fp32 file")
    simple = simplify(model, (inputs,)).model
    target = find_target(manifest.target["name"])
    fp32 = to_onnx(
        simple,
        (inputs,),
        target=target,
        max_batch=manifest.max_batch,
        output_names=(given.name,),
    )
    if manifest.preprocessing.layout == "nhwc-uint8":
        fp32 = read_pixels(fp32, manifest.preprocessing)
    diffs = {}
    for precision, variant in manifest.variants.items():
        on_stage(f"comparing {precision} with the model, module by module")
        diffs[precision] = compare_modules(
            model,
            simple,
            fp32,
            bundle.read(variant.file),
            inputs=inputs,
            limit=variant.tolerance.max_scaled_error,
            fed=fed,
        )
    return diffs


def _classifier_of(bundle: Bundle, path: Path) -> nn.Module:
    model, checkpoint = load_classifier(path)
    if bundle.labels != checkpoint.class_names:
        raise EdgeregError(
            "a bundle is compared with the checkpoint that it was exported from",
            found=f"other classes: {', '.join(bundle.labels[:3])}, ... in the bundle, "
            f"{', '.join(checkpoint.class_names[:3])}, ... in the checkpoint",
            remedy="name the checkpoint that was exported",
        )
    return model
