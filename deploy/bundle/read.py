"""Open a bundle, and believe none of its bytes before they were hashed.

The order is the point: size caps, manifest.json against its digest, strict parsing, the list of
files, every byte of each, then the structure of the models. Only our own readers of JSON and ONNX
have seen the bundle when `open_bundle` returns. `opening_bundle` lets a model be loaded, after its
own hash and structure were checked, while what only people and tests read is hashed beside it.
`Bundle.read` and `Bundle.sealed` hash again what they hand out, or hand out the copy that was
checked: a file changed later reaches no parser.

The hashes show a damaged or edited bundle. They are no signature: who can rewrite all of the files
can rewrite the hashes too.
"""

import contextlib
import hashlib
import io
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy import strict_json
from deploy.bundle.file_names import digest_line
from deploy.bundle.manifest import DIGEST_NAME, MANIFEST_NAME, FileEntry, Manifest
from deploy.bundle.manifest_json import manifest_from_bytes
from deploy.bundle.onnx_structure import check_structure
from deploy.bundle.sealed import SealedCopy, hash_file, open_now
from deploy.errors import BadInputError, TamperedBundleError
from deploy.threads import beside

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Bundle", "open_bundle", "opening_bundle"]

_LARGE_BYTES = 1 << 20  # a smaller file is hashed in less time than it takes to ask for the lock


@dataclass(frozen=True)
class Bundle:
    """A bundle whose every byte matched its manifest, whose own hash names all of it."""

    path: Path
    manifest: Manifest
    manifest_sha256: str
    _checked: dict[str, SealedCopy] = field(default_factory=dict, repr=False, compare=False)

    @property
    def labels(self) -> tuple[str, ...]:
        """The classes' names, in the order of the logits."""
        return self.manifest.labels

    @cached_property
    def _entries(self) -> dict[str, FileEntry]:
        return {entry.path: entry for entry in self.manifest.files}

    def read(self, name: str) -> bytes:
        """The content of a file that the manifest lists, hashed again.

        Raises:
            TamperedBundleError: The file is no longer what it was.
        """
        entry = self._entries[name]
        _check_size(self.path, entry)
        data = _read(self.path / name, size=entry.size)
        _check_digest(self.path, entry, hashlib.sha256(data).hexdigest())
        return data

    def sealed(self, name: str) -> SealedCopy:
        """A copy of a file that the manifest lists, hashed again, that nothing can change.

        A model that `open_bundle` kept is handed out once as it was checked, without a second look
        at the file.

        Raises:
            TamperedBundleError: The file is no longer what it was.
            BadInputError: The system gives no memory for it.
        """
        kept = self._checked.pop(name, None)
        if kept is not None:
            return kept
        entry = self._entries[name]
        _check_size(self.path, entry)
        copy = SealedCopy(self.path / name, size=entry.size)
        _check_digest(self.path, entry, copy.sha256)
        return copy

    def array(self, name: str) -> "NDArray[Any]":
        """The array in a .npy file that the manifest lists.

        Raises:
            TamperedBundleError: The file is no longer what it was.
            BadInputError: It is no .npy file, or would need pickle.
        """
        import numpy as np  # which is imported while the bundle is opened, and not before

        try:
            array = np.load(io.BytesIO(self.read(name)), allow_pickle=False)
        except (ValueError, EOFError, OSError, MemoryError) as error:
            raise _not_an_array(self.path, name, str(error)) from error
        if not isinstance(array, np.ndarray):
            raise _not_an_array(self.path, name, "an archive of arrays")
        return array


def open_bundle(path: Path, *, keep: str | None = None) -> Bundle:
    """Check every byte of a bundle and open it.

    Args:
        path: The directory.
        keep: The precision that will be loaded, if it is known: the first `sealed` of its model is
            then the copy that was checked here. Others are read, and hashed, twice.

    Raises:
        BadInputError: The path is no bundle, or one of another format, or a model in it is not made
            as an export's is; or the system gives no memory for what is kept.
        TamperedBundleError: A file is missing, extra, a link, or differs from the manifest's hash.
    """
    with opening_bundle(path, keep=keep) as bundle:
        return bundle


@contextlib.contextmanager
def opening_bundle(
    path: Path, *, keep: str | None = None, meanwhile: Callable[[], object] = lambda: None
) -> Iterator[Bundle]:
    """Open a bundle; within the `with` its models may be loaded, after it all was checked.

    Within, the large files that are no part of the kept model are still being hashed. Say nothing
    of what the bundle answers before the end, which raises if one of them is not the one that was
    written.

    Args:
        path: As of `open_bundle`.
        keep: Likewise.
        meanwhile: Called while the kept model is copied and hashed: imports, which need Python's
            lock, and hashing does not.

    Raises:
        BadInputError: As `open_bundle`.
        TamperedBundleError: Likewise.
    """
    path = path.resolve()  # the bundle may be reached by a link, such as `current`
    if not (path / MANIFEST_NAME).is_file():
        raise BadInputError(
            f"a bundle must be a directory with a {MANIFEST_NAME}",
            found=f"'{path}' {'holds none' if path.is_dir() else 'is not a directory'}",
            remedy="name a directory that `edgereg export` wrote",
        )
    found = dict(_regular_files(path))
    manifest_bytes = _read_manifest(path, found)
    manifest = manifest_from_bytes(manifest_bytes, bundle=path.name)
    listed = {entry.path for entry in manifest.files} | {MANIFEST_NAME, DIGEST_NAME}
    for name in sorted(listed ^ found.keys()):
        problem = "is missing" if name in listed else "is not listed"
        raise _tampered(path, f"'{name}' {problem}")
    for entry in manifest.files:
        _check_size(path, entry, found[entry.path])
    kept = manifest.variants[keep].file if keep in manifest.variants else None
    bundle = Bundle(path, manifest, hashlib.sha256(manifest_bytes).hexdigest())
    others = [entry for entry in manifest.files if entry.path != kept]
    _check_hashes(bundle, (entry for entry in others if entry.size < _LARGE_BYTES))
    with beside(lambda: _keep(bundle, kept)):
        meanwhile()
    large = [entry for entry in others if entry.size >= _LARGE_BYTES]
    with beside(lambda: _check_hashes(bundle, large)):
        _check_structures(bundle, kept)
        yield bundle


def _keep(bundle: Bundle, kept: str | None) -> None:
    if kept is not None:
        bundle._checked[kept] = bundle.sealed(kept)


def _check_hashes(bundle: Bundle, entries: Iterable[FileEntry]) -> None:
    for entry in entries:
        digest = hash_file(bundle.path / entry.path, size=entry.size)
        _check_digest(bundle.path, entry, digest)


def _check_structures(bundle: Bundle, kept: str | None) -> None:
    for file in sorted({variant.file for variant in bundle.manifest.variants.values()}):
        model = bundle._checked[file].view() if file == kept else bundle.read(file)
        check_structure(model, file=file)


def _read_manifest(path: Path, sizes: dict[str, int]) -> bytes:
    """The manifest's bytes, which must match the digest beside it."""
    for name in (MANIFEST_NAME, DIGEST_NAME):
        if name not in sizes:
            raise _tampered(path, f"'{name}' is missing")
        if sizes[name] > strict_json.MAX_BYTES:
            raise _tampered(path, f"'{name}' has {sizes[name]} bytes")
    manifest_bytes, expected = (
        _read(path / name, size=sizes[name]) for name in (MANIFEST_NAME, DIGEST_NAME)
    )
    actual = digest_line(manifest_bytes)
    if expected != actual:
        raise _tampered(
            path,
            f"'{MANIFEST_NAME}' and '{DIGEST_NAME}' disagree: "
            f"expected {_shown(expected)}, actual {_shown(actual)}",
        )
    return manifest_bytes


def _read(file: Path, *, size: int) -> bytes:
    """A file's content; of one that has grown, which may never end, one byte more than `size`."""
    with io.BufferedReader(open_now(file)) as opened:
        return opened.read(size + 1) or b""


def _regular_files(root: Path) -> Iterator[tuple[str, int]]:
    """The path and size of each file below `root`, none of which may be a link or a device."""
    folders = [""]
    while folders:
        folder = folders.pop()
        for entry in _scanned(root / folder):
            name = folder + entry.name
            if entry.is_file(follow_symlinks=False):
                yield name, entry.stat(follow_symlinks=False).st_size
            elif entry.is_dir(follow_symlinks=False):
                folders.append(f"{name}/")
            else:
                raise _tampered(root, f"'{name}' is a link or a special file")


def _scanned(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise BadInputError(
            "a bundle must be readable", found=str(error), remedy="correct its permissions"
        ) from error


def _check_size(path: Path, entry: FileEntry, size: int | None = None) -> None:
    """Insist on a file's size, which is looked up if it is not known."""
    file = path / entry.path
    if size is None:
        size = file.stat().st_size if file.is_file() else None
    if size != entry.size:
        found = "gone" if size is None else f"{size} bytes"
        raise _tampered(path, f"'{entry.path}' is {found}, expected {entry.size} bytes")


def _check_digest(path: Path, entry: FileEntry, actual: str) -> None:
    if actual != entry.sha256:
        raise _tampered(path, f"'{entry.path}': expected sha256 {entry.sha256}, actual {actual}")


def _tampered(path: Path, found: str) -> TamperedBundleError:
    return TamperedBundleError(
        f"every file of bundle '{path.name}' must be the one that was written",
        found=found,
        remedy="copy or export the bundle again",
    )


def _not_an_array(path: Path, name: str, found: str) -> BadInputError:
    return BadInputError(
        f"'{name}' of bundle '{path.name}' must be a .npy array without objects",
        found=found,
        remedy="export the bundle again",
    )


def _shown(line: bytes) -> str:
    return ascii(line[:64].decode("utf-8", "backslashreplace"))
