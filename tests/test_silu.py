import numpy as np
import onnx
import pytest
import torch
from int8_models import emoji, exported
from onnx import TensorProto, helper
from ort_kernels import kernels
from torch import nn

import export.precision.quantize
from export.onnx_file.run_onnx import run_batches
from export.onnx_file.tensors import known_shapes
from export.precision.emulate_int8 import run_emulated
from export.precision.quantize import quantize
from export.precision.silu import join_silus

IMAGES = emoji("train", 16)[0]


def silu_file(max_batch):
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 48, 3), nn.SiLU(), nn.Conv2d(48, 48, 3), nn.SiLU(), nn.Flatten()
    return exported(nn.Sequential(*layers).eval(), max_batch=max_batch)


@pytest.mark.parametrize("scheme", ["u8s8", "s8s8"])
@pytest.mark.parametrize("max_batch", [1, 16])
def test_a_silu_behind_an_integer_convolution_is_one_kernel(
    scheme, max_batch, tmp_path, monkeypatch
):
    file = silu_file(max_batch)
    model = quantize(file, [IMAGES], scheme=scheme, method="minmax")
    found = kernels(model, tmp_path / "a.onnx")
    assert (found["QLinearConv"], found["QuickGelu"], found["Sigmoid"]) == (2, 2, 0)
    assert found["DequantizeLinear"] == 2

    monkeypatch.setattr(export.precision.quantize, "join_silus", lambda *args: None)
    parted = quantize(file, [IMAGES], scheme=scheme, method="minmax")
    found = kernels(parted, tmp_path / "b.onnx")
    assert (found["QuickGelu"], found["Sigmoid"]) == (0, 2) and found["DequantizeLinear"] >= 4
    np.testing.assert_array_equal(run_emulated(model, IMAGES), run_emulated(parted, IMAGES))
    expected = run_batches(parted, IMAGES)
    # the fused kernel has another polynomial, which may move a value to the next step
    np.testing.assert_allclose(
        run_batches(model, IMAGES), expected, atol=0.01 * float(np.ptp(expected))
    )


def test_a_gpu_is_given_its_silus_as_they_are():
    model = quantize(silu_file(1), [IMAGES], scheme="tensorrt", method="minmax")
    silus = [n for n in onnx.load_model_from_string(model).graph.node if "silu" in n.output[0]]
    assert not [node for node in silus if node.op_type in ("Flatten", "Reshape")]


def graph_of(nodes, outputs=("y",)):
    """Return a graph around x, dequantized from q, of shape (N, 2, 3, 4)."""
    made = [helper.make_node("DequantizeLinear", ["q", "s"], ["x"]), *nodes]
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ("N", 2, 3, 4)) for name in outputs
    ]
    return helper.make_graph(made, "g", [], values)


def joined(graph, shapes=None):
    join_silus(graph, known_shapes(graph) if shapes is None else shapes)
    return [(n.op_type, *n.input) for n in graph.node]


SIGMOID = helper.make_node("Sigmoid", ["x"], ["gate"], name="act/Sigmoid")


@pytest.mark.parametrize("factors", [["x", "gate"], ["gate", "x"]])
def test_both_readers_get_the_same_tensor_whatever_their_order(factors):
    graph = graph_of([SIGMOID, helper.make_node("Mul", factors, ["y"], name="act/Mul")])
    flat = ["y_silu_in" if factor == "x" else factor for factor in factors]
    assert joined(graph) == [
        ("DequantizeLinear", "q", "s"),
        ("Sigmoid", "y_silu_in"),
        ("Mul", *flat),
        ("Flatten", "x"),
        ("Reshape", "y_silu_out", "y_silu_shape"),
    ]
    (shape,) = graph.initializer
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(shape), [-1, 2, 3, 4])
    assert [node.name for node in graph.node[3:]] == ["act/Mul_Flatten", "act/Mul_Reshape"]


def test_another_reader_of_the_tensor_keeps_it():
    nodes = SIGMOID, helper.make_node("Mul", ["x", "gate"], ["y"], name="act/Mul")
    found = joined(graph_of([*nodes, helper.make_node("Add", ["x", "y"], ["z"])], ["y", "z"]))
    assert ("Add", "x", "y") in found and ("Mul", "y_silu_in", "gate") in found


@pytest.mark.parametrize(
    "nodes",
    [
        [SIGMOID, helper.make_node("Mul", ["other", "gate"], ["y"])],  # a gate, as in SE
        [helper.make_node("Tanh", ["x"], ["gate"]), helper.make_node("Mul", ["x", "gate"], ["y"])],
        [  # a float tensor's is fused as it is
            helper.make_node("Relu", ["x"], ["r"]),
            helper.make_node("Sigmoid", ["r"], ["gate"]),
            helper.make_node("Mul", ["r", "gate"], ["y"]),
        ],
        [  # the gate is needed elsewhere: nothing would be fused
            SIGMOID,
            helper.make_node("Mul", ["x", "gate"], ["y"]),
            helper.make_node("Neg", ["gate"], ["z"]),
        ],
    ],
)
def test_what_is_no_silu_of_a_dequantized_tensor_is_left_as_it_is(nodes):
    graph = graph_of(nodes)
    before = graph.SerializeToString(deterministic=True)
    joined(graph)
    assert graph.SerializeToString(deterministic=True) == before


def test_a_gate_that_is_an_output_or_a_shape_that_is_not_known_keeps_its_form():
    nodes = SIGMOID, helper.make_node("Mul", ["x", "gate"], ["y"])
    for graph, shapes in (
        (graph_of(nodes, ["y", "gate"]), None),
        (graph_of(nodes), {}),
    ):
        assert not [found for found in joined(graph, shapes) if found[0] == "Flatten"]


def test_a_shape_is_known_if_all_but_the_batch_is():
    sizes = {"a": ("N", 2), "b": (4, 2), "c": (4, "N"), "d": ()}
    values = [helper.make_tensor_value_info(k, TensorProto.FLOAT, v) for k, v in sizes.items()]
    graph = helper.make_graph([], "g", [], values[1:], value_info=values[:1])
    assert known_shapes(graph) == {"a": (-1, 2), "b": (-1, 2)}
