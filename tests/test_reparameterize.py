import copy
import math
from functools import reduce

import pytest
import torch
from export_models import Chain, noise, randomized
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.fx import GraphModule
from torch.nn import functional as F

from deploy.errors import CheckFailedError
from export.passes import reparameterize as module_under_test
from export.passes.fold_batchnorm import fold_batchnorm
from export.passes.reparameterize import reparameterize
from export.passes.simplify import Simplified, simplify
from export.passes.strip_dropout import strip_dropout
from export.traced.dead_code import remove_dead_code
from export.traced.graph import arguments, operator, shape
from export.traced.kernels import parallel

PASSES = (strip_dropout, fold_batchnorm, reparameterize, remove_dead_code)


class Sum(nn.Module):
    """Adds up branches of one input, with a function of their list."""

    def __init__(self, *branches: nn.Module, how=lambda y: reduce(torch.add, y)) -> None:
        super().__init__()
        self.branches, self.how = nn.ModuleList(branches), how

    def forward(self, x):
        return self.how([branch(x) for branch in self.branches])


class Function(nn.Module):
    """Calls a function of its input and of its layers."""

    def __init__(self, function, *layers: nn.Module) -> None:
        super().__init__()
        self.layers, self.function = nn.ModuleList(layers), function

    def forward(self, x):
        return self.function(x, *self.layers)


class Scale(nn.Module):
    def __init__(self, *size: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(size))

    def forward(self, x):
        return x * self.gamma


def conv_bn(channels: int, out: int, kernel, **kwargs) -> nn.Module:
    layer = nn.Conv2d(channels, out, kernel, bias=False, **kwargs)
    return nn.Sequential(layer, nn.BatchNorm2d(out))


def operators(module: GraphModule) -> list[str]:
    called = (node for node in module.graph.nodes if node.op == "call_function")
    return [operator(node).removeprefix("aten.") for node in called]


def merged(model: nn.Module, x: torch.Tensor) -> Simplified:
    """Simplify, with proof; nothing is left to merge, and every site has a name of its own."""
    model = randomized(model)
    result = simplify(model, (x,), passes=PASSES)
    torch.testing.assert_close(result.model(x), model(x), rtol=1e-4, atol=1e-4)
    changed = result.report.passes["reparameterize"].changed
    assert len({change.site for change in changed}) == len(changed)
    assert max([0.0, *result.report.site_errors.values()]) < 1e-12
    assert reparameterize(result.model)[1].changed == ()
    return result


def assert_one_layer(model: nn.Module, x: torch.Tensor) -> Simplified:
    result = merged(model, x)
    (name,) = operators(result.model)
    assert name.startswith("conv") or name == "linear"
    assert result.report.passes["reparameterize"].skipped == {}
    return result


def assert_kept(model: nn.Module, x: torch.Tensor, *, reason: str | None = None) -> None:
    """Insist that nothing is merged, and that the one reason is told, or none."""
    report = merged(model, x).report.passes["reparameterize"]
    assert report.changed == ()
    assert list(report.skipped.values()) == ([reason] if reason else [])


IMAGE = (2, 4, 9, 8)
CONV = nn.Conv2d


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize(
    ("branches", "size"),
    [
        ([conv_bn(4, 4, 3, padding=1), conv_bn(4, 4, 1), nn.BatchNorm2d(4)], IMAGE),
        ([conv_bn(4, 6, 3, padding=1, stride=2), conv_bn(4, 6, 1, stride=2)], IMAGE),
        ([CONV(4, 6, 5, padding=2), CONV(4, 6, 3, padding=1, bias=False)], IMAGE),
        (
            [
                CONV(4, 6, 3, padding=1),
                CONV(4, 6, (1, 3), padding=(0, 1)),
                CONV(4, 6, (3, 1), padding=(1, 0)),
            ],
            IMAGE,
        ),
        (
            [
                CONV(4, 4, 7, padding=3, groups=4),
                CONV(4, 4, 3, padding=3, dilation=3, groups=4),
                CONV(4, 4, 3, padding=2, dilation=2, groups=4),
                nn.Identity(),
            ],
            IMAGE,
        ),
        ([CONV(4, 6, 3, padding=1), CONV(4, 6, 1, groups=2)], IMAGE),
        ([CONV(4, 4, 3, groups=2, padding=1), CONV(4, 4, 3, groups=4, padding=1)], IMAGE),
        ([CONV(4, 6, 3), CONV(4, 6, 5, padding=1)], IMAGE),
        ([CONV(4, 6, 3, padding="same"), CONV(4, 6, 1, padding="valid")], IMAGE),
        ([CONV(4, 6, 2, padding="same"), CONV(4, 6, 3, padding=1)], IMAGE),
        ([CONV(4, 4, 3, padding=2, dilation=2), nn.Identity()], IMAGE),
        ([CONV(4, 4, 3, padding=1), nn.AvgPool2d(3, 1, 1)], IMAGE),
        ([CONV(4, 4, 3, stride=2), nn.AvgPool2d(3, 2)], IMAGE),
        ([CONV(4, 4, 1, groups=4), nn.Identity(), Scale(4, 1, 1), Scale(1)], IMAGE),
        ([nn.Conv1d(4, 4, 3, padding=1), nn.Conv1d(4, 4, 1), Scale(1, 4, 1)], (2, 4, 9)),
        (
            [nn.Conv3d(4, 4, 3, padding=1, groups=2), nn.Conv3d(4, 4, 1, groups=2), nn.Identity()],
            (2, 4, 3, 4, 5),
        ),
        ([nn.Linear(4, 6), nn.Linear(4, 6, bias=False)], (3, 4)),
        ([nn.Linear(4, 4), nn.Linear(4, 4), nn.BatchNorm1d(4)], (3, 4)),
        ([nn.Linear(4, 4), nn.Identity(), Scale(4)], (3, 5, 4)),
    ],
)
def test_parallel_branches_become_one_layer_exactly(branches, size):
    result = assert_one_layer(Sum(*branches), noise(*size))
    (change,) = result.report.passes["reparameterize"].changed
    kind = "linear layer" if isinstance(branches[0], nn.Linear) else "convolution"
    assert change.what == f"{len(branches)} branches merged into one {kind}"


def in_place(y):
    total = y[0]
    for branch in y[1:]:
        total += branch
    return total


@pytest.mark.parametrize(
    "how",
    [
        sum,  # begins with 0
        in_place,
        lambda y: y[0] + (y[1] + y[2]),
        lambda y: y[2] - y[0] - y[1],
        lambda y: torch.add(y[0], torch.sub(y[1], y[2], alpha=3), alpha=-0.5) + y[1],
        lambda y: (y[0] * 2 + 1) + y[1] / 3 + y[2],
    ],
)
def test_a_sum_is_seen_however_it_is_written(how):
    branches = [CONV(4, 4, 3, padding=1), CONV(4, 4, 1), nn.BatchNorm2d(4)]
    assert_one_layer(Sum(*branches, how=how), noise(*IMAGE))


def repvgg(channels: int) -> nn.Module:
    return Sum(
        conv_bn(channels, channels, 3, padding=1),
        conv_bn(channels, channels, 1),
        nn.BatchNorm2d(channels),
    )


def mobileone(channels: int, out: int) -> nn.Module:
    depthwise = [conv_bn(channels, channels, 3, padding=1, groups=channels) for _ in range(2)]
    depthwise += [conv_bn(channels, channels, 1, groups=channels), nn.BatchNorm2d(channels)]
    pointwise = [conv_bn(channels, out, 1) for _ in range(2)]
    return nn.Sequential(Sum(*depthwise, how=sum), nn.ReLU(), Sum(*pointwise, how=in_place))


def test_blocks_of_repvgg_and_mobileone_become_one_convolution_each():
    model = Chain(repvgg(4), nn.ReLU(inplace=True), mobileone(4, 6), nn.ReLU(), repvgg(6))
    result = merged(model, noise(*IMAGE))
    assert operators(result.model).count("conv2d") == 4
    assert not {"add", "add_", "batch_norm"} & set(operators(result.model))
    sites = [change.site for change in result.report.passes["reparameterize"].changed]
    assert sites == ["0", "2.0", "2.2", "4"]
    names = {name for name, _ in result.model.named_parameters()}
    assert {"0.branches.0.0.weight", "0.branches.0.0.bias"} <= names


def test_blocks_of_timm_become_one_convolution_each():
    byobnet = pytest.importorskip("timm.models.byobnet")
    model = Chain(
        byobnet.MobileOneBlock(4, 4, 3, num_conv_branches=2, group_size=1),
        byobnet.RepVggBlock(4, 8, 3, stride=2),
        byobnet.RepVggBlock(8, 8, 3),
    )
    result = merged(model, noise(*IMAGE))
    assert operators(result.model).count("conv2d") == 3
    sites = [change.site for change in result.report.passes["reparameterize"].changed]
    assert sites == ["0", "1", "2"]


def test_a_branch_of_two_layers_in_a_row_is_merged_beside_one_of_the_same_size():
    row = nn.Sequential(CONV(4, 2, 1, bias=False), CONV(2, 6, 3, padding=1))
    pool = nn.Sequential(CONV(4, 6, 1, bias=False), nn.AvgPool2d(3, 1, 1))
    assert_one_layer(Sum(CONV(4, 6, 3, padding=1), row, pool), noise(*IMAGE))


def test_merging_goes_on_where_a_merged_layer_makes_it_possible():
    class Mixer(nn.Module):  # as in FastViT: x + gamma * (mixer(x) - norm(x))
        def __init__(self):
            super().__init__()
            self.mixer, self.norm, self.gamma = repvgg(4), nn.BatchNorm2d(4), Scale(4, 1, 1)

        def forward(self, x):
            return x + self.gamma(self.mixer(x) - self.norm(x))

    model = nn.Sequential(Mixer(), CONV(4, 3, 1))
    assert_one_layer(model, noise(*IMAGE))


@pytest.mark.parametrize(
    ("layers", "size"),
    [
        ([CONV(4, 4, 1), CONV(4, 6, 3, stride=2, dilation=2)], IMAGE),
        ([CONV(4, 4, 1, bias=False), CONV(4, 6, 3, padding=1)], IMAGE),
        ([CONV(4, 16, 3, padding=1, bias=False), CONV(16, 4, 1)], IMAGE),
        ([CONV(4, 6, 3, padding="same", stride=1), CONV(6, 3, 1, stride=2)], IMAGE),
        ([CONV(4, 8, 3, groups=4), CONV(8, 8, 1, groups=4)], IMAGE),
        ([CONV(4, 8, 3, groups=2), CONV(8, 2, 1, groups=2, bias=False)], IMAGE),
        ([nn.Conv1d(4, 6, 5, padding=2), nn.Conv1d(6, 3, 1)], (2, 4, 9)),
        ([nn.Conv3d(4, 4, 1), nn.Conv3d(4, 3, 3)], (2, 4, 3, 4, 5)),
        ([nn.Linear(4, 8), nn.Linear(8, 3)], (2, 5, 4)),
        ([nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 6), nn.Linear(6, 3)], (2, 4)),
    ],
)
def test_layers_in_a_row_become_one_exactly(layers, size):
    assert_one_layer(nn.Sequential(*layers), noise(*size))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize(
    ("layers", "size"),
    [
        ([CONV(4, 4, 3, groups=4, padding=1), CONV(4, 8, 1)], IMAGE),  # depthwise, separable
        ([CONV(4, 1, 1), CONV(1, 6, 3)], IMAGE),  # a bottleneck
        ([CONV(4, 4, 3), CONV(4, 4, 3)], IMAGE),
        ([CONV(4, 4, 1), nn.ReLU(), CONV(4, 4, 3)], IMAGE),
        ([nn.ConvTranspose2d(4, 4, 3), CONV(4, 4, 1)], IMAGE),
        ([CONV(4, 4, 1), nn.AvgPool2d(2)], IMAGE),  # better with the pool first
        # Two taps, one before and two behind: padded alike on both sides, they are five.
        ([CONV(4, 4, 1, bias=False), CONV(4, 4, 2, padding="same", dilation=3)], IMAGE),
        ([nn.Linear(4, 1), nn.Linear(1, 4)], (2, 4)),
    ],
)
def test_layers_in_a_row_stay_where_one_would_cost_more_or_not_be_exact(layers, size):
    assert_kept(nn.Sequential(*layers), noise(*size))


def test_a_bias_before_a_padding_convolution_is_told():
    model = nn.Sequential(CONV(4, 4, 1), CONV(4, 4, 3, padding=1))
    reason = "conv2d_1 pads with zeros, which the bias of conv2d is not added to"
    assert_kept(model, noise(*IMAGE), reason=reason)


@pytest.mark.parametrize(
    "branches",
    [
        [CONV(4, 4, 3, padding=1), nn.Sequential(nn.ReLU(), CONV(4, 4, 1))],
        [nn.ConvTranspose2d(4, 4, 3, padding=1), nn.ConvTranspose2d(4, 4, 1), nn.Identity()],
        [nn.AvgPool2d(3, 1, 1), nn.Identity()],
        [nn.Sequential(CONV(4, 4, 3, padding=1), nn.ReLU(), CONV(4, 4, 1)), nn.Identity()],
        [nn.Sequential(CONV(4, 4, 3, padding=1, groups=4), CONV(4, 8, 1)), CONV(4, 8, 1)],
        [CONV(4, 4, 3, padding=1), nn.AvgPool2d(3, 1, 1, count_include_pad=False)],
        [CONV(4, 4, 3, padding=1), nn.BatchNorm2d(4, track_running_stats=False)],
    ],
)
def test_branches_that_are_not_of_one_kind_or_input_stay(branches):
    assert_kept(Sum(*branches), noise(*IMAGE))


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (
            Sum(CONV(4, 4, 3, stride=2, padding=(1, 0)), CONV(4, 4, 1, stride=(2, 3))),
            "conv2d and conv2d_1 have different strides",
        ),
        (
            Sum(CONV(4, 4, (1, 3), padding=(0, 1)), CONV(4, 4, (3, 1), padding=(1, 0))),
            "conv2d and conv2d_1 as one would take 10368 multiply-adds, now they take 6912",
        ),
        (
            Sum(CONV(4, 4, 7, padding=3, groups=4), CONV(4, 4, 1)),
            "conv2d and conv2d_1 as one would take 56448 multiply-adds, now they take 15264",
        ),
        (
            Function(lambda x, a, b: (y := a(x)) + b(x) + y.relu(), CONV(4, 4, 3), CONV(4, 4, 3)),
            "the output of conv2d has 2 consumers",
        ),
        (
            Sum(nn.utils.parametrizations.weight_norm(CONV(4, 4, 1)), CONV(4, 4, 1)),
            "the weight or bias of conv2d is computed in the graph",
        ),
    ],
)
def test_branches_that_could_have_been_one_are_told_with_the_reason(model, reason):
    assert_kept(model, noise(*IMAGE), reason=reason)


def test_a_value_changed_in_place_between_two_branches_keeps_them_apart():
    def forward(x, before, a, b):
        x = before(x)
        y, view = a(x), x.flatten(2)
        view.neg_()
        return y + b(x)

    model = Function(forward, nn.Sigmoid(), CONV(4, 4, 3, padding=1), CONV(4, 4, 1))
    assert_kept(model, noise(*IMAGE), reason="sigmoid is changed in place by neg_")


def test_a_sum_in_place_into_what_others_read_is_left_alone():
    def forward(x, before, a):
        x = before(x)
        view = x.flatten(2)
        x += a(x)
        return view.sum(2), x

    model = Function(forward, nn.Sigmoid(), CONV(4, 4, 1))
    result = simplify(randomized(model), (noise(*IMAGE),), passes=PASSES)
    assert result.report.passes["reparameterize"].changed == ()


def test_what_else_is_added_stays_a_sum():
    branches = [CONV(4, 4, 3, padding=1), nn.Sigmoid(), CONV(4, 4, 1), nn.Tanh(), nn.Identity()]
    model = Sum(*branches, how=lambda y: y[0] - y[1] + torch.add(y[2], y[3], alpha=3) + y[4])
    result = merged(model, noise(*IMAGE))
    assert sorted(operators(result.model)) == ["add", "add", "conv2d", "sigmoid", "tanh"]
    (change,) = result.report.passes["reparameterize"].changed
    assert change.what == "3 branches merged into one convolution"


def test_a_sum_over_two_inputs_becomes_one_layer_for_each():
    model = Function(
        lambda x, a, b, c, d: a(x) + c(x.relu()) + b(x) + d(x.relu()),
        *(CONV(4, 4, kernel, padding=kernel // 2) for kernel in (3, 1, 3, 1)),
    )
    relu_once = Function(
        lambda x, a, b, c, d: (z := x.relu()) * 0 + a(x) + c(z) + b(x) + d(z), *model.layers
    )
    result = merged(relu_once, noise(*IMAGE))
    assert operators(result.model).count("conv2d") == 2


def test_a_layer_called_twice_gives_its_weight_away_only_once():
    model = Function(
        lambda x, a, b: a((a(x) + b(x)).relu()), CONV(4, 4, 3, padding=1), CONV(4, 4, 1)
    )
    result = merged(model, noise(*IMAGE))
    assert operators(result.model) == ["conv2d", "relu", "conv2d"]
    names = {name for name, _ in result.model.named_parameters()}
    assert names == {f"layers.0.{name}" for name in ("weight", "weight_2", "bias", "bias_2")}


def test_functional_branches_are_merged_and_each_site_has_its_name():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.kernels = nn.ParameterList(torch.zeros(4, 4, k, k) for k in (3, 1, 3, 1))

        def forward(self, x):
            for wide, narrow in (self.kernels[:2], self.kernels[2:]):
                x = (F.conv2d(x, wide, padding=1) + F.conv2d(x, narrow)).relu()
            return x

    result = merged(Functional(), noise(*IMAGE))
    assert operators(result.model) == ["conv2d", "relu", "conv2d", "relu"]
    sites = [change.site for change in result.report.passes["reparameterize"].changed]
    assert sites == ["add", "add_1"]


def off_centre(a, b):
    kernel = parallel(a, b)
    return module_under_test.Kernel(**{**vars(kernel), "weight": kernel.weight.roll(1, -1)})


def test_a_kernel_put_off_centre_is_caught_by_the_proof(monkeypatch):
    model = randomized(Chain(repvgg(4), nn.ReLU()))
    monkeypatch.setattr(module_under_test, "parallel", off_centre)
    with pytest.raises(CheckFailedError, match=r"at 0\.branches\.0\.1, and at 3 more"):
        simplify(model, (noise(*IMAGE),), passes=PASSES)
    monkeypatch.undo()
    simplify(model, (noise(*IMAGE),), passes=PASSES)


def convolutions(model: nn.Module, x: torch.Tensor) -> list[int]:
    """Return the multiply-adds, for one image, of each convolution that a model calls."""
    costs = []
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(
                lambda layer, _, y: costs.append(layer.weight.numel() * math.prod(y.shape[2:]))
            )
    with torch.no_grad():
        model(x.clone())  # a sum in place may change it
    if isinstance(model, GraphModule):
        layers = [node for node in model.graph.nodes if operator(node) == "aten.conv2d"]
        weights = [math.prod(shape(arguments(layer)["weight"])) for layer in layers]
        places = [math.prod(shape(layer)[2:]) for layer in layers]
        costs = [a * b for a, b in zip(weights, places, strict=True)]
    return costs


@st.composite
def branches(draw):
    """Draw layers, some with a BatchNorm, and pass-throughs, all of 4 channels and one stride."""
    stride = draw(st.sampled_from([1, 1, 2]))
    drawn = []
    for _ in range(draw(st.integers(2, 4))):
        kernel = (draw(st.sampled_from([1, 2, 3, 5])), draw(st.sampled_from([1, 3, 5])))
        dilation = draw(st.sampled_from([1, 1, 2, 3]))
        if stride > 1:
            kernel = (kernel[1], kernel[1])
        padding = "same" if stride == 1 else tuple((k - 1) * dilation // 2 for k in kernel)
        kind = draw(st.sampled_from(["conv", "conv", "conv", "row", "identity", "norm", "pool"]))
        if kind in ("conv", "row") or stride > 1:
            layer = nn.Conv2d(
                4,
                4,
                kernel,
                stride=stride,
                padding=padding,
                dilation=dilation,
                groups=draw(st.sampled_from([1, 2, 4])),
                bias=draw(st.booleans()),
            )
            layers = [nn.Conv2d(4, 4, 1, bias=False)] if kind == "row" else []
            layers += [layer, nn.BatchNorm2d(4)][: draw(st.integers(1, 2))]
            drawn.append(nn.Sequential(*layers))
        else:
            others = {
                "identity": nn.Identity(),
                "norm": nn.BatchNorm2d(4),
                "pool": nn.AvgPool2d(3, 1, 1),
            }
            drawn.append(others[kind])
    how = draw(st.sampled_from([sum, in_place, lambda y: y[0] - sum(y[1:])]))
    return randomized(Sum(*drawn, how=how), seed=draw(st.integers(0, 99)))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@settings(max_examples=15, deadline=None, derandomize=True, database=None)
@given(branches())
def test_any_sum_of_branches_simplifies_exactly_and_costs_no_more(model):
    x = noise(2, 4, 8, 7)
    before = convolutions(copy.deepcopy(model), x)
    result = simplify(model, (x,), passes=PASSES, finishing=())  # raises above 1e-9
    assert result.report.model_error < 1e-12
    after = convolutions(result.model, x)
    others = 4 * 8 * 7 * (1 + 9)  # a pool's, an identity's: of at most three
    assert len(after) <= len(before) and sum(after) <= sum(before) + 3 * others
    assert reparameterize(result.model)[1].changed == ()
