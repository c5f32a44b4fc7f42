import pytest
import torch
from torch import nn

from edgereg.errors import RecipeError
from edgereg.train.optim import OptimConfig, build_optimizer, build_schedule


def rates(config, steps):
    optimizer = build_optimizer(nn.Linear(1, 1), config)
    schedule = build_schedule(optimizer, config, steps=steps)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return torch.tensor(found), optimizer.param_groups[0]["lr"]


def test_the_rate_rises_in_a_line_and_falls_as_a_cosine():
    found, last = rates(OptimConfig(lr=2.0, warmup=0.1), 100)
    rise = torch.arange(1, 11) / 11 * 2
    fall = 1 + torch.cos(torch.pi * torch.arange(90) / 90)
    assert torch.allclose(found, torch.cat([rise, fall]), atol=1e-6)
    assert last == pytest.approx(0, abs=1e-9)


def test_without_warm_up_the_first_step_is_the_largest():
    found, _ = rates(OptimConfig(lr=0.5, warmup=0), 10)
    assert found[0] == 0.5 and (found.diff() < 0).all()


def test_a_run_of_one_step_has_a_rate():
    found, _ = rates(OptimConfig(lr=0.5, warmup=0.9), 1)
    assert found[0] > 0


@pytest.mark.parametrize(("name", "kind"), [("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD)])
def test_the_optimizer_is_the_one_asked_for(name, kind):
    assert type(build_optimizer(nn.Linear(1, 1), OptimConfig(name))) is kind


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lr", 0),
        ("lr", float("nan")),
        ("weight_decay", -1),
        ("momentum", 1),
        ("warmup", 1),
        ("clip", -1),
    ],
)
def test_impossible_settings_are_named(key, value):
    with pytest.raises(RecipeError, match=rf"optim\.{key}: {value}"):
        OptimConfig(**{key: value})
