import pytest
import torch

from edgereg.augment import compose
from edgereg.augment.chain import AUGMENTATIONS, Chain, build_chain
from edgereg.augment.draws import Draws
from edgereg.augment.geometric import Flip, Translate, warp
from edgereg.errors import DataError, RecipeError

MEAN = (0.5, 0.4, 0.3)
DRAWS = Draws(0, 0, torch.arange(40))
IMAGES = torch.rand(40, 3, 16, 16, generator=torch.Generator().manual_seed(0))
EVERYTHING = [
    {"flip": {}},
    {"affine": {"degrees": 10, "scale": [0.9, 1.1], "shear": 5, "translate": 0.1}},
    {"rgb_shift": None},
    {"vertical_flip": {}},
    {"crop": {"padding": 2, "beyond": "reflection"}},
    {"resized_crop": {"area": [0.3, 1.0]}},
    {"colour_jitter": {"hue": 0.1}},
    {"translate": {"pixels": 2}},
    {"rotate": {"degrees": 10, "beyond": "zeros"}},
    {"scale": {"scale": [0.9, 1.1], "probability": 0.5}},
    {"shear": {"horizontal": 5, "vertical": 5}},
    {"greyscale": {"probability": 0.5}},
    {"blur": {"sigma": [0.5, 1.0]}},
    {"noise": {}},
    {"cutout": {"size": 5}},
    {"some": {"probability": 0.66, "steps": [{"posterize": {}}, {"solarize": {}}, {"flip": {}}]}},
    {"one_of": [{"autocontrast": {}}, {"equalize": {}}, {"sharpness": {}}, {"flip": {}}]},
]


def build(*steps):
    return build_chain(list(steps), MEAN, key="augment")


def names_in(steps):
    for step in steps:
        ((name, options),) = step.items()
        yield name
        if name in ("some", "one_of"):
            yield from names_in(options["steps"] if name == "some" else options)


def test_every_augmentation_of_these_modules_can_be_written_in_a_recipe():
    names = list(names_in(EVERYTHING))
    assert [type(step) for step in build(*EVERYTHING).steps] == [
        AUGMENTATIONS[name] for step in EVERYTHING for name in step
    ]
    ours = ("colour", "geometric", "filters", "tone", "chain")
    modules = tuple(f"edgereg.augment.{name}" for name in ours)
    assert {n for n, kind in AUGMENTATIONS.items() if kind.__module__ in modules} <= set(names)


def test_options_reach_the_augmentation():
    (step,) = build({"affine": {"degrees": 10, "scale": [0.9, 1.1]}}).steps
    assert step.degrees == 10 and step.scale == (0.9, 1.1) and step.shear == 0


@pytest.mark.parametrize(
    ("step", "match"),
    [
        ({"flop": {}}, r"augment\[0\]: 'flop'; remedy: did you mean 'flip'\?"),
        ({"gray_scale": {}}, "did you mean 'greyscale'"),
        ({"xyz": {}}, "choose one of: affine, autocontrast, blur"),
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
        ({"crop": {"beyond": "mirror"}}, r"one of border, reflection, zeros; .*crop\.beyond"),
        ({"flip": {"beyond": "zeros"}}, r"augment\[0\]\.flip\.beyond"),
        ({"flip": {"alternate": True, "probability": 0.3}}, r"flip\.probability: 0\.3, alternate"),
        ({"posterize": {"bits": 9}}, r"bits is in 1\.\.8; found: augment\[0\]\.posterize\.bits: 9"),
        ({"some": {"steps": [{"flop": {}}]}}, r"augment\[0\]\.some\.steps\[0\]: 'flop'"),
        ({"some": {"probability": 0.5}}, "some needs steps"),
        ({"some": {"steps": []}}, r"augment\[0\]\.some\.steps: none"),
        ({"some": {"steps": {"flip": {}}}}, "a chain is a list of steps"),
        ({"one_of": [{"flip": {"probability": 2}}]}, r"one_of\.steps\[0\]\.flip\.probability: 2"),
        ({"one_of": []}, r"augment\[0\]\.one_of\.steps: none"),
        ({"flip": {3: 1}}, r"augment\[0\]\.flip\.3"),
        ({3: {}}, r"augment\[0\]: '3'"),
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
        own = Draws(compose._seed(DRAWS.seed, place), DRAWS.epoch, DRAWS.indices)
        apart = warp(apart, step.matrices(own, *images.shape[2:]))
    fused = Chain(steps, MEAN)(images, DRAWS)
    assert (fused - apart).abs().max() < 1e-12
    assert (fused - images).abs().max() > 0.5


def test_moves_that_follow_one_another_resample_once(monkeypatch):
    calls = []
    monkeypatch.setattr(compose, "warp", lambda *a, **k: calls.append(1) or warp(*a, **k))
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


def test_moves_that_differ_in_what_lies_beyond_resample_apart(monkeypatch):
    calls = []
    spy = lambda *a, **k: calls.append(k["padding"]) or warp(*a, **k)  # noqa: E731
    monkeypatch.setattr(compose, "warp", spy)
    flip, crop = {"flip": {}}, {"crop": {}}
    build(flip, crop, {"resized_crop": {}}, {"translate": {"pixels": 2}}, flip)(IMAGES, DRAWS)
    assert calls == ["zeros", "border"]


def test_padding_before_and_after_a_flip_is_what_the_step_says():
    images = torch.ones(40, 3, 16, 16)
    for steps in ([{"crop": {}}, {"flip": {}}], [{"flip": {}}, {"crop": {}}]):
        out = build(*steps)(images, DRAWS)
        assert (out == 0).any(dim=(1, 2, 3)).sum() > 30
        assert ((out < 1e-5) | (out > 1 - 1e-5)).all()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("piece_bytes", [compose._PIECE_BYTES, 7 * 4 * 3 * 16 * 16])
def test_a_sample_becomes_the_same_bits_in_any_batch(threads, piece_bytes, monkeypatch):
    monkeypatch.setattr(compose, "_PIECE_BYTES", piece_bytes)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        chain = build(*EVERYTHING)
        whole = chain(IMAGES, DRAWS)
        for one in range(len(IMAGES)):
            alone = chain(IMAGES[one : one + 1], Draws(0, 0, torch.tensor([one])))
            assert torch.equal(alone[0], whole[one]), one
        some = torch.tensor([31, 2, 17])
        assert torch.equal(chain(IMAGES[some], Draws(0, 0, some)), whole[some])
    finally:
        torch.set_num_threads(before)
    assert (chain(IMAGES, Draws(0, 1, DRAWS.indices)) - whole).abs().max() > 0.1


def test_a_large_image_becomes_the_same_bits_in_any_batch_on_two_threads():
    images = torch.rand(3, 3, 190, 200, generator=torch.Generator().manual_seed(1))
    chain = build({"affine": {"degrees": 9}}, {"colour_jitter": {"hue": 0.1}}, {"noise": {}})
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        whole = chain(images, Draws(0, 0, torch.arange(3)))
        alone = chain(images[1:2], Draws(0, 0, torch.tensor([1])))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(alone[0], whole[1])


def test_a_batch_in_pieces_is_the_batch_at_once(monkeypatch):
    chain = build(*EVERYTHING)
    at_once = chain(IMAGES, DRAWS)
    sizes = []
    monkeypatch.setattr(compose, "_piece_size", lambda images: 7)
    monkeypatch.setattr(
        compose, "warp", lambda x, *a, **k: sizes.append(len(x)) or warp(x, *a, **k)
    )
    assert torch.equal(chain(IMAGES, DRAWS), at_once)
    assert max(sizes) == 7 and sizes.count(5) >= 1, "40 images are five pieces of 7 and one of 5"


def test_bytes_become_what_their_floats_become():
    images = (IMAGES * 255).round().to(torch.uint8)
    before = images.clone()
    for steps in (EVERYTHING, []):
        out = build(*steps)(images, DRAWS)
        assert out.dtype == torch.float32
        assert torch.equal(out, build(*steps)(images.float() / 255, DRAWS))
    # as a batch of rows of pixels comes, seen as planes
    nhwc = images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    assert torch.equal(build(*EVERYTHING)(nhwc, DRAWS), build(*EVERYTHING)(images, DRAWS))
    assert torch.equal(images, before)


def test_other_numbers_are_refused():
    with pytest.raises(DataError, match=r"uint8, or float in \[0, 1\]; found: torch.int64"):
        build({"flip": {}})(IMAGES.long(), DRAWS)


def test_a_batch_of_none_is_fine():
    out = build(*EVERYTHING)(IMAGES[:0].to(torch.uint8), Draws(0, 0, torch.arange(0)))
    assert out.shape == (0, 3, 16, 16) and out.dtype == torch.float32


def test_some_leaves_the_others_as_they_are():
    chain = build({"some": {"probability": 0.3, "steps": [{"rgb_shift": {}}, {"noise": {}}]}})
    draws = Draws(0, 0, torch.arange(400))
    images = IMAGES[:1].expand(400, 3, 16, 16)
    same = (chain(images, draws) == images).flatten(1).all(dim=1)
    assert 240 < same.sum() < 320


def test_one_of_gives_each_sample_one_of_its_steps():
    steps = [{"greyscale": {"probability": 1}}, {"flip": {"probability": 1}}, {"posterize": {}}]
    images = IMAGES[:1].expand(600, 3, 16, 16)
    out = build({"one_of": steps})(images, Draws(0, 0, torch.arange(600)))
    is_grey = (out[:, 0] == out[:, 1]).flatten(1).all(dim=1)
    is_flipped = torch.isclose(out, images.flip(3), atol=1e-5).flatten(1).all(dim=1)
    is_posterized = torch.tensor([len(image.unique()) <= 256 for image in out])
    kinds = torch.stack([is_grey, is_flipped, is_posterized & ~is_grey])
    assert (kinds.sum(dim=0) == 1).all()
    assert (kinds.sum(dim=1) > 150).all()


def test_one_of_some_changes_some():
    chain = build({"one_of": {"steps": [{"rgb_shift": {}}], "probability": 0.5}})
    same = (chain(IMAGES, DRAWS) == IMAGES).flatten(1).all(dim=1)
    assert 8 < same.sum() < 32


def test_an_empty_chain_returns_the_images():
    assert build()(IMAGES, DRAWS) is IMAGES


def test_colour_steps_leave_out_what_moves_or_hides():
    chain = build(*EVERYTHING).colour_steps()
    names = [type(step).__name__ for step in chain.steps]
    assert names == ["RGBShift", "ColourJitter", "Greyscale", "Blur", "Noise", "Some", "OneOf"]
    inner = [type(step).__name__ for step in chain.steps[-2].steps.steps]
    assert inner == ["Posterize", "Solarize"]
    nothing = build({"some": {"steps": [{"flip": {}}]}}).colour_steps()
    assert nothing.steps == ()
