import pytest
import torch

from deploy.runtime.preprocess import Preprocessing
from edgereg.augment.draws import Draws
from edgereg.augment.erasing import Cutout, _span
from edgereg.train.normalize import Normalize

MEAN = torch.tensor([0.485, 0.456, 0.406])
IMAGES = 2 + torch.rand(500, 3, 32, 28, generator=torch.Generator().manual_seed(0))
DRAWS = Draws(0, 0, torch.arange(500))


def hidden_by(cutout, images=IMAGES, draws=DRAWS):
    """(B, H, W) bool."""
    return (cutout.erase(images, draws, MEAN) != images).all(dim=1)


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
