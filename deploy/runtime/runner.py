"""What runs a model: one protocol, one table of backends."""

from collections.abc import Callable
from typing import Any, Literal, Protocol

from numpy.typing import NDArray

from deploy.bundle.read import Bundle
from deploy.errors import BadInputError
from deploy.runtime.first_load import assert_first_load
from deploy.runtime.ort_runner import OrtRunner

__all__ = ["BACKENDS", "Backend", "Runner", "open_runner"]

Backend = Literal["onnxruntime", "tensorrt"]


class Runner(Protocol):
    """A loaded model of one precision; for one thread at a time."""

    @property
    def name(self) -> str:
        """The backend, its version and its device: "onnxruntime 1.32.0 CPU"."""

    @property
    def precision(self) -> str:
        """The bundle's variant that is run."""

    @property
    def threads(self) -> int:
        """CPU threads that compute."""

    def __call__(self, batch: NDArray[Any], *, out: NDArray[Any] | None = None) -> NDArray[Any]:
        """Compute (N, ...) outputs from what pre-processing gives; into `out`, if it is given."""

    def close(self) -> None:
        """Free what the model holds."""


def open_runner(
    bundle: Bundle, *, backend: Backend, precision: str | None, threads: int | None = None
) -> Runner:
    """Load one variant of a bundle. Nothing else is tried when it cannot be loaded.

    Args:
        bundle: The opened bundle.
        backend: What runs it.
        precision: Which variant. None is fp32 for ONNX Runtime, and for TensorRT the one that
            `edgereg build` found to be the fastest.
        threads: CPU threads that compute; None leaves it to the backend.

    Raises:
        BadInputError: The bundle has no such variant, or the backend is missing or cannot load it.
        CheckFailedError: An engine is not the one that was built here; or the model made ONNX
            Runtime fail at its first load, in a process of its own.
    """
    if precision is None:
        precision = "fp32" if backend == "onnxruntime" else _chosen_precision(bundle)
    if precision not in bundle.manifest.variants:
        raise BadInputError(
            "the precision must be one of the bundle's variants",
            found=f"'{precision}'; bundle '{bundle.path.name}' has "
            f"{', '.join(sorted(bundle.manifest.variants))}",
            remedy="choose one with --precision, or export this one too",
        )
    if backend == "onnxruntime":  # an engine's first load is its build
        assert_first_load(bundle, precision)
    return BACKENDS[backend](bundle, precision, threads)


def _chosen_precision(bundle: Bundle) -> str:
    from deploy.runtime.engines import chosen_precision  # which every other start does without

    return chosen_precision(bundle)


def _open_engine(bundle: Bundle, precision: str, threads: int | None) -> Runner:
    from deploy.runtime.engines import open_engine

    return open_engine(bundle, precision, threads)


BACKENDS: dict[Backend, Callable[[Bundle, str, int | None], Runner]] = {
    "onnxruntime": OrtRunner,
    "tensorrt": _open_engine,
}
