import copy
import json

import pytest
import torch
import torchvision
from export_models import AttentionBlock, Chain, noise, randomized, small_cnn
from torch import nn
from torch.nn import functional as F

from deploy.errors import BadInputError, CheckFailedError
from export.passes.simplify import SIMPLIFY_PASSES, simplify
from export.passes.strip_dropout import strip_dropout
from export.traced.dead_code import remove_dead_code
from export.traced.sites import assert_simplified, find_sites


@pytest.mark.parametrize(("name", "batchnorms"), [("resnet18", 20), ("mobilenet_v3_small", 34)])
def test_a_torchvision_model_keeps_its_function_and_loses_every_batchnorm(name, batchnorms):
    model = randomized(torchvision.models.get_model(name, num_classes=10))
    x = noise(2, 3, 64, 64)
    result = simplify(model, (x,))
    report = result.report
    assert report.before.batchnorms == len(report.passes["fold_batchnorm"].changed) == batchnorms
    assert (report.after.batchnorms, report.after.dropouts, report.skipped) == (0, 0, {})
    assert max(report.model_error, report.trace_error, *report.site_errors.values()) < 1e-12
    torch.testing.assert_close(result.model(x), model(x), rtol=1e-3, atol=1e-4)


def test_simplify_never_changes_the_model_that_is_handed_in():
    model = randomized(small_cnn())
    model.train()
    model[1].eval()
    before = copy.deepcopy(model.state_dict())
    identities = {name: id(value) for name, value in model.named_parameters()}
    flags = [module.training for module in model.modules()]
    simplify(model, (noise(2, 3, 8, 8),))
    torch.testing.assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)
    assert {name: id(value) for name, value in model.named_parameters()} == identities
    assert [module.training for module in model.modules()] == flags
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_simplified_module_shares_no_memory_with_the_model():
    model = randomized(AttentionBlock())
    simplified = simplify(model, (noise(2, 3, 8, 8),)).model
    theirs = {parameter.data_ptr() for parameter in model.parameters()}
    assert theirs.isdisjoint(parameter.data_ptr() for parameter in simplified.parameters())


def test_the_count_finds_no_site_after_simplify_and_every_site_with_the_fold_switched_off():
    model, x = randomized(small_cnn()), (noise(2, 3, 8, 8),)
    assert find_sites(model).batchnorms == ("1", "5")
    assert find_sites(model).dropouts == ("3", "6")
    assert_simplified(simplify(model, x).model, skipped={})

    unfolded = simplify(model, x, passes=(strip_dropout, remove_dead_code), finishing=()).model
    with pytest.raises(CheckFailedError, match=r"2 left .BatchNorm 1, BatchNorm 5\)"):
        assert_simplified(unfolded, skipped={})
    unstripped = simplify(model, x, passes=SIMPLIFY_PASSES[1:]).model
    with pytest.raises(CheckFailedError, match=r"2 left .dropout 3, dropout 6\)"):
        assert_simplified(unstripped, skipped={})
    with pytest.raises(CheckFailedError, match="4 left"):
        assert_simplified(model, skipped={})


@pytest.mark.parametrize("mode", [torch.enable_grad, lambda: torch.autocast("cpu", enabled=False)])
def test_what_stands_under_a_mode_that_changes_nothing_is_simplified_as_well(mode):
    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x):
            with mode():
                x, y = F.dropout(self.norm(self.conv(x))), x * 2
            return x.mean((2, 3)) + y.mean((1, 2, 3))[:, None]

    report = simplify(randomized(Nested()), (noise(1, 3, 4, 4),)).report
    assert report.after.batchnorms == report.after.dropouts == 0
    assert report.before.batchnorms == report.before.dropouts == 1


def test_the_reason_for_a_skip_stands_in_the_message_and_in_the_report():
    model = randomized(Chain(nn.BatchNorm2d(3, track_running_stats=False)))
    result = simplify(model, (noise(2, 3, 4, 4),))
    with pytest.raises(CheckFailedError, match="0: it has no running statistics"):
        assert_simplified(result.model, skipped=result.report.skipped)
    report = json.loads(json.dumps(result.report.to_json(), allow_nan=False))
    assert list(report["passes"]["fold_batchnorm"]["skipped"]) == ["0"]
    assert report["before"]["batchnorms"] == report["after"]["batchnorms"] == 1


def test_a_preactivation_becomes_one_scale_and_shift_and_keeps_its_reason():
    model = randomized(Chain(nn.BatchNorm2d(3), nn.SiLU(), nn.Conv2d(3, 4, 3)))
    result = simplify(model, (noise(2, 3, 5, 5),))
    assert_simplified(result.model, skipped=result.report.skipped)
    (change,) = result.report.passes["write_scale_and_shift"].changed
    assert (change.site, change.what) == ("0", "became one scale and shift")
    assert result.report.site_errors["0"] < 1e-14
    (reason,) = result.report.skipped.values()
    assert reason.startswith("it follows the input, not a convolution or linear layer; forwards: ")


class LiveDropout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x):
        x = F.dropout(self.linear(x), 0.5)  # training=True is the default: live even in eval()
        x = F.alpha_dropout(F.feature_alpha_dropout(x, training=True), training=True)
        x = F.dropout1d(F.dropout(x, 0.5, inplace=True)[:, None], 0.5)
        return F.scaled_dot_product_attention(x, x, x, None, 0.5, False)[:, 0]


def test_a_functional_dropout_that_is_live_in_evaluation_mode_is_stripped_and_named():
    model, x = randomized(LiveDropout()), noise(3, 6)
    answers = [model(x) for _ in range(20)]  # so many, since a draw may drop everything
    assert not all(torch.equal(answers[0], answer) for answer in answers)
    result = simplify(model, (x,))
    assert torch.equal(result.model(x), result.model(x))
    changed = result.report.passes["strip_dropout"].changed
    live = [change.site for change in changed if "live" in change.what]
    assert len(live) == len(changed) == 6
    assert "scaled_dot_product_attention" in live
    assert result.report.trace_error < 1e-12


def test_attention_keeps_its_causal_mask_when_its_dropout_is_stripped():
    class Causal(nn.Module):
        def forward(self, x):
            return F.scaled_dot_product_attention(x, x, x, None, 0.5, True)

    x = noise(2, 5, 4)
    simplified = simplify(Causal().eval(), (x,)).model
    expected = F.scaled_dot_product_attention(x, x, x, is_causal=True)
    torch.testing.assert_close(simplified(x), expected)


@pytest.mark.parametrize(
    "dropout", [nn.Dropout, nn.Dropout2d, nn.AlphaDropout, nn.FeatureAlphaDropout]
)
def test_every_dropout_module_is_stripped_even_between_a_convolution_and_its_batchnorm(dropout):
    model = randomized(Chain(nn.Conv2d(3, 4, 1), dropout(0.5), nn.Identity(), nn.BatchNorm2d(4)))
    report = simplify(model, (noise(2, 3, 4, 4),)).report
    assert (report.after.batchnorms, report.after.dropouts) == (0, 0)
    assert set(report.site_errors) == {"1", "3"}


def test_code_that_insists_on_float32_is_still_proved_in_float64():
    class Insists(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
            self.plain = noise(4, 4, 1, 1)  # neither parameter nor buffer

        def forward(self, x):
            x = self.norm(self.conv(x)).float() + torch.zeros(4, 1, 1, dtype=torch.float32)
            x = F.conv2d(x, self.plain).to(torch.float32) + torch.ones(1)
            return F.softmax(x, 1, dtype=torch.float32).mean((2, 3))

    report = simplify(randomized(Insists()), (noise(2, 3, 4, 4),)).report
    assert report.model_error < 1e-14
    assert report.trace_error < 1e-14


def test_a_half_precision_model_stays_half_precision():
    model = randomized(small_cnn()).bfloat16()
    simplified = simplify(model, (noise(2, 3, 8, 8).bfloat16(),)).model
    assert {parameter.dtype for parameter in simplified.parameters()} == {torch.bfloat16}


class Fails(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.how = how

    def forward(self, x):
        return self.how(x)


@pytest.mark.parametrize(
    "how",
    [
        lambda x: x.view(2, -1),
        lambda x: x + (1 if x.sum() > 0 else 2),
        lambda x: x + torch.from_numpy(x.numpy()),
        lambda x: x + 1 if x.shape[0] == 2 else x,
        lambda x: x + torch.zeros(int(x.shape[0]), 1),
        lambda x: x + x[x > 0].sum(),
    ],
)
def test_a_model_that_depends_on_values_or_on_the_batch_size_is_refused_with_the_reason(
    how, capsys
):
    with pytest.raises(BadInputError, match=r"found: [A-Z][A-Za-z]+: .{20,}"):
        simplify(Fails(how).eval(), (noise(2, 3),))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_a_simplified_model_takes_every_batch_size_whatever_the_examples_have(batch):
    simplified = simplify(randomized(AttentionBlock()), (noise(batch, 3, 8, 8),)).model
    for size in (1, 2, 7):
        assert simplified(noise(size, 3, 8, 8)).shape == (size, 4)


@pytest.mark.parametrize(("name", "value"), [("0.weight", float("nan")), ("1.bias", float("inf"))])
def test_a_weight_that_is_not_finite_is_refused_by_name(name, value):
    model = randomized(small_cnn())
    model.get_parameter(name).data[0] = value
    with pytest.raises(BadInputError, match=f"parameter '{name}'"):
        simplify(model, (noise(2, 3, 8, 8),))


def test_a_running_statistic_of_nan_is_refused_by_name():
    model = randomized(small_cnn())
    model[1].running_mean[0] = float("nan")
    with pytest.raises(BadInputError, match=r"buffer '1\.running_mean' holds NaN"):
        simplify(model, (noise(2, 3, 8, 8),))


def test_outputs_that_are_not_finite_are_refused():
    with pytest.raises(BadInputError, match="finite numbers; found: NaN or infinity"):
        simplify(Fails(lambda x: x.abs().neg().log()).eval(), (noise(2, 3),))


def test_mixed_precision_weights_are_refused_by_name():
    model = randomized(small_cnn())
    model[4].bfloat16()
    with pytest.raises(
        BadInputError, match=r"0\.weight is torch\.float32, 4\.weight is torch\.bfloat16"
    ):
        simplify(model, (noise(2, 3, 8, 8),))


def test_a_model_that_cannot_be_copied_is_refused():
    model = randomized(small_cnn())
    model.kept = model[0](noise(1, 3, 8, 8))  # not a leaf: it has a gradient
    with pytest.raises(BadInputError, match=r"copy\.deepcopy fails"):
        simplify(model, (noise(2, 3, 8, 8),))


def test_example_inputs_of_different_batch_sizes_are_refused():
    with pytest.raises(BadInputError, match="batches of one size"):
        simplify(nn.Bilinear(3, 3, 2).eval(), (noise(2, 3), noise(3, 3)))


def test_the_simplified_model_has_the_same_input_and_output_names():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

        def forward(self, pixels, weight):
            features = self.norm(self.conv(pixels)).mean((2, 3))
            return {"features": features, "logits": (features * weight, features.relu())}

    model, inputs = randomized(Named()), (noise(2, 3, 4, 4), noise(2, 4))
    simplified = simplify(model, inputs).model
    outputs, expected = simplified(*inputs), model(*inputs)
    assert [n.target for n in simplified.graph.nodes if n.op == "placeholder"] == [
        "pixels",
        "weight",
    ]
    assert list(outputs) == ["features", "logits"] and isinstance(outputs["logits"], tuple)
    torch.testing.assert_close(outputs, expected, rtol=1e-4, atol=1e-5)
    by_name = simplified(weight=inputs[1], pixels=inputs[0])
    torch.testing.assert_close(by_name, outputs)
