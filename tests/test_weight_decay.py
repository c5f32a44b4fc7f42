import pytest
import torch
from torch import nn

from edgereg.errors import RecipeError
from edgereg.models.zoo import MODELS, ModelConfig, build_model
from edgereg.regularize.stages import stages
from edgereg.regularize.weight_decay import parameter_groups
from edgereg.train.optim import OptimConfig, build_optimizer


def names_in(model, group):
    wanted = {id(p) for p in group["params"]}
    return {name for name, p in model.named_parameters() if id(p) in wanted}


def test_only_weights_decay():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2), nn.LayerNorm(2))
    decayed, kept = parameter_groups(model, weight_decay=0.3)
    assert names_in(model, decayed) == {"0.weight", "2.weight"}
    assert names_in(model, kept) == {
        "0.bias", "1.weight", "1.bias", "2.bias", "3.weight", "3.bias"
    }  # fmt: skip
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.3, 0.0)
    assert decayed["lr_scale"] == kept["lr_scale"] == 1


def test_position_embeddings_do_not_decay():
    model = build_model(ModelConfig("vit"), num_classes=3)
    decayed, kept = parameter_groups(model, weight_decay=0.3)
    assert "backbone.position" in names_in(model, kept)
    assert "backbone.blocks.0.attention.query.weight" in names_in(model, decayed)


@pytest.mark.parametrize("layer_decay", [1.0, 0.7])
@pytest.mark.parametrize("name", MODELS)
def test_each_parameter_is_in_one_group(name, layer_decay):
    model = build_model(ModelConfig(name), num_classes=3)
    groups = parameter_groups(model, weight_decay=0.1, layer_decay=layer_decay)
    members = [p for group in groups for p in group["params"]]
    assert all(group["params"] for group in groups)
    assert len(members) == len({id(p) for p in members}) == len(list(model.parameters()))


def test_frozen_parameters_are_left_out():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    groups = parameter_groups(model, weight_decay=0.1)
    assert {n for g in groups for n in names_in(model, g)} == {"1.weight", "1.bias"}


@pytest.mark.parametrize("name", [*MODELS, "torchvision:resnet18"])
def test_a_stage_learns_the_slower_the_farther_it_is_from_the_head(name):
    model = build_model(ModelConfig(name), num_classes=3)
    around = nn.ModuleDict({"model": model, "other": nn.Linear(2, 2)})
    groups = parameter_groups(around, weight_decay=0.1, backbone_lr=0.5, layer_decay=0.8)
    scales = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    rows = stages(model)
    for distance, (stage, parameters) in enumerate(reversed(rows)):
        expected = 0.8**distance * (1 if stage == "head" else 0.5)
        assert {scales[id(p)] for p in parameters} == {expected}
    assert {scales[id(p)] for p in around["other"].parameters()} == {1.0}


def test_the_rate_of_the_backbone_alone_makes_two_kinds():
    model = build_model(ModelConfig(), num_classes=3)
    groups = parameter_groups(model, weight_decay=0.1, backbone_lr=0.1)
    assert [(g["lr_scale"], g["weight_decay"]) for g in groups] == [
        (1.0, 0.1), (1.0, 0.0), (0.1, 0.1), (0.1, 0.0)
    ]  # fmt: skip
    assert names_in(model, groups[0]) == {"head.weight"}


def test_stages_without_a_classifier_are_refused():
    with pytest.raises(RecipeError, match=r"optim\.layer_decay: 0\.5"):
        parameter_groups(nn.Linear(2, 2), weight_decay=0.1, layer_decay=0.5)


class Bowl(nn.Module):
    """1/2 a (w - b)^2 with a = 2, b = 3; w decays, the unused bias does not."""

    def __init__(self, start):
        super().__init__()
        self.weight = nn.Parameter(torch.full((1, 1), start, dtype=torch.float64))
        self.bias = nn.Parameter(torch.full((1,), start, dtype=torch.float64))

    def forward(self):
        return (self.weight - 3).square().sum() + (self.bias - 3).square().sum()


def settle(config, *, start, steps):
    model = Bowl(start)
    optimizer = build_optimizer(model, config)
    for _ in range(steps):
        optimizer.zero_grad()
        model().backward()
        optimizer.step()
    return model.weight.item(), model.bias.item()


# On 1/2 a (w - b)^2 penalty and decay settle at different points: a b / (a + lambda) = 2.4, and
# where Adam's step, the gradient's sign, balances the decay: 1 / lambda = 2.
@pytest.mark.parametrize(
    "config",
    [
        OptimConfig("sgd", lr=0.02, weight_decay=0.5, momentum=0.0),
        OptimConfig("sgd", lr=0.02, weight_decay=0.5, momentum=0.9),
        OptimConfig("adamw", lr=0.02, weight_decay=0.5, decay="l2"),
    ],
    ids=["sgd", "momentum", "adam"],
)
def test_a_penalty_is_in_the_gradient(config):
    weight, bias = settle(config, start=2.2, steps=800)
    assert weight == pytest.approx(2 * 3 / (2 + 0.5), abs=1e-3)
    assert bias == pytest.approx(3, abs=1e-3)


def test_adamw_decays_apart_from_the_gradient():
    # from between the two fixed points: decay in the gradient would pull to 2.4
    config = OptimConfig("adamw", lr=0.01, weight_decay=0.5)
    weight, bias = settle(config, start=2.2, steps=2500)
    assert weight == pytest.approx(1 / 0.5, abs=0.05)  # Adam's step is the gradient's sign
    assert bias == pytest.approx(3, abs=0.02)
