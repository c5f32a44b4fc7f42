import importlib.util

import onnx
import pytest
from export_models import AttentionBlock, noise, randomized, small_cnn
from onnx import TensorProto, helper
from torch import nn

import export.onnx_file.conformance
from deploy.errors import CheckFailedError
from export.onnx_file.conformance import judge
from export.onnx_file.gates import assert_exportable
from export.onnx_file.to_onnx import to_onnx
from export.passes.simplify import simplify
from export.targets import TARGETS

ORIN = TARGETS["jetpack6.2"]

needs_judge = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None,
    reason="TensorRT-RTX is not installed: pip install 'edgereg[conformance]'",
)


def one_node(operator: str, **attributes) -> bytes:
    """Return a model of one ReLU and the node in question."""
    nodes = [
        helper.make_node("Relu", ["images"], ["h"], "body/Relu"),
        helper.make_node(
            operator,
            ["h", *attributes.pop("more", [])],
            ["logits"],
            f"head/{operator}",
            **attributes,
        ),
    ]
    value = helper.make_tensor_value_info
    scales = helper.make_tensor("scales", TensorProto.FLOAT, [4], [1.0, 1.0, 0.5, 0.5])
    graph = helper.make_graph(
        nodes,
        "g",
        [value("images", TensorProto.FLOAT, ["batch", 3, 8, 8])],
        [value("logits", TensorProto.FLOAT, None)],
        [scales],
    )
    opsets = [helper.make_opsetid("", 20)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


@needs_judge
@pytest.mark.parametrize("max_batch", [1, 16])
@pytest.mark.parametrize("model", [small_cnn, AttentionBlock])
@pytest.mark.parametrize("name", ["jetpack6.0", "jetpack6.2", "jetpack7.2-thor"])
def test_an_exported_model_is_accepted_for_the_jetsons(name, model, max_batch):
    x, target = noise(2, 3, 16, 16), TARGETS[name]
    simple = simplify(randomized(model()), (x,)).model
    file = to_onnx(simple, (x,), target=target, max_batch=max_batch)
    assert_exportable(file, target, max_batch=max_batch)
    verdict = judge(file, target, max_batch=max_batch)
    assert verdict.verdict == "accepted"
    assert verdict.judge.startswith("TensorRT-RTX 1.")
    assert target.proxy in verdict.detail


@needs_judge
@pytest.mark.parametrize(
    ("file", "found"),
    [
        (
            one_node("Resize", more=["", "scales"], mode="linear", antialias=1),
            r"node 'head/Resize' \(Resize\): .*[Aa]ntialias",
        ),
        (one_node("Unique"), r"node 'head/Unique' \(Unique\): "),
        (one_node("Relu")[:-20], "Failed to parse"),
    ],
)
def test_what_tensorrt_cannot_do_is_refused_by_the_name_of_the_node(file, found):
    with pytest.raises(CheckFailedError, match=found):
        judge(file, ORIN)


@needs_judge
def test_an_antialiasing_model_is_refused_by_the_name_of_its_module():
    class Shrinks(nn.Module):
        def forward(self, x):
            return nn.functional.interpolate(x, scale_factor=0.5, mode="bilinear", antialias=True)

    x = noise(2, 3, 16, 16)
    model = nn.Sequential(nn.Conv2d(3, 3, 1), Shrinks())
    file = to_onnx(simplify(randomized(model), (x,)).model, (x,), target=ORIN)
    with pytest.raises(CheckFailedError, match=r"node '1/Resize' \(Resize\)"):
        judge(file, ORIN)


@needs_judge
def test_a_model_that_parses_but_cannot_be_built_is_refused_with_the_builders_words():
    proto = onnx.load_model_from_string(one_node("Reshape", more=["shape"]))
    proto.graph.initializer.append(helper.make_tensor("shape", TensorProto.INT64, [2], [-1, 7]))
    with pytest.raises(CheckFailedError, match="reshaping failed"):
        judge(proto.SerializeToString(), ORIN, max_batch=16)


def test_a_target_without_a_gpu_needs_no_judge():
    assert judge(b"", TARGETS["onnxruntime-x86"]).verdict == "not required"


def test_without_the_judge_a_model_is_not_judged_and_it_is_said_why(monkeypatch):
    monkeypatch.setattr(export.onnx_file.conformance, "_JUDGE", "tensorrt_of_nobody")
    verdict = judge(one_node("Relu"), ORIN)
    assert verdict.verdict == "not judged"
    assert "tensorrt_of_nobody" in verdict.detail and "edgereg[conformance]" in verdict.detail


@pytest.mark.parametrize(
    ("child", "limit_s", "found"),
    [
        ("import os; os.kill(os.getpid(), 11)", 60, "it ended with status -11"),
        ("raise MemoryError('too much')", 60, "MemoryError: too much"),
        ("import time; time.sleep(60)", 0.5, r"none after 0\.5 s"),
    ],
)
def test_a_judge_that_crashes_or_hangs_fails_the_check_and_not_the_export(
    child, limit_s, found, monkeypatch
):
    monkeypatch.setattr(export.onnx_file.conformance, "_CHILD", child)
    with pytest.raises(CheckFailedError, match=found):
        judge(one_node("Relu"), ORIN, time_limit_s=limit_s)
