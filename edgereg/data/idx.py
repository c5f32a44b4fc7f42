"""MNIST's idx files, as Fashion-MNIST and its kin are handed out.

A file is a header of big-endian 32-bit integers and the values, one byte each:

    images  0x00000803  N  H  W     N x H x W grey levels
    labels  0x00000801  N           N labels

(The format is described with the MNIST database, Y. LeCun, C. Cortes and C. Burges.)
"""

import gzip
import struct
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgereg.data.arrays import ArrayImages
from edgereg.data.classes import name_classes, read_class_names
from edgereg.errors import DataError, nearest

__all__ = ["SPLITS", "open_idx"]

SPLITS = {"train": "train", "test": "t10k"}
"""What the files of a split begin with."""

# from the README of Fashion-MNIST (H. Xiao, K. Rasul and R. Vollgraf, 1708.07747, table 2)
_FASHION_MNIST = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
_UBYTE = 0x08  # the type of the values, in the third byte of a file; the fourth is the dimensions


def open_idx(folder: Path, split: str) -> ArrayImages:
    """Open the grey images of a split, and their labels.

    The classes are named by a labels.txt in the folder; else, in a folder called fashion-mnist, by
    that data set's names; else by their numbers.

    Args:
        folder: Holds train-images-idx3-ubyte, train-labels-idx1-ubyte and the same of t10k, each
            with or without .gz.
        split: "train" or "test".

    Raises:
        DataError: A file is missing, cut off, too long or of another kind; or a class is empty.
    """
    if split not in SPLITS:
        raise DataError(
            f"the split of idx files is one of {', '.join(SPLITS)}",
            found=f"'{split}'",
            remedy=nearest(split, SPLITS),
        )
    images_path = _find(folder, f"{SPLITS[split]}-images-idx3-ubyte")
    labels_path = _find(folder, f"{SPLITS[split]}-labels-idx1-ubyte")
    pixels = _read(images_path, dimensions=3)
    labels = _read(labels_path, dimensions=1).astype(np.int64)
    if len(pixels) != len(labels):
        raise DataError(
            "each image has a label",
            found=f"{len(pixels)} images and {len(labels)} labels in '{folder}'",
            remedy="take both files from the same data set",
        )
    name = folder.resolve().name  # it enters artefacts, where a path has no place
    names = read_class_names(folder)
    if names is None and name == "fashion-mnist":
        names = _FASHION_MNIST
    classes = name_classes(labels, names, source=f"'{labels_path}'")
    return ArrayImages(pixels, name=f"{name}:{split}", labels=labels, class_names=classes)


def _find(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise DataError(
        "a folder of idx files holds the images and the labels of the split",
        found=f"neither {name} nor {name}.gz in '{folder}'",
        remedy="check the path, and the split after the last colon",
    )


def _read(path: Path, *, dimensions: int) -> NDArray[np.uint8]:
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rb") as file:
            header = file.read(4 + 4 * dimensions)
            magic = bytes([0, 0, _UBYTE, dimensions])
            if header[:4] != magic:
                raise _damaged(path, f"it begins with {header[:4].hex()}, not {magic.hex()}")
            if len(header) < 4 + 4 * dimensions:
                raise _damaged(path, "it ends in its header")
            shape = struct.unpack(f">{dimensions}I", header[4:])
            expected = int(np.prod(shape, dtype=object))  # object: 2^96 must not overflow
            if expected == 0:
                raise _damaged(path, f"it has the shape {shape}")
            # in pieces: a header can claim what no memory holds
            values = bytearray()
            while len(values) <= expected and (piece := file.read(1 << 24)):
                values += piece
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise _damaged(path, str(error)) from error
    if len(values) != expected:
        held = "more" if len(values) > expected else f"only {len(values)}"
        raise _damaged(path, f"it should hold {expected} values, and holds {held}")
    return np.frombuffer(values, np.uint8).reshape(shape)


def _damaged(path: Path, found: str) -> DataError:
    return DataError(
        "an idx file is whole, and of unsigned bytes",
        found=f"'{path}': {found}",
        remedy="fetch it again",
    )
