import pytest
import torch
import torchvision
from export_models import Chain, noise, randomized
from torch import nn

from deploy.errors import CheckFailedError
from export.passes.fold_scales import fold_scales
from export.passes.simplify import simplify


def simplified(model, x):
    result = simplify(randomized(model), (x,))  # raises above 1e-9
    targets = [str(n.target) for n in result.model.graph.nodes if n.op == "call_function"]
    return result.report, targets


def done(report):
    return [change.what for change in report.passes["fold_scales"].changed]


class LayerScale(nn.Module):
    def __init__(self, *shape):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(shape))

    def forward(self, x):
        return x * self.gamma


@pytest.mark.parametrize(
    ("layer", "gamma", "shape"),
    [
        (nn.Linear(6, 4), (4,), (2, 5, 6)),
        (nn.Linear(6, 4, bias=False), (1, 1, 4), (2, 5, 6)),
        (nn.Conv2d(6, 4, 3, groups=2), (4, 1, 1), (2, 6, 5, 5)),
        (nn.ConvTranspose2d(6, 4, 2, groups=2), (1, 4, 1, 1), (2, 6, 5, 5)),
    ],
)
def test_layerscale_is_folded_into_the_projection_before_it(layer, gamma, shape):
    report, targets = simplified(Chain(layer, LayerScale(*gamma)), noise(*shape))
    assert len(done(report)) == 1 and not any("mul" in target for target in targets)
    assert list(report.site_errors) == ["1.mul"]


def test_layerscale_behind_an_activation_goes_forwards():
    report, targets = simplified(
        Chain(nn.Linear(6, 4), nn.GELU(), LayerScale(4), nn.Linear(4, 3)), noise(2, 5, 6)
    )
    assert done(report) == ["folded into 3"] and not any("mul" in t for t in targets)


class Norms(nn.Module):
    def __init__(self, norm, *, keeps=False):
        super().__init__()
        self.norm, self.keeps = norm, keeps
        self.q, self.k = nn.Linear(6, 4), nn.Linear(6, 4, bias=False)

    def forward(self, x):
        y = self.norm(x)
        z = self.q(y) * self.k(y)
        return z + y[..., :4] if self.keeps else z


@pytest.mark.parametrize(
    "norm", [nn.LayerNorm(6), nn.LayerNorm(6, bias=False), nn.RMSNorm(6, eps=1e-6)], ids=str
)
def test_a_norms_affine_part_is_folded_into_every_linear_layer_that_reads_it(norm):
    report, _ = simplified(Norms(norm), noise(2, 5, 6))
    assert done(report) == ["affine part folded into q, k"]
    assert report.after.parameters == 2 * 24 + 4 + (4 if norm_has_bias(norm) else 0)


def norm_has_bias(norm):
    return getattr(norm, "bias", None) is not None


def test_a_norm_that_something_else_reads_keeps_its_affine_part():
    report, _ = simplified(Norms(nn.LayerNorm(6), keeps=True), noise(2, 5, 6))
    assert done(report) == []
    (reason,) = [why for site, why in report.skipped.items() if site == "norm.layer_norm"]
    assert "add" in reason or "takes no scale" in reason


def test_a_group_norms_affine_part_goes_into_a_convolution_without_padding_only():
    for padding, expected in ((0, 1), (1, 0)):
        model = Chain(nn.GroupNorm(2, 6), nn.Conv2d(6, 4, 3, padding=padding))
        report, _ = simplified(model, noise(2, 6, 5, 5))
        assert len(done(report)) == expected


class Normalize(nn.Module):
    """The pre-processing as part of the model."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1))

    def forward(self, x):
        return (x - self.mean) / self.std


@pytest.mark.parametrize(("padding", "left"), [(0, 0), (1, 1)])
def test_the_pixels_normalisation_is_folded_and_a_subtraction_stays_before_padding(padding, left):
    model = randomized(Chain(Normalize(), nn.Conv2d(3, 4, 3, padding=padding)))
    x = noise(2, 3, 6, 6)
    report, targets = simplified(model, x)
    assert sum("sub" in t or "div" in t or "mul" in t or "add" in t for t in targets) == left
    assert report.model_error < 1e-13


def test_a_frozen_batchnorm_is_folded():
    frozen = torchvision.ops.FrozenBatchNorm2d(4)
    for name, value in (("weight", 0.7), ("bias", 0.2), ("running_mean", 0.1)):
        getattr(frozen, name).fill_(value)
    model = Chain(nn.Conv2d(3, 4, 3), frozen, nn.ReLU())
    _, targets = simplified(model, noise(2, 3, 6, 6))
    assert targets[:2] == ["aten.conv2d.default", "aten.relu.default"]


def test_back_to_back_scales_become_one():
    model = Chain(nn.Sigmoid(), LayerScale(4, 1, 1), LayerScale(4, 1, 1), nn.Sigmoid())
    report, targets = simplified(model, noise(2, 4, 3, 3))
    assert targets.count("aten.mul.Tensor") == 1 and len(done(report)) == 1


def test_a_scale_of_several_dimensions_and_a_computed_one_stay():
    class Gate(nn.Module):
        def forward(self, x):
            return x * x.mean((2, 3), keepdim=True)

    model = Chain(nn.Conv2d(3, 4, 1), LayerScale(4, 6, 6), Gate())
    report, targets = simplified(model, noise(2, 3, 6, 6))
    assert done(report) == [] and targets.count("aten.mul.Tensor") == 2


def test_a_shared_projection_gets_a_weight_for_each_scale():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.a, self.b = nn.Linear(4, 4), LayerScale(4), LayerScale(4)

        def forward(self, x):
            return self.b(self.linear(self.a(self.linear(x)).relu()))

    report, targets = simplified(Shared(), noise(3, 4))
    assert len(done(report)) == 2 and "aten.mul.Tensor" not in targets


def wrong_scale(module):
    for name, parameter in module.named_parameters():
        if name.endswith("gamma"):
            parameter.data = parameter.data * (1 + 1e-6)
    return fold_scales(module)


def test_a_scale_that_is_off_by_a_millionth_is_caught():
    model = randomized(Chain(nn.Linear(6, 4), LayerScale(4)))
    with pytest.raises(CheckFailedError, match=r"1e-06 at 1\.mul"):
        simplify(model, (noise(2, 5, 6),), passes=(wrong_scale,))
