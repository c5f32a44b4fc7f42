"""Frames of a film. The only file of deploy that imports PyAV.

The file is handed over as bytes, not by its name: what looks like a film and is a play list names
other files and hosts, and gets none of them.
"""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deploy.errors import BadInputError
from deploy.runtime.decode import MAX_PIXELS
from deploy.runtime.preprocess import Preprocessing, preprocess
from deploy.service.pictures import Frame, Unreadable

__all__ = ["VIDEO_SUFFIXES", "read_video"]

VIDEO_SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".webm")


def read_video(path: Path, spec: Preprocessing, *, every: int = 1) -> Iterator[Frame | Unreadable]:
    """Yield each `every`-th frame of a film's first picture track, the first one first.

    A film that breaks off gives what came before, and then the reason.

    Args:
        path: The file.
        spec: What is done to a picture.
        every: 1 for all.

    Raises:
        BadInputError: PyAV is missing.
    """
    av = _pyav()
    count = 0
    try:
        with path.open("rb") as file, av.open(file, options={"protocol_whitelist": ""}) as film:
            if not film.streams.video:
                yield _unreadable(path, "it has no pictures")
                return
            stream = film.streams.video[0]
            if stream.codec_context.width * stream.codec_context.height > MAX_PIXELS:
                yield _unreadable(path, f"frames of more than {MAX_PIXELS} pixels")
                return
            for frame in itertools.islice(film.decode(stream), 0, None, every):
                pixels = frame.to_ndarray(format="rgb24")
                name = f"{path}[{count * every}]"
                yield Frame(name, preprocess([pixels], spec), pixels, frame.time)
                count += 1
    except (av.FFmpegError, OSError) as error:
        yield _unreadable(path, f"{error}, after {count} frames")
        return
    if count == 0:
        yield _unreadable(path, "it has no frames")


def _unreadable(path: Path, found: str) -> Unreadable:
    rule = f"a film is a whole {', '.join(VIDEO_SUFFIXES)} file with pictures"
    return Unreadable(path, f"{rule}; found: '{path}': {found}; remedy: convert it with ffmpeg")


def _pyav() -> Any:
    try:
        import av
    except ImportError as error:
        raise BadInputError(
            "films are read by PyAV",
            found="no PyAV here",
            remedy="pip install 'edgereg[video]'",
        ) from error
    return av
