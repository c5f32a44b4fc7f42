import pytest
import timm
import torch
import torchvision
from export_models import Chain, noise, randomized
from test_functional import Calls, operators
from torch import nn
from torch.nn import functional as F

from deploy.errors import BadInputError, CheckFailedError
from export.passes.functional import make_functional
from export.passes.simplify import Simplified, simplify
from export.passes.strip_dropout import strip_dropout
from export.traced.float64 import evaluate
from export.traced.graph import arguments, operator
from export.traced.randomness import assert_deterministic
from export.traced.report import PassReport
from export.traced.trace import trace

DEPTH = [
    lambda x: torchvision.ops.stochastic_depth(x, 0.3, "row", training=True),
    lambda x: torchvision.ops.stochastic_depth(x, 0.3, "batch", training=True),
    lambda x: timm.layers.drop_path(x, 0.3, True),
    lambda x: x.mul_(torch.bernoulli(torch.full((x.shape[0], 1, 1, 1), 0.7)) / 0.7),
    lambda x: torch.empty_like(x).bernoulli_(0.7).div(0.7) * x,
]
BLOCKS = [
    lambda x: torchvision.ops.drop_block2d(x, 0.2, 3, training=True),
    lambda x: torchvision.ops.drop_block2d(x, 0.2, 3, inplace=True, training=True),
    lambda x: timm.layers.drop_block_2d(x, 0.2, 3),
    lambda x: timm.layers.drop_block_2d(x, 0.2, 4, inplace=True, couple_channels=False),
]


def stripped(function, x=None, *, passes=(strip_dropout,)) -> Simplified:
    x = noise(2, 3, 6, 6) if x is None else x
    result = simplify(randomized(Calls(function)), (x,), passes=passes, finishing=())
    assert not strip_dropout(result.model)[1].changed
    return result


@pytest.mark.parametrize("drop", DEPTH)
@pytest.mark.parametrize("passes", [(strip_dropout,), (make_functional, strip_dropout)])
def test_stochastic_depth_that_is_live_in_evaluation_mode_is_stripped_and_named(drop, passes):
    def forward(self, x):
        return self.conv(x) + drop(self.conv(x * 2))

    result = stripped(forward, passes=passes)
    (change,) = result.report.passes["strip_dropout"].changed
    assert change.what == "stripped; it was live in evaluation mode"
    assert operators(result) == ["aten.conv2d", "aten.mul", "aten.conv2d", "aten.add"]
    assert max(result.report.trace_error, result.report.model_error) < 1e-15
    assert_deterministic(result.model)
    model, x = result.model, noise(3, 3, 6, 6)
    expected = F.conv2d(x, model.conv.weight, model.conv.bias)
    expected = expected + F.conv2d(2 * x, model.conv.weight, model.conv.bias)
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("drop", BLOCKS)
def test_a_live_dropblock_is_stripped_over_a_large_map(drop):
    model = Calls(lambda self, x: drop(self.conv(x)))
    result = simplify(randomized(model), (noise(2, 3, 80, 80),), passes=(strip_dropout,))
    assert operators(result) == ["aten.conv2d"]
    assert result.report.model_error < 1e-10
    assert_deterministic(result.model)


def test_a_live_dropblock_whose_noise_is_not_quite_1_stays_and_is_refused():
    model = randomized(Calls(lambda self, x: BLOCKS[0](self.conv(x))))
    (reason,) = strip_dropout(trace(model, (noise(2, 3, 6, 6),)))[1].skipped.values()
    assert reason.startswith("its noise has another mean than 1, by 3.7e-09")
    with pytest.raises(BadInputError, match=r"found: aten\.bernoulli_ in the model itself; remedy"):
        assert_deterministic(strip_dropout(trace(model, (noise(2, 3, 6, 6),)))[0])


def test_stochastic_depth_before_an_operator_in_place_leaves_its_argument_alone():
    def forward(self, x):
        y = self.conv(x)
        z = timm.layers.drop_path(y, 0.5, True)
        z.relu_()
        return y + z

    assert stripped(forward).report.model_error == 0


def test_dropout_modules_at_rest_leave_nothing_behind():
    drops = [timm.layers.DropPath(0.5), torchvision.ops.StochasticDepth(0.5, "row")]
    drops += [timm.layers.DropBlock2d(0.5), torchvision.ops.DropBlock2d(0.5, 3), nn.Dropout2d(0.5)]
    model = randomized(Chain(nn.Conv2d(3, 4, 1), *drops))
    result = simplify(model, (noise(2, 3, 9, 9),), passes=(strip_dropout,))
    assert operators(result) == ["aten.conv2d", "aten.flatten", "aten.mean"]


class Block(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.conv, self.function = nn.Conv2d(3, 3, 1), function

    def forward(self, x):
        return self.function(self.conv(x))


@pytest.mark.parametrize(
    ("function", "operator_name"),
    [
        (lambda x: timm.layers.drop_path(x, 0.5, True, False), r"aten\.bernoulli_"),
        (lambda x: x * (torch.rand(x.shape[0], 1, 1, 1) + 0.5).floor() / 0.5, r"aten\.rand"),
        (lambda x: x + torch.randn_like(x), r"aten\.randn_like"),
        (lambda x: x * torch.empty(3, 1, 1).uniform_(), r"aten\.uniform_"),
        (lambda x: F.rrelu(x, training=True), r"aten\.rrelu"),
        (lambda x: F.gumbel_softmax(x), r"aten\.exponential_"),
        (lambda x: x[:, torch.randperm(3)], r"aten\.randperm"),
    ],
)
def test_any_other_randomness_is_left_alone_and_refused_by_name(function, operator_name):
    traced = trace(randomized(nn.Sequential(Block(function))), (noise(2, 3, 4, 4),))
    traced, report = strip_dropout(traced)
    assert not report.changed
    with pytest.raises(BadInputError, match=rf"found: {operator_name} in 0; remedy"):
        assert_deterministic(traced)


def test_randomness_at_rest_or_unread_is_not_refused():
    def forward(self, x):
        torch.rand(3)
        torchvision.ops.stochastic_depth(x, 0.5, "row", training=True)
        x = F.rrelu(F.dropout(x, 0.5, training=False), training=False)
        return F.scaled_dot_product_attention(x, x, x)

    assert_deterministic(stripped(forward).model)


def test_randomness_inside_a_nested_graph_is_refused():
    def forward(self, x):
        with torch.enable_grad():
            return x + torch.rand_like(x)

    with pytest.raises(BadInputError, match=r"aten\.rand_like"):
        assert_deterministic(trace(randomized(Calls(forward)), (noise(2, 3, 4, 4),)))


@pytest.mark.parametrize(
    "draw",
    [
        lambda x: torch.bernoulli(torch.full_like(x, 0.25)),
        lambda x: torch.bernoulli(x * 0 + 0.25),
        lambda x: x.clone().bernoulli_(0.25),
        lambda x: x.bernoulli(0.25),
        lambda x: x.clone().bernoulli_(torch.full((), 0.25)) * 1,
        lambda x: x.clone().bernoulli_() / 2,
    ],
)
def test_a_bernoulli_draw_is_its_mean_in_the_model_and_in_the_traced_graph(draw):
    model, x = randomized(Calls(lambda self, x: draw(x))), noise(2, 3, 4, 4)
    (answer,) = evaluate(model, (x.double(),))
    (traced,) = evaluate(trace(model, (x,)).double(), (x.double(),))
    assert torch.equal(answer, torch.full_like(answer, 0.25)) and torch.equal(answer, traced)


def strips_unscaled(module):
    for node in list(module.graph.nodes):
        if operator(node) == "aten.mul" and len(node.all_input_nodes) > 1:
            node.replace_all_uses_with(arguments(node)["self"])
    for node in reversed(list(module.graph.nodes)):
        if node.op == "call_function" and not node.users:
            module.graph.erase_node(node)
    return module, PassReport()


def test_stripping_a_noise_that_is_not_scaled_is_caught_by_the_proof():
    model = randomized(Calls(lambda self, x: timm.layers.drop_path(x, 0.5, True, False)))
    with pytest.raises(CheckFailedError, match="at the simplified outputs"):
        simplify(model, (noise(2, 3, 4, 4),), passes=(strips_unscaled,))
