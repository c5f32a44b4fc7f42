"""Answer to pictures, one at a time, as they come."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from deploy.bundle.index import read_index
from deploy.bundle.read import Bundle
from deploy.errors import BadInputError
from deploy.runtime.neighbours import Neighbour
from deploy.runtime.postprocess import Guess, top_k
from deploy.runtime.runner import Runner
from deploy.service.pictures import Frame, Unreadable, read_frames

__all__ = ["Answer", "Prediction", "Retrieval", "Unreadable", "answer", "classify", "retrieve"]


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


Answer = Prediction | Retrieval


def answer(
    bundle: Bundle, runner: Runner, frames: Iterable[Frame | Unreadable], *, top_k_count: int
) -> Iterator[tuple[Frame, Answer] | Unreadable]:
    """Classify pictures, or find the nearest references of an encoder's bundle.

    What is unreadable is passed on in its place.

    Args:
        bundle: The opened bundle.
        runner: One of its variants, loaded.
        frames: From one of the sources; each is answered before the next is taken.
        top_k_count: How many classes, or neighbours, to report for each.

    Raises:
        BadInputError: The bundle has an index that cannot be used.
        CheckFailedError: The model's output is not finite; an embedding is zero.
    """
    index = read_index(bundle)
    for frame in frames:
        if isinstance(frame, Unreadable):
            yield frame
            continue
        output, path = runner(frame.tensor)[0], Path(frame.name)
        if index is None:
            yield frame, Prediction(path, top_k(output, bundle.labels, k=top_k_count))
        else:
            yield frame, Retrieval(path, *index.nearest(output, k=top_k_count))


def classify(
    bundle: Bundle, runner: Runner, paths: Sequence[Path], *, top_k_count: int
) -> Iterator[Prediction | Unreadable]:
    """Classify files, and the images in folders, as `read_frames` finds them.

    Raises:
        BadInputError: The bundle is an encoder's, or Pillow is missing.
        CheckFailedError: The model's output is not finite.
    """
    frames = read_frames(paths, bundle.manifest.preprocessing)
    for result in answer(bundle, runner, frames, top_k_count=top_k_count):
        if isinstance(result, Unreadable):
            yield result
        elif isinstance(result[1], Prediction):
            yield result[1]
        else:
            raise BadInputError(
                "classes are those of a classifier's bundle",
                found=f"bundle '{bundle.path.name}' is an encoder's",
                remedy="ask for its neighbours, or export the whole model",
            )


def retrieve(
    bundle: Bundle, runner: Runner, paths: Sequence[Path], *, top_k_count: int
) -> Iterator[Retrieval | Unreadable]:
    """Find the reference images nearest to those that `read_frames` finds.

    Raises:
        BadInputError: The bundle has no index that can be used, or Pillow is missing.
        CheckFailedError: The model's output is not finite, or zero.
    """
    frames = read_frames(paths, bundle.manifest.preprocessing)
    for result in answer(bundle, runner, frames, top_k_count=top_k_count):
        if isinstance(result, Unreadable):
            yield result
        elif isinstance(result[1], Retrieval):
            yield result[1]
        else:
            raise BadInputError(
                "neighbours are found in the index of an encoder's bundle",
                found=f"bundle '{bundle.path.name}' is a classifier's",
                remedy="classify with it, or export its backbone with --encoder",
            )
