"""Damage and malice: what becomes of bytes, of a manifest, of an ONNX file. All by a seed."""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

__all__ = ["mutate_bytes", "mutate_json", "mutate_onnx"]

Rng = np.random.Generator

_NUMBERS = (0, 1, -1, 2, 3, 7, 64, 255, 4096, 65_537, 1 << 31, -(1 << 31), 1 << 40, (1 << 63) - 1)
_TEXTS = ("", "images", "x" * 5000, "../../etc/passwd", "\x00", "\ud83d\ude00", "nan", "batch")
_ALL = {schema.name for schema in onnx.defs.get_all_schemas()}
_OPERATORS = sorted(_ALL | {"EPContext", "", "A"})
_WORDS = """
    axis axes perm to group strides pads dilations kernel_shape blocksize mode num_outputs epsilon
    alpha value auto_pad ceil_mode count_include_pad keepdims transA transB allowzero equation
"""
_ATTRIBUTES = tuple(_WORDS.split())


def mutate_bytes(data: bytes, rng: Rng) -> bytes:
    """Flip, overwrite, cut, insert, repeat or move a few bytes; the result always differs."""
    mutant = data
    while mutant == data:
        at = int(rng.integers(0, len(data) + 1))
        size = int(rng.integers(1, 1 + min(64, max(1, len(data)))))
        noise = rng.integers(0, 256, size, dtype=np.uint8).tobytes()
        kind = rng.integers(0, 7)
        if kind == 0 and at < len(data):
            mutant = data[:at] + bytes([data[at] ^ 1 << int(rng.integers(0, 8))]) + data[at + 1 :]
        elif kind == 1:
            mutant = data[:at] + noise[:1] + data[at + 1 :]
        elif kind == 2:
            mutant = data[:at] + noise + data[at + size :]
        elif kind == 3:
            mutant = data[:at] + data[at + size :]
        elif kind == 4:
            mutant = data[:at] + noise + data[at:]
        elif kind == 5:
            mutant = data[:at] + data[at : at + size] + data[at:]
        else:
            mutant = data[:at]
    return mutant


def mutate_json(data: bytes, rng: Rng) -> bytes:
    """Change a value, a key or the shape of a JSON document somewhere."""
    document = json.loads(data)
    places: list[tuple[Any, Any]] = []

    def collect(value: Any) -> None:
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in list(items):
            places.append((value, key))
            if isinstance(item, (dict, list)):
                collect(item)

    collect(document)
    parent, key = places[int(rng.integers(0, len(places)))]
    deep: Any = []
    for _ in range(40):
        deep = [deep]
    values = [None, True, -1, 1.5, 1 << 70, 1e308, "", "../x", "\ud800", [], {}, deep]
    kind = rng.integers(0, 5)
    if kind == 0:
        del parent[key]
    elif kind == 1 and isinstance(parent, dict):
        parent[f"{key}_"] = parent[key]
    elif kind == 2 and isinstance(parent, list):
        parent.insert(int(key), parent[key])
    elif kind == 3 and isinstance(parent[key], str):
        parent[key] = str(rng.permutation(list(parent[key] or "x")).tolist())
    else:
        parent[key] = values[int(rng.integers(0, len(values)))]
    text = json.dumps(document)
    if rng.random() < 0.1:
        text = text.replace(": ", ": NaN, ", 1) if rng.random() < 0.5 else text + text[:10]
    return text.encode()


def mutate_onnx(model: bytes, rng: Rng) -> bytes:
    """Change one to three things of a model by its meaning, so that it stays well-formed."""
    proto = onnx.load_model_from_string(model)
    for _ in range(int(rng.integers(1, 4))):
        change = _CHANGES[int(rng.integers(0, len(_CHANGES)))]
        change(proto, rng)
    return bytes(proto.SerializeToString())


def _pick(items: Any, rng: Rng) -> Any:
    return items[int(rng.integers(0, len(items)))] if len(items) else None


def _names(proto: onnx.ModelProto) -> list[str]:
    made = [name for node in proto.graph.node for name in node.output]
    return [*made, *(t.name for t in proto.graph.initializer), "images", ""]


def _rename_operator(proto: onnx.ModelProto, rng: Rng) -> None:
    if node := _pick(proto.graph.node, rng):
        node.op_type = _pick(_OPERATORS, rng)


def _rewire(proto: onnx.ModelProto, rng: Rng) -> None:
    node = _pick(proto.graph.node, rng)
    if node and node.input:
        node.input[int(rng.integers(0, len(node.input)))] = _pick(_names(proto), rng)


def _add_or_drop_input(proto: onnx.ModelProto, rng: Rng) -> None:
    node = _pick(proto.graph.node, rng)
    if node and node.input and rng.random() < 0.5:
        del node.input[-1]
    elif node:
        node.input.append(_pick(_names(proto), rng))


def _change_attribute(proto: onnx.ModelProto, rng: Rng) -> None:
    nodes = [node for node in proto.graph.node if node.attribute]
    attribute = _pick(_pick(nodes, rng).attribute, rng) if nodes else None
    if attribute is None:
        return
    if attribute.ints:
        attribute.ints[int(rng.integers(0, len(attribute.ints)))] = _pick(_NUMBERS, rng)
    elif attribute.HasField("i"):
        attribute.i = _pick(_NUMBERS, rng)
    elif attribute.HasField("f"):
        attribute.f = _pick((0.0, -1.0, float("inf"), float("nan"), 1e38), rng)
    elif attribute.HasField("s"):
        attribute.s = _pick(_TEXTS, rng).encode("utf-8", "surrogatepass")


def _add_attribute(proto: onnx.ModelProto, rng: Rng) -> None:
    if node := _pick(proto.graph.node, rng):
        number = _pick(_NUMBERS, rng)
        value = _pick(([number] * int(rng.integers(1, 6)), number, 1.5, "linear"), rng)
        node.attribute.append(helper.make_attribute(_pick(_ATTRIBUTES, rng), value))


def _reshape_weight(proto: onnx.ModelProto, rng: Rng) -> None:
    tensor = _pick(proto.graph.initializer, rng)
    if tensor is None:
        return
    count = int(np.prod(tensor.dims))
    shapes = [
        [count],
        [1, count],
        [count, 1, 1],
        [1] * 7 + [count],
        [0],
        [],
        list(tensor.dims)[::-1],
    ]
    del tensor.dims[:]
    tensor.dims.extend(_pick(shapes, rng))


def _change_weight(proto: onnx.ModelProto, rng: Rng) -> None:
    tensor = _pick(proto.graph.initializer, rng)
    if tensor is None:
        return
    try:
        array = np.array(numpy_helper.to_array(tensor))
    except (ValueError, onnx.checker.ValidationError):
        return  # an earlier change gave it a shape that its data does not fill, or data elsewhere
    if array.size and array.dtype.kind in "iu":
        bounds = np.iinfo(array.dtype)
        number = int(np.clip(_pick(_NUMBERS, rng), bounds.min, bounds.max))
        array.flat[int(rng.integers(0, array.size))] = number
    elif array.size:
        array.flat[int(rng.integers(0, array.size))] = _pick((np.nan, np.inf, 0, -1, 6e4), rng)
    if rng.random() < 0.2:
        with np.errstate(invalid="ignore", over="ignore"):  # any number is fine here
            array = array.astype(_pick((np.int64, np.float64, np.float16, np.uint8, np.bool_), rng))
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))


def _change_shape(proto: onnx.ModelProto, rng: Rng) -> None:
    value = _pick([*proto.graph.input, *proto.graph.output, *proto.graph.value_info], rng)
    if value is None or not value.type.tensor_type.shape.dim:
        return
    dim = _pick(value.type.tensor_type.shape.dim, rng)
    dim.dim_value = _pick(_NUMBERS, rng)
    if rng.random() < 0.2:
        value.type.tensor_type.elem_type = int(rng.integers(0, 24))


def _copy_node(proto: onnx.ModelProto, rng: Rng) -> None:
    if node := _pick(proto.graph.node, rng):
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        if rng.random() < 0.7:
            copy.output[0] = f"copy{int(rng.integers(0, 1 << 30))}"
        proto.graph.node.insert(int(rng.integers(0, len(proto.graph.node) + 1)), copy)


def _insert_greedy_node(proto: onnx.ModelProto, rng: Rng) -> None:
    """Between the image and its first reader, a node whose stored argument decides over memory."""
    graph, tag = proto.graph, int(rng.integers(0, 1 << 30))
    reader = next((node for node in graph.node if "images" in node.input), None)
    if reader is None:
        return
    op = _pick(("Tile", "Expand", "Reshape", "Resize", "Pad", "Slice", "TopK", "Gather"), rng)
    numbers = np.array([_pick(_NUMBERS, rng) for _ in range(int(rng.integers(1, 9)))], np.int64)
    stored = numbers.astype(np.float32) if op == "Resize" else numbers
    graph.initializer.append(numpy_helper.from_array(stored, f"stored{tag}"))
    inputs = ["images", "", f"stored{tag}"] if op == "Resize" else ["images", f"stored{tag}"]
    if op == "Slice":
        inputs.append(f"stored{tag}")
    graph.node.insert(0, helper.make_node(op, inputs, [f"greedy{tag}"], f"greedy{tag}"))
    reader.input[list(reader.input).index("images")] = f"greedy{tag}"


def _forbidden(proto: onnx.ModelProto, rng: Rng) -> None:
    """What only a hand can have written."""
    graph = proto.graph
    kind = int(rng.integers(0, 8))
    if kind == 0:
        branch = onnx.GraphProto(name="g")
        graph.node.add(op_type="If", output=["if"]).attribute.append(
            helper.make_attribute("then_branch", branch)
        )
    elif kind == 1:
        proto.functions.add(name="F", domain="here").node.add(op_type="F", domain="here")
    elif kind == 2:
        graph.node.add(op_type="EPContext", domain="com.microsoft", output=["engine"])
        proto.opset_import.add(domain="com.microsoft", version=1)
    elif kind == 3 and graph.initializer:
        tensor = _pick(graph.initializer, rng)
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value="../../../etc/passwd")
        tensor.ClearField("raw_data")
    elif kind == 4:
        proto.training_info.add()
    elif kind == 5:
        graph.sparse_initializer.add()
    elif kind == 6:
        proto.opset_import[0].version = int(_pick(_NUMBERS, rng))
    else:
        proto.metadata_props.add(key="ort_config", value="{}")


_CHANGES: tuple[Callable[[onnx.ModelProto, Rng], None], ...] = (
    _rename_operator,
    _rewire,
    _add_or_drop_input,
    _change_attribute,
    _add_attribute,
    _reshape_weight,
    _change_weight,
    _change_shape,
    _copy_node,
    _insert_greedy_node,
    _forbidden,
)
