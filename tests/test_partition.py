import itertools
import math

import networkx
import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from int8_models import classifier_file, emoji, exported
from onnx import helper, numpy_helper
from ort_kernels import kernels
from torch import nn

import export.precision.quantize
from export.onnx_file.tensors import known_shapes
from export.precision import partition
from export.precision.partition import layers_in_float
from export.precision.quantize import layers_of, observed_tensors, write_int8
from export.precision.sensitivity import quantize_until
from export.precision.variants import make_variant
from export.targets import TARGETS

IMAGES = emoji("train", 16)[0]
IN_FLOAT = {"stem/Conv", "head/Gemm"}
SMALL = {*IN_FLOAT, "block.conv1/Conv", "block.conv2/Conv"}


def in_int8(model):
    """Return the layers whose weights are dequantized."""
    graph = onnx.load_model_from_string(model).graph
    made = {node.output[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    layers = [node for node in graph.node if node.op_type in ("Conv", "Gemm", "MatMul")]
    return {node.name for node in layers if node.input[1] in made}


def search(model, in_float, gate=lambda model: True, on_stage=lambda stage: None):
    return quantize_until(
        model,
        [IMAGES[4:]],
        scheme="u8s8",
        held_back=IMAGES[:4],
        is_good=gate,
        in_float=in_float,
        methods=("minmax",),
        on_stage=on_stage,
    )


def in_float(*layers):
    """Return the layers of a sequence that stay in float, by their number in it."""
    torch.manual_seed(0)
    found = layers_in_float(exported(nn.Sequential(*layers).eval()))
    return {name.partition("/")[0] for name in found}


def test_a_classifiers_stem_and_head_stay_in_float():
    found = layers_in_float(classifier_file())
    assert set(found) == IN_FLOAT
    assert found["head/Gemm"] == "a product of 10 x 192: int8 pays from 48 on"
    assert found["stem/Conv"] == ("int8 is no faster here, by a model of such a CPU")


def test_where_all_would_stay_in_float_none_is_said_to():
    assert in_float(nn.Conv2d(3, 4, 1), nn.SiLU(), nn.Conv2d(4, 4, 1)) == set()


@pytest.mark.parametrize(("act", "expected"), [(nn.ReLU6, ()), (nn.SiLU, ("0", "2"))])
def test_a_depthwise_convolution_is_on_its_neighbours_side(act, expected):
    depthwise = nn.Conv2d(128, 128, 3, padding=1, groups=128)
    first = nn.Conv2d(3, 128, 3), act(), depthwise, act(), nn.Conv2d(128, 128, 3, stride=4), act()
    assert in_float(*first, nn.Flatten(), nn.Linear(128 * 7 * 7, 10)) == {*expected, "7"}


def test_narrow_convolutions_pay_among_their_like_and_not_alone():
    def narrow(act):
        return [each for _ in range(4) for each in (nn.Conv2d(24, 24, 3, padding=1), act())]

    first = nn.Conv2d(3, 24, 3, padding=1), nn.Softplus()
    last = nn.Conv2d(24, 256, 3, stride=2), nn.Flatten(), nn.Linear(256 * 15 * 15, 10)
    assert in_float(*first, *narrow(nn.ReLU), *last) == {"0", "12"}
    assert in_float(*first, *narrow(nn.Softplus), *last) == {"0", "2", "4", "6", "8", "12"}


KINDS = (
    "1 x 1",
    "3 x 3",
    "depthwise",
    "Relu",
    "Clip",
    "SiLU",
    "Softplus",
    "Add",
    "MaxPool",
    "Concat",
)
KERNELS = {"1 x 1": (1, 1), "3 x 3": (3, 1), "depthwise": (3, 64)}
FIXED = {"MaxPool": {"kernel_shape": [1, 1]}, "Concat": {"axis": 1}}
SIZE = (1, 64, 8, 8)
Drawn = list[tuple[str, tuple[str, ...]]]  # kinds, and what they read; the nth makes tensor n


def graph_of(drawn):
    nodes, stored = [], {}
    for i, (kind, reads) in enumerate(drawn):
        made, attributes = str(i), FIXED.get(kind, {})
        if kind == "SiLU":
            nodes.append(helper.make_node("Sigmoid", reads, [f"{made}s"], name=f"{made}s"))
            kind, reads = "Mul", (*reads, f"{made}s")
        if kind in KERNELS:
            kernel, groups = KERNELS[kind]
            stored[f"{made}w"] = np.zeros((64, 64 // groups, kernel, kernel), np.float32)
            kind, reads = "Conv", (*reads, f"{made}w")
            attributes = {"pads": [kernel // 2] * 4, "group": groups}
        nodes.append(helper.make_node(kind, reads, [made], name=made, **attributes))
    values = [
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, SIZE)
        for name in ("images", str(len(drawn) - 1))
    ]
    arrays = [numpy_helper.from_array(array, name) for name, array in stored.items()]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], arrays)
    return onnx.shape_inference.infer_shapes(helper.make_model(graph)).graph


def _reference_time(drawn, in_int8, times):
    """Return the time of a choice of sides, of those in int8; inf for one that cannot be."""
    readers = {
        name: [i for i, (_, reads) in enumerate(drawn) if name in reads]
        for name in ("images", *map(str, range(len(drawn))))
    }
    count, last = 64 * 8 * 8, len(drawn) - 1
    total = 0.0
    parts = set()  # one kernel with what makes their input
    for i, (kind, reads) in enumerate(drawn):
        is_int8, source = i in in_int8, None if reads[0] == "images" else int(reads[0])
        if kind in KERNELS:
            total += round(
                partition._WORTH * times[str(i)].in_int8 if is_int8 else times[str(i)].in_float
            )
        elif kind in ("Add", "Concat", "MaxPool"):
            in_float, in_int = (
                round(each * count + 1e6) for each in partition._ON_BOTH_SIDES[kind]
            )
            total += round(partition._WORTH * in_int) if is_int8 else in_float
            total += math.inf if kind == "MaxPool" and is_int8 and source not in in_int8 else 0
        elif (
            kind in ("Relu", "Clip")
            and source not in (None, last)
            and readers[reads[0]] == [i]
            and drawn[source][0] in (*KERNELS, "Add", "Concat")
        ):
            parts.add(i)
            total += math.inf if is_int8 != (source in in_int8) else 0
        else:
            total += math.inf if is_int8 else 0
    for name, reads in readers.items():
        others, maker = {*reads} - parts, None if name == "images" else int(name)
        if maker in in_int8 or others & in_int8:
            total += (partition._TO_FLOAT * count + 1e6) * (len(others - in_int8) + (maker == last))
        if maker not in in_int8 and others & in_int8:
            is_pool = maker is not None and drawn[maker][0] == "MaxPool"
            total += (partition._POOL_TO_INT8 if is_pool else partition._TO_INT8) * count + 1e6
    return total


@st.composite
def drawings(draw):
    drawn: Drawn = []
    for i in range(draw(st.integers(3, 8))):
        kind = draw(st.sampled_from(KINDS))
        names = st.sampled_from(["images", *map(str, range(i))][-3:])
        drawn.append((kind, tuple(draw(names) for _ in range(1 + (kind == "Add")))))
    return drawn


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(drawings())
def test_no_other_choice_of_sides_takes_less_time(drawn):
    graph = graph_of(drawn)
    weights = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    shapes = known_shapes(graph) | {"images": SIZE}
    times = {
        node.output[0]: partition._times(node, weights[node.input[1]], shapes)
        for node in graph.node
        if node.op_type == "Conv"
    }
    network = partition._network(graph, times, weights, shapes)
    least, _ = networkx.minimum_cut(network, partition._INT8, partition._FLOAT)
    every = itertools.product((False, True), repeat=len(drawn))
    choices = ({i for i, is_in in enumerate(each) if is_in} for each in every)
    assert least == min(_reference_time(drawn, in_int8, times) for in_int8 in choices)


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("onnxruntime-x86", set(layers_of(classifier_file())) - IN_FLOAT),
        ("onnxruntime-arm", set(layers_of(classifier_file())) - IN_FLOAT),
        ("jetpack6.2", set(layers_of(classifier_file()))),
    ],
)
def test_a_target_says_whether_layers_are_chosen_here(target, expected):
    made = make_variant(
        "int8",
        classifier_file(),
        target=TARGETS[target],
        golden=IMAGES[:4],
        calibration=[bytes([i]) for i in range(16)],
        preprocess=lambda encoded, first: IMAGES[first : first + len(encoded)],
        is_good=lambda file: True,
        on_stage=lambda stage: None,
    )
    assert in_int8(made.file) == expected
    assert set(made.details["left_in_float"]) == set(layers_of(classifier_file())) - expected


def test_what_is_in_float_from_the_start_is_neither_ranked_nor_lost_from_the_report():
    stages = []
    in_float = dict.fromkeys(SMALL, "small")
    found = search(
        classifier_file(), in_float, lambda model: len(in_int8(model)) < 2, stages.append
    )
    assert any(stage.startswith("ranked 2 layers") for stage in stages)
    first, *others = found.left.items()
    assert first[0] in ("down/Conv", "last/Conv") and "alone in int8" in first[1]
    assert dict(others) == dict.fromkeys(SMALL, "small")
    assert found.layers == 6 and found.tried[-1].left == 5


def test_small_layers_in_float_lose_less():
    assert search(classifier_file(), dict.fromkeys(SMALL, "")).sqnr_db > (
        search(classifier_file(), {}).sqnr_db + 1
    )


def test_the_relu_of_a_layer_in_float_is_not_quantized():
    def relus(model):
        graph = onnx.load_model_from_string(model).graph
        return {node.name for node in graph.node if node.op_type == "Relu"}

    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3)
    file = exported(nn.Sequential(*layers).eval())
    ranges = {
        tensor: (0.0, 1.0)
        for node in onnx.load_model_from_string(file).graph.node
        for tensor in (node.input[0], node.output[0])
    }
    assert relus(file) == {"1/Relu", "3/Relu"}
    # that of a layer in int8 becomes a range that begins at zero
    assert relus(write_int8(file, ranges, scheme="u8s8")) == set()
    assert relus(write_int8(file, ranges, scheme="u8s8", exclude=["0/Conv"])) == {"1/Relu"}


def test_a_pool_between_integer_convolutions_pools_integers(tmp_path, monkeypatch):
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 48, 3), nn.MaxPool2d(3, 2), nn.Conv2d(48, 48, 3)
    file = exported(nn.Sequential(*layers).eval(), max_batch=1)
    tensors = observed_tensors(file, "u8s8")
    ranges = {name: (-1.0, 1.0 + i / 10) for i, name in enumerate(tensors)}  # no two are equal

    found = kernels(write_int8(file, ranges, scheme="u8s8"), tmp_path / "a.onnx")
    assert (found["NhwcMaxPool"], found["DequantizeLinear"]) == (1, 1)  # of the answer
    monkeypatch.setattr(export.precision.quantize, "_pooled", lambda graph, ranges: ranges)
    found = kernels(write_int8(file, ranges, scheme="u8s8"), tmp_path / "b.onnx")
    assert (found["NhwcMaxPool"], found["MaxPool"], found["DequantizeLinear"]) == (0, 1, 2)
