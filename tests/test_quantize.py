import importlib.util
import os
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest
from export_models import AttentionBlock, randomized
from int8_models import classifier_file, emoji, exported
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator
from onnxruntime.quantization import CalibrationDataReader, quantize_static
from torch import nn

from deploy.errors import BadInputError, CheckFailedError
from export.onnx_file.conformance import judge
from export.onnx_file.gates import assert_exportable
from export.onnx_file.run_onnx import run_batches
from export.precision.emulate_int8 import describe_int8, run_emulated, sqnr_db
from export.precision.quantize import SCHEMES, layers_of, observed_tensors, quantize
from export.precision.ranges import METHODS
from export.targets import TARGETS, find_target

ORIN = find_target("jetpack6.2")
needs_judge = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None,
    reason="TensorRT-RTX is not installed: pip install 'edgereg[conformance]'",
)


@pytest.fixture(scope="module")
def calibration():
    return emoji("train", 48)[0]


@pytest.fixture(scope="module")
def validation():
    return emoji("test", 496)


@cache
def attention_file():
    return exported(randomized(AttentionBlock(classes=10)), target=ORIN.name, max_batch=1)


def accuracy(model, validation):
    images, labels = validation
    return float((run_emulated(model, images).argmax(1) == labels).mean())


def graph_of(model):
    return onnx.load_model_from_string(model).graph


def initializers(graph):
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}


def pairs(graph):
    """Return the scale and the zero point of each DequantizeLinear."""
    values = initializers(graph)
    readers = [node for node in graph.node if node.op_type == "DequantizeLinear"]
    return [(values[node.input[1]], values[node.input[2]]) for node in readers]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("method", METHODS)
def test_every_scheme_and_method_keeps_the_accuracy(scheme, method, calibration, validation):
    file = classifier_file()
    model = quantize(file, [calibration], scheme=scheme, method=method)
    assert accuracy(model, validation) >= accuracy(file, validation) - 0.02
    reference = run_emulated(file, validation[0][:64])
    assert sqnr_db(run_emulated(model, validation[0][:64]), reference) > 18


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_file_is_one_that_any_target_of_its_opset_reads(scheme, calibration):
    model = quantize(classifier_file(), [calibration], scheme=scheme, method="minmax")
    assert_exportable(model, TARGETS["onnxruntime-x86"], max_batch=16)
    proto = onnx.load_model_from_string(model)
    assert not proto.metadata_props and not proto.doc_string and not proto.graph.value_info
    assert (proto.producer_name, proto.producer_version) == ("edgereg", "")
    read = {tensor for node in proto.graph.node for tensor in node.input}
    assert {tensor.name for tensor in proto.graph.initializer} <= read


@pytest.mark.parametrize("scheme", SCHEMES)
def test_nodes_keep_their_names_and_new_ones_are_named_after_their_module(scheme, calibration):
    graph = graph_of(quantize(classifier_file(), [calibration], scheme=scheme, method="minmax"))
    names = [node.name for node in graph.node]
    assert len(set(names)) == len(names)
    assert set(layers_of(classifier_file())) < set(names)
    modules = {
        name.rpartition("/")[0] for name in (n.name for n in graph_of(classifier_file()).node)
    }
    new = [node for node in graph.node if "Linear" in node.op_type]
    assert {node.name.rpartition("/")[0] for node in new} <= modules | {"images"}
    assert "images/QuantizeLinear" in names and "block.conv1/DequantizeLinear" in names


def test_for_tensorrt_all_is_symmetric_and_biases_stay_in_float(calibration):
    graph = graph_of(quantize(classifier_file(), [calibration], scheme="tensorrt", method="minmax"))
    assert all(zero.dtype == np.int8 and not zero.any() for _, zero in pairs(graph))
    kinds = Counter(node.op_type for node in graph.node)
    assert (
        kinds["QuantizeLinear"]
        == kinds["DequantizeLinear"]
        == 2 * len(layers_of(classifier_file()))
    )
    makers = {tensor: node.op_type for node in graph.node for tensor in node.output}
    values = initializers(graph)
    for node in (node for node in graph.node if node.op_type in ("Conv", "Gemm")):
        assert [makers.get(tensor) for tensor in node.input[:2]] == ["DequantizeLinear"] * 2
        assert values[node.input[2]].dtype == np.float32
    channels = {len(scale) for scale, _ in pairs(graph) if scale.ndim}
    assert channels == {10, 16, 48}  # one scale for each channel of a weight


def test_for_x86_activations_are_unsigned_and_weights_have_seven_bits(calibration):
    graph = graph_of(quantize(classifier_file(), [calibration], scheme="u8s8", method="minmax"))
    types = {zero.dtype for _, zero in pairs(graph)}
    assert types == {np.dtype("uint8"), np.dtype("int8"), np.dtype("int32")}
    values = initializers(graph)
    weights = [v for v in values.values() if v.dtype == np.int8 and v.ndim > 1]
    assert len(weights) == len(layers_of(classifier_file()))
    assert max(int(np.abs(weight.astype(int)).max()) for weight in weights) == 64


def test_for_arm_activations_are_signed_and_weights_have_eight_bits(calibration):
    graph = graph_of(quantize(classifier_file(), [calibration], scheme="s8s8", method="minmax"))
    assert {zero.dtype for _, zero in pairs(graph)} == {np.dtype("int8"), np.dtype("int32")}
    values = initializers(graph)
    weights = [v for v in values.values() if v.dtype == np.int8 and v.ndim > 1]
    assert max(int(np.abs(weight.astype(int)).max()) for weight in weights) == 127


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_emulation_computes_what_the_standard_says(scheme, calibration):
    model = quantize(classifier_file(), [calibration], scheme=scheme, method="minmax")
    x = emoji("test", 4)[0]
    expected = ReferenceEvaluator(onnx.load_model_from_string(model)).run(None, {"images": x})[0]
    # Another order of sums moves a value over the edge of a step now and then.
    assert sqnr_db(run_emulated(model, x), expected) > 30


def test_the_integer_kernels_of_an_x86_agree_with_the_emulation(calibration, validation):
    model = quantize(classifier_file(), [calibration], scheme="u8s8", method="minmax")
    x = validation[0][:64]
    assert sqnr_db(run_batches(model, x), run_emulated(model, x)) > 30


def test_the_same_arguments_give_the_same_bytes_in_another_process(calibration, tmp_path):
    (tmp_path / "model.onnx").write_bytes(classifier_file())
    np.save(tmp_path / "images.npy", calibration)
    code = (
        "import sys, numpy as np\nfrom pathlib import Path\n"
        "from export.precision.quantize import quantize\n"
        "folder = Path(sys.argv[1])\n"
        "for scheme in ('tensorrt', 'u8s8'):\n"
        "    model = quantize((folder / 'model.onnx').read_bytes(),\n"
        "        [np.load(folder / 'images.npy')], scheme=scheme, method='entropy')\n"
        "    (folder / scheme).write_bytes(model)\n"
    )
    environment = os.environ | {
        "PYTHONHASHSEED": "7",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=environment, check=True)
    for scheme in ("tensorrt", "u8s8"):
        here = quantize(classifier_file(), [calibration], scheme=scheme, method="entropy")
        assert Path(tmp_path, scheme).read_bytes() == here


@pytest.mark.parametrize("scheme", SCHEMES)
def test_an_excluded_layer_keeps_its_weights_in_float(scheme, calibration):
    model = quantize(
        classifier_file(),
        [calibration],
        scheme=scheme,
        method="minmax",
        exclude=["down/Conv", "head/Gemm"],
    )
    graph, original = graph_of(model), graph_of(classifier_file())
    nodes = {node.name: node for node in graph.node}
    for node in original.node:
        if node.name in layers_of(classifier_file()):
            is_left = node.name in ("down/Conv", "head/Gemm")
            assert (nodes[node.name].input[1] == node.input[1]) == is_left
    values = initializers(graph)
    assert all(
        np.array_equal(values[n], v) for n, v in initializers(original).items() if n in values
    )


def test_what_is_excluded_must_be_a_layer_and_not_all_of_them(calibration):
    for exclude, found in (
        (["stem/Conf"], "'stem/Conf'; remedy: did you mean stem/Conv"),
        (layers_of(classifier_file()), "6 layers with weights, of which all"),
    ):
        with pytest.raises(BadInputError, match=found):
            quantize(
                classifier_file(),
                [calibration],
                scheme="u8s8",
                method="minmax",
                exclude=exclude,
            )


def test_products_of_two_activations_stay_in_float(calibration):
    file = attention_file()
    layers = layers_of(file)
    assert "patches/Conv" in layers and "head/Gemm" in layers
    products = [node for node in graph_of(file).node if node.op_type == "MatMul"]
    free = {node.name for node in products} - set(layers)
    assert free  # the attention's own
    graph = graph_of(quantize(file, [calibration], scheme="tensorrt", method="minmax"))
    made = {tensor for n in graph.node if n.op_type == "DequantizeLinear" for tensor in n.output}
    for node in graph.node:
        if node.op_type in ("MatMul", "Conv", "Gemm"):
            assert (node.input[1] in made) == (node.name in layers)


def test_calibration_on_noise_loses_the_accuracy(calibration, validation):
    file = classifier_file()
    noise = np.random.default_rng(0).normal(0, 0.3, calibration.shape).astype(np.float32)
    model = quantize(file, [noise], scheme="tensorrt", method="minmax")
    assert accuracy(model, validation) < accuracy(file, validation) - 0.05


@needs_judge
def test_tensorrt_accepts_its_scheme(calibration):
    model = quantize(attention_file(), [calibration], scheme="tensorrt", method="minmax")
    assert_exportable(model, ORIN)
    assert judge(model, ORIN).verdict == "accepted"


@needs_judge
def test_tensorrt_accepts_a_mixture_of_int8_and_float(calibration):
    model = quantize(
        classifier_file(),
        [calibration],
        scheme="tensorrt",
        method="minmax",
        exclude=["block.conv1/Conv"],
    )
    assert judge(model, ORIN, max_batch=16).verdict == "accepted"


@needs_judge
def test_tensorrt_refuses_what_onnx_runtime_writes_by_default(calibration, tmp_path):
    class Reader(CalibrationDataReader):
        def __init__(self):
            self.batches = iter([{"images": calibration}])

        def get_next(self):
            return next(self.batches, None)

    source, destination = tmp_path / "fp32.onnx", tmp_path / "int8.onnx"
    source.write_bytes(classifier_file())
    quantize_static(source, destination, Reader())
    with pytest.raises(CheckFailedError, match="refuses"):
        judge(destination.read_bytes(), ORIN, max_batch=16)
    for scheme in ("u8s8", "s8s8"):
        other = quantize(classifier_file(), [calibration], scheme=scheme, method="minmax")
        with pytest.raises(CheckFailedError, match="refuses"):
            judge(other, ORIN, max_batch=16)


def test_every_target_with_int8_has_its_scheme_in_the_table():
    assert {row.scheme for row in TARGETS.values() if "int8" in row.precisions} == set(SCHEMES)


def test_only_a_scheme_for_a_cpu_observes_what_a_convolution_gives():
    file = classifier_file()
    for_gpu, for_cpu = (observed_tensors(file, scheme) for scheme in ("tensorrt", "u8s8"))
    assert set(for_gpu) < set(for_cpu)


@pytest.mark.parametrize(
    ("machine", "cpuinfo", "found"),
    [
        ("x86_64", "flags : fpu avx2 avx512_vnni", "AVX512-VNNI: sums of 32 bits"),
        ("x86_64", "flags : avx2 avx_vnni", "AVX-VNNI: sums of 32 bits"),
        ("x86_64", "flags : avx avx2", "without VNNI: sums of 16 bits, which 8-bit"),
        ("aarch64", "Features : asimd asimddp i8mm", "I8MM and SDOT: sums of 32 bits"),
        ("aarch64", "Features : asimd", "without SDOT"),
        ("arm64", "", "unknown"),
    ],
)
def test_it_is_said_how_a_cpu_adds_8_bit_products(machine, cpuinfo, found):
    assert found in describe_int8(machine, cpuinfo)


def test_for_tensorrt_what_is_in_float_reads_what_was_not_rounded_for_a_neighbour(calibration):
    """A residual sum, and a layer left in float that shares its input with one in int8."""
    graph = onnx.load_model_from_string(
        quantize(classifier_file(), [calibration], scheme="tensorrt", method="minmax")
    ).graph
    made = {name: node for node in graph.node for name in node.output}
    sums = [node for node in graph.node if node.op_type == "Add"]
    assert sums
    for node in sums:
        readers = {made[name].op_type for name in node.input if name in made}
        assert "DequantizeLinear" not in readers
    layers = [node for node in graph.node if node.op_type == "Conv"]
    assert all(made[node.input[0]].op_type == "DequantizeLinear" for node in layers)

    class Fork(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)

        def forward(self, x):
            return (self.a(x) * self.b(x)).mean((2, 3))

    file = exported(randomized(Fork()))
    left = quantize(file, [calibration], scheme="tensorrt", method="minmax", exclude=["b/Conv"])
    nodes = {node.name: node for node in onnx.load_model_from_string(left).graph.node}
    assert nodes["b/Conv"].input[0] == "images" and nodes["a/Conv"].input[0] != "images"
