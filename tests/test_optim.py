import pytest
import torch
from torch import nn

from edgereg.errors import RecipeError
from edgereg.models.zoo import ModelConfig, build_model
from edgereg.train.muon import Muon, orthogonalized
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
    ("muon", "usual"): Muon,
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


@pytest.mark.parametrize("shape", [(8, 8), (6, 20), (20, 6), (1, 5)])
def test_muon_makes_the_singular_values_nearly_one_and_keeps_the_directions(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    found = u.T @ orthogonalized(matrix) @ v.T
    strong = s > s.max() / 50  # five steps lift a singular value by 3.4 each, at most
    assert strong.any() and ((found.diag()[strong] > 0.6) & (found.diag()[strong] < 1.3)).all()
    assert (found - torch.diag(found.diag())).abs().max() < 0.05, "bfloat16's rounding"
    assert torch.equal(orthogonalized(torch.zeros(shape)), torch.zeros(shape))


def test_muon_moves_hidden_matrices_and_adamw_the_rest():
    """The image's convolution, the head, biases, norms and depthwise kernels are AdamW's."""
    model = build_model(ModelConfig("torchvision:mobilenet_v2"), num_classes=3)
    optimizer = build_optimizer(model, OptimConfig("muon"))
    names = {id(p): name for name, p in model.named_parameters()}
    found = {
        names[id(p)]: group["is_matrix"]
        for group in optimizer.param_groups
        for p in group["params"]
    }
    assert found.keys() == set(names.values())
    assert found["backbone.features.2.conv.0.0.weight"], "1x1"
    for other in (
        "backbone.features.0.0.weight",
        "backbone.features.2.conv.1.0.weight",
        "backbone.features.2.conv.0.1.weight",
        "head.weight",
        "head.bias",
    ):
        assert not found[other], other


def test_muon_is_its_formula_with_decay_and_momentum():
    torch.manual_seed(0)
    module = nn.Conv2d(4, 6, 3, bias=False)
    wanted, moment = module.weight.detach().clone(), torch.zeros(6, 4, 3, 3)
    optimizer = build_optimizer(module, OptimConfig("muon", lr=0.1, weight_decay=0.5, momentum=0.8))
    for _ in range(3):
        gradient = torch.randn(6, 4, 3, 3)
        module.weight.grad = gradient.clone()
        optimizer.step()
        moment = 0.8 * moment + gradient
        step = orthogonalized((gradient + 0.8 * moment).reshape(6, 36)).reshape(6, 4, 3, 3)
        wanted = (1 - 0.1 * 0.5) * wanted - 0.1 * 0.2 * 6 * step
    assert torch.allclose(module.weight, wanted, atol=1e-6)


def test_muons_state_is_saved_and_loaded():
    def made():
        torch.manual_seed(0)
        module = build_model(ModelConfig("convnet", width=8), num_classes=3)
        return module, build_optimizer(module, OptimConfig("muon"))

    def step(pair, seed):
        torch.manual_seed(seed)
        for parameter in pair[0].parameters():
            parameter.grad = torch.randn_like(parameter)
        pair[1].step()

    whole, first, second = made(), made(), made()
    step(whole, 1)
    step(whole, 2)
    step(first, 1)
    second[0].load_state_dict(first[0].state_dict())
    second[1].load_state_dict(first[1].state_dict())
    step(second, 2)
    for a, b in zip(whole[0].parameters(), second[0].parameters(), strict=True):
        assert torch.equal(a, b)


def test_muon_has_no_penalty_in_the_gradient():
    with pytest.raises(RecipeError, match=r"optim\.decay"):
        OptimConfig("muon", decay="l2")
