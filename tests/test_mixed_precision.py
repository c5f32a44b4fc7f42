import importlib.util
import json
import math

import numpy as np
import onnx
import pytest
import torch
from export_models import AttentionBlock, noise, randomized, small_cnn
from torch import nn

import export.mixed_precision
from deploy.errors import CheckFailedError
from export.conformance import judge
from export.emulate_fp16 import locate_nonfinite
from export.gates import assert_exportable
from export.half import convertible, write_fp16
from export.mixed_precision import to_fp16
from export.run_onnx import run_batches
from export.simplify import simplify
from export.targets import TARGETS
from export.to_onnx import to_onnx

ORIN = TARGETS["jetpack6.2"]
X = noise(6, 3, 16, 16, seed=3)


def exported(model: nn.Module, target=ORIN) -> bytes:
    return to_onnx(simplify(model, (X[:2],)).model, (X[:2],), target=target)


class Detour(nn.Module):
    """Goes through activations of some size, and comes back."""

    def __init__(self, size: float) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU())
        self.up, self.down = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 4)
        nn.init.uniform_(self.up.weight, 0.5, 1.0)
        self.up.weight.data *= size
        self.down.weight.data /= size

    def forward(self, x):
        x = self.down(torch.tanh(self.stem(x)) + torch.relu(self.up(self.stem(x))))
        return self.head(x.mean((2, 3)))


def detour(size: float) -> nn.Module:
    torch.manual_seed(0)
    return Detour(size).eval()


@pytest.fixture(scope="module")
def overflowing():
    return exported(detour(6e4))


def answers(model: bytes) -> np.ndarray:
    return run_batches(model, X.numpy())


@pytest.mark.parametrize("model", [small_cnn, AttentionBlock])
@pytest.mark.parametrize("name", ["jetpack6.0", "jetpack6.2"])
def test_a_usual_model_needs_no_island_and_keeps_its_names_types_and_opset(model, name):
    file = exported(randomized(model()), TARGETS[name])
    mixed = to_fp16(file, X.numpy())
    assert mixed.islands == () and mixed.fp32_nodes == 0
    assert 0 < mixed.scaled_error < 2e-3
    before, after = (onnx.load_model_from_string(each).graph for each in (file, mixed.model))
    assert list(before.input) == list(after.input) and list(before.output) == list(after.output)
    assert_exportable(mixed.model, TARGETS[name])
    casts = [node.name for node in after.node if node.op_type == "Cast"]
    assert casts == ["/Cast.images.fp16", next(n for n in casts if n.endswith("Cast.logits"))]
    assert {n.name for n in before.node} == {n.name for n in after.node} - {*casts}
    assert len(mixed.model) < 0.75 * len(file)


def test_an_overflow_becomes_an_island_that_is_named_and_the_answers_stay_right(overflowing):
    mixed = to_fp16(overflowing, X.numpy())
    assert mixed.scaled_error < 2e-3
    assert {island.node for island in mixed.islands} >= {"up/Conv", "down/Conv"}
    for island in mixed.islands:
        assert island.module in ("up", "down", "") and island.reason.startswith("overflow: it ")
        assert island.error_with < 2e-3
    without = {island.node: island.error_without for island in mixed.islands}
    assert without["up/Conv"] == math.inf
    kept = [node for node in without if node.startswith(("stem", "head"))]
    assert kept == []


def test_without_the_islands_the_same_model_overflows_at_the_module_that_is_named(overflowing):
    """The control: that the emulation sees what the islands prevent, and ONNX Runtime does not."""
    proto = onnx.load_model_from_string(overflowing)
    half = write_fp16(proto, convertible(proto)).SerializeToString()
    assert locate_nonfinite(half, X.numpy()) == "up/Conv"
    assert locate_nonfinite(overflowing, X.numpy()) is None
    assert np.isfinite(answers(half)).all()  # computed in fp32 between the casts


def test_headroom_is_left_for_other_images(overflowing):
    """At 30,000 nothing overflows on these images; a little more contrast, and it would."""
    peak = float(np.abs(Trace(overflowing)["up/Conv"]).max())
    size = 6e4 * 30_000 / peak
    mixed = to_fp16(exported(detour(size)), X.numpy())
    (reason,) = {i.reason for i in mixed.islands if i.node == "up/Conv"}
    assert "it makes 3" in reason and "e+04" in reason
    assert to_fp16(exported(detour(size / 4)), X.numpy()).islands == ()


class Trace(dict):
    """The outputs of an fp32 graph's nodes, by their names, on the test's images."""

    def __init__(self, model: bytes) -> None:
        from export.tensors import observe

        proto = onnx.load_model_from_string(model)
        made = {node.name: node.output[0] for node in proto.graph.node}
        seen = [*observe(proto, X.numpy(), made.values())]
        super().__init__({k: np.concatenate([v[name] for v in seen]) for k, name in made.items()})


def test_what_cannot_be_made_finite_is_refused_with_the_module():
    model = detour(1.0)
    model.head.weight.data[0, 0] = math.nan
    proto = onnx.load_model_from_string(exported(detour(1.0)))
    for tensor in proto.graph.initializer:
        if "head.weight" in tensor.name:
            values = model.head.weight.detach().numpy()
            shape = tuple(tensor.dims)
            values = values if values.shape == shape else values.T
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.ascontiguousarray(values), tensor.name))
    with pytest.raises(CheckFailedError, match="not finite comes from 'head/"):
        to_fp16(proto.SerializeToString(), X.numpy())


class Normalizes(nn.Module):
    """Sums squares that fp16 does not reach: 64 features of 100 and more."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 64, 16), nn.LayerNorm(64)
        self.head = nn.Linear(64, 5)
        self.stem.weight.data *= 100

    def forward(self, x):
        return self.head(torch.relu(self.norm(self.stem(x).flatten(1))))


def test_a_normalisation_whose_sum_of_squares_overflows_stays_fp32():
    torch.manual_seed(0)
    mixed = to_fp16(exported(Normalizes().eval()), X.numpy())
    (island,) = mixed.islands
    assert island.operator == "LayerNormalization" and island.module == "norm"
    assert "sums to" in island.reason


def test_precision_is_bought_where_it_helps_and_no_more_than_needed():
    """A difference of nearly equal numbers loses in fp16 what the factor after it brings out."""

    class Cancels(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Conv2d(3, 8, 16), nn.Linear(8, 4)

        def forward(self, x):
            y = torch.tanh(self.stem(x).flatten(1))
            return self.head(torch.relu((torch.sigmoid(y) - torch.sigmoid(y - 0.01)) * 400))

    torch.manual_seed(0)
    file = exported(Cancels().eval())
    mixed = to_fp16(file, X.numpy())
    reasons = {island.operator: island.reason for island in mixed.islands}
    assert reasons and all(reason.startswith("precision: ") for reason in reasons.values())
    assert {"Conv", "Tanh", "Gemm"}.isdisjoint(reasons)
    assert all(island.error_without > island.error_with for island in mixed.islands)
    assert to_fp16(file, X.numpy(), limit=1.0).islands == ()


def test_the_same_model_gives_the_same_bytes_and_a_report_of_json(overflowing):
    first, second = (to_fp16(overflowing, X.numpy()) for _ in range(2))
    assert first.model == second.model
    document = json.loads(json.dumps(first.to_json(), allow_nan=False))
    assert document["islands"][0].keys() >= {"node", "reason", "error_with", "error_without"}
    assert "emulated" in document["method"]


@pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="needs the extra 'conformance'"
)
@pytest.mark.parametrize("kind", ["cnn", "attention", "islands"])
def test_nvidias_parser_and_builder_accept_the_types(kind, overflowing):
    models = {"cnn": small_cnn, "attention": AttentionBlock}
    file = overflowing if kind == "islands" else exported(randomized(models[kind]()))
    mixed = to_fp16(file, X.numpy())
    assert judge(mixed.model, ORIN).verdict == "accepted"


def test_the_fewest_names_are_found_with_few_trials():
    names, tried = [str(i) for i in range(64)], []

    def is_enough(some):
        tried.append(some)
        return {"7", "40"} <= some

    assert export.mixed_precision._fewest(names, is_enough) == {"7", "40"}
    assert len(tried) < 40
