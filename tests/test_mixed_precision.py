import functools
import importlib.util
import json
import math

import numpy as np
import onnx
import pytest
import torch
from export_models import AttentionBlock, noise, randomized, small_cnn
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import export.precision.fp16_trials
from deploy.errors import BadInputError, CheckFailedError
from export.onnx_file.conformance import judge
from export.onnx_file.gates import assert_exportable
from export.onnx_file.run_onnx import run_batches
from export.onnx_file.tensors import observe
from export.onnx_file.to_onnx import to_onnx
from export.passes.simplify import simplify
from export.precision.emulate_fp16 import locate_nonfinite
from export.precision.fp16_trials import Trials, fewest
from export.precision.half import convertible, write_fp16
from export.precision.mixed_precision import to_fp16
from export.targets import TARGETS

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


@functools.cache
def usual(kind, name) -> bytes:
    return exported(randomized(kind()), TARGETS[name])


def scaled(model: bytes, **factors: float) -> bytes:
    """Return a model with some weights, by the names of their modules, times a factor."""
    proto = onnx.load_model_from_string(model)
    for module, factor in factors.items():
        (tensor,) = (t for t in proto.graph.initializer if t.name == f"{module}.weight")
        tensor.CopyFrom(
            numpy_helper.from_array(factor * numpy_helper.to_array(tensor), tensor.name)
        )
    return proto.SerializeToString()


def graph(*nodes, size=8, **stored) -> bytes:
    """Return a graph from (1, size) images to logits; nodes are (operator, inputs, output)."""
    built = helper.make_graph(
        [helper.make_node(op, inputs.split(), [y], f"{y}/{op}") for op, inputs, y in nodes],
        "g",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, [1, size])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(v), name) for name, v in stored.items()],
    )
    opsets = [helper.make_opsetid("", 20)]
    proto = helper.make_model(built, opset_imports=opsets, ir_version=10)
    return onnx.shape_inference.infer_shapes(proto).SerializeToString()


RNG = np.random.default_rng(0)
ROWS = RNG.uniform(1, 2, (6, 8)).astype(np.float32)
W = RNG.normal(0, 1, (8, 8)).astype(np.float32)
ONE = np.float32(1)


def answers(model: bytes) -> np.ndarray:
    return run_batches(model, X.numpy())


@pytest.mark.parametrize(
    ("model", "name"),
    [(small_cnn, "jetpack6.0"), (AttentionBlock, "jetpack6.2")],  # opset 17 and 20
)
def test_a_usual_model_needs_no_island_and_keeps_its_names_types_and_opset(model, name):
    file = usual(model, name)
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
    proto = onnx.load_model_from_string(overflowing)
    (made,) = (node.output[0] for node in proto.graph.node if node.name == "up/Conv")
    peak = max(float(np.abs(seen[made]).max()) for seen in observe(proto, X.numpy(), [made]))
    factor = 30_000 / peak
    mixed = to_fp16(scaled(overflowing, up=factor, down=1 / factor), X.numpy())
    (reason,) = {i.reason for i in mixed.islands if i.node == "up/Conv"}
    assert reason == "overflow: it makes 3e+04"
    fewer = scaled(overflowing, up=factor / 4, down=4 / factor)
    assert to_fp16(fewer, X.numpy()).islands == ()


def test_answers_that_are_not_finite_in_fp32_are_refused_with_the_module(overflowing):
    with pytest.raises(CheckFailedError, match=r"in fp32; found: .* comes from 'head/"):
        to_fp16(scaled(overflowing, head=math.nan), X.numpy())


def test_answers_that_are_all_the_same_are_no_reference():
    with pytest.raises(BadInputError, match="must not be constant"):
        to_fp16(graph(("Sub", "images images", "z"), ("Add", "z one", "logits"), one=ONE), ROWS)


SMALLEST = (
    ("Mul", "images zero", "z"),
    ("Mul", "images scale", "x"),
    ("ReduceL2", "z axes", "norm"),
    ("Max", "norm eps", "norm_eps"),
    ("Div", "z norm_eps", "unit"),
    ("Add", "x unit", "logits"),
)


def test_a_divisor_that_becomes_zero_makes_an_island_of_two_nodes_and_no_more():
    """As in x / max(|x|, 1e-12) of a vector of zeros: fp16 makes 0 / 0 of it."""
    stored = {"zero": 0 * ONE, "scale": W[0], "axes": np.array([1]), "eps": 1e-12 * ONE}
    mixed = to_fp16(graph(*SMALLEST, **stored), ROWS)
    assert [island.node for island in mixed.islands] == ["norm_eps/Max", "unit/Div"]
    for island in mixed.islands:
        assert island.reason.startswith("not finite: 'unit/Div'")
        assert island.error_without == math.inf and island.error_with < 2e-3
    assert np.isfinite(mixed.scaled_error)
    larger = to_fp16(graph(*SMALLEST, **stored | {"eps": 1e-4 * ONE}), ROWS)
    assert larger.islands == ()  # the control


def test_what_only_the_last_image_shows_is_seen_too():
    stored = {"scale": W[0], "axes": np.array([1]), "eps": 1e-12 * ONE}
    file = graph(("Relu", "images", "z"), *SMALLEST[1:], **stored)
    assert to_fp16(file, ROWS).islands == ()
    rows = np.concatenate([ROWS[:-1], 0 * ROWS[-1:]])
    mixed = to_fp16(file, rows)
    assert [island.node for island in mixed.islands] == ["norm_eps/Max", "unit/Div"]


def ratio(steps: int) -> bytes:
    """Return a graph that divides two tiny numbers, the divisor some steps after it was made."""
    chain = [("Neg", f"n{i}", f"n{i + 1}") for i in range(steps)]
    divided = (
        ("Mul", "images tiny", "n0"),
        ("MatMul", "n0 w", "a"),
        ("Div", f"a n{steps}", "logits"),
    )
    return graph(*divided[:2], *chain, divided[2], tiny=1e-9 * ONE, w=W)


def test_an_island_reaches_upstream_to_where_numbers_were_lost_but_not_without_end():
    near = to_fp16(ratio(2), ROWS)
    assert {island.node for island in near.islands} >= {"n0/Mul", "n1/Neg", "logits/Div"}
    with pytest.raises(CheckFailedError, match=r"in fp16; found: .* comes from 'logits/Div'"):
        to_fp16(ratio(12), ROWS)


def test_a_softmax_written_out_whose_sum_overflows_stays_fp32_where_it_sums():
    nodes = ("Exp", "images", "e"), ("ReduceSum", "e axes", "sum"), ("Div", "e sum", "logits")
    stored = {"size": 512, "axes": np.array([1])}
    rows = RNG.uniform(3, 5, (4, 512)).astype(np.float32)
    mixed = to_fp16(graph(*nodes, **stored), rows)
    reasons = {island.node: island.reason for island in mixed.islands}
    assert reasons["sum/ReduceSum"].startswith("overflow: it sums to 3")
    assert "e/Exp" not in reasons
    assert to_fp16(graph(*nodes, **stored), rows - 4).islands == ()


def test_a_normalisation_whose_sum_of_squares_overflows_stays_fp32():
    nodes = (
        ("MatMul", "images w", "h"),
        ("LayerNormalization", "h gain bias", "norm"),
        ("MatMul", "norm w", "logits"),
    )
    stored = {"w": W, "gain": W[0], "bias": W[1]}
    mixed = to_fp16(graph(*nodes, **stored), 100 * ROWS)
    (island,) = mixed.islands
    assert island.operator == "LayerNormalization" and island.module == "norm"
    assert "sums to" in island.reason
    assert to_fp16(graph(*nodes, **stored), ROWS).islands == ()


def test_precision_is_bought_where_it_helps_and_no_more_than_needed():
    """A difference of nearly equal numbers loses in fp16 what the factor after it brings out."""
    file = graph(
        ("MatMul", "images w", "h"),
        ("Tanh", "h", "y"),
        ("Sub", "y step", "y_less"),
        ("Sigmoid", "y", "a"),
        ("Sigmoid", "y_less", "b"),
        ("Sub", "a b", "difference"),
        ("Mul", "difference factor", "enlarged"),
        ("MatMul", "enlarged w", "logits"),
        w=W,
        step=np.float32(0.01),
        factor=np.float32(400),
    )
    mixed = to_fp16(file, ROWS)
    reasons = {island.operator: island.reason for island in mixed.islands}
    assert reasons and all(reason.startswith("precision: ") for reason in reasons.values())
    assert {"MatMul", "Tanh", "Mul"}.isdisjoint(reasons)
    assert all(island.error_without > island.error_with for island in mixed.islands)
    assert to_fp16(file, ROWS, limit=1.0).islands == ()


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
    files = {
        "cnn": lambda: usual(small_cnn, "jetpack6.0"),
        "attention": lambda: usual(AttentionBlock, "jetpack6.2"),
        "islands": lambda: overflowing,
    }
    mixed = to_fp16(files[kind](), X.numpy())
    assert judge(mixed.model, ORIN).verdict == "accepted"


def test_the_fewest_names_are_found_with_few_trials():
    names, tried = [str(i) for i in range(64)], []

    def is_enough(some):
        tried.append(some)
        return {"7", "40"} <= some

    assert fewest(names, is_enough) == {"7", "40"}
    assert len(tried) < 40


def test_the_trials_are_bounded_when_a_large_model_misses_its_limit(monkeypatch):
    """Each of 40 layers adds its rounding: leaving one of them out never is enough."""
    layers = [("MatMul", f"x{i} w", f"x{i + 1}") for i in range(40)]
    layers[0], layers[-1] = ("MatMul", "images w", "x1"), ("MatMul", "x39 w", "logits")
    orthogonal = np.linalg.qr(W)[0]
    written = []
    write = Trials.write
    monkeypatch.setattr(
        Trials, "write", lambda self, names: written.append(1) or write(self, names)
    )
    file = graph(*layers, w=orthogonal)
    mixed = to_fp16(file, ROWS, limit=0.0)
    assert mixed.islands and len(written) < 2 * export.precision.fp16_trials._MOST
    written.clear()
    monkeypatch.setattr(export.precision.fp16_trials, "_MOST", 1000)
    assert to_fp16(file, ROWS, limit=0.0).scaled_error <= mixed.scaled_error
    assert len(written) > 40  # the control: how many it would be


@pytest.mark.parametrize(("on_all", "kept"), [(0.1, 0), (0.01, 1)])
def test_what_helps_the_worst_images_by_chance_is_not_kept(on_all, kept, monkeypatch):
    def error(self, single, images=None):
        return 0.1 if not single else on_all if images is None else 0.01

    monkeypatch.setattr(Trials, "error", error)
    monkeypatch.setattr(Trials, "worst_images", lambda self, single: [0, 1])
    file = graph(("MatMul", "images w", "h"), ("Relu", "h", "logits"), w=W)
    assert len(to_fp16(file, ROWS).islands) == kept


def test_the_worst_images_are_those_with_the_largest_errors_or_none_that_is_finite():
    file = graph(("Mul", "images wide", "h"), ("Add", "h h", "logits"), wide=W[0])
    rows = ROWS * np.array([[1], [100], [1], [1], [1e6], [10]], np.float32)
    trials = Trials(file, rows)
    assert trials.worst_images(frozenset())[:3] == [4, 1, 5]
    assert trials.error(frozenset()) == math.inf
    assert trials.error(frozenset(), [0, 1]) < 1e-6  # of the range of all
