"""Images, labels and class names in one .npz file, as `numpy.savez` writes it."""

import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgereg.data.arrays import ArrayImages
from edgereg.data.classes import name_classes
from edgereg.errors import DataError, nearest

__all__ = ["open_npz"]

_KEYS = ("images", "labels", "class_names")


def open_npz(path: Path) -> ArrayImages:
    """Open a file with the array `images` and, where there are labels, `labels` and `class_names`.

    `images` is (N, H, W, 3), (N, H, W, 1) or (N, H, W) uint8; `labels` (N,) integers in 0..C-1;
    `class_names` C strings, by default the numbers.

    Raises:
        DataError: The file is damaged; or an array is missing, unknown, or of another shape or
            type.
    """
    arrays = _read(path)
    if unknown := sorted(arrays.keys() - set(_KEYS)):
        raise _refusal(path, f"an array '{unknown[0]}'", nearest(unknown[0], _KEYS))
    if "images" not in arrays:
        raise _refusal(path, "no array 'images'", "add it")
    images = arrays["images"]
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or images.size == 0:
        raise _refusal(path, f"images {images.shape} {images.dtype}", "convert them to uint8")
    if images.ndim == 4 and images.shape[3] not in (1, 3):
        raise _refusal(path, f"images {images.shape}", "put the 1 or 3 channels last")
    if images.ndim == 4 and images.shape[3] == 1:
        images = images[:, :, :, 0]
    labels, names = arrays.get("labels"), arrays.get("class_names")
    if labels is None:
        if names is not None:
            raise _refusal(path, "class names and no labels", "add 'labels', or leave both out")
        return ArrayImages(images, name=path.name, labels=None, class_names=())
    if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]:
        raise _refusal(
            path,
            f"labels {labels.shape} {labels.dtype} for {len(images)} images",
            "give each image one whole number",
        )
    if names is not None and (names.dtype.kind != "U" or names.ndim != 1):
        raise _refusal(path, f"class_names {names.shape} {names.dtype}", "make it (C,) strings")
    labels = labels.astype(np.int64)
    classes = name_classes(
        labels, None if names is None else [str(name) for name in names], source=f"'{path}'"
    )
    return ArrayImages(images, name=path.name, labels=labels, class_names=classes)


def _read(path: Path) -> dict[str, NDArray[Any]]:
    try:
        with path.open("rb") as file:  # which numpy would leave open after some errors
            archive = np.load(file, allow_pickle=False)
            if isinstance(archive, np.ndarray):
                raise _refusal(path, "one array, as numpy.save writes", "write it by numpy.savez")
            return {key: archive[key] for key in archive.files}
    except FileNotFoundError as error:
        raise _refusal(path, "no such file", "check the path") from error
    # numpy raises ValueError for pickled objects and for what is no archive at all
    except (ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise _refusal(path, str(error).splitlines()[0], "write it again by numpy.savez") from error


def _refusal(path: Path, found: str, remedy: str) -> DataError:
    return DataError(
        "an .npz data set holds images (N, H, W[, 1 or 3]) uint8, and may hold labels (N,) and "
        "class_names (C,)",
        found=f"'{path}': {found}",
        remedy=remedy,
    )
