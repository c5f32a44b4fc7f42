"""What every data set offers, and how one is opened by name."""

import hashlib
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edgereg.data.emoji10 import Emoji10
from edgereg.data.folder import Folder
from edgereg.errors import DataError

__all__ = [
    "FewLabels",
    "Images",
    "check_classes",
    "digest",
    "evenly",
    "labels_of",
    "open_images",
]


class Images(Protocol):
    """Images addressed by index, so that a memory bank or a resume can name each one."""

    @property
    def name(self) -> str:
        """Return what the user called it."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Return the class of each label; empty where there are no labels."""

    @property
    def labels(self) -> NDArray[np.int64] | None:
        """Return (N,) labels in 0..C-1, or None where there are none."""

    def __len__(self) -> int: ...

    def load(self, index: int) -> NDArray[np.uint8]:
        """Return one image, (h, w, 3) RGB."""

    def encoded(self, index: int) -> bytes:
        """Return one image as a PNG or JPEG file, as a camera or a user would hand it in."""


def open_images(name: str) -> Images:
    """Open `emoji-10:VENDOR:SPLIT`, or a folder.

    Args:
        name: `emoji-10:twitter:train` (vendor twitter, google or both; split train or test), or
            the path of a folder with one sub-folder a class, or with images and no sub-folder.

    Raises:
        DataError: There is no such data set, or no image in it.
    """
    kind, *rest = name.split(":")
    if kind == "emoji-10":
        if len(rest) != 2:
            raise DataError(
                "emoji-10 is named emoji-10:VENDOR:SPLIT",
                found=f"'{name}'",
                remedy="write emoji-10:twitter:train, for instance",
            )
        return Emoji10(vendor=rest[0], split=rest[1])
    return Folder(Path(name))


class FewLabels:
    """A share of each class, and at least two images of it; the rest is not looked at.

    Args:
        images: Labelled.
        share: In (0, 1].
        seed: Decides which.
    """

    def __init__(self, images: Images, share: float, *, seed: int) -> None:
        labels = labels_of(images)
        rng = np.random.default_rng(seed)
        chosen = []
        for label in range(len(images.class_names)):
            members = np.flatnonzero(labels == label)
            count = max(2, round(share * len(members)))
            chosen.append(np.sort(rng.permutation(members)[:count]))
        self._images, self._chosen = images, np.concatenate(chosen)
        self.name = f"{images.name} ({share:.0%} of the labels)"
        self.class_names = images.class_names
        self.labels: NDArray[np.int64] | None = labels[self._chosen]

    def __len__(self) -> int:
        return len(self._chosen)

    def load(self, index: int) -> NDArray[np.uint8]:
        """Return one image, (h, w, 3) RGB."""
        return self._images.load(int(self._chosen[index]))

    def encoded(self, index: int) -> bytes:
        """Return one image as a file."""
        return self._images.encoded(int(self._chosen[index]))


def evenly(labels: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """Return up to `count` indices that take from each class in turn, in increasing order.

    Args:
        labels: (N,).
        count: As many as the classes at least, so that each is shown.
    """
    rank = np.empty(len(labels), np.int64)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        rank[members] = np.arange(len(members))
    return np.sort(np.argsort(rank, kind="stable")[:count])


def labels_of(images: Images) -> NDArray[np.int64]:
    """Return the labels of a data set that must have them.

    Raises:
        DataError: It has none.
    """
    if images.labels is None:
        raise DataError(
            "this command needs labels: one sub-folder a class",
            found=f"'{images.name}' has images and no sub-folder",
            remedy="sort the images into sub-folders; only `edgereg pretrain` needs no labels",
        )
    return images.labels


def check_classes(images: Images, class_names: tuple[str, ...]) -> None:
    """Refuse a data set whose classes are not the model's, in the same order.

    Raises:
        DataError: They differ; the classes that are missing or extra are named.
    """
    if images.class_names == class_names:
        return
    missing = sorted(set(class_names) - set(images.class_names))
    extra = sorted(set(images.class_names) - set(class_names))
    found = f"'{images.name}' lacks {missing or 'none'} and adds {extra or 'none'}"
    if not missing and not extra:
        found = f"'{images.name}' has {images.class_names}: the same in another order"
    raise DataError(
        "the classes of the data must be those that the model was trained on, in their order",
        found=found,
        remedy="rename the sub-folders, or train on these classes",
    )


def digest(images: Images) -> str:
    """Return the SHA-256 over every image file and label, which names the data in an artefact."""
    total = hashlib.sha256()
    labels = images.labels
    for index in range(len(images)):
        total.update(hashlib.sha256(images.encoded(index)).digest())
        if labels is not None:
            total.update(images.class_names[labels[index]].encode() + b"\0")
    return total.hexdigest()
