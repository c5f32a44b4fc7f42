import onnx
import pytest
import torch
from int8_models import classifier_file, emoji, exported
from torch import nn

from export.precision.quantize import layers_of, write_int8
from export.precision.sensitivity import quantize_until
from export.precision.small_layers import small_layers
from export.precision.variants import make_variant
from export.targets import TARGETS

IMAGES = emoji("train", 16)[0]
SMALL = {"stem/Conv", "block.conv1/Conv", "block.conv2/Conv", "head/Gemm"}


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


def test_a_product_with_too_few_rows_or_columns_is_small():
    found = small_layers(classifier_file(), 48)
    assert set(found) == SMALL
    assert found["stem/Conv"] == "a product of 16 x 27: int8 pays from 48 x 48"
    assert set(small_layers(classifier_file(), 49)) == set()  # 48 are the most: all would be


def test_from_zero_no_layer_is_small():
    assert small_layers(classifier_file(), 0) == {}


def test_a_depthwise_convolution_has_one_row_a_group():
    depthwise = nn.Conv2d(64, 64, 9, groups=64)  # 81 columns
    file = exported(nn.Sequential(nn.Conv2d(3, 64, 5), depthwise).eval())
    assert set(small_layers(file, 2)) == {"1/Conv"}
    assert "1 x 81" in small_layers(file, 2)["1/Conv"]


def test_a_group_has_its_share_of_the_rows_and_a_product_the_columns_that_it_reads():
    grouped = nn.Conv2d(8, 64, 3, groups=4)  # 16 rows of 2 x 9
    layers = nn.Conv2d(3, 8, 5), grouped, nn.Flatten(2), nn.Linear(676, 5), nn.Flatten()
    found = small_layers(exported(nn.Sequential(*layers, nn.Linear(320, 70)).eval()), 20)
    reasons = {name.partition("/")[0]: reason.partition(":")[0] for name, reason in found.items()}
    assert reasons == {
        "0": "a product of 8 x 75",
        "1": "a product of 16 x 18",
        "3": "a product of 5 x 676",  # a MatMul, whose weights lie the other way about
    }


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("onnxruntime-x86", {"down/Conv", "last/Conv"}),
        ("onnxruntime-arm", {"down/Conv", "last/Conv"}),
        ("jetpack6.2", set(layers_of(classifier_file()))),
    ],
)
def test_a_target_says_from_which_size_int8_pays(target, expected):
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
