"""BatchNorms and scales that go a long way: every operator on the way is exact, or an obstacle."""

import pytest
import torch
from export_models import Chain, noise, randomized
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from deploy.errors import CheckFailedError
from export.passes import into_consumers, into_producers
from export.passes.simplify import simplify
from export.traced.sites import find_sites

POOLS = [
    nn.AvgPool2d(2),
    nn.AvgPool2d(3, 1, 1, count_include_pad=False),
    nn.AvgPool2d(3, 2, ceil_mode=True),
    nn.AdaptiveAvgPool2d(1),
    nn.AdaptiveAvgPool2d((2, 3)),
    nn.MaxPool2d(3, 2, 1),
    nn.Upsample(scale_factor=2, mode="nearest"),
    nn.Upsample(scale_factor=2, mode="bilinear"),
    nn.Upsample(size=(5, 9), mode="bicubic"),
    nn.ReflectionPad2d(1),
    nn.ReplicationPad2d(1),
    nn.CircularPad2d(1),
]
REARRANGEMENTS = {
    "permute": lambda x: x.permute(0, 3, 1, 2).permute(0, 2, 3, 1),
    "flatten": lambda x: x.flatten(2).unflatten(2, (-1, 2)),
    "slice": lambda x: x[:, :, 1:, ::2],
    "roll": lambda x: x.roll(1, 2),
    "flip": lambda x: x.flip(3),
    "shuffled channels": lambda x: x.unflatten(1, (2, 2)).transpose(1, 2).flatten(1, 2),
    "expand": lambda x: x.unsqueeze(2).expand(-1, -1, 3, -1, -1).flatten(2, 3),
    "mean": lambda x: x.mean(3, keepdim=True),
    "squeezed": lambda x: x.mean((2, 3), keepdim=True).squeeze(3).unsqueeze(3),
}


class Lambda(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


def batchnorms_left(model, x=None):
    """Return how many BatchNorms became a scale and shift; raises above 1e-9."""
    result = simplify(model, (noise(2, 3, 8, 8) if x is None else x,))
    report = result.report
    assert find_sites(result.model).batchnorms == ()
    assert set(report.site_errors) >= set(find_sites(model).batchnorms)
    return len(report.passes["write_scale_and_shift"].changed)


@pytest.mark.parametrize("pool", POOLS, ids=str)
def test_a_batchnorm_folds_backwards_through_what_averages_or_selects(pool):
    model = randomized(Chain(nn.Conv2d(3, 4, 3), pool, nn.BatchNorm2d(4)))
    assert batchnorms_left(model) == 0


@pytest.mark.parametrize("pool", POOLS, ids=str)
def test_a_batchnorm_folds_forwards_through_what_averages_or_selects(pool):
    model = randomized(Chain(nn.ReLU(), nn.BatchNorm2d(3), pool, nn.Conv2d(3, 4, 1)))
    assert batchnorms_left(model) == 0


@pytest.mark.parametrize("way", REARRANGEMENTS)
@pytest.mark.parametrize("is_forwards", [False, True])
def test_a_batchnorm_folds_through_what_only_moves_values(way, is_forwards):
    moves = Lambda(REARRANGEMENTS[way])
    layers = (
        [nn.Conv2d(3, 4, 1), nn.ReLU(), nn.BatchNorm2d(4), moves, nn.Conv2d(4, 2, 1)]
        if is_forwards
        else [nn.Conv2d(3, 4, 3), moves, nn.BatchNorm2d(4)]
    )
    assert batchnorms_left(randomized(Chain(*layers))) == 0


def test_a_batchnorm_folds_forwards_through_flattening_into_a_linear_layer():
    model = nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(48, 5))
    assert batchnorms_left(randomized(model), noise(2, 3, 4, 4)) == 0


@pytest.mark.parametrize(
    ("pool", "reason"),
    [
        (nn.AvgPool2d(3, 1, 1), "counts padded zeros"),
        (nn.ZeroPad2d(1), "pads with zeros"),
        (nn.AvgPool2d(2, divisor_override=3), "divides by another number"),
    ],
)
def test_a_shift_does_not_pass_what_brings_zeros_in(pool, reason):
    model = randomized(Chain(nn.Conv2d(3, 4, 3), pool, nn.BatchNorm2d(4)))
    report = simplify(model, (noise(2, 3, 8, 8),)).report
    assert reason in report.skipped["2"]
    model[2].register_buffer("running_mean", torch.zeros(4))
    nn.init.zeros_(model[2].bias)
    assert batchnorms_left(model) == 0  # a scale alone does pass


def test_a_negative_scale_does_not_pass_a_maximum():
    model = randomized(Chain(nn.Conv2d(3, 4, 3), nn.MaxPool2d(2), nn.BatchNorm2d(4)))
    with torch.no_grad():
        model[2].weight[1] *= -1
    assert batchnorms_left(model) == 1


class Branches(nn.Module):
    """Two convolutions that come together before a BatchNorm."""

    def __init__(self, join, channels, *, keeps=False):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 1)
        self.join, self.norm, self.keeps = join, nn.BatchNorm2d(channels), keeps

    def forward(self, x):
        a, b = self.a(x), self.b(x)
        y = self.norm(self.join(a, b))
        return ((y + b) if self.keeps else y).mean((2, 3))


@pytest.mark.parametrize(
    ("join", "channels"),
    [
        (torch.add, 4),
        (torch.sub, 4),
        (lambda a, b: torch.cat([a, b], 1), 8),
        (lambda a, b: torch.cat([a, b], 2), 4),
        (lambda a, b: torch.cat([a, b], -3)[:, 2:6], 4),
    ],
)
def test_both_sides_of_a_sum_and_every_part_of_a_concatenation_take_their_share(join, channels):
    assert batchnorms_left(randomized(Branches(join, channels))) == 0


def test_a_side_that_is_read_elsewhere_and_a_value_added_to_itself_are_obstacles():
    assert batchnorms_left(randomized(Branches(torch.add, 4, keeps=True))) == 1
    assert batchnorms_left(randomized(Branches(lambda a, b: a + a, 4))) == 1
    assert batchnorms_left(randomized(Branches(lambda a, b: a * b, 4))) == 1


class Readers(nn.Module):
    """A BatchNorm whose result several layers read."""

    def __init__(self, padding):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.a = nn.Conv2d(3, 6, 3, padding=padding, groups=3, bias=False)
        self.b, self.c = nn.Conv2d(3, 2, 1), nn.Linear(3, 4)

    def forward(self, x):
        x = self.norm(x.relu())
        return torch.cat(
            [self.a(x).mean((2, 3)), self.b(x).mean((2, 3)), self.c(x.amax((2, 3)))], 1
        )


def test_a_batchnorm_folds_forwards_into_all_its_readers():
    assert batchnorms_left(randomized(Readers(0))) == 0


def test_before_zero_padding_the_scale_is_folded_and_the_shift_stays():
    report = simplify(randomized(Readers(1)), (noise(2, 3, 8, 8),)).report
    (change,) = report.passes["fold_batchnorm"].changed
    assert change.what == "scale folded forwards into a, b, c, shift kept as a sum"
    assert report.site_errors["norm"] < 1e-13


def test_a_preactivations_positive_scale_goes_through_relu_and_the_shift_stays():
    model = randomized(Chain(nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 3, padding=1)))
    result = simplify(model, (noise(2, 3, 5, 5),))
    (change,) = result.report.passes["fold_batchnorm"].changed
    assert change.what == "scale folded forwards into 2, shift kept as a sum"
    targets = [str(node.target) for node in result.model.graph.nodes if node.op == "call_function"]
    assert targets[:3] == ["aten.add.Tensor", "aten.relu.default", "aten.conv2d.default"]
    with torch.no_grad():
        model[0].weight[1] = -0.5
    assert batchnorms_left(model) == 1


def test_a_large_shift_over_a_small_scale_is_not_kept_as_a_sum():
    model = randomized(Readers(1))
    with torch.no_grad():
        model.norm.weight[0] = 1e-4
    assert batchnorms_left(model) == 1


def test_a_batchnorm_that_is_also_an_output_is_written_as_scale_and_shift():
    class Output(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.conv = nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1)

        def forward(self, x):
            y = self.norm(x)
            return y, self.conv(y)

    assert batchnorms_left(randomized(Output())) == 1


@pytest.mark.parametrize("groups", [1, 2])
def test_a_transposed_convolution_takes_a_scale_of_its_inputs_and_no_shift(groups):
    model = randomized(
        Chain(nn.ReLU(), nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 6, 3, groups=groups))
    )
    x = noise(2, 4, 5, 5)
    report = simplify(model, (x,)).report
    assert [c.what for c in report.passes["fold_batchnorm"].changed] == [
        "scale folded forwards into 2, shift kept as a sum"
    ]


def test_an_activation_that_later_changes_the_input_in_place_is_an_obstacle():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.conv = nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1)

        def forward(self, x):
            x = x * 2
            y = self.norm(x)
            x.relu_()
            return (self.conv(y) + x[:, :2]).mean((2, 3))

    batchnorms_left(randomized(InPlace()))  # whatever was done, it is exact


@pytest.mark.parametrize(
    ("function", "wrong"),
    [("scale_outputs", lambda m, n, s, t: None), ("scale_inputs", lambda m, n, s, t: None)],
)
def test_a_layer_that_does_not_take_over_is_caught_by_the_proof(monkeypatch, function, wrong):
    owner = into_producers if function == "scale_outputs" else into_consumers
    monkeypatch.setattr(owner, function, wrong)
    layers = [nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)]
    if function == "scale_inputs":
        layers = [nn.ReLU(), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)]
    with pytest.raises(CheckFailedError):
        simplify(randomized(Chain(*layers)), (noise(2, 3, 4, 4),))


@st.composite
def graphs(draw):
    """Draw a net of convolutions, BatchNorms, pools, sums and concatenations, foldable or not."""

    class Net(nn.Module):
        def __init__(self, steps):
            super().__init__()
            self.steps = steps
            self.layers = nn.ModuleList(Chain() if isinstance(s, str) else s[0] for s in steps)
            for module, step in zip(self.layers, steps, strict=True):
                module.step = step

        def forward(self, x):
            values = [x]
            for layer, step in zip(self.layers, self.steps, strict=True):
                first, second = values[-1], values[max(0, len(values) - 2)]
                if step == "add" and first.shape == second.shape:
                    values.append(first + second)
                elif step == "cat" and first.shape[2:] == second.shape[2:]:
                    values.append(torch.cat([first, second], 1)[:, 1:5])
                elif not isinstance(step, str):
                    values.append(layer(values[-1 - step[1] % len(values)]))
            return values[-1].mean((2, 3)), values[-2].amax((2, 3))

    steps = []
    for _ in range(draw(st.integers(2, 7))):
        kind = draw(st.sampled_from(["conv", "norm", "norm", "pool", "act", "add", "cat"]))
        back = draw(st.integers(0, 1))
        if kind in ("add", "cat"):
            steps.append(kind)
        elif kind == "conv":
            padding = draw(st.sampled_from([0, 1]))
            groups = draw(st.sampled_from([1, 2, 4]))
            size = draw(st.sampled_from([1, 3]))
            layer = nn.Conv2d(4, 4, size, padding=padding, groups=groups, bias=draw(st.booleans()))
            steps.append((layer, back))
        elif kind == "norm":
            steps.append((nn.BatchNorm2d(4), back))
        elif kind == "pool":
            steps.append((draw(st.sampled_from([nn.AvgPool2d(2, 1), nn.MaxPool2d(3, 1, 1)])), back))
        else:
            steps.append((draw(st.sampled_from([nn.ReLU(), nn.SiLU()])), back))
    return randomized(Net(steps), seed=draw(st.integers(0, 99)))


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(graphs())
def test_any_graph_of_convolutions_and_batchnorms_simplifies_exactly(model):
    report = simplify(model, (noise(2, 4, 12, 12),)).report  # raises above 1e-9
    assert report.after.batchnorms == 0
    assert F.relu(torch.tensor(report.model_error)) < 1e-11
