"""What every data set offers, how one is opened by name, and what is asked of all."""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edgereg.data.emoji10 import Emoji10
from edgereg.data.folder import Folder
from edgereg.data.idx import open_idx
from edgereg.data.npz import open_npz
from edgereg.data.shards import Shards
from edgereg.errors import DataError

__all__ = [
    "FewLabels",
    "Images",
    "Subset",
    "check_classes",
    "combine_digest",
    "digest",
    "epoch_order",
    "evenly",
    "labels_of",
    "open_images",
    "split_validation",
]

_WINDOW = 4  # shards among which an epoch is shuffled


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

    @property
    def shards(self) -> NDArray[np.int64] | None:
        """Return (N,) the file that each image is in, or None where any order is as quick."""

    def __len__(self) -> int: ...

    def load(self, index: int) -> NDArray[np.uint8]:
        """Return one image, (h, w, 3) RGB."""

    def encoded(self, index: int) -> bytes:
        """Return one image as a PNG or JPEG file, as a camera or a user would hand it in."""

    def content(self, index: int) -> bytes:
        """Return what the digest of the data is taken over: the file, or size and pixels."""

    def image_name(self, index: int) -> str:
        """Return what to call one image in a report."""


def open_images(name: str) -> Images:
    """Open a data set by its name.

    Args:
        name: One of

            * `emoji-10:twitter:train`: vendor twitter, google or both; split train or test;
            * `idx:FOLDER:train` or `:test`: MNIST's files, see `open_idx`;
            * `FILE.npz`: arrays, see `open_npz`;
            * `shards:PATTERN`: tar files, see `Shards`;
            * a folder with one sub-folder a class, or with images and no sub-folder.

    Raises:
        DataError: There is no such data set, or no image in it.
    """
    kind, _, rest = name.partition(":")
    if kind == "emoji-10":
        vendor, _, split = rest.partition(":")
        if not vendor or not split or ":" in split:
            raise DataError(
                "emoji-10 is named emoji-10:VENDOR:SPLIT",
                found=f"'{name}'",
                remedy="write emoji-10:twitter:train, for instance",
            )
        return Emoji10(vendor=vendor, split=split)
    if kind == "idx":
        folder, _, split = rest.rpartition(":")
        if not folder:
            raise DataError(
                "idx files are named idx:FOLDER:SPLIT",
                found=f"'{name}'",
                remedy="write idx:fashion-mnist:train, for instance",
            )
        return open_idx(Path(folder), split)
    if kind == "shards":
        return Shards(rest)
    path = Path(name)
    return open_npz(path) if path.suffix == ".npz" and not path.is_dir() else Folder(path)


class Subset:
    """Some images of a data set, in an order of their own; the classes stay all.

    Args:
        images: The whole.
        indices: (n,) which.
        name: By default the whole's, and how many.
    """

    def __init__(
        self, images: Images, indices: NDArray[np.int64], *, name: str | None = None
    ) -> None:
        self._images, self._indices = images, indices
        self.name = name or f"{images.name} ({len(indices)} of {len(images)})"
        self.class_names = images.class_names
        self.labels = None if images.labels is None else images.labels[indices]
        self.shards = None if images.shards is None else images.shards[indices]

    def __len__(self) -> int:
        return len(self._indices)

    def load(self, index: int) -> NDArray[np.uint8]:
        """Return one image, (h, w, 3) RGB."""
        return self._images.load(int(self._indices[index]))

    def encoded(self, index: int) -> bytes:
        """Return one image as a file."""
        return self._images.encoded(int(self._indices[index]))

    def content(self, index: int) -> bytes:
        """Return what the digest of the data is taken over."""
        return self._images.content(int(self._indices[index]))

    def image_name(self, index: int) -> str:
        """Return what the whole calls the image."""
        return self._images.image_name(int(self._indices[index]))


class FewLabels(Subset):
    """A share of each class; the rest is not looked at.

    With one seed the images of a share are among those of every larger share.

    Args:
        images: Labelled.
        share: In (0, 1].
        seed: Decides which.
        least: Images of each class, at least.
    """

    def __init__(self, images: Images, share: float, *, seed: int, least: int = 2) -> None:
        rng = np.random.default_rng(seed)
        chosen = []
        for members in _by_class(images):
            count = max(least, round(share * len(members)))
            chosen.append(np.sort(rng.permutation(members)[:count]))
        name = f"{images.name} ({100 * share:g}% of the labels)"
        super().__init__(images, np.concatenate(chosen), name=name)


def split_validation(images: Images, share: float, *, seed: int) -> tuple[Subset, Subset]:
    """Split a training set, so that choices can be made without a look at the test set.

    Args:
        images: Labelled; two of each class at least.
        share: Of each class that is held out, in (0, 1); at least one image is, and one is not.
        seed: Decides which.

    Returns:
        The part to train on and the part to validate on, each in the order of the whole.

    Raises:
        DataError: `share` is out of its range, there are no labels, or a class has one image.
    """
    if not 0 < share < 1:
        raise DataError(
            "the share that is held out is above 0 and below 1",
            found=f"{share}",
            remedy="hold out 0.1, for instance",
        )
    rng = np.random.default_rng(seed)
    is_held_out = np.zeros(len(images), bool)
    for name, members in zip(images.class_names, _by_class(images), strict=True):
        if len(members) < 2:
            raise DataError(
                "a class needs two images, one to train on and one to validate on",
                found=f"'{name}' of '{images.name}' has {len(members)}",
                remedy="add images",
            )
        count = min(max(1, round(share * len(members))), len(members) - 1)
        is_held_out[rng.permutation(members)[:count]] = True
    return (
        Subset(images, np.flatnonzero(~is_held_out), name=f"{images.name} ({1 - share:.0%} kept)"),
        Subset(images, np.flatnonzero(is_held_out), name=f"{images.name} ({share:.0%} held out)"),
    )


def _by_class(images: Images) -> list[NDArray[np.int64]]:
    labels = labels_of(images)
    return [np.flatnonzero(labels == label) for label in range(len(images.class_names))]


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


def epoch_order(images: Images, *, seed: int, epoch: int) -> NDArray[np.int64]:
    """Return the indices 0..N-1 in the order of one epoch: a function of its arguments alone.

    Any order is as likely as another, except for images in shards: the shards are shuffled, and
    then the images of each few neighbours, so that reads stay within some files at a time.
    """
    rng = np.random.default_rng([seed, epoch])
    if images.shards is None:
        return rng.permutation(len(images))
    present = rng.permutation(np.unique(images.shards))
    # one sort instead of a search for each shard: there may be thousands
    by_shard = np.argsort(images.shards, kind="stable")
    ordered = images.shards[by_shard]
    first, last = np.searchsorted(ordered, present), np.searchsorted(ordered, present, "right")
    members = [by_shard[a:b] for a, b in zip(first, last, strict=True)]
    windows = (np.concatenate(members[at : at + _WINDOW]) for at in range(0, len(members), _WINDOW))
    return np.concatenate([rng.permutation(window) for window in windows])


def labels_of(images: Images) -> NDArray[np.int64]:
    """Return the labels of a data set that must have them.

    Raises:
        DataError: It has none.
    """
    if images.labels is None:
        raise DataError(
            "this command needs labels: one sub-folder a class, or labels beside the images",
            found=f"'{images.name}' has images and no labels",
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
    """Return the SHA-256 over every image and label, which names the data in an artefact.

    All images are read, and none is decoded: a damaged one has a digest, too.
    """
    contents = (images.content(index) for index in range(len(images)))
    return combine_digest(images, (hashlib.sha256(content).digest() for content in contents))


def combine_digest(images: Images, hashes: Iterable[bytes]) -> str:
    """Return `digest` from the SHA-256 of each image's content."""
    total = hashlib.sha256()
    labels = images.labels
    for index, content in enumerate(hashes):
        total.update(content)
        if labels is not None:
            total.update(images.class_names[labels[index]].encode() + b"\0")
    return total.hexdigest()
