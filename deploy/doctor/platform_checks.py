"""The board, its JetPack, Python, and the container around them."""

from collections.abc import Iterator

from deploy.board.identity import board_model, l4t_version
from deploy.doctor.machine import Finding, Machine

__all__ = ["check_board", "check_container", "check_python"]

_DEVICES = ("dev/nvmap", "dev/nvhost-gpu", "dev/nvgpu", "dev/nvidia0")
_DRIVER_FILES = "usr/lib/*-linux-gnu/**/libcuda.so.1*"
_NVIDIA_RUNTIME = "start it with `docker run --runtime nvidia`, from an image for this JetPack"


def check_board(machine: Machine) -> Iterator[Finding]:
    """Which board with which JetPack; another machine is a fact, not a fault."""
    model = board_model(machine.root) or "a board without a name"
    if not machine.is_jetson:
        kind = "an unknown machine" if machine.probe is None else machine.probe.machine
        yield Finding("board", f"no Jetson: {kind}")
        return
    version, release = l4t_version(machine.root), machine.release
    if version is None:
        yield Finding(
            "board",
            f"{model}; no version of L4T in /etc/nv_tegra_release",
            "error",
            "mount the host's /etc/nv_tegra_release into the container"
            if machine.container
            else "install JetPack 6.0 or later; its package nvidia-l4t-core has this file",
        )
    elif release is None:
        yield Finding(
            "board",
            f"{model}, L4T {version}: a JetPack that this edgereg does not know",
            "warning",
            "upgrade edgereg; until then, trust only what `edgereg verify` accepts",
        )
    elif not release.is_supported:
        yield Finding(
            "board",
            f"{model}, JetPack {release.name} (L4T {version}), with Python {release.python}",
            "error",
            "flash JetPack 6.0 or later: edgereg needs Python 3.10",
        )
    else:
        yield Finding("board", f"{model}, JetPack {release.name} (L4T {version})")


def check_python(machine: Machine) -> Iterator[Finding]:
    """Whether this Python is the one for which JetPack's bindings were built."""
    if machine.probe is None:
        yield Finding(
            "probe",
            "this tree was recorded without asking Python, the packages and the driver",
            "warning",
            "record it with `edgereg doctor --record DIR` on the machine itself",
        )
        return
    version, release = machine.probe.python, machine.release
    found = f"Python {version}, {machine.probe.executable}"
    major, minor = map(int, version.split(".")[:2])
    if (major, minor) < (3, 10):
        yield Finding("python", found, "error", "use Python 3.10 or later")
    elif release is not None and release.is_supported and f"{major}.{minor}" != release.python:
        yield Finding(
            "python",
            f"{found}; TensorRT's bindings of JetPack {release.name} are for {release.python}",
            "error",
            "python3 -m venv --system-site-packages DIR, with the system's /usr/bin/python3",
        )
    else:
        yield Finding("python", found)


def check_container(machine: Machine) -> Iterator[Finding]:
    """Whether a container sees the board's GPU: its devices and its driver."""
    if machine.container is None:
        return
    if not machine.is_jetson:
        yield Finding("container", machine.container)
        return
    lacking = []
    if not any((machine.root / name).exists() for name in _DEVICES):
        lacking.append(f"no GPU device (/{', /'.join(_DEVICES)})")
    if not any(machine.root.glob(_DRIVER_FILES)):
        lacking.append("no libcuda.so.1")
    if lacking:
        found = f"{machine.container}: {' and '.join(lacking)}"
        yield Finding("container", found, "error", _NVIDIA_RUNTIME)
    else:
        yield Finding("container", f"{machine.container}, with the GPU's devices and driver")
