"""Learn what files do not tell: import the packages, run a graph on each provider, ask the driver.

Each step that touches native code runs in a child process. Without a GPU, some of NVIDIA's
libraries crash instead of saying so.
"""

import ctypes
import importlib
import importlib.metadata
import platform
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from deploy.children import ask_child
from deploy.doctor.machine import Disk, Driver, Package, Probe, Provider
from deploy.doctor.tiny_graph import tiny_model

__all__ = [
    "PACKAGES",
    "ask_driver",
    "describe_package",
    "list_providers",
    "probe_here",
    "run_provider",
]

PACKAGES = {"numpy": "numpy", "PIL": "pillow", "onnxruntime": "onnxruntime", "tensorrt": "tensorrt"}
"""Modules that a device may run, and what pip calls them."""

_REMOTE = "AzureExecutionProvider"  # sends work to a service: nothing here to run
_COMPUTE_CAPABILITY = (75, 76)  # of cuDeviceGetAttribute: major and minor


def probe_here() -> Probe:
    """Probe this Python on this machine; takes some seconds."""
    listed, _ = ask_child(__name__, "list_providers")
    driver, problem = ask_child(__name__, "ask_driver")
    return Probe(
        python=platform.python_version(),
        executable=sys.executable,
        is_isolated=_is_isolated(),
        machine=platform.machine(),
        packages={name: p for name in PACKAGES if (p := _package(name)) is not None},
        distributions=_distributions("onnxruntime"),
        providers=tuple(_provider(name) for name in listed or () if name != _REMOTE),
        driver=Driver(problem, "", "") if driver is None else Driver(*driver),
        disks=_disks(),
    )


def describe_package(name: str) -> list[str] | None:
    """Import a module: its version and path. None if there is none of this name."""
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name == name:
            return None
        raise
    return [str(getattr(module, "__version__", "")), str(module.__file__)]


def list_providers() -> list[str]:
    """Name the providers that ONNX Runtime claims to have."""
    return list(importlib.import_module("onnxruntime").get_available_providers())


def run_provider(name: str) -> str:
    """Run a tiny graph on one provider: "" if it computed, else why not.

    ONNX Runtime by itself would go on on the CPU where a provider fails to load or has no kernel.
    """
    ort: Any = importlib.import_module("onnxruntime")
    numpy: Any = importlib.import_module("numpy")
    options = ort.SessionOptions()
    options.log_severity_level = 4
    if name != "CPUExecutionProvider":
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    try:
        session = ort.InferenceSession(tiny_model(), options, providers=[name])
        (result,) = session.run(None, {"x": numpy.array([1, 2], numpy.float32)})
    except Exception as error:  # its exception classes share no documented base
        return " ".join(str(error).split())
    return "" if result.tolist() == [2.0, 4.0] else f"it computed {result.tolist()}, not [2.0, 4.0]"


def ask_driver() -> tuple[str, str, str]:
    """Ask libcuda for a GPU: a problem or "", its CUDA version, the GPU's compute capability."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "no libcuda.so.1", "", ""
    number, name = ctypes.c_int(), ctypes.c_char_p()
    cuda.cuDriverGetVersion(ctypes.byref(number))
    version = f"{number.value // 1000}.{number.value % 1000 // 10}"
    code = cuda.cuInit(0)
    if code != 0:
        cuda.cuGetErrorName(code, ctypes.byref(name))
        return f"cuInit says {(name.value or b'').decode() or code}", version, ""
    cuda.cuDeviceGetCount(ctypes.byref(number))
    if number.value == 0:
        return "it sees no GPU", version, ""
    digits = []
    for attribute in _COMPUTE_CAPABILITY:
        cuda.cuDeviceGetAttribute(ctypes.byref(number), attribute, 0)
        digits.append(str(number.value))
    return "", version, ".".join(digits)


def _package(name: str) -> Package | None:
    described, problem = ask_child(__name__, "describe_package", name)
    if described is not None:
        version, path = described
        return Package(version, path, "")
    return Package(_version(PACKAGES[name]), "", problem) if problem else None


def _provider(name: str) -> Provider:
    answer, problem = ask_child(__name__, "run_provider", name)
    return Provider(name, problem or answer)


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _distributions(part: str) -> tuple[str, ...]:
    names = {str(d.metadata["Name"]).lower() for d in importlib.metadata.distributions()}
    return tuple(sorted(name for name in names if part in name))


def _is_isolated() -> bool:
    if sys.prefix == sys.base_prefix:
        return False
    config = Path(sys.prefix) / "pyvenv.cfg"
    text = config.read_text(encoding="utf-8") if config.exists() else ""
    settings = (line.replace(" ", "").lower() for line in text.splitlines())
    return "include-system-site-packages=true" not in settings


def _disks() -> tuple[Disk, ...]:
    places = {"home": Path.home(), "temporary files": Path(tempfile.gettempdir()), "here": Path()}
    free: dict[int, Disk] = {}
    for purpose, path in places.items():
        if path.exists():
            disk = Disk(purpose, shutil.disk_usage(path).free)
            free.setdefault(path.stat().st_dev, disk)
    return tuple(free.values())
