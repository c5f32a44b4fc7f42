import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ssl_setup import setup
from torch import nn

from edgereg.errors import RecipeError
from edgereg.ssl.vicreg import VicReg, VicRegConfig, vicreg_loss

PROPERTY = settings(max_examples=25, deadline=None, derandomize=True, database=None)


def _reference_vicreg(first, second, config):
    """Equations 1 to 6 of 2105.04906, sum by sum; v is halved as in the released code."""
    n, d = first.shape
    invariance = sum(float(x) ** 2 for x in (first - second).flatten()) / first.numel()
    variance = covariance = 0.0
    for z in (first, second):
        means = [float(z[:, j].sum()) / n for j in range(d)]
        c = [
            [
                sum(float((z[i, j] - means[j]) * (z[i, k] - means[k])) for i in range(n)) / (n - 1)
                for k in range(d)
            ]
            for j in range(d)
        ]
        variance += sum(max(0.0, 1 - (c[j][j] + 1e-4) ** 0.5) for j in range(d)) / d / 2
        covariance += sum(c[j][k] ** 2 for j in range(d) for k in range(d) if j != k) / d
    return (
        config.invariance * invariance + config.variance * variance + config.covariance * covariance
    )


def pair(count, dim, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, count, dim, generator=generator, dtype=torch.float64)


@PROPERTY
@given(
    count=st.integers(2, 6),
    dim=st.integers(1, 4),
    weights=st.tuples(*[st.floats(0.1, 30)] * 3),
    seed=st.integers(0, 9),
)
def test_the_loss_is_that_of_the_paper(count, dim, weights, seed):
    config = VicRegConfig(*weights)
    first, second = pair(count, dim, seed)
    expected = _reference_vicreg(first, second, config)
    assert vicreg_loss(first, second, config).item() == pytest.approx(expected, rel=1e-9)


def test_embeddings_that_are_all_the_same_cost_what_the_hinge_says():
    same = torch.ones(8, 4, dtype=torch.float64)
    loss = vicreg_loss(same, same, VicRegConfig())
    assert loss.item() == pytest.approx(25 * (1 - 1e-4**0.5), rel=1e-12)


def test_white_embeddings_that_agree_cost_nothing():
    z = torch.linalg.qr(pair(64, 4)[0] - pair(64, 4)[0].mean(dim=0)).Q
    z = (z - z.mean(dim=0)) * 64**0.5 * 1.01
    assert vicreg_loss(z, z, VicRegConfig()).item() < 1e-3


@pytest.mark.parametrize(
    ("config", "moves"),
    [(VicRegConfig(variance=0, covariance=0), False), (VicRegConfig(), True)],
)
def test_the_variance_term_alone_keeps_constant_views_apart(config, moves):
    """The negative control of collapse: without it nothing pushes equal embeddings apart."""
    z = torch.full((8, 4), 0.5, dtype=torch.float64) + 1e-3 * pair(8, 4)[0]
    z.requires_grad_()
    vicreg_loss(z, z.clone(), config).backward()
    spread = (z.detach() - 0.1 * z.grad).std(dim=0).mean() / z.detach().std(dim=0).mean()
    assert (spread > 2) == moves


def test_it_answers_with_a_finite_loss_under_half_precision():
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 8))
    method = VicReg(setup(backbone), VicRegConfig(dim=16))
    with torch.autocast("cpu", torch.bfloat16):
        loss = method((torch.randn(8, 3, 8, 8),), torch.arange(4))
    assert loss.dtype == torch.float32 and loss.isfinite()


@pytest.mark.parametrize(
    ("key", "value"), [("invariance", 0), ("variance", -1), ("covariance", -1), ("dim", 1)]
)
def test_impossible_settings_are_named(key, value):
    with pytest.raises(RecipeError, match=rf"vicreg\.{key}: {value}"):
        VicRegConfig(**{key: value})
