"""What differs between TensorRT's versions, in one table; and how it is found. Not run on a board.

    8.6    types by the builder's flags; islands of fp32 stay by constraints on layers
    10     types from the graph, if the network is created STRONGLY_TYPED
    11     types from the graph, always

DLA takes no strongly typed network before 11. TensorRT-RTX is 10 without its flags; it parses and
builds without a GPU, which is how the builder is tested.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from deploy.errors import BadInputError

__all__ = [
    "DIALECTS",
    "Dialect",
    "datatypes",
    "dialect_of",
    "error_log",
    "load_tensorrt",
]


@dataclass(frozen=True)
class Dialect:
    """How one version is told which types to compute in.

    Attributes:
        network_flags: Members of NetworkDefinitionCreationFlag to create a network with.
        precision_flags: Members of BuilderFlag for each precision; without any, the graph decides.
        constrains_layers: Whether the precision of each layer of an fp16 graph must be set.
        keeps_timings: Whether there is a timing cache; TensorRT-RTX times nothing at the build.
    """

    network_flags: tuple[str, ...] = ()
    precision_flags: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    constrains_layers: bool = False
    keeps_timings: bool = True


# int8 needs no constraints: without FP16 what has no Q/DQ can only be fp32.
_WEAK = Dialect(
    ("EXPLICIT_BATCH",),
    {"fp16": ("FP16", "OBEY_PRECISION_CONSTRAINTS"), "int8": ("INT8",)},
    constrains_layers=True,
)
_STRONG = Dialect(("STRONGLY_TYPED",))
_ALWAYS_STRONG = Dialect()
# DLA has no fp32 at all, so that no island could stay; what it cannot compute goes to the GPU.
_WEAK_DLA = Dialect(
    ("EXPLICIT_BATCH",),
    {"fp16": ("FP16", "GPU_FALLBACK"), "int8": ("INT8", "FP16", "GPU_FALLBACK")},
)
_STRONG_DLA = Dialect((), {"fp16": ("GPU_FALLBACK",), "int8": ("GPU_FALLBACK",)})

DIALECTS: dict[tuple[str, str], tuple[Dialect, Dialect | None]] = {
    ("tensorrt", "8.6"): (_WEAK, _WEAK_DLA),
    ("tensorrt", "10"): (_STRONG, _WEAK_DLA),
    ("tensorrt", "11"): (_ALWAYS_STRONG, _STRONG_DLA),
    ("tensorrt_rtx", "1"): (Dialect(("STRONGLY_TYPED",), keeps_timings=False), None),
}
"""By library and version: on the GPU, and on a DLA."""


def load_tensorrt() -> Any:
    """Import TensorRT.

    Raises:
        BadInputError: It is not here, or of a version that edgereg does not know.
    """
    try:
        import tensorrt
    except ImportError as error:
        raise BadInputError(
            "the backend tensorrt needs TensorRT's Python package",
            found=f"none here: {error}",
            remedy="install JetPack's python3-libnvinfer, and make the virtual environment with "
            "--system-site-packages",
        ) from error
    dialect_of(tensorrt)
    return tensorrt


def dialect_of(trt: Any, *, on_dla: bool = False) -> Dialect:
    """Return how this version of TensorRT is spoken to.

    Raises:
        BadInputError: The version is not in the table, or has no DLA.
    """
    version = re.match(r"(\d+)\.(\d+)", trt.__version__)
    numbers = version.groups() if version else ("?", "?")
    library = "tensorrt_rtx" if "rtx" in trt.__name__ else "tensorrt"
    keys = ((library, numbers[0]), (library, ".".join(numbers)))
    rows = [DIALECTS[key] for key in keys if key in DIALECTS]
    if not rows:
        known = ", ".join(version for name, version in DIALECTS if name == library)
        raise BadInputError(
            f"TensorRT must be one of {known}",
            found=f"{trt.__version__}",
            remedy="install JetPack 6 or 7; JetPack 5 is not supported",
        )
    on_gpu, dla = rows[0]
    if not on_dla:
        return on_gpu
    if dla is None:
        raise BadInputError(
            "a DLA is driven by TensorRT proper", found=trt.__name__, remedy="build for the GPU"
        )
    return dla


def datatypes(trt: Any) -> dict[Any, str]:
    """Return numpy's names of TensorRT's data types, as far as numpy has them."""
    datatype = trt.DataType
    names = {
        datatype.FLOAT: "float32",
        datatype.HALF: "float16",
        datatype.INT8: "int8",
        datatype.UINT8: "uint8",
        datatype.INT32: "int32",
        datatype.BOOL: "bool",
    }
    if hasattr(datatype, "INT64"):  # from 10
        names[datatype.INT64] = "int64"
    return names


def error_log(trt: Any) -> Any:
    """Return a logger that keeps the errors in a list `errors`; the default one prints to stdout.

    It must live as long as what it was given to.
    """

    class Logger(trt.ILogger):  # type: ignore[misc]  # known at run time only
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            # Where there is no GPU, TensorRT-RTX says so after each error of another kind.
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR) and (
                "catchCudaError" not in message
            ):
                self.errors.append(message)

    return Logger()
