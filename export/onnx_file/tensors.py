"""Look into an ONNX graph: what type each tensor has, and which values it takes on real inputs."""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, helper, numpy_helper

from export.onnx_file.run_onnx import open_session

__all__ = ["element_types", "known_shapes", "module_of", "observe", "stored_values"]


def element_types(proto: onnx.ModelProto) -> dict[str, int]:
    """Return the element type (onnx.TensorProto.DataType) of every tensor of a graph."""
    graph = onnx.shape_inference.infer_shapes(proto, strict_mode=True).graph
    values = (*graph.input, *graph.value_info, *graph.output)
    types = {value.name: int(value.type.tensor_type.elem_type) for value in values}
    return types | {tensor.name: int(tensor.data_type) for tensor in graph.initializer}


def known_shapes(graph: onnx.GraphProto) -> dict[str, tuple[int, ...]]:
    """Return the shapes that Reshape can be told: all sizes known but that of the batch, -1."""
    found = {}
    for value in (*graph.value_info, *graph.output):
        batch, *others = value.type.tensor_type.shape.dim or [None]
        if batch is not None and all(dim.HasField("dim_value") for dim in others):
            found[value.name] = (-1, *(dim.dim_value for dim in others))
    return found


def stored_values(proto: onnx.ModelProto) -> dict[str, NDArray[Any]]:
    """Return the values of a graph's initializers and of its Constant nodes."""
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    for node in proto.graph.node:
        if node.op_type == "Constant":
            (attribute,) = node.attribute
            value = helper.get_attribute_value(attribute)
            if isinstance(value, onnx.TensorProto):
                value = numpy_helper.to_array(value)
            values[node.output[0]] = np.asarray(value)
    return values


def module_of(node: NodeProto) -> str:
    """Return the module that a node belongs to; "" for the model itself."""
    return node.name.rpartition("/")[0]


def observe(
    proto: onnx.ModelProto, inputs: NDArray[Any], names: Iterable[str]
) -> Iterator[dict[str, NDArray[np.generic]]]:
    """Run a graph on (N, ...) inputs one by one, and yield the named tensors of each.

    Nothing is optimised, so that every tensor is there; one at a time, so that memory is bounded.
    """
    opened, types = onnx.ModelProto(), element_types(proto)
    opened.CopyFrom(proto)
    outputs = {value.name for value in proto.graph.output}
    wanted = [*names]
    opened.graph.output.extend(
        helper.make_tensor_value_info(name, types[name], None)
        for name in wanted
        if name not in outputs
    )
    session = open_session(opened.SerializeToString(), optimise=False)
    (spec,) = session.get_inputs()
    for start in range(len(inputs)):
        values = session.run(wanted, {spec.name: inputs[start : start + 1]})
        yield dict(zip(wanted, values, strict=True))
