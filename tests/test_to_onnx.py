import collections

import numpy as np
import onnx
import pytest
import torch
from export_models import AttentionBlock, noise, randomized, small_cnn
from torch import nn

from deploy.errors import BadInputError, CheckFailedError
from export.onnx_file.gates import assert_exportable
from export.onnx_file.run_onnx import run_batches
from export.onnx_file.to_onnx import to_onnx
from export.passes.simplify import simplify
from export.targets import TARGETS, find_target

X86 = TARGETS["onnxruntime-x86"]


def exported(model: nn.Module, *, seed: int = 1) -> bytes:
    x = noise(2, 3, 16, 16, seed=seed)
    return to_onnx(simplify(randomized(model), (x,)).model, (x,), target=X86, max_batch=70)


@pytest.fixture(scope="module")
def cnn_file():
    return exported(small_cnn())


@pytest.fixture(scope="module")
def attention_file():
    return exported(AttentionBlock())


@pytest.mark.parametrize(
    ("name", "model"), [("cnn_file", small_cnn), ("attention_file", AttentionBlock)]
)
def test_the_file_computes_what_the_model_does_at_every_batch_size(name, model, request):
    x = noise(70, 3, 16, 16, seed=5)
    with torch.no_grad():
        expected = randomized(model())(x).numpy()
    for batch in (1, 3, 70):
        actual = run_batches(request.getfixturevalue(name), x.numpy()[:batch])
        np.testing.assert_allclose(actual, expected[:batch], rtol=1e-3, atol=1e-5)


def test_the_file_has_the_targets_opset_and_the_names_of_the_contract(cnn_file):
    proto = onnx.load_model_from_string(cnn_file)
    assert [(entry.domain, entry.version) for entry in proto.opset_import] == [("", 20)]
    assert [value.name for value in proto.graph.input] == ["images"]
    assert [value.name for value in proto.graph.output] == ["logits"]
    operators = collections.Counter(node.op_type for node in proto.graph.node)
    assert operators["Conv"] == 2
    assert not operators.keys() & {"BatchNormalization", "Dropout"}


def test_nodes_are_named_after_the_modules_that_made_them(attention_file):
    names = [node.name for node in onnx.load_model_from_string(attention_file).graph.node]
    assert len(set(names)) == len(names)
    assert {"patches/Conv", "block.linear1/MatMul", "head/Gemm"} <= set(names)


def test_the_same_model_gives_the_same_bytes_whatever_was_exported_between(attention_file):
    assert exported(AttentionBlock(), seed=2) == attention_file


def test_no_path_stack_trace_or_version_of_torch_is_in_the_file(attention_file):
    for secret in (".py", "site-packages", "stack_trace", "pkg.torch", torch.__version__):
        assert secret.encode() not in attention_file


def test_an_opset_that_torch_silently_replaces_is_refused(cnn_file, monkeypatch):
    """torch 2.14 writes 18 when it is asked for 17, and at times when it is asked for 26."""
    proto = onnx.load_model_from_string(cnn_file)
    proto.opset_import[0].version = 18
    program = type("Program", (), {"model_proto": proto})
    monkeypatch.setattr(torch.onnx, "export", lambda *args, **kwargs: program)
    with pytest.raises(CheckFailedError, match=r"for opset 20 is .*wrote {'ai.onnx': 18}"):
        exported(small_cnn())


@pytest.mark.parametrize("model", [small_cnn, AttentionBlock])
def test_without_a_largest_batch_the_shape_is_static_and_no_shape_is_computed(model):
    x = noise(3, 3, 16, 16)
    file = to_onnx(simplify(randomized(model()), (x,)).model, (x,), target=X86)
    graph = onnx.load_model_from_string(file).graph
    sizes = [v.type.tensor_type.shape.dim[0].dim_value for v in (*graph.input, *graph.output)]
    assert sizes == [1, 1]
    assert not {"Shape", "Expand", "Range"} & {node.op_type for node in graph.node}
    assert_exportable(file, X86)
    with pytest.raises(CheckFailedError, match=r"'images' has shape .*; its first must"):
        assert_exportable(file, X86, max_batch=8)
    with torch.no_grad():
        expected = randomized(model())(x).numpy()
    np.testing.assert_allclose(run_batches(file, x.numpy()), expected, rtol=1e-3, atol=1e-5)


def bake_input(graph):
    graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2


def bake_reshape(graph):
    (reshape,) = (node for node in graph.node if node.op_type == "Reshape")
    shape = onnx.numpy_helper.from_array(np.array([2, 4, -1]), "baked")
    graph.initializer.append(shape)
    reshape.input[1] = "baked"


def move_a_weight(graph):
    weight = max(graph.initializer, key=lambda tensor: len(tensor.raw_data))
    weight.raw_data = (np.frombuffer(weight.raw_data, np.float32) * 1.01).tobytes()


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (bake_input, "at batch size 1: ONNX Runtime says: .*Expected: 2"),
        (bake_reshape, "at batch size 1: "),
        (move_a_weight, "at batch size 1: scaled error"),
    ],
)
def test_a_file_that_differs_from_the_module_at_some_batch_size_is_refused(
    change, found, cnn_file, monkeypatch
):
    proto = onnx.load_model_from_string(cnn_file)
    change(proto.graph)
    program = type("Program", (), {"model_proto": proto})
    monkeypatch.setattr(torch.onnx, "export", lambda *args, **kwargs: program)
    with pytest.raises(CheckFailedError, match=found):
        exported(small_cnn())


def gate(file: bytes, change) -> None:
    proto = onnx.load_model_from_string(file)
    change(proto)
    assert_exportable(proto.SerializeToString(), X86, max_batch=70)


def another_opset(proto):
    proto.opset_import[0].version = 21


def another_domain(proto):
    proto.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    proto.graph.node[0].domain = "com.microsoft"


def local_function(proto):
    proto.opset_import.append(onnx.helper.make_opsetid("here", 1))
    node = onnx.helper.make_node("Relu", ["a"], ["b"])
    opset = [onnx.helper.make_opsetid("", 20)]
    proto.functions.append(onnx.helper.make_function("here", "F", ["a"], ["b"], [node], opset))


def external_weights(proto):
    tensor = proto.graph.initializer[0]
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="weights.bin")
    tensor.ClearField("raw_data")


def a_second_free_dimension(proto):
    proto.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "height"


def a_dropout(proto):
    output = proto.graph.node[-1].output[0]
    proto.graph.node[-1].output[0] = "before"
    proto.graph.node.append(onnx.helper.make_node("Dropout", ["before"], [output], "left"))


def control_flow(proto):
    output = onnx.helper.make_tensor_value_info("o", onnx.TensorProto.FLOAT, None)
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Identity", ["images"], ["o"])], "branch", [], [output]
    )
    branches = {"then_branch": graph, "else_branch": graph}
    condition = onnx.numpy_helper.from_array(np.array(True), "yes")
    proto.graph.initializer.append(condition)
    proto.graph.node.append(onnx.helper.make_node("If", ["yes"], ["unused"], "branch", **branches))


def an_operator_of_nobodys_tensorrt(proto):
    proto.graph.node.append(onnx.helper.make_node("Det", ["images"], ["d"], "stem/Det"))


def test_an_operator_that_the_targets_tensorrt_lacks_is_named_with_its_module(cnn_file):
    proto = onnx.load_model_from_string(cnn_file)
    an_operator_of_nobodys_tensorrt(proto)
    file = proto.SerializeToString()
    with pytest.raises(CheckFailedError, match=r"TensorRT 10.3.0 lacks: stem/Det \(Det\)"):
        assert_exportable(file, TARGETS["jetpack6.2"], max_batch=70)
    assert_exportable(file, X86, max_batch=70)  # ONNX Runtime has it


def a_missing_input(proto):
    proto.graph.node[0].input[0] = "nowhere"


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (another_opset, r"found: opsets {'': 21}"),
        (another_domain, r"operators of other domains: \['0/Conv'\]"),
        (local_function, "1 local functions"),
        (external_weights, "weights outside the file"),
        (a_second_free_dimension, "'images' has shape .*'height'"),
        (a_dropout, r"sites left by the simplification: \['left'\]"),
        (control_flow, r"control flow: \['branch'\]"),
        (a_missing_input, "onnx's checker says"),
    ],
)
def test_the_gates_refuse_each_planted_violation_and_accept_the_file_itself(
    change, found, cnn_file
):
    assert_exportable(cnn_file, X86, max_batch=70)
    with pytest.raises(CheckFailedError, match=found):
        gate(cnn_file, change)


def test_an_unknown_target_is_refused_with_the_nearest_name():
    with pytest.raises(BadInputError, match=r"did you mean jetpack7\.2-orin\?"):
        find_target("jetpack7.2_orin")
    with pytest.raises(BadInputError, match="choose one of them"):
        find_target("xyz")
    assert find_target("jetpack6.2").proxy == "SM86"


class Denormalizes(nn.Module):
    """Has constants outside its state dict into which a factor folds, as timm's csatv2 has."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.register_buffer("std", torch.rand(3, 1, 1) + 0.5, persistent=False)
        self.register_buffer("mean", torch.rand(3, 1, 1), persistent=False)

    def forward(self, x):
        return self.conv((x * self.std + self.mean) * 255)


def test_a_constant_outside_the_state_dict_that_a_factor_folds_into_is_exported():
    model, x = Denormalizes().eval(), noise(2, 3, 8, 8)
    simple = simplify(model, (x,))
    assert sum(len(done.changed) for done in simple.report.passes.values()) > 0
    with torch.no_grad():
        expected = model(x).numpy()
    actual = run_batches(to_onnx(simple.model, (x,), target=X86), x.numpy())
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-2)
