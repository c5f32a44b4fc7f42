"""What is exported for which machine: one row of a table each.

Every value was read from NVIDIA's release notes of that JetPack, or tried; boards are named by
their GPU's compute capability (SM). TensorRT-RTX, which judges an export without a GPU, knows other
SMs: each row names its proxy. JetPack 5 has Python 3.8 and is not here.

Opset 20 brings Gelu and LayerNormalization as one node each, and not yet Attention, which TensorRT
knows from 10.14. TensorRT 8.6 reads `axes` as an attribute only, as opset 17 has it; later ones
give it as an input, which 8.6 overlooks and so reduces over all axes.
"""

import dataclasses
import difflib
from dataclasses import dataclass
from typing import Any, Literal

from deploy.errors import BadInputError
from export.operators import TENSORRT_8_6, TENSORRT_10_1

__all__ = ["TARGETS", "Precision", "Scheme", "Target", "find_target"]

Precision = Literal["fp32", "fp16", "int8"]
Scheme = Literal["tensorrt", "u8s8", "s8s8"]


@dataclass(frozen=True)
class Target:
    """One machine that a bundle can be made for.

    Args:
        name: Its key in TARGETS.
        runtime: What executes the model there, with the version that comes with the machine.
        opset: The ONNX operator set of the export.
        scheme: How int8 is written: "tensorrt" is symmetric, per channel, without quantized biases;
            "u8s8" has unsigned activations, the fast kernels of x86, and "s8s8" those of Arm.
        places_layers: Whether int8 is for some layers only, chosen here by what they cost
            (export/precision/partition.py). TensorRT's builder chooses each one's kernel by time.
        precisions: What may be exported. ONNX Runtime's CPU kernels compute fp16 in fp32: slower
            and no more exact than fp32, so there is none. Orin has no FP8.
        blocked: Whether its float kernels want channels in blocks, and so a form of
            squeeze-and-excitation that keeps them (export/onnx_file/blocks.py).
        typing: Whether TensorRT takes the types from the graph ("strong"), or from flags at the
            build ("weak", the only way of 8.6); "" where there is no TensorRT.
        operators: What the parser of that release knows; None where ONNX Runtime runs the file
            during the export.
        compute_capability: Of the GPU; None for a CPU.
        proxy: The compute capability for which TensorRT-RTX judges; None where nothing is judged.
    """

    name: str
    runtime: str
    opset: int
    scheme: Scheme
    precisions: tuple[Precision, ...]
    places_layers: bool = False
    blocked: bool = False
    typing: Literal["strong", "weak", ""] = ""
    operators: frozenset[str] | None = None
    compute_capability: str | None = None
    proxy: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the row as JSON values, without the list of operators."""
        row = dataclasses.asdict(self)
        del row["operators"]
        return row | {"precisions": list(self.precisions)}


def _jetson(name: str, tensorrt: str, sm: str) -> Target:
    is_old = tensorrt.startswith("8.")
    return Target(
        name,
        f"TensorRT {tensorrt}",
        opset=17 if is_old else 20,
        scheme="tensorrt",
        precisions=("fp32", "fp16", "int8"),
        typing="weak" if is_old else "strong",
        operators=TENSORRT_8_6 if is_old else TENSORRT_10_1,
        compute_capability=sm,
        proxy={"8.7": "SM86", "11.0": "SM120"}[sm],
    )


def _cpu(name: str, scheme: Scheme, *, blocked: bool) -> Target:
    return Target(
        name,
        "ONNX Runtime",
        opset=20,
        scheme=scheme,
        precisions=("fp32", "int8"),
        places_layers=True,
        blocked=blocked,
    )


TARGETS: dict[str, Target] = {
    row.name: row
    for row in (
        _jetson("jetpack6.0", "8.6.2", "8.7"),
        _jetson("jetpack6.2", "10.3.0", "8.7"),
        _jetson("jetpack7.0-thor", "10.13.3", "11.0"),
        _jetson("jetpack7.2-orin", "10.16.2", "8.7"),
        _jetson("jetpack7.2-thor", "10.16.2", "11.0"),
        _jetson("jetpack7.2.2-orin", "11.4.1", "8.7"),
        _jetson("jetpack7.2.2-thor", "11.4.1", "11.0"),
        _cpu("onnxruntime-x86", "u8s8", blocked=True),
        _cpu("onnxruntime-arm", "s8s8", blocked=False),  # not measured there
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
