"""Classify image files and folders, one image at a time, as they are found."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from deploy.bundle.read import Bundle
from deploy.errors import BadInputError
from deploy.runtime.decode import IMAGE_SUFFIXES, decode, load_pillow
from deploy.runtime.postprocess import Guess, top_k
from deploy.runtime.preprocess import preprocess
from deploy.runtime.runner import Runner

__all__ = ["Prediction", "Unreadable", "classify"]

_MAX_FILE_BYTES = 256 << 20  # more than the largest allowed image takes without compression


@dataclass(frozen=True)
class Prediction:
    """The most probable classes of one image, best first."""

    path: Path
    top: tuple[Guess, ...]


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
    load_pillow()  # if it is missing, this is not the fault of every single image
    for path in paths:
        for source in _sources(path, seen=set()):
            if isinstance(source, Unreadable):
                yield source
                continue
            try:
                image = decode(_read(source), name=str(source))
            except (BadInputError, OSError) as error:
                yield Unreadable(source, str(error))
                continue
            logits = runner(preprocess([image], bundle.manifest.preprocessing))
            yield Prediction(source, top_k(logits[0], bundle.labels, k=top_k_count))


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
