"""The device's table of operators against ONNX's own schemas; and what we export, against both."""

import numpy as np
import onnx
import pytest
from export_models import AttentionBlock, noise, randomized, small_cnn
from onnx import defs

from deploy.bundle.allow_list import BOUNDS, ELEMENT_BYTES, OPERATORS, OPSETS
from deploy.bundle.onnx_structure import structural_problem
from deploy.runtime.preprocess import Preprocessing
from export.onnx_file.schema_checks import schema_problems
from export.onnx_file.to_onnx import to_onnx
from export.operators import TENSORRT_8_6, TENSORRT_10_1
from export.passes.pixels import read_pixels
from export.passes.simplify import simplify
from export.precision.mixed_precision import to_fp16
from export.precision.quantize import quantize
from export.targets import TARGETS

NOT_ALLOWED = """
    BatchNormalization Dropout If Loop NonMaxSuppression NonZero RandomNormal RandomNormalLike
    RandomUniform RandomUniformLike Scan Upsample
"""  # removed by the export; control flow; random; of unknown size; deprecated


def schemas(name):
    """Of an operator in each opset that has it."""
    found = []
    for opset in OPSETS:
        try:
            schema = defs.get_schema(name, opset)
        except defs.SchemaError:
            continue
        if not schema.deprecated:
            found.append(schema)
    return found


def letter(parameter):
    option = defs.OpSchema.FormalParameterOption
    letters = {option.Single: "x", option.Optional: "?", option.Variadic: "*"}
    return letters[parameter.option]


@pytest.mark.parametrize("name", OPERATORS)
def test_an_operators_inputs_are_those_of_its_schemas(name):
    found = ["".join(letter(parameter) for parameter in schema.inputs) for schema in schemas(name)]
    longest = max(found, key=len)
    assert OPERATORS[name] == longest.replace("*", "x*")
    assert all(longest.replace("x", "?").startswith(s.replace("x", "?")) for s in found)


@pytest.mark.parametrize("name", OPERATORS)
def test_an_allowed_operator_computes_tensors_and_holds_no_graph(name):
    for schema in schemas(name):
        for parameter in (*schema.inputs, *schema.outputs):
            assert any(kind.startswith("tensor(") for kind in parameter.types)
        kinds = {attribute.type.name for attribute in schema.attributes.values()}
        assert not kinds & {"GRAPH", "GRAPHS"}


def test_what_tensorrt_reads_is_allowed_but_for_what_is_named():
    assert (TENSORRT_10_1 | TENSORRT_8_6) - OPERATORS.keys() == set(NOT_ALLOWED.split())


def test_every_bound_is_of_an_attribute_that_an_allowed_operator_has():
    known = {name for op in OPERATORS for schema in schemas(op) for name in schema.attributes}
    assert known >= BOUNDS.keys()
    assert {"dilations", "group", "kernel_shape", "pads", "strides", "blocksize"} <= BOUNDS.keys()


def test_the_sizes_of_elements_are_onnxs():
    for number, size in ELEMENT_BYTES.items():
        assert onnx.helper.tensor_dtype_to_np_dtype(number).itemsize == size


def exported(model, target, max_batch):
    x = noise(3, 3, 16, 16)
    simplified = simplify(randomized(model()), (x,)).model
    return to_onnx(simplified, (x,), target=TARGETS[target], max_batch=max_batch)


@pytest.mark.parametrize(
    ("model", "target", "max_batch"),
    [
        (small_cnn, "jetpack6.0", 1),
        (AttentionBlock, "jetpack6.2", 8),
        (small_cnn, "onnxruntime-x86", 8),
    ],
)
def test_what_we_export_passes_in_every_precision(model, target, max_batch):
    fp32, images = exported(model, target, max_batch), noise(3, 3, 16, 16).numpy()
    spec = Preprocessing(
        16, 16, "stretch", 1.0, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), layout="nhwc-uint8"
    )
    singly = [image[np.newaxis] for image in images]
    files = {
        "fp32": fp32,
        "pixels": read_pixels(fp32, spec),
        "int8": quantize(fp32, singly, scheme=TARGETS[target].scheme, method="minmax"),
    }
    if "fp16" in TARGETS[target].precisions:
        files["fp16"] = to_fp16(fp32, images if max_batch > 1 else images[:1]).model
    for precision, file in files.items():
        assert structural_problem(file) is None, precision
        proto = onnx.load_model_from_string(file)
        assert schema_problems(proto, max_batch=max_batch) == [], precision


@pytest.fixture(scope="module")
def cnn():
    return onnx.load_model_from_string(exported(small_cnn, "jetpack6.2", 8))


@pytest.mark.parametrize("opset", OPSETS)
def test_each_opset_from_17_to_23_passes(cnn, opset):
    converted = onnx.version_converter.convert_version(cnn, opset)
    assert converted.opset_import[0].version == opset
    assert structural_problem(converted.SerializeToString()) is None
    assert schema_problems(converted, max_batch=8) == []
