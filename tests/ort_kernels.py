"""Which kernels ONNX Runtime makes of a file's nodes."""

from collections import Counter
from pathlib import Path

import onnx
import onnxruntime


def kernels(model: bytes, path: Path) -> Counter[str]:
    """Return how many nodes of each type are run; the optimised file is written to a path."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(path), 3
    onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load_model(path).graph.node)
