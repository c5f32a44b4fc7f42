"""Two things at once, and nothing left of either afterwards."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

__all__ = ["beside"]

T = TypeVar("T")


@contextlib.contextmanager
def beside(call: Callable[[], T]) -> Iterator[list[T]]:
    """Call a function in a thread of its own while the block of this `with` runs.

    It gains where one of them waits, or is in C code that lets go of Python's lock. At the end of
    the block the call has ended, too: what it raised is raised there, unless the block itself has
    raised something, a Ctrl-C among it.

    Yields:
        A list, in which the function's result stands after the block.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(call())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield results
    finally:
        thread.join()
    if errors:
        raise errors[0]
