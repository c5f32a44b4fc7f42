import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from export.onnx_file.run_onnx import open_session, run_batches
from export.precision.emulate_fp16 import emulate_fp16, locate_nonfinite
from export.precision.half import convertible, write_fp16

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


def test_a_product_of_matrices_is_exact_and_rounds_once_at_its_end():
    """Small integers: their sums are exact in any order, and some fall between fp16's numbers."""
    x, w = RNG.integers(-60, 60, (1, 8)), RNG.integers(-60, 60, (8, 8))
    proto = graph(node("MatMul", ["x", "w"], "y"), stored=[("w", w.astype(np.float32))])
    actual = run_batches(emulate_fp16(in_half(proto)), x.astype(np.float32))
    np.testing.assert_array_equal(actual, half(x @ w))
    assert (actual != x @ w).any()


OPERATORS = {"Add": np.add, "Sub": np.subtract, "Mul": np.multiply, "Max": np.maximum}


@st.composite
def mixtures(draw):
    """Draw a graph of up to 8 nodes, of which each reads any tensors before it, and a choice."""
    tensors, nodes = ["x", "w", "v"], []
    for i in range(draw(st.integers(1, 8))):
        inputs = [draw(st.sampled_from(tensors)) for _ in range(2)]
        output = draw(st.sampled_from(sorted(OPERATORS))), inputs, f"t{i}"
        nodes.append(node(*output))
        tensors.append(f"t{i}")
    chosen = [n.name for n in nodes if draw(st.booleans())]
    return nodes, chosen, draw(st.lists(st.floats(-3e4, 3e4, width=32), min_size=8, max_size=8))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(mixtures())
def test_any_mixture_is_valid_has_no_needless_cast_and_computes_what_its_definition_says(drawn):
    nodes, chosen, x = drawn
    stored = {"w": W[:1], "v": 1e-4 * W[1:2]}
    proto = graph(*nodes, stored=stored.items())
    proto.graph.output[0].name = nodes[-1].output[0]
    mixed = write_fp16(onnx.shape_inference.infer_shapes(proto), chosen)
    onnx.checker.check_model(mixed, full_check=True)
    casts = [n for n in mixed.graph.node if n.op_type == "Cast"]
    meetings = [(n.input[0].removesuffix(".fp16"), n.attribute[0].i) for n in casts]
    assert len({*meetings}) == len(meetings)
    read = {n.input[0] for n in casts}
    assert read.isdisjoint(t.name for t in mixed.graph.initializer)
    assert read.isdisjoint(n.output[0] for n in casts)

    values = {"x": np.array([x], np.float32), **stored}
    with np.errstate(all="ignore"):
        for n in nodes:
            kept = half if n.name in chosen else np.asarray
            reads = [kept(values[name]) for name in n.input]
            values[n.output[0]] = kept(OPERATORS[n.op_type](*reads))
    actual = run_batches(emulate_fp16(mixed.SerializeToString()), values["x"])
    np.testing.assert_array_equal(actual, values[nodes[-1].output[0]])


def test_the_runtime_leaves_every_cast_when_it_optimises_all_it_can(tmp_path):
    proto = graph(
        node("MatMul", ["x", "w"], "a"),
        node("Add", ["a", "b"], "c"),
        node("Gelu", ["c"], "d"),
        node("LayerNormalization", ["d", "b", "b"], "e"),
        node("Softmax", ["e"], "f"),
        node("Transpose", ["f"], "g", perm=[0, 1]),
        node("MatMul", ["g", "w"], "y"),
        stored=[("w", W), ("b", W[0])],
    )
    emulated = emulate_fp16(in_half(proto))
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(emulated, options, providers=["CPUExecutionProvider"])
    before = onnx.load_model_from_string(emulated).graph.node
    after = onnx.load(options.optimized_model_filepath).graph.node
    assert len(after) < len(before)  # the control: it did optimise
    to_half = [sum(cast_to_half(n) for n in nodes) for nodes in (before, after)]
    assert to_half == [8, 8]  # images, six results and y


def cast_to_half(n):
    to = [a.i for a in n.attribute if a.name == "to"]
    return n.op_type == "Cast" and to == [TensorProto.FLOAT16]


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


def test_a_mask_of_minus_infinity_is_not_where_numbers_stop_to_be_finite():
    mask = np.array([[0.0] * 4 + [-np.inf] * 4], np.float32)
    nodes = [
        node("Add", ["x", "mask"], "masked"),
        node("Softmax", ["masked"], "p"),
        node("MatMul", ["p", "big"], "up"),
    ]
    stored = [("mask", mask), ("big", np.full((8, 8), 6e4, np.float32))]
    fine = in_half(graph(*nodes, node("Relu", ["up"], "y"), stored=stored))
    assert locate_nonfinite(fine, X) is None
    doubled = [*nodes, node("Add", ["up", "up"], "y")]
    assert locate_nonfinite(in_half(graph(*doubled, stored=stored)), X) == "y/Add"
    stored[0] = ("mask", np.full_like(mask, -np.inf))
    assert locate_nonfinite(in_half(graph(*doubled, stored=stored)), X) == "p/Softmax"


def test_a_weight_beyond_fp16_is_found_where_it_is_read():
    proto = graph(
        node("Relu", ["x"], "a"), node("MatMul", ["a", "w"], "y"), stored=[("w", 1e6 * W)]
    )
    assert locate_nonfinite(in_half(proto), X) == "y/MatMul"


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


def test_a_constant_or_a_cast_node_makes_fp16_at_once_and_no_cast_follows_it():
    two = numpy_helper.from_array(np.full(8, 2, np.float32))
    proto = graph(
        helper.make_node("Constant", [], ["two"], "c/Constant", value=two),
        node("Shape", ["x"], "shape"),
        node("Cast", ["shape"], "sizes", to=TensorProto.FLOAT),
        node("ReduceMax", ["sizes"], "most", keepdims=0),
        node("Mul", ["x", "two"], "a"),
        node("Mul", ["a", "most"], "y"),
    )
    mixed = write_fp16(proto, convertible(proto))
    onnx.checker.check_model(mixed, full_check=True)
    made = [(n.op_type, n.output[0]) for n in mixed.graph.node if not n.output[0].startswith("y")]
    assert [op for op, _ in made] == ["Cast", "Constant", "Shape", "Cast", "ReduceMax", "Mul"]
    assert {"two.fp16", "sizes.fp16"} < {name for _, name in made}
    actual = run_batches(emulate_fp16(mixed.SerializeToString()), X)
    np.testing.assert_array_equal(actual, half(half(2 * half(X)) * 8))
    both = write_fp16(proto, ["y/Mul", "most/ReduceMax"])  # the constant is read in fp32 here
    assert "two" in {n.output[0] for n in both.graph.node}
