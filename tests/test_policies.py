import math

import pytest
import torch
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F
from uniformity import assert_uniform

from edgereg.augment import policies
from edgereg.augment.chain import build_chain
from edgereg.augment.draws import Draws
from edgereg.augment.policies import RandAugment, TrivialAugment
from edgereg.errors import RecipeError

HEIGHT, WIDTH = 24, 28
BYTES = torch.randint(0, 256, (6, 3, HEIGHT, WIDTH), generator=torch.Generator().manual_seed(0))
IMAGES = BYTES.float() / 255
DRAWS = Draws(0, 0, torch.arange(300))
MANY = torch.rand(300, 3, 9, 11, generator=torch.Generator().manual_seed(1)) * 0.7 + 0.2
# what 30 steps do: 1909.13719 with the ranges of 1805.09501, table 6; 2103.10158, "wide"
RANGES = {
    "rand_augment": {"shear": 0.3, "shift": 150 / 331, "turn": 30, "factor": 0.9, "bits": 4},
    "trivial_augment": {"shear": 0.99, "shift": None, "turn": 135, "factor": 0.99, "bits": 6},
}


def _reference_policy(image, name, steps, policy):
    """Torchvision's functions for one sample."""
    ranges, share = RANGES[policy], steps / 30
    bilinear = {"interpolation": InterpolationMode.BILINEAR}

    def shear(x, y):
        degrees = [math.degrees(math.atan(slope)) for slope in (x, y)]
        return F.affine(image, 0.0, [0, 0], 1.0, degrees, center=[0, 0], **bilinear)

    def shift(x, y):
        pixels = [int(x * (ranges["shift"] or 32 / WIDTH) * WIDTH)]
        pixels += [int(y * (ranges["shift"] or 32 / HEIGHT) * HEIGHT)]
        return F.affine(image, 0.0, pixels, 1.0, [0.0, 0.0], **bilinear)

    factor = 1 + ranges["factor"] * share
    return {
        "identity": lambda: image,
        "autocontrast": lambda: F.autocontrast(image),
        "equalize": lambda: F.equalize((image * 255).round().to(torch.uint8)) / 255,
        "rotate": lambda: F.rotate(image, ranges["turn"] * share, **bilinear),
        "solarize": lambda: F.solarize(image, (30 - abs(steps)) / 30),
        "colour": lambda: F.adjust_saturation(image, factor),
        "posterize": lambda: F.posterize(image, 8 - round(ranges["bits"] * abs(share))),
        "contrast": lambda: F.adjust_contrast(image, factor),
        "brightness": lambda: F.adjust_brightness(image, factor),
        "sharpness": lambda: F.adjust_sharpness(image, factor),
        "shear_x": lambda: shear(ranges["shear"] * share, 0),
        "shear_y": lambda: shear(0, ranges["shear"] * share),
        "translate_x": lambda: shift(share, 0),
        "translate_y": lambda: shift(0, share),
    }[name]()


def applied(name, steps, policy):
    """Do one operation to all images by their own steps."""
    ranges = getattr(policies, f"_{policy.upper()}")
    number = list(policies._OPERATIONS).index(name)
    chosen = torch.full((len(steps),), number)
    return policies._operate(IMAGES[: len(steps)], chosen, torch.tensor(steps), ranges, "zeros")


def difference(name, ours, theirs, policy):
    out = applied(name, ours, policy)
    pairs = zip(IMAGES, out, theirs, strict=False)
    return max(
        (one - _reference_policy(image, name, steps, policy)).abs().max().item()
        for image, one, steps in pairs
    )


@pytest.mark.parametrize("policy", RANGES)
@pytest.mark.parametrize("name", policies._OPERATIONS)
def test_each_operation_is_torchvisions_on_every_sample(name, policy):
    steps = [0, 9, -7, 30, -30, 24]
    assert difference(name, steps, steps, policy) < 1e-4
    if name not in ("identity", "autocontrast", "equalize"):
        assert difference(name, steps, [3, 14, 1, 25, -20, 17], policy) > 1e-2


@pytest.mark.parametrize("name", ["rotate", "shear_x", "shear_y", "translate_x", "translate_y"])
def test_the_sign_tells_the_direction(name):
    assert difference(name, [9, 15], [-9, -15], "rand_augment") > 0.1


def test_the_operations_are_the_papers_fourteen():
    assert len(policies._OPERATIONS) == 14


def recorded(monkeypatch, step, count):
    """Return (turns, count, 2) long: the operation and the steps of each sample."""
    calls = []

    def record(images, chosen, steps, *_):
        calls.append(torch.stack([chosen, steps], dim=1))
        return images

    monkeypatch.setattr(policies, "_operate", record)
    step.transform(torch.zeros(count, 3, 1, 1), Draws(2, 0, torch.arange(count)))
    return torch.stack(calls)


def test_rand_augment_draws_each_operation_and_sign_evenly_and_apart(monkeypatch):
    turns = recorded(monkeypatch, RandAugment(operations=3, magnitude=13), 6000)
    assert len(turns) == 3 and (turns[..., 1].abs() == 13).all()
    chosen, signs = turns[..., 0], (turns[..., 1] > 0).long()
    for one, other in ((0, 1), (1, 2), (0, 2)):
        assert_uniform(chosen[one] * 14 + chosen[other], 14 * 14)
        assert_uniform(signs[one] * 2 + signs[other], 4)
    assert_uniform(chosen[0] * 2 + signs[0], 28)


def test_trivial_augment_draws_operation_strength_and_sign_evenly_and_apart(monkeypatch):
    (turn,) = recorded(monkeypatch, TrivialAugment(), 9000)
    chosen, steps = turn.T
    assert_uniform(chosen * 31 + steps.abs(), 14 * 31)
    moved = steps != 0
    assert_uniform(chosen[moved] * 2 + (steps[moved] > 0), 28)


@pytest.mark.parametrize("name", ["rand_augment", "trivial_augment"])
def test_a_sample_depends_on_no_other_to_the_last_bit(name):
    chain = build_chain([{name: {}}], (0.5, 0.5, 0.5), key="augment")
    before = MANY.clone()
    out = chain(MANY, DRAWS)
    assert torch.equal(MANY, before) and out.shape == MANY.shape
    assert out.min() >= 0 and out.max() <= 1
    changed = (out != MANY).flatten(1).any(dim=1)
    assert changed.double().mean() > 0.6
    for one in range(0, 300, 7):
        alone = chain(MANY[one : one + 1], Draws(0, 0, torch.tensor([one])))
        assert torch.equal(alone[0], out[one])
    shuffled = torch.randperm(300, generator=torch.Generator().manual_seed(0))
    assert torch.equal(chain(MANY[shuffled], DRAWS.of(shuffled)), out[shuffled])
    assert not torch.equal(chain(MANY, Draws(0, 1, DRAWS.indices)), out)


def test_what_lies_beyond_the_image_is_as_asked():
    grey = torch.full((300, 3, 16, 16), 0.5)
    black, border = (
        RandAugment(operations=1, magnitude=30, beyond=beyond).transform(grey, DRAWS)
        for beyond in ("zeros", "border")
    )
    dark = (black < 0.2).flatten(1).any(dim=1)
    lost = dark & ~(border < 0.2).flatten(1).any(dim=1)
    assert 60 < lost.sum() < 150, "5 of the 14 operations move the image"


def test_at_magnitude_0_only_autocontrast_does_something():
    out = RandAugment(operations=1, magnitude=0).transform(MANY, DRAWS)
    changed = (out - MANY).abs().flatten(1).amax(dim=1) > 0.01
    # equalize would, too, on 255 pixels and more
    assert 8 < changed.sum() < 40


@pytest.mark.parametrize(
    ("step", "match"),
    [
        (
            {"rand_augment": {"magnitude": 31}},
            r"in 0\.\.30; found: .*rand_augment\.magnitude",
        ),
        (
            {"rand_augment": {"operations": 0}},
            r"1 or more; found: .*rand_augment\.operations",
        ),
        ({"rand_augment": {"n": 2}}, r"augment\[0\]\.rand_augment\.n"),
        ({"trivial_augment": {"beyond": "grey"}}, r"trivial_augment\.beyond: 'grey'"),
    ],
)
def test_a_policy_that_cannot_be_is_refused(step, match):
    with pytest.raises(RecipeError, match=match):
        build_chain([step], (0.5, 0.5, 0.5), key="augment")
