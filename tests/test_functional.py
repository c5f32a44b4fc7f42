import pytest
import torch
import torchvision
from export_models import Chain, noise, randomized
from torch import nn
from torch.nn import functional as F

from deploy.errors import CheckFailedError
from export.passes.fold_batchnorm import fold_batchnorm
from export.passes.functional import make_functional
from export.passes.simplify import Simplified, simplify
from export.passes.strip_dropout import strip_dropout
from export.traced.aliases import is_in_place, memory
from export.traced.graph import operator
from export.traced.report import PassReport
from export.traced.trace import trace


class Calls(nn.Module):
    """A function as a model, with a convolution to work on."""

    def __init__(self, function) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.register_buffer("state", noise(4))
        self.function = function

    def forward(self, x):
        return self.function(self, x)


def functional(function, x=None) -> Simplified:
    x = noise(2, 3, 6, 6) if x is None else x
    model = randomized(Calls(function))
    result = simplify(model, (x,), passes=(make_functional,), finishing=())
    assert result.report.model_error <= 1e-14 and result.report.trace_error == 0
    with torch.no_grad():
        torch.testing.assert_close(result.model(x.clone()), model(x.clone()), rtol=1e-5, atol=1e-6)
    again = make_functional(result.model)[1]
    assert not again.changed and not again.replaced
    return result


def operators(result: Simplified) -> list[str]:
    names = [operator(node) for node in result.model.graph.nodes]
    return [name for name in names if name and name != "aten.sym_size"]


def in_place(result: Simplified) -> list[str]:
    return [node.name for node in result.model.graph.nodes if is_in_place(node)]


@pytest.mark.parametrize(
    "activation",
    [
        lambda y: y.relu_(),
        lambda y: F.hardswish(y, inplace=True),
        lambda y: F.silu(y, inplace=True),
        lambda y: F.leaky_relu_(y, 0.3),
        lambda y: F.relu6(y, inplace=True),
        lambda y: y.clamp_(-0.5, 0.7),
        lambda y: y.mul_(2).add_(y, alpha=3).sub_(1).div_(3),
        lambda y: y.fill_(2).add_(1),
        lambda y: y.masked_fill_(y > 0, 7.0),
        lambda y: y.copy_(y.flip(0)),
        lambda y: y.zero_() + 1,
    ],
)
def test_an_operator_in_place_becomes_a_functional_one(activation):
    result = functional(lambda self, x: activation(self.conv(x)).sum(2))
    assert not in_place(result) and not result.report.skipped


def test_whoever_reads_later_reads_what_was_written_and_whoever_reads_before_does_not():
    def forward(self, x):
        y = self.conv(x)
        before = y * 2
        z = y.relu_()
        return torch.cat([before, y, z * 3, y - z], 1)

    assert not in_place(functional(forward))


def test_a_residual_sum_in_place_is_made_functional():
    def forward(self, x):
        y = self.conv(x)
        shortcut = y.sigmoid()
        y += shortcut
        y *= y
        return y.relu_() + shortcut

    assert not in_place(functional(forward))


def test_a_view_that_is_read_no_more_does_not_hinder():
    def forward(self, x):
        y = self.conv(x)
        mean = y.flatten(2).mean(2)
        y.relu_()
        return y.mean((2, 3)) + mean

    assert not in_place(functional(forward))


@pytest.mark.parametrize(
    ("write", "scatters"),
    [
        (lambda y: y[:, 1:3].fill_(2.0), 1),
        (lambda y: y[:, 1, 2:].mul_(3).add_(1), 4),
        (lambda y: y[:, :2].copy_(y[:, 2:] * 2), 1),
        (lambda y: y[:].relu_(), 0),
    ],
)
def test_a_slice_that_is_written_to_makes_a_new_whole(write, scatters):
    def forward(self, x):
        y = self.conv(x)
        write(y)
        return y * y.sum()

    result = functional(forward)
    assert not in_place(result)
    assert sum("scatter" in name for name in operators(result)) == scatters


def test_slice_assignment_into_zeros_is_made_functional():
    def forward(self, x):
        y = torch.zeros_like(x)
        y[:, 0] = x[:, 1]
        y[:, 1:] = x[:, :2] + 1
        y[..., 0] = 0.5
        return y

    assert not in_place(functional(forward))


@pytest.mark.parametrize(
    "forward",
    [
        lambda self, x: shared(self.conv(x), lambda y: y.flatten(2)),
        lambda self, x: shared(self.conv(x), lambda y: torch.einsum("nchw->nhwc", y)),
        lambda self, x: shared(self.conv(x), lambda y: y.chunk(2, 1)[0]),
        lambda self, x: shared(self.conv(x), lambda y: y.reshape(-1)),
    ],
)
def test_memory_that_is_read_later_through_another_view_is_left_alone_and_still_right(forward):
    result = functional(forward)
    assert in_place(result) == ["relu_"]
    (reason,) = result.report.skipped.values()
    assert reason.endswith("lies in the memory that it changes, and is read later")


def shared(y, view):
    seen = view(y)
    copied = y.clone() * y.clone()
    y.relu_()
    return y.sum() + seen.sum() + copied


def test_the_callers_tensor_is_no_longer_changed():
    def forward(self, x):
        x += 1
        return self.conv(x) + x.mean()

    result = functional(forward)
    x = noise(2, 3, 6, 6)
    result.model(x)
    assert torch.equal(x, noise(2, 3, 6, 6)) and not in_place(result)


def test_a_model_that_changes_its_own_buffer_keeps_doing_so():
    def forward(self, x):
        y = self.conv(x) * self.state[:, None, None]
        self.state.add_(1)
        return y

    model = randomized(Calls(forward))
    traced = trace(model, (noise(2, 3, 6, 6),))
    _, report = make_functional(traced)
    assert set(report.skipped.values()) == {"it changes the stored tensor state"}
    before = traced(noise(2, 3, 6, 6))
    assert not torch.equal(before, traced(noise(2, 3, 6, 6)))


def test_what_returns_its_argument_is_removed():
    def forward(self, x):
        y = self.conv(x).contiguous().clone().detach().float().to(torch.float32).type_as(x)
        y = y.reshape(y.shape).expand_as(y)[:, :, 0:].flatten(3).view_as(y)
        y = F.pad(y.permute(0, 1, 2, 3), (0, 0, 0, 0)) * 1 / 1.0 + 0 - 0
        return y.repeat(1, 1, 1, 1).expand(-1, 4, -1, -1).relu()

    assert operators(functional(forward)) == ["aten.conv2d", "aten.relu"]


def test_what_changes_type_order_or_place_stays():
    def forward(self, x):
        y = (x * 4).to(torch.int64) + 0.0
        y = y.transpose(2, 3) / 2 + F.pad(x, (1, -1)).permute(0, 1, 3, 2)
        return y.double() * torch.div(x, 1, rounding_mode="floor")

    kept = operators(functional(forward))
    assert kept == [
        *["aten.mul", "aten.to", "aten.add", "aten.transpose", "aten.div", "aten.pad"],
        *["aten.permute", "aten.add", "aten.to", "aten.div", "aten.mul"],
    ]


def test_a_copy_stays_where_something_still_works_in_place():
    def forward(self, x):
        y = self.conv(x)
        kept = y.clone()
        flat = y.flatten(1)
        y.relu_()
        return flat.sum(1) + kept.sum((1, 2, 3))

    assert "aten.clone" in operators(functional(forward))


def test_view_becomes_reshape_when_contiguous_is_gone():
    def forward(self, x):
        return self.conv(x).permute(0, 2, 3, 1).contiguous().view(x.shape[0], -1, 4)

    kept = operators(functional(forward))
    assert "aten.reshape" in kept and not {"aten.view", "aten.contiguous"} & set(kept)


def test_contiguous_stays_where_the_memory_layout_is_read():
    def forward(self, x):
        return x.permute(0, 2, 3, 1).contiguous().as_strided((6, 3), (3, 1)) + self.conv.bias[:3]

    assert "aten.contiguous" in operators(functional(forward))


def test_a_shape_taken_from_another_tensor_is_written_out():
    def forward(self, x):
        y = self.conv(x)
        flat = y.flatten(0, 1).relu().reshape_as(y) + y.mean((2, 3), keepdim=True).expand_as(y)
        return flat + self.state[:, None, None].expand_as(y)

    result = functional(forward)
    assert not [name for name in operators(result) if name.endswith("_as")]
    sizes = [node.args[1] for node in result.model.graph.nodes if operator(node) == "aten.reshape"]
    assert sizes == [[-1, 4, 6, 6]]


def test_a_batchnorm_behind_an_operator_in_place_folds_once_that_is_functional():
    def forward(self, x):
        y = self.conv(x)
        y.mul_(2)
        return self.norm(y)

    model = Calls(forward)
    model.norm = nn.BatchNorm2d(4)
    passes = (make_functional, fold_batchnorm)
    report = simplify(randomized(model), (noise(2, 3, 6, 6),), passes=passes).report
    assert report.after.batchnorms == 0


def test_a_dropout_in_place_is_stripped_as_before():
    model = randomized(Chain(nn.Conv2d(3, 4, 1), nn.Dropout(0.5, inplace=True), nn.ReLU(True)))
    report = simplify(model, (noise(2, 3, 4, 4),), passes=(make_functional, strip_dropout)).report
    assert report.after.dropouts == 0


def test_a_site_that_was_promised_at_a_removed_node_is_still_proved():
    def forward(self, x):
        return F.dropout(self.conv(x).clone(), 0.5, training=False).relu()

    passes = (strip_dropout, make_functional)
    report = simplify(randomized(Calls(forward)), (noise(2, 3, 6, 6),), passes=passes).report
    assert report.site_errors == {"dropout": 0.0} and report.after.nodes == 2
    assert report.passes["make_functional"].changed == ()


def test_a_torchvision_block_becomes_functional():
    model = randomized(torchvision.models.resnet.BasicBlock(3, 3))
    result = simplify(model, (noise(2, 3, 8, 8),), passes=(make_functional,), finishing=())
    assert not in_place(result) and result.report.model_error < 1e-14


def forgets_the_later_readers(module):
    for node in module.graph.nodes:
        if operator(node) == "aten.relu_":
            node.target = torch.ops.aten.relu.default
    return module, PassReport()


def test_an_operator_whose_later_readers_are_forgotten_is_caught_by_the_proof():
    model = randomized(Calls(lambda self, x: shared(self.conv(x), lambda y: y.flatten(2))))
    with pytest.raises(CheckFailedError, match="at the simplified outputs"):
        simplify(model, (noise(2, 3, 6, 6),), passes=(forgets_the_later_readers,))


def test_views_share_memory_and_fresh_results_do_not():
    def forward(self, x):
        y = self.conv(x)
        a, b = y.split(2, 1)
        return (a.transpose(1, 2).relu_() + b.sum()) * F.dropout(y, 0.5, training=False).sum()

    traced = trace(randomized(Calls(forward)), (noise(2, 3, 6, 6),))
    numbers = {node.name: number for node, number in memory(traced).items()}
    names = ["split", "getitem", "getitem_1", "transpose", "relu_", "dropout"]
    assert {numbers[name] for name in names} == {numbers["conv2d"]}
    assert len({numbers[name] for name in ("x", "conv2d", "sum_1", "add", "mul")}) == 5
