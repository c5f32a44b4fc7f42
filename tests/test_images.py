import numpy as np
import pytest

from deploy.runtime.preprocess import Preprocessing, preprocess
from edgereg.data.emoji10 import Emoji10
from edgereg.data.images import FewLabels, check_classes, digest, evenly
from edgereg.data.pixels import Pixels
from edgereg.errors import DataError

EMOJI = Emoji10(vendor="twitter", split="train")


class Relabelled:
    """A few images under other labels or class names."""

    name = "relabelled"

    def __init__(self, labels, class_names=("a", "b")):
        self.labels, self.class_names = np.array(labels), class_names

    def __len__(self):
        return len(self.labels)

    def load(self, index):
        return EMOJI.load(index)

    def encoded(self, index):
        return EMOJI.encoded(index)


def test_a_share_of_the_labels_takes_from_each_class():
    few = FewLabels(EMOJI, 0.1, seed=0)
    whole = np.bincount(EMOJI.labels)
    assert np.bincount(few.labels).tolist() == [max(2, round(0.1 * n)) for n in whole]
    assert len(few) == len(few.labels)
    for index in (0, 40, len(few) - 1):
        same = [i for i in range(len(EMOJI)) if np.array_equal(EMOJI.load(i), few.load(index))]
        assert few.labels[index] in EMOJI.labels[same]


def test_a_tiny_share_still_takes_two_of_each_class():
    assert np.bincount(FewLabels(EMOJI, 1e-6, seed=0).labels).tolist() == [2] * 10


def test_the_seed_decides_which_labels_are_taken():
    first, again, other = (FewLabels(EMOJI, 0.1, seed=seed) for seed in (1, 1, 2))
    assert digest(first) == digest(again) != digest(other)


def test_evenly_takes_from_each_class_in_turn():
    labels = np.array([0] * 50 + [1] * 3 + [2] * 20)
    chosen = evenly(labels, 12)
    assert (np.diff(chosen) > 0).all()
    assert np.bincount(labels[chosen]).tolist() == [5, 3, 4]
    assert np.array_equal(evenly(labels, 1000), np.arange(73))


@pytest.mark.parametrize(
    "other",
    [Relabelled([0, 1, 0]), Relabelled([0, 1, 1, 0]), Relabelled([0, 1, 1], ("a", "c"))],
    ids=["label", "count", "class name"],
)
def test_the_digest_changes_with_the_data(other):
    assert digest(Relabelled([0, 1, 1])) == digest(Relabelled([0, 1, 1])) != digest(other)


def test_classes_in_another_order_are_refused_and_said_to_be():
    check_classes(Relabelled([0, 1]), ("a", "b"))
    with pytest.raises(DataError, match=r"\('a', 'b'\).* another order"):
        check_classes(Relabelled([0, 1]), ("b", "a"))


@pytest.mark.parametrize("size", [32, 24])
def test_pixels_are_the_devices_own_and_the_same_kept_or_not(size):
    spec = Preprocessing(size, size, "cover", 1.0, (0.5,) * 3, (0.5,) * 3)
    images, indices = Relabelled([0, 1, 1, 0]), np.array([2, 0])
    kept, read = Pixels(images, spec), Pixels(images, spec, cache_limit_bytes=0)
    assert np.array_equal(kept.fitted(indices), read.fitted(indices))
    batch = kept.batch(indices)
    assert batch.shape == (2, 3, size, size)
    expected = preprocess([images.load(i) for i in indices], spec)
    assert np.abs(2 * batch.numpy() - 1 - expected).max() < 1e-6
