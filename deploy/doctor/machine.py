"""The machine under examination, running or recorded, and what is said of it."""

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from deploy.board.identity import is_jetson, l4t_version
from deploy.board.releases import JetPack, find_release

__all__ = ["Disk", "Driver", "Finding", "Machine", "Package", "Probe", "Provider", "Status"]

Status = Literal["ok", "warning", "error"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        check: What.
        found: What was seen.
        status: "error" where something will not work, "warning" where it may not, or not as well.
        remedy: What to do; "" if it is fine.
    """

    check: str
    found: str
    status: Status = "ok"
    remedy: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Package:
    """A Python package that is installed; `problem` says why it cannot be imported, or is ""."""

    version: str
    path: str
    problem: str


@dataclass(frozen=True)
class Provider:
    """One of ONNX Runtime's; `problem` says why it did not run a tiny graph, or is ""."""

    name: str
    problem: str


@dataclass(frozen=True)
class Driver:
    """NVIDIA's driver, as libcuda says.

    Attributes:
        problem: Why it cannot be used, or "".
        version: The CUDA version that it can run, "12.6"; "" if it was not loaded.
        compute_capability: Of the first GPU, "8.7"; "" if there is none.
    """

    problem: str
    version: str
    compute_capability: str


@dataclass(frozen=True)
class Disk:
    """Free space where something is written, in bytes."""

    purpose: str
    free_bytes: int


@dataclass(frozen=True)
class Probe:
    """What can only be learned by running something.

    Attributes:
        python: Its version, "3.10.12".
        executable: Its path.
        is_isolated: Whether it is a virtual environment that does not see the system's packages.
        machine: "aarch64" or "x86_64".
        packages: Those of PACKAGES that are installed, by module.
        distributions: Those installed under a name that holds "onnxruntime".
        providers: Of ONNX Runtime.
        driver: NVIDIA's.
        disks: Where edgereg writes.
    """

    python: str
    executable: str
    is_isolated: bool
    machine: str
    packages: dict[str, Package]
    distributions: tuple[str, ...]
    providers: tuple[Provider, ...]
    driver: Driver
    disks: tuple[Disk, ...]


@dataclass(frozen=True)
class Machine:
    """A tree of files, "/" or a recorded one, and what a probe learned there; None without one."""

    root: Path
    probe: Probe | None

    @cached_property
    def is_jetson(self) -> bool:
        """Whether it is one."""
        return is_jetson(self.root)

    @cached_property
    def release(self) -> JetPack | None:
        """The JetPack on it, if it is one that edgereg knows."""
        version = l4t_version(self.root)
        return None if version is None else find_release(version)

    @cached_property
    def container(self) -> str | None:
        """What kind of container this is seen from; None outside of one."""
        marks = {
            "run/secrets/kubernetes.io": "Kubernetes",
            ".dockerenv": "Docker",
            "run/.containerenv": "Podman",
        }
        for name, kind in marks.items():
            if (self.root / name).exists():
                return kind
        return None

    def installed_package(self, name: str) -> Package | None:
        """One of the probed packages; None if it is not installed, or nothing was probed."""
        return None if self.probe is None else self.probe.packages.get(name)
