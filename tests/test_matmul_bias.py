from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
from export_models import AttentionBlock, randomized
from int8_models import emoji, exported

import export.quantize
from export.emulate_int8 import run_emulated
from export.quantize import quantize
from export.run_onnx import run_batches

IMAGES = emoji("train", 16)[0]


@pytest.fixture(scope="module")
def file():
    return exported(randomized(AttentionBlock(classes=10)), max_batch=1)


def kernels(model, path):
    """Return what ONNX Runtime makes of a model's nodes, by type."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(path), 3
    onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load_model(path).graph.node)


@pytest.mark.parametrize("scheme", ["u8s8", "s8s8"])
def test_the_products_of_tokens_run_in_integers(file, scheme, tmp_path, monkeypatch):
    model = quantize(file, [IMAGES], scheme=scheme, method="minmax")
    found = kernels(model, tmp_path / "a.onnx")
    assert found["MatMulIntegerToFloat"] >= 2 and found["Gemm"] == 0

    monkeypatch.setattr(export.quantize, "part_biases", lambda *args: None)
    fused = quantize(file, [IMAGES], scheme=scheme, method="minmax")
    assert kernels(fused, tmp_path / "b.onnx")["Gemm"] > 0
    np.testing.assert_array_equal(run_emulated(model, IMAGES), run_emulated(fused, IMAGES))


def test_the_answers_are_those_of_the_graph_as_it_is_written(file):
    model = quantize(file, [IMAGES], scheme="u8s8", method="minmax")
    expected = run_emulated(model, IMAGES)
    np.testing.assert_allclose(
        run_batches(model, IMAGES), expected, atol=0.05 * float(np.ptp(expected))
    )


def test_where_the_batch_is_free_nothing_is_fused_and_nothing_changed():
    free = exported(randomized(AttentionBlock(classes=10)), max_batch=8)
    model = quantize(free, [IMAGES], scheme="u8s8", method="minmax")
    names = [tensor.name for tensor in onnx.load_model_from_string(model).graph.initializer]
    assert not [name for name in names if name.endswith("_row")]


def test_a_gpu_is_given_its_biases_as_they_are(file):
    model = quantize(file, [IMAGES], scheme="tensorrt", method="minmax")
    graph = onnx.load_model_from_string(model).graph
    assert not [tensor.name for tensor in graph.initializer if tensor.name.endswith("_row")]
