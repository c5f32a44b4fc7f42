"""What the files of a bundle may be called, and what the manifest and its digest are."""

import hashlib
import re

from deploy.errors import BadInputError

__all__ = ["DIGEST_NAME", "MANIFEST_NAME", "check_file_names", "digest_line", "file_name_problem"]

MANIFEST_NAME = "manifest.json"
DIGEST_NAME = "manifest.json.sha256"  # in the format of sha256sum, so that `sha256sum -c` reads it
MAX_FILES = 4096

_FILE_NAME_PART = re.compile(r"[a-z0-9._-]+")


def check_file_names(names: list[str]) -> None:
    """Refuse file names that could leave the bundle, or that not every file system can hold.

    Raises:
        BadInputError: A name is not made of [a-z0-9._-] parts, holds '..', is reserved or repeated,
            or is also the folder of another.
    """
    problem = file_name_problem(names)
    if problem is not None:
        raise BadInputError(
            "a bundle's file names must be distinct relative paths of [a-z0-9._-] without '..'",
            found=problem,
            remedy="rename the file",
        )


def digest_line(manifest_bytes: bytes) -> bytes:
    """The content of manifest.json.sha256, which guards the one file that cannot list itself."""
    return f"{hashlib.sha256(manifest_bytes).hexdigest()}  {MANIFEST_NAME}\n".encode()


def file_name_problem(names: list[str]) -> str | None:
    """Say what is wrong with a bundle's file names, or nothing."""
    folders = {name[:i] for name in names for i, letter in enumerate(name) if letter == "/"}
    for name in names:
        parts = name.split("/")
        if (
            not all(_FILE_NAME_PART.fullmatch(part) and part != "." for part in parts)
            or ".." in name
        ):
            return f"the file name {name!r}"
        if name in (MANIFEST_NAME, DIGEST_NAME):
            return f"the reserved file name {name!r}"
        if len(name) > 255:
            return f"a file name of {len(name)} characters"
        if name in folders:
            return f"{name!r} as a file and as a folder"
    if len(set(names)) < len(names):
        return f"{sorted(name for name in names if names.count(name) > 1)[0]!r} twice"
    if len(names) > MAX_FILES:
        return f"{len(names)} files; the limit is {MAX_FILES}"
    return None
