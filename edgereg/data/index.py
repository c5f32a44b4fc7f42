"""The index of a checked data set: a file by which training skips what was set aside.

format_version  1
data, digest    the data set's name and the SHA-256 over its images and labels
images          [name, SHA-256 of the content], in order
quarantined     {index in `images`: reason}
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from deploy.publish import check_new_file, publish_text
from edgereg.data.images import Images, Subset, combine_digest
from edgereg.data.report import DataReport
from edgereg.errors import DataError

__all__ = ["FORMAT_VERSION", "apply_index", "write_index"]

FORMAT_VERSION = 1

_KEYS = {"format_version", "data", "digest", "images", "quarantined"}


def write_index(report: DataReport, path: Path, *, force: bool = False) -> None:
    """Write the index of a data set, whole or not at all.

    Raises:
        BadInputError: There is such a file, and `force` is not given.
    """
    check_new_file(path, what="an index", force=force)
    # a line for each image, so that two versions can be compared by diff
    images = ",\n".join(
        f"  {json.dumps(pair)}" for pair in zip(report.image_names, report.hashes, strict=True)
    )
    head = {"format_version": FORMAT_VERSION, "data": report.name, "digest": report.digest}
    quarantined = json.dumps(report.quarantined, indent=1)
    fields = "".join(f' "{key}": {json.dumps(value)},\n' for key, value in head.items())
    publish_text(
        path, f'{{\n{fields} "images": [\n{images}\n ],\n "quarantined": {quarantined}\n}}\n'
    )


def apply_index(images: Images, path: Path) -> tuple[Images, int]:
    """Return the images without those that the index sets aside, and how many these are.

    Every image is read, though not decoded, to see that the index is about this very data.

    Raises:
        DataError: The index is damaged, is of other data, or leaves a class without an image.
    """
    index = _read(path)
    hashes = [hashlib.sha256(images.content(at)).digest() for at in range(len(images))]
    if combine_digest(images, hashes) != index["digest"]:
        raise DataError(
            "an index belongs to the data that was checked",
            found=_difference(images, hashes, index["images"], path),
            remedy="run `edgereg data check --out` again",
        )
    is_kept = np.ones(len(images), bool)
    is_kept[[int(at) for at in index["quarantined"]]] = False
    kept, skipped = np.flatnonzero(is_kept), int((~is_kept).sum())
    if not skipped:
        return images, 0
    _check_classes_remain(images, kept, path)
    return Subset(images, kept, name=f"{images.name} (without {skipped} set aside)"), skipped


def _read(path: Path) -> dict[str, Any]:
    try:
        index = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(path, str(error)) from error
    if not isinstance(index, dict) or index.get("format_version") != FORMAT_VERSION:
        version = index.get("format_version") if isinstance(index, dict) else None
        raise _damaged(path, f"format {version!r}; this edgereg reads {FORMAT_VERSION}")
    if index.keys() != _KEYS:
        raise _damaged(path, f"the keys {', '.join(sorted(index))}")
    entries, quarantined = index["images"], index["quarantined"]
    is_list = isinstance(entries, list) and all(
        isinstance(entry, list) and len(entry) == 2 and all(isinstance(x, str) for x in entry)
        for entry in entries
    )
    if not is_list or not isinstance(quarantined, dict):
        raise _damaged(path, "images or quarantined of another kind")
    for at in quarantined:
        if not at.isdecimal() or int(at) >= len(entries):
            raise _damaged(path, f"image {at!r} set aside, of {len(entries)}")
    return index


def _difference(images: Images, hashes: list[bytes], entries: list[list[str]], path: Path) -> str:
    """Say where the data and the index part."""
    if len(hashes) != len(entries):
        return f"'{path}' lists {len(entries)} images, and '{images.name}' has {len(hashes)}"
    for at, (found, (name, expected)) in enumerate(zip(hashes, entries, strict=True)):
        if images.image_name(at) != name:
            return f"'{path}' lists {name} where '{images.name}' has {images.image_name(at)}"
        if found.hex() != expected:
            return f"{name} has changed since '{path}' was written"
    return f"the labels of '{images.name}' have changed since '{path}' was written"


def _check_classes_remain(images: Images, kept: np.ndarray[Any, Any], path: Path) -> None:
    if images.labels is None:
        return
    counts = np.bincount(images.labels[kept], minlength=len(images.class_names))
    if not counts.all():
        raise DataError(
            "every class needs at least one image",
            found=f"'{path}' sets all of {images.class_names[int(counts.argmin())]} aside",
            remedy="add images, or remove the class",
        )


def _damaged(path: Path, found: str) -> DataError:
    return DataError(
        "an index is a file that `edgereg data check --out` wrote",
        found=f"'{path}': {found}",
        remedy="write it again",
    )
