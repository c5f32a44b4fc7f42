"""Find the images that a training should not see: undecodable, duplicate, contradictory, leaked.

Two images are the same here if their decoded pixels are, whatever their files look like.
"""

import hashlib
import io
import struct
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from deploy.errors import BadInputError
from deploy.runtime.decode import load_pillow
from edgereg.data.images import Images, combine_digest
from edgereg.data.index import apply_index, write_index
from edgereg.data.perceptual import near_pairs, perceptual_hash
from edgereg.data.report import DataReport, Finding
from edgereg.data.workers import in_order
from edgereg.errors import DataError

__all__ = ["MAX_NEAR", "apply_index", "check_images", "write_index"]

MAX_NEAR = 8
"""Bits; more would make a neighbour of almost every image."""

_CHUNK = 32  # images looked at between two reports of progress


@dataclass(frozen=True)
class _Seen:
    """What was seen of one image."""

    content: bytes  # SHA-256
    pixels: bytes | None = None  # SHA-256 of size and pixels; None where it cannot be decoded
    problem: str = ""
    size: tuple[int, int] = (0, 0)  # width, height
    mode: str = ""  # Pillow's, of the file
    look: int = 0  # perceptual hash


def check_images(
    images: Images,
    *,
    against: Sequence[Images] = (),
    near: int | None = None,
    workers: int = 0,
    progress: Callable[[int], None] | None = None,
) -> DataReport:
    """Look at every image once.

    Set aside, each with its reason, are images that cannot be decoded; all images of the same
    pixels where their labels differ; images that `against` has, too; and of images with the same
    pixels and label all but the first.

    Args:
        images: What is to be trained on.
        against: Data sets that must not be seen in training, such as the test set.
        near: Report pairs of images whose 64-bit perceptual hashes differ in at most this many
            bits, 0 to MAX_NEAR; None does not look for them. They are never set aside.
        workers: Processes that decode; 0 decodes in this one.
        progress: Called with the number of images of `images` looked at so far.

    Raises:
        DataError: `near` is out of its range.
    """
    if near is not None and not 0 <= near <= MAX_NEAR:
        raise DataError(
            f"near duplicates differ in 0 to {MAX_NEAR} bits of their hash",
            found=f"{near}",
            remedy="take 2",
        )
    seen: list[_Seen] = []
    for one in _look(images, has_look=near is not None, workers=workers):
        seen.append(one)
        if progress is not None:
            progress(len(seen))
    held_out: dict[bytes, str] = {}
    unreadable: dict[str, int] = {}
    for other in against:
        for index, one in enumerate(_look(other, has_look=False, workers=workers)):
            if one.pixels is None:
                unreadable[other.name] = unreadable.get(other.name, 0) + 1
            else:
                held_out.setdefault(one.pixels, f"{other.image_name(index)} of {other.name}")
    return DataReport(
        name=images.name,
        digest=combine_digest(images, (one.content for one in seen)),
        against=tuple(other.name for other in against),
        unreadable_against=unreadable,
        image_names=tuple(images.image_name(index) for index in range(len(images))),
        hashes=tuple(one.content.hex() for one in seen),
        class_names=images.class_names,
        labels=None if images.labels is None else tuple(images.labels.tolist()),
        findings=_findings(images, seen, held_out),
        sizes=Counter(one.size for one in seen if one.pixels is not None),
        modes=Counter(one.mode for one in seen if one.pixels is not None),
        near=None if near is None else tuple(_near(seen, near)),
    )


def _look(images: Images, *, has_look: bool, workers: int) -> Iterator[_Seen]:
    def look_at(chunk: range) -> list[_Seen]:
        return [_look_at(images, index, has_look) for index in chunk]

    size = len(images)
    chunks = (range(at, min(at + _CHUNK, size)) for at in range(0, size, _CHUNK))
    for part in in_order(look_at, chunks, workers=workers):
        yield from part


def _look_at(images: Images, index: int, has_look: bool) -> _Seen:
    content = images.content(index)
    digest = hashlib.sha256(content).digest()
    try:
        pixels = images.load(index)
    except BadInputError as error:
        return _Seen(digest, problem=error.found)
    height, width, _ = pixels.shape
    return _Seen(
        content=digest,
        # the size first: the same bytes can be 2 x 3 or 3 x 2
        pixels=hashlib.sha256(struct.pack("<2q", width, height) + pixels.tobytes()).digest(),
        size=(width, height),
        mode=_mode(content),
        look=perceptual_hash(pixels) if has_look else 0,
    )


def _mode(content: bytes) -> str:
    """Return Pillow's mode of an image file that can be decoded."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as `decode` does, and for the same reasons
        with load_pillow().Image.open(io.BytesIO(content)) as image:
            return str(image.mode)


def _findings(
    images: Images, seen: Sequence[_Seen], held_out: dict[bytes, str]
) -> dict[int, Finding]:
    findings = {
        index: Finding("undecodable", one.problem)
        for index, one in enumerate(seen)
        if one.pixels is None
    }
    groups: dict[bytes, list[int]] = {}
    for index, one in enumerate(seen):
        if one.pixels is not None:
            groups.setdefault(one.pixels, []).append(index)
    for pixels, members in groups.items():
        findings.update(_judge(images, members, held_out.get(pixels)))
    return dict(sorted(findings.items()))


def _judge(
    images: Images, members: Sequence[int], leak: str | None
) -> Iterable[tuple[int, Finding]]:
    """Yield what is wrong with images of the same pixels."""
    labels = images.labels
    if labels is not None and len({int(labels[index]) for index in members}) > 1:
        for index in members:
            other = next(i for i in members if labels[i] != labels[index])
            named = f"{images.image_name(other)} is {images.class_names[labels[other]]}"
            yield index, Finding("contradictory", named)
    elif leak is not None:
        for index in members:
            yield index, Finding("leaked", leak)
    else:
        for index in members[1:]:
            yield index, Finding("duplicate", images.image_name(members[0]))


def _near(seen: Sequence[_Seen], near: int) -> Iterable[tuple[int, int, int]]:
    """Return the pairs of images that look alike, of which none is a copy of an earlier one."""
    first = {one.pixels: index for index, one in reversed(list(enumerate(seen)))}
    unique = sorted(index for pixels, index in first.items() if pixels is not None)
    hashes = np.array([seen[index].look for index in unique], np.uint64)
    return sorted((unique[i], unique[j], distance) for i, j, distance in near_pairs(hashes, near))
