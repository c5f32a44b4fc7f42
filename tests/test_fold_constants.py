import math

import pytest
import timm
import torch
from export_models import noise, randomized
from test_functional import Calls, in_place, operators
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torchvision.models.swin_transformer import SwinTransformer

from deploy.errors import CheckFailedError
from export.passes.fold_batchnorm import fold_batchnorm
from export.passes.fold_constants import fold_constants
from export.passes.functional import make_functional
from export.passes.proof import relative_error
from export.passes.simplify import Simplified, simplify
from export.passes.strip_dropout import strip_dropout
from export.traced.dead_code import remove_dead_code
from export.traced.graph import operator, store
from export.traced.randomness import is_random
from export.traced.report import Change, PassReport
from export.traced.trace import frozen_copy, trace

FOLDS = (fold_constants, remove_dead_code)


def folded(model, x=None, *, passes=FOLDS) -> Simplified:
    x = noise(2, 3, 6, 6) if x is None else x
    result = simplify(model, (x,), passes=passes, finishing=())
    report = result.report
    assert max(report.model_error, report.trace_error, *report.site_errors.values(), 0) < 1e-13
    with torch.no_grad():
        torch.testing.assert_close(result.model(x), model(x), rtol=1e-4, atol=1e-5)
    assert not fold_constants(result.model)[1].changed
    return result


def calls(function, x=None) -> Simplified:
    return folded(randomized(Calls(function)), x)


def traced(function):
    return trace(frozen_copy(randomized(Calls(function))), (noise(2, 3, 6, 6),))


def sites(result: Simplified) -> list[str]:
    return [change.site for change in result.report.passes["fold_constants"].changed]


@pytest.mark.parametrize(
    "layer",
    [
        lambda: parametrizations.weight_norm(nn.Conv2d(3, 4, 3, bias=False)),
        lambda: parametrizations.spectral_norm(nn.Conv2d(3, 4, 3)),
        lambda: parametrizations.weight_norm(nn.ConvTranspose2d(3, 4, 2), dim=1),
        lambda: timm.layers.StdConv2d(3, 4, 3),
        lambda: timm.layers.ScaledStdConv2d(3, 4, 3),
    ],
)
def test_a_batchnorm_folds_into_a_weight_that_was_computed_in_the_graph(layer):
    torch.manual_seed(0)  # what is drawn without a seed is ill-conditioned now and then
    layer = layer()
    norm = nn.BatchNorm2d(4)
    model = randomized(nn.Sequential(layer, norm, nn.Flatten()))
    passes = (make_functional, fold_constants, fold_batchnorm, remove_dead_code)
    result = folded(model, passes=passes)
    assert result.report.after.batchnorms == 0 and not result.report.skipped
    assert len(operators(result)) == 2
    assert {name for name, _ in result.model.named_parameters()} <= {*("0.weight", "0.bias")}


def test_a_table_gathered_by_indices_becomes_one_parameter():
    def forward(self, x):
        index = torch.arange(6)[:, None] - torch.arange(6)[None, :] + 5
        table = self.conv.weight.flatten()[index % 12].unsqueeze(0)
        return x + table.transpose(1, 2).contiguous()

    result = calls(forward)
    assert operators(result) == ["aten.add"]
    assert sites(result) == ["contiguous"]


def test_a_resized_position_embedding_becomes_one_parameter():
    def forward(self, x):
        grid = self.conv.weight.reshape(1, 3, 2, 2)
        return x + F.interpolate(grid, size=(6, 6), mode="bicubic", antialias=True)

    assert operators(calls(forward)) == ["aten.add"]


def test_rotary_angles_are_computed_once_and_in_float64():
    def forward(self, x):
        bands = 1 / 10000 ** (torch.arange(0, 6, dtype=torch.float32) / 6)
        angles = torch.arange(6, dtype=torch.float32)[:, None] * bands
        return x * angles.cos() + x.flip(-1) * torch.sin(angles)

    result = calls(forward)
    assert operators(result) == ["aten.mul", "aten.flip", "aten.mul", "aten.add"]


def test_swins_mask_built_by_slices_is_computed_once():
    model = SwinTransformer(
        patch_size=[4, 4],
        embed_dim=8,
        depths=[2],
        num_heads=[2],
        window_size=[4, 4],
        num_classes=3,
    )
    result = folded(randomized(model), noise(2, 3, 32, 32), passes=(strip_dropout, *FOLDS))
    gone = {"aten.new_zeros", "aten.fill_", "aten.masked_fill", "aten.index", "aten.slice_scatter"}
    assert not in_place(result) and not gone & set(operators(result))
    # Two tables of relative positions and one mask.
    assert len(sites(result)) == 3


@pytest.mark.parametrize("passes", [FOLDS, (make_functional, *FOLDS)])
def test_a_constant_is_taken_as_its_reader_finds_it_between_writes(passes):
    def forward(self, x):
        mask = torch.zeros(6, 6)
        x = x + mask
        mask[1:3] = 5
        view = mask[0]
        x = x * mask
        mask[:, 2] += 7
        return x + mask + view

    result = folded(randomized(Calls(forward)), passes=passes)
    assert not in_place(result)
    assert operators(result) in (
        ["aten.add", "aten.mul", "aten.add", "aten.add"],
        ["aten.mul", "aten.add", "aten.add"],
    )


def test_what_an_input_is_written_into_is_no_constant():
    def forward(self, x):
        canvas = torch.zeros(2, 6)
        view = canvas[0]
        canvas[1] = x.mean((0, 1, 2))
        return x + view + canvas.sum(0) + torch.ones(6).mul(2)

    result = calls(forward)
    assert sites(result) == ["mul"]
    assert "aten.copy_" in operators(result)


def test_what_is_changed_from_call_to_call_is_no_constant():
    def forward(self, x):
        self.state.add_(1)
        return x.sum((2, 3)) * (self.state[:3] + 0.5)

    assert not fold_constants(traced(forward))[1].changed


@pytest.mark.parametrize(
    "draw",
    [
        lambda: torch.rand(6),
        lambda: torch.zeros(6).uniform_(),
        lambda: torch.empty(6).normal_(),
        lambda: F.dropout(torch.ones(6), 0.5),
        lambda: torch.randperm(6) * 1.0,
    ],
)
def test_what_is_drawn_at_random_is_no_constant(draw):
    module = traced(lambda self, x: x * (draw() + 1))
    drawn = [node for node in module.graph.nodes if is_random(node)]
    fold_constants(module)
    assert drawn and set(drawn) <= set(module.graph.nodes)


def test_what_has_the_size_of_the_batch_is_no_constant():
    def forward(self, x):
        token = (self.state[:3] * 2).view(1, 3, 1, 1).expand(x.shape[0], -1, -1, 6)
        ones = torch.ones(x.shape[0], 1, 1, 1) + x.shape[1]
        return torch.cat([x * ones, token], 2)

    result = calls(forward)
    assert {"aten.expand", "aten.ones"} <= set(operators(result))
    assert not {"aten.view", "aten.slice"} & set(operators(result))


@pytest.mark.parametrize(("size", "kept"), [(500, []), (800, ["aten.outer", "aten.cos"])])
def test_a_constant_that_would_enlarge_the_model_stays_and_what_it_is_made_of_is_folded(size, kept):
    def angles(self):
        return torch.outer(torch.arange(2 * size) * self.state[0] / 1e6, torch.arange(size) + 1.0)

    small = calls(lambda self, x: x + angles(self).cos()[:6, :6])
    assert operators(small) == ["aten.add"]
    whole = calls(lambda self, x: x.mean((1, 2, 3))[:, None, None] + angles(self).cos())
    assert [name for name in operators(whole) if name in {"aten.outer", "aten.cos"}] == kept
    assert "aten.arange" not in operators(whole)


def test_a_large_constant_made_of_a_large_parameter_is_folded():
    model = randomized(Calls(lambda self, x: F.linear(x.flatten(1), self.big.t() * 2)))
    model.big = nn.Parameter(noise(108, 10_000) / 10)
    assert operators(folded(model)) == ["aten.flatten", "aten.linear"]


def test_integer_and_boolean_constants_keep_their_type_in_every_precision():
    def forward(self, x):
        order = torch.arange(6).flip(0)
        keep = torch.ones(6, 6, dtype=torch.bool).tril()
        return torch.where(keep, x[..., order], -1.0)

    result = calls(forward)
    kinds = {parameter.dtype for parameter in result.model.half().parameters()}
    assert kinds == {torch.int64, torch.bool}


def test_a_complex_constant_stays_and_its_parts_are_folded():
    def forward(self, x):
        turned = torch.polar(torch.ones(6), torch.arange(6) * 0.1)
        return (x * turned).real

    result = calls(forward)
    assert len(sites(result)) == 2 and "aten.polar" in operators(result)


def test_a_shared_module_gets_one_constant_for_both_calls_and_a_tied_weight_stays():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = timm.layers.StdConv2d(3, 3, 3, padding=1)

        def forward(self, x):
            return self.conv(self.conv(x).relu()) * self.conv.weight.sum((1, 2, 3))[:, None, None]

    assert "aten.batch_norm" not in operators(folded(randomized(Twice())))


def test_equal_constants_are_stored_once_and_each_is_a_site():
    def forward(self, x):
        for _ in range(3):
            x = x * torch.arange(6).float().cos() + torch.arange(6).float().sin()
        return x

    result = calls(forward)
    assert len(sites(result)) == 6 and len(list(result.model.parameters())) == 2


def test_a_half_precision_model_is_folded_in_float64_and_rounded_once():
    def forward(self, x):
        return x * ((self.state[:3] + 1) / 3 - 1 / 3).float()[:, None, None].to(x.dtype)

    model = randomized(Calls(forward)).bfloat16()
    result = simplify(model, (noise(2, 3, 6, 6).bfloat16(),), passes=FOLDS, finishing=())
    (name,) = (name for name, _ in result.model.named_parameters())
    exact = ((model.state[:3].double() + 1) / 3 - 1 / 3)[:, None, None]
    assert torch.equal(result.model.get_parameter(name), exact.bfloat16())


def test_a_mask_of_infinities_is_folded_and_proved():
    def forward(self, x):
        mask = torch.full((6, 6), float("-inf")).triu(1)
        return (x + mask).softmax(-1)

    assert operators(calls(forward)) == ["aten.add", "aten.softmax"]
    infinite = torch.tensor([1.0, float("-inf")])
    assert relative_error(infinite, infinite) == 0
    assert relative_error(infinite + 1e-3, infinite) == pytest.approx(1e-3, rel=1e-3)
    assert relative_error(torch.zeros(2), infinite) == math.inf


def test_a_stored_tensor_is_not_folded_again():
    result = calls(lambda self, x: self.conv(x) * self.state[:, None, None])
    assert sites(result) == ["unsqueeze_1"]
    assert not calls(lambda self, x: self.conv(x)).report.passes["fold_constants"].changed


def folds_wrongly(module):
    node = next(node for node in module.graph.nodes if operator(node) == "aten._weight_norm")
    if not node.users:  # the second time
        return module, PassReport()
    (reader,) = node.users
    value = module.get_parameter(str(node.args[0].target)) * math.e
    after = store(module, "weight", value, before=reader)
    reader.replace_input_with(node, after)
    return module, PassReport((Change("wrong", "computed once", node.name, after.name),))


def test_a_wrong_constant_is_caught_by_the_proof():
    model = randomized(nn.Sequential(parametrizations.weight_norm(nn.Conv2d(3, 4, 1))))
    with pytest.raises(CheckFailedError, match=r"at wrong, and at 1 more"):
        simplify(model, (noise(2, 3, 4, 4),), passes=(folds_wrongly,))
