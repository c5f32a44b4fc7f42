"""What runs a model: one protocol, one table of backends."""

from collections.abc import Callable
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from deploy.bundle.read import Bundle
from deploy.errors import BadInputError
from deploy.runtime.ort_runner import OrtRunner

__all__ = ["BACKENDS", "Backend", "Runner", "open_runner"]

Backend = Literal["onnxruntime", "tensorrt"]


class Runner(Protocol):
    """A loaded model of one precision."""

    @property
    def name(self) -> str:
        """The backend, its version and its device: "onnxruntime 1.32.0 CPU"."""

    @property
    def precision(self) -> str:
        """The bundle's variant that is run."""

    @property
    def threads(self) -> int:
        """CPU threads that compute."""

    def __call__(self, batch: NDArray[Any]) -> NDArray[np.float32]:
        """Compute (N, classes) logits from what pre-processing gives."""

    def close(self) -> None:
        """Free what the model holds."""


def open_runner(
    bundle: Bundle, *, backend: Backend, precision: str, threads: int | None = None
) -> Runner:
    """Load one variant of a bundle. Nothing else is tried when it cannot be loaded.

    Args:
        bundle: The opened bundle.
        backend: What runs it.
        precision: Which variant.
        threads: CPU threads that compute; None leaves it to the backend.

    Raises:
        BadInputError: The bundle has no such variant, or the backend is missing or cannot load it.
    """
    if precision not in bundle.manifest.variants:
        raise BadInputError(
            "the precision must be one of the bundle's variants",
            found=f"'{precision}'; bundle '{bundle.path.name}' has "
            f"{', '.join(sorted(bundle.manifest.variants))}",
            remedy="choose one with --precision, or export this one too",
        )
    return BACKENDS[backend](bundle, precision, threads)


def _refuse_tensorrt(bundle: Bundle, precision: str, threads: int | None) -> Runner:
    raise BadInputError(
        "the backend must be one that this edgereg has",
        found="tensorrt; the TensorRT backend comes with the device work",
        remedy="use --backend onnxruntime",
    )


BACKENDS: dict[Backend, Callable[[Bundle, str, int | None], Runner]] = {
    "onnxruntime": OrtRunner,
    "tensorrt": _refuse_tensorrt,
}
