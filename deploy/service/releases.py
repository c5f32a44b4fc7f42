"""The releases of a bundle's service on a disk, one of which is in service.

    DIR/current             -> releases/ID, changed by one rename
    DIR/releases/ID/bundle     the bundle
    DIR/releases/ID/engines    what was built of it: EDGEREG_CACHE of its service
    DIR/releases/ID/install.json   what was found, and which release it replaced

A power cut at any moment leaves the old release or the new one, whole; what else it leaves is
removed by the next installation. An engine is in the release, so that the way back needs no build.
"""

import contextlib
import fcntl
import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from deploy import strict_json
from deploy.bundle.read import Bundle
from deploy.errors import BadInputError
from deploy.publish import flush_tree

__all__ = ["Installation", "Releases", "opened"]

_CURRENT, _RELEASES, _RECORD, _LOCK = "current", "releases", "install.json", ".lock"
_STAGING = ".staging-"


@dataclass(frozen=True)
class Installation:
    """What is in service, and what was found of it: install.json.

    Attributes:
        release: Its folder's name.
        previous: That of the one which it replaced; None for the first.
        bundle: The bundle's name.
        manifest_sha256: Which names all of its bytes.
        backend: What ran it.
        precision: Which variant was judged.
        p99_ms: Of an image, end to end; None where it was not judged.
        not_checked: What could not be.
    """

    release: str
    previous: str | None
    bundle: str
    manifest_sha256: str
    backend: str
    precision: str
    p99_ms: float | None
    not_checked: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self) | {"not_checked": list(self.not_checked)}


class Releases:
    """The releases in a folder; `opened` gives them, to one process at a time.

    Args:
        folder: Where `current` is.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def path(self, name: str) -> Path:
        """Return the folder of a release."""
        return self._folder / _RELEASES / name

    def current(self) -> str | None:
        """Return the name of the one in service; None if there is none.

        Raises:
            BadInputError: `current` is something else than a link.
        """
        link = self._folder / _CURRENT
        if link.is_symlink():
            return link.readlink().name
        if link.exists():
            raise BadInputError(
                f"'{self._folder}' is a folder that `edgereg install` has made, or a new one",
                found=f"'{_CURRENT}' in it is no link",
                remedy="name another folder with --to",
            )
        return None

    def record(self, name: str) -> Installation:
        """Read what was found of a release."""
        data = (self.path(name) / _RECORD).read_bytes()
        return strict_json.decode(Installation, strict_json.parse(data, source=name), source=name)

    def free_name(self, bundle: Bundle) -> str:
        """Return a name for a release of a bundle."""
        stem, number = f"{bundle.manifest.name}-{bundle.manifest_sha256[:12]}", 1
        while self.path(f"{stem}-{number}").exists():
            number += 1
        return f"{stem}-{number}"

    @contextlib.contextmanager
    def staging(self) -> Iterator[Path]:
        """A folder to make a release in; removed at the end unless it was added."""
        path = Path(tempfile.mkdtemp(prefix=_STAGING, dir=self._folder))
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)  # a no-op once it has its name

    def add(self, staging: Path, made: Installation) -> None:
        """Write what was found into a staging folder, and give it its name."""
        (staging / _RECORD).write_text(json.dumps(made.to_json(), indent=1) + "\n")
        staging.chmod(0o755)
        flush_tree(staging)
        staging.rename(self.path(made.release))

    def point_at(self, name: str | None) -> None:
        """Change `current` by one rename, or, for None, remove it."""
        if name is None:
            (self._folder / _CURRENT).unlink()
            return
        link = self._folder / f"{_STAGING}{_CURRENT}"
        link.unlink(missing_ok=True)
        link.symlink_to(Path(_RELEASES) / name)
        link.replace(self._folder / _CURRENT)
        flush_tree(self._folder, only_itself=True)

    def remove_others(self, name: str | None) -> None:
        """Keep a release and the one that it replaced; remove others, and what kills have left."""
        keep = set() if name is None else {name, self.record(name).previous or name}
        for path in self._folder.glob(f"{_STAGING}*"):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        for path in (self._folder / _RELEASES).iterdir():
            if path.name not in keep:
                shutil.rmtree(path)


@contextlib.contextmanager
def opened(folder: Path) -> Iterator[Releases]:
    """Give the releases in a folder, made if it is missing, to one process at a time.

    Raises:
        BadInputError: Another one has them.
    """
    (folder / _RELEASES).mkdir(parents=True, exist_ok=True)
    with (folder / _LOCK).open("wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BadInputError(
                "one installation goes on at a time",
                found=f"another one in '{folder}'",
                remedy="wait until it is done",
            ) from error
        yield Releases(folder)
