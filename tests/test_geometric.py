import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms import v2

from edgereg.augment.draws import Draws
from edgereg.augment.geometric import (
    Affine,
    Crop,
    Flip,
    ResizedCrop,
    Rotate,
    Scale,
    Shear,
    Translate,
    VerticalFlip,
    warp,
)

H, W = 12, 20
DRAWS = Draws(0, 0, torch.arange(200))
STEPS = [
    Flip(),
    VerticalFlip(),
    Crop(),
    Rotate(20),
    Scale((0.8, 1.25)),
    Shear(10, vertical=10),
    Affine(degrees=20, scale=(0.8, 1.25), shear=10, translate=0.1),
    Translate(4),
    ResizedCrop(),
]
PROPERTY = settings(max_examples=40, deadline=None, derandomize=True, database=None)
MATRICES = st.builds(
    lambda a, b, c, d, x, y: torch.tensor([[a, b, x], [c, d, y], [0, 0, 1]], dtype=torch.float64),
    *[st.floats(0.5, 1.5), st.floats(-0.4, 0.4), st.floats(-0.4, 0.4), st.floats(0.5, 1.5)],
    *[st.floats(-3, 3), st.floats(-3, 3)],
)


def noise(count, *, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return torch.rand(count, 3, H, W, generator=generator, dtype=dtype)


def places(height, width):
    """(2, height, width): x and y of each pixel's centre, from the image's centre."""
    x = torch.arange(width, dtype=torch.float64) + 0.5 - width / 2
    y = torch.arange(height, dtype=torch.float64) + 0.5 - height / 2
    return torch.stack([x.expand(height, width), y[:, None].expand(height, width)])


def moved(matrix, points):
    return torch.einsum("ij,jhw->ihw", matrix[:2, :2], points) + matrix[:2, 2, None, None]


def is_inside(points):
    return (points[0].abs() <= (W - 1) / 2) & (points[1].abs() <= (H - 1) / 2)


@PROPERTY
@given(matrix=MATRICES)
def test_a_matrix_maps_each_place_of_the_output_to_the_place_it_is_taken_from(matrix):
    # an image of its own coordinates is linear, so that bilinear resampling is exact
    out = warp(places(H, W)[None], matrix[None])[0]
    expected = moved(matrix, places(H, W))
    inside = is_inside(expected)
    assert inside.any()
    assert (out - expected)[:, inside].abs().max() < 1e-12


@PROPERTY
@given(matrix=MATRICES, height=st.integers(4, 30), width=st.integers(4, 30))
def test_another_size_is_first_stretched_over_the_input(matrix, height, width):
    out = warp(places(H, W)[None], matrix[None], size=(height, width))[0]
    stretched = places(height, width) * torch.tensor(
        [[[W / width]], [[H / height]]], dtype=torch.float64
    )
    expected = moved(matrix, stretched)
    inside = is_inside(expected)
    assert out.shape == (2, height, width)
    assert not inside.any() or (out - expected)[:, inside].abs().max() < 1e-12


@PROPERTY
@given(first=MATRICES, second=MATRICES)
def test_two_warps_are_one_by_the_product(first, second):
    image = places(H, W)[None]
    both = warp(image, (first @ second)[None])[0]
    apart = warp(warp(image, first[None]), second[None])[0]
    between = moved(second, places(H, W))
    # a pixel of the second warp is exact where all four it mixes were inside for the first
    corners = [between + torch.tensor([dx, dy])[:, None, None] for dx in (-1, 1) for dy in (-1, 1)]
    safe = is_inside(between)
    for corner in corners:
        safe &= is_inside(corner) & is_inside(moved(first, corner))
    assert not safe.any() or (both - apart)[:, safe].abs().max() < 1e-11


def test_the_order_of_two_warps_matters():
    turn = torch.tensor([[0.0, 1, 0], [-1, 0, 0], [0, 0, 1]], dtype=torch.float64)
    shift = torch.tensor([[1.0, 0, 3], [0, 1, 0], [0, 0, 1]], dtype=torch.float64)
    image = noise(1)
    assert not torch.allclose(warp(image, (turn @ shift)[None]), warp(image, (shift @ turn)[None]))


@pytest.mark.parametrize(
    "step",
    [
        Flip(probability=0),
        VerticalFlip(probability=0),
        Affine(),
        Translate(0),
        Crop(0),
        Rotate(0),
        Scale((1, 1)),
        Shear(0),
        ResizedCrop(area=(1, 1), ratio=(1, 1)),
        Affine(degrees=20, scale=(0.5, 0.9), probability=0),
        Rotate(20, probability=0),
        Scale((0.5, 0.9), probability=0),
        Shear(20, probability=0),
        Translate(4, probability=0),
        Crop(4, probability=0),
        ResizedCrop(probability=0),
    ],
    ids=lambda step: type(step).__name__,
)
def test_parameters_of_no_change_reproduce_the_image(step):
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        images = noise(5, dtype=dtype)
        out = warp(images, step.matrices(Draws(0, 0, torch.arange(5)), H, W))
        assert out.dtype == dtype
        assert (out - images).abs().max() < tolerance


def test_a_flip_is_the_mirror_image():
    images = noise(5)
    out = warp(images, Flip(probability=1).matrices(Draws(0, 0, torch.arange(5)), H, W))
    assert (out - images.flip(3)).abs().max() < 1e-12


def test_a_vertical_flip_stands_on_its_head():
    images = noise(5)
    out = warp(images, VerticalFlip(probability=1).matrices(Draws(0, 0, torch.arange(5)), H, W))
    assert (out - images.flip(2)).abs().max() < 1e-12


@pytest.mark.parametrize(("step", "axis"), [(Flip(), 0), (VerticalFlip(), 1)])
def test_half_of_the_samples_are_flipped(step, axis):
    signs = step.matrices(DRAWS, H, W)[:, axis, axis]
    assert set(signs.tolist()) == {1.0, -1.0} and 70 < (signs < 0).sum() < 130


def test_alternating_flips_show_both_sides_in_two_epochs_in_a_row():
    signs = [
        Flip(alternate=True).matrices(Draws(0, epoch, torch.arange(200)), H, W)[:, 0, 0]
        for epoch in range(4)
    ]
    assert 70 < (signs[0] < 0).sum() < 130
    assert torch.equal(signs[0], -signs[1])
    assert torch.equal(signs[0], signs[2]) and torch.equal(signs[1], signs[3])


@pytest.mark.parametrize("kind", [Affine, Rotate, Scale, Shear, Translate, Crop, ResizedCrop])
def test_a_probability_leaves_some_samples_in_their_place(kind):
    amount = {Affine: {"degrees": 9}, Rotate: {"degrees": 9}, Scale: {"scale": (2, 3)}}
    amount |= {Shear: {"horizontal": 9}, Translate: {"pixels": 40}, Crop: {"padding": 40}}
    always = kind(**amount.get(kind, {})).matrices(DRAWS, H, W)
    some = kind(**amount.get(kind, {}), probability=0.3).matrices(DRAWS, H, W)
    still = (some == torch.eye(3)).all(dim=2).all(dim=1)
    assert 110 < still.sum() < 170
    assert torch.equal(some[~still], always[~still])


@pytest.mark.parametrize(
    ("step", "mode"),
    [(Crop(4), "constant"), (Crop(4, beyond="reflection"), "symmetric"), (Translate(3), "edge")],
    ids=["zeros", "reflection", "border"],
)
def test_a_crop_is_a_part_of_the_padded_image(step, mode):
    images, most = noise(60), 4 if isinstance(step, Crop) else 3
    draws = Draws(0, 0, torch.arange(60))
    matrices = step.matrices(draws, H, W)
    out = warp(images, matrices, padding=step.beyond)
    for image, cropped, (dx, dy) in zip(images, out, matrices[:, :2, 2].long(), strict=True):
        padded = v2.functional.pad(image, [most], padding_mode=mode)
        expected = padded[:, most + dy : most + dy + H, most + dx : most + dx + W]
        assert (cropped - expected).abs().max() < 1e-12


def test_two_shears_stay_within_their_angles_and_keep_areas():
    matrices = Shear(30, vertical=20).matrices(DRAWS, H, W).double()
    across, down = matrices[:, 0, 1], matrices[:, 1, 0]
    assert 0.5 < across.abs().max() <= math.tan(math.radians(30)) + 1e-6
    assert 0.3 < down.abs().max() <= math.tan(math.radians(20)) + 1e-6
    assert torch.allclose(torch.linalg.det(matrices), torch.tensor(1.0, dtype=torch.float64))


@pytest.mark.parametrize(("angle", "zoom"), [(25.0, 1.0), (0.0, 1.3), (-40.0, 0.8)])
def test_a_rotation_and_a_scale_are_torchvisions(angle, zoom):
    image = noise(1, dtype=torch.float32)
    expected = v2.functional.affine(
        image, angle, [0, 0], zoom, [0, 0], interpolation=v2.InterpolationMode.BILINEAR
    )
    steps = Rotate(90), Scale((0.5, 2.0))
    turn, scale = (step.matrices(Draws(0, 0, torch.arange(4000)), H, W) for step in steps)
    # the draw next to the wanted angle; torchvision turns by it exactly
    angles = torch.rad2deg(torch.atan2(-turn[:, 0, 1], turn[:, 0, 0]))
    near = int((angles + angle).abs().argmin())
    zooms = 1 / scale[:, 0, 0]
    close = int((zooms - zoom).abs().argmin())
    out = warp(image, (turn[near] @ scale[close])[None], padding="zeros")
    difference = (out - expected).abs()[..., 2:-2, 2:-2]
    assert difference.median() < 5e-3 and (image - expected).abs().median() > 0.1


def test_a_resized_crop_is_torchvisions_with_and_without_its_filter():
    # it only enlarges, so that the filter is the identity; at the crop's own edge torchvision
    # repeats its last pixel, where a warp still sees the image beyond
    image = noise(1)
    top, left, height, width = 2, 5, 7, 12
    matrix = torch.eye(3, dtype=torch.float64)[None]
    matrix[0, 0, 0], matrix[0, 1, 1] = width / W, height / H
    matrix[0, 0, 2], matrix[0, 1, 2] = left + width / 2 - W / 2, top + height / 2 - H / 2
    out = warp(image, matrix)
    for antialias in (True, False):
        expected = v2.functional.resized_crop(
            image, top, left, height, width, [H, W], antialias=antialias
        )
        assert (out - expected)[..., 1:-1, 1:-1].abs().max() < 1e-12
    shrunk = v2.functional.resize(image, [6, 10], antialias=True)
    plain = warp(image, torch.eye(3, dtype=torch.float64)[None], size=(6, 10))
    assert (shrunk - plain).abs().max() > 0.05, "where it shrinks, the filter is not"


@pytest.mark.parametrize("padding", ["border", "reflection", "zeros"])
def test_a_warp_gives_a_sample_the_same_bits_in_any_batch(padding):
    images = noise(30, dtype=torch.float32)
    step = Affine(degrees=90, scale=(0.5, 2.0), translate=0.3, shear=20)
    matrices = step.matrices(DRAWS, H, W)[:30]
    whole = warp(images, matrices, padding=padding)
    for one in range(30):
        alone = step.matrices(Draws(0, 0, torch.tensor([one])), H, W)
        assert torch.equal(alone[0], matrices[one])
        assert torch.equal(warp(images[one : one + 1], alone, padding=padding)[0], whole[one])


def test_a_translation_moves_whole_pixels_and_repeats_the_border():
    images = noise(200)
    matrices = Translate(4).matrices(DRAWS, H, W)
    out = warp(images, matrices)
    for image, moved_image, (dx, dy) in zip(images, out, matrices[:, :2, 2].long(), strict=True):
        rows = (torch.arange(H) + dy).clamp(0, H - 1)
        columns = (torch.arange(W) + dx).clamp(0, W - 1)
        assert (moved_image - image[:, rows][:, :, columns]).abs().max() < 1e-12
    assert set(matrices[:, 0, 2].tolist()) == set(matrices[:, 1, 2].tolist()) == set(range(-4, 5))


@pytest.mark.parametrize("step", STEPS[2:], ids=lambda step: type(step).__name__)
def test_samples_are_moved_apart(step):
    matrices = step.matrices(DRAWS, H, W)
    assert len(matrices.unique(dim=0)) > 70  # a translation of 9 x 9 kinds repeats itself
    assert torch.equal(matrices[7:9], step.matrices(Draws(0, 0, torch.arange(7, 9)), H, W))


def test_a_rotation_keeps_lengths_and_stays_within_its_degrees():
    turns = Affine(degrees=15).matrices(DRAWS, H, W)[:, :2, :2]
    assert torch.allclose(turns @ turns.mT, torch.eye(2).expand(200, 2, 2), atol=1e-6)
    angles = torch.rad2deg(torch.atan2(turns[:, 0, 1], turns[:, 0, 0]))
    assert 14 < angles.abs().max() <= 15 and angles.min() < 0 < angles.max()


def test_a_scale_above_one_enlarges():
    matrices = Affine(scale=(2.0, 2.0)).matrices(DRAWS, H, W)
    assert torch.allclose(matrices, torch.diag(torch.tensor([0.5, 0.5, 1.0])).expand(200, 3, 3))


def test_a_shear_moves_rows_sideways_only():
    matrices = Affine(shear=45).matrices(DRAWS, H, W)
    assert torch.allclose(matrices[:, 1], torch.tensor([0.0, 1, 0]).expand(200, 3))
    assert 0.9 < matrices[:, 0, 1].abs().max() <= 1 + 1e-6


def test_a_scale_alone_changes_areas_beside_rotation_and_shear():
    matrices = Affine(degrees=40, shear=30, scale=(2.0, 2.0)).matrices(DRAWS, H, W)
    assert torch.allclose(torch.linalg.det(matrices), torch.tensor(0.25), atol=1e-6)
    # the first axis is only turned; the shear is seen in the second
    assert torch.allclose(matrices[:, :2, 0].norm(dim=1), torch.tensor(0.5), atol=1e-6)
    assert matrices[:, :2, 1].norm(dim=1).max() > 0.55


def test_a_share_of_translation_is_of_each_side():
    shifts = Affine(translate=0.1).matrices(DRAWS, H, W)[:, :2, 2].abs().amax(dim=0)
    assert 0.09 * W < shifts[0] <= 0.1 * W + 1e-6 and 0.09 * H < shifts[1] <= 0.1 * H + 1e-6


@PROPERTY
@given(
    area=st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)).map(sorted),
    ratio=st.tuples(st.floats(0.2, 5), st.floats(0.2, 5)).map(sorted),
)
def test_a_resized_crop_stays_inside_the_image(area, ratio):
    matrices = ResizedCrop(area=tuple(area), ratio=tuple(ratio)).matrices(DRAWS, H, W)
    edge = torch.tensor([[x * W / 2, y * H / 2, 1.0] for x in (-1, 1) for y in (-1, 1)])
    corners = (matrices @ edge.T)[:, :2]
    assert (corners[:, 0].abs() <= W / 2 + 1e-4).all() and (
        corners[:, 1].abs() <= H / 2 + 1e-4
    ).all()


def test_a_resized_crop_takes_its_share_of_the_area_at_its_ratio():
    crop = ResizedCrop(area=(0.2, 0.5), ratio=(0.5, 2.0))
    matrices = crop.matrices(DRAWS, H, W)
    across, down = matrices[:, 0, 0], matrices[:, 1, 1]
    assert 0.2 - 1e-6 <= (across * down).min() < 0.22 and 0.48 < (across * down).max() <= 0.5 + 1e-6
    assert 0.5 - 1e-6 <= (across / down).min() < 0.55 and 1.8 < (across / down).max() <= 2 + 1e-6
