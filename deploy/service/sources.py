"""A source is named by a word: which reader it goes to is decided here, and nowhere else.

v4l2:/dev/video0, csi:0     a camera, until it is stopped
clip.mp4                    a film
in, in/*.jpg, a.png, x.npy  a folder, a pattern, a picture, an array
"""

from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING

from deploy.errors import BadInputError
from deploy.runtime.preprocess import Preprocessing, preprocess
from deploy.service.pictures import Frame, Unreadable, expand, read_frames
from deploy.service.video import VIDEO_SUFFIXES, read_video

if TYPE_CHECKING:
    from deploy.service.camera import CameraCounts

__all__ = ["is_camera", "read_camera", "read_sources"]


def is_camera(text: str) -> bool:
    """Whether a source is a camera: "v4l2:/dev/video0" or "csi:0"."""
    return text.startswith(("v4l2:", "csi:"))


def read_sources(
    sources: Sequence[str], spec: Preprocessing, *, every: int = 1
) -> Generator[Frame | Unreadable, None, None]:
    """Read films, pictures and arrays, one after the other.

    Args:
        sources: None of them a camera.
        spec: What is done to a picture.
        every: Of a film, each so-many-th frame.

    Raises:
        BadInputError: A camera is among them, or a package is missing.
    """
    if any(map(is_camera, sources)):
        raise BadInputError(
            "a camera is read alone: it does not end",
            found=f"{len(sources)} sources",
            remedy="start a process for each",
        )
    for path in (path for text in sources for path in expand(text)):
        if path.suffix.lower() in VIDEO_SUFFIXES and path.is_file():
            yield from read_video(path, spec, every=every)
        else:
            yield from read_frames([path], spec)


def read_camera(
    name: str,
    spec: Preprocessing,
    *,
    width: int,
    height: int,
    fps: int,
    on_end: "Callable[[CameraCounts], None]",
    command: Sequence[str] | None = None,
) -> Generator[Frame, None, None]:
    """Read a camera's newest fresh frames until the caller has enough.

    Args:
        name: Of the camera.
        spec: What is done to a picture.
        width: Of its frames, in pixels.
        height: Of its frames.
        fps: Frames a second, of a CSI camera.
        on_end: Told in the end what became of the frames.
        command: What writes the frames, in place of GStreamer.

    Raises:
        BadInputError: There is no such camera, or no GStreamer.
        CheckFailedError: It has ended, or gives nothing fresh.
    """
    from deploy.service.camera import Camera, camera_command  # whose imports cost a start

    if command is None:
        command = camera_command(name, width=width, height=height, fps=fps)
    with Camera(command, width=width, height=height) as camera:
        try:
            for place, (pixels, time_s) in enumerate(camera.frames()):
                yield Frame(f"{name}[{place}]", preprocess([pixels], spec), pixels, time_s)
        finally:
            on_end(camera.counts)
