import numpy as np
import pytest
import torch

from deploy.errors import BadInputError
from deploy.runtime.decode import encode_png
from deploy.runtime.preprocess import Preprocessing, preprocess
from edgereg.data.arrays import ArrayImages
from edgereg.data.folder import Folder
from edgereg.data.pixels import Pixels, as_batch

SPEC = Preprocessing(12, 16, "cover", 1.0, (0.5,) * 3, (0.5,) * 3)
RNG = np.random.default_rng(0)
IMAGES = ArrayImages(
    RNG.integers(0, 256, (70, 20, 24, 3), dtype=np.uint8), name="x", labels=None, class_names=()
)


@pytest.mark.parametrize("size", [20, 13])
def test_pixels_are_the_devices_own_and_the_same_kept_or_not(size):
    spec = Preprocessing(size, size, "cover", 1.0, (0.5,) * 3, (0.5,) * 3)
    indices = np.array([2, 0, 69])
    kept, read = Pixels(IMAGES, spec), Pixels(IMAGES, spec, cache_limit_bytes=0)
    assert kept.is_kept and not read.is_kept and len(kept) == len(read) == 70
    assert np.array_equal(kept.fitted(indices), read.fitted(indices))
    expected = preprocess([IMAGES.load(i) for i in indices], spec)
    assert np.abs(kept.batch(indices).float().numpy() / 127.5 - 1 - expected).max() < 1e-6


@pytest.mark.parametrize("limit", [0, 2**30])
def test_a_batch_is_uint8_and_lies_in_memory_as_it_was_decoded(limit):
    pixels = Pixels(IMAGES, SPEC, cache_limit_bytes=limit)
    batch = pixels.batch(np.array([5, 6]))
    assert batch.shape == (2, 3, 12, 16) and batch.dtype == torch.uint8
    assert batch.is_contiguous(memory_format=torch.channels_last)
    assert np.array_equal(batch[1].permute(1, 2, 0), pixels.fitted(np.array([6]))[0])


def test_a_batch_of_kept_images_is_a_copy():
    pixels = Pixels(IMAGES, SPEC)
    before = pixels.fitted(np.array([1])).copy()
    pixels.batch(np.array([1])).zero_()
    assert np.array_equal(pixels.fitted(np.array([1])), before) and before.any()


def test_as_batch_makes_no_copy():
    images = np.zeros((2, 4, 5, 3), np.uint8)
    as_batch(images)[1, 2, 3, 4] = 7
    assert images[1, 3, 4, 2] == 7


@pytest.mark.parametrize(("limit", "is_kept"), [(70 * 12 * 16 * 3, True), (70 * 576 - 1, False)])
def test_images_are_kept_up_to_the_limit(limit, is_kept):
    assert Pixels(IMAGES, SPEC, cache_limit_bytes=limit).is_kept == is_kept


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_fill_the_memory_alike_and_progress_is_told(workers):
    told = []
    pixels = Pixels(IMAGES, SPEC, workers=workers, progress=told.append)
    assert told == [32, 64, 70]
    everything = np.arange(70)
    read = Pixels(IMAGES, SPEC, cache_limit_bytes=0)
    assert np.array_equal(pixels.fitted(everything), read.fitted(everything))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_image_is_named_when_it_is_read(tmp_path, workers):
    (tmp_path / "a.png").write_bytes(encode_png(IMAGES.load(0)))
    (tmp_path / "bad.png").write_bytes(b"no image")
    with pytest.raises(BadInputError, match=r"bad\.png"):
        Pixels(Folder(tmp_path), SPEC, workers=workers)
    late = Pixels(Folder(tmp_path), SPEC, cache_limit_bytes=0)
    late.batch(np.array([0]))
    with pytest.raises(BadInputError, match=r"bad\.png"):
        late.batch(np.array([0, 1]))
