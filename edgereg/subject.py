"""What an export is of, a classifier or an encoder, and the images that it is judged on."""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray
from torch import nn

from edgereg.checkpoint import Checkpoint, load_backbone, load_classifier
from edgereg.data.images import Images, Subset, check_classes, evenly, labels_of
from edgereg.errors import DataError
from export.precision.calibrate import calibration_provenance
from export.request import MIN_GOLDEN, References

__all__ = ["MAX_REFERENCES", "Decoded", "Subject", "classifier", "encoder", "spread_out"]

MAX_REFERENCES = 4096  # images of an encoder's index


@dataclass(frozen=True)
class Subject:
    """A model, and what it is judged by.

    Args:
        model: In evaluation mode.
        checkpoint: Where it comes from.
        class_names: Of a classifier, or of an encoder's reference images; may be empty.
        images: That it is judged on.
        labels: (N,) theirs, into `class_names`; None for an encoder where they are not known.
        references: Of an encoder.
        provenance: Of the references, as JSON values.
    """

    model: nn.Module
    checkpoint: Checkpoint
    class_names: tuple[str, ...]
    images: Images
    labels: NDArray[np.int64] | None
    references: References | None
    provenance: Mapping[str, Any]


def classifier(path: Path, images: Images) -> Subject:
    """Load a classifier, and insist that the images have its classes.

    Raises:
        CheckpointError, DataError: It is none, or they have not.
    """
    model, checkpoint = load_classifier(path)
    labels = labels_of(images)
    check_classes(images, checkpoint.class_names)
    return Subject(model, checkpoint, checkpoint.class_names, images, labels, None, {})


def encoder(
    path: Path, images: Images, reference: Images | None, *, on_stage: Callable[[str], None]
) -> Subject:
    """Load a backbone, and draw the reference images of its index.

    Args:
        path: An encoder's or a classifier's checkpoint.
        images: To judge it on. Labels are needed for a measured accuracy only.
        reference: Images to draw from; without, they are half of `images`, and no longer judged on.
        on_stage: Told what is left out.

    Raises:
        CheckpointError, DataError: It is no checkpoint, there are too few images, or some of a
            class that the references do not have.
    """
    model, _, checkpoint = load_backbone(path)
    if reference is None:
        if len(images) < 2 * MIN_GOLDEN:
            raise DataError(
                f"half of the images become an encoder's references, and {MIN_GOLDEN} at least are "
                "judged",
                found=f"'{images.name}' has {len(images)}",
                remedy="add images, or name others with --reference",
            )
        chosen = _draw(images, min(MAX_REFERENCES, len(images) // 2))
        drawn = Subset(images, chosen)
        judged: Images = Subset(images, np.setdiff1d(np.arange(len(images)), chosen))
    else:
        drawn, judged = Subset(reference, _draw(reference, MAX_REFERENCES)), images
    whole = len(drawn)
    seen = set(_hashes(judged))
    drawn = Subset(drawn, np.flatnonzero([each not in seen for each in _hashes(drawn)]))
    if len(drawn) < whole:
        on_stage(f"{whole - len(drawn)} reference images are judged on as well: left out")
    if not len(drawn):
        raise DataError(
            "an encoder's references are other images than those that it is judged on",
            found=f"all {whole} of '{(reference or images).name}' are the same",
            remedy="name other images with --reference",
        )
    labels = _labels_among(judged, drawn)
    if labels is None:
        on_stage("without labels on both sides no accuracy is measured: judged by neighbours alone")
    return Subject(
        model,
        checkpoint,
        class_names=() if drawn.labels is None else drawn.class_names,
        images=judged,
        labels=labels,
        references=References(
            images=Decoded(drawn, np.arange(len(drawn))),
            names=[drawn.image_name(index) for index in range(len(drawn))],
            labels=None if drawn.labels is None else drawn.labels.tolist(),
        ),
        provenance={
            "reference_data": {
                "name": (reference or images).name,
                "of": len(reference or images),
                **calibration_provenance(drawn.encoded(i) for i in range(len(drawn))).to_json(),
            }
        },
    )


def spread_out(labels: NDArray[np.int64] | None, count: int, *, size: int) -> NDArray[np.int64]:
    """Return `count` indices below `size`: from each class in turn, or evenly spaced."""
    if labels is not None:
        return evenly(labels, count)
    spaced: NDArray[np.int64] = np.linspace(0, size - 1, min(count, size)).round().astype(np.int64)
    return spaced


def _labels_among(images: Images, references: Images) -> NDArray[np.int64] | None:
    """Return (N,) the images' classes as the references number them; None if either has none.

    Raises:
        DataError: An image is of a class that no vote could name.
    """
    if images.labels is None or references.labels is None:
        return None
    shown = {images.class_names[label] for label in np.unique(images.labels)}
    if unknown := sorted(shown - set(references.class_names)):
        raise DataError(
            "the classes of the images must be among those of the references, which vote",
            found=f"'{images.name}' has {', '.join(unknown[:3])}, and '{references.name}' not",
            remedy="give references of these classes, or images without labels",
        )
    places = {name: place for place, name in enumerate(references.class_names)}
    numbers = np.array([places.get(name, -1) for name in images.class_names], np.int64)
    return numbers[images.labels]


def _draw(images: Images, count: int) -> NDArray[np.int64]:
    """Draw up to so many images at random, from each class in turn, always the same ones."""
    order = np.random.default_rng(0).permutation(len(images))
    labels = np.zeros(len(images), np.int64) if images.labels is None else images.labels
    return np.sort(order[evenly(labels[order], count)])


def _hashes(images: Images) -> Iterable[bytes]:
    return (hashlib.sha256(images.encoded(index)).digest() for index in range(len(images)))


class Decoded(Sequence[NDArray[np.uint8]]):
    """The images of some indices, each decoded when it is asked for."""

    def __init__(self, images: Images, indices: NDArray[np.int64]) -> None:
        self._images, self._indices = images, indices

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, place: int) -> NDArray[np.uint8]: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[NDArray[np.uint8]]: ...
    def __getitem__(self, place: int | slice) -> NDArray[np.uint8] | Sequence[NDArray[np.uint8]]:
        if isinstance(place, slice):
            return Decoded(self._images, self._indices[place])
        return self._images.load(int(self._indices[place]))
