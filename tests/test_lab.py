import pytest
import torch

from edgereg.ssl.lab import grey_of, lab_to_rgb, rgb_to_lab

COLOURS = {  # CIE Lab under D65, from the guide
    (255, 0, 0): (53.2406, 80.0923, 67.2028),
    (0, 255, 0): (87.7351, -86.1830, 83.1797),
    (0, 0, 255): (32.2957, 79.1856, -107.8573),
    (255, 255, 0): (97.1395, -21.5547, 94.4781),
    (255, 255, 255): (100.0, -0.0025, 0.0047),
    (128, 128, 128): (53.5850, -0.0015, 0.0028),
    (0, 0, 0): (0.0, 0.0, 0.0),
}


def image_of(*colours):
    """Return (1, 3, 1, N) float32 in [0, 1] from colours of 0..255."""
    return torch.tensor(colours).T[None, :, None].float() / 255


def cube(step):
    """Return every step-th sRGB colour, (1, 3, N, 256)."""
    some = torch.arange(0, 256, step).float() / 255
    axes = torch.meshgrid(some, some, torch.arange(256).float() / 255, indexing="ij")
    return torch.stack(axes).reshape(1, 3, -1, 256)


@pytest.mark.parametrize(("colour", "expected"), COLOURS.items(), ids=str)
def test_known_colours_have_their_coordinates(colour, expected):
    found = rgb_to_lab(image_of(colour)).flatten()
    assert (found - torch.tensor(expected)).abs().max() < 1e-3


def test_every_colour_comes_back():
    colours = cube(5)
    assert (lab_to_rgb(rgb_to_lab(colours)) - colours).abs().max() < 1e-4


def test_a_colour_that_is_shifted_does_not_come_back():
    lab = rgb_to_lab(image_of((100, 120, 140)))
    lab[:, 1] += 1
    assert (lab_to_rgb(lab) - image_of((100, 120, 140))).abs().max() > 1e-3


def test_the_gamut_has_its_known_bounds():
    lab = rgb_to_lab(cube(255))  # the extremes are corners and edges of the cube
    a, b = lab[:, 1], lab[:, 2]
    found = torch.stack([a.min(), a.max(), b.min(), b.max()])
    assert (found - torch.tensor([-86.183, 98.233, -107.857, 94.478])).abs().max() < 2e-3


def test_a_grey_image_has_the_lightness_of_the_colours_and_no_colour():
    colours = cube(15)
    grey = grey_of(colours)
    assert torch.equal(grey[:, 0], grey[:, 1]) and torch.equal(grey[:, 0], grey[:, 2])
    lab = rgb_to_lab(grey)
    assert (lab[:, 0] - rgb_to_lab(colours)[:, 0]).abs().max() < 1e-3
    assert lab[:, 1:].abs().max() < 5e-3


def test_what_no_screen_can_show_is_clipped():
    impossible = torch.tensor([50.0, 120.0, -120.0]).reshape(1, 3, 1, 1)
    found = lab_to_rgb(impossible)
    assert found.min() == 0 and found.max() <= 1 and found.isfinite().all()


def test_autocast_rounds_nothing():
    colours = image_of(*COLOURS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lab = rgb_to_lab(colours)
        back = lab_to_rgb(lab)
    assert torch.equal(lab, rgb_to_lab(colours)) and lab.dtype == torch.float32
    assert (back - colours).abs().max() < 1e-4


def test_scikit_image_agrees():
    color = pytest.importorskip("skimage.color", reason="scikit-image is not installed")
    colours = cube(15)
    expected = torch.from_numpy(color.rgb2lab(colours[0].permute(1, 2, 0).double().numpy()))
    assert (rgb_to_lab(colours)[0].permute(1, 2, 0) - expected).abs().max() < 5e-3
