"""Corners of legal models in which a rewrite, or the proof of it, once was wrong."""

import pytest
import torch
from export_models import noise, randomized
from torch import nn
from torch.nn import functional as F

from deploy.errors import BadInputError, CheckFailedError
from export.passes import into_consumers
from export.passes.simplify import simplify
from export.traced.layers import scale_inputs


class Corner(nn.Module):
    """A convolution, a linear layer and a BatchNorm, and what a test does with them."""

    def __init__(self, compute):
        super().__init__()
        self.conv, self.linear, self.norm = nn.Conv2d(3, 4, 1), nn.Linear(4, 3), nn.BatchNorm2d(4)
        self.gain = nn.Parameter(torch.ones(4, 1, 1))
        self.vector = nn.Parameter(torch.ones(4))
        self.register_buffer("whole", torch.arange(4).view(4, 1, 1))
        self.register_buffer("holed", torch.tensor([1.0, 0.0, 2.0, 3.0]).view(4, 1, 1))
        self.compute = compute

    def forward(self, x):
        return self.compute(self, x)


def squared(m, x):
    y = m.conv(x)
    return y * y * m.gain


def padded_with_ones(m, x):
    return F.pad(m.conv(x), (1, 1, 1, 1), value=1.0) * m.gain


def whole_numbers_added(m, x):
    return m.norm(m.conv(x) + m.whole)


def divided_by_zero(m, x):
    return torch.tanh(m.conv(x) / m.holed)


def accumulated(m, x):
    return m.norm(torch.cat([torch.tensor([]), m.conv(x)], 1))


def empty_output(m, x):
    y = m.conv(x)
    return y, y[:, 0:0]


def vector_of_weights(m, x):
    return F.linear(m.conv(x).mean((2, 3)).relu() * m.gain.flatten(), m.vector) + 3


def batch_and_channels_merged(m, x):
    y = (m.conv(x).relu() * m.gain).flatten(0, 1)
    return (y * 3).unflatten(0, (-1, 4)).sigmoid()


def changed_through_another_view(m, x):
    x = m.conv(x) * m.conv(x)
    view, other = x[:, :4], x.flatten(2)
    y = m.norm(view)
    x.relu_().sub_(0.3)
    return m.linear(y.mean((2, 3))) + other.mean(2)[:, :3]


def nan_that_is_never_taken(m, x):
    y = m.conv(x).sigmoid()
    return torch.where(y > -1, y, torch.log(-m.holed - 1))


@pytest.mark.parametrize(
    "compute",
    [
        squared,
        padded_with_ones,
        whole_numbers_added,
        accumulated,
        empty_output,
        vector_of_weights,
        batch_and_channels_merged,
        changed_through_another_view,
        nan_that_is_never_taken,
    ],
)
def test_a_legal_model_is_simplified_exactly(compute):
    model, x = randomized(Corner(compute)), noise(2, 3, 4, 4)
    simplified = simplify(model, (x,)).model  # raises above 1e-9
    torch.testing.assert_close(simplified(x), model(x), rtol=1e-4, atol=1e-5)
    simplified(noise(5, 3, 4, 4))


def test_a_division_by_zero_in_the_model_is_no_obstacle_where_its_answer_is_finite():
    model = randomized(Corner(divided_by_zero))
    with torch.no_grad():
        model.conv.bias.fill_(10)
    simplify(model, (noise(2, 3, 4, 4),))


def test_a_second_layer_that_is_a_millionth_off_is_found_behind_a_small_factor(monkeypatch):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.p, self.q = nn.BatchNorm1d(4), nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x):
            y = self.norm(x.sigmoid())
            return self.p(y) + 1e-4 * torch.tanh(self.q(y))

    calls = []

    def slip(module, layer, scale, shift):
        calls.append(layer)
        scale_inputs(module, layer, scale * (1 + 1e-6 * (len(calls) == 2)), shift)

    monkeypatch.setattr(into_consumers, "scale_inputs", slip)
    with pytest.raises(CheckFailedError, match=r"e-0\d at norm"):
        simplify(randomized(Two()), (noise(2, 4),))
    assert len(calls) == 2


def test_what_float64_holds_and_float32_does_not_is_no_result():
    class Tiny(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.linear = nn.BatchNorm1d(4), nn.Linear(4, 3)
            self.position = nn.Parameter(torch.ones(4))

        def forward(self, x):
            return self.linear((self.norm(x.sigmoid()) + self.position).relu())

    model, x = randomized(Tiny()), noise(2, 4)
    with torch.no_grad():
        model.norm.weight[:] = torch.tensor([1.0, 1e-39, 0.5, 2.0])
    torch.testing.assert_close(simplify(model, (x,)).model(x), model(x), rtol=1e-4, atol=1e-5)


def test_half_precision_code_that_computes_in_float32_still_runs():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.norm = nn.Linear(6, 4), nn.LayerNorm(4)

        def forward(self, x):
            y = F.linear(x.float(), self.linear.weight.float())
            y = F.layer_norm(y, (4,), self.norm.weight.float(), self.norm.bias.float())
            return y.to(x.dtype)

    model, x = randomized(Mixed()).bfloat16(), noise(2, 6).bfloat16()
    answer = simplify(model, (x,)).model(x)
    assert answer.dtype == torch.bfloat16
    torch.testing.assert_close(answer, model(x), rtol=0.02, atol=0.02)


def test_buckets_that_rounding_moves_are_those_that_the_model_computes_itself():
    class Buckets(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.zeros(20, 3))

        def forward(self, x):
            i = (torch.log(torch.arange(1, 300).float()) / torch.log(torch.tensor(3.0))).long()
            return x + self.table[i][242]

    model, x = randomized(Buckets()), noise(2, 3)
    torch.testing.assert_close(simplify(model, (x,)).model(x), model(x))


@pytest.mark.parametrize(
    "compute",
    [
        lambda m, x: F.batch_norm(m.conv(x).mean((2, 3)), None, None, training=True),
        lambda m, x: torch.cat([m.conv(x).mean((2, 3)).squeeze()] * 2, dim=1),
    ],
)
def test_a_model_that_needs_several_images_is_refused_with_the_reason(compute):
    with pytest.raises(BadInputError, match=r"batch of one.*found: \w+Error"):
        simplify(randomized(Corner(compute)), (noise(2, 3, 4, 4),))


def test_a_sites_reasons_are_all_kept():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x):
            y = F.batch_norm(self.conv(x), None, None, training=True)
            return F.batch_norm(y.sigmoid(), None, None, training=True).mean((2, 3))

    report = simplify(randomized(Functional()), (noise(2, 3, 4, 4),)).report
    assert len(report.skipped) == 2 and report.after.batchnorms == 2
