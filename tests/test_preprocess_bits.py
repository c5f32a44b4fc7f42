"""The fast pre-processing gives the very bits of the plain one, which stands here as the reference.

Every golden tensor and every training run rests on these bits.
"""

import dataclasses

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from deploy.errors import BadInputError
from deploy.runtime import preprocess as module
from deploy.runtime.decode import MAX_SIDE
from deploy.runtime.preprocess import Preprocessing, fit, normalize, preprocess, scaled_size

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BITS = 22
SIDES = st.one_of(st.integers(1, 12), st.integers(1, 150))
RESIZES = st.sampled_from(
    [("stretch", 1.0), ("cover", 1.0), ("cover", 0.875), ("cover", 0.95), ("cover", 0.3)]
)


def _reference_weights(size, scaled, keep, *, bits=BITS):
    """(taps, keep) sources and weights, one output after the other."""
    offset = round((scaled - keep) / 2)
    if size == scaled:
        return np.arange(offset, offset + keep)[np.newaxis], np.full((1, keep), 1 << bits)
    scale = size / scaled
    support = max(scale, 1.0)
    centre = (np.arange(offset, offset + keep) + 0.5) * scale
    first = np.maximum((centre - support + 0.5).astype(int), 0)
    last = np.minimum((centre + support + 0.5).astype(int), size)
    sources = first + np.arange(np.max(last - first))[:, np.newaxis]
    weights = np.maximum(1.0 - np.abs((sources - centre + 0.5) / support), 0.0)
    weights[sources >= last] = 0.0
    weights /= weights.sum(axis=0)
    return np.minimum(sources, size - 1), (weights * (1 << bits) + 0.5).astype(np.int64)


def _reference_rows(image, size, scaled, keep, bits):
    sources, weights = _reference_weights(size, scaled, keep, bits=bits)
    total = np.full((keep, *image.shape[1:]), 1 << (bits - 1), np.int64)
    for rows, weight in zip(sources, weights, strict=True):
        total += image[rows] * weight[:, np.newaxis, np.newaxis]
    return np.minimum(total >> bits, 255).astype(np.uint8)


def _reference_fit(image, spec, *, bits=BITS):
    """Rows, rounded, then columns: in 64-bit integers, on the whole image."""
    height, width = scaled_size(*image.shape[:2], spec)
    image = _reference_rows(image, image.shape[0], height, spec.height, bits)
    turned = np.swapaxes(image, 0, 1)
    return np.swapaxes(_reference_rows(turned, len(turned), width, spec.width, bits), 0, 1)


def _reference_normalize(images, spec):
    mean, std = np.asarray(spec.mean, np.float32), np.asarray(spec.std, np.float32)
    scaled = (images.astype(np.float32) / np.float32(255) - mean) / std
    return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2))


def random_image(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def assert_same_bits(actual, expected):
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    assert actual.flags.c_contiguous
    assert actual.tobytes() == np.ascontiguousarray(expected).tobytes()


@pytest.mark.parametrize("block", [module._BLOCK, 1 << 9])  # whole, and in many small pieces
@settings(max_examples=150, deadline=None, derandomize=True)
@given(h=SIDES, w=SIDES, height=SIDES, width=SIDES, resize=RESIZES, seed=st.integers(0, 99))
@example(h=1, w=1, height=7, width=5, resize=("stretch", 1.0), seed=0)
@example(h=150, w=3, height=1, width=150, resize=("cover", 0.3), seed=0)
@example(h=16, w=16, height=16, width=16, resize=("cover", 1.0), seed=0)
@example(h=32, w=32, height=16, width=16, resize=("cover", 0.5), seed=0)
def test_the_models_input_is_the_references_bit_for_bit(block, h, w, height, width, resize, seed):
    spec = Preprocessing(height, width, *resize, MEAN, STD)
    image = random_image(h, w, seed)
    expected = _reference_fit(image, spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_BLOCK", block)
        assert_same_bits(preprocess([image], spec), _reference_normalize(expected[None], spec))
        pixels = dataclasses.replace(spec, layout="nhwc-uint8")
        assert_same_bits(preprocess([image], pixels), expected[None])


@pytest.mark.parametrize(
    ("h", "w", "size"),
    [
        (64, 64, 32),
        (448, 448, 224),
        (1080, 1920, 224),
        (1080, 1920, 32),
        (4000, 9, 2),
        (9, 20000, 3),
        (1, 65535, 2),  # the most weights
    ],
)
@pytest.mark.parametrize("resize", [("stretch", 1.0), ("cover", 0.875)])
def test_photographs_of_usual_and_extreme_shapes_too(h, w, size, resize):
    spec = Preprocessing(size, size, *resize, MEAN, STD)
    image = random_image(h, w)
    expected = _reference_normalize(_reference_fit(image, spec)[None], spec)
    assert_same_bits(preprocess([image], spec), expected)


def test_images_that_do_not_lie_in_a_row_and_several_at_once():
    spec = Preprocessing(12, 10, "cover", 0.875, MEAN, STD)
    images = [random_image(40, 30)[::-1], random_image(30, 40).swapaxes(0, 1)]
    images += [random_image(60, 80)[::2, ::2], random_image(12, 10)]
    expected = np.stack([_reference_fit(image, spec) for image in images])
    assert_same_bits(preprocess(images, spec), _reference_normalize(expected, spec))
    assert_same_bits(normalize(expected, spec), _reference_normalize(expected, spec))
    assert_same_bits(normalize(expected[:0], spec), _reference_normalize(expected[:0], spec))


def test_every_grey_level_is_normalised_to_the_same_bits():
    levels = np.repeat(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), 3, axis=2)[None]
    for mean, std in [(MEAN, STD), ((0.0,) * 3, (1.0,) * 3), ((0.1, 0.7, 1 / 3), (1e-3, 3.0, 0.3))]:
        spec = Preprocessing(16, 16, "stretch", 1.0, mean, std)
        expected = _reference_normalize(levels, spec)
        assert_same_bits(normalize(levels, spec), expected)
        folded = levels.astype(np.float32) * (1 / (255 * np.float32(std))) - np.float32(mean) / std
        if mean == MEAN:  # the control: one product and one sum are not the same bits
            assert folded.transpose(0, 3, 1, 2).astype(np.float32).tobytes() != expected.tobytes()


def test_weights_of_fewer_bits_would_be_seen():
    spec = Preprocessing(32, 32, "stretch", 1.0, MEAN, STD)
    image = random_image(75, 75)
    assert_same_bits(np.ascontiguousarray(fit(image, spec)), _reference_fit(image, spec))
    with pytest.raises(AssertionError):
        assert_same_bits(
            np.ascontiguousarray(fit(image, spec)), _reference_fit(image, spec, bits=16)
        )


def test_a_larger_side_whose_weights_would_vanish_is_refused():
    spec = Preprocessing(2, 2, "stretch", 1.0, MEAN, STD)
    for shape in ((1, MAX_SIDE, 3), (MAX_SIDE, 1, 3)):
        white = np.full(shape, 255, np.uint8)
        assert fit(white, spec).min() == 255
        with pytest.raises(BadInputError, match="at most 65535 on a side"):
            fit(np.resize(white, (shape[0] + 1, shape[1] + 1, 3)), spec)


def test_weights_that_are_kept_cannot_be_changed():
    weights = module._triangle_weights(20, 8, keep=8)
    for array in (weights.sources, weights.fixed):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0


def test_an_image_is_not_written_to():
    spec = Preprocessing(8, 8, "stretch", 1.0, MEAN, STD)
    for image in (random_image(8, 8), random_image(20, 20)):
        before = image.copy()
        image.flags.writeable = False
        preprocess([image], spec)
        np.testing.assert_array_equal(image, before)
        batch = preprocess([image], dataclasses.replace(spec, layout="nhwc-uint8"))
        assert not np.shares_memory(batch, image)
