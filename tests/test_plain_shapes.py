import math

import pytest
import torch
from export_models import noise, randomized
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from export.passes.functional import make_functional
from export.passes.plain_shapes import plain_shapes
from export.passes.simplify import simplify
from export.traced.dead_code import remove_dead_code
from export.traced.factors import Factors
from export.traced.graph import operator

PASSES = (make_functional, plain_shapes, remove_dead_code)


def left(forward, x, model=None) -> list[str]:
    """Return the operators of a function after the pass, which is proved to change nothing."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(12, 6)

        def forward(self, x):
            return forward(self.layer, x)

    result = simplify(randomized(Model()), (x,), passes=PASSES, finishing=())
    assert result.report.model_error < 1e-14
    for batch in (1, 3):
        value = x[:1].repeat(batch, *[1] * (x.ndim - 1))
        assert result.model(value).shape == forward(Model().layer, value).shape
    return [operator(n).removeprefix("aten.") for n in result.model.graph.nodes if operator(n)]


def test_a_shape_made_of_the_batch_size_becomes_constant():
    x = noise(2, 5, 12)
    assert left(lambda f, x: x.view(x.shape[0], 60).relu(), x) == ["reshape", "relu"]
    assert left(lambda f, x: x.reshape(x.shape[0] * 5, 12).relu(), x) == ["reshape", "relu"]


@pytest.mark.parametrize(
    ("forward", "expected"),
    [
        (lambda f, x: x.transpose(0, 1).transpose(0, 1).relu(), ["relu"]),
        (lambda f, x: x.flatten(1).unflatten(1, (10, 6)).relu(), ["reshape", "relu"]),
        (lambda f, x: x.unsqueeze(1).transpose(1, 2).relu(), ["reshape", "relu"]),
        (lambda f, x: x[None].permute(1, 3, 0, 2).squeeze(2).relu(), ["permute", "relu"]),
        (
            lambda f, x: x.unflatten(2, (3, 4)).transpose(1, 2).flatten(0, 1).relu(),
            ["unflatten", "transpose", "flatten", "relu"],
        ),
    ],
)
def test_a_chain_of_movements_becomes_as_short_as_it_can(forward, expected):
    assert left(forward, noise(2, 5, 12)) == expected


def test_movements_of_vectors_around_a_linear_layer_meet_on_one_side():
    x = noise(2, 5, 12)
    assert left(lambda f, x: f(x.transpose(0, 1)).transpose(0, 1), x) == ["linear"]
    assert left(lambda f, x: f(x.flatten(0, 1)).unflatten(0, (-1, 5)), x) == ["linear"]
    heads = left(lambda f, x: f(x.transpose(0, 1)).unflatten(2, (2, 3)).permute(1, 2, 0, 3), x)
    assert heads == ["linear", "reshape", "permute"]


def test_a_value_that_something_else_reads_stays():
    def forward(layer, x):
        y = x.transpose(1, 2)
        return y.transpose(1, 2) + y.relu().sum()

    assert "transpose" in left(forward, noise(2, 5, 12))


@st.composite
def chains(draw):
    """Draw a shape, and reshapes and permutations that one value can go through in turn."""
    sizes = draw(st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=4))
    steps, shape = [], sizes
    for _ in range(draw(st.integers(1, 5))):
        if draw(st.booleans()):
            order = draw(st.permutations(range(len(shape))))
            steps.append(("permute", order))
            shape = [shape[dim] for dim in order]
        else:
            rest, wanted = math.prod(shape), []
            while rest > 1 and len(wanted) < 4:
                factors = [n for n in (1, 2, 3, 4, 6, 12) if rest % n == 0]
                wanted.append(draw(st.sampled_from(factors)))
                rest //= wanted[-1]
            shape = [*wanted, rest]
            steps.append(("reshape", shape))
    return sizes, steps


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(chains())
def test_factors_say_in_three_steps_or_fewer_what_any_chain_does(chain):
    sizes, steps = chain
    value = torch.arange(math.prod(sizes)).reshape(sizes)
    factors, expected = Factors(sizes), value
    for name, argument in steps:
        expected = getattr(expected, name)(argument)
        if name == "permute":
            factors.permute(argument)
        elif not factors.reshape(argument):
            return  # cuts across factors
    found = factors.steps()
    for name, argument in found:
        value = getattr(value, name)(argument)
    assert torch.equal(value, expected)
    assert len(found) <= 3
