import pytest
import torch
from torchvision.transforms.v2 import functional as reference

from edgereg.augment.colour import (
    ColourJitter,
    Greyscale,
    RGBShift,
    brightness,
    contrast,
    hue,
    luma,
    saturation,
)
from edgereg.augment.draws import Draws
from edgereg.errors import RecipeError

DRAWS = Draws(0, 0, torch.arange(300))
# in the middle of the range nothing is clipped, so that the algebra is exact
MIDDLE = 0.4 + 0.2 * torch.rand(300, 3, 5, 7, generator=torch.Generator().manual_seed(0))
WHOLE = torch.rand(300, 3, 5, 7, generator=torch.Generator().manual_seed(1))
ALL = [
    RGBShift(0.4, 0.5),
    ColourJitter(0.8, 0.8, 1.5),
    ColourJitter(0.2, 0.2, 0.2, hue=0.5),
    Greyscale(0.5),
    RGBShift(0.4, probability=0.5),
    ColourJitter(probability=0.5),
]
# torchvision weighs red by 0.2989, to four digits; ours is 0.299
ROUNDING = 3e-4
FUNCTIONS = {
    brightness: (reference.adjust_brightness, (0.0, 0.4, 1.0, 1.7), 1e-6),
    contrast: (reference.adjust_contrast, (0.0, 0.4, 1.0, 1.7), ROUNDING),
    saturation: (reference.adjust_saturation, (0.0, 0.4, 1.0, 1.7), ROUNDING),
    hue: (reference.adjust_hue, (-0.5, -0.21, 0.0, 0.1, 1 / 3, 0.5), 1e-5),
}


def assert_is_the_reference(function, images, parameters, tolerance):
    expected, worst = FUNCTIONS[function][0], 0.0
    out = function(images, torch.tensor(parameters))
    assert out.dtype == images.dtype and out.shape == images.shape
    for image, one, parameter in zip(images, out, parameters, strict=True):
        worst = max(worst, (one - expected(image, parameter)).abs().max().item())
    assert worst < tolerance, f"off by {worst}"


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_each_function_is_torchvisions_on_every_sample(function):
    _, parameters, tolerance = FUNCTIONS[function]
    images = WHOLE[: len(parameters)].clone()
    images[0, :, 0] = 0.3  # greys have no hue
    assert_is_the_reference(function, images, list(parameters), tolerance)


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_the_comparison_finds_a_parameter_that_is_a_little_off(function):
    def shifted(images, parameters):
        return function(images, parameters + 0.01)

    FUNCTIONS[shifted] = FUNCTIONS[function]
    with pytest.raises(AssertionError, match="off by"):
        assert_is_the_reference(shifted, WHOLE[:1], [0.4], FUNCTIONS[function][2])


def test_a_third_of_a_turn_makes_red_green_and_keeps_black_and_white():
    colours = torch.tensor([[1.0, 0, 0], [0, 0, 0], [1, 1, 1]]).T[None, :, :, None]
    out = hue(colours, torch.tensor([1 / 3]))[0, :, :, 0].T
    assert torch.allclose(out, torch.tensor([[0.0, 1, 0], [0, 0, 0], [1, 1, 1]]), atol=1e-6)


def test_the_jitter_is_its_four_changes_in_their_order():
    step = ColourJitter(0.5, 0.6, 0.7, 0.3)
    expected = brightness(WHOLE, DRAWS.uniform("brightness", 0.5, 1.5)[:, 0])
    expected = contrast(expected, DRAWS.uniform("contrast", 0.4, 1.6)[:, 0])
    expected = saturation(expected, DRAWS.uniform("saturation", 0.3, 1.7)[:, 0])
    expected = hue(expected, DRAWS.uniform("hue", -0.3, 0.3)[:, 0])
    assert torch.equal(step.recolour(WHOLE, DRAWS), expected)


@pytest.mark.parametrize("step", [RGBShift(probability=0.3), ColourJitter(probability=0.3)])
def test_a_probability_leaves_some_samples_as_they_are(step):
    same = (step.recolour(WHOLE, DRAWS) == WHOLE).flatten(1).all(dim=1)
    assert 170 < same.sum() < 250


def test_a_turn_of_more_than_half_is_refused():
    with pytest.raises(RecipeError, match=r"hue is in \[0, 0\.5\]; found: hue: 0\.6"):
        ColourJitter(hue=0.6)


@pytest.mark.parametrize("step", ALL, ids=lambda step: type(step).__name__)
def test_colours_stay_in_range_and_the_input_is_left_alone(step):
    before = WHOLE.clone()
    out = step.recolour(WHOLE, DRAWS)
    assert out.shape == WHOLE.shape and out.dtype == WHOLE.dtype
    assert out.min() >= 0 and out.max() <= 1
    assert torch.equal(WHOLE, before) and not torch.equal(out, before)


@pytest.mark.parametrize(
    "step", [RGBShift(0, 0), ColourJitter(0, 0, 0), Greyscale(0)], ids=lambda s: type(s).__name__
)
def test_amounts_of_zero_change_nothing(step):
    assert (step.recolour(WHOLE, DRAWS) - WHOLE).abs().max() < 1e-6


@pytest.mark.parametrize("step", ALL, ids=lambda step: type(step).__name__)
def test_a_sample_is_recoloured_the_same_in_any_batch(step):
    some = torch.tensor([250, 3, 77])
    alone = step.recolour(WHOLE[some], Draws(0, 0, some))
    assert torch.equal(alone, step.recolour(WHOLE, DRAWS)[some])


def test_each_channel_of_each_image_shifts_by_one_amount_of_its_own():
    moved = RGBShift(shift=0.3).recolour(MIDDLE, DRAWS) - MIDDLE
    amounts = moved.mean(dim=(2, 3))
    assert (moved - amounts[:, :, None, None]).abs().max() < 1e-6
    assert 0.29 < amounts.abs().max() <= 0.3 + 1e-6
    assert abs(torch.corrcoef(amounts.T)).fill_diagonal_(0).max() < 0.25


def test_each_channel_of_each_image_is_scaled_by_one_gain_of_its_own():
    gains = RGBShift(shift=0, gain=0.5).recolour(MIDDLE, DRAWS) / MIDDLE
    amounts = gains.mean(dim=(2, 3))
    assert (gains - amounts[:, :, None, None]).abs().max() < 1e-5
    assert 0.5 <= amounts.min() < 0.52 and 1.48 < amounts.max() < 1.5 + 1e-6
    assert abs(torch.corrcoef(amounts.T)).fill_diagonal_(0).max() < 0.25


def test_brightness_scales_a_whole_image():
    factors = ColourJitter(0.4, 0, 0).recolour(MIDDLE, DRAWS) / MIDDLE
    means = factors.mean(dim=(1, 2, 3))
    assert (factors - means[:, None, None, None]).abs().max() < 1e-5
    assert 0.6 <= means.min() + 1e-6 < 0.63 and 1.37 < means.max() <= 1.4 + 1e-5


def test_contrast_keeps_the_mean_lightness_and_scales_what_differs_from_it():
    # tinted, so that the mean lightness is not the mean of the channels
    tinted = MIDDLE - torch.tensor([0.0, 0.05, 0.15])[:, None, None]
    out = ColourJitter(0, 0.5, 0).recolour(tinted, DRAWS)
    mean = luma(tinted).mean(dim=(2, 3), keepdim=True)
    assert (luma(out).mean(dim=(2, 3), keepdim=True) - mean).abs().max() < 1e-6
    spread = (out - mean).std(dim=(1, 2, 3)) / (tinted - mean).std(dim=(1, 2, 3))
    assert 0.5 <= spread.min() + 1e-5 < 0.55 and 1.45 < spread.max() <= 1.5 + 1e-5


def test_saturation_keeps_each_pixels_lightness_and_grey_grey():
    out = ColourJitter(0, 0, 0.9).recolour(MIDDLE, DRAWS)
    assert (luma(out) - luma(MIDDLE)).abs().max() < 1e-6
    assert (out - MIDDLE).abs().max() > 0.02
    grey = luma(MIDDLE).expand_as(MIDDLE)
    assert (ColourJitter(0, 0, 0.9).recolour(grey, DRAWS) - grey).abs().max() < 1e-6


def test_lightness_is_that_of_bt_601():
    primaries = torch.eye(3)[:, :, None, None]
    assert luma(primaries).flatten().tolist() == pytest.approx([0.299, 0.587, 0.114])
    assert luma(torch.ones(1, 3, 1, 1)).item() == pytest.approx(1)


def test_some_images_lose_their_colour_and_the_others_nothing():
    out = Greyscale(0.2).recolour(WHOLE, DRAWS)
    is_grey = (out == luma(WHOLE)).all(dim=3).all(dim=2).all(dim=1)
    assert 40 < is_grey.sum() < 80
    assert torch.equal(out[~is_grey], WHOLE[~is_grey])
