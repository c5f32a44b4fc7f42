"""Check an ONNX file, without onnx, before ONNX Runtime or TensorRT sees it.

What needs no schema of an operator is checked here: one graph of known operators of ONNX's own
domain; no functions, subgraphs, sparse or external data; each name made before it is read, and
once; inputs that are empty only where `allow_list` says so; attributes of one value each, within
bounds; tensors of exactly the bytes that their shape and type ask for. The export checks the rest
(`export/onnx_file/schema_checks.py`), and this too, so that what it writes is what a device takes.

The depth is that of the code, as nothing in it nests; the work is bounded by MAX_FIELDS, and bytes
of weights are measured, not read.

Source: onnx.proto of ONNX 1.23.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from deploy.bundle.allow_list import BOUNDS, ELEMENT_BYTES, MAX_DIM, MAX_RANK, OPERATORS, OPSETS
from deploy.bundle.wire import Budget, MalformedError, Table, read_fields
from deploy.errors import BadInputError

__all__ = ["MAX_FIELDS", "MAX_NODES", "check_structure", "structural_problem"]

MAX_FIELDS = 2_000_000
MAX_NODES = 50_000
_MAX_NAME = 4096
_MAX_NAMES = 4096  # inputs or outputs of a node
_IR_VERSIONS = range(8, 15)  # that of opset 17 to that of onnx 1.23

_MODEL: Table = {
    1: ("ir_version", "int"),
    2: ("producer_name", "bytes"),
    3: ("producer_version", "bytes"),
    4: ("domain", "bytes"),
    5: ("model_version", "int"),
    6: ("doc_string", "bytes"),
    7: ("graph", "bytes"),
    8: ("opset_import", "many"),
    14: ("metadata", "refused"),
    20: ("training_info", "refused"),
    25: ("local functions", "refused"),
    26: ("a device configuration", "refused"),
}
_OPSET: Table = {1: ("domain", "bytes"), 2: ("version", "int")}
_GRAPH: Table = {
    1: ("node", "many"),
    2: ("name", "bytes"),
    5: ("initializer", "many"),
    10: ("doc_string", "bytes"),
    11: ("input", "many"),
    12: ("output", "many"),
    13: ("value_info", "many"),
    14: ("quantization_annotation", "refused"),
    15: ("sparse tensors", "refused"),
    16: ("metadata", "refused"),
}
_NODE: Table = {
    1: ("input", "many"),
    2: ("output", "many"),
    3: ("name", "bytes"),
    4: ("op_type", "bytes"),
    5: ("attribute", "many"),
    6: ("doc_string", "bytes"),
    7: ("domain", "bytes"),
    8: ("overload", "bytes"),
    9: ("metadata", "refused"),
    10: ("a device configuration", "refused"),
}
_ATTRIBUTE: Table = {
    1: ("name", "bytes"),
    2: ("f", "float"),
    3: ("i", "int"),
    4: ("s", "bytes"),
    5: ("t", "bytes"),
    6: ("a subgraph", "refused"),
    7: ("floats", "fixed32"),
    8: ("ints", "ints"),
    9: ("strings", "many"),
    10: ("tensors", "refused"),
    11: ("subgraphs", "refused"),
    13: ("doc_string", "bytes"),
    14: ("a type", "refused"),
    15: ("types", "refused"),
    20: ("type", "int"),
    21: ("a reference to a function's attribute", "refused"),
    22: ("a sparse tensor", "refused"),
    23: ("sparse tensors", "refused"),
}
_ATTRIBUTE_DATA = {1: "f", 2: "i", 3: "s", 4: "t", 6: "floats", 7: "ints", 8: "strings"}
_TENSOR: Table = {
    1: ("dims", "ints"),
    2: ("data_type", "int"),
    3: ("a segment", "refused"),
    4: ("float_data", "fixed32"),
    5: ("int32_data", "varints"),
    6: ("text", "refused"),
    7: ("int64_data", "varints"),
    8: ("name", "bytes"),
    9: ("raw_data", "bytes"),
    10: ("double_data", "fixed64"),
    11: ("uint64_data", "varints"),
    12: ("doc_string", "bytes"),
    13: ("external data", "refused"),
    14: ("data_location", "int"),
    16: ("metadata", "refused"),
}
_TYPED_DATA = {1: "float_data", 7: "int64_data", 11: "double_data", 12: "uint64_data"}
_TYPED_DATA |= {13: "uint64_data"} | dict.fromkeys((2, 3, 4, 5, 6, 9, 10), "int32_data")
_VALUE: Table = {
    1: ("name", "bytes"),
    2: ("type", "bytes"),
    3: ("doc_string", "bytes"),
    4: ("metadata", "refused"),
}
_TYPE: Table = {
    1: ("tensor_type", "bytes"),
    4: ("a sequence", "refused"),
    5: ("a map", "refused"),
    6: ("denotation", "bytes"),
    8: ("a sparse tensor", "refused"),
    9: ("an optional value", "refused"),
}
_TENSOR_TYPE: Table = {1: ("elem_type", "int"), 2: ("shape", "bytes")}
_SHAPE: Table = {1: ("dim", "many")}
_DIM: Table = {1: ("dim_value", "int"), 2: ("dim_param", "bytes"), 3: ("denotation", "bytes")}


def check_structure(model: bytes | memoryview, *, file: str) -> None:
    """Refuse a model that is more than an export of ours could be.

    Args:
        model: The ONNX file.
        file: Its name, for the error.

    Raises:
        BadInputError: Its structure is not allowed; what was found is said.
    """
    problem = structural_problem(model)
    if problem is not None:
        raise BadInputError(
            f"the model '{file}' must be one self-contained graph of known operators",
            found=problem,
            remedy="export the bundle again; do not run one from an unknown source",
        )


def structural_problem(model: bytes | memoryview) -> str | None:
    """Say the first thing in an ONNX file that is not allowed, or nothing."""
    try:
        _check_model(memoryview(model), Budget(MAX_FIELDS))
    except MalformedError as error:
        return str(error)
    return None


def _check_model(data: memoryview, budget: Budget) -> None:
    model = read_fields(data, _MODEL, budget, what="a model")
    version = model.get("ir_version")
    if version not in _IR_VERSIONS:
        raise MalformedError(f"ir_version {version}")
    opsets = [read_fields(o, _OPSET, budget, what="an opset") for o in model["opset_import"]]
    domains = [(_text(o.get("domain"), "a domain"), o.get("version")) for o in opsets]
    if len(domains) != 1 or domains[0][0] or domains[0][1] not in OPSETS:
        raise MalformedError(f"the opsets {domains!r:.200}, not one of ONNX's own from 17 to 23")
    if "graph" not in model:
        raise MalformedError("a model without a graph")
    _check_graph(model["graph"], budget)


def _check_graph(data: memoryview, budget: Budget) -> None:
    graph = read_fields(data, _GRAPH, budget, what="a graph")
    if not 0 < len(graph["node"]) <= MAX_NODES:
        raise MalformedError(f"{len(graph['node'])} nodes")
    if len(graph["input"]) != 1 or len(graph["output"]) != 1:
        raise MalformedError(f"{len(graph['input'])} inputs and {len(graph['output'])} outputs")
    made: set[str] = set()
    _add(made, [_check_value(value, budget) for value in graph["input"]])
    _add(made, [_check_tensor(tensor, budget, "a weight") for tensor in graph["initializer"]])
    for node in graph["node"]:
        _check_node(node, made, budget)
    for value in graph["value_info"]:
        _check_value(value, budget)
    for value in graph["output"]:
        name = _check_value(value, budget)
        if name not in made:
            raise MalformedError(f"the output {_shown(name)}, which nothing makes")


def _add(made: set[str], names: Iterable[str]) -> None:
    for name in names:
        if not name or name in made:
            raise MalformedError(f"the name {_shown(name)} twice" if name else "an empty name")
        made.add(name)


def _check_node(data: memoryview, made: set[str], budget: Budget) -> None:
    node = read_fields(data, _NODE, budget, what="a node")
    op = _text(node.get("op_type"), "an operator")
    what = f"the node {_shown(_text(node.get('name'), 'a node'))} ({_shown(op)})"
    domain = _text(node.get("domain"), what) + _text(node.get("overload"), what)
    if domain:
        raise MalformedError(f"{what} of the domain or overload {_shown(domain)}")
    if op not in OPERATORS:
        raise MalformedError(f"{what}, an operator that is not allowed")
    if max(len(node["input"]), len(node["output"])) > _MAX_NAMES:
        raise MalformedError(f"{what} with {len(node['input'])} inputs")
    inputs = [_text(name, what) for name in node["input"]]
    _check_inputs(inputs, OPERATORS[op], what)
    strangers = [name for name in inputs if name and name not in made]
    if strangers:
        raise MalformedError(f"{what} that reads {_shown(strangers[0])} before it is made")
    outputs = [name for name in (_text(name, what) for name in node["output"]) if name]
    if not outputs:
        raise MalformedError(f"{what} without an output")
    _add(made, outputs)
    attributes = [_check_attribute(attribute, what, budget) for attribute in node["attribute"]]
    if len(set(attributes)) < len(attributes):
        raise MalformedError(f"{what} with an attribute twice")


def _check_inputs(names: Sequence[str], wanted: str, what: str) -> None:
    """Hold inputs against a signature of the allow-list."""
    if wanted.endswith("*"):
        wanted = "x" * max(1, len(names))
    if len(names) > len(wanted):
        raise MalformedError(f"{what} with {len(names)} inputs, of at most {len(wanted)}")
    for place, kind in enumerate(wanted):
        if kind == "x" and not "".join(names[place : place + 1]):
            raise MalformedError(f"{what} without its input {place}")


def _check_attribute(data: memoryview, node: str, budget: Budget) -> str:
    attribute = read_fields(data, _ATTRIBUTE, budget, what=f"an attribute of {node}")
    name = _text(attribute.get("name"), node)
    what = f"the attribute {_shown(name)} of {node}"
    wanted = _ATTRIBUTE_DATA.get(attribute.get("type", 0))
    if wanted is None:
        raise MalformedError(f"{what} of type {attribute.get('type')}")
    present = {key for key in _ATTRIBUTE_DATA.values() if attribute.get(key, 0) not in (0, [])}
    present |= attribute.keys() & {"f", "i", "s", "t"}  # where 0 is a value
    if present - {wanted} or (wanted in ("f", "i", "s", "t") and not present):
        raise MalformedError(f"{what} with {sorted(present)}, of type {wanted}")
    if wanted == "t":
        _check_tensor(attribute["t"], budget, what)
    numbers = [attribute["i"]] if wanted == "i" else attribute["ints"]
    low, high = BOUNDS.get(name, (-(1 << 63), (1 << 63) - 1))
    outside = [number for number in numbers if not low <= number <= high]
    if outside:
        raise MalformedError(f"{what} of {outside[0]}, outside {low} to {high}")
    if name == "to" and any(number not in ELEMENT_BYTES for number in numbers):
        raise MalformedError(f"{what} of {numbers}, an element type that is not allowed")
    return name


def _check_tensor(data: memoryview, budget: Budget, what: str) -> str:
    tensor = read_fields(data, _TENSOR, budget, what=what)
    name = _text(tensor.get("name"), what)
    what = f"{what} {_shown(name)}" if name else what
    dtype, dims = tensor.get("data_type", 0), tensor["dims"]
    if dtype not in ELEMENT_BYTES:
        raise MalformedError(f"{what} of element type {dtype}")
    if tensor.get("data_location", 0) != 0:
        raise MalformedError(f"{what} with external data")
    _check_dims(dims, what)
    count = 1
    for dim in dims:
        count *= dim
    typed = sorted(field for field in set(_TYPED_DATA.values()) if tensor[field])
    if len(typed) + ("raw_data" in tensor) > 1 or (typed and typed != [_TYPED_DATA[dtype]]):
        raise MalformedError(f"{what} with data in {typed}, and raw: {'raw_data' in tensor}")
    wanted = count if typed else count * ELEMENT_BYTES[dtype]
    found = tensor[typed[0]] if typed else len(tensor.get("raw_data", b""))
    if found != wanted:
        raise MalformedError(f"{what} with data of length {found}, not {wanted}")
    return name


def _check_dims(dims: Sequence[int], what: str) -> None:
    if len(dims) > MAX_RANK or any(not 0 <= dim <= MAX_DIM for dim in dims):
        raise MalformedError(f"{what} of shape {dims!r:.200}")


def _check_value(data: memoryview, budget: Budget) -> str:
    value = read_fields(data, _VALUE, budget, what="a value")
    name = _text(value.get("name"), "a value")
    what = f"the value {_shown(name)}"
    kind = read_fields(value.get("type", _NOTHING), _TYPE, budget, what=what)
    tensor = read_fields(kind.get("tensor_type", _NOTHING), _TENSOR_TYPE, budget, what=what)
    if tensor.get("elem_type", 0) not in ELEMENT_BYTES:
        raise MalformedError(f"{what} of element type {tensor.get('elem_type')}")
    shape = read_fields(tensor.get("shape", _NOTHING), _SHAPE, budget, what=what)
    dims = [read_fields(dim, _DIM, budget, what=what) for dim in shape["dim"]]
    if any("dim_value" in dim and "dim_param" in dim for dim in dims):
        raise MalformedError(f"{what} with a dimension that is a number and a name")
    _check_dims([dim.get("dim_value", 0) for dim in dims], what)
    return name


_NOTHING = memoryview(b"")


def _text(data: Any, what: str) -> str:
    if data is None:
        return ""
    if len(data) > _MAX_NAME:
        raise MalformedError(f"{what} with a name of {len(data)} bytes")
    try:
        return str(data, "utf-8")
    except UnicodeDecodeError as error:
        raise MalformedError(f"{what} with a name that is not UTF-8") from error


def _shown(text: str) -> str:
    return ascii(text if len(text) <= 80 else f"{text[:77]}...")
