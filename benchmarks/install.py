"""Peers are installed by the benchmark that times them, never by the product.

They lie in a folder of their own, at the end of the module path and without what they need beside:
what the product's environment has comes first, so that both sides run on the same numpy and onnx.
"""

import re
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import distributions
from pathlib import Path

__all__ = ["install"]

_TIMEOUT_S = 300


def install(folder: Path, packages: Sequence[str]) -> str:
    """Install what is missing into a folder, and put it on the module path.

    Args:
        folder: Of the peers; made if need be.
        packages: Requirements such as "onnxslim" or "openvino==2026.4.1"; none is a dependency of
            another, but that all are named.

    Returns:
        What pip said where it failed, and else nothing: the import of a peer then says the rest.
    """
    names = {name: _normal(re.split(r"[<>=!~\[]", name)[0]) for name in packages}
    found = {_normal(each.metadata["Name"]) for each in distributions(path=[str(folder)])}
    missing = [package for package, name in names.items() if name not in found]
    said = ""
    if missing:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
        command += ["--disable-pip-version-check", "--retries", "1", "--timeout", "15"]
        command += ["--target", str(folder), *missing]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S)
            said = done.stderr.strip() if done.returncode else ""
        except subprocess.TimeoutExpired:
            said = f"pip took longer than {_TIMEOUT_S} s"
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
    return said


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
