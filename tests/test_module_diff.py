import json
import math

import numpy as np
import onnx
import pytest
import torch
import torchvision
from export_models import AttentionBlock, noise, randomized, small_cnn
from int8_models import emoji
from onnx import numpy_helper
from torch import nn

from export.judge.module_diff import compare_modules
from export.onnx_file.to_onnx import to_onnx
from export.passes.simplify import simplify
from export.precision.mixed_precision import to_fp16
from export.precision.quantize import quantize
from export.targets import TARGETS

X = noise(2, 3, 16, 16, seed=3)


def exported(model: nn.Module, x=X):
    simple = simplify(model, (x,)).model
    return simple, to_onnx(simple, (x,), target=TARGETS["jetpack6.2"])


def diff(model, file=None, *, limit=1e-3, x=X, parts=None):
    simple, fp32 = parts or exported(model, x)
    return compare_modules(model, simple, fp32, file or fp32, inputs=x, limit=limit)


def planted(file: bytes, initializer: str, change) -> bytes:
    """Change a stored tensor that belongs to a module."""
    proto = onnx.load_model_from_string(file)
    found = [node for node in proto.graph.node if node.name.startswith(initializer)]
    (name,) = {n for node in found for n in node.input} & {
        t.name for t in proto.graph.initializer if len(t.dims) > 1
    }
    (tensor,) = (t for t in proto.graph.initializer if t.name == name)
    values = numpy_helper.to_array(tensor).copy()
    tensor.CopyFrom(numpy_helper.from_array(change(values), name))
    return proto.SerializeToString()


def one_off(values):
    values[0] += 1.0
    return values


def infinite(values):
    values.flat[0] = np.inf
    return values


@pytest.fixture(scope="module")
def resnet():
    torch.manual_seed(0)
    model = randomized(torchvision.models.resnet18(num_classes=7))
    x = noise(2, 3, 64, 64, seed=3)
    return model, x, exported(model, x)


@pytest.mark.parametrize("build", [small_cnn, AttentionBlock])
def test_a_sound_file_does_not_part_and_every_error_is_that_of_float32(build):
    found = diff(randomized(build()))
    assert found.parting is None and found.output_error < 1e-5
    errors = [row.error for row in found.rows if row.error is not None]
    assert errors and max(errors) < 1e-5
    assert "they do not part" in found.to_text()


def test_a_convolution_before_its_batchnorm_is_not_in_the_file_and_not_lost(resnet):
    model, x, parts = resnet
    found = diff(model, x=x, parts=parts)
    rows = {row.module: row for row in found.rows}
    assert rows["conv1"].tensor is None and not rows["conv1"].is_lost
    assert rows["bn1"].error < 1e-5 and rows["layer4.1"].error < 1e-4
    assert not any(row.is_lost for row in found.rows)
    assert rows["relu"].module == "relu" and "layer1.0.relu#2" in rows


@pytest.mark.parametrize("conv", ["conv1", "layer2.0.downsample.0", "layer3.1.conv2", "fc"])
@pytest.mark.parametrize("change", [one_off, infinite])
def test_a_planted_weight_is_found_at_its_module_in_the_fp32_file_itself(conv, change, resnet):
    model, x, (simple, fp32) = resnet
    wrong = planted(fp32, f"{conv}/", change)
    found = compare_modules(model, simple, wrong, wrong, inputs=x, limit=1e-3)
    batchnorm = {
        "conv1": "bn1",
        "layer2.0.downsample.0": "layer2.0.downsample.1",
        "layer3.1.conv2": "layer3.1.bn2",
    }
    assert found.parting.module == batchnorm.get(conv, conv)
    assert (
        found.to_text().splitlines()[-1].startswith(f"they part at {batchnorm.get(conv, conv)} (")
    )


@pytest.mark.parametrize("conv", ["layer1.0.conv1", "layer4.0.conv2"])
def test_beside_a_sound_file_the_error_at_the_module_is_told(conv, resnet):
    model, x, (simple, fp32) = resnet
    wrong = planted(fp32, f"{conv}/", one_off)
    found = compare_modules(model, simple, fp32, wrong, inputs=x, limit=1e-3)
    assert found.parting.module == conv.replace("conv", "bn")
    assert found.parting.error > 1e-3
    document = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert document["parting"] == found.parting.module


def test_what_is_not_finite_is_found_by_name(resnet):
    model, x, (simple, fp32) = resnet
    wrong = planted(fp32, "layer3.0.conv1/", infinite)
    found = compare_modules(model, simple, fp32, wrong, inputs=x, limit=1e-3)
    assert found.parting.module == "layer3.0.bn1" and found.parting.error == math.inf
    assert "not finite" in found.to_text().splitlines()[-1]
    assert found.to_json()["output_error"] is None


def test_an_fp16_file_is_compared_tensor_by_tensor_and_an_overflow_is_named(resnet):
    model, x, (simple, fp32) = resnet
    half = to_fp16(fp32, x.numpy()).model
    found = compare_modules(model, simple, fp32, half, inputs=x, limit=0.02)
    compared = [row for row in found.rows if row.error is not None]
    assert found.parting is None and len(compared) > 40
    assert 1e-4 < max(row.error for row in compared) < 0.02
    strict = compare_modules(model, simple, fp32, half, inputs=x, limit=1e-6)
    assert strict.parting.module == "bn1"  # the control: the first that rounds


@pytest.mark.parametrize("scheme", ["tensorrt", "u8s8"])
def test_an_int8_file_is_compared_tensor_by_tensor(scheme, resnet):
    """That for a CPU drops ReLUs and gives their names to the tensors before them."""
    model, x, (simple, fp32) = resnet
    file = quantize(fp32, [x.numpy()], scheme=scheme, method="minmax")
    found = compare_modules(model, simple, fp32, file, inputs=x, limit=0.5)
    errors = [row.error for row in found.rows if row.error is not None]
    assert found.parting is None and len(errors) > 30 and 1e-3 < max(errors) < 0.5


def test_a_module_that_is_called_twice_has_two_rows():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 3, 3, padding=1), nn.Linear(3, 4)

        def forward(self, x):
            return self.head(self.conv(torch.tanh(self.conv(x))).mean((2, 3)))

    found = diff(randomized(Twice()))
    assert [row.module for row in found.rows] == ["conv", "conv#2", "head"]
    assert len({row.tensor for row in found.rows}) == 3


def test_an_emoji_classifier_of_real_images_does_not_part():
    x = torch.from_numpy(emoji("test", 2)[0])
    model = randomized(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten())
    )
    assert diff(model, x=x).parting is None


def test_a_model_that_keeps_its_batch_in_the_second_place_is_found_as_well():
    class SequenceFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.head = (
                nn.Linear(48, 8),
                nn.Linear(8, 8),
                nn.Linear(8, 4),
            )

        def forward(self, x):
            tokens = x.flatten(2).unflatten(2, (16, 16)).permute(3, 0, 1, 2).flatten(2)
            return self.head(torch.tanh(self.second(torch.tanh(self.first(tokens)))).mean(0))

    found = diff(randomized(SequenceFirst()))
    rows = {row.module: row for row in found.rows}
    assert all(row.tensor is not None and not row.is_lost for row in rows.values())
    assert set(rows) == {"first", "second", "head"} and found.parting is None
