import platform

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from int8_models import emoji
from onnx import numpy_helper
from ort_kernels import kernels
from torch import nn

from export.onnx_file.blocks import OLDEST_RUNTIME, keep_blocks
from export.onnx_file.run_onnx import open_session, run_batches
from export.onnx_file.to_onnx import to_onnx
from export.precision.quantize import quantize
from export.precision.variants import make_variant
from export.targets import TARGETS

RELEASE = tuple(int(number) for number in onnxruntime.__version__.split(".")[:2])
pytestmark = pytest.mark.skipif(
    RELEASE < OLDEST_RUNTIME or platform.machine() not in ("x86_64", "AMD64"),
    reason="ONNX Runtime has blocks for a Resize from 1.25 on, and these on x86",
)
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
    assert (found["Upsample"], found["Resize"]) == (1, 0)
    assert (found["GlobalAveragePool"], found["ReduceMean"]) == (1, 0)
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


@settings(max_examples=10, deadline=None, derandomize=True, database=None)
@given(
    channels=st.sampled_from([16, 20, 24, 48]),
    squeezed=st.sampled_from([1, 6, 12]),
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
    [
        Excited(nn.ELU()),
        Excited(nn.Mish()),
        Excited(groups=4),
        Excited(channels=18, groups=1),
        Excited(channels=18, squeezed=8),
    ],
    ids=["ELU", "Mish", "groups", "18 channels", "18 groups"],
)
def test_behind_what_has_no_blocks_nothing_is_changed(net):
    file = file_of(net)
    assert keep_blocks(file) == file


@pytest.mark.parametrize("net", [Excited(squeezed=18), Excited(channels=8)], ids=["gate", "reader"])
def test_a_gate_or_a_reader_without_blocks_leaves_the_product_as_it_is(net, tmp_path):
    """With AVX-512: a convolution of 18 channels has none, one of 8 reads them without."""
    file = file_of(net)
    model = keep_blocks(file)
    assert count(model, "Resize") == 0
    before, after = (kernels(each, tmp_path / "a.onnx") for each in (file, model))
    assert after["ReorderInput"] + after["ReorderOutput"] <= sum(
        before[kind] for kind in ("ReorderInput", "ReorderOutput")
    )


GRAPH = """
<ir_version: 10, opset_import: ["" : 20]>
g (float[1,16,6,5] images) => (float[1,16,6,5] y)
<int64[2] axes = {2, 3}, float low = {-0.5}, float high = {0.5}>
{
    x = Conv (images, w)
    mean = ReduceMean (x, axes)
    fc = Conv (mean, w)
    gate = Sigmoid (fc)
    product = Mul (x, gate)
    y = Conv (product, w)
}
"""
Y0 = " y0 = Sigmoid (x)"
X, ANY = "x = Conv (images, w)", "float[N,16,6,5]"
REWRITTEN = {
    "as it is": {},
    "axes from the end": {"{2, 3}": "{-1, -2}"},
    "the gate first": {"(x, gate)": "(gate, x)"},
    "a free batch": {"float[1,16,6,5]": ANY},
    "an equal sum": {X: "c = Conv (images, w) d = Conv (c, w) x = Add (c, d)"},
    "a clip in a convolution": {X: "c = Conv (images, w) x = Clip (c, low, high)"},
    "an average pool": {X: "c = Conv (images, w) x = AveragePool <kernel_shape = [1, 1]> (c)"},
}
LEFT = {
    "a free height": {"float[1,16,6,5]": "float[1,16,H,5]"},
    "an image of one pixel": {"float[1,16,6,5]": "float[1,16,1,1]"},
    "one gate for the batch": {"float[1,16,6,5]": ANY, "(mean, w)": "(one, w)"},
    "an unequal sum": {X: "c = Conv (images, w) d = GlobalAveragePool (c) x = Add (c, d)"},
    "a clip behind a sum": {X: "c = Conv (images, w) d = Add (c, c) x = Clip (d, low, high)"},
    "a leaky ReLU of what is read twice": {
        X: "c = Conv (images, w) d = LeakyRelu (c) x = Add (c, d)",
    },
    "a pool with places": {
        X: "c = Conv (images, w) x, places = MaxPool <kernel_shape = [1, 1]> (c)"
    },
    "a product that nobody reads": {"Conv (product, w)": "Conv (x, w)"},
    "weights that are computed": {"Conv (product, w)": "Conv (product, v)", X: X + " v = Abs (w)"},
}


def graph_of(changes):
    """Return a squeeze-and-excitation of 16 channels in which some text is replaced."""
    text = GRAPH
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    proto = onnx.parser.parse_model(text)
    for node in proto.graph.node:
        node.name = f"module/{node.output[0]}"
    rng = np.random.default_rng(0)
    for name, shape in {"w": (16, 16, 1, 1), "one": (1, 16, 1, 1)}.items():
        array = rng.standard_normal(shape).astype(np.float32)
        proto.graph.initializer.append(numpy_helper.from_array(array, name))
    return proto.SerializeToString(deterministic=True)


@pytest.mark.parametrize("changes", REWRITTEN.values(), ids=[*REWRITTEN])
def test_a_product_of_channels_in_blocks_is_rewritten(changes, tmp_path):
    file = graph_of(changes)
    model = keep_blocks(file)
    onnx.checker.check_model(model, full_check=True)
    assert keep_blocks(model) == model
    assert (count(model, "Resize"), count(model, "GlobalAveragePool")) == (1, 1)
    found = kernels(model, tmp_path / "a.onnx")
    assert (found["Upsample"], found["ReorderInput"], found["ReorderOutput"]) == (1, 1, 1)
    images = np.random.default_rng(1).standard_normal((1, 16, 6, 5)).astype(np.float32)
    runs = [open_session(f).run(None, {"images": images})[0] for f in (model, file)]
    np.testing.assert_allclose(*runs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("changes", LEFT.values(), ids=[*LEFT])
def test_any_other_product_is_left(changes):
    assert count(keep_blocks(graph_of(changes)), "Resize") == 0


@pytest.mark.parametrize(
    "changes",
    [
        {"{2, 3}": "{1, 2}"},
        {"{2, 3}": "{0, 3}"},
        {"ReduceMean": "ReduceMean <keepdims = 0>"},
        {"(x, axes)": "(images, axes)"},
        {"int64[2] axes = {2, 3}, ": "", "mean =": "axes = Shape (y0) mean =", X: X + Y0},
    ],
    ids=["two axes", "the batch", "of two dimensions", "of what has no blocks", "computed axes"],
)
def test_any_other_mean_is_left(changes):
    model = keep_blocks(graph_of(changes | {"fc = Conv (mean, w)": "fc = Conv (x, w)"}))
    assert (count(model, "ReduceMean"), count(model, "GlobalAveragePool")) == (1, 0)


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


def made(precision, target):
    return make_variant(
        precision,
        file_of(Excited(), max_batch=4),
        target=target,
        golden=IMAGES,
        calibration=(b"1", b"2"),
        preprocess=lambda encoded, first: IMAGES,
        is_good=lambda file: True,
        on_stage=print,
    ).file


@pytest.mark.parametrize(
    ("target", "resized"), [("onnxruntime-x86", 1), ("onnxruntime-arm", 0), ("jetpack6.2", 0)]
)
def test_only_x86_is_given_that_form(target, resized):
    file = made("fp32", TARGETS[target])
    assert count(file, "Resize") == resized
    assert resized or file == file_of(Excited(), max_batch=4)


def test_int8_is_given_it_where_its_layers_stay_in_float(monkeypatch):
    others = {f"{name}/Conv": "" for name in ("depthwise", "fc1", "fc2", "last")}
    monkeypatch.setattr("export.precision.variants.layers_in_float", lambda model: others)
    file = made("int8", TARGETS["onnxruntime-x86"])
    assert (count(file, "Resize"), count(file, "QuantizeLinear")) == (1, 2)


def test_an_onnx_runtime_that_would_lose_by_it_gives_it_to_none(monkeypatch):
    monkeypatch.setattr(onnxruntime, "__version__", "1.24.3")
    assert count(made("fp32", TARGETS["onnxruntime-x86"]), "Resize") == 0
