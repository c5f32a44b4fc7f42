import numpy as np
import onnx
import pytest
import torch
from export_models import AttentionBlock, noise, randomized, small_cnn
from onnx import TensorProto, helper
from torch import nn

from deploy.errors import CheckFailedError
from export.onnx_file.gates import assert_exportable
from export.onnx_file.opset17 import to_opset_17
from export.onnx_file.run_onnx import open_session, run_batches
from export.onnx_file.to_onnx import to_onnx
from export.passes.simplify import simplify
from export.targets import TARGETS

OLD = TARGETS["jetpack6.0"]


class Reduces(nn.Module):
    """Writes what opset 18 changed: reductions, a split, a pad, a resize."""

    def forward(self, x):
        a, b = nn.functional.pad(x, (1, 0, 2, 1)).chunk(2, dim=-1)
        half = nn.functional.interpolate(x, scale_factor=0.5, mode="bilinear")
        return torch.stack(
            [
                a.mean((2, 3)).amax(1),
                b.amin((1, 2, 3)),
                half.flatten(1).norm(dim=1),
                nn.functional.gelu(half).logsumexp((2, 3)).mean(1),
            ],
            1,
        )


@pytest.mark.parametrize("model", [small_cnn, AttentionBlock, Reduces])
@pytest.mark.parametrize("max_batch", [1, 5])
def test_a_model_for_tensorrt_8_is_of_opset_17_and_answers_the_same(model, max_batch):
    x, module = noise(5, 3, 16, 15), randomized(model())
    if model is not Reduces:
        x = noise(5, 3, 16, 16)
    file = to_onnx(simplify(module, (x,)).model, (x,), target=OLD, max_batch=max_batch)
    assert_exportable(file, OLD, max_batch=max_batch)
    proto = onnx.load_model_from_string(file)
    assert [(entry.domain, entry.version) for entry in proto.opset_import] == [("", 17)]
    assert proto.ir_version == 8
    with torch.no_grad():
        expected = module(x).numpy()
    np.testing.assert_allclose(run_batches(file, x.numpy()), expected, rtol=1e-4, atol=1e-5)


def test_axes_become_an_attribute_and_no_input_is_left():
    x = noise(2, 3, 16, 15)
    file = to_onnx(simplify(Reduces().eval(), (x,)).model, (x,), target=OLD)
    graph = onnx.load_model_from_string(file).graph
    reductions = [node for node in graph.node if node.op_type == "ReduceMean"]
    assert reductions
    for node in reductions:
        assert len(node.input) == 1 and "axes" in {a.name for a in node.attribute}


def model(op, inputs, stored=(), **attributes):
    node = helper.make_node(op, ["x", *inputs], ["y"], name=f"head/{op}", **attributes)
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        list(stored),
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


AXES = helper.make_tensor("axes", TensorProto.INT64, [1], [1])
NONE = helper.make_tensor("axes", TensorProto.INT64, [0], [])
SIZES = helper.make_tensor("sizes", TensorProto.INT64, [1], [6])


@pytest.mark.parametrize(
    ("proto", "found"),
    [
        (model("ReduceMax", ["axes"]), r"'head/ReduceMax' \(ReduceMax\): its axes are computed"),
        (model("ReduceMax", ["axes"], [NONE], noop_with_empty_axes=1), "over no axis"),
        (model("Pad", ["sizes", "", "axes"], [SIZES, AXES]), "it pads some axes"),
        (model("Resize", ["", "", "sizes"], [SIZES], axes=[1]), "resizes some axes"),
        (model("Resize", ["", "", "sizes"], [SIZES], antialias=1), "it smooths"),
        (model("Mish", []), "no operator of this form"),
    ],
)
def test_what_opset_17_has_no_word_for_is_refused_by_the_nodes_name(proto, found):
    with pytest.raises(CheckFailedError, match=found):
        to_opset_17(proto)


def test_reducing_over_no_named_axis_reduces_over_all():
    proto = model("ReduceMax", ["axes"], [NONE])
    to_opset_17(proto)
    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    (y,) = open_session(proto.SerializeToString()).run(None, {"x": x})
    assert y.item() == 7.0 and not proto.graph.initializer
