import pytest
import torch
from torch import nn

from edgereg.models.zoo import MODELS, ModelConfig, build_model
from edgereg.regularize.weight_decay import decay_groups
from edgereg.train.optim import OptimConfig, build_optimizer


def names_in(model, group):
    wanted = {id(p) for p in group["params"]}
    return {name for name, p in model.named_parameters() if id(p) in wanted}


def test_only_weights_decay():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2), nn.LayerNorm(2))
    decayed, kept = decay_groups(model, 0.3)
    assert names_in(model, decayed) == {"0.weight", "2.weight"}
    assert names_in(model, kept) == {
        "0.bias", "1.weight", "1.bias", "2.bias", "3.weight", "3.bias"
    }  # fmt: skip
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.3, 0.0)


def test_position_embeddings_do_not_decay():
    model = build_model(ModelConfig("vit"), num_classes=3)
    decayed, kept = decay_groups(model, 0.3)
    assert "backbone.position" in names_in(model, kept)
    assert "backbone.blocks.0.attention.query.weight" in names_in(model, decayed)


@pytest.mark.parametrize("name", MODELS)
def test_each_parameter_is_in_one_group(name):
    model = build_model(ModelConfig(name), num_classes=3)
    members = [p for group in decay_groups(model, 0.1) for p in group["params"]]
    assert len(members) == len({id(p) for p in members}) == len(list(model.parameters()))


def test_frozen_parameters_are_left_out():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    assert {n for g in decay_groups(model, 0.1) for n in names_in(model, g)} == {
        "1.weight",
        "1.bias",
    }


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


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_decays_in_the_gradient(momentum):
    config = OptimConfig("sgd", lr=0.02, weight_decay=0.5, momentum=momentum)
    weight, bias = settle(config, start=0.0, steps=600)
    assert weight == pytest.approx(2 * 3 / (2 + 0.5), abs=1e-4)  # a b / (a + lambda)
    assert bias == pytest.approx(3, abs=1e-4)


def test_adamw_decays_apart_from_the_gradient():
    # from between the two fixed points: decay in the gradient would pull to 2.4
    config = OptimConfig("adamw", lr=0.01, weight_decay=0.5)
    weight, bias = settle(config, start=2.2, steps=2500)
    assert weight == pytest.approx(1 / 0.5, abs=0.05)  # Adam's step is the gradient's sign
    assert bias == pytest.approx(3, abs=0.02)
