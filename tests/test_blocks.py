import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from int8_models import emoji
from ort_kernels import kernels
from torch import nn

from export.onnx_file.blocks import keep_blocks
from export.onnx_file.run_onnx import open_session, run_batches
from export.onnx_file.to_onnx import to_onnx
from export.precision.quantize import quantize
from export.precision.variants import make_variant
from export.targets import TARGETS

IMAGES = emoji("train", 4)[0]
ACTIVATIONS = {
    "ReLU": nn.ReLU(),
    "ReLU6": nn.ReLU6(),
    "LeakyReLU": nn.LeakyReLU(),
    "SiLU": nn.SiLU(),
    "Hardswish": nn.Hardswish(),
    "GELU": nn.GELU(),
    "GELU by tanh": nn.GELU("tanh"),
    "Tanh": nn.Tanh(),
    "Sigmoid": nn.Sigmoid(),
    "Hardsigmoid": nn.Hardsigmoid(),
    "MaxPool": nn.MaxPool2d(3, 1, 1),
    "nothing": nn.Identity(),
}


class Excited(nn.Module):
    """Convolutions with a squeeze-and-excitation between them, of 13 x 13 at 32 pixels."""

    def __init__(self, act=None, *, gate=None, channels=32, squeezed=16, groups=None, by=None):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, channels, 3, stride=2)
        self.depthwise = nn.Conv2d(channels, channels, 3, groups=groups or channels)
        self.act = act or nn.ReLU()
        self.squeeze = by or (lambda x: x.mean((2, 3), keepdim=True))
        self.fc1 = nn.Conv2d(channels, squeezed, 1)
        self.fc2 = nn.Conv2d(squeezed, channels, 1)
        self.gate = gate or nn.Sigmoid()
        self.last = nn.Conv2d(channels, 8, 1)

    def excited(self, x):
        x = self.act(self.depthwise(self.stem(x)))
        return x * self.gate(self.fc2(self.fc1(self.squeeze(x)).relu()))

    def forward(self, x):
        return self.last(self.excited(x)).flatten(1)


class ReadTwice(Excited):
    def forward(self, x):
        x = self.excited(x)
        return self.last(x).flatten(1), x.exp()


class GivenOut(Excited):
    def forward(self, x):
        x = self.excited(x)
        return self.last(x).flatten(1), x


def file_of(module, *, max_batch=1):
    x = torch.from_numpy(IMAGES[:2])
    options = {"output_names": ("a", "b")} if isinstance(module, ReadTwice | GivenOut) else {}
    target = TARGETS["onnxruntime-x86"]
    return to_onnx(module.eval(), (x,), target=target, max_batch=max_batch, **options)


def count(model, operator):
    return sum(node.op_type == operator for node in onnx.load_model_from_string(model).graph.node)


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_a_squeeze_and_excitation_stays_in_blocks(act, tmp_path):
    file = file_of(Excited(ACTIVATIONS[act]))
    before = kernels(file, tmp_path / "before.onnx")
    assert (before["ReduceMean"], before["ReorderInput"], before["ReorderOutput"]) == (1, 2, 3)
    model = keep_blocks(file)
    found = kernels(model, tmp_path / "after.onnx")
    assert (found["ReorderInput"], found["ReorderOutput"]) == (0, 1)  # the network's output
    assert (found["Upsample"], found["GlobalAveragePool"], found["ReduceMean"]) == (1, 1, 0)
    answers = [run_batches(each, IMAGES[:1]) for each in (model, file)]
    np.testing.assert_allclose(*answers, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gate", [nn.Hardsigmoid(), nn.Tanh(), nn.ReLU6()])
def test_other_gates_do_too(gate, tmp_path):
    model = keep_blocks(file_of(Excited(gate=gate)))
    assert kernels(model, tmp_path / "a.onnx")["ReorderInput"] == 0


def test_a_free_batch_needs_the_shape_that_is_written_down(tmp_path):
    file = file_of(Excited(nn.SiLU()), max_batch=8)
    model = keep_blocks(file)
    found = kernels(model, tmp_path / "a.onnx")
    assert (found["ReorderInput"], found["ReorderOutput"]) == (0, 1)
    np.testing.assert_allclose(
        run_batches(model, IMAGES), run_batches(file, IMAGES), rtol=1e-4, atol=1e-5
    )
    proto = onnx.load_model_from_string(model)
    proto.graph.ClearField("value_info")
    found = kernels(proto.SerializeToString(), tmp_path / "b.onnx")
    assert (found["ReorderInput"], found["ReorderOutput"]) == (1, 3)


@settings(max_examples=10, deadline=None)
@given(
    channels=st.sampled_from([1, 5, 16, 24, 48]),
    squeezed=st.sampled_from([1, 6, 16]),
    act=st.sampled_from([*ACTIVATIONS]),
    max_batch=st.sampled_from([1, 4]),
)
def test_the_product_is_the_same_bit_for_bit(channels, squeezed, act, max_batch):
    """As the operators are defined: optimised, other kernels may add in other orders."""
    net = Excited(ACTIVATIONS[act], channels=channels, squeezed=squeezed, by=nn.MaxPool2d(13))
    file = file_of(net, max_batch=max_batch)
    model = keep_blocks(file)
    assert (count(file, "Resize"), count(model, "Resize")) == (0, 1)
    feeds = {"images": IMAGES[:max_batch]}
    (ours,), (plain,) = (open_session(f, optimise=False).run(None, feeds) for f in (model, file))
    np.testing.assert_array_equal(ours, plain)


@pytest.mark.parametrize(
    "net",
    [Excited(nn.ELU()), Excited(nn.Mish()), Excited(groups=4)],
    ids=["ELU", "Mish", "a grouped convolution"],
)
def test_behind_what_has_no_blocks_nothing_is_changed(net):
    file = file_of(net)
    assert keep_blocks(file) == file


@pytest.mark.parametrize("kind", [ReadTwice, GivenOut])
def test_a_product_that_others_read_too_keeps_its_form(kind):
    file = file_of(kind())
    model = keep_blocks(file)
    assert count(model, "Resize") == 0
    assert (count(file, "ReduceMean"), count(model, "GlobalAveragePool")) == (1, 1)


@pytest.mark.parametrize(("layer", "resized"), [("stem", 1), ("fc1", 1), ("fc2", 0), ("last", 0)])
def test_what_is_computed_in_integers_has_no_blocks(layer, resized):
    """The product reads what fc2 gives, and is read by last."""
    file = file_of(Excited(), max_batch=4)
    others = {f"{name}/Conv" for name in ("stem", "depthwise", "fc1", "fc2", "last")}
    others -= {f"{layer}/Conv"}
    model = quantize(file, [IMAGES], scheme="u8s8", method="minmax", exclude=others)
    assert count(keep_blocks(model), "Resize") == resized


@pytest.mark.parametrize(
    ("target", "resized"), [("onnxruntime-x86", 1), ("onnxruntime-arm", 0), ("jetpack6.2", 0)]
)
def test_only_x86_is_given_that_form(target, resized):
    file = file_of(Excited())
    made = make_variant(
        "fp32",
        file,
        target=TARGETS[target],
        golden=IMAGES,
        calibration=(),
        preprocess=lambda encoded, first: IMAGES,
        is_good=lambda file: True,
        on_stage=print,
    )
    assert count(made.file, "Resize") == resized
    assert resized or made.file == file
