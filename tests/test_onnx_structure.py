import math

import numpy as np
import onnx
import pytest
from deploy_bundle import linear_onnx, write_small_bundle
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from deploy.bundle import onnx_structure
from deploy.bundle.onnx_structure import check_structure, structural_problem
from deploy.bundle.wire import Budget, MalformedError, read_fields
from deploy.errors import BadInputError

FILE = linear_onnx(np.eye(3))


def changed(change) -> bytes:
    proto = onnx.load_model_from_string(FILE)
    change(proto)
    return proto.SerializeToString()


def add_node(proto, *args, **kwargs):
    proto.graph.node.append(helper.make_node(*args, **kwargs))


def node_with(**attributes):
    return lambda proto: add_node(proto, "LpPool", ["images"], ["more"], "stem", **attributes)


def weight(change):
    return lambda proto: change(proto.graph.initializer[0])


def move_outside(tensor):
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/passwd")
    tensor.ClearField("raw_data")


def mark_outside(tensor):
    tensor.data_location = TensorProto.EXTERNAL


def in_two_fields(tensor):
    tensor.float_data.extend([0.0] * 9)


def in_the_wrong_field(tensor):
    tensor.ClearField("raw_data")
    tensor.int32_data.extend([0] * 9)


def of_text(tensor):
    tensor.CopyFrom(helper.make_tensor("weight", TensorProto.STRING, [1], [b"x"]))


def add_function(proto):
    node = helper.make_node("Relu", ["a"], ["b"])
    opset = [helper.make_opsetid("", 20)]
    proto.functions.append(helper.make_function("here", "F", ["a"], ["b"], [node], opset))


def control_flow(proto):
    output = helper.make_tensor_value_info("o", TensorProto.FLOAT, None)
    graph = helper.make_graph([helper.make_node("Identity", ["images"], ["o"])], "g", [], [output])
    add_node(proto, "Flatten", ["images"], ["f"], "branch", then_branch=graph)


def engine_context(proto):
    add_node(proto, "EPContext", ["images"], ["e"], "engine", domain="com.microsoft")


def second_domain(proto):
    proto.opset_import.append(helper.make_opsetid("com.microsoft", 1))


def same_field_twice(proto):
    proto.graph.node[0].attribute.extend([helper.make_attribute("a", 1)] * 2)


def two_values(proto):
    attribute = helper.make_attribute("a", 1)
    attribute.ints.append(1)
    proto.graph.node[0].attribute.append(attribute)


def no_value(proto):
    attribute = helper.make_attribute("a", 1)
    attribute.ClearField("i")
    proto.graph.node[0].attribute.append(attribute)


def two_inputs(proto):
    proto.graph.input.append(helper.make_tensor_value_info("b", TensorProto.FLOAT, [1]))


def sequence(proto):
    kind = helper.make_sequence_type_proto(helper.make_tensor_type_proto(TensorProto.FLOAT, [1]))
    proto.graph.value_info.append(helper.make_value_info("s", kind))


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (second_domain, r"the opsets \[\('', 20\), \('com.microsoft', 1\)\]"),
        (lambda p: setattr(p.opset_import[0], "version", 6), r"the opsets \[\('', 6\)\]"),
        (lambda p: setattr(p.opset_import[0], "domain", "x"), r"the opsets \[\('x', 20\)\]"),
        (lambda p: setattr(p, "ir_version", 99), "ir_version 99"),
        (lambda p: p.ClearField("graph"), "a model without a graph"),
        (lambda p: p.metadata_props.add(key="a"), "a model with metadata"),
        (lambda p: p.training_info.add(), "a model with training_info"),
        (add_function, "a model with local functions"),
        (lambda p: p.graph.sparse_initializer.add(), "a graph with sparse tensors"),
        (control_flow, r"the node 'branch' \('Flatten'\) with a subgraph"),
        (engine_context, r"'engine' \('EPContext'\) of the domain or overload 'com.microsoft'"),
        (lambda p: add_node(p, "EPContext", ["images"], ["e"]), "an operator that is not allowed"),
        (lambda p: add_node(p, "If", ["images"], ["e"]), "an operator that is not allowed"),
        (lambda p: add_node(p, "Min", ["images", ""], ["m"], "n"), "'n' .* without its input 1"),
        (lambda p: add_node(p, "Concat", [], ["m"], axis=0), "without its input 0"),
        (lambda p: add_node(p, "Clip", ["", "images"], ["m"]), "without its input 0"),
        (lambda p: add_node(p, "Relu", ["images"] * 2, ["m"]), "with 2 inputs, of at most 1"),
        (lambda p: add_node(p, "Relu", ["later"], ["m"]), "reads 'later' before it is made"),
        (lambda p: add_node(p, "Relu", ["images"], ["logits"]), "the name 'logits' twice"),
        (lambda p: add_node(p, "Relu", ["images"], [""]), "without an output"),
        (lambda p: setattr(p.graph.output[0], "name", "x"), "the output 'x', which nothing makes"),
        (two_inputs, "2 inputs and 1 outputs"),
        (sequence, "the value 's' with a sequence"),
        (lambda p: p.graph.ClearField("node"), "0 nodes"),
        (node_with(strides=[0, 1]), "'strides' of .* of 0, outside 1 to 4096"),
        (node_with(dilations=[1, 1 << 40]), "'dilations' of .*, outside"),
        (node_with(pads=[-1, 0, 0, 0]), "'pads' of .* of -1, outside"),
        (node_with(group=1 << 20), "'group' of .*, outside"),
        (node_with(kernel_shape=[1 << 13]), "'kernel_shape' of .*, outside"),
        (node_with(blocksize=1 << 20), "'blocksize' of .*, outside"),
        (node_with(axis=-99), "'axis' of .*, outside"),
        (node_with(to=8), r"'to' of .* of \[8\], an element type"),
        (same_field_twice, "with an attribute twice"),
        (two_values, r"'a' of .* with \['i', 'ints'\], of type i"),
        (no_value, r"'a' of .* with \[\], of type i"),
        (weight(move_outside), "with external data"),
        (weight(mark_outside), "a weight 'weight' with external data"),
        (weight(in_two_fields), r"with data in \['float_data'\], and raw: True"),
        (weight(in_the_wrong_field), r"with data in \['int32_data'\], and raw: False"),
        (weight(of_text), "a weight with text"),
        (weight(lambda t: setattr(t, "data_type", 99)), "of element type 99"),
        (weight(lambda t: setattr(t, "data_type", 11)), "with data of length 36, not 72"),
        (weight(lambda t: t.ClearField("raw_data")), "with data of length 0, not 36"),
        (weight(lambda t: setattr(t, "raw_data", t.raw_data[1:])), "of length 35, not 36"),
        (weight(lambda t: t.dims.append(-1)), r"of shape \[3, 3, -1\]"),
        (weight(lambda t: t.dims.append(1 << 40)), r"of shape \[3, 3, 1099511627776\]"),
        (weight(lambda t: t.dims.extend([1] * 7)), r"of shape \[3, 3, 1, 1, 1, 1, 1, 1, 1\]"),
        (weight(lambda t: setattr(t, "name", "images")), "the name 'images' twice"),
        (weight(lambda t: setattr(t, "name", "")), "an empty name"),
        (weight(lambda t: setattr(t, "name", "x" * 5000)), "a name of 5000 bytes"),
    ],
)
def test_each_planted_violation_is_named(change, found):
    assert structural_problem(FILE) is None
    with pytest.raises(BadInputError, match=found):
        check_structure(changed(change), file="model.onnx")


def field(number, wire_type, payload):
    return bytes([number << 3 | wire_type]) + payload


@pytest.mark.parametrize(
    ("bytes_", "found"),
    [
        (field(1, 0, b"\x0a"), "a model with ir_version twice"),  # protobuf takes the last
        (field(7, 2, b"\x00"), "a model with graph twice"),  # protobuf would merge them
        (field(9, 0, b"\x01"), "a model with field 9"),  # protobuf would skip it
        (field(2, 0, b"\x01"), "whose producer_name has wire type 0"),
        (field(9, 3, b""), "with wire type 3"),
        (field(2, 2, b"\x7f"), "cut short"),
        (field(2, 1, b"\x00"), "cut short"),
        (field(5, 0, b"\x80"), "does not end"),
        (field(5, 0, b"\xff" * 9 + b"\x7f"), "too large"),
        (field(5, 0, b"\xff" * 10 + b"\x01"), "does not end"),
    ],
)
def test_what_protobuf_readers_forgive_is_refused(bytes_, found):
    assert found in structural_problem(FILE + bytes_)


def message(number, *parts):
    payload = b"".join(parts)
    return field(number, 2, bytes([len(payload)]) + payload)


def test_a_number_and_a_name_for_one_dimension_are_refused():
    def with_dimension(*parts):
        shape = message(2, message(1, *parts))
        kind = message(2, message(1, field(1, 0, b"\x01"), shape))
        value = message(13, message(1, b"v"), kind)
        graph = onnx.load_model_from_string(FILE).graph.SerializeToString() + value
        head = onnx.ModelProto(ir_version=10, opset_import=[helper.make_opsetid("", 20)])
        size = bytes([len(graph) & 0x7F | 0x80, len(graph) >> 7])
        return head.SerializeToString() + field(7, 2, size + graph)

    number, name = field(1, 0, b"\x05"), message(2, b"batch")
    assert structural_problem(with_dimension(number)) is None
    assert structural_problem(with_dimension(name)) is None
    problem = structural_problem(with_dimension(name, number))
    assert problem == "the value 'v' with a dimension that is a number and a name"


@pytest.mark.parametrize("dtype", [1, 2, 3, 4, 5, 6, 7, 9, 10, 11, 12, 13])
@pytest.mark.parametrize("raw", [True, False])
@pytest.mark.parametrize("shape", [(2, 3), (), (0,)])
def test_tensors_of_every_type_are_measured_in_raw_and_in_typed_data(dtype, raw, shape):
    array = np.ones(shape, helper.tensor_dtype_to_np_dtype(dtype))
    values = array.tobytes() if raw else array.ravel().tolist()
    tensor = helper.make_tensor("weight", dtype, shape, values, raw=raw)
    as_weight = changed(weight(lambda t: t.CopyFrom(tensor)))
    assert structural_problem(as_weight) is None
    tensor.dims.append(2)
    problem = structural_problem(changed(weight(lambda t: t.CopyFrom(tensor))))
    assert (problem is None) == (math.prod(shape) == 0)


def test_large_and_negative_numbers_are_counted_right():
    tensor = helper.make_tensor("weight", TensorProto.INT64, [3], [-1, 1 << 62, 0])
    assert structural_problem(changed(weight(lambda t: t.CopyFrom(tensor)))) is None


def test_lists_that_are_not_packed_are_read_too():
    table = {1: ("a", "ints"), 2: ("b", "fixed32"), 3: ("c", "varints"), 4: ("d", "fixed64")}
    packed = b"\x0a\x02\x01\x02" + b"\x12\x08" + bytes(8) + b"\x1a\x03\x80\x01\x05"
    single = b"\x08\x01\x08\x02" + (b"\x15" + bytes(4)) * 2 + b"\x18\x80\x01\x18\x05"
    single += b"\x21" + bytes(8)
    packed += b"\x22\x08" + bytes(8)
    read = [
        read_fields(memoryview(data), table, Budget(99), what="a message")
        for data in (packed, single)
    ]
    assert read[0] == read[1] == {"a": [1, 2], "b": 2, "c": 2, "d": 1}


def test_the_work_is_bounded(monkeypatch):
    with pytest.raises(MalformedError, match="more fields"):
        read_fields(memoryview(b"\x08\x01" * 4), {1: ("a", "ints")}, Budget(3), what="a message")
    many = changed(lambda p: p.graph.node.extend([helper.make_node("Relu", ["images"], ["r"])] * 9))
    monkeypatch.setattr(onnx_structure, "MAX_NODES", 8)
    assert structural_problem(many) == "12 nodes"


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.data())
def test_any_bytes_give_an_answer_and_what_passes_protobuf_reads_likewise(data):
    at = data.draw(st.integers(0, len(FILE)))
    end = data.draw(st.integers(at, min(len(FILE), at + 8)))
    mutant = FILE[:at] + data.draw(st.binary(max_size=8)) + FILE[end:]
    problem = structural_problem(mutant)
    if problem is None:
        written_again = onnx.load_model_from_string(mutant).SerializeToString()
        assert structural_problem(written_again) is None
    else:
        assert problem.isprintable()


def test_a_bundle_with_such_a_model_is_not_opened(tmp_path):
    hostile = changed(lambda p: add_node(p, "Min", ["images", ""], ["m"], "n"))
    with pytest.raises(BadInputError, match=r"'model\.fp32\.onnx' must be .*'n' \('Min'\)"):
        write_small_bundle(tmp_path / "b", **{"model.fp32.onnx": hostile})
    with pytest.raises(BadInputError, match="a model with wire type 6"):
        write_small_bundle(tmp_path / "c", **{"model.fp32.onnx": b"no model"})
