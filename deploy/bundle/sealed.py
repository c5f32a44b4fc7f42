"""A copy of a file, in memory, that nothing can change: what was hashed is what is loaded.

A library that is handed bytes copies them first, ONNX Runtime twice; by a name it reads piece by
piece. But between its hash and its parser a file on a disk may change. So it is copied into a file
that lives in memory and then takes no more writes, not even from this process; the copy is hashed.
Each of the two is one call, which lets go of Python's lock once and not for each piece: another
thread that imports would keep it for long, each time.

Python's own memfd_create and seals are not used: an interpreter that was built against an old C
library, as conda's and uv's are, has none, whatever the machine offers.

Source: memfd_create(2); sendfile(2); F_ADD_SEALS in fcntl(2); the numbers from Linux's fcntl.h and
memfd.h.
"""

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import io
import mmap
import os
import weakref
from collections.abc import Iterator
from pathlib import Path

from deploy.errors import BadInputError

__all__ = ["SealedCopy", "hash_file", "open_now"]

_CHUNK_BYTES = 1 << 22
_CLOSE_ON_EXEC, _ALLOW_SEALING = 0x1, 0x2
_F_ADD_SEALS = 1033
_SEALS = 0x1 | 0x2 | 0x4 | 0x8  # no other seal, no shrinking, no growing, no writing


class SealedCopy:
    """A copy of a file, until nobody refers to it any more.

    Args:
        source: The file.
        size: In bytes, that it should have.

    Attributes:
        sha256: As `hash_file` gives it.
        path: A name by which this process can open it.
        close: Gives up the copy before that; what was mapped or opened stays.

    Raises:
        BadInputError: The system gives no such memory.
    """

    def __init__(self, source: Path, *, size: int) -> None:
        with _memory_needed():
            self._number = _memory_file()
        self.close = weakref.finalize(self, os.close, self._number)
        self.path = f"/proc/self/fd/{self._number}"
        left = size + 1  # of a larger file, which may grow for ever, enough for another hash
        with open_now(source) as file, _memory_needed():
            while left and (count := os.sendfile(self._number, file.fileno(), None, left)):
                left -= count
            fcntl.fcntl(self._number, _F_ADD_SEALS, _SEALS)
            Path(self.path).stat()  # which a container without /proc does not have
        self.sha256 = hashlib.sha256(self.view()).hexdigest()

    def view(self) -> memoryview:
        """Its bytes, of which only those that are looked at take memory."""
        if os.fstat(self._number).st_size == 0:  # which cannot be mapped
            return memoryview(b"")
        # private: before Linux 6.7 a shared map of a sealed file is refused, even to read
        flags, prot = mmap.MAP_PRIVATE, mmap.PROT_READ
        with _memory_needed():
            return memoryview(mmap.mmap(self._number, 0, flags=flags, prot=prot))


def open_now(path: Path) -> io.FileIO:
    """Open a file to be read, without a buffer.

    What was a file when it was looked at may be a pipe by now, which would wait for a writer, for
    ever perhaps. This one is empty instead, and so not the file that was written.
    """
    return io.FileIO(path, opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))


def hash_file(path: Path, *, size: int) -> str:
    """Compute the SHA-256 of a file.

    Args:
        path: The file.
        size: In bytes, that it should have. Of a larger one, which may grow for ever, only one byte
            more is read: enough for another hash.
    """
    left = size + 1
    digest, chunk = hashlib.sha256(), memoryview(bytearray(min(left, _CHUNK_BYTES)))
    with open_now(path) as file:  # into memory that is there: new pages cost more
        while count := file.readinto(chunk[:left]):
            left -= count
            digest.update(chunk[:count])
    return digest.hexdigest()


def _memory_file() -> int:
    create = getattr(ctypes.CDLL(None, use_errno=True), "memfd_create", None)
    number = -1 if create is None else create(b"edgereg", _CLOSE_ON_EXEC | _ALLOW_SEALING)
    if number < 0:
        code = errno.ENOSYS if create is None else ctypes.get_errno()
        raise OSError(code, os.strerror(code), "memfd_create")
    return int(number)


@contextlib.contextmanager
def _memory_needed() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise BadInputError(
            "a model is loaded from a sealed copy of its file in memory",
            found=str(error),
            remedy="free memory; check the disk that it is read from; a container or sandbox must "
            "allow memfd_create and sendfile, and have /proc",
        ) from error
