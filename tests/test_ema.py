import pytest
import torch
from torch import nn

from edgereg.errors import RecipeError
from edgereg.regularize.ema import EmaConfig, WeightAverage

STEPS = 12


def walk(module, average, steps=range(STEPS), total=STEPS):
    """Move the weights as a training would, and tell the average."""
    for step in steps:
        with torch.no_grad():
            generator = torch.Generator().manual_seed(step)
            module.weight.add_(torch.randn(module.weight.shape, generator=generator))
        average.update(step, total)


def averaged(module, average):
    with average.swap():
        return module.weight.detach().clone()


def fresh():
    torch.manual_seed(0)
    return nn.Linear(3, 2)


def trajectory():
    module, seen = fresh(), []

    class Recorder:
        def update(self, step, steps):
            seen.append(module.weight.detach().clone())

    walk(module, Recorder())
    return seen


def test_the_exponential_mean_is_its_recursion():
    module = fresh()
    average, wanted = WeightAverage(module, EmaConfig(decay=0.6)), fresh().weight.detach()
    walk(module, average)
    for t, weight in enumerate(trajectory(), start=1):
        decay = min(0.6, (1 + t) / (10 + t))
        wanted = decay * wanted + (1 - decay) * weight
    assert (averaged(module, average) - wanted).abs().max() < 1e-6


def test_the_plain_mean_is_the_mean_since_its_start():
    module = fresh()
    average = WeightAverage(module, EmaConfig(decay=0.9, kind="average", start=0.5))
    walk(module, average)
    wanted = torch.stack(trajectory()[6:]).mean(dim=0)
    assert (averaged(module, average) - wanted).abs().max() < 1e-6


def test_before_its_start_the_average_is_the_weights():
    module = fresh()
    average = WeightAverage(module, EmaConfig(decay=0.9, start=0.9))
    walk(module, average, steps=range(3))
    assert torch.equal(averaged(module, average), module.weight)


def test_updates_come_every_so_many_steps():
    module = fresh()
    average = WeightAverage(module, EmaConfig(decay=0.9, kind="average", every=4))
    walk(module, average)
    wanted = torch.stack([trajectory()[n] for n in (3, 7, 11)]).mean(dim=0)
    assert (averaged(module, average) - wanted).abs().max() < 1e-6


def test_the_weights_come_back_to_the_bit_even_after_an_error():
    module = fresh()
    average = WeightAverage(module, EmaConfig(decay=0.5))
    walk(module, average)
    before = module.weight.detach().clone()
    with pytest.raises(KeyError), average.swap():
        assert not torch.equal(module.weight, before)
        raise KeyError
    assert torch.equal(module.weight, before)


def test_a_resumed_average_is_the_uninterrupted_one():
    whole, cut = fresh(), fresh()
    straight = WeightAverage(whole, EmaConfig(decay=0.7))
    walk(whole, straight)
    first = WeightAverage(cut, EmaConfig(decay=0.7))
    walk(cut, first, steps=range(5))
    second = WeightAverage(cut, EmaConfig(decay=0.7))
    second.load({name: tensor.clone() for name, tensor in first.state().items()})
    walk(cut, second, steps=range(5, STEPS))
    assert torch.equal(averaged(whole, straight), averaged(cut, second))


def test_frozen_weights_are_left_alone():
    module = fresh()
    module.bias.requires_grad_(False)
    average = WeightAverage(module, EmaConfig(decay=0.5))
    assert set(average.state()) == {"weight", "updates"}


@pytest.mark.parametrize(("key", "value"), [("decay", 1.0), ("every", 0), ("start", 1.0)])
def test_impossible_settings_are_named(key, value):
    with pytest.raises(RecipeError, match=rf"ema\.{key}: {value}"):
        EmaConfig(**{key: value})
