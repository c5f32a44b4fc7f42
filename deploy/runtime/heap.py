"""How the C library's heap gives memory back while a model is loaded.

ONNX Runtime holds a model's weights several times on the way to a session. glibc takes large blocks
from the system one by one, and gives them back, only until the first is freed: then it keeps more
and more of them in its heap, where little is ever given back. With a fixed limit ResNet-18 takes
109 MB once it is loaded and not 191, and 218 on the way and not 251, for some 30 ms.

Source: mallopt(3), M_MMAP_THRESHOLD.
"""

import contextlib
import ctypes
from collections.abc import Iterator

__all__ = ["large_blocks_returned"]

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGE_BYTES = 1 << 20
_USUAL_BYTES = 32 << 20  # what glibc's own limit grows to; pictures shall come from the heap again


@contextlib.contextmanager
def large_blocks_returned() -> Iterator[None]:
    """Give blocks of 1 MiB and more back to the system as soon as they are free.

    Another C library than glibc is left as it is.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        yield
        return
    mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES)
    try:
        yield
    finally:
        mallopt(_M_MMAP_THRESHOLD, _USUAL_BYTES)
        mallopt(_M_TRIM_THRESHOLD, 2 * _USUAL_BYTES)
