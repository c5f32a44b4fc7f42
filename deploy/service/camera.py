"""Cameras: the newest frame, and never the same one twice.

GStreamer runs as a process of its own (gst-launch-1.0), and its frames come through a pipe: no
Python binding is needed, which a virtual environment would not see; a driver that crashes takes its
own process down; and the same code reads a USB camera (V4L2), a CSI camera of a Jetson (libargus)
and the pretended camera of a test. A thread empties the pipe and keeps the newest frame only, so
that an answer is always to what is seen now: what came meanwhile is dropped, and counted.

libargus can repeat its last frame and call it a success. So a frame is fresh only if its bytes are
not those of the one before, by their hash, and if it came within the last second. Stale ones are
counted and not answered, and a camera that gives nothing fresh for some seconds is an error.
"""

import contextlib
import hashlib
import re
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import IO

import numpy as np
from numpy.typing import NDArray

from deploy.errors import BadInputError, CheckFailedError

__all__ = ["Camera", "CameraCounts", "camera_command"]

_LAUNCH = "gst-launch-1.0"
_CAMERA = re.compile(r"(v4l2:/dev/[A-Za-z0-9/_-]+|csi:[0-9]{1,2})")
_MAX_AGE_S = 1.0
_SILENCE_S = 5.0
_STOP_S = 3.0


def camera_command(text: str, *, width: int, height: int, fps: int) -> list[str]:
    """Return the command that writes a camera's frames, RGB, one after the other, to its output.

    Args:
        text: "v4l2:/dev/video0" or "csi:0".
        width: Of a frame, a multiple of 4: GStreamer pads rows of RGB to 4 bytes.
        height: Of a frame.
        fps: Frames a second that are asked of a CSI camera; a USB camera gives what it has.

    Raises:
        BadInputError: It is no such camera, or GStreamer is missing.
    """
    if not _CAMERA.fullmatch(text) or width % 4 or min(width, height, fps) < 1:
        raise BadInputError(
            "a camera is v4l2:/dev/videoN or csi:N, and its width a multiple of 4",
            found=f"{text}, {width}x{height}, {fps} a second",
            remedy="such as v4l2:/dev/video0 --size 1280x720",
        )
    if shutil.which(_LAUNCH) is None:
        raise BadInputError(
            "cameras are read by GStreamer",
            found=f"no {_LAUNCH} here",
            remedy="apt install gstreamer1.0-tools gstreamer1.0-plugins-good; JetPack brings both",
        )
    kind, _, name = text.partition(":")
    size = f"width={width},height={height}"
    rgb = f"video/x-raw,format=RGB,{size}"
    if kind == "v4l2":
        source = f"v4l2src device={name} ! decodebin ! videoconvert ! videoscale ! {rgb}"
    else:
        sensor = f"video/x-raw(memory:NVMM),{size},framerate={fps}/1"
        convert = f"nvvidconv ! video/x-raw,format=BGRx,{size} ! videoconvert ! {rgb}"
        source = f"nvarguscamerasrc sensor-id={name} ! {sensor} ! {convert}"
    newest = "queue leaky=downstream max-size-buffers=1 ! fdsink fd=1 sync=false"
    return [_LAUNCH, "-q", *f"{source} ! {newest}".split()]


@dataclass(frozen=True)
class CameraCounts:
    """What became of the frames that came.

    Attributes:
        fresh: Given out.
        dropped: Overtaken by a newer one.
        stale: Repeated, or too old.
    """

    fresh: int
    dropped: int
    stale: int


class Camera:
    """A process that writes frames, and the newest of them.

    Args:
        command: Writes (height, width, 3) uint8 RGB frames to its output, without anything between.
        width: Of a frame.
        height: Of a frame.
        silence_s: How long it may give nothing fresh.
        max_age_s: How old a frame may be when it is taken.

    Raises:
        BadInputError: The command cannot be run.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        width: int,
        height: int,
        silence_s: float = _SILENCE_S,
        max_age_s: float = _MAX_AGE_S,
    ) -> None:
        self._shape, self._size = (height, width, 3), height * width * 3
        self._silence_s, self._max_age_s = silence_s, max_age_s
        self._changed = threading.Condition()
        self._newest: tuple[bytes, float] | None = None
        self._has_ended = False
        self._fresh = self._dropped = self._stale = 0
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the camera
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=self._said
            )
        except OSError as error:
            self._said.close()
            raise BadInputError(
                "a camera's command must run", found=str(error), remedy="install GStreamer"
            ) from error
        assert self._process.stdout is not None
        self._thread = threading.Thread(
            target=self._read, args=(self._process.stdout,), name="camera", daemon=True
        )
        self._thread.start()

    @property
    def counts(self) -> CameraCounts:
        """What became of the frames so far."""
        with self._changed:
            return CameraCounts(self._fresh, self._dropped, self._stale)

    def frames(self) -> Iterator[tuple[NDArray[np.uint8], float]]:
        """Yield the newest fresh frame and when it came, by the clock that never goes back.

        Raises:
            CheckFailedError: The camera has ended, or nothing fresh came.
        """
        last, heard_s = b"", time.monotonic()
        while True:
            taken = self._take(heard_s + self._silence_s - time.monotonic())
            now = time.monotonic()
            if taken is not None:
                data, came_s = taken
                digest = hashlib.blake2b(data, digest_size=16).digest()
                if digest != last and now - came_s <= self._max_age_s:
                    last, heard_s = digest, now
                    self._fresh += 1
                    yield np.frombuffer(data, np.uint8).reshape(self._shape), came_s
                    heard_s = time.monotonic()  # the time that the answer took is not the camera's
                    continue
                self._stale += 1
            if now - heard_s >= self._silence_s:
                counts = self.counts
                raise CheckFailedError(
                    f"a camera gives a fresh frame within {self._silence_s:g} s",
                    found=f"none; {counts.fresh} fresh and {counts.stale} stale ones until now",
                    remedy="restart the camera's service (nvargus-daemon), check the cable",
                )

    def close(self) -> None:
        """Stop the process."""
        self._process.terminate()
        try:
            self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._thread.join()
        self._said.close()

    def __enter__(self) -> "Camera":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _read(self, pipe: IO[bytes]) -> None:
        with contextlib.closing(pipe):
            while len(data := pipe.read(self._size)) == self._size:
                with self._changed:
                    self._dropped += self._newest is not None
                    self._newest = data, time.monotonic()
                    self._changed.notify()
        with self._changed:
            self._has_ended = True
            self._changed.notify()

    def _take(self, timeout_s: float) -> tuple[bytes, float] | None:
        with self._changed:
            self._changed.wait_for(
                lambda: self._newest is not None or self._has_ended, max(0.0, timeout_s)
            )
            taken, self._newest = self._newest, None
            if taken is None and self._has_ended:
                raise self._ended()
            return taken

    def _ended(self) -> CheckFailedError:
        code = self._process.wait()
        self._said.seek(0)
        lines = self._said.read(1 << 20).decode("utf-8", "replace").strip().splitlines()
        return CheckFailedError(
            "a camera's process runs until it is stopped",
            found=f"exit code {code}" + (f": {lines[-1]}" if lines else ", without a word"),
            remedy="try its pipeline with gst-launch-1.0 by hand",
        )
