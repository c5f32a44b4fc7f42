"""Write an opset 18 graph in opset 17, which TensorRT 8.6 reads.

    Given   y = ReduceMean(x, axes)         axes a stored tensor
    Result  y = ReduceMean(x), axes=[...]   an attribute

torch's exporter writes opset 18 and no earlier one; onnx's version converter has no way down for
ReduceMean, Pad and Split. Here an operator that 18 did not change stays as it is, those that it did
are rewritten one by one, and what cannot be said in opset 17 is refused by the node's name.

Source: the operators' changelog of ONNX, versions 13 to 18.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, helper

from deploy.errors import CheckFailedError
from export.onnx_file.tensors import stored_values

__all__ = ["to_opset_17"]

_REDUCTIONS = {
    "ReduceL1",
    "ReduceL2",
    "ReduceLogSum",
    "ReduceLogSumExp",
    "ReduceMax",
    "ReduceMean",
    "ReduceMin",
    "ReduceProd",
    "ReduceSumSquare",
}
_Stored = dict[str, NDArray[Any]]


def to_opset_17(proto: onnx.ModelProto) -> None:
    """Rewrite a model of opset 18 in place.

    Raises:
        CheckFailedError: A node does what opset 17 has no word for.
    """
    graph = proto.graph
    stored = stored_values(proto)
    for node in graph.node:
        if _since(node, 17) == _since(node, 18):
            continue
        problem = _lower(node, stored)
        if problem:
            raise CheckFailedError(
                "every operator can be written in opset 17",
                found=f"node '{node.name}' ({node.op_type}): {problem}",
                remedy="replace the operation in the model's code, or export for JetPack 6.2",
            )
    read = {name for node in graph.node for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in read]
    graph.ClearField("initializer")
    graph.initializer.extend(kept)
    proto.ClearField("opset_import")
    proto.opset_import.append(helper.make_opsetid("", 17))
    proto.ir_version = 8  # that of opset 17: an older parser need not know a newer one


def _since(node: NodeProto, opset: int) -> int | None:
    """Return the version in which an operator's present form appeared; None if it is not there."""
    if not onnx.defs.has(node.op_type, opset, ""):
        return None
    return int(onnx.defs.get_schema(node.op_type, opset, "").since_version)


def _lower(node: NodeProto, stored: _Stored) -> str:
    """Rewrite a node that opset 18 changed; say why not, or return nothing."""
    if node.op_type in _REDUCTIONS:
        return _lower_reduction(node, stored)
    ways: dict[str, Callable[[NodeProto, _Stored], str]] = {
        "Split": _lower_split,
        "Pad": _lower_pad,
        "Resize": _lower_resize,
        "ScatterElements": _lower_scatter,
        "ScatterND": _lower_scatter,
    }
    way = ways.get(node.op_type)
    return way(node, stored) if way else "opset 17 has no operator of this form"


def _lower_reduction(node: NodeProto, stored: _Stored) -> str:
    if len(node.input) > 1 and node.input[1]:
        axes = _numbers(node.input[1], stored)
        if axes is None:
            return "its axes are computed"
        if not axes and _attribute(node, "noop_with_empty_axes"):
            return "it reduces over no axis"
        if axes:
            node.attribute.append(helper.make_attribute("axes", axes))
    elif _attribute(node, "noop_with_empty_axes"):
        return "it reduces over no axis"
    del node.input[1:]
    _drop(node, "noop_with_empty_axes")
    return ""


def _lower_split(node: NodeProto, stored: _Stored) -> str:
    # Without sizes, 17 makes as many equal parts as there are outputs. 18 can make the last one
    # smaller: such a file fails when it is run, as it is at once.
    _drop(node, "num_outputs")
    return ""


def _lower_pad(node: NodeProto, stored: _Stored) -> str:
    if len(node.input) > 3 and node.input[3]:
        return "it pads some axes, by their numbers"
    del node.input[3:]
    return "" if _attribute(node, "mode") != b"wrap" else "it pads by wrapping around"


def _lower_resize(node: NodeProto, stored: _Stored) -> str:
    if _attribute(node, "antialias") or _attribute(node, "axes"):
        return "it smooths, or resizes some axes by their numbers"
    if _attribute(node, "keep_aspect_ratio_policy") not in (None, b"stretch"):
        return "it keeps the aspect ratio"
    for name in ("antialias", "axes", "keep_aspect_ratio_policy"):
        _drop(node, name)
    return ""


def _lower_scatter(node: NodeProto, stored: _Stored) -> str:
    return "" if _attribute(node, "reduction") in (None, b"none", b"add", b"mul") else "max or min"


def _numbers(name: str, stored: _Stored) -> Sequence[int] | None:
    if name not in stored:
        return None
    return [int(n) for n in np.atleast_1d(stored[name])]


def _attribute(node: NodeProto, name: str) -> object:
    found = [a for a in node.attribute if a.name == name]
    return helper.get_attribute_value(found[0]) if found else None


def _drop(node: NodeProto, name: str) -> None:
    kept = [a for a in node.attribute if a.name != name]
    node.ClearField("attribute")
    node.attribute.extend(kept)
