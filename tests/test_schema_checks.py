import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from deploy.errors import CheckFailedError
from export.onnx_file.gates import assert_exportable
from export.onnx_file.schema_checks import peak_activation_bytes, schema_problems
from export.targets import TARGETS


def model(*nodes, weights=(), batch=1, size=8, outputs=("out",)):
    shape = ["batch" if batch == "batch" else batch, 3, size, size]
    graph = helper.make_graph(
        list(nodes),
        "g",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in outputs],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in weights],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def node(op, inputs, outputs=("out",), **attributes):
    return helper.make_node(op, list(inputs), list(outputs), f"stem/{op}", **attributes)


def problems(*nodes, **options):
    return schema_problems(model(*nodes, **options), max_batch=1)


@pytest.mark.parametrize(
    ("bad", "found"),
    [
        (node("Min", ["images", ""]), "lacks its input 1"),
        (node("Concat", [], axis=0), "lacks its input 0"),
        (node("Add", ["images"]), "lacks its input 1"),
        (node("Add", ["images", ""]), "lacks its input 1"),
        (node("Clip", ["", "images"]), "lacks its input 0"),
        (node("Relu", ["images", "images"]), "has 2 inputs, of at most 1"),
        (node("Relu", ["images"], [""]), "lacks its output 0"),
        (node("Relu", ["images"], ["out", "more"]), "has 2 outputs, of at most 1"),
        (node("Upsample", ["images", "images"]), "is deprecated in opset 20"),
        (node("Attention", ["images"] * 3), "is no operator of opset 20"),
    ],
)
def test_a_node_that_is_not_as_its_schema_says_is_named(bad, found):
    (problem,) = problems(bad)
    assert problem == f"stem/{bad.op_type} ({bad.op_type}) {found}"


@pytest.mark.parametrize(
    "good",
    [
        node("Relu", ["images"]),
        node("Clip", ["images", "", "one"]),
        node("Clip", ["images"]),
        node("Min", ["images", "images"]),
        node("MaxPool", ["images"], ["out", ""], kernel_shape=[1, 1]),
        node("LayerNormalization", ["images", "row"], ["out", "", "deviation"]),
    ],
)
def test_what_the_schema_lets_out_may_be_empty(good):
    weights = [("one", np.float32(1)), ("row", np.ones(8, np.float32))]
    assert problems(good, weights=weights) == []


def test_the_checker_lets_pass_what_crashes_onnx_runtime_and_the_gate_does_not():
    hostile = model(node("Min", ["images", ""]))
    onnx.checker.check_model(hostile, full_check=True)
    with pytest.raises(CheckFailedError, match=r"'stem/Min' \('Min'\) without its input 1"):
        assert_exportable(hostile.SerializeToString(), TARGETS["onnxruntime-x86"])
    fine = model(node("Min", ["images", "images"]))
    assert_exportable(fine.SerializeToString(), TARGETS["onnxruntime-x86"])


def test_shapes_that_contradict_each_other_are_refused():
    bad = node("Add", ["images", "row"])
    (problem,) = problems(bad, weights=[("row", np.ones(7, np.float32))])
    assert problem.startswith("shapes that contradict each other: ")


def test_a_size_that_only_values_tell_is_refused():
    (problem,) = problems(node("NonZero", ["images"]))
    assert problem == "tensors of unknown shape: out"


def test_shapes_are_followed_through_stored_and_computed_ones():
    nodes = [
        node("Shape", ["images"], ["shape"]),
        node("Reshape", ["images", "flat"], ["rows"]),
        node("Reshape", ["rows", "shape"]),
    ]
    assert problems(*nodes, weights=[("flat", np.array([-1, 192]))], batch="batch") == []


def test_a_range_over_the_batch_is_known_and_one_over_pixels_is_not():
    """As torch writes a strided view; inference alone does not follow it."""
    weights = [("zero", np.int64(0)), ("one", np.int64(1)), ("axes", np.array([1, 2, 3]))]
    numbers = [
        node("Range", ["zero", "count", "one"], ["numbers"]),
        node("Unsqueeze", ["numbers", "axes"], ["column"]),
        node("Cast", ["column"], ["offsets"], to=TensorProto.FLOAT),
        node("Add", ["images", "offsets"]),
    ]
    of_batch = [node("Shape", ["images"], ["s"]), node("Gather", ["s", "zero"], ["count"])]
    assert problems(*of_batch, *numbers, weights=weights, batch="batch") == []
    of_pixels = [
        node("ReduceSum", ["images"], ["sum"], keepdims=0),
        node("Cast", ["sum"], ["count"], to=TensorProto.INT64),
    ]
    (problem,) = problems(*of_pixels, *numbers, weights=weights, batch="batch")
    assert problem.startswith("tensors of unknown shape: numbers, column")


def test_activations_are_limited_at_the_largest_batch():
    tile = node("Tile", ["images", "times"], ["large"])
    back = node("Resize", ["large", "", "", "size"])
    weights = [("times", np.array([1, 1, 500, 500])), ("size", np.array([1, 3, 8, 8]))]
    small = model(tile, back, weights=weights, batch="batch")  # 183 MiB for each image
    assert schema_problems(small, max_batch=5) == []
    (problem,) = schema_problems(small, max_batch=6)
    assert problem.startswith("1099 MiB of activations at once in a batch of 6, over 1024 MiB")


def test_memory_is_counted_from_the_maker_to_the_last_reader():
    graph = model(
        node("Relu", ["images"], ["a"]),
        node("Relu", ["a"], ["b"]),
        node("Relu", ["b"], ["c"]),
        node("Add", ["a", "c"]),
    ).graph
    sizes = {"images": 1, "a": 10, "b": 100, "c": 1000, "out": 10000}
    assert peak_activation_bytes(graph, sizes) == 10 + 1000 + 10000
    sizes["b"] = 10**6
    assert peak_activation_bytes(graph, sizes) == 10 + 10**6 + 1000
    sizes["images"] = 10**9
    assert peak_activation_bytes(graph, sizes) == 10**9 + 10
