import pytest
import torch
from export_models import Chain, noise, randomized
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from deploy.errors import CheckFailedError
from export.passes.fold_batchnorm import fold_batchnorm
from export.passes.simplify import Simplified, simplify
from export.traced.graph import arguments, replace
from export.traced.report import PassReport
from export.traced.sites import find_sites, is_batchnorm


def assert_all_folded(model: nn.Module, x: torch.Tensor) -> Simplified:
    result = simplify(model, (x,))
    assert find_sites(model).batchnorms and not find_sites(result.model).batchnorms
    assert not result.report.skipped
    torch.testing.assert_close(result.model(x), model(x), rtol=1e-4, atol=1e-4)
    return result


def skipped(model: nn.Module, x: torch.Tensor) -> dict[str, str]:
    return simplify(randomized(model), (x,)).report.skipped


@pytest.mark.parametrize(
    ("layer", "norm", "shape"),
    [
        (nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6), (2, 4, 9)),
        (nn.Conv1d(4, 6, 3, bias=False, dilation=2, padding=2), nn.BatchNorm1d(6), (2, 4, 9)),
        (nn.Conv2d(4, 6, 3, groups=2, stride=2), nn.BatchNorm2d(6), (2, 4, 9, 9)),
        (nn.Conv2d(4, 6, 3, padding="same"), nn.BatchNorm2d(6, affine=False), (2, 4, 9, 9)),
        (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(6), (2, 4, 9, 9)),
        (nn.Conv3d(4, 6, 3, bias=False), nn.BatchNorm3d(6), (2, 4, 5, 5, 5)),
        (nn.ConvTranspose1d(6, 4, 3, groups=2), nn.BatchNorm1d(4), (2, 6, 5)),
        (nn.ConvTranspose2d(6, 9, 3, groups=3, stride=2), nn.BatchNorm2d(9), (2, 6, 5, 5)),
        (nn.ConvTranspose2d(6, 4, 3, bias=False), nn.BatchNorm2d(4), (2, 6, 5, 5)),
        (
            nn.ConvTranspose3d(4, 6, 2, groups=2, output_padding=0),
            nn.BatchNorm3d(6),
            (2, 4, 3, 3, 3),
        ),
        (nn.Conv2d(4, 6, 3), nn.SyncBatchNorm(6), (2, 4, 9, 9)),
        (nn.Linear(4, 6), nn.BatchNorm1d(6), (2, 4)),
        (nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6, affine=False), (2, 4)),
    ],
)
def test_fold_is_exact_for_every_kind_of_layer(layer, norm, shape):
    result = assert_all_folded(randomized(Chain(layer, norm)), noise(*shape))
    assert result.report.site_errors["1"] < 1e-13
    assert result.report.passes["fold_batchnorm"].changed[0].what == "folded into 0"


class CalledTwice(nn.Module):
    def __init__(self, *, norms: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(3) for _ in range(norms))

    def forward(self, x):
        x = self.norms[0](self.conv(x)).relu()
        x = self.norms[-1](self.conv(x))
        return x.mean((2, 3))


@pytest.mark.parametrize("norms", [1, 2])
def test_a_convolution_called_twice_gets_a_weight_for_each_batchnorm(norms):
    model = randomized(CalledTwice(norms=norms))
    result = assert_all_folded(model, noise(2, 3, 8, 8))
    names = {name for name, _ in result.model.named_parameters()}
    assert names == {"conv.weight", "conv.weight_2", "conv.bias", "conv.bias_2"}


def test_a_weight_that_another_call_reads_stays_as_it_was():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.norm, self.b = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(self.norm(self.a(x)).relu())

    assert_all_folded(randomized(Tied()), noise(3, 4))


def test_functional_batch_norm_is_folded_and_named():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.kernel = nn.Parameter(torch.zeros(5, 3, 1, 1))
            self.register_buffer("mean", noise(5))
            self.register_buffer("var", noise(5).abs() + 0.1)

        def forward(self, x):
            return F.batch_norm(F.conv2d(x, self.kernel), self.mean, self.var).mean((2, 3))

    result = simplify(randomized(Functional()), (noise(2, 3, 4, 4),))
    assert find_sites(result.model).batchnorms == ()
    assert list(result.report.site_errors) == ["batch_norm"]
    assert {name for name, _ in result.model.named_parameters()} == {"kernel", "kernel_bias"}


def test_fold_skips_a_convolution_with_two_consumers():
    class TwoConsumers(CalledTwice):
        def forward(self, x):
            y = self.conv(x)
            return (self.norms[0](y) + y).mean((2, 3))

    reasons = skipped(TwoConsumers(norms=1), noise(2, 3, 8, 8))
    assert reasons == {
        "norms.0": "the output of conv2d has 2 consumers; forwards: add adds another value to it"
    }


def test_fold_skips_a_convolution_whose_output_is_changed_in_place_and_used_again():
    class InPlace(CalledTwice):
        def forward(self, x):
            y = self.conv(x)
            y.relu_()
            return self.norms[0](y).mean((2, 3))

    assert list(skipped(InPlace(norms=1), noise(2, 3, 8, 8))) == ["norms.0"]


def test_fold_skips_both_of_two_batchnorms_behind_one_convolution():
    class TwoNorms(CalledTwice):
        def forward(self, x):
            y = self.conv(x)
            return (self.norms[0](y) - self.norms[1](y).relu()).mean((2, 3))

    assert list(skipped(TwoNorms(norms=2), noise(2, 3, 8, 8))) == ["norms.0", "norms.1"]


class ConvolvesWithSoftmax(nn.Module):
    """A kernel that depends on the image (dynamic convolution)."""

    def __init__(self):
        super().__init__()
        self.kernel = nn.Parameter(torch.zeros(4, 3, 1, 1))

    def forward(self, x):
        return F.conv2d(x, self.kernel * x.mean())


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (
            Chain(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)),
            "it has no running statistics and normalises by those of the batch",
        ),
        (
            Chain(nn.BatchNorm2d(3)),
            "it follows the input, not a convolution or linear layer; forwards: it is an output",
        ),
        (
            Chain(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.BatchNorm2d(4)),
            "it follows relu, which takes no shift; forwards: it is an output",
        ),
        (
            Chain(ConvolvesWithSoftmax(), nn.BatchNorm2d(4)),
            "the weight of conv2d is computed in the graph; forwards: it is an output",
        ),
        (
            Chain(nn.Flatten(2), nn.Linear(16, 5), nn.BatchNorm1d(3)),
            "it scales another dimension than the output channels of linear; "
            "forwards: it is an output",
        ),
    ],
)
def test_fold_skips_what_it_cannot_fold_exactly_and_says_why(model, reason):
    assert list(skipped(model, noise(2, 3, 4, 4)).values()) == [reason]


def test_fold_skips_a_batchnorm_whose_training_flag_is_live():
    class Live(CalledTwice):
        def forward(self, x):
            norm = self.norms[0]
            x = F.batch_norm(
                self.conv(x), norm.running_mean.clone(), norm.running_var.clone(), training=True
            )
            return x.mean((2, 3))

    (reason,) = skipped(Live(norms=1), noise(2, 3, 8, 8)).values()
    assert reason.startswith("its training flag is live")


@pytest.mark.parametrize(
    "parametrize", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm]
)
def test_a_parametrized_weight_is_computed_once_and_then_folded_into(parametrize):
    model = randomized(Chain(parametrize(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4)))
    result = assert_all_folded(model, noise(2, 3, 6, 6))
    targets = [str(node.target) for node in result.model.graph.nodes if node.op == "call_function"]
    assert targets[0] == "aten.conv2d.default" and not any("norm" in t for t in targets)


def test_a_zero_initialised_batchnorm_folds_to_zeros():
    model = randomized(Chain(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)))
    nn.init.zeros_(model[1].weight)
    nn.init.zeros_(model[1].bias)
    assert assert_all_folded(model, noise(2, 3, 4, 4)).report.site_errors["1"] == 0


def forgets_eps(module):
    for node in module.graph.nodes:
        if is_batchnorm(node):
            node.args = (*node.args[:7], 0.0, *node.args[8:])
    return fold_batchnorm(module)


def folds_onto_the_wrong_groups(module):
    for node in module.graph.nodes:
        if "conv_transpose" in str(node.target):
            weight = module.get_parameter(str(arguments(node)["weight"].target))
            weight.data = weight.data.flip(1)
    return fold_batchnorm(module)


def promises_too_much(module):
    for node in list(module.graph.nodes):
        if is_batchnorm(node):
            replace(node, node.args[0])
    return module, PassReport()


@pytest.mark.parametrize(
    ("wrong_pass", "found"),
    [
        (forgets_eps, r"e-0\d at 1, and at 1 more"),
        (folds_onto_the_wrong_groups, "at 1, and"),
        (promises_too_much, "at the simplified outputs"),
    ],
)
def test_a_wrong_fold_is_caught_by_the_proof_and_the_right_one_is_not(wrong_pass, found):
    model = randomized(Chain(nn.ConvTranspose2d(4, 6, 2, groups=2), nn.BatchNorm2d(6)))
    x = noise(2, 4, 5, 5)
    with pytest.raises(CheckFailedError, match=found):
        simplify(model, (x,), passes=(wrong_pass,), finishing=())
    simplify(model, (x,))


@st.composite
def networks(draw):
    """Draw a chain of layers, BatchNorms, activations and dropouts, in foldable order or not."""
    layers, channels = [], 4
    for _ in range(draw(st.integers(1, 3))):
        out = draw(st.sampled_from([2, 4, 6]))
        kind = draw(st.sampled_from([nn.Conv2d, nn.ConvTranspose2d]))
        groups = draw(st.sampled_from([1, 2]))
        layers.append(kind(channels, out, 3, padding=1, groups=groups, bias=draw(st.booleans())))
        layers += draw(
            st.lists(
                st.sampled_from([nn.ReLU(inplace=True), nn.Dropout(0.5), nn.SiLU()]), max_size=1
            )
        )
        if draw(st.booleans()):
            eps = draw(st.sampled_from([1e-5, 1e-3]))
            layers.append(nn.BatchNorm2d(out, affine=draw(st.booleans()), eps=eps))
        channels = out
    return randomized(Chain(*layers), seed=draw(st.integers(0, 99)))


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(networks())
def test_any_chain_of_layers_simplifies_exactly(model):
    report = simplify(model, (noise(2, 4, 6, 6),)).report  # raises above 1e-9
    assert report.model_error < 1e-12
    before, after = report.before, report.after
    assert (after.dropouts, after.batchnorms) == (0, 0)
    folded, written = report.passes["fold_batchnorm"], report.passes["write_scale_and_shift"]
    assert before.batchnorms == len(folded.changed) + len(written.changed)
    assert {change.site for change in written.changed} == set(folded.skipped)
