import pytest
import torch

from edgereg.augment import chain as chain_module
from edgereg.augment.chain import AUGMENTATIONS, Chain, build_chain
from edgereg.augment.draws import Draws
from edgereg.augment.geometric import Flip, Translate, warp
from edgereg.errors import RecipeError

MEAN = (0.5, 0.4, 0.3)
DRAWS = Draws(0, 0, torch.arange(40))
IMAGES = torch.rand(40, 3, 16, 16, generator=torch.Generator().manual_seed(0))
EVERYTHING = [
    {"flip": {}},
    {"affine": {"degrees": 10, "scale": [0.9, 1.1], "shear": 5, "translate": 0.1}},
    {"rgb_shift": None},
    {"resized_crop": {"area": [0.3, 1.0]}},
    {"colour_jitter": {}},
    {"translate": {"pixels": 2}},
    {"greyscale": {"probability": 0.5}},
    {"cutout": {"size": 5}},
]


def build(*steps):
    return build_chain(list(steps), MEAN, key="augment")


def test_every_augmentation_can_be_written_in_a_recipe():
    chain = build(*EVERYTHING)
    assert {type(step) for step in chain.steps} == set(AUGMENTATIONS.values())


def test_options_reach_the_augmentation():
    (step,) = build({"affine": {"degrees": 10, "scale": [0.9, 1.1]}}).steps
    assert step.degrees == 10 and step.scale == (0.9, 1.1) and step.shear == 0


@pytest.mark.parametrize(
    ("step", "match"),
    [
        ({"flop": {}}, r"augment\[0\]: 'flop'; remedy: did you mean 'flip'\?"),
        ({"gray_scale": {}}, "did you mean 'greyscale'"),
        ({"xyz": {}}, "choose one of: affine, colour_jitter"),
        ({"affine": {"degree": 3}}, r"augment\[0\]\.affine\.degree; .* did you mean 'degrees'\?"),
        ({"translate": {}}, "translate needs pixels"),
        ({"flip": {"probability": 1.5}}, r"flip\.probability: 1\.5"),
        ({"flip": {"probability": float("nan")}}, r"flip\.probability: nan"),
        ({"affine": {"degrees": float("inf")}}, r"affine\.degrees: inf"),
        ({"affine": {"degrees": "ten"}}, r"affine\.degrees: 'ten'"),
        ({"affine": {"degrees": True}}, r"affine\.degrees: True"),
        ({"affine": {"degrees": [1, 2]}}, r"affine\.degrees: \[1, 2\]"),
        ({"affine": {"degrees": -5}}, r"affine\.degrees: -5"),
        ({"affine": {"scale": 1.1}}, r"affine\.scale: 1\.1"),
        ({"affine": {"scale": [1.1, 0.9]}}, r"affine\.scale: \[1\.1, 0\.9\]"),
        ({"affine": {"scale": [0, 1]}}, r"affine\.scale: \[0, 1\]"),
        ({"affine": {"scale": [1, 1, 1]}}, r"affine\.scale: \[1, 1, 1\]"),
        ({"affine": {"scale": []}}, r"affine\.scale: \[\]"),
        ({"cutout": {"size": 8.5}}, r"cutout\.size: 8\.5"),
        ({"flip": 0.5}, r"augment\[0\]\.flip: 0\.5"),
        ({"flip": {}, "cutout": {}}, "one augmentation's name"),
        ("flip", "one augmentation's name"),
    ],
)
def test_what_cannot_be_is_refused_and_named(step, match):
    with pytest.raises(RecipeError, match=match):
        build(step)


def test_the_place_in_the_list_is_named():
    with pytest.raises(RecipeError, match=r"augment\[1\]: 'flop'"):
        build({"flip": {}}, {"flop": {}})


def test_fused_moves_equal_moves_one_after_the_other():
    # a border as wide as the moves hides that one after the other loses what leaves the image
    images = torch.nn.functional.pad(IMAGES.double(), (9, 9, 9, 9))
    steps = (Translate(3), Flip(0.5), Translate(4), Flip(1.0), Translate(2))
    apart = images
    for place, step in enumerate(steps):
        own = Draws(chain_module._seed(DRAWS.seed, place), DRAWS.epoch, DRAWS.indices)
        apart = warp(apart, step.matrices(own, *images.shape[2:]))
    fused = Chain(steps, MEAN)(images, DRAWS)
    assert (fused - apart).abs().max() < 1e-12
    assert (fused - images).abs().max() > 0.5


def test_moves_that_follow_one_another_resample_once(monkeypatch):
    calls = []
    monkeypatch.setattr(chain_module, "warp", lambda x, m: calls.append(1) or warp(x, m))
    moves = [{"flip": {}}, {"affine": {"degrees": 5}}, {"translate": {"pixels": 1}}]
    build(*moves)(IMAGES, DRAWS)
    assert len(calls) == 1
    build(*moves, {"greyscale": {}}, *moves)(IMAGES, DRAWS)
    assert len(calls) == 3


def test_steps_are_applied_in_their_order():
    grey_first = build({"greyscale": {"probability": 1}}, {"rgb_shift": {}})(IMAGES, DRAWS)
    grey_last = build({"rgb_shift": {}}, {"greyscale": {"probability": 1}})(IMAGES, DRAWS)
    assert (grey_last[:, 0] == grey_last[:, 1]).all()
    assert not (grey_first[:, 0] == grey_first[:, 1]).any(dim=(1, 2)).all()


def test_the_same_step_twice_draws_twice():
    # two squares in the same place would hide no more than one
    once, twice = (build(*[{"cutout": {"size": 6}}] * n)(IMAGES, DRAWS) for n in (1, 2))
    changed = [(out != IMAGES).any(dim=1).sum().item() for out in (once, twice)]
    assert changed[1] > 1.5 * changed[0]


def test_a_whole_chain_keeps_shape_range_and_input():
    before = IMAGES.clone()
    out = build(*EVERYTHING)(IMAGES, DRAWS)
    assert out.shape == IMAGES.shape and out.dtype == IMAGES.dtype
    assert out.min() >= 0 and out.max() <= 1 and torch.equal(IMAGES, before)


def test_a_sample_is_augmented_the_same_in_any_batch():
    some = torch.tensor([31, 2, 17])
    chain = build(*EVERYTHING)
    alone = chain(IMAGES[some], Draws(0, 0, some))
    assert (alone - chain(IMAGES, DRAWS)[some]).abs().max() < 1e-6
    assert (chain(IMAGES, Draws(0, 1, DRAWS.indices)) - chain(IMAGES, DRAWS)).abs().max() > 0.1


def test_an_empty_chain_returns_the_images():
    assert build()(IMAGES, DRAWS) is IMAGES


def test_colour_steps_leave_out_what_moves_or_hides():
    names = [type(step).__name__ for step in build(*EVERYTHING).colour_steps().steps]
    assert names == ["RGBShift", "ColourJitter", "Greyscale"]
