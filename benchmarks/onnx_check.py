"""Export a simplified model, and run the file in ONNX Runtime against the model it came from."""

import re
from dataclasses import dataclass

import onnx
import torch
from randomize import images
from torch import nn
from torch.utils._pytree import tree_leaves

from deploy.bundle.manifest import Tolerance
from deploy.measure.compare import compare
from export.onnx_file.run_onnx import open_session
from export.onnx_file.to_onnx import to_onnx
from export.passes.simplify import Simplified
from export.targets import find_target

__all__ = ["BATCHES", "TOLERANCE", "OnnxCheck", "check_onnx"]

BATCHES = (1, 3)
TOLERANCE = Tolerance(
    max_scaled_error=1e-3,
    min_top1_agreement=0.0,
    reason="float32 and random weights: rounding grows to 1e-4 at worst, a fault is far above 1e-2",
)


@dataclass(frozen=True)
class OnnxCheck:
    """How a file's answers compare with the original model's.

    Args:
        problem: Why the file is no good; empty if it is.
        scaled_error: The largest, over BATCHES; None if there are no answers.
        batchnorms: How many BatchNormalization nodes the file has.
        unnamed: Those that the report does not name as left.
    """

    problem: str
    scaled_error: float | None = None
    batchnorms: int = 0
    unnamed: tuple[str, ...] = ()


def check_onnx(model: nn.Module, result: Simplified, *, size: int) -> OnnxCheck:
    """Export with a dynamic batch size and compare at each of BATCHES."""
    try:
        return _check(model, result, size=size)
    except Exception as error:  # the exporter's, ONNX Runtime's: a row says it, nothing stops
        said = re.sub(r"\x1b\[\d+m", "", " ".join(str(error).split()))  # torch writes in colours
        return OnnxCheck(f"{type(error).__name__}: {said}"[:300])


def _check(model: nn.Module, result: Simplified, *, size: int) -> OnnxCheck:
    target = find_target("onnxruntime-x86")
    file = to_onnx(result.model, (images(2, size, seed=3),), target=target, max_batch=max(BATCHES))
    nodes = onnx.load_from_string(file).graph.node
    norms = [node.name.rpartition("/")[0] for node in nodes if node.op_type == "BatchNormalization"]
    left = result.report.skipped
    unnamed = tuple(name for name in norms if name not in left)
    problems = [f"BatchNormalization {name} is not in the report" for name in unnamed]

    session = open_session(file)
    errors = []
    for batch in BATCHES:
        x = images(batch, size, seed=4)
        (answer,) = session.run(None, {"images": x.numpy()})
        with torch.no_grad():
            expected = tree_leaves(model(x))[0].numpy()
        comparison = compare(answer, expected, TOLERANCE)
        errors.append(comparison.max_scaled_error)
        problems += [f"at batch size {batch}: {reason}" for reason in comparison.reasons]
    return OnnxCheck("; ".join(problems), max(errors), len(norms), unnamed)
