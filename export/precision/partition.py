"""Which layers are computed in int8 on a CPU, and which stay in float: a minimum cut.

In int8 a convolution takes a third to a quarter of its time. But a tensor that passes from float
to integers is quantized and laid out anew, and back likewise: narrow layers lose more by that than
they gain, unless their neighbours are in int8 as well. A depthwise convolution gains nothing by
itself, and belongs to its neighbours' side. The sides are chosen together, so that the sum of

    each layer's time, on its side
    each tensor that is made on one side and read on the other

is least. That is a minimum cut between int8 and float, which is found exactly. What has no kernel
for integers (SiLU, norms, attention), or none that is known here, the images and the answer lie on
the side of float. A product of a transformer takes float and gives float: it is judged alone, by
its size.

The times are a model, one thread, batch 1, and not measured during an export, so that the same
checkpoint gives the same bytes. Its figures were read from ONNX Runtime 1.32's profiles of six
networks on an AMD EPYC with AVX512-VNNI; for Arm they are a guess. Measured: docs/benchmarks.md.
Source: Greig, Porteous and Seheult, Exact maximum a posteriori estimation for binary images, 1989.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import networkx
import onnx
from networkx.algorithms.flow import boykov_kolmogorov

from export.onnx_file.tensors import known_shapes
from export.precision.quantize import layers_of

__all__ = ["layers_in_float"]

# Picoseconds, for each multiplication, element of a tensor, or weight.
_FLOAT_MULTIPLY, _FLOAT_OUTPUT, _FLOAT_WEIGHT = 7.6, 80, 100
_FLOAT_NARROW_OUTPUT = 200  # more, where few channels are read and the outputs fill no register
_INT8_MULTIPLY, _INT8_OUTPUT, _INT8_INPUT, _INT8_WEIGHT = 2.1, 40, 20, 15
_INT8_PATCH_ROW, _INT8_NARROW_PATCH_ROW = 3000, 5500  # of a kernel, copied for each position
_DEPTHWISE_MULTIPLY, _GROUPED_MULTIPLY = (24, 25), (16, 15)  # in float, and in int8
_TO_INT8, _TO_FLOAT = 170, 195
_POOL_TO_INT8 = 14_000  # ONNX Runtime pools the integers then, by a kernel without vectors
_NODE = 1_000_000  # for a node, and for a tensor that crosses
_WORTH = 1.1  # times faster at least is int8 to be: float keeps the digits

_LEAST_SAVED = 0.05  # microseconds, of which a reason speaks
_NARROW, _REGISTER = 16, 64  # channels
_LEAST_SIDE = 48  # inputs and outputs of a MatMul or Gemm from which int8 pays
_FOLLOWERS = ("Relu", "Clip")  # are one kernel with what makes their input
# What has a kernel on both sides: picoseconds for an element of the output in float, and in int8.
_ON_BOTH_SIDES = {"Add": (30, 220), "Concat": (100, 140), "MaxPool": (50, 40)}

Shapes = Mapping[str, tuple[int, ...]]
Weights = Mapping[str, tuple[int, ...]]
_INT8, _FLOAT, _CALLER = "the side of int8", "the side of float", "the caller"


@dataclass(frozen=True)
class _Times:
    """Of a convolution, in picoseconds."""

    in_float: float
    in_int8: float


def layers_in_float(model: bytes) -> dict[str, str]:
    """Return the layers to be left in float, each with the reason.

    Args:
        model: A simplified float32 ONNX file.

    Returns:
        Names as `layers_of` has them. Nothing if all were in float: the choice between int8 and
        float is then that of the whole model, and its time is compared with fp32's.
    """
    graph = onnx.shape_inference.infer_shapes(onnx.load_model_from_string(model)).graph
    weights = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    shapes = {value.name: _shape(value) for value in graph.input} | known_shapes(graph)
    names = {*layers_of(model)}
    layers = [node for node in graph.node if node.name in names]
    times = {
        node.output[0]: _times(node, weights[node.input[1]], shapes)
        for node in layers
        if node.op_type == "Conv" and shapes.keys() >= {node.input[0], node.output[0]}
    }
    network = _network(graph, times, weights, shapes)
    _, (integers, _) = networkx.minimum_cut(network, _INT8, _FLOAT, flow_func=boykov_kolmogorov)
    found = {}
    for node in layers:
        sizes = weights[node.input[1]]
        if node.op_type != "Conv" and min(sizes) < _LEAST_SIDE:
            rows, columns = sizes
            found[node.name] = f"a product of {rows} x {columns}: int8 pays from {_LEAST_SIDE} on"
        elif node.op_type == "Conv" and node.output[0] not in times:
            found[node.name] = "the size of what it reads or makes is not known"
        elif node.op_type == "Conv" and _name(node.output[0]) not in integers:
            found[node.name] = _reason(times[node.output[0]])
    return found if len(found) < len(layers) else {}


def _reason(times: _Times) -> str:
    saved = (times.in_float - times.in_int8) / 1e6
    if saved < _LEAST_SAVED:
        return "int8 is no faster here, by a model of such a CPU"
    return f"int8 saves {saved:.1f} us here, by a model of such a CPU, and costs more around it"


def _times(node: onnx.NodeProto, weights: tuple[int, ...], shapes: Shapes) -> _Times:
    outputs, inputs, *kernel = weights
    groups = {attribute.name: attribute.i for attribute in node.attribute}.get("group", 1)
    made, read = _elements(node.output[0], shapes), _elements(node.input[0], shapes)
    positions, count = made / outputs, math.prod(weights)
    if groups > 1:
        each = _DEPTHWISE_MULTIPLY if inputs == 1 else _GROUPED_MULTIPLY
        in_float, in_int8 = (time * count * positions for time in each)
        return _Times(in_float + _NODE, in_int8 + _NODE)
    in_float = (_FLOAT_MULTIPLY * positions + _FLOAT_WEIGHT) * count + _FLOAT_OUTPUT * made
    in_int8 = (_INT8_MULTIPLY * positions + _INT8_WEIGHT) * count
    in_int8 += _INT8_OUTPUT * made + _INT8_INPUT * read
    if math.prod(kernel) > 1:
        is_narrow = inputs < _NARROW
        row = _INT8_NARROW_PATCH_ROW if is_narrow else _INT8_PATCH_ROW
        in_int8 += row * math.prod(kernel[:-1]) * positions
        if is_narrow and outputs % _REGISTER:
            in_float += _FLOAT_NARROW_OUTPUT * made
    return _Times(in_float + _NODE, in_int8 + _NODE)


def _network(
    graph: onnx.GraphProto, times: Mapping[str, _Times], weights: Weights, shapes: Shapes
) -> Any:
    """Return the network of which each cut is a choice of sides, and its capacity the time.

    An edge from a to b is cut, and paid for, where a is in int8 and b in float. One without a
    capacity cannot be cut: if a is in int8, b is, too.
    """
    network = networkx.DiGraph()
    network.add_nodes_from([_INT8, _FLOAT])
    makers = {tensor: node for node in graph.node for tensor in node.output}
    readers = _readers(graph)
    sides = {value.name: _name(value.name) for value in graph.input}  # whose side a tensor is on
    is_float = {*sides.values(), _CALLER}
    for node in graph.node:
        side, (first, *_) = _name(node.output[0]), node.output
        maker = makers.get(node.input[0]) if node.input else None
        if first in times:
            _choose(network, side, times[first])
        elif node.op_type in _ON_BOTH_SIDES and not any(name in weights for name in node.input):
            made = _elements(first, shapes)
            each = (time * made + _NODE for time in _ON_BOTH_SIDES[node.op_type])
            _choose(network, side, _Times(*each))
            if node.op_type == "MaxPool":  # of integers only where they come from integers
                network.add_edge(side, sides[node.input[0]])
        elif (
            node.op_type in _FOLLOWERS
            and maker is not None
            and (maker.output[0] in times or maker.op_type in ("Add", "Concat"))
            and len(readers[node.input[0]]) == 1
        ):
            side = sides[node.input[0]]
        else:
            is_float.add(side)
        sides |= dict.fromkeys(node.output, side)
    for side in sorted(is_float):
        network.add_edge(side, _FLOAT)
    for tensor, side in sides.items():
        if tensor in shapes:
            reads = {sides.get(reader, _CALLER) for reader in readers.get(tensor, [])} - {side}
            is_pooled = tensor in makers and makers[tensor].op_type == "MaxPool"
            _cross(network, tensor, side, reads, _elements(tensor, shapes), is_pooled=is_pooled)
    return network


def _choose(network: Any, side: str, times: _Times) -> None:
    network.add_edge(_INT8, side, capacity=round(times.in_float))
    network.add_edge(side, _FLOAT, capacity=round(_WORTH * times.in_int8))


def _cross(
    network: Any, tensor: str, side: str, reads: set[str], elements: int, *, is_pooled: bool
) -> None:
    """Let the ways of a tensor to the other side be paid: once to int8, to float by each reader.

    What one reader wants in int8 all readers get in int8: so does the quantizer.
    """
    quantized = f"{tensor} in int8"
    to_int8 = _POOL_TO_INT8 if is_pooled else _TO_INT8
    network.add_edge(side, quantized)
    network.add_edge(quantized, side, capacity=to_int8 * elements + _NODE)
    for reader in sorted(reads):
        network.add_edge(reader, quantized)
        network.add_edge(quantized, reader, capacity=_TO_FLOAT * elements + _NODE)


def _readers(graph: onnx.GraphProto) -> dict[str, list[str]]:
    """Return what each tensor is read for: outputs of nodes, or the caller's answer."""
    readers: dict[str, list[str]] = {value.name: [_CALLER] for value in graph.output}
    for node in graph.node:
        for tensor in node.input:
            readers.setdefault(tensor, []).append(node.output[0])
    kinds = {node.output[0]: node.op_type for node in graph.node}
    for node in graph.node:  # of a SiLU both nodes read x, by one kernel
        if node.op_type == "Sigmoid" and len(readers.get(node.output[0], [])) == 1:
            (product,) = readers[node.output[0]]
            if kinds.get(product) == "Mul" and product in readers[node.input[0]]:
                readers[node.input[0]].remove(node.output[0])
    return readers


def _shape(value: onnx.ValueInfoProto) -> tuple[int, ...]:
    """Return the shape of an input as `known_shapes` has those of other tensors."""
    return (-1, *(dim.dim_value for dim in value.type.tensor_type.shape.dim[1:]))


def _elements(tensor: str, shapes: Shapes) -> int:
    """Return the size of a tensor for one image; nothing where it is not known."""
    return abs(math.prod(shapes[tensor])) if tensor in shapes else 0


def _name(tensor: str) -> str:
    return f"the maker of {tensor}"
