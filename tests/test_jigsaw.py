import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from uniformity import assert_uniform

from edgereg.augment.chain import Chain
from edgereg.augment.colour import RGBShift
from edgereg.augment.draws import Draws
from edgereg.ssl import jigsaw
from edgereg.ssl.jigsaw import JigsawSizes, cut_patches, jigsaw_sizes, jigsaw_views

MEAN = (0.5, 0.5, 0.5)
PLAIN = Chain((), MEAN)
DRAWS = Draws(0, 0, torch.arange(60))


def coordinates(count, side):
    """(count, 3, side, side) float64: each pixel holds its row, its column and zero."""
    row = torch.arange(side, dtype=torch.float64)[:, None].expand(side, side)
    return torch.stack([row, row.T, torch.zeros(side, side)]).expand(count, 3, side, side)


@pytest.mark.parametrize(
    ("image_size", "sizes"), [(224, JigsawSizes(255, 85, 64)), (32, JigsawSizes(33, 11, 8))]
)
def test_the_sizes_are_the_papers_and_the_guides(image_size, sizes):
    assert jigsaw_sizes(image_size) == sizes


@pytest.mark.parametrize("image_size", range(16, 1025, 4))
def test_any_size_keeps_the_proportions(image_size):
    sizes = jigsaw_sizes(image_size)
    assert sizes.crop == 3 * sizes.cell and sizes.patch < sizes.cell
    assert abs(sizes.patch - sizes.cell * 64 / 85) <= 0.5
    assert 0.9 < sizes.crop / image_size < 1.2


@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(st.sampled_from([16, 32, 64, 224]), st.data())
def test_patches_are_contiguous_and_inside_their_own_cells(image_size, data):
    sizes = jigsaw_sizes(image_size)
    slack = sizes.cell - sizes.patch
    within = st.integers(0, slack)
    offsets = torch.tensor(data.draw(st.lists(within, min_size=18, max_size=18)))
    (patches,) = cut_patches(coordinates(1, sizes.crop), sizes, offsets[None])
    assert patches.shape == (9, 3, sizes.patch, sizes.patch)
    for cell, patch in enumerate(patches.long()):
        top = cell // 3 * sizes.cell + offsets[cell]
        left = cell % 3 * sizes.cell + offsets[9 + cell]
        steps = torch.arange(sizes.patch)
        assert torch.equal(patch[0], (top + steps)[:, None].expand_as(patch[0]))
        assert torch.equal(patch[1], (left + steps)[None].expand_as(patch[1]))
        assert (patch[0] // sizes.cell == cell // 3).all()
        assert (patch[1] // sizes.cell == cell % 3).all()


def test_each_sample_is_cut_from_its_own_image():
    sizes = jigsaw_sizes(32)
    crops = torch.arange(4.0)[:, None, None, None].expand(4, 3, 33, 33)
    patches = cut_patches(crops, sizes, torch.zeros(4, 18, dtype=torch.int64))
    assert (patches == torch.arange(4.0)[:, None, None, None, None]).all()


def test_the_inverse_of_the_order_restores_the_grid():
    patches, order = jigsaw_views(coordinates(60, 32), DRAWS, PLAIN)
    restored = patches[torch.arange(60)[:, None], order.argsort(dim=1)]
    centres = restored[:, :, :2].mean(dim=(3, 4)).reshape(60, 3, 3, 2)
    assert (centres[:, :, :, 0].diff(dim=1) > 0).all(), "rows descend"
    assert (centres[:, :, :, 1].diff(dim=2) > 0).all(), "columns descend"
    shuffled = patches[:, :, :2].mean(dim=(3, 4)).reshape(60, 3, 3, 2)
    assert not (shuffled[:, :, :, 0].diff(dim=1) > 0).all(dim=(1, 2)).any()


def test_the_view_shows_at_least_three_fifths_of_the_image():
    patches, _ = jigsaw_views(coordinates(60, 32), DRAWS, PLAIN)
    inner = patches[:, :, :, 1:-1, 1:-1]  # beyond the image the border is repeated
    down = inner[:, :, 0].diff(dim=2).mean(dim=(1, 2, 3)) * 33 / 32
    across = inner[:, :, 1].diff(dim=3).mean(dim=(1, 2, 3)) * 33 / 32
    assert 0.58 < (down * across).min() < 0.68 and 0.9 < (down * across).max() <= 1.001


def test_offsets_are_even_over_the_slack_of_a_cell_and_leave_neighbours_apart(monkeypatch):
    seen = []
    spy = lambda *args: seen.append(args[2]) or cut_patches(*args)  # noqa: E731
    monkeypatch.setattr(jigsaw, "cut_patches", spy)
    jigsaw_views(torch.zeros(600, 3, 32, 32), Draws(0, 0, torch.arange(600)), PLAIN)
    assert_uniform(seen[0], 11 - 8)
    jigsaw_views(torch.zeros(9, 3, 224, 224), Draws(0, 0, torch.arange(9)), PLAIN)
    assert (seen[1].min(), seen[1].max()) == (0, 20)


def test_every_cell_is_as_likely_in_every_slot():
    draws = Draws(0, 0, torch.arange(10_000))
    _, order = jigsaw_views(torch.zeros(10_000, 3, 16, 16), draws, PLAIN)
    for slot in range(9):
        assert_uniform(order[:, slot], 9)


def test_each_patch_is_recoloured_by_itself():
    images = torch.full((60, 3, 32, 32), 0.5)
    patches, _ = jigsaw_views(images, DRAWS, Chain((RGBShift(0.3),), MEAN))
    colours = patches.mean(dim=(3, 4))
    assert (patches - colours[:, :, :, None, None]).abs().max() < 1e-6
    assert len(colours.reshape(540, 3).unique(dim=0)) == 540


def test_a_view_is_the_same_in_any_batch():
    images = torch.rand(60, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    chain, some = Chain((RGBShift(0.3),), MEAN), torch.tensor([31, 4])
    patches, order = jigsaw_views(images, DRAWS, chain)
    alone, its_order = jigsaw_views(images[some], Draws(0, 0, some), chain)
    assert torch.equal(order[some], its_order)
    assert (patches[some] - alone).abs().max() < 1e-6
