import pytest
import torch
from torch import nn

from edgereg.errors import RecipeError
from edgereg.train.optim import OptimConfig, build_optimizer
from edgereg.train.sgd import DecoupledSgd, Lars

KINDS = {
    ("adamw", "usual"): torch.optim.AdamW,
    ("adamw", "decoupled"): torch.optim.AdamW,
    ("adamw", "l2"): torch.optim.Adam,
    ("sgd", "usual"): torch.optim.SGD,
    ("sgd", "l2"): torch.optim.SGD,
    ("sgd", "decoupled"): DecoupledSgd,
    ("lars", "usual"): Lars,
}


@pytest.mark.parametrize(("choice", "kind"), KINDS.items())
def test_the_optimizer_is_the_one_asked_for(choice, kind):
    name, decay = choice
    assert type(build_optimizer(nn.Linear(1, 1), OptimConfig(name, decay=decay))) is kind


@pytest.mark.parametrize(
    ("name", "decay", "fixed"),
    [
        ("sgd", "l2", 2.4),
        ("adamw", "l2", 2.4),
        ("adamw", "decoupled", 2.0),
        ("sgd", "decoupled", 2.4),
    ],
)
def test_the_penalty_and_the_decay_have_two_fixed_points(name, decay, fixed):
    """On 1/2 a (w - b)^2 with a = 2, b = 3, lambda = 0.5: a b / (a + lambda), or 1 / lambda.

    AdamW's gradient has its size divided out, so that 1 = lambda |w| there. SGD's has not: there
    the two kinds of decay differ by a factor of the rate, and meet in the same point.
    """
    weight = nn.Parameter(torch.tensor([[1.0]], dtype=torch.float64))
    module = nn.Module()
    module.weight = weight
    optimizer = build_optimizer(
        module, OptimConfig(name, lr=0.01, weight_decay=0.5, decay=decay, momentum=0.0)
    )
    for _ in range(8000):
        optimizer.zero_grad()
        (0.5 * 2 * (weight - 3) ** 2).sum().backward()
        optimizer.step()
    assert weight.item() == pytest.approx(fixed, abs=0.02)


def _reference_lars(weight, gradients, *, lr, momentum, decay, trust=0.001):
    """1708.03888, algorithm 1."""
    w, v = weight.clone(), torch.zeros_like(weight)
    for g in gradients:
        local = trust * w.norm() / (g.norm() + decay * w.norm())
        v = momentum * v + lr * local * (g + decay * w)
        w = w - v
    return w


def test_lars_is_its_algorithm():
    torch.manual_seed(0)
    module = nn.Linear(4, 3, dtype=torch.float64)
    start = module.weight.detach().clone()
    optimizer = build_optimizer(module, OptimConfig("lars", lr=5.0, weight_decay=0.1))
    gradients = [torch.randn(3, 4, dtype=torch.float64) for _ in range(6)]
    for gradient in gradients:
        module.weight.grad, module.bias.grad = gradient.clone(), torch.ones(3, dtype=torch.float64)
        optimizer.step()
    wanted = _reference_lars(start, gradients, lr=5.0, momentum=0.9, decay=0.1)
    assert (module.weight - wanted).abs().max() < 1e-12


def test_lars_leaves_biases_at_the_plain_rate():
    module = nn.Linear(4, 3)
    before = module.bias.detach().clone()
    optimizer = build_optimizer(module, OptimConfig("lars", lr=0.5, weight_decay=0.1))
    module.bias.grad = torch.ones(3)
    optimizer.step()
    assert torch.allclose(module.bias, before - 0.5)


def test_a_layer_of_zeros_still_moves_under_lars():
    module = nn.Linear(4, 3)
    nn.init.zeros_(module.weight)
    optimizer = build_optimizer(module, OptimConfig("lars", lr=0.5, weight_decay=0.0))
    module.weight.grad = torch.ones(3, 4)
    optimizer.step()
    assert torch.allclose(module.weight, torch.full((3, 4), -0.5))


def test_decoupled_decay_does_not_enter_the_momentum():
    weight = nn.Parameter(torch.ones(2, 2))
    optimizer = DecoupledSgd([{"params": [weight], "weight_decay": 0.5}], lr=0.1, momentum=0.9)
    weight.grad = torch.zeros(2, 2)
    optimizer.step()
    assert torch.allclose(weight, torch.full((2, 2), 0.95))
    assert optimizer.state[weight]["momentum_buffer"].abs().max() == 0
    assert optimizer.param_groups[0]["weight_decay"] == 0.5


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lr", 0),
        ("lr", float("nan")),
        ("weight_decay", -1),
        ("momentum", 1),
        ("warmup", 1),
        ("final_lr", 1.5),
        ("clip", -1),
        ("layer_decay", 0),
    ],
)
def test_impossible_settings_are_named(key, value):
    with pytest.raises(RecipeError, match=rf"optim\.{key}: {value}"):
        OptimConfig(**{key: value})
