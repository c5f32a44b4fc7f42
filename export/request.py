"""What an export is made of, beside the model, and the rules for it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploy.errors import BadInputError
from deploy.runtime.preprocess import Preprocessing
from export.model_card import LICENSES
from export.precision.calibrate import assert_disjoint, calibration_provenance
from export.targets import Precision, Target, find_target

__all__ = [
    "MAX_SAMPLE",
    "MIN_GOLDEN",
    "ExportRequest",
    "References",
    "check_precisions",
    "check_request",
]

# Latencies of so many images have a 90th percentile (device-side statistics want 64).
MIN_GOLDEN = 64
MAX_BATCH = 256
MIN_CALIBRATION = 32
MAX_SAMPLE = 2000  # a bundle has 4096 files at most


@dataclass(frozen=True)
class References:
    """The images among which an encoder's bundle finds neighbours.

    Args:
        images: Decoded (h, w, 3) uint8, taken a few at a time.
        names: What to call each.
        labels: Their classes, or None if they are not known.
    """

    images: Sequence[NDArray[np.uint8]]
    names: Sequence[str]
    labels: Sequence[int] | None


@dataclass(frozen=True)
class ExportRequest:
    """What an export is made of, beside the model.

    Args:
        name: The bundle's name.
        target: A key of `export.targets.TARGETS`.
        labels: The classes' names, in the order of the logits; of an encoder those of the
            references, or none.
        preprocessing: From a decoded image to the model's input.
        golden_images: At least 64 encoded images (PNG, JPEG, WEBP, BMP): the bundle's reference
            inputs.
        golden_labels: Their classes; every class must occur.
        holdout: Decoded (h, w, 3) uint8 images that were not trained on, and their classes. They
            are taken a few at a time, so the sequence may decode when it is asked.
        sample: Some of them, encoded, by their place among them: the bundle carries these, and the
            device measures its accuracy on them.
        precisions: What the bundle is to hold; fp32 is made in any case: the others come from it.
        calibration: Encoded images like those trained on, none of them golden, nor held out, which
            is for the caller to see to; int8 needs them, and fp16 finds its ranges on them if they
            are given.
        gates: Limits of the net loss of accuracy, as shares, in place of the usual ones.
        allow_slower: Whether a variant may be slower than fp32 where this host is the target.
        max_batch: 1 for a model of static shape, one image; more, and any batch up to it runs.
        references: Of an encoder, whose output is an embedding. Accuracy is then that of the vote
            of an image's nearest references.
        provenance: JSON values: recipe, data set hash, versions, commit. No time, host or path.
        licenses: What the licenses.txt of the bundle says.
    """

    name: str
    target: str
    labels: tuple[str, ...]
    preprocessing: Preprocessing
    golden_images: Sequence[bytes]
    golden_labels: Sequence[int] | None = None
    holdout: tuple[Sequence[NDArray[np.uint8]], Sequence[int]] | None = None
    sample: Mapping[int, bytes] = field(default_factory=dict)
    precisions: tuple[Precision, ...] = ("fp32",)
    calibration: Sequence[bytes] = ()
    gates: Mapping[Precision, float] = field(default_factory=dict)
    allow_slower: bool = False
    max_batch: int = 1
    references: References | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)
    licenses: str = LICENSES


def check_request(request: ExportRequest) -> None:
    """Refuse labels and images that cannot make a useful bundle.

    Raises:
        BadInputError: There are too few golden images, not one of each class, or classes that
            are not the labels'; or precisions, gates and images do not go together.
    """
    if any(not label.isprintable() or not label for label in request.labels):
        raise BadInputError(
            "a label is one line of printable text",
            found=repr(request.labels),
            remedy="rename the class",
        )
    classes, count = len(request.labels), len(request.golden_images)
    if count < MIN_GOLDEN:
        raise BadInputError(
            f"a bundle has at least {MIN_GOLDEN} golden images",
            found=f"{count}",
            remedy="give more, labelled or not, that are like what the camera will see",
        )
    if not 1 <= request.max_batch <= MAX_BATCH:
        raise BadInputError(
            f"the largest batch is 1 to {MAX_BATCH}",
            found=f"{request.max_batch}",
            remedy="on a device small batches are the fastest: 1 to 16 is usual",
        )
    if request.golden_labels is not None:
        _check_classes("golden", request.golden_labels, count=count, classes=classes)
        missing = sorted(set(range(classes)) - set(request.golden_labels))
        if missing:
            raise BadInputError(
                "labelled golden images show every class",
                found=f"none of {', '.join(request.labels[i] for i in missing)}",
                remedy="add one of each, or leave the golden images without labels",
            )
    if request.holdout is not None:
        images, labels = request.holdout
        _check_classes("held-out", labels, count=len(images), classes=classes)
    _check_sample(request)
    if request.references is not None:
        _check_references(request.references, request)
    target = find_target(request.target)
    check_precisions(target, request.precisions, calibration=request.calibration)
    _check_judgement(request)


def _check_sample(request: ExportRequest) -> None:
    held_out = 0 if request.holdout is None else len(request.holdout[1])
    outside = [place for place in request.sample if not 0 <= place < held_out]
    if outside or len(request.sample) > MAX_SAMPLE:
        raise BadInputError(
            f"a bundle carries at most {MAX_SAMPLE} of its held-out images",
            found=f"{len(request.sample)} of {held_out}"
            + (f", one at place {outside[0]}" if outside else ""),
            remedy="carry fewer, or label the held-out images",
        )


def check_precisions(
    target: Target, asked: Sequence[Precision], *, calibration: Sequence[bytes]
) -> None:
    """Refuse precisions that a target does not take, and int8 without images to calibrate on.

    Raises:
        BadInputError: So it is.
    """
    refused = [each for each in asked if each not in target.precisions]
    if refused or not asked or len(set(asked)) < len(asked):
        raise BadInputError(
            f"{target.name} takes {', '.join(target.precisions)}, each once",
            found=", ".join(asked) or "none",
            remedy="leave out the others",
        )
    if "int8" in asked and len(calibration) < MIN_CALIBRATION:
        raise BadInputError(
            f"int8 takes its ranges from at least {MIN_CALIBRATION} calibration images",
            found=f"{len(calibration)}",
            remedy="give images of the training set with --calib",
        )


def _check_judgement(request: ExportRequest) -> None:
    lower = [each for each in request.precisions if each != "fp32"]
    if lower and request.holdout is None and request.references is None:
        raise BadInputError(
            "a lower precision is judged by its accuracy on labelled held-out images",
            found=f"{', '.join(lower)} and no such images",
            remedy="give some, or export fp32 only",
        )
    if request.gates and request.holdout is None and request.references is not None:
        raise BadInputError(
            "a gate limits the net loss of accuracy, which is measured on labelled images",
            found=f"{', '.join(request.gates)} and no such images",
            remedy="leave --gate out, or give labelled reference images and labelled --data",
        )
    wrong = {p: limit for p, limit in request.gates.items() if not 0 <= limit <= 1}
    if wrong:
        raise BadInputError(
            "a gate is a share of the images, from 0 to 1",
            found=", ".join(f"{precision}: {limit}" for precision, limit in wrong.items()),
            remedy="0.01 allows a net loss of one point",
        )
    if request.calibration:
        golden = calibration_provenance(request.golden_images).sha256
        assert_disjoint(calibration_provenance(request.calibration).sha256, golden)


def _check_references(references: References, request: ExportRequest) -> None:
    count, classes = len(references.images), len(request.labels)
    if count == 0 or len(references.names) != count:
        raise BadInputError(
            "an encoder's bundle holds reference images, each with a name",
            found=f"{count} images, {len(references.names)} names",
            remedy="give some with --reference",
        )
    if references.labels is not None:
        _check_classes("reference", references.labels, count=count, classes=classes)
    elif request.labels or request.golden_labels is not None or request.holdout is not None:
        raise BadInputError(
            "an encoder knows no classes but those of its reference images",
            found="reference images without labels, and classes all the same",
            remedy="label the reference images, or leave the other labels out",
        )


def _check_classes(which: str, labels: Sequence[int], *, count: int, classes: int) -> None:
    outside = [label for label in labels if not 0 <= label < classes]
    if len(labels) != count or count == 0 or outside:
        raise BadInputError(
            f"each {which} image has a class from 0 to {classes - 1}",
            found=f"{count} images, {len(labels)} classes"
            + (f", of them {outside[0]}" if outside else ""),
            remedy="check that the images and the labels come from the same data set",
        )
