import numpy as np
import onnx
import pytest
import torch
from int8_models import emoji, exported
from onnx import helper
from ort_kernels import kernels
from torch import nn

import export.precision.quantize
from export.precision.emulate_int8 import run_emulated
from export.precision.gemm_relu import part_relus
from export.precision.quantize import quantize

IMAGES = emoji("train", 16)[0]


@pytest.mark.parametrize("scheme", ["u8s8", "s8s8"])
def test_a_product_before_a_relu_runs_in_integers(scheme, tmp_path, monkeypatch):
    torch.manual_seed(0)
    layers = nn.Flatten(), nn.Linear(3072, 64), nn.ReLU(), nn.Linear(64, 64)
    file = exported(nn.Sequential(*layers).eval())
    options = {"scheme": scheme, "method": "minmax", "exclude": ["3/Gemm"]}
    model = quantize(file, [IMAGES], **options)
    found = kernels(model, tmp_path / "a.onnx")
    assert (found["QGemm"], found["FusedGemm"], found["Gemm"]) == (1, 0, 1)

    monkeypatch.setattr(export.precision.quantize, "part_relus", lambda *args: None)
    fused = quantize(file, [IMAGES], **options)
    assert kernels(fused, tmp_path / "b.onnx")["FusedGemm"] == 1
    np.testing.assert_array_equal(run_emulated(model, IMAGES), run_emulated(fused, IMAGES))


def test_a_relu_before_an_integer_layer_is_left_to_it(tmp_path):
    layers = nn.Flatten(), nn.Linear(3072, 64), nn.ReLU(), nn.Linear(64, 64)
    file = exported(nn.Sequential(*layers).eval())
    found = kernels(quantize(file, [IMAGES], scheme="u8s8", method="minmax"), tmp_path / "a.onnx")
    assert (found["QGemm"], found["Relu"], found["Flatten"]) == (2, 0, 0)


@pytest.mark.parametrize(
    ("kind", "name", "readers"), [("Gemm", "in float", 1), ("MatMul", "a", 1), ("Gemm", "a", 2)]
)
def test_all_else_keeps_its_form(kind, name, readers):
    nodes = [helper.make_node(kind, ["x", "w"], ["y"], name=name)]
    nodes += [helper.make_node("Relu", ["y"], [f"z{i}"], name=f"r{i}") for i in range(readers)]
    graph = onnx.GraphProto(node=nodes)
    part_relus(graph, ["a"])
    assert [*graph.node] == nodes
