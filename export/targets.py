"""What is exported for which machine: one row of a table each.

Every value was read from NVIDIA's release notes of that JetPack, or tried; boards are named by
their GPU's compute capability (SM). TensorRT-RTX, which judges an export without a GPU, knows other
SMs: each row names its proxy. JetPack 6.0 (TensorRT 8.6) needs another exporter, and JetPack 5 has
Python 3.8: neither is here.
"""

import dataclasses
import difflib
from dataclasses import dataclass
from typing import Any

from deploy.errors import BadInputError

__all__ = ["TARGETS", "Target", "find_target"]


@dataclass(frozen=True)
class Target:
    """One machine that a bundle can be made for.

    Args:
        name: Its key in TARGETS.
        runtime: What executes the model there, with the version that comes with the machine.
        opset: The ONNX operator set of the export.
        compute_capability: Of the GPU; None for a CPU.
        proxy: The compute capability for which TensorRT-RTX judges; None where nothing is judged.
    """

    name: str
    runtime: str
    opset: int
    compute_capability: str | None = None
    proxy: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the row as JSON values."""
        return dataclasses.asdict(self)


# Opset 20 brings Gelu and LayerNormalization as one node each, and not yet Attention, which
# TensorRT knows from 10.14.
TARGETS: dict[str, Target] = {
    row.name: row
    for row in (
        Target("jetpack6.2", "TensorRT 10.3.0", 20, compute_capability="8.7", proxy="SM86"),
        Target("jetpack7.0-thor", "TensorRT 10.13.3", 20, compute_capability="11.0", proxy="SM120"),
        Target("jetpack7.2-orin", "TensorRT 10.16.2", 20, compute_capability="8.7", proxy="SM86"),
        Target("jetpack7.2-thor", "TensorRT 10.16.2", 20, compute_capability="11.0", proxy="SM120"),
        Target("onnxruntime-x86", "ONNX Runtime", 20),
        Target("onnxruntime-arm", "ONNX Runtime", 20),
    )
}


def find_target(name: str) -> Target:
    """Return the target of a name.

    Raises:
        BadInputError: There is none; the nearest name is suggested.
    """
    if name in TARGETS:
        return TARGETS[name]
    nearest = difflib.get_close_matches(name, TARGETS, n=1, cutoff=0.4)
    raise BadInputError(
        f"a target is one of {', '.join(TARGETS)}",
        found=f"'{name}'",
        remedy=f"did you mean {nearest[0]}?" if nearest else "choose one of them",
    )
