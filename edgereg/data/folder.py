"""A folder of images: one sub-folder a class, or images without labels."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from deploy.runtime.decode import IMAGE_SUFFIXES, decode
from edgereg.errors import DataError

__all__ = ["Folder"]

_SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing"}


class Folder:
    """Images below a folder, in the order of their paths.

    Args:
        root: Holds one sub-folder a class, whose images may lie deeper; or images and no
            sub-folder.

    Raises:
        DataError: No such folder, no image, an empty class, or images beside the class folders.
    """

    shards = None  # each image is a file of its own: any order is as quick

    def __init__(self, root: Path) -> None:
        if not root.is_dir():
            raise DataError(
                "a data set is a folder of images, emoji-10:VENDOR:SPLIT, idx:FOLDER:SPLIT, "
                "FILE.npz or shards:PATTERN",
                found=f"'{root}' is no folder",
                remedy="check the path",
            )
        self._root = root
        self.name = root.resolve().name  # it enters artefacts, where a path has no place
        class_folders = sorted(p for p in root.iterdir() if p.is_dir() and p.name[0] != ".")
        loose = _images_in(root.iterdir())
        if class_folders and loose:
            raise DataError(
                "a folder holds one sub-folder a class, or images and no sub-folder",
                found=f"'{root}' holds both, such as {loose[0].name} and {class_folders[0].name}/",
                remedy="move the images into their classes' sub-folders",
            )
        self.class_names: tuple[str, ...] = tuple(folder.name for folder in class_folders)
        if class_folders and set(self.class_names) <= _SPLITS:
            raise DataError(
                "the sub-folders of a data set are its classes",
                found=f"those of '{root}' are named {', '.join(self.class_names)}",
                remedy=f"name one of them, such as '{class_folders[0]}'",
            )
        members = [_images_in(folder.rglob("*")) for folder in class_folders]
        for folder, paths in zip(class_folders, members, strict=True):
            if not paths:
                raise DataError(
                    "every class needs at least one image",
                    found=f"no {', '.join(IMAGE_SUFFIXES)} file below '{folder}'",
                    remedy="add images, or remove the sub-folder",
                )
        self._paths = [path for paths in members for path in paths] or loose
        if not self._paths:
            raise DataError(
                "a data set needs images",
                found=f"no {', '.join(IMAGE_SUFFIXES)} file in '{root}'",
                remedy="check the path; other formats must be converted first",
            )
        self.labels: NDArray[np.int64] | None = (
            np.repeat(np.arange(len(members)), [len(paths) for paths in members]).astype(np.int64)
            if members
            else None
        )

    def __len__(self) -> int:
        return len(self._paths)

    def load(self, index: int) -> NDArray[np.uint8]:
        """Return one image, (h, w, 3) RGB.

        Raises:
            BadInputError: The file is damaged or no image; it is named.
        """
        return decode(self.encoded(index), name=str(self._paths[index]))

    def encoded(self, index: int) -> bytes:
        """Return one image as the file's bytes."""
        return self._paths[index].read_bytes()

    def content(self, index: int) -> bytes:
        """Return one image as the file's bytes."""
        return self.encoded(index)

    def image_name(self, index: int) -> str:
        """Return the file's path below the folder."""
        return self._paths[index].relative_to(self._root).as_posix()


def _images_in(paths: Iterable[Path]) -> list[Path]:
    return sorted(
        path for path in paths if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()
    )
