import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from ssl_setup import draws, setup
from torch import nn

from edgereg.errors import RecipeError
from edgereg.ssl.simclr import SimClr, SimClrConfig, nt_xent

PROPERTY = settings(max_examples=25, deadline=None, derandomize=True, database=None)


def _reference_nt_xent(first, second, tau):
    """Equation 1 of 2002.05709, pair by pair; i and j run over all 2N views."""
    z = [*first.tolist(), *second.tolist()]

    def sim(a, b):
        dot = sum(x * y for x, y in zip(a, b, strict=True))
        return dot / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(y * y for y in b))

    total = 0.0
    for i in range(len(z)):
        j = (i + len(first)) % len(z)
        others = sum(math.exp(sim(z[i], z[k]) / tau) for k in range(len(z)) if k != i)
        total -= math.log(math.exp(sim(z[i], z[j]) / tau) / others)
    return total / len(z)


def pair(count, dim, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, count, dim, generator=generator, dtype=torch.float64)


@PROPERTY
@given(
    count=st.integers(1, 6), dim=st.integers(2, 5), tau=st.floats(0.1, 2), seed=st.integers(0, 9)
)
def test_the_loss_is_equation_1(count, dim, tau, seed):
    first, second = pair(count, dim, seed)
    expected = _reference_nt_xent(first, second, tau)
    assert nt_xent(first, second, temperature=tau).item() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("count", [1, 4, 32])
def test_equal_views_at_right_angles_have_the_closed_form(count):
    z = torch.eye(max(count, 2), dtype=torch.float64)[:count]
    expected = math.log(1 + 2 * (count - 1) * math.exp(-1 / 0.5))
    assert nt_xent(z, z, temperature=0.5).item() == pytest.approx(expected, abs=1e-12)
    if count == 4:
        assert expected == pytest.approx(0.594438, abs=1e-6)  # as lightly's NTXentLoss has it


def test_lengths_do_not_matter_but_partners_do():
    first, second = pair(5, 4)
    loss = nt_xent(first, second, temperature=0.5)
    assert torch.allclose(nt_xent(3 * first, second / 7, temperature=0.5), loss)
    near = first + 0.01 * second
    assert nt_xent(first, near, temperature=0.5) < nt_xent(first, near.roll(1, 0), temperature=0.5)


def test_the_views_of_an_image_differ_and_come_back_with_the_same_draws():
    chain = [{"flip": {}}, {"rgb_shift": {"shift": 0.2}}]
    method = SimClr(setup(nn.Identity(), augment=chain), SimClrConfig())
    images = torch.full((4, 3, 8, 8), 128, dtype=torch.uint8)
    (views,) = method.views(images, draws(4))
    assert views.shape == (8, 3, 8, 8)
    assert (views[:4] != views[4:]).flatten(1).any(dim=1).all()
    assert torch.equal(method.views(images, draws(4))[0], views)
    assert not torch.equal(method.views(images, draws(4, epoch=1))[0], views)


def test_it_learns_to_tell_images_apart():
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 8))
    method = SimClr(setup(backbone), SimClrConfig(hidden=16, dim=8))
    noise = torch.randn(2, 16, 3, 8, 8)
    views = (torch.cat([noise[0], noise[0] + 0.3 * noise[1]]),)
    optimizer = torch.optim.Adam(method.parameters(), lr=0.01)
    losses = []
    for _ in range(40):
        loss = method(views, torch.arange(16))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5


def test_half_precision_comes_to_a_loss_in_full():
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 8))
    method = SimClr(setup(backbone), SimClrConfig(hidden=16, dim=8, temperature=0.01))
    with torch.autocast("cpu", torch.bfloat16):
        loss = method((torch.randn(8, 3, 8, 8),), torch.arange(4))
    assert loss.dtype == torch.float32 and loss.isfinite()
    assert F.relu(loss) == loss


@pytest.mark.parametrize(("key", "value"), [("temperature", 0), ("hidden", 0), ("dim", 1)])
def test_impossible_settings_are_named(key, value):
    with pytest.raises(RecipeError, match=rf"simclr\.{key}: {value}"):
        SimClrConfig(**{key: value})
