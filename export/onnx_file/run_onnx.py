"""Run an exported file by ONNX Runtime on the CPU, while there is no bundle to open."""

from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

__all__ = ["Run", "open_run", "open_session", "run_batches"]

Run = Callable[[NDArray[Any]], NDArray[np.float32]]
_BATCH = 64


def open_session(model: bytes, *, optimise: bool = True, integers: bool = True) -> Any:
    """Load a model; one thread, so that a second run adds in the same order.

    Args:
        model: The ONNX file.
        optimise: Whether ONNX Runtime may fuse nodes.
        integers: Whether it may replace a layer between Q/DQ by its integer kernel.
    """
    options = onnxruntime.SessionOptions()
    if not optimise:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if not integers:
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def open_run(model: bytes, *, integers: bool = True) -> Run:
    """Load a model once, and return what gives its first output for (N, ...) inputs."""
    session = open_session(model, integers=integers)
    (spec,) = session.get_inputs()
    size = spec.shape[0] if isinstance(spec.shape[0], int) else _BATCH

    def run(inputs: NDArray[Any]) -> NDArray[np.float32]:
        batches = (inputs[i : i + size] for i in range(0, len(inputs), size))
        return np.concatenate([session.run(None, {spec.name: batch})[0] for batch in batches])

    return run


def run_batches(model: bytes, inputs: NDArray[Any]) -> NDArray[np.float32]:
    """Return the first output for (N, ...) inputs, computed in small batches."""
    return open_run(model)(inputs)
