"""SIGTERM, as a scheduler or a shutdown sends it: finish the step, write the state, leave."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["StopRequest", "stop_request"]


class StopRequest:
    """Whether somebody asked for an end."""

    def __init__(self) -> None:
        self.is_set = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Remember the signal; the loop looks after each step."""
        self.is_set = True


@contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Listen for SIGTERM while the block runs; a thread other than the main one hears nothing."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = signal.signal(signal.SIGTERM, request)
    try:
        yield request
    finally:
        signal.signal(signal.SIGTERM, before)
