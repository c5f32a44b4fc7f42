import dataclasses
import importlib.util

import numpy as np
import onnx
import pytest
import torch
from export_models import AttentionBlock, noise, randomized, small_cnn

from deploy.runtime.preprocess import Preprocessing, normalize, preprocess
from export.onnx_file.conformance import judge
from export.onnx_file.gates import assert_exportable
from export.onnx_file.run_onnx import run_batches
from export.onnx_file.to_onnx import to_onnx
from export.passes.pixels import read_pixels
from export.passes.simplify import simplify
from export.precision.mixed_precision import to_fp16
from export.targets import TARGETS

ORIN = TARGETS["jetpack6.2"]
SPEC = Preprocessing(16, 16, "stretch", 1.0, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
PIXELS = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)


@pytest.fixture(scope="module", params=[(small_cnn, 1), (AttentionBlock, 4)])
def files(request):
    build, max_batch = request.param
    model, x = randomized(build()), noise(2, 3, 16, 16)
    floats = to_onnx(simplify(model, (x,)).model, (x,), target=ORIN, max_batch=max_batch)
    return model, floats, read_pixels(floats, SPEC), max_batch


def test_pixels_get_the_answers_that_normalised_floats_get(files):
    model, floats, pixels, _ = files
    x = normalize(PIXELS, SPEC)
    expected = run_batches(floats, x)
    np.testing.assert_allclose(run_batches(pixels, PIXELS), expected, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        np.testing.assert_allclose(
            expected, model(torch.from_numpy(x)).numpy(), rtol=1e-3, atol=1e-4
        )
    wrong = read_pixels(floats, dataclasses.replace(SPEC, mean=(0.3, 0.4, 0.5)))
    assert np.abs(run_batches(wrong, PIXELS) - expected).max() > 1e-3  # the control


def test_the_file_is_exportable_and_its_input_is_uint8(files):
    _, floats, pixels, max_batch = files
    assert_exportable(pixels, ORIN, max_batch=max_batch)
    (taken,) = onnx.load_model_from_string(pixels).graph.input
    assert taken.name == "images" and taken.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    sizes = [d.dim_param or d.dim_value for d in taken.type.tensor_type.shape.dim]
    assert sizes == [1 if max_batch == 1 else "batch", 16, 16, 3]
    assert read_pixels(floats, SPEC) == pixels


def test_the_layout_decides_what_pre_processing_gives():
    images = [*PIXELS[:2]]
    same = preprocess(images, dataclasses.replace(SPEC, layout="nhwc-uint8"))
    np.testing.assert_array_equal(same, PIXELS[:2])
    np.testing.assert_array_equal(preprocess(images, SPEC), normalize(PIXELS[:2], SPEC))


@pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="needs the extra 'conformance'"
)
def test_nvidias_parser_accepts_pixels_in_fp32_and_in_fp16(files):
    _, _, pixels, max_batch = files
    mixed = to_fp16(pixels, PIXELS)
    assert mixed.scaled_error < 5e-3
    for file in (pixels, mixed.model):
        assert judge(file, ORIN, max_batch=max_batch).verdict == "accepted"
