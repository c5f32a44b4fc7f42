import numpy as np
import onnx
import pytest
from export_models import AttentionBlock, randomized
from int8_models import emoji, exported
from ort_kernels import kernels

import export.precision.quantize
from export.onnx_file.run_onnx import run_batches
from export.precision.emulate_int8 import run_emulated
from export.precision.matmul_bias import part_biases
from export.precision.quantize import quantize

IMAGES = emoji("train", 16)[0]


@pytest.fixture(scope="module")
def file():
    return exported(randomized(AttentionBlock(classes=10)), max_batch=1)


@pytest.mark.parametrize("scheme", ["u8s8", "s8s8"])
def test_the_products_of_tokens_run_in_integers(file, scheme, tmp_path, monkeypatch):
    model = quantize(file, [IMAGES], scheme=scheme, method="minmax")
    found = kernels(model, tmp_path / "a.onnx")
    assert found["MatMulIntegerToFloat"] >= 2 and found["Gemm"] == 0

    monkeypatch.setattr(export.precision.quantize, "part_biases", lambda *args: None)
    fused = quantize(file, [IMAGES], scheme=scheme, method="minmax")
    assert kernels(fused, tmp_path / "b.onnx")["Gemm"] > 0
    np.testing.assert_array_equal(run_emulated(model, IMAGES), run_emulated(fused, IMAGES))


def test_the_answers_are_those_of_the_graph_as_it_is_written(file):
    model = quantize(file, [IMAGES], scheme="u8s8", method="minmax")
    expected = run_emulated(model, IMAGES)
    np.testing.assert_allclose(
        run_batches(model, IMAGES), expected, atol=0.05 * float(np.ptp(expected))
    )


def one_layer_after_the_other(ranks):
    """Return a graph of products, and what `part_biases` reads of each layer's bias in it."""
    bias = onnx.numpy_helper.from_array(np.ones(4, np.float32), "bias")
    nodes = [
        onnx.helper.make_node("MatMul", ["x", "w"], ["first"], name="a"),
        onnx.helper.make_node("MatMul", ["x", "w"], ["second"], name="b"),
        onnx.helper.make_node("MatMul", ["x", "w"], ["third"], name="in float"),
        onnx.helper.make_node("Add", ["first", "bias"], ["1"]),
        onnx.helper.make_node("Add", ["bias", "second"], ["2"]),
        onnx.helper.make_node("Add", ["third", "bias"], ["3"]),
        onnx.helper.make_node("Mul", ["bias", "1"], ["4"]),
    ]
    graph = onnx.helper.make_graph(nodes, "g", [], [], [bias])
    part_biases(graph, ranks, ["a", "b"])
    return graph, [list(node.input) for node in graph.node[3:]]


def test_a_shared_bias_is_reshaped_once_and_others_read_it_as_it_was():
    graph, inputs = one_layer_after_the_other(dict.fromkeys(("first", "second", "third"), 4))
    assert inputs == [
        ["first", "bias_row"],
        ["bias_row", "second"],
        ["third", "bias"],
        ["bias", "1"],
    ]
    assert [(t.name, list(t.dims)) for t in graph.initializer] == [
        ("bias", [4]),
        ("bias_row", [1, 1, 4]),
    ]
    onnx.numpy_helper.to_array(graph.initializer[1])  # as many values as its shape says


@pytest.mark.parametrize("rank", [None, 2])
def test_a_matrix_and_what_is_of_unknown_size_keep_their_bias(rank):
    # (1, 1, N) would give a matrix a third dimension
    graph, inputs = one_layer_after_the_other({} if rank is None else {"first": 2, "second": 2})
    assert inputs[:2] == [["first", "bias"], ["bias", "second"]] and len(graph.initializer) == 1


def test_where_the_batch_is_free_nothing_is_fused_and_nothing_changed():
    free = exported(randomized(AttentionBlock(classes=10)), max_batch=8)
    model = quantize(free, [IMAGES], scheme="u8s8", method="minmax")
    names = [tensor.name for tensor in onnx.load_model_from_string(model).graph.initializer]
    assert not [name for name in names if name.endswith("_row")]


def test_a_gpu_is_given_its_biases_as_they_are(file):
    model = quantize(file, [IMAGES], scheme="tensorrt", method="minmax")
    graph = onnx.load_model_from_string(model).graph
    assert not [tensor.name for tensor in graph.initializer if tensor.name.endswith("_row")]
