import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from uniformity import assert_uniform

from edgereg.augment import draws as draws_module
from edgereg.augment.draws import Draws

MANY = Draws(3, 1, torch.arange(40_000))


def draw_everything(draws):
    return {
        "uniform": draws.uniform("a", -2, 3, count=4),
        "chance": draws.chance("b", 0.3),
        "integers": draws.integers("c", 7, count=2),
        "log_uniform": draws.log_uniform("d", 0.5, 2.0),
        "permutations": draws.permutations("e", 9),
        "normal": draws.normal("f", count=3),
        "many": draws.uniform("g", count=200),
    }


def test_numbers_fill_their_range_evenly():
    assert_uniform((MANY.uniform("x")[:, 0] * 100).long(), 100)


def test_the_last_bits_are_even_too():
    bits = (MANY.uniform("x") * 2**24).long()
    assert_uniform(bits & 0xFF, 256)


def test_many_numbers_of_one_sample_are_even():
    one = Draws(0, 0, torch.tensor([5]))
    assert_uniform((one.uniform("x", count=20_000) * 64).long(), 64)


def test_the_uniformity_check_finds_a_bias_of_a_few_percent():
    with pytest.raises(AssertionError, match="chi2"):
        assert_uniform((MANY.uniform("x")[:, 0] ** 1.1 * 100).long(), 100)


def test_low_and_high_bound_the_numbers():
    values = MANY.uniform("x", -2.0, 5.0)
    assert values.min() >= -2 and values.max() <= 5
    assert values.min() < -1.99 and values.max() > 4.99
    assert values.dtype == torch.float32


@pytest.mark.parametrize(
    "other",
    [
        Draws(4, 1, MANY.indices).uniform("x"),
        Draws(3, 2, MANY.indices).uniform("x"),
        Draws(3, 1, MANY.indices + 1).uniform("x"),
        MANY.uniform("y"),
        MANY.uniform("x", count=2)[:, 1:],
    ],
    ids=["seed", "epoch", "index", "name", "number"],
)
def test_each_coordinate_gives_unrelated_numbers(other):
    pair = torch.cat([MANY.uniform("x"), other], dim=1).T
    # of n unrelated pairs the correlation has the deviation 1 / sqrt(n) = 0.005
    assert abs(torch.corrcoef(pair)[0, 1]) < 0.022


@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(
    indices=st.lists(st.integers(0, 2**40), min_size=1, max_size=12, unique=True),
    seed=st.integers(0, 2**31),
    epoch=st.integers(0, 1000),
    data=st.data(),
)
def test_a_sample_draws_the_same_whatever_the_batch(indices, seed, epoch, data):
    chosen = data.draw(st.permutations(range(len(indices))))
    chosen = chosen[: data.draw(st.integers(1, len(indices)))]
    whole = draw_everything(Draws(seed, epoch, torch.tensor(indices)))
    part = draw_everything(Draws(seed, epoch, torch.tensor(indices)[chosen]))
    for name, values in part.items():
        assert torch.equal(values, whole[name][chosen]), name


def test_nothing_is_drawn_from_the_global_generator():
    before = torch.random.get_rng_state()
    first = draw_everything(MANY)["uniform"]
    assert torch.equal(before, torch.random.get_rng_state())
    torch.rand(3)
    assert torch.equal(first, draw_everything(MANY)["uniform"])


def test_chance_has_its_probability():
    share = MANY.chance("x", 0.3).float().mean()
    assert abs(share - 0.3) < 0.01
    assert not MANY.chance("x", 0.0).any() and MANY.chance("x", 1.0).all()


def test_integers_are_even_and_below_their_limit():
    assert_uniform(MANY.integers("x", 21), 21)


def test_integers_never_reach_their_limit(monkeypatch):
    largest = torch.tensor([[1 - 2**-24]])
    monkeypatch.setattr(Draws, "uniform", lambda self, name, count: largest)
    assert all(MANY.integers("x", high).item() == high - 1 for high in range(1, 5000))


def test_x_and_its_inverse_are_equally_likely():
    values = MANY.log_uniform("x", 0.25, 4.0)
    assert values.min() > 0.2499 and values.max() < 4.001
    assert_uniform(((values.log2() + 2) / 4 * 50).clamp(0, 49).long(), 50)


def test_every_number_is_as_likely_in_every_slot_of_a_permutation():
    rows = Draws(0, 0, torch.arange(10_000)).permutations("order", 9)
    assert torch.equal(rows.sort(dim=1).values, torch.arange(9).expand(10_000, 9))
    for slot in range(9):
        assert_uniform(rows[:, slot], 9)


def test_every_order_of_four_is_as_likely():
    rows = MANY.permutations("order", 4)
    codes = (rows * torch.tensor([64, 16, 4, 1])).sum(dim=1)
    assert_uniform(codes.unique(return_inverse=True)[1], 24)


def test_pieces_of_a_sample_draw_apart_and_whatever_the_batch():
    pieces = Draws(0, 0, torch.tensor([3, 8])).split(9)
    values = pieces.uniform("x").reshape(2, 9)
    assert len(values.unique()) == 18
    assert torch.equal(Draws(0, 0, torch.tensor([8])).split(9).uniform("x")[:, 0], values[1])


def test_normal_numbers_are_normal_and_unrelated():
    values = Draws(0, 0, torch.arange(20_000)).normal("x", count=3)
    assert values.shape == (20_000, 3) and values.dtype == torch.float32
    # the error function makes a normal number uniform
    assert_uniform(((1 + torch.erf(values / 2**0.5)) / 2 * 100).clamp(0, 99).long(), 100)
    assert torch.corrcoef(values.T).sub(torch.eye(3)).abs().max() < 0.03
    assert values.isfinite().all()


def test_the_check_of_normality_finds_a_spread_too_large():
    values = Draws(0, 0, torch.arange(20_000)).normal("x") * 1.05
    with pytest.raises(AssertionError, match="chi2"):
        assert_uniform(((1 + torch.erf(values / 2**0.5)) / 2 * 100).clamp(0, 99).long(), 100)


@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(size=st.integers(1, 40), data=st.data())
def test_pieces_of_a_batch_and_picks_of_pieces_draw_what_the_batch_draws(size, data):
    indices = torch.arange(100, 137)
    whole = draw_everything(Draws(5, 2, indices))
    seen = 0
    for piece, draws in Draws(5, 2, indices).pieces(size):
        seen += len(draws)
        picks = torch.tensor(data.draw(st.permutations(range(len(draws)))))[: size // 2 + 1]
        for picked, own in ((slice(None), draws), (picks, draws.of(picks))):
            assert torch.equal(own.indices, indices[piece][picked])
            for name, values in draw_everything(own).items():
                assert torch.equal(values, whole[name][piece][picked]), name
    assert seen == 37


def test_pieces_are_hashed_once(monkeypatch):
    hashed = []
    unit = draws_module._unit
    monkeypatch.setattr(
        draws_module, "_unit", lambda key, *args: hashed.append(key) or unit(key, *args)
    )
    for _, draws in Draws(0, 0, torch.arange(10)).pieces(3):
        draws.uniform("x")
    assert len(hashed) == 1


def test_the_steps_of_a_piece_draw_apart():
    (_, draws), *_ = Draws(0, 0, torch.arange(10)).pieces(4)
    other = dataclasses.replace(draws, seed=1)
    assert not torch.equal(draws.uniform("x"), other.uniform("x"))
