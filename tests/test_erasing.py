import random

import pytest
import torch
from uniformity import assert_uniform

from deploy.runtime.preprocess import Preprocessing
from edgereg.augment.chain import build_chain
from edgereg.augment.draws import Draws
from edgereg.augment.erasing import Cutout, RandomErasing, _span
from edgereg.errors import RecipeError
from edgereg.train.normalize import Normalize

MEAN = torch.tensor([0.485, 0.456, 0.406])
IMAGES = 2 + torch.rand(500, 3, 32, 28, generator=torch.Generator().manual_seed(0))
DRAWS = Draws(0, 0, torch.arange(500))


def hidden_by(step, images=IMAGES, draws=DRAWS):
    """(B, H, W) bool."""
    return (step.erase(images, draws, MEAN) != images).all(dim=1)


@pytest.mark.parametrize(
    ("length", "size", "share"),
    [(32, 16, 0.19141), (32, 8, 0.05493), (28, 14, 0.19141), (28, 8, 0.07039), (32, 20, 0.27809)],
)
def test_the_mean_hidden_share_is_that_of_a_square_clipped_at_the_border(length, size, share):
    # all centres of one axis; the two axes are independent and alike
    hidden = _span(torch.arange(length)[:, None], size, length)
    assert hidden.double().mean().item() ** 2 == pytest.approx(share, abs=5e-6)


@pytest.mark.parametrize("size", [1, 5, 8])
def test_a_square_far_from_the_border_has_its_whole_side(size):
    span = _span(torch.tensor([[16]]), size, 32)[0]
    places = span.nonzero().flatten()
    assert len(places) == size
    assert places.tolist() == list(range(places[0], places[0] + size))
    assert abs(places.double().mean() - 16) <= 0.5


def test_what_is_hidden_is_one_box_and_all_else_is_untouched():
    out = Cutout(size=9).erase(IMAGES, DRAWS, MEAN)
    hidden = hidden_by(Cutout(size=9))
    boxes = hidden.any(dim=2)[:, :, None] & hidden.any(dim=1)[:, None, :]
    assert torch.equal(hidden, boxes)
    assert hidden.any(dim=2).sum(dim=1).max() == hidden.any(dim=1).sum(dim=1).max() == 9
    shown = ~hidden[:, None].expand_as(out)
    assert torch.equal(out[shown], IMAGES[shown])
    assert torch.equal(out.permute(0, 2, 3, 1)[hidden], MEAN.expand(int(hidden.sum()), 3))


def test_the_centre_lies_anywhere_so_borders_are_clipped():
    rows = hidden_by(Cutout(size=8)).any(dim=2).sum(dim=1)
    assert rows.min() == 4 and rows.max() == 8
    share = hidden_by(Cutout(size=8)).double().mean()
    # 240 / 1024 of the rows times 208 / 784 of the columns, by enumeration
    assert share == pytest.approx(240 / 1024 * 208 / 784, rel=0.05)


def test_each_sample_hides_a_place_of_its_own_whatever_the_batch():
    hidden = hidden_by(Cutout(size=8))
    assert len(hidden.unique(dim=0)) > 300
    some = torch.tensor([44, 3])
    assert torch.equal(hidden_by(Cutout(size=8), IMAGES[some], Draws(0, 0, some)), hidden[some])


def test_the_probability_is_the_share_of_images():
    assert hidden_by(Cutout(probability=1)).any(dim=(1, 2)).all()
    assert not hidden_by(Cutout(probability=0)).any()
    assert 0.2 < hidden_by(Cutout(probability=0.25)).any(dim=(1, 2)).double().mean() < 0.3


def test_the_hidden_part_is_exactly_zero_after_normalization():
    spec = Preprocessing(32, 28, "stretch", 1.0, tuple(MEAN.tolist()), (0.2, 0.3, 0.4))
    normalized = Normalize(spec)(Cutout(size=8).erase(IMAGES, DRAWS, MEAN))
    hidden = hidden_by(Cutout(size=8))
    assert (normalized.permute(0, 2, 3, 1)[hidden] == 0).all()


def boxes_of(step, count=3000, height=32, width=28):
    """Return (B, 4) long: top, left, height and width of what is hidden, all 0 if nothing is."""
    images = torch.full((count, 3, height, width), 2.0)
    hidden = hidden_by(step, images, Draws(1, 0, torch.arange(count)))
    rows, columns = hidden.any(dim=2), hidden.any(dim=1)
    assert torch.equal(hidden, rows[:, :, None] & columns[:, None, :]), "not a box"
    sides = torch.stack([rows.sum(dim=1), columns.sum(dim=1)], dim=1)
    starts = torch.stack([rows.int().argmax(dim=1), columns.int().argmax(dim=1)], dim=1)
    assert (sides[:, 0] == 0).eq(sides[:, 1] == 0).all()
    return torch.cat([starts, sides], dim=1)


def _reference_box(area, ratio, height, width):
    """Sides of a box by algorithm 1 of 1708.04896, drawn until it is no longer than the image."""
    while True:
        pixels = random.uniform(*area) * height * width
        r = random.uniform(*ratio)
        tall, wide = round((pixels * r) ** 0.5), round((pixels / r) ** 0.5)
        if tall <= height and wide <= width:
            return tall, wide


@pytest.mark.parametrize("area", [(0.02, 0.4), (0.5, 0.9)])
def test_the_sides_of_a_box_are_spread_as_in_the_paper(area):
    step = RandomErasing(probability=1, area=area)
    boxes = boxes_of(step).double()
    random.seed(0)
    expected = torch.tensor([_reference_box(area, step.ratio, 32, 28) for _ in range(3000)])
    for own, theirs in zip(boxes[:, 2:].T, expected.double().T, strict=True):
        assert distance(own, theirs) < 0.05  # more is met with less than once in 900
    turned = torch.stack([expected[:, 1], expected[:, 0]])
    assert distance(boxes[:, 2], turned[0].double()) > 0.1, "height and width cannot be told apart"


def distance(a, b):
    """The greatest difference of two distribution functions (Kolmogorov and Smirnov)."""
    at = torch.arange(40)
    return max(abs((a <= x).double().mean() - (b <= x).double().mean()) for x in at)


def test_a_box_lies_anywhere_inside_and_keeps_its_size():
    # 64 pixels of 32 x 28, as high as wide: 8 x 8, 25 places down and 21 across
    step = RandomErasing(probability=1, area=(64 / 896, 64 / 896), ratio=(1.0, 1.0))
    top, left, height, width = boxes_of(step).T
    assert (height == 8).all() and (width == 8).all()
    assert_uniform(top, 25)
    assert_uniform(left, 21)


def test_a_box_may_hide_the_whole_image():
    step = RandomErasing(probability=1, area=(1.0, 1.0), ratio=(1.0, 1.0))
    assert (boxes_of(step, 10, 16, 16) == torch.tensor([0, 0, 16, 16])).all()


def test_where_no_box_of_ten_fits_nothing_is_hidden():
    # 18 x 18 in 9 x 36: never
    step = RandomErasing(probability=1, area=(1.0, 1.0), ratio=(1.0, 1.0))
    assert (boxes_of(step, 10, 9, 36) == 0).all()


def test_random_erasings_probability_is_the_share_of_images_and_choice_changes_no_box():
    every, some = (boxes_of(RandomErasing(probability=p)) for p in (1, 0.3))
    chosen = some[:, 2] > 0
    assert (every[:, 2] > 0).all() and 0.27 < chosen.double().mean() < 0.33
    assert torch.equal(some[chosen], every[chosen])


def test_a_box_is_filled_as_asked_and_all_else_is_untouched():
    random_fill, mean, zero = (
        RandomErasing(probability=1, fill=fill).erase(IMAGES, DRAWS, MEAN)
        for fill in ("random", "mean", "zero")
    )
    hidden = (zero == 0).all(dim=1)
    shown = ~hidden[:, None].expand_as(IMAGES)
    for out in (random_fill, mean, zero):
        assert torch.equal(out[shown], IMAGES[shown])
    values = mean.permute(0, 2, 3, 1)[hidden]
    assert torch.equal(values, MEAN.expand_as(values))
    values = random_fill.permute(0, 2, 3, 1)[hidden]
    assert_uniform((values * 64).long(), 64)
    assert len(values.unique(dim=0)) > 0.99 * len(values), "the colours are not random"


@pytest.mark.parametrize("fill", ["random", "mean"])
def test_random_erasing_treats_each_sample_by_itself_and_leaves_the_input(fill):
    step, before = RandomErasing(probability=0.7, fill=fill), IMAGES.clone()
    whole = step.erase(IMAGES, DRAWS, MEAN)
    assert torch.equal(IMAGES, before)
    some = torch.tensor([44, 3, 77])
    assert torch.equal(step.erase(IMAGES[some], Draws(0, 0, some), MEAN), whole[some])
    assert not torch.equal(step.erase(IMAGES, Draws(0, 1, DRAWS.indices), MEAN), whole)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"area": [0.5, 1.1]}, r"area is at most 1; found: augment\[0\]\.random_erasing\.area"),
        ({"area": [0.9, 0.9], "ratio": [2, 3]}, r"fits into a square; .*random_erasing\.ratio"),
        ({"area": [0.9, 0.9], "ratio": [0.2, 0.5]}, r"fits into a square; .*random_erasing\.ratio"),
        ({"fill": "white"}, r"one of random, mean, zero; .*random_erasing\.fill: 'white'"),
        ({"probability": 2}, r"random_erasing\.probability: 2"),
    ],
)
def test_random_erasing_that_cannot_be_is_refused(options, match):
    with pytest.raises(RecipeError, match=match):
        build_chain([{"random_erasing": options}], (0.5, 0.5, 0.5), key="augment")
