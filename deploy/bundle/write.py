"""Write a bundle: whole or not at all, and the same bytes for the same content."""

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path

from deploy.bundle.file_names import digest_line
from deploy.bundle.manifest import DIGEST_NAME, MANIFEST_NAME, FileEntry, Manifest, check_file_names
from deploy.bundle.manifest_json import manifest_to_bytes
from deploy.errors import BadInputError
from deploy.publish import publish_directory

__all__ = ["digest_line", "write_bundle"]


def write_bundle(
    destination: Path, manifest: Manifest, contents: Mapping[str, bytes], *, force: bool = False
) -> Manifest:
    """Write a bundle's files, and the manifest that lists and hashes each of them.

    Args:
        destination: The directory to appear.
        manifest: What the bundle is; its `files` must be empty, they are computed here.
        contents: File names and contents.
        force: Whether an earlier bundle may be replaced.

    Returns:
        The manifest as written, with `files`.

    Raises:
        BadInputError: The destination is taken, a file name is not allowed, or the manifest
            contradicts itself or uses a file that `contents` lacks.
    """
    if manifest.files:
        raise BadInputError(
            "the files of a bundle are listed when it is written",
            found=f"a manifest that lists {len(manifest.files)} already",
            remedy="pass files=()",
        )
    check_file_names(list(contents))
    files = tuple(
        FileEntry(name, len(data), hashlib.sha256(data).hexdigest())
        for name, data in sorted(contents.items())
    )
    manifest = dataclasses.replace(manifest, files=files)
    manifest_bytes = manifest_to_bytes(manifest)
    members = {MANIFEST_NAME, DIGEST_NAME, *(name.partition("/")[0] for name in contents)}
    with publish_directory(destination, members=members, force=force) as staging:
        for name, data in contents.items():
            (staging / name).parent.mkdir(parents=True, exist_ok=True)
            (staging / name).write_bytes(data)
        (staging / MANIFEST_NAME).write_bytes(manifest_bytes)
        (staging / DIGEST_NAME).write_bytes(digest_line(manifest_bytes))
    return manifest
