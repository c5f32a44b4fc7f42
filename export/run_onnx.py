"""Run an exported file by ONNX Runtime on the CPU, while there is no bundle to open."""

from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

__all__ = ["open_session", "run_batches"]

_BATCH = 64


def open_session(model: bytes, *, optimise: bool = True) -> Any:
    """Load a model; one thread, so that a second run adds in the same order."""
    options = onnxruntime.SessionOptions()
    if not optimise:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def run_batches(model: bytes, inputs: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the first output for (N, ...) inputs, computed in small batches."""
    session = open_session(model)
    (spec,) = session.get_inputs()
    size = spec.shape[0] if isinstance(spec.shape[0], int) else _BATCH
    batches = (inputs[i : i + size] for i in range(0, len(inputs), size))
    return np.concatenate([session.run(None, {spec.name: batch})[0] for batch in batches])
