"""A copy of a file, in memory, that nothing can change: what was hashed is what is loaded.

A library that is handed bytes copies them first, ONNX Runtime twice; by a name it reads piece by
piece. But between its hash and its parser a file on a disk may change. So it is copied, as it is
hashed, into a file that lives in memory and then takes no more writes, not even from this process.

Source: memfd_create(2); F_ADD_SEALS in fcntl(2).
"""

import fcntl
import hashlib
import mmap
import os
import weakref
from pathlib import Path
from typing import BinaryIO

__all__ = ["SealedCopy", "hash_file"]

_CHUNK_BYTES = 1 << 18  # stays in a processor's cache
_SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL


class SealedCopy:
    """A copy of a file, until nobody refers to it any more.

    Args:
        source: The file.

    Attributes:
        sha256: Of its bytes.
        path: A name by which this process can open it.
    """

    def __init__(self, source: Path) -> None:
        self._number = os.memfd_create("edgereg", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        weakref.finalize(self, os.close, self._number)
        with open(self._number, "wb", closefd=False) as copy:
            self.sha256 = hash_file(source, copy=copy)
        fcntl.fcntl(self._number, fcntl.F_ADD_SEALS, _SEALS)
        self.path = f"/proc/self/fd/{self._number}"

    def view(self) -> memoryview:
        """Its bytes, of which only those that are looked at take memory."""
        if os.fstat(self._number).st_size == 0:  # which cannot be mapped
            return memoryview(b"")
        # private: before Linux 6.7 a shared map of a sealed file is refused, even to read
        flags, prot = mmap.MAP_PRIVATE, mmap.PROT_READ
        return memoryview(mmap.mmap(self._number, 0, flags=flags, prot=prot))


def hash_file(path: Path, *, copy: BinaryIO | None = None) -> str:
    """Compute the SHA-256 of a file, and write it to `copy` on the way."""
    digest, chunk = hashlib.sha256(), memoryview(bytearray(_CHUNK_BYTES))
    with path.open("rb", buffering=0) as file:  # into memory that is there: new pages cost more
        while size := file.readinto(chunk):
            digest.update(chunk[:size])
            if copy is not None:
                copy.write(chunk[:size])
    return digest.hexdigest()
