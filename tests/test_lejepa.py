import cmath
import math

import pytest
import torch
import torch.nn.functional as F
from ssl_setup import draws, setup
from torch import nn

from edgereg.errors import RecipeError
from edgereg.ssl.lejepa import LeJepa, LeJepaConfig, lejepa_loss, sigreg


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _reference_statistic(values):
    """T of (N,) values in closed form, integrated over the whole line (the guide, section 4)."""
    n = len(values)
    pairs = sum(math.exp(-((a - b) ** 2) / 2) for a in values for b in values)
    singles = sum(math.exp(-(a**2) / 4) for a in values)
    total = math.sqrt(2 * math.pi) / n**2 * pairs - 2 * math.sqrt(math.pi) / n * singles
    return n * (total + math.sqrt(2 * math.pi / 3))


def _reference_trapezoid(values):
    """T of (N,) values with 17 knots on [0, 3], doubled by symmetry."""
    n, step, total = len(values), 3 / 16, 0.0
    for knot in range(17):
        t = knot * step
        phi = sum(cmath.exp(1j * t * x) for x in values) / n
        weight = step if knot in (0, 16) else 2 * step
        total += weight * abs(phi - math.exp(-(t**2) / 2)) ** 2 * math.exp(-(t**2) / 2)
    return n * total


@pytest.mark.parametrize("scale", [0.3, 1.0, 2.0])
def test_a_slice_is_the_trapezoid_and_nearly_the_integral(scale):
    values = scale * normal(40) + 0.2
    found = sigreg(values[None, :, None], torch.ones(1, 1, dtype=torch.float64)).item()
    assert found == pytest.approx(_reference_trapezoid(values.tolist()), rel=1e-9)
    assert found == pytest.approx(_reference_statistic(values.tolist()), rel=0.02)


def test_views_and_slices_are_averaged():
    z = normal(2, 12, 3)
    slices = F.normalize(normal(3, 5, seed=1), dim=0)
    each = [_reference_trapezoid((z[v] @ slices[:, s]).tolist()) for v in (0, 1) for s in range(5)]
    assert sigreg(z, slices).item() == pytest.approx(sum(each) / 10, rel=1e-9)


@pytest.mark.parametrize("spoil", [lambda z: 0 * z, lambda z: 3 * z, lambda z: z + 1.5, torch.sign])
def test_what_is_no_standard_normal_costs_more(spoil):
    z = normal(1, 512, 2)
    slices = torch.eye(2, dtype=torch.float64)
    assert sigreg(spoil(z), slices) > 5 * sigreg(z, slices)


def test_the_loss_weighs_sigreg_and_disagreement():
    z, slices = normal(3, 10, 4), F.normalize(normal(4, 6, seed=1), dim=0)
    centre = z.mean(dim=0)
    apart = sum(float(((z[v] - centre) ** 2).sum()) for v in range(3)) / z.numel()
    expected = 0.1 * sigreg(z, slices).item() + 0.9 * apart
    assert lejepa_loss(z, slices, weight=0.1).item() == pytest.approx(expected, rel=1e-9)


def test_directions_are_drawn_from_the_seeded_generator_and_views_are_as_many_as_asked():
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 8))
    config = LeJepaConfig(views=3, hidden=16, dim=4, slices=8)
    method = LeJepa(setup(backbone, augment=[{"flip": {}}]), config)
    views = method.views(torch.randint(0, 256, (6, 3, 8, 8), dtype=torch.uint8), draws(6))
    assert views[0].shape == (18, 3, 8, 8)
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(method(views, torch.arange(6)).item())
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize(
    ("key", "value"),
    [("weight", 0), ("views", 1), ("views", 65), ("slices", 0), ("hidden", 0), ("dim", 1)],
)
def test_impossible_settings_are_named(key, value):
    with pytest.raises(RecipeError, match=rf"lejepa\.{key}: {value}"):
        LeJepaConfig(**{key: value})
