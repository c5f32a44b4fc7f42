import numpy as np
import PIL.Image
from hypothesis import given, settings
from hypothesis import strategies as st

from edgereg.data.perceptual import near_pairs, perceptual_hash


def _reference_hash(image):
    """The DCT by its definition, on Pillow's own resize."""
    grey = np.asarray(PIL.Image.fromarray(image).resize((32, 32), PIL.Image.Resampling.BILINEAR))
    grey = grey @ [0.299, 0.587, 0.114]
    place = np.arange(32) + 0.5
    values = [
        (grey * np.outer(np.cos(np.pi * u * place / 32), np.cos(np.pi * v * place / 32))).sum()
        for u in range(1, 9)
        for v in range(1, 9)
    ]
    return sum(1 << (63 - n) for n, value in enumerate(values) if value > np.median(values))


def distance(a, b):
    return bin(int(a) ^ int(b)).count("1")


def smooth(seed):
    rough = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    return np.asarray(PIL.Image.fromarray(rough).resize((70, 50), PIL.Image.Resampling.BICUBIC))


def test_the_hash_is_that_of_the_definition():
    for seed in range(5):
        assert distance(perceptual_hash(smooth(seed)), _reference_hash(smooth(seed))) <= 2


def test_half_of_the_bits_are_set_and_other_pictures_are_far():
    hashes = [perceptual_hash(smooth(seed)) for seed in range(20)]
    assert all(abs(bin(value).count("1") - 32) <= 1 for value in hashes)
    far = [distance(a, b) for n, a in enumerate(hashes) for b in hashes[:n]]
    assert min(far) > 8 and 24 < np.mean(far) < 40


def test_brightness_and_contrast_and_scale_change_few_bits():
    image = smooth(0)
    darker = (image * 0.8).astype(np.uint8)
    smaller = np.asarray(PIL.Image.fromarray(image).resize((48, 40)))
    for other in (darker, smaller):
        assert distance(perceptual_hash(image), perceptual_hash(other)) <= 3


def test_images_of_one_colour_are_all_alike():
    greys = (np.full((9, 7, 3), grey, np.uint8) for grey in (0, 3, 77, 255))
    assert {perceptual_hash(image) for image in greys} == {0}


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.integers(0, 8), st.integers(0, 2**32 - 1), st.integers(2, 60))
def test_near_pairs_are_those_of_a_full_search(max_distance, seed, count):
    rng = np.random.default_rng(seed)
    hashes = rng.integers(0, 2**64, 4, dtype=np.uint64)[rng.integers(0, 4, count)]
    for _ in range(max_distance + 1):  # flip some bits of some, so that all distances occur
        flips = np.uint64(1) << rng.integers(0, 64, count, dtype=np.uint64)
        hashes ^= np.where(rng.random(count) < 0.6, flips, np.uint64(0))
    expected = {
        (i, j, distance(hashes[i], hashes[j]))
        for j in range(count)
        for i in range(j)
        if distance(hashes[i], hashes[j]) <= max_distance
    }
    found = list(near_pairs(hashes, max_distance))
    assert len(found) == len(set(found)) and set(found) == expected


def test_pairs_are_found_across_the_blocks_of_a_large_band():
    # one band of 1,500, in which only the first, the middle and the last look alike
    hashes = np.arange(1500, dtype=np.uint64) << np.uint64(32)
    hashes[[1100, 1499]] = hashes[0]
    hashes[1100] ^= np.uint64(1 << 63)
    alike = {pair for pair in near_pairs(hashes, 1) if pair[0] == 0 and pair[1] >= 1024}
    assert {(0, 1100, 1), (0, 1499, 0)} <= alike
    assert (1100, 1499, 1) in set(near_pairs(hashes, 1))
