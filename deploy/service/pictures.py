"""Where pictures come from: files, folders, patterns and arrays, one after the other.

A path that gives no picture is reported in its place, and does not stop the others. An array (.npy)
holds pixels, (h, w, 3) or (N, h, w, 3) uint8, or what the model takes, of its own type and shape:
this needs no Pillow.
"""

import io
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploy.errors import BadInputError
from deploy.runtime.decode import IMAGE_SUFFIXES, decode, load_pillow
from deploy.runtime.preprocess import Preprocessing, preprocess

__all__ = ["ARRAY_SUFFIX", "Frame", "Unreadable", "expand", "read_frames"]

ARRAY_SUFFIX = ".npy"

_MAX_FILE_BYTES = 256 << 20  # more than the largest allowed image takes without compression
_MAX_ARRAY_BYTES = 2 << 30


@dataclass(frozen=True)
class Frame:
    """One picture.

    Attributes:
        name: Its path; of one of several in a file, with its place: "clip.npy[3]".
        tensor: What the model takes of it, (1, ...).
        pixels: (h, w, 3) uint8, or None where only the tensor is known.
        time_s: When it was taken: of a film from its start, of a camera by the device's clock that
            never goes back. None for files.
    """

    name: str
    tensor: NDArray[Any]
    pixels: NDArray[np.uint8] | None
    time_s: float | None = None


@dataclass(frozen=True)
class Unreadable:
    """A path that gave no picture, and why."""

    path: Path
    error: str


def expand(text: str) -> list[Path]:
    """Return the paths that a pattern with *, ? or [] matches, in order; else the path itself.

    A path that exists is not taken for a pattern: "[1].png" may be a file's name.
    """
    path = Path(text)
    if not any(letter in text for letter in "*?[") or path.exists():
        return [path]
    root = Path(path.anchor) if path.is_absolute() else Path()
    pattern = str(path.relative_to(path.anchor)) if path.is_absolute() else text
    return sorted(root.glob(pattern)) or [path]


def read_frames(paths: Sequence[Path], spec: Preprocessing) -> Iterator[Frame | Unreadable]:
    """Read files, and the images in folders and their sub-folders, in sorted order.

    In a folder only files with an image's suffix are taken; a file that is named itself always is.

    Args:
        paths: Files and folders.
        spec: What is done to a picture.

    Raises:
        BadInputError: Pillow is missing, and a path is no array.
    """
    for path in paths:
        for source in _files(path, seen=set()):
            if isinstance(source, Unreadable):
                yield source
                continue
            is_array = source.suffix.lower() == ARRAY_SUFFIX
            if not is_array:
                load_pillow()  # if it is missing, this is not the fault of every single image
            try:
                frames = _read_array(source, spec) if is_array else _read_image(source, spec)
            except (BadInputError, OSError) as error:
                yield Unreadable(source, str(error))
                continue
            yield from frames


def _files(path: Path, *, seen: set[Path]) -> Iterator[Path | Unreadable]:
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
        yield from _files(child, seen=seen)


def _read_image(path: Path, spec: Preprocessing) -> list[Frame]:
    pixels = decode(_read(path, limit=_MAX_FILE_BYTES), name=str(path))
    return [Frame(str(path), preprocess([pixels], spec), pixels)]


def _read_array(path: Path, spec: Preprocessing) -> Iterator[Frame]:
    try:
        file = io.BytesIO(_read(path, limit=_MAX_ARRAY_BYTES))
        array = np.load(file, allow_pickle=False)
    except (ValueError, EOFError, MemoryError) as error:
        raise _not_pictures(path, spec, str(error)) from error
    if not isinstance(array, np.ndarray):
        raise _not_pictures(path, spec, "an archive of arrays")
    batch = array if array.ndim == 4 else array[np.newaxis]
    is_input = batch.dtype == spec.input_dtype and batch.shape[1:] == spec.input_shape
    is_pixels = batch.dtype == np.uint8 and batch.ndim == 4 and batch.shape[3] == 3
    if batch.size == 0 or not (is_input or is_pixels):
        raise _not_pictures(path, spec, f"{array.dtype} {array.shape}")
    return _array_frames(path, array.ndim == 4, batch, spec if not is_input else None)


def _array_frames(
    path: Path, are_several: bool, batch: NDArray[Any], spec: Preprocessing | None
) -> Iterator[Frame]:
    """Yield the pictures of an array; without pre-processing they are what the model takes."""
    for place, image in enumerate(batch):
        name = f"{path}[{place}]" if are_several else str(path)
        if spec is None:
            yield Frame(name, image[np.newaxis], image if image.dtype == np.uint8 else None)
        else:
            yield Frame(name, preprocess([image], spec), image)


def _read(path: Path, *, limit: int) -> bytes:
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        status = None
    if status is None or not stat.S_ISREG(status.st_mode):  # a pipe could wait for ever
        raise BadInputError(
            "an image must be a file", found=f"'{path}' is not", remedy="check the path"
        )
    if status.st_size > limit:
        raise BadInputError(
            f"an image file may have {limit} bytes",
            found=f"'{path}' has {status.st_size}",
            remedy="scale the image down first",
        )
    return path.read_bytes()


def _not_pictures(path: Path, spec: Preprocessing, found: str) -> BadInputError:
    return BadInputError(
        "an array holds pixels, uint8 (h, w, 3) or (N, h, w, 3), or the model's input, "
        f"{spec.input_dtype} {('N', *spec.input_shape)}",
        found=f"'{path}': {found}",
        remedy="save it so, without objects",
    )
