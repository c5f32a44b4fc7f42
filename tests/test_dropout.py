import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edgereg.errors import RecipeError
from edgereg.regularize.dropout import (
    REGULARIZERS,
    DropBlock,
    Dropout,
    SpatialDropout,
    StochasticDepth,
    build_regularizers,
)
from edgereg.regularize.squares import DropSquares

shares = st.floats(0, 1)
rates = st.floats(0, 0.99)


def drop(regularizer, x, *, seed=0):
    module = regularizer.build().train()
    module.p = regularizer.rate
    torch.manual_seed(seed)
    return module(x)


def test_dropout_drops_single_values_and_scales_the_rest():
    y = drop(Dropout(0.2), torch.ones(200, 50, dtype=torch.float64))
    assert torch.equal(y.unique(), torch.tensor([0, 1.25]).double())
    assert (y == 0).double().mean() == pytest.approx(0.2, abs=0.015)


def test_spatial_dropout_drops_whole_channels():
    y = drop(SpatialDropout(0.2), torch.ones(50, 40, 3, 3)).flatten(2)
    assert (y.amin(2) == y.amax(2)).all() and torch.allclose(y.unique(), torch.tensor([0, 1.25]))
    assert (y == 0).double().mean() == pytest.approx(0.2, abs=0.04)


def test_stochastic_depth_drops_whole_samples():
    y = drop(StochasticDepth(0.2), torch.ones(2000, 3, 2)).flatten(1)
    assert (y.amin(1) == y.amax(1)).all() and torch.allclose(y.unique(), torch.tensor([0, 1.25]))
    assert (y == 0).double().mean() == pytest.approx(0.2, abs=0.03)


def test_drop_block_drops_about_its_rate_and_keeps_the_mean():
    y = drop(DropBlock(0.1, block=7), torch.ones(64, 128, 14, 14))
    assert 0.08 <= (y == 0).double().mean() <= 0.1
    assert y.mean() == pytest.approx(1, abs=1e-4)


def test_drop_block_drops_whole_squares():
    hidden = drop(DropBlock(0.05, block=5), torch.ones(64, 8, 16, 16)) == 0
    # a square is hidden where all 25 places are; all that is hidden lies in such a square
    corners = hidden.unfold(2, 5, 1).unfold(3, 5, 1).flatten(4).all(4)
    covered = torch.zeros_like(hidden)
    for row in range(5):
        for column in range(5):
            covered[:, :, row : row + 12, column : column + 12] |= corners
    assert hidden.any() and torch.equal(covered, hidden)
    single = drop(Dropout(0.05), torch.ones(64, 8, 16, 16)) == 0
    assert not single.unfold(2, 5, 1).unfold(3, 5, 1).flatten(4).all(4).any()


@pytest.mark.parametrize("side", [1, 2, 3, 4, 6, 8])
def test_drop_block_takes_maps_that_are_smaller_than_a_square(side):
    y = drop(DropBlock(0.3, block=7), torch.ones(400, 4, side, side + 1))
    assert 0.15 <= (y == 0).double().mean() <= 0.35


def test_drop_block_counts_a_large_map_in_half_precision():
    y = drop(DropBlock(0.1, block=3), torch.ones(8, 64, 16, 16, dtype=torch.float16))  # 131,072
    assert y.dtype == torch.float16
    assert y.float().mean() == pytest.approx(1, abs=2e-3)


@pytest.mark.parametrize("kind", REGULARIZERS.values())
def test_nothing_is_dropped_in_evaluation_or_at_rate_0(kind):
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    module = kind(0.5).build()
    assert torch.equal(module.train()(x), x)
    module.p = 0.5
    assert torch.equal(module.eval()(x), x)
    torch.manual_seed(0)
    assert not torch.equal(module.train()(x), x)


@given(rates, st.integers(1, 40), st.data())
def test_the_linear_rule_is_that_of_the_paper(rate, blocks, data):
    block = data.draw(st.integers(1, blocks))
    linear, uniform = StochasticDepth(rate), StochasticDepth(rate, rule="uniform")
    survival = 1 - block / blocks * (1 - (1 - rate))  # 1603.09382, eq. 4, with p_L = 1 - rate
    assert 1 - linear.part(block, blocks) * rate == pytest.approx(survival, abs=1e-12)
    assert uniform.part(block, blocks) == 1 == Dropout(rate).part(block, blocks)


@given(rates, shares, st.floats(0.01, 0.99))
def test_the_schedules_are_what_they_are_called(rate, share, until):
    def at(schedule):
        return Dropout(rate, schedule=schedule, until=until).rate_at(share)

    assert at("constant") == rate
    assert at("linear") == rate * share
    assert at("early") == (rate if share < until else 0)
    assert at("late") == (rate if share >= until else 0)
    assert at("early") + at("late") == rate


def test_a_recipe_names_each_kind_once_and_in_order():
    steps = [
        {"dropout": {"rate": 0.2, "where": "mlp", "schedule": "late", "until": 0.25}},
        {"spatial_dropout": {"rate": 0.1}},
        {"drop_block": {"rate": 0.1, "block": 5, "where": "residual"}},
        {"stochastic_depth": {"rate": 0, "rule": "uniform"}},
    ]
    assert build_regularizers(steps) == (
        Dropout(0.2, "mlp", "late", 0.25),
        SpatialDropout(0.1, "stages"),
        DropBlock(0.1, "residual", "linear", 0.5, 5),
        StochasticDepth(0, "residual", rule="uniform"),
    )
    assert build_regularizers([]) == ()


@pytest.mark.parametrize(
    ("steps", "match"),
    [
        ({"dropout": {"rate": 0.1}}, r"found: regularize: \{"),
        ("dropout", "found: regularize: 'dropout'"),
        (["dropout"], r"regularize\[0\]: 'dropout'"),
        ([{"dropout": {"rate": 0.1}, "drop_block": {}}], r"regularize\[0\]"),
        ([{"dropout": {"rate": 0.1}}, {"dropot": {}}], r"\[1\]: 'dropot'.*did you mean 'dropout'"),
        ([{"dropout": {"rat": 0.1, "rate": 0}}], r"\[0\]\.dropout\.rat;.*did you mean 'rate'"),
        ([{"dropout": {}}], r"dropout needs a rate"),
        ([{"dropout": None}], r"dropout needs a rate"),
        ([{"dropout": 0.3}], r"regularize\[0\]\.dropout: 0\.3"),
        ([{"dropout": {"rate": 1}}], r"in \[0, 1\); found: regularize\[0\]\.dropout\.rate: 1"),
        ([{"dropout": {"rate": -0.1}}], r"regularize\[0\]\.dropout\.rate: -0\.1"),
        ([{"dropout": {"rate": "much"}}], r"regularize\[0\]\.dropout\.rate: 'much'"),
        ([{"dropout": {"rate": math.nan}}], r"regularize\[0\]\.dropout\.rate: nan"),
        ([{"dropout": {"rate": 0.1, "schedule": "fast"}}], r"\.schedule: 'fast'.*early"),
        ([{"dropout": {"rate": 0.1, "until": 1.0}}], r"regularize\[0\]\.dropout\.until: 1\.0"),
        ([{"dropout": {"rate": 0.1, "rule": "linear"}}], r"dropout\.rule"),
        ([{"stochastic_depth": {"rate": 0.1, "rule": "l"}}], r"stochastic_depth\.rule: 'l'"),
        ([{"drop_block": {"rate": 0.1, "block": 4}}], r"odd; found: .*drop_block\.block: 4"),
        ([{"drop_block": {"rate": 0.1, "block": 3.0}}], r"a whole number"),
    ],
)
def test_an_impossible_list_is_refused_and_its_key_named(steps, match):
    with pytest.raises(RecipeError, match=match):
        build_regularizers(steps)


def test_a_print_shows_the_rate():
    module = DropSquares(5)
    module.p = 0.25
    assert repr(module) == "DropSquares(p=0.25, block=5)"
