import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from export.emulate_fp16 import emulate_fp16, locate_nonfinite
from export.half import convertible, write_fp16
from export.run_onnx import open_session, run_batches

RNG = np.random.default_rng(0)
X = RNG.normal(0, 2, (1, 8)).astype(np.float32)
W = RNG.normal(0, 1, (8, 8)).astype(np.float32)


def graph(*nodes, stored=(("w", W),), size=8):
    built = helper.make_graph(
        list(nodes),
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, size])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in stored],
    )
    model = helper.make_model(built, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return onnx.shape_inference.infer_shapes(model)


def node(op, inputs, output, **attributes):
    return helper.make_node(op, inputs, [output], f"{output}/{op}", **attributes)


def in_half(proto):
    return write_fp16(proto, convertible(proto)).SerializeToString()


def half(array):
    return array.astype(np.float16).astype(np.float32)


@pytest.mark.parametrize(
    ("op", "expected"),
    [
        ("Add", half(half(X) + half(W[:1]))),
        ("Mul", half(half(X) * half(W[:1]))),
        ("Div", half(half(X) / half(W[:1]))),
    ],
)
def test_each_node_rounds_as_ieee_half_precision_does_bit_by_bit(op, expected):
    proto = graph(node(op, ["x", "w"], "y"), stored=[("w", W[:1])])
    np.testing.assert_array_equal(run_batches(emulate_fp16(in_half(proto)), X), expected)


def test_every_node_of_a_chain_rounds_whatever_the_runtime_fuses():
    proto = graph(
        node("MatMul", ["x", "w"], "a"), node("Relu", ["a"], "b"), node("Add", ["b", "x"], "y")
    )
    expected = half(np.maximum(half(half(X) @ half(W)), 0) + half(X))
    actual = run_batches(emulate_fp16(in_half(proto)), X)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=np.spacing(np.float16(8)))
    exact = np.maximum(half(X) @ half(W), 0) + half(X)
    assert np.abs(actual - exact).max() > 1e-4  # the control: unrounded differs
    assert (actual == half(actual)).all()


def test_an_overflow_is_infinite_here_and_finite_in_onnx_runtime_itself():
    big = np.full((8, 8), 3e4, np.float32)
    proto = graph(
        node("MatMul", ["x", "w"], "a"),
        node("Mul", ["a", "small"], "y"),
        stored=[("w", big), ("small", np.array([1e-4], np.float32))],
    )
    file = in_half(proto)
    assert np.isfinite(run_batches(file, abs(X))).all()
    assert np.isinf(run_batches(emulate_fp16(file), abs(X))).all()
    assert locate_nonfinite(file, abs(X)) == "a/MatMul"


def test_a_graph_without_fp16_is_computed_as_it_is():
    proto = graph(node("MatMul", ["x", "w"], "y"))
    file = proto.SerializeToString()
    np.testing.assert_array_equal(run_batches(emulate_fp16(file), X), run_batches(file, X))
    assert locate_nonfinite(file, X) is None


def test_only_some_nodes_round_and_casts_meet_once_for_all_readers():
    proto = graph(
        node("MatMul", ["x", "w"], "a"),
        node("Exp", ["a"], "b"),
        node("Relu", ["a"], "c"),
        node("Add", ["b", "c"], "y"),
    )
    mixed = write_fp16(proto, ["a/MatMul"])
    casts = [n for n in mixed.graph.node if n.op_type == "Cast"]
    assert [n.output[0] for n in casts] == ["x.fp16", "a.fp32"]
    onnx.checker.check_model(mixed, full_check=True)
    a = half(half(X) @ half(W))
    np.testing.assert_allclose(
        run_batches(emulate_fp16(mixed.SerializeToString()), X), np.exp(a) + np.maximum(a, 0), 1e-6
    )


def test_what_counts_or_is_fp32_by_definition_keeps_its_type():
    scales = np.array([1, 1, 2, 2], np.float32)
    image = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 1, 4, 4])
    proto = graph(
        node("Resize", ["x", "", "scales"], "big", mode="nearest"),
        node("Shape", ["big"], "shape"),
        node("Cast", ["shape"], "sizes", to=TensorProto.FLOAT),
        node("ReduceSum", ["sizes"], "total", keepdims=0),
        node("Mul", ["big", "total"], "y"),
        stored=[("scales", scales)],
    )
    proto.graph.input[0].CopyFrom(image)
    assert "sizes/Cast" not in convertible(proto) and "big/Resize" in convertible(proto)
    file = in_half(onnx.shape_inference.infer_shapes(proto))
    kept = {t.name: t.data_type for t in onnx.load_model_from_string(file).graph.initializer}
    assert kept == {"scales": TensorProto.FLOAT}
    x = np.arange(16, dtype=np.float32).reshape(1, 1, 4, 4)
    (y,) = open_session(emulate_fp16(file)).run(None, {"x": x})
    np.testing.assert_array_equal(y, 18 * x.repeat(2, 2).repeat(2, 3))


def test_a_weight_that_both_types_read_is_stored_in_both():
    proto = graph(node("MatMul", ["x", "w"], "a"), node("MatMul", ["a", "w"], "y"))
    mixed = write_fp16(proto, ["y/MatMul"])
    kept = {t.name: t.data_type for t in mixed.graph.initializer}
    assert kept == {"w": TensorProto.FLOAT, "w.fp16": TensorProto.FLOAT16}
    only = write_fp16(proto, ["y/MatMul", "a/MatMul"])
    assert [t.name for t in only.graph.initializer] == ["w.fp16"]
