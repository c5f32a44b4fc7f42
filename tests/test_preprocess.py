import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from deploy.errors import BadInputError
from deploy.runtime.preprocess import Preprocessing, fit, normalize, preprocess

SIDES = st.integers(1, 90)
IDENTITY = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


def stretch(height, width):
    return Preprocessing(height, width, "stretch", 1.0, **IDENTITY)


def random_image(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def torch_resize(image, height, width, *, antialias=True):
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None].double()
    resized = torch.nn.functional.interpolate(
        pixels, (height, width), mode="bilinear", antialias=antialias
    )
    return resized[0].permute(1, 2, 0).numpy()


def assert_within_one_level(actual, expected):
    # Two passes, each rounded to whole levels, against one that rounds only at the end or never.
    difference = np.abs(actual.astype(np.float64) - expected).max()
    assert difference <= 1.0 + 1e-6, f"{difference} grey levels apart"


@settings(max_examples=60, deadline=None, derandomize=True)
@given(h=SIDES, w=SIDES, height=SIDES, width=SIDES)
@example(h=1, w=1, height=7, width=5)
@example(h=90, w=90, height=1, width=1)
@example(h=90, w=2, height=13, width=77)
def test_stretching_equals_pillow_and_torch_within_one_level(h, w, height, width):
    image = random_image(h, w)
    actual = fit(image, stretch(height, width))
    resized = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
    assert actual.dtype == np.uint8
    assert actual.shape == (height, width, 3)
    assert_within_one_level(actual, np.asarray(resized))
    assert_within_one_level(actual, torch_resize(image, height, width))


def test_the_check_on_resizing_fails_a_resize_without_antialiasing():
    image = random_image(80, 80)
    sparse = torch_resize(image, 20, 20, antialias=False)
    with pytest.raises(AssertionError, match="grey levels apart"):
        assert_within_one_level(fit(image, stretch(20, 20)), sparse)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(h=SIDES, w=SIDES, size=st.integers(1, 40), fraction=st.sampled_from([1.0, 0.95, 0.875]))
def test_covering_equals_resize_and_centre_crop_of_torchvision(h, w, size, fraction):
    from torchvision import transforms

    image = random_image(h, w)
    steps = transforms.Compose(
        [transforms.Resize(int(size / fraction)), transforms.CenterCrop(size)]
    )
    actual = fit(image, Preprocessing(size, size, "cover", fraction, **IDENTITY))
    assert_within_one_level(actual, np.asarray(steps(Image.fromarray(image))))


def test_covering_fills_an_input_that_is_not_square():
    spec = Preprocessing(10, 30, "cover", 1.0, **IDENTITY)
    image = random_image(40, 60)
    expected = fit(image, stretch(20, 30))[5:15]
    np.testing.assert_array_equal(fit(image, spec), expected)


@pytest.mark.parametrize("resize", ["stretch", "cover"])
def test_an_image_of_the_right_size_is_left_as_it_is(resize):
    image = random_image(12, 17)
    spec = Preprocessing(12, 17, resize, 1.0, **IDENTITY)
    np.testing.assert_array_equal(fit(image, spec), image)


@pytest.mark.parametrize("level", [0, 1, 254, 255])
def test_a_flat_image_stays_flat_however_many_pixels_are_averaged(level):
    image = np.full((5000, 3, 3), level, np.uint8)
    assert np.unique(fit(image, stretch(3, 5))) == [level]


def test_normalizing_is_the_formula_in_channel_first_order():
    spec = Preprocessing(4, 5, "stretch", 1.0, (0.1, 0.2, 0.3), (0.5, 0.25, 0.125))
    images = np.stack([random_image(4, 5, seed) for seed in range(2)])
    actual = normalize(images, spec)
    expected = (images / 255 - np.array(spec.mean)) / np.array(spec.std)
    assert actual.dtype == np.float32
    assert actual.flags.c_contiguous
    np.testing.assert_allclose(actual, expected.transpose(0, 3, 1, 2), atol=1e-6)


def test_preprocessing_takes_images_of_several_sizes():
    batch = preprocess([random_image(3, 4), random_image(40, 20)], stretch(8, 6))
    assert batch.shape == (2, 3, 8, 6)
    assert batch.min() >= 0 and batch.max() <= 1


def test_preprocessing_refuses_an_empty_batch():
    with pytest.raises(BadInputError, match="must hold an image"):
        preprocess([], stretch(8, 6))


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((4, 4, 3), np.float32),
        np.zeros((0, 4, 3), np.uint8),
    ],
)
def test_fitting_refuses_what_is_no_rgb_image(image):
    with pytest.raises(BadInputError, match=r"\(height, width, 3\) uint8"):
        fit(image, stretch(8, 6))


def test_a_specification_survives_json():
    spec = Preprocessing(224, 192, "cover", 0.875, (0.1, 0.2, 0.3), (0.5, 0.25, 0.125))
    document = spec.to_json() | {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.25, 0.125]}
    assert Preprocessing.from_json(document) == spec
    with pytest.raises(BadInputError, match="unknown key 'interpolation'"):
        Preprocessing.from_json(document | {"interpolation": "cubic"})


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"height": 0}, "height must be"),
        ({"width": 20000}, "width must be"),
        ({"resize": "squash"}, "resize must be"),
        ({"crop_fraction": 0.0, "resize": "cover"}, "crop_fraction must be above 0"),
        ({"crop_fraction": 5e-324, "resize": "cover"}, "crop_fraction must be above 0"),
        ({"crop_fraction": 0.5}, "crop_fraction must be 1 for 'stretch'"),
        ({"mean": (0.0, float("nan"), 0.0)}, "mean must be"),
        ({"std": (1.0, 0.0, 1.0)}, "std must be"),
    ],
)
def test_a_specification_out_of_range_is_refused(change, rule):
    fields = {"height": 8, "width": 8, "resize": "stretch", "crop_fraction": 1.0, **IDENTITY}
    with pytest.raises(BadInputError, match=rule):
        Preprocessing(**(fields | change))
