import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms.v2 import functional as reference

from edgereg.augment.draws import Draws
from edgereg.augment.tone import (
    Autocontrast,
    Equalize,
    Posterize,
    Solarize,
    autocontrast,
    equalize,
    invert,
    posterize,
    solarize,
)
from edgereg.errors import RecipeError

DRAWS = Draws(0, 0, torch.arange(200))
IMAGES = torch.rand(200, 3, 9, 11, generator=torch.Generator().manual_seed(0)) * 0.7 + 0.2
STEPS = [Posterize(), Solarize(), Autocontrast(), Equalize()]
# fewer than 255 pixels would leave every image as it is
LEVELS = torch.randint(0, 256, (12, 3, 31, 37), generator=torch.Generator().manual_seed(1))
LEVELS[0] = LEVELS[0] // 60 * 60  # from here on: where equalizing has its corners
LEVELS[1, 0], LEVELS[1, 1], LEVELS[1, 2] = 0, 255, 77
LEVELS[2] = 9
LEVELS[2, :, 0, 0] = 200
LEVELS[3] //= 12
BYTES = LEVELS.to(torch.uint8)


def differences(function, expected, parameters):
    images = IMAGES[: len(parameters)].clone()
    images[0, :, 0, :2] = torch.tensor([0.0, 1.0])
    out = function(images, torch.tensor(parameters))
    pairs = zip(images, out, parameters, strict=True)
    return max((one - expected(image, p)).abs().max().item() for image, one, p in pairs)


def test_posterizing_is_torchvisions_on_every_sample():
    bits = [1, 2, 3, 4, 5, 6, 7, 8]
    assert differences(posterize, reference.posterize, bits) < 1e-6
    assert differences(lambda x, b: posterize(x, b - 1), reference.posterize, bits[1:]) > 1e-3


def test_solarizing_is_torchvisions_on_every_sample():
    thresholds = [0.0, 0.3, 0.5, 0.77, 1.0]
    assert differences(solarize, reference.solarize, thresholds) == 0
    moved = differences(lambda x, t: solarize(x, t + 0.01), reference.solarize, thresholds)
    assert moved > 0.1


def test_autocontrast_is_torchvisions_and_leaves_a_flat_channel():
    images = IMAGES[:4].clone()
    images[2, 1] = 0.4
    out = autocontrast(images)
    for image, one in zip(images, out, strict=True):
        assert (one - reference.autocontrast(image)).abs().max() < 1e-6
    assert torch.equal(out[2, 1], images[2, 1])
    assert (out[0].amin(dim=(1, 2)) == 0).all() and (out[0].amax(dim=(1, 2)) == 1).all()


def test_inverting_is_torchvisions_and_undoes_itself():
    assert torch.equal(invert(IMAGES), reference.invert(IMAGES))
    assert (invert(invert(IMAGES)) - IMAGES).abs().max() < 1e-6


def test_equalizing_is_torchvisions_of_bytes():
    out = equalize(BYTES.float() / 255)
    expected = torch.stack([reference.equalize(image) for image in BYTES])
    assert torch.equal((out * 255).round().to(torch.uint8), expected)
    assert (out * 255 - expected).abs().max() < 1e-4
    assert (expected != BYTES).any(dim=(1, 2, 3)).sum() > 8, "nothing was compared"


def test_equalizing_leaves_a_channel_of_one_value():
    images = BYTES[1:2].float() / 255
    assert torch.equal(equalize(images), images)


@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(st.lists(st.integers(0, 255), min_size=4, max_size=90), st.integers(1, 20))
def test_equalizing_is_pillows_rule(values, repeats):
    values = values * repeats
    # _reference_: the rule of ImageOps.equalize, level by level
    counts = [values.count(level) for level in range(256)]
    last = max(values)
    step = (len(values) - counts[last]) // 255
    table, below = list(range(256)), step // 2
    for level in range(256 if step else 0):
        table[level] = min(below // step, 255)
        below += counts[level]
    images = torch.tensor(values).float().div(255).expand(1, 3, 1, -1)
    out = (equalize(images) * 255).round().long()[0, 0, 0]
    assert out.tolist() == [table[value] for value in values]


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


@pytest.mark.parametrize("kind", [Posterize, Solarize, Autocontrast, Equalize])
def test_a_probability_leaves_some_samples_as_they_are(kind):
    same = (kind(probability=0.3).recolour(IMAGES, DRAWS) == IMAGES).flatten(1).all(dim=1)
    assert 110 < same.sum() < 170


def test_all_bits_from_the_least_to_eight_are_kept():
    out = Posterize(bits=3).recolour(torch.linspace(0, 1, 600).expand(200, 3, 1, -1), DRAWS)
    counts = {len(image.unique()) for image in out}
    assert counts == {8, 16, 32, 64, 128, 256}


def test_thresholds_lie_between_the_least_and_one():
    ramp = torch.linspace(0, 1, 1001).expand(200, 3, 1, -1)
    inverted = (Solarize(threshold=0.4).recolour(ramp, DRAWS) != ramp)[:, 0, 0]
    first = torch.where(inverted.any(dim=1), inverted.float().argmax(dim=1) / 1000, 1.0)
    assert 0.4 <= first.min() < 0.45 and first.max() > 0.95


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: Posterize(bits=0), r"bits is in 1\.\.8; found: bits: 0"),
        (lambda: Posterize(bits=9), r"bits is in 1\.\.8; found: bits: 9"),
        (lambda: Solarize(threshold=1.5), r"threshold is in \[0, 1\]; found: threshold: 1\.5"),
    ],
)
def test_settings_out_of_range_are_refused(build, match):
    with pytest.raises(RecipeError, match=match):
        build()
