import multiprocessing
from itertools import islice

import numpy as np
import pytest
import torch

from deploy.errors import BadInputError
from deploy.runtime.decode import encode_png
from deploy.runtime.preprocess import Preprocessing
from edgereg.data.feed import feed
from edgereg.data.folder import Folder
from edgereg.data.pixels import Pixels

SPEC = Preprocessing(12, 12, "cover", 1.0, (0.5,) * 3, (0.5,) * 3)
BATCHES = [np.array(batch) for batch in ([3, 1], [0, 2], [5, 4], [1, 1], [4])]


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for index in range(6):
        image = rng.integers(0, 256, (15 + index, 20, 3), dtype=np.uint8)
        (tmp_path / f"{index}.png").write_bytes(encode_png(image))
    return Folder(tmp_path)


@pytest.mark.parametrize("limit", [0, 2**30], ids=["read", "kept"])
def test_batches_are_the_same_for_any_number_of_workers(folder, limit):
    pixels = Pixels(folder, SPEC, cache_limit_bytes=limit)
    alone, shared = (list(feed(pixels, BATCHES, workers=workers)) for workers in (0, 2))
    for indices, (index_a, a), (index_b, b) in zip(BATCHES, alone, shared, strict=True):
        assert np.array_equal(index_a, indices) and np.array_equal(index_b, indices)
        assert a.dtype == b.dtype == torch.uint8 and a.stride() == b.stride()
        assert torch.equal(a, b) and torch.equal(a, pixels.batch(indices))
    assert not torch.equal(alone[0][1], alone[1][1])


@pytest.mark.parametrize(("limit", "started"), [(0, 2), (2**30, 0)], ids=["read", "kept"])
def test_workers_are_started_only_where_there_is_something_to_decode(folder, limit, started):
    pixels = Pixels(folder, SPEC, cache_limit_bytes=limit)
    batches = feed(pixels, BATCHES, workers=2)
    next(batches)
    assert len(multiprocessing.active_children()) == started
    batches.close()
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_image_is_named_at_its_batch(folder, workers):
    pixels = Pixels(folder, SPEC, cache_limit_bytes=0)
    folder._paths[5].write_bytes(b"no image")
    batches = feed(pixels, BATCHES, workers=workers)
    assert len(list(islice(batches, 2))) == 2
    with pytest.raises(BadInputError, match=r"5\.png"):
        next(batches)
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("workers", [0, 2])
def test_the_global_random_state_is_left_alone(folder, workers):
    pixels = Pixels(folder, SPEC, cache_limit_bytes=0)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    list(feed(pixels, BATCHES, workers=workers))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("workers", [0, 2])
def test_no_batches_are_no_error(folder, workers):
    assert list(feed(Pixels(folder, SPEC, cache_limit_bytes=0), [], workers=workers)) == []
