"""Find what comes near the end of fp16, 65,504, on real images.

A node overflows by what it reads (its weights too), by what it makes, or by a sum on the way from
one to the other, which is seen in neither: a mean over a large map, the squares of a normalisation.
Whether a GPU keeps such a sum in fp16 depends on the kernel; so the sums of reductions and of
normalisations may not come near. Those within a product or a convolution are not looked at: GPUs
add them in fp32.
"""

from collections.abc import Collection
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper

from export.onnx_file.tensors import element_types, observe, stored_values

__all__ = ["out_of_range"]

_LARGEST = 65504.0
_HEADROOM = 4.0  # other images reach further than those at hand
_SUMS_OF_SQUARES = {"LayerNormalization", "InstanceNormalization", "GroupNormalization"}
_SUMS_OF_SQUARES |= {"ReduceL2", "ReduceSumSquare"}
_SUMS = {"ReduceMean", "ReduceSum", "ReduceL1", "GlobalAveragePool"}


def out_of_range(
    proto: onnx.ModelProto, inputs: NDArray[np.float32], *, among: Collection[str]
) -> dict[str, str]:
    """Return the nodes that read, make or sum what is near the end of fp16, with what it is."""
    types = element_types(proto)
    stored = stored_values(proto)
    nodes = [node for node in proto.graph.node if node.name in among]
    floats = {
        n
        for node in nodes
        for n in (*node.input, *node.output)
        if types.get(n) == TensorProto.FLOAT
    }
    largest = {name: _magnitude(stored[name]) for name in floats & stored.keys()}
    sums: dict[str, float] = {}
    seen = sorted(floats - stored.keys())
    for values in observe(proto, inputs, seen):
        for name, value in values.items():
            largest[name] = max(largest.get(name, 0.0), _magnitude(value))
        for node in nodes:
            if node.input[0] in values and node.op_type in _SUMS | _SUMS_OF_SQUARES:
                total = _largest_sum(node, values[node.input[0]], stored)
                sums[node.name] = max(sums.get(node.name, 0.0), total)
    reasons = {}
    for node in nodes:
        reach = {
            "reads": max((largest[n] for n in node.input if n in largest), default=0.0),
            "makes": max((largest[n] for n in node.output if n in largest), default=0.0),
            "sums to": sums.get(node.name, 0.0),
        }
        verb, peak = max(reach.items(), key=lambda item: item[1])
        if not peak < _LARGEST / _HEADROOM:
            reasons[node.name] = f"overflow: it {verb} {peak:.3g}"
    return reasons


def _magnitude(values: NDArray[Any]) -> float:
    """Return the largest magnitude; minus infinity, which masks are made of, fp16 has as well."""
    finite = values[~np.isneginf(values)]
    return float(np.abs(finite).max()) if finite.size else 0.0


def _largest_sum(node: NodeProto, x: NDArray[Any], stored: dict[str, NDArray[Any]]) -> float:
    """Return the largest sum, of magnitudes or of squares, that a reduction runs through."""
    terms = np.abs(x.astype(np.float64))
    if node.op_type in _SUMS_OF_SQUARES:
        terms = terms**2
    return float(terms.sum(axis=_axes(node, x.ndim, stored)).max())


def _axes(node: NodeProto, rank: int, stored: dict[str, NDArray[Any]]) -> tuple[int, ...] | None:
    """Return the axes that a reduction or normalisation sums over; None for all."""
    given = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    if node.op_type == "LayerNormalization":
        return tuple(range(given.get("axis", -1) % rank, rank))
    if node.op_type in ("InstanceNormalization", "GlobalAveragePool", "GroupNormalization"):
        return tuple(range(2, rank))
    if "axes" in given:
        return tuple(given["axes"])
    named = len(node.input) > 1 and node.input[1] in stored
    return tuple(int(axis) for axis in stored[node.input[1]]) if named else None
