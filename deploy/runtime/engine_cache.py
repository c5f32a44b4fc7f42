"""The engines that were built on this machine.

An engine is native code. It stays where it was built, in a directory that only its user can enter,
as a plain plan of TensorRT. Beside it a sidecar says all that it depends on, its size and hash, and
is signed (HMAC-SHA256) with a key that never leaves the directory. No plan reaches TensorRT before
the sidecar's signature, the key's fields and every byte of the plan were checked.

    device.key                    32 random bytes
    NAME.PRECISION.json           the sidecar; replaced in one step, and what it names is there
    SHA256.plan                   an engine; one that no sidecar names is removed by the next build
    NAME.choice.json              which precision was the fastest here
    SHA256.timing                 what TensorRT timed, signed, for each version and GPU

One build at a time; readers need no lock.
"""

import dataclasses
import fcntl
import hashlib
import hmac
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from deploy import strict_json
from deploy.errors import BadInputError, DeployError
from deploy.private_folder import default_folder, private_folder
from deploy.publish import publish_bytes
from deploy.runtime.engine_key import PLACE, EngineKey, changed_fields

__all__ = ["Choice", "Engine", "EngineCache", "Sidecar", "Unusable", "default_folder"]

FORMAT_VERSION = 1
_KEY_NAME, _LOCK_NAME, _STAGING = "device.key", "lock", ".staging-"
_KEY_BYTES, _DIGEST_BYTES = 32, 32
_PRECISIONS = ("fp32", "fp16", "int8")

S = TypeVar("S", "Sidecar", "Choice")


@dataclass(frozen=True)
class Sidecar:
    """What is known of an engine.

    Attributes:
        format_version: Of this file.
        key: What the engine depends on.
        plan: The engine's file.
        size: In bytes.
        sha256: Of the engine.
        layers: How many of its layers show each type.
        build_s: How long the build took.
        hmac: The signature of all the rest.
    """

    format_version: int
    key: EngineKey
    plan: str
    size: int
    sha256: str
    layers: dict[str, int]
    build_s: float
    hmac: str = ""


@dataclass(frozen=True)
class Choice:
    """Which precision is run where none is asked for.

    Attributes:
        format_version: Of this file.
        precision: The fastest of those that were timed, fp32 if none is surely faster.
        engines: The hash of each engine that was timed: the choice holds for these only.
        hmac: The signature of all the rest.
    """

    format_version: int
    precision: str
    engines: dict[str, str]
    hmac: str = ""


@dataclass(frozen=True)
class Engine:
    """A checked engine, and what is known of it."""

    sidecar: Sidecar
    plan: bytes


@dataclass(frozen=True)
class Unusable:
    """Why there is no engine to be used.

    Attributes:
        reasons: Each field that differs, or what else is wrong.
        is_tampered: Whether a file is not the one that was written here.
    """

    reasons: tuple[str, ...]
    is_tampered: bool = False


class EngineCache:
    """A directory of engines.

    Args:
        folder: Made if it is missing.

    Raises:
        BadInputError: Somebody else can enter it.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = private_folder(folder or default_folder(), what="engines")

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the right to write; what a killed build has left is removed.

        Raises:
            BadInputError: Another build holds it.
        """
        with (self.folder / _LOCK_NAME).open("wb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise BadInputError(
                    "one build runs at a time",
                    found=f"another one that writes to '{self.folder}'",
                    remedy="wait until it is done",
                ) from error
            self._clean()
            yield

    @contextmanager
    def work_folder(self) -> Iterator[Path]:
        """A folder for a build, within the lock, removed in the end."""
        path = Path(tempfile.mkdtemp(prefix=_STAGING, dir=self.folder))
        try:
            yield path
        finally:
            shutil.rmtree(path)

    def find(self, name: str, wanted: EngineKey, *, anyhow: bool = False) -> Engine | Unusable:
        """Return the engine of a bundle, or say why there is none.

        Args:
            name: The bundle's name.
            wanted: What the engine must have been built for.
            anyhow: Whether its profile and flags do not matter, only for what and where it is.
        """
        sidecar = self._read(_sidecar_name(name, wanted.precision), Sidecar)
        if not isinstance(sidecar, Sidecar):
            return sidecar
        changed = changed_fields(sidecar.key, wanted, fields=PLACE if anyhow else None)
        if changed:
            return Unusable(changed)
        path = self.folder / sidecar.plan
        if not path.is_file() or path.stat().st_size != sidecar.size:
            return Unusable((f"'{sidecar.plan}' is gone or of another size",), is_tampered=True)
        plan = path.read_bytes()
        if hashlib.sha256(plan).hexdigest() != sidecar.sha256:
            return Unusable((f"'{sidecar.plan}' has another sha256",), is_tampered=True)
        return Engine(sidecar, plan)

    def store(
        self, name: str, key: EngineKey, plan: bytes, *, layers: Mapping[str, int], build_s: float
    ) -> Engine:
        """Keep an engine, in the place of an older one; within the lock."""
        digest = hashlib.sha256(plan).hexdigest()
        file = f"{digest}.plan"
        publish_bytes(self.folder / file, plan)
        sidecar = Sidecar(FORMAT_VERSION, key, file, len(plan), digest, dict(layers), build_s)
        return Engine(self._write(_sidecar_name(name, key.precision), sidecar), plan)

    def choose(self, name: str, precision: str, engines: Mapping[str, str]) -> None:
        """Keep which precision is run where none is asked for; within the lock."""
        self._write(f"{name}.choice.json", Choice(FORMAT_VERSION, precision, dict(engines)))

    def choice(self, name: str) -> str | Unusable:
        """Return the precision that was chosen, or say why there is none."""
        choice = self._read(f"{name}.choice.json", Choice)
        if not isinstance(choice, Choice):
            return choice
        for precision, digest in choice.engines.items():
            sidecar = self._read(_sidecar_name(name, precision), Sidecar)
            if not isinstance(sidecar, Sidecar):
                return sidecar
            if sidecar.sha256 != digest:
                return Unusable((f"the {precision} engine was built again since it was timed",))
        return choice.precision

    def timing(self, key: EngineKey) -> bytes:
        """What TensorRT timed here before; empty if nothing, or if it is not what was written."""
        path = self._timing_path(key)
        signed = path.read_bytes() if path.is_file() else b""
        data = signed[_DIGEST_BYTES:]
        return data if hmac.compare_digest(signed[:_DIGEST_BYTES], self._digest(data)) else b""

    def store_timing(self, key: EngineKey, data: bytes) -> None:
        """Keep what TensorRT timed; within the lock."""
        self._key(create=True)
        publish_bytes(self._timing_path(key), self._digest(data) + data)

    def _timing_path(self, key: EngineKey) -> Path:
        place = "\n".join((key.tensorrt, key.gpu, key.sm, key.jetpack))
        return self.folder / f"{hashlib.sha256(place.encode()).hexdigest()[:16]}.timing"

    def _read(self, name: str, kind: type[S]) -> S | Unusable:
        path = self.folder / name
        if not path.is_file():
            return Unusable(("there is none yet",))
        try:
            parsed = strict_json.parse(path.read_bytes(), source=name)
            version = parsed.get("format_version") if isinstance(parsed, dict) else None
            if type(version) is int and version != FORMAT_VERSION:  # of which keys may differ
                return Unusable((f"format: built with {version}, here {FORMAT_VERSION}",))
            document = strict_json.decode(kind, parsed, source=name)
        except DeployError as error:
            return Unusable((f"'{name}': {error.found}",), is_tampered=True)
        if not hmac.compare_digest(document.hmac, self._signature(document)):
            return Unusable((f"'{name}' is not signed with this device's key",), is_tampered=True)
        return document

    def _write(self, name: str, document: S) -> S:
        self._key(create=True)
        signed = dataclasses.replace(document, hmac=self._signature(document))
        publish_bytes(self.folder / name, strict_json.dump(signed))
        return signed

    def _signature(self, document: S) -> str:
        return self._digest(strict_json.dump(dataclasses.replace(document, hmac=""))).hex()

    def _digest(self, data: bytes) -> bytes:
        return hmac.digest(self._key(), data, "sha256")

    def _key(self, *, create: bool = False) -> bytes:
        path = self.folder / _KEY_NAME
        if path.is_file():
            return path.read_bytes()
        if create:
            handle, staging = tempfile.mkstemp(prefix=_STAGING, dir=self.folder)
            with os.fdopen(handle, "wb") as file:
                file.write(secrets.token_bytes(_KEY_BYTES))
                file.flush()
                os.fsync(file.fileno())
            Path(staging).replace(path)
            return path.read_bytes()
        return secrets.token_bytes(_KEY_BYTES)  # signs nothing that was ever written

    def _clean(self) -> None:
        for path in self.folder.glob(f"{_STAGING}*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        named = set()
        for path in self.folder.glob("*.json"):
            sidecar = self._read(path.name, Sidecar)
            named |= {sidecar.plan} if isinstance(sidecar, Sidecar) else set()
        for path in self.folder.glob("*.plan"):
            if path.name not in named:
                path.unlink()


def _sidecar_name(name: str, precision: str) -> str:
    if precision not in _PRECISIONS:  # which a bundle may call as it likes, a path too
        raise BadInputError(
            f"an engine is built in {', '.join(_PRECISIONS)}",
            found=repr(precision),
            remedy="run this variant by ONNX Runtime",
        )
    return f"{name}.{precision}.json"
