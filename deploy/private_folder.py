"""A directory that only its user can enter, for what is believed because it was written here."""

import os
import stat
from pathlib import Path

from deploy.errors import BadInputError

__all__ = ["default_folder", "private_folder"]


def default_folder() -> Path:
    """Return $EDGEREG_CACHE, else `edgereg/engines` in the user's cache."""
    if chosen := os.environ.get("EDGEREG_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edgereg/engines"


def private_folder(path: Path, *, what: str) -> Path:
    """Return a directory of mode 0700, made if it is missing.

    Args:
        path: Where.
        what: What is kept in it, for the error: "verdicts".

    Raises:
        BadInputError: It cannot be made, or somebody else could write to it.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise _refusal(path, what, str(error)) from error
    status = path.lstat()
    found = (
        "a link"
        if stat.S_ISLNK(status.st_mode)
        else f"one of user {status.st_uid}"
        if status.st_uid != os.geteuid()
        else f"mode {stat.S_IMODE(status.st_mode):o}"
        if status.st_mode & 0o077
        else None
    )
    if found is not None:
        raise _refusal(path, what, found)
    return path


def _refusal(path: Path, what: str, found: str) -> BadInputError:
    return BadInputError(
        f"the directory '{path}' of {what} must be this user's alone",
        found=found,
        remedy="chmod 700 it, or name another one in EDGEREG_CACHE",
    )
