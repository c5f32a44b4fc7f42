"""The names of the classes where labels are numbers: given, in a labels.txt, or the numbers."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgereg.errors import DataError

__all__ = ["LABELS_FILE", "name_classes", "read_class_names"]

LABELS_FILE = "labels.txt"


def read_class_names(folder: Path) -> tuple[str, ...] | None:
    """Return the lines of a folder's labels.txt, or None where there is no such file.

    Raises:
        DataError: It is not UTF-8 text.
    """
    path = folder / LABELS_FILE
    if not path.is_file():
        return None
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{LABELS_FILE} names one class a line, in UTF-8",
            found=f"'{path}': {error}",
            remedy="save it as UTF-8",
        ) from error
    return tuple(line.strip() for line in lines if line.strip())


def name_classes(
    labels: NDArray[np.int64], names: Sequence[str] | None, *, source: str
) -> tuple[str, ...]:
    """Return the names of the classes 0..C-1, each of which has an image.

    Args:
        labels: (N,), N >= 1.
        names: One a class, or None: the classes are called "0", "1" and so on.
        source: Where the labels come from, for the error.

    Raises:
        DataError: A label is negative or has no name, a name stands twice or is empty, or a class
            has no image.
    """
    lowest, highest = int(labels.min()), int(labels.max())
    if lowest < 0 or (names is not None and highest >= len(names)):
        known = "" if names is None else f", and there are {len(names)} class names"
        raise DataError(
            "labels are 0 to the number of classes less one",
            found=f"{lowest} to {highest} in {source}{known}",
            remedy="correct the labels or the class names",
        )
    if names is not None and ("" in names or len(set(names)) < len(names)):
        raise DataError(
            "each class has a name of its own",
            found=f"{', '.join(map(repr, names))} in {source}",
            remedy="rename them",
        )
    # from the labels that occur: one label of a billion must not make a billion names
    present = np.unique(labels)
    count = highest + 1 if names is None else len(names)
    if len(present) < count:
        first = int(np.argmax(np.append(present, -1) != np.arange(len(present) + 1)))
        raise DataError(
            "every class needs at least one image",
            found=f"none of class {first if names is None else repr(names[first])} in {source}",
            remedy="add images, or number the classes without gaps",
        )
    return tuple(names) if names is not None else tuple(str(label) for label in range(count))
