"""Compute an int8 graph as it is written, in float32, and say what this host would do instead.

ONNX Runtime replaces a layer between Q/DQ by its integer kernel of the host. On x86 without VNNI
that kernel adds pairs of 8-bit products in 16 bits, which saturate: a graph for another machine
would be judged by an error that it does not make there. Emulated, each pair rounds and clips, and
the sums between are exact but for float32's own rounding, on every host alike.
"""

import platform
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from deploy.bundle.manifest import Tolerance
from deploy.measure.compare import compare
from export.onnx_file.run_onnx import open_run

__all__ = ["describe_int8", "run_emulated", "sqnr_db"]

_ANY = Tolerance(max_scaled_error=1.0, min_top1_agreement=0.0, reason="measured, not judged")


def run_emulated(model: bytes, inputs: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the first output for (N, 3, H, W) inputs, without any integer kernel."""
    return open_run(model, integers=False)(inputs)


def sqnr_db(outputs: NDArray[np.float32], reference: NDArray[np.float32]) -> float:
    """Return the signal to quantization noise ratio; more is better, 40 dB is 1 % of noise."""
    return compare(outputs, reference, _ANY).sqnr_db


def describe_int8(machine: str | None = None, cpuinfo: str | None = None) -> str:
    """Say how a CPU adds 8-bit products; timings and accuracies depend on it.

    Args:
        machine: "x86_64", "aarch64" and so on; None for this host.
        cpuinfo: The text of /proc/cpuinfo; None for this host's.
    """
    machine = platform.machine() if machine is None else machine
    if cpuinfo is None:
        source = Path("/proc/cpuinfo")
        cpuinfo = source.read_text("utf-8") if source.is_file() else ""
    words = set(cpuinfo.split())
    x86 = {"avx512_vnni": "AVX512-VNNI", "avx_vnni": "AVX-VNNI"}
    arm = {"i8mm": "I8MM", "asimddp": "SDOT"}
    known = x86 if machine in ("x86_64", "AMD64") else arm
    found = [name for flag, name in known.items() if flag in words]
    if not cpuinfo:
        return f"{machine}, its instructions unknown"
    if found:
        return f"{machine} with {' and '.join(found)}: sums of 32 bits"
    if known is x86:
        return f"{machine} without VNNI: sums of 16 bits, which 8-bit weights saturate"
    return f"{machine} without SDOT: sums of 32 bits, by slower instructions"
