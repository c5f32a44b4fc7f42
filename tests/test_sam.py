import pytest
import torch
from torch import nn

from edgereg.errors import RecipeError
from edgereg.regularize.batchnorm import hold_statistics
from edgereg.regularize.sam import SamConfig, ascend, descend

CURVATURE = torch.tensor([1.0, 4.0, 9.0])


def quadratic():
    """1/2 sum a w^2, whose gradient is a w."""
    weight = nn.Parameter(torch.tensor([0.3, -0.2, 1 / 3]))
    (0.5 * CURVATURE * weight**2).sum().backward()
    return weight


def test_the_worst_point_is_that_of_equation_2():
    weight = quadratic()
    start, gradient = weight.detach().clone(), weight.grad.clone()
    ascend([weight], SamConfig(rho=0.1))
    assert (weight - (start + 0.1 * gradient / gradient.norm())).abs().max() < 1e-7
    assert (weight - start).norm().item() == pytest.approx(0.1, rel=1e-5)


def test_the_adaptive_point_is_that_of_its_equation_4():
    weight = quadratic()
    start, gradient = weight.detach().clone(), weight.grad.clone()
    ascend([weight], SamConfig(rho=0.5, adaptive=True))
    scaled = start.abs() * gradient
    wanted = start + 0.5 * start**2 * gradient / scaled.norm()
    assert (weight - wanted).abs().max() < 1e-7


def test_the_norm_is_over_all_weights():
    parts, whole = [quadratic(), quadratic()], SamConfig(rho=0.1)
    start = [p.detach().clone() for p in parts]
    ascend(parts, whole)
    moved = torch.cat([p.detach() - s for p, s in zip(parts, start, strict=True)])
    assert moved.norm().item() == pytest.approx(0.1, rel=1e-5)


@pytest.mark.parametrize("adaptive", [False, True])
def test_the_weights_come_back_to_the_bit(adaptive):
    weight, frozen = quadratic(), nn.Parameter(torch.ones(2))
    start = weight.detach().clone()
    before = ascend([frozen, weight], SamConfig(rho=0.7, adaptive=adaptive))
    assert not torch.equal(weight, start) and torch.equal(frozen, torch.ones(2))
    weight.grad = torch.ones(3)
    descend([frozen, weight], before)
    assert torch.equal(weight, start) and torch.equal(weight.grad, torch.ones(3))


def test_a_gradient_of_zero_moves_nothing():
    weight = nn.Parameter(torch.ones(3))
    weight.grad = torch.zeros(3)
    ascend([weight], SamConfig(rho=0.1))
    assert torch.equal(weight, torch.ones(3))


def test_statistics_are_held_and_the_output_is_that_of_training():
    norm = nn.BatchNorm1d(4)
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    before = {k: v.clone() for k, v in norm.state_dict().items()}
    with hold_statistics(nn.Sequential(norm)):
        held = norm(x)
    assert all(torch.equal(v, before[k]) for k, v in norm.state_dict().items())
    assert torch.equal(held, norm(x)) and norm.num_batches_tracked == 1


def test_a_frozen_norm_stays_frozen():
    norm = nn.BatchNorm1d(4).eval()
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    with hold_statistics(norm):
        assert torch.equal(norm(x), norm.eval()(x))


def test_a_negative_radius_is_refused():
    with pytest.raises(RecipeError, match=r"sam\.rho: -0\.1"):
        SamConfig(rho=-0.1)
