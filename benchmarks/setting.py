"""Where and how a figure was measured; every benchmark writes it beside its results."""

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

__all__ = ["describe_setting"]

_PACKAGES = ("edgereg", "torch", "torchvision", "timm", "numpy", "onnx", "onnxruntime")


def describe_setting() -> dict[str, Any]:
    """Return machine, versions and command."""
    return {
        "machine": f"{_cpu()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "versions": {name: found for name in _PACKAGES if (found := _version(name))},
        "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
    }


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
