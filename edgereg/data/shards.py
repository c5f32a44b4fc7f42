"""Images in uncompressed tar files, laid out as webdataset does.

Members whose path is the same up to the first dot of the file's name belong together:

    0001.jpg   0001.cls     the image, and its class as a number or a name
    0002.png   0002.json    the same, with the class as {"label": ...}

Each shard's headers are read once, so that an image is a seek and a read away. That is what makes
per-image draws, memory banks and resumes exact, and why a pipe or a compressed tar will not do.
"""

import json
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from deploy.runtime.decode import IMAGE_SUFFIXES, decode
from edgereg.data.classes import name_classes, read_class_names
from edgereg.errors import DataError

__all__ = ["Shards", "expand"]

_BLOCK = 512  # a tar file is made of these; two of zeros end it (POSIX.1-2017, pax, ustar format)
_LABEL_LIMIT_BYTES = 1 << 20
_GROUP = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")

_Label = int | str


@dataclass
class _Sample:
    """The members of one key."""

    image: tuple[str, int, int] | None = None  # the member's name, where it begins, its bytes
    labels: dict[str, _Label] = field(default_factory=dict)  # by the suffix of the member


class Shards:
    """The images of tar files, in the order of the files and of the members in them.

    The classes are the lines of a labels.txt beside the first shard; else the names that occur,
    sorted, or the numbers.

    Args:
        pattern: Path of the shards, with {000..031}, {a,b}, and in the file's name * or ?.

    Raises:
        DataError: There is no shard, or one is compressed, cut off or damaged; a key has no image,
            two, or no label where others have one; a label is neither a number nor a name. The
            shard and the member are named.
    """

    def __init__(self, pattern: str) -> None:
        self._paths = expand(pattern)
        # it enters artefacts, where a path has no place
        self.name = f"shards:{Path(pattern).name}"
        self._names: list[str] = []
        places: list[tuple[int, int, int]] = []
        labels: list[_Label | None] = []
        for number, path in enumerate(self._paths):
            for key, sample in _scan(path).items():
                image = _image_of(sample, key, path)
                if image is None:
                    continue
                self._names.append(image[0])
                places.append((number, image[1], image[2]))
                labels.append(sample.labels.get(".cls", sample.labels.get(".json")))
        if not places:
            raise DataError(
                "a data set needs images",
                found=f"no {', '.join(IMAGE_SUFFIXES)} member in {len(self._paths)} shards",
                remedy="check the pattern",
            )
        self._places = np.array(places, np.int64)
        self.shards: NDArray[np.int64] = self._places[:, 0]
        self.labels: NDArray[np.int64] | None = None
        self.class_names: tuple[str, ...] = ()
        if any(label is not None for label in labels):
            self.labels, self.class_names = self._number(labels)

    def __len__(self) -> int:
        return len(self._names)

    def load(self, index: int) -> NDArray[np.uint8]:
        """Return one image, (h, w, 3) RGB.

        Raises:
            BadInputError: The member is damaged or no image; it is named.
        """
        return decode(self.encoded(index), name=self.image_name(index))

    def encoded(self, index: int) -> bytes:
        """Return one image as the member's bytes.

        Raises:
            DataError: The shard has become shorter since it was opened.
        """
        shard, offset, size = (int(value) for value in self._places[index])
        # opened anew each time: a position must not be shared with another process
        with self._paths[shard].open("rb") as file:
            file.seek(offset)
            data = file.read(size)
        if len(data) < size:
            raise _damaged(self._paths[shard], f"it ends in {self._names[index]}")
        return data

    def content(self, index: int) -> bytes:
        """Return one image as the member's bytes."""
        return self.encoded(index)

    def image_name(self, index: int) -> str:
        """Return the shard and the member."""
        return f"{self._paths[self.shards[index]].name}:{self._names[index]}"

    def _number(self, labels: list[_Label | None]) -> tuple[NDArray[np.int64], tuple[str, ...]]:
        """Turn the labels into numbers, and name the classes."""
        kind = type(next(label for label in labels if label is not None))
        for index, label in enumerate(labels):
            if type(label) is not kind:
                said = "no label" if label is None else f"the label {label!r}"
                raise DataError(
                    "all images of a data set are labelled by numbers, or all by names",
                    found=f"{self.image_name(index)} has {said}, and others have "
                    f"{'numbers' if kind is int else 'names'}",
                    remedy="add KEY.cls, or KEY.json with a label",
                )
        names = read_class_names(self._paths[0].parent)
        if kind is str:
            names = names or tuple(sorted({str(label) for label in labels}))
            known = {name: number for number, name in enumerate(names)}
            for index, label in enumerate(labels):
                if label not in known:
                    raise DataError(
                        "labels.txt beside the shards names every class",
                        found=f"the label {label!r} of {self.image_name(index)} is not in it",
                        remedy="add it",
                    )
            labels = [known[str(label)] for label in labels]
        elif max(map(abs, labels)) >= 2**63:  # type: ignore[arg-type]  # all are integers
            raise _damaged(self._paths[0], "a label that no 64 bits hold")
        numbers = np.array(labels, np.int64)
        return numbers, name_classes(numbers, names, source=self.name)


def expand(pattern: str) -> list[Path]:
    """Return the files of a pattern, in the order of the braces, and sorted within * and ?.

    Args:
        pattern: A path; {000..031} is a range with as many digits, {a,b} a choice.

    Raises:
        DataError: A file is missing, or two parts of the pattern name the same.
    """
    parts = _GROUP.split(pattern)
    choices = [_choices(part) if at % 2 else [part] for at, part in enumerate(parts)]
    paths: list[Path] = []
    for name in map("".join, product(*choices)):
        path = Path(name)
        if re.search(r"[*?\[]", path.name):
            found = sorted(path.parent.glob(path.name))
        else:
            found = [path] if path.is_file() else []
        if not found:
            raise DataError(
                "each part of a shard pattern names files",
                found=f"no file '{name}'",
                remedy="check the path and the range",
            )
        paths += found
    if len(set(paths)) < len(paths):
        raise DataError(
            "a shard pattern names each file once",
            found=f"'{pattern}' names {next(p for p in paths if paths.count(p) > 1)} twice",
            remedy="correct the pattern",
        )
    return paths


def _choices(group: str) -> list[str]:
    if not (matched := _RANGE.fullmatch(group)):
        return group.split(",")
    first, last = matched.groups()
    if int(first) > int(last):
        raise DataError(
            "a range of shards counts upwards",
            found=f"{{{group}}}",
            remedy="write the smaller number first",
        )
    return [f"{number:0{len(first)}}" for number in range(int(first), int(last) + 1)]


def _scan(path: Path) -> dict[str, _Sample]:
    """Read the headers and the labels of a shard; the images are passed over."""
    samples: dict[str, _Sample] = {}
    with path.open("rb") as file:
        for member in _members(file, path):
            folder, _, name = member.name.rpartition("/")
            if name.startswith("__"):  # webdataset's own notes
                continue
            stem, dot, suffix = name.partition(".")
            key = f"{folder}/{stem}" if folder else stem
            suffix = (dot + suffix).lower()
            if suffix in IMAGE_SUFFIXES:
                sample = samples.setdefault(key, _Sample())
                if sample.image is not None:
                    raise _wrong(path, key, f"{sample.image[0]} and {member.name}", "one image")
                sample.image = (member.name, member.offset_data, member.size)
            elif suffix in (".cls", ".json"):
                sample = samples.setdefault(key, _Sample())
                if suffix in sample.labels:
                    raise _wrong(path, key, f"{member.name} twice", "one label")
                label = _read_label(file, member, path)
                if label is not None:
                    sample.labels[suffix] = label
    return samples


def _members(file: IO[bytes], path: Path) -> Iterator[tarfile.TarInfo]:
    """Yield the files of a shard, and see that it is whole.

    tarfile takes a file that is cut at a member's end, or a damaged header, for the end.
    """
    last = "its beginning"
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            while (member := archive.next()) is not None:
                last = member.name
                if member.isreg() and not member.issparse():
                    yield member
            end = archive.offset
    except tarfile.TarError as error:
        raise _damaged(path, f"{error}, in or after {last}") from error
    file.seek(end)
    rest = file.read(_BLOCK)
    if len(rest) < _BLOCK or any(rest):
        raise _damaged(path, f"no end mark after {last}: it is cut off there, or damaged")
    while rest := file.read(1 << 20):
        if any(rest):
            raise _damaged(path, "it goes on after its end mark, as shards that were joined do")


def _image_of(sample: _Sample, key: str, path: Path) -> tuple[str, int, int] | None:
    if sample.image is None and sample.labels:
        raise _wrong(path, key, "a label and no image", "one image")
    return sample.image


def _read_label(file: IO[bytes], member: tarfile.TarInfo, path: Path) -> _Label | None:
    """Return a label, or None for a .json that has none: it may hold other facts."""
    if member.size > _LABEL_LIMIT_BYTES:
        raise _damaged(path, f"{member.name} has {member.size} bytes, too many for a label")
    file.seek(member.offset_data)
    data = file.read(member.size)
    try:
        text = data.decode("utf-8").strip()
        value = json.loads(text) if member.name.lower().endswith(".json") else text
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"{member.name}: {error}") from error
    if member.name.lower().endswith(".json"):
        value = value.get("label") if isinstance(value, dict) else None
        if value is None:
            return None
    elif re.fullmatch(r"[+-]?\d{1,18}", text):
        value = int(text)
    if isinstance(value, bool) or not isinstance(value, _Label) or value == "":
        raise _damaged(path, f"{member.name} holds {value!r:.60}, no number and no name")
    return value


def _wrong(path: Path, key: str, found: str, wanted: str) -> DataError:
    return DataError(
        f"each key of a shard has {wanted}",
        found=f"'{path.name}', key {key}: {found}",
        remedy="write the shard again",
    )


def _damaged(path: Path, found: str) -> DataError:
    return DataError(
        "a shard is a whole, uncompressed tar file",
        found=f"'{path}': {found}",
        remedy="fetch or write it again",
    )
