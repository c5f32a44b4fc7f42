import pytest
import torch

from edgereg.augment.colour import ColourJitter, Greyscale, RGBShift, luma
from edgereg.augment.draws import Draws

DRAWS = Draws(0, 0, torch.arange(300))
# in the middle of the range nothing is clipped, so that the algebra is exact
MIDDLE = 0.4 + 0.2 * torch.rand(300, 3, 5, 7, generator=torch.Generator().manual_seed(0))
WHOLE = torch.rand(300, 3, 5, 7, generator=torch.Generator().manual_seed(1))
ALL = [RGBShift(0.4, 0.5), ColourJitter(0.8, 0.8, 1.5), Greyscale(0.5)]


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
    assert (alone - step.recolour(WHOLE, DRAWS)[some]).abs().max() < 1e-6


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
