"""Answer to image files and folders, one image at a time, as they are found."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from deploy.bundle.index import read_index
from deploy.bundle.read import Bundle
from deploy.errors import BadInputError
from deploy.runtime.decode import IMAGE_SUFFIXES, decode, load_pillow
from deploy.runtime.neighbours import Neighbour
from deploy.runtime.postprocess import Guess, top_k
from deploy.runtime.preprocess import preprocess
from deploy.runtime.runner import Runner

__all__ = ["Prediction", "Retrieval", "Unreadable", "classify", "retrieve"]

_MAX_FILE_BYTES = 256 << 20  # more than the largest allowed image takes without compression


@dataclass(frozen=True)
class Prediction:
    """The most probable classes of one image, best first."""

    path: Path
    top: tuple[Guess, ...]


@dataclass(frozen=True)
class Retrieval:
    """The reference images nearest to one image, and what they vote for, best first.

    `vote` is empty where the references have no labels.
    """

    path: Path
    nearest: tuple[Neighbour, ...]
    vote: tuple[Guess, ...]


@dataclass(frozen=True)
class Unreadable:
    """A path that gave no image, and why."""

    path: Path
    error: str


def classify(
    bundle: Bundle, runner: Runner, paths: Sequence[Path], *, top_k_count: int
) -> Iterator[Prediction | Unreadable]:
    """Classify files, and the images in folders and their sub-folders, in sorted order.

    An image that cannot be read is reported in its place, and does not stop the others. In a folder
    only files with an image's suffix are taken; a file that is named itself always is.

    Args:
        bundle: The opened bundle.
        runner: One of its variants, loaded.
        paths: Files and folders.
        top_k_count: How many classes to report for each image.

    Raises:
        BadInputError: Pillow is missing.
        CheckFailedError: The model's output is not finite.
    """
    for path, logits in _outputs(bundle, runner, paths):
        if isinstance(logits, str):
            yield Unreadable(path, logits)
        else:
            yield Prediction(path, top_k(logits, bundle.labels, k=top_k_count))


def retrieve(
    bundle: Bundle, runner: Runner, paths: Sequence[Path], *, top_k_count: int
) -> Iterator[Retrieval | Unreadable]:
    """Find the reference images nearest to each image; files and folders are as in `classify`.

    Args:
        bundle: The opened bundle of an encoder.
        runner: One of its variants, loaded.
        paths: Files and folders.
        top_k_count: How many neighbours, and classes, to report for each image.

    Raises:
        BadInputError: Pillow is missing, or the bundle has no index that can be used.
        CheckFailedError: The model's output is not finite, or zero.
    """
    index = read_index(bundle)
    if index is None:
        raise BadInputError(
            "neighbours are found in the index of an encoder's bundle",
            found=f"bundle '{bundle.path.name}' is a classifier's",
            remedy="classify with it, or export its backbone with --encoder",
        )
    for path, embedding in _outputs(bundle, runner, paths):
        if isinstance(embedding, str):
            yield Unreadable(path, embedding)
        else:
            yield Retrieval(path, *index.nearest(embedding, k=top_k_count))


def _outputs(
    bundle: Bundle, runner: Runner, paths: Sequence[Path]
) -> Iterator[tuple[Path, NDArray[np.float32] | str]]:
    """Yield the model's output for each image, or why there is none."""
    load_pillow()  # if it is missing, this is not the fault of every single image
    for path in paths:
        for source in _sources(path, seen=set()):
            if isinstance(source, Unreadable):
                yield source.path, source.error
                continue
            try:
                image = decode(_read(source), name=str(source))
            except (BadInputError, OSError) as error:
                yield source, str(error)
                continue
            yield source, runner(preprocess([image], bundle.manifest.preprocessing))[0]


def _sources(path: Path, *, seen: set[Path]) -> Iterator[Path | Unreadable]:
    if not path.is_dir():
        yield path
        return
    if path.resolve() in seen:  # a link back up, which would never end
        return
    seen.add(path.resolve())
    try:
        children = sorted(path.iterdir())
    except OSError as error:
        yield Unreadable(path, str(error))
        return
    images = [c for c in children if c.is_dir() or c.suffix.lower() in IMAGE_SUFFIXES]
    if not images:
        yield Unreadable(path, f"no {', '.join(IMAGE_SUFFIXES)} in this folder")
    for child in images:
        yield from _sources(child, seen=seen)


def _read(path: Path) -> bytes:
    if not path.is_file():  # missing; or a pipe, which could wait for ever
        raise BadInputError(
            "an image must be a file", found=f"'{path}' is not", remedy="check the path"
        )
    if path.stat().st_size > _MAX_FILE_BYTES:
        raise BadInputError(
            f"an image file may have {_MAX_FILE_BYTES} bytes",
            found=f"'{path}' has {path.stat().st_size}",
            remedy="scale the image down first",
        )
    return path.read_bytes()
