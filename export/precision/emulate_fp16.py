"""Compute what an fp16 graph computes, on a CPU that has no fp16 arithmetic.

    Given   y = op(x)             x and y fp16
    Result  y = fp32(fp16(op(x)))  x and y fp32, with values that fp16 has

ONNX Runtime's CPU kernels compute fp16 graphs in fp32 and round nothing in between: an overflow
comes out finite. Here every fp16 node's output is rounded by a pair of casts, and every fp16 weight
before the run, so that rounding and overflow are seen. What is not reproduced is how a GPU
accumulates within a node: its sums may be fp16 as well, and in any order. The errors found so are
called "fp16 emulated".
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

from export.onnx_file.tensors import element_types, observe

__all__ = ["emulate_fp16", "locate_nonfinite"]

_HALF, _SINGLE = TensorProto.FLOAT16, TensorProto.FLOAT


def emulate_fp16(model: bytes) -> bytes:
    """Return the fp32 graph that rounds where an fp16 graph does.

    Args:
        model: An ONNX file whose inputs and outputs are fp32, and of whose nodes some are fp16.
    """
    proto = onnx.load_model_from_string(model)
    types, graph = element_types(proto), proto.graph
    for tensor in graph.initializer:
        if tensor.data_type == _HALF:
            values = numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    nodes: list[NodeProto] = []
    for node in graph.node:
        nodes += _rounded(node, types)
    graph.ClearField("node")
    graph.node.extend(nodes)
    graph.ClearField("value_info")
    return bytes(proto.SerializeToString(deterministic=True))


def _rounded(node: NodeProto, types: dict[str, int]) -> list[NodeProto]:
    """Return a node as it is, or with its fp16 outputs rounded by a pair of casts each."""
    if node.op_type == "Cast" and types[node.output[0]] == _SINGLE:
        if types[node.input[0]] != _HALF:
            return [node]
        return [helper.make_node("Identity", node.input, node.output, node.name)]
    rounded = [name for name in node.output if name and types[name] == _HALF]
    if not rounded:
        return [node]
    new = NodeProto()
    new.CopyFrom(node)
    if node.op_type == "Cast":
        new = helper.make_node("Cast", node.input, node.output, node.name, to=_SINGLE)
    casts = []
    for i, name in enumerate(node.output):
        if name in rounded:
            exact, half = f"{name}.exact", f"{name}.half"
            new.output[i] = exact
            casts += [
                helper.make_node("Cast", [exact], [half], half, to=_HALF),
                helper.make_node("Cast", [half], [name], f"{name}.single", to=_SINGLE),
            ]
    return [new, *casts]


def locate_nonfinite(model: bytes, inputs: NDArray[Any]) -> str | None:
    """Return the first node whose output overflows or is NaN while its inputs are finite.

    Minus infinity that was read from a mask is meant, and counts as finite.

    Args:
        model: An ONNX file, of fp16 nodes too: it is emulated.
        inputs: (N, ...) images, as the graph takes them.
    """
    proto = onnx.load_model_from_string(emulate_fp16(model))
    types = element_types(proto)
    nodes = [n for n in proto.graph.node if not n.name.endswith((".half", ".single"))]
    floats = {n for node in proto.graph.node for n in node.output if types.get(n) == _SINGLE}
    stored = {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}
    masks = {name for name, values in stored.items() if _is_mask(values)}
    guilty: set[str] = set()
    for values in observe(proto, inputs, sorted(floats)):
        wild = {name: value for name, value in values.items() if not np.isfinite(value).all()}
        guilty |= {*_origins(nodes, wild, masks)}
    return next((node.name for node in nodes if node.name in guilty), None)


def _origins(
    nodes: list[NodeProto], wild: dict[str, NDArray[np.generic]], masks: set[str]
) -> Iterator[str]:
    """Yield the nodes that make what is not finite from what is; masks pass."""
    masks, bad = {*masks}, set[str]()
    for node in nodes:
        rounded = {name.removesuffix(".exact") for name in node.output}
        made = wild.keys() & {*node.output, *rounded}
        if not masks.isdisjoint(node.input) and all(_is_mask(wild[name]) for name in made):
            masks |= made
        elif made:
            if bad.isdisjoint(node.input):
                yield node.name
            bad |= made


def _is_mask(values: NDArray[np.generic]) -> bool:
    """Say whether minus infinity is among the values, and nothing else that is not finite."""
    unusual = values[~np.isfinite(values)]
    return unusual.size > 0 and bool(np.isneginf(unusual).all())
