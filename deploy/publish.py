"""Publish a file or directory whole or not at all.

Everything is written into a staging directory beside the destination, flushed to disk, and renamed
into place: a reader, or a process started after a power cut, never sees half of a result. A
directory that replaces another is absent for the instant between two renames; a cut in this instant
leaves the old one whole, beside its place.

A writer that is killed leaves its staging directory. The next one that writes beside it removes it,
and puts a result back that was cut off from its place. A writer holds a lock (flock) on what it
stages, which ends with its process, however that ends: nothing of a live one is touched.
"""

import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from deploy.errors import BadInputError

__all__ = [
    "check_free",
    "check_new_file",
    "flush_tree",
    "publish_bytes",
    "publish_directory",
    "publish_text",
]

_STAGING = ".staging-edgereg-"  # no other program's
_ASIDE = f"{_STAGING}old-"
_LEFTOVER = re.compile(re.escape(_STAGING) + "(old-)?[a-z0-9_]{8}")  # as tempfile names them


def check_free(destination: Path, *, force: bool, members: Collection[str]) -> None:
    """Refuse, before any work is done, a destination that cannot be written or replaced.

    What killed writers left beside it is cleaned first.

    Args:
        destination: The directory that is to be written.
        force: Whether an earlier result may be replaced.
        members: The names that such a result holds. A directory with anything else in it is
            somebody's, and not even `force` replaces it.

    Raises:
        BadInputError: It exists and may not be replaced, or there is no writing beside it.
    """
    destination = destination.absolute()
    above = next(path for path in destination.parents if path.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise BadInputError(
            "an output directory is written beside others, in a directory that can be written",
            found=f"'{above}' is no such directory",
            remedy="name another path",
        )
    if destination.resolve() == Path.cwd():
        raise BadInputError(
            "an output directory is made new",
            found="the current directory",
            remedy="name another path",
        )
    if above == destination.parent:
        _clean(above)
    if destination.is_symlink() or (destination.exists() and not destination.is_dir()):
        raise BadInputError(
            "an output directory must be a directory or not exist yet",
            found=f"'{destination}' is a file or a link",
            remedy="name another path",
        )
    if not destination.exists() or not any(destination.iterdir()):
        return
    if not force:
        raise BadInputError(
            "an output directory must not exist yet",
            found=f"'{destination}' exists and is not empty",
            remedy="name another path, or replace it with --force",
        )
    strangers = sorted({path.name for path in destination.iterdir()} - set(members))
    if strangers:
        raise BadInputError(
            "--force replaces only an earlier result of the same command",
            found=f"'{destination}' holds {strangers[0]}, which such a result does not",
            remedy="name another path, or move it away yourself",
        )


@contextmanager
def publish_directory(
    destination: Path, *, members: Collection[str], force: bool = False
) -> Iterator[Path]:
    """Yield a staging directory that becomes `destination` when the block ends without an error.

    On an error the staging directory is removed and an existing destination is left as it was.

    Args:
        destination: The directory to appear.
        members: The names that such a result holds; see `check_free`.
        force: Whether an earlier result may be replaced.

    Raises:
        BadInputError: The destination exists and may not be replaced.
    """
    check_free(destination, force=force, members=members)
    destination.parent.mkdir(parents=True, exist_ok=True)
    staging, lock = _stage_directory(destination.parent, _STAGING)
    try:
        yield staging
        staging.chmod(0o755)  # mkdtemp's 0700 would hide the result from a service's user
        flush_tree(staging)
        # Again: somebody may have written there in the meantime.
        check_free(destination, force=force, members=members)
        _swap(staging, destination)
    finally:
        shutil.rmtree(staging, ignore_errors=True)  # a no-op after the swap
        os.close(lock)


def check_new_file(path: Path, *, what: str, force: bool) -> None:
    """Refuse, before any work is done, a file that exists and may not be replaced.

    Args:
        path: The file that is to be written.
        what: It, for the error, such as "a report".
        force: Whether an earlier file may be replaced.

    Raises:
        BadInputError: It exists.
    """
    if path.exists() and not (force and path.is_file()):
        raise BadInputError(
            f"{what} is written to a new file",
            found=f"'{path}' exists",
            remedy="name another --out, or replace a file with --force",
        )


def publish_text(path: Path, text: str) -> None:
    """Write a text file atomically, replacing an older one."""
    publish_bytes(path, text.encode("utf-8"))


def publish_bytes(path: Path, data: bytes) -> None:
    """Write a file atomically, replacing an older one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _clean(path.parent)
    staging, lock = _stage_file(path.parent)
    try:
        with os.fdopen(lock, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            staging.chmod(0o644)
            staging.replace(path)
    except BaseException:
        staging.unlink(missing_ok=True)
        raise
    _flush(path.parent)


def flush_tree(root: Path, *, only_itself: bool = False) -> None:
    """Force all files and folders below a folder to disk; or only its own entries."""
    for path in () if only_itself else sorted(root.rglob("*")):
        _flush(path)
    _flush(root)


def _swap(staging: Path, destination: Path) -> None:
    """Rename staging to destination; an older one is moved aside first and removed last."""
    if not destination.exists():
        staging.rename(destination)
        _flush(destination.parent)
        return
    aside, lock = _stage_directory(destination.parent, _ASIDE)
    old = aside / destination.name  # by which name it could be put back
    try:
        destination.rename(old)
        try:
            staging.rename(destination)
        except BaseException:
            old.rename(destination)  # should this fail too, the next writer puts it back
            raise
        _flush(destination.parent)
    finally:
        if destination.exists():
            shutil.rmtree(aside, ignore_errors=True)
        os.close(lock)


def _stage_directory(folder: Path, prefix: str) -> tuple[Path, int]:
    """Make a staging directory; the handle holds the lock on it."""
    while True:
        path = Path(tempfile.mkdtemp(prefix=prefix, dir=folder))
        with suppress(FileNotFoundError):  # taken for a leftover before it was locked
            handle = os.open(path, os.O_RDONLY)
            if _lock(path, handle):
                return path, handle


def _stage_file(folder: Path) -> tuple[Path, int]:
    """Make a staging file; the handle to it holds the lock."""
    while True:
        handle, name = tempfile.mkstemp(prefix=_STAGING, dir=folder)
        if _lock(Path(name), handle):
            return Path(name), handle


def _lock(path: Path, handle: int) -> bool:
    """Lock what was just made; False, and the handle closed, if it is gone by then."""
    with suppress(OSError):  # a file system without locks, on which nothing is cleaned either
        fcntl.flock(handle, fcntl.LOCK_EX)
    if path.exists():
        return True
    os.close(handle)
    return False


def _clean(folder: Path) -> None:
    """Remove what killed writers left in a folder, and put back what they had moved aside."""
    if not os.access(folder, os.R_OK):
        return
    for path in [path for path in folder.iterdir() if _LEFTOVER.fullmatch(path.name)]:
        try:
            handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:  # somebody else's, or gone
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(handle).st_uid == os.geteuid():
                _remove_leftover(path)
        except OSError:  # a live writer's, or one that cannot be locked or removed: it stays
            continue
        finally:
            os.close(handle)


def _remove_leftover(path: Path) -> None:
    if not path.is_dir():
        path.unlink(missing_ok=True)
        return
    if path.name.startswith(_ASIDE):
        for old in path.iterdir():
            if not os.path.lexists(path.parent / old.name):
                old.rename(path.parent / old.name)
                _flush(path.parent)
    shutil.rmtree(path, ignore_errors=True)


def _flush(path: Path) -> None:
    """Force a file's bytes, or a directory's entries, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
