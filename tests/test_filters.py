import math

import pytest
import torch
from torchvision.transforms.v2 import functional as reference
from uniformity import assert_uniform

from edgereg.augment.draws import Draws
from edgereg.augment.filters import Blur, Noise, Sharpness, gaussian_blur, sharpness
from edgereg.errors import RecipeError

DRAWS = Draws(0, 0, torch.arange(200))
IMAGES = torch.rand(200, 3, 15, 18, generator=torch.Generator().manual_seed(0))
STEPS = [Blur(), Noise(), Sharpness()]
SIGMAS = [0.1, 0.4, 1.0, 1.7, 2.0, 4.5]


def _reference_blur(image, sigma):
    size = 2 * math.ceil(3 * sigma) + 1
    return reference.gaussian_blur(image, [size, size], [sigma, sigma])


def off_blur(sigmas):
    out = gaussian_blur(IMAGES[: len(sigmas)], torch.tensor(sigmas))
    pairs = zip(IMAGES, out, SIGMAS, strict=False)
    return max((one - _reference_blur(image, sigma)).abs().max() for image, one, sigma in pairs)


def test_blurring_is_torchvisions_on_every_sample():
    assert off_blur(SIGMAS) < 2e-6
    assert off_blur([sigma * 1.01 for sigma in SIGMAS]) > 1e-4


def test_blurring_an_image_smaller_than_the_gaussian_keeps_grey_grey():
    grey = torch.full((2, 3, 3, 4), 0.3)
    assert (gaussian_blur(grey, torch.tensor([0.5, 5.0])) - grey).abs().max() < 1e-6
    out = gaussian_blur(IMAGES[:2, :, :3, :4], torch.tensor([0.5, 5.0]))
    assert out.shape == (2, 3, 3, 4) and out.isfinite().all()


def test_blurring_a_point_spreads_it_by_sigma():
    image = torch.zeros(1, 3, 31, 31)
    image[..., 15, 15] = 1
    out = gaussian_blur(image, torch.tensor([2.0]))[0, 0].double()
    away = torch.arange(31, dtype=torch.float64) - 15
    assert abs(out.sum() - 1) < 1e-5
    assert abs(float((out.sum(dim=0) * away**2).sum()) - 4) < 0.15  # the tails are cut off at 3


def test_sharpening_is_torchvisions_on_every_sample():
    factors = [0.0, 0.3, 1.0, 1.8]
    out = sharpness(IMAGES[:4], torch.tensor(factors))
    for image, one, factor in zip(IMAGES, out, factors, strict=False):
        assert (one - reference.adjust_sharpness(image, factor)).abs().max() < 1e-6
    near = sharpness(IMAGES[:1], torch.tensor([0.01]))
    assert (near[0] - reference.adjust_sharpness(IMAGES[0], 0.0)).abs().max() > 1e-3


@pytest.mark.parametrize("shape", [(2, 9), (9, 2), (1, 1), (3, 3)])
def test_sharpening_a_small_image_is_torchvisions(shape):
    image = IMAGES[:1, :, : shape[0], : shape[1]]
    expected = reference.adjust_sharpness(image[0], 0.5)
    assert (sharpness(image, torch.tensor([0.5]))[0] - expected).abs().max() < 1e-6


@pytest.mark.parametrize("step", STEPS, ids=lambda step: type(step).__name__)
def test_a_step_keeps_range_and_input_and_treats_each_sample_by_itself(step):
    before = IMAGES.clone()
    out = step.recolour(IMAGES, DRAWS)
    assert torch.equal(IMAGES, before) and not torch.equal(out, before)
    assert out.shape == IMAGES.shape and out.dtype == IMAGES.dtype
    assert out.min() >= 0 and out.max() <= 1
    for one in (0, 3, 150):
        alone = step.recolour(IMAGES[one : one + 1], Draws(0, 0, torch.tensor([one])))
        assert torch.equal(alone[0], out[one])


@pytest.mark.parametrize("kind", [Blur, Noise, Sharpness])
def test_a_probability_leaves_some_samples_as_they_are(kind):
    same = (kind(probability=0.3).recolour(IMAGES, DRAWS) == IMAGES).flatten(1).all(dim=1)
    assert 110 < same.sum() < 170


def test_noise_is_normal_and_each_samples_own():
    grey = torch.full((200, 3, 15, 18), 0.5)
    noise = Noise(sigma=0.1).recolour(grey, DRAWS) - 0.5
    spread = noise.flatten(1).std(dim=1)
    assert spread.min() < 0.003 and 0.09 < spread.max() < 0.105
    loud = (noise / spread[:, None, None, None])[spread > 0.02]
    # the error function makes a normal number uniform
    assert_uniform(((1 + torch.erf(loud / 2**0.5)) / 2 * 50).clamp(0, 49).long(), 50)
    pixels = loud.flatten(1)[:, :400]
    assert torch.corrcoef(pixels).fill_diagonal_(0).abs().max() < 0.3
    assert torch.corrcoef(pixels.T[:3]).fill_diagonal_(0).abs().max() < 0.4


def test_sharpness_is_drawn_either_way():
    out = Sharpness(0.9).recolour(IMAGES, DRAWS)
    rough = out.diff(dim=3).abs().mean(dim=(1, 2, 3)) / IMAGES.diff(dim=3).abs().mean(dim=(1, 2, 3))
    assert (rough < 0.9).sum() > 50 and (rough > 1.05).sum() > 50


def test_a_factor_below_zero_is_refused():
    with pytest.raises(RecipeError, match=r"sharpness is in \[0, 1\]; found: sharpness: 1\.2"):
        Sharpness(1.2)
