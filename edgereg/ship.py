"""From a checkpoint and held-out images to a bundle: the door between training and export."""

import dataclasses
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploy.publish import check_free, check_new_file, publish_text
from edgereg import __version__
from edgereg.data.images import Images, digest
from edgereg.errors import DataError
from edgereg.report.export_page import export_json, export_page
from edgereg.subject import Decoded, classifier, encoder, spread_out
from export.exporter import BUNDLE_MEMBERS, ExportResult, export_bundle
from export.precision.calibrate import assert_disjoint, calibration_provenance
from export.request import MAX_SAMPLE, MIN_GOLDEN, ExportRequest
from export.targets import Precision, find_target

__all__ = ["HOLDOUT_SAMPLE", "MAX_CALIBRATION", "MAX_HOLDOUT", "draw_calibration", "ship"]

MAX_HOLDOUT = 10_000  # images on which the accuracy is measured
HOLDOUT_SAMPLE = 256  # of them, that the bundle carries
MAX_SAMPLE_BYTES = 32 << 20  # that these may take together, unless a number is asked for
MAX_CALIBRATION = 256  # images that give the ranges of fp16 and int8


def ship(
    checkpoint_path: Path,
    images: Images,
    out: Path,
    *,
    target: str,
    precisions: Sequence[Precision] = ("fp32",),
    calibration: Images | None = None,
    gates: Mapping[Precision, float] | None = None,
    allow_slower: bool = False,
    max_batch: int = 1,
    takes_pixels: bool = False,
    is_encoder: bool = False,
    reference: Images | None = None,
    holdout: int | None = None,
    force: bool = False,
    on_stage: Callable[[str], None] = lambda stage: None,
) -> ExportResult:
    """Export a checkpoint for a target, and write reports as JSON and HTML beside the bundle.

    The golden images are taken from each class in turn; those on which the accuracy is measured are
    drawn at random, with a seed of their own.

    Args:
        checkpoint_path: A classifier's checkpoint; to export an encoder, either kind.
        images: Not trained on; for a classifier labelled, with the checkpoint's classes.
        out: The bundle to write.
        target: A key of `export.targets.TARGETS`.
        precisions: Of the bundle's variants.
        calibration: Images like those trained on, none of them in `images`; labels do not matter.
        gates: Limits of the net loss of accuracy, as shares, in place of the usual ones.
        allow_slower: Whether a variant may be slower than fp32 where this host is the target.
        max_batch: 1 for a model of static shape; more, and any batch up to it runs.
        takes_pixels: Whether the model takes uint8 (N, H, W, 3) pixels, and normalises them itself.
        is_encoder: Whether the embedding is exported, which is what the head is given.
        reference: Of an encoder: images for the index of its bundle; without, half of `images`.
        holdout: How many labelled images the bundle carries, for the device to measure its accuracy
            on; without, up to 256 within 32 MiB.
        force: Whether an earlier bundle may be replaced.
        on_stage: Told what comes next.

    Raises:
        DeployError, EdgeregError: Nothing was written.
    """
    check_free(out, force=force, members=BUNDLE_MEMBERS)
    for path in _reports(out):
        check_new_file(path, what="report", force=force)
    find_target(target)
    subject = (
        encoder(checkpoint_path, images, reference, on_stage=on_stage)
        if is_encoder
        else classifier(checkpoint_path, images)
    )
    checkpoint, judged, labels = subject.checkpoint, subject.images, subject.labels
    if len(judged) < MIN_GOLDEN:
        raise DataError(
            f"an export needs at least {MIN_GOLDEN} {'' if is_encoder else 'labelled '}images that "
            "were not trained on",
            found=f"'{images.name}' has {len(images)}",
            remedy="add images",
        )
    data_sha256 = digest(images)
    if data_sha256 == checkpoint.data["sha256"]:
        raise DataError(
            "an export measures its accuracy on images that were not trained on",
            found=f"'{images.name}' is the training data",
            remedy="name a held-out data set with --data",
        )
    chosen = () if calibration is None else _calibration(calibration, images)
    names, count = subject.class_names, len(judged)
    golden = spread_out(labels, max(MIN_GOLDEN, len(names)), size=count)
    shows_all = labels is not None and len(set(labels.tolist())) == len(names)
    if labels is not None and not shows_all:
        on_stage(f"'{images.name}' lacks a class: the golden images go without labels")
    drawn = np.random.default_rng(0).permutation(count)[:MAX_HOLDOUT]
    held_out = np.sort(drawn)
    request = ExportRequest(
        name=re.sub(r"[^A-Za-z0-9._-]", "-", checkpoint_path.resolve().name),
        target=target,
        labels=names,
        preprocessing=dataclasses.replace(
            checkpoint.recipe.preprocessing(),
            layout="nhwc-uint8" if takes_pixels else "nchw-float32",
        ),
        golden_images=[judged.encoded(int(index)) for index in golden],
        golden_labels=labels[golden].tolist() if labels is not None and shows_all else None,
        holdout=(
            None if labels is None else (Decoded(judged, held_out), labels[held_out].tolist())
        ),
        sample=_sample(judged, drawn, labels is not None, holdout),
        precisions=tuple(precisions),
        calibration=chosen,
        gates=gates or {},
        allow_slower=allow_slower,
        max_batch=max_batch,
        references=subject.references,
        provenance={
            "edgereg": __version__,
            "recipe": checkpoint.recipe.to_json(),
            "training_data": dict(checkpoint.data),
            "held_out_data": {
                "name": images.name,
                "count": len(images),
                "measured_on": 0 if labels is None else len(held_out),
                "sha256": data_sha256,
            },
            **subject.provenance,
            **_calibration_provenance(calibration, chosen),
        },
    )
    result = export_bundle(subject.model, out, request=request, force=force, on_stage=on_stage)
    as_json, as_page = _reports(out)
    publish_text(as_json, json.dumps(export_json(result), indent=1, allow_nan=False) + "\n")
    publish_text(as_page, export_page(result))
    return result


def _sample(
    images: Images, drawn: NDArray[np.int64], has_labels: bool, wanted: int | None
) -> dict[int, bytes]:
    """Return held-out images for the bundle, encoded, by their place among the sorted drawn ones.

    Args:
        images: That the drawn ones are of.
        drawn: (N,) in random order: the first of them are a fair sample.
        has_labels: Without labels there is no accuracy to measure.
        wanted: How many.
    """
    most = len(drawn) if has_labels else 0
    if wanted is not None and wanted > min(most, MAX_SAMPLE):
        raise DataError(
            f"a bundle carries labelled held-out images, {MAX_SAMPLE} at most",
            found=f"{wanted} asked for; '{images.name}' has {most}",
            remedy="ask for fewer with --holdout, or for none with --holdout 0",
        )
    sample: dict[int, bytes] = {}
    size, held_out = 0, np.sort(drawn)
    for index in drawn[: HOLDOUT_SAMPLE if wanted is None else wanted][:most]:
        data = images.encoded(int(index))
        size += len(data)
        if wanted is None and size > MAX_SAMPLE_BYTES:
            break
        sample[int(np.searchsorted(held_out, index))] = data
    return sample


def _reports(out: Path) -> tuple[Path, Path]:
    """Return where the reports go: NAME.report.json and .html beside NAME.bundle."""
    name = out.name.removesuffix(".bundle")
    return out.with_name(f"{name}.report.json"), out.with_name(f"{name}.report.html")


def _calibration(calibration: Images, held_out: Images) -> Sequence[bytes]:
    """Draw calibration images, and insist that not one of the whole set is held out."""
    hashes = (
        calibration_provenance(images.encoded(index) for index in range(len(images))).sha256
        for images in (calibration, held_out)
    )
    assert_disjoint(*hashes)
    return draw_calibration(calibration)


def draw_calibration(images: Images) -> Sequence[bytes]:
    """Draw the images that give the ranges of fp16 and int8, always the same ones."""
    drawn = np.random.default_rng(0).permutation(len(images))[:MAX_CALIBRATION]
    return [images.encoded(int(index)) for index in drawn]


def _calibration_provenance(
    calibration: Images | None, chosen: Sequence[bytes]
) -> dict[str, dict[str, Any]]:
    if calibration is None:
        return {}
    drawn = calibration_provenance(chosen).to_json()
    return {"calibration_data": {"name": calibration.name, "of": len(calibration), **drawn}}
