import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgereg.data.emoji10 import Emoji10
from edgereg.data.images import (
    FewLabels,
    Subset,
    check_classes,
    combine_digest,
    digest,
    epoch_order,
    evenly,
    split_validation,
)
from edgereg.errors import DataError

EMOJI = Emoji10(vendor="twitter", split="train")


class Relabelled:
    """A few images under other labels or class names."""

    name = "relabelled"

    def __init__(self, labels, class_names=("a", "b"), shards=None):
        self.labels = None if labels is None else np.array(labels)
        self.class_names, self._size = class_names, len(shards if labels is None else labels)
        self.shards = None if shards is None else np.array(shards)

    def __len__(self):
        return self._size

    def load(self, index):
        return EMOJI.load(index)

    def encoded(self, index):
        return EMOJI.encoded(index)

    content = encoded

    def image_name(self, index):
        return f"image {index}"


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


def test_the_digest_is_the_one_that_earlier_checkpoints_hold():
    total = hashlib.sha256()
    for index in range(len(EMOJI)):
        total.update(hashlib.sha256(EMOJI.encoded(index)).digest())
        total.update(EMOJI.class_names[EMOJI.labels[index]].encode() + b"\0")
    assert digest(EMOJI) == total.hexdigest()


def test_a_digest_can_be_made_from_hashes():
    images = Relabelled([0, 1, 1])
    hashes = [hashlib.sha256(images.content(index)).digest() for index in range(3)]
    assert combine_digest(images, hashes) == digest(images)
    assert combine_digest(images, hashes[::-1]) != digest(images)


def test_a_subset_is_its_images_in_its_order():
    subset = Subset(EMOJI, np.array([30, 2, 2]))
    assert len(subset) == 3 and subset.name == "emoji-10:twitter:train (3 of 995)"
    assert subset.class_names == EMOJI.class_names
    assert subset.labels.tolist() == EMOJI.labels[[30, 2, 2]].tolist()
    for index, whole in enumerate((30, 2, 2)):
        assert np.array_equal(subset.load(index), EMOJI.load(whole))
        assert subset.encoded(index) == subset.content(index) == EMOJI.encoded(whole)
        assert subset.image_name(index) == str(whole)
    assert Subset(subset, np.array([1]), name="one").image_name(0) == "2"


def test_a_subset_of_shards_knows_its_shards_and_of_unlabelled_images_has_no_labels():
    subset = Subset(Relabelled(None, (), shards=[0, 0, 1, 2]), np.array([3, 1]))
    assert subset.labels is None and subset.shards.tolist() == [2, 0]
    assert Subset(EMOJI, np.array([0])).shards is None


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    st.lists(st.integers(2, 30), min_size=1, max_size=6), st.floats(0.01, 0.99), st.integers(0, 9)
)
def test_a_validation_split_takes_its_share_of_each_class(counts, share, seed):
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.repeat(np.arange(len(counts)), counts))
    images = Relabelled(labels, tuple(map(str, range(len(counts)))))
    train, val = split_validation(images, share, seed=seed)
    names = [[part.image_name(i) for i in range(len(part))] for part in (train, val)]
    assert sorted(names[0] + names[1]) == sorted(f"image {i}" for i in range(len(labels)))
    for label, count in enumerate(counts):
        kept, held_out = (int((part.labels == label).sum()) for part in (train, val))
        assert kept >= 1 and held_out >= 1 and kept + held_out == count
        assert abs(held_out - share * count) <= 0.5 or 1 in (kept, held_out)


def test_a_validation_split_is_decided_by_its_seed():
    first, again, other = (split_validation(EMOJI, 0.2, seed=seed)[1] for seed in (0, 0, 1))
    assert digest(first) == digest(again) != digest(other)
    assert first.name == "emoji-10:twitter:train (20% held out)"


@pytest.mark.parametrize("share", [0, 1, -0.1, float("nan")])
def test_a_share_outside_of_its_range_is_refused(share):
    with pytest.raises(DataError, match=r"above 0 and below 1"):
        split_validation(EMOJI, share, seed=0)


def test_a_class_of_one_image_cannot_be_split():
    with pytest.raises(DataError, match=r"two images, .*; found: 'b' of 'relabelled' has 1"):
        split_validation(Relabelled([0, 0, 1]), 0.5, seed=0)
    with pytest.raises(DataError, match=r"needs labels"):
        split_validation(Relabelled(None, (), shards=[0, 0]), 0.5, seed=0)


def test_the_order_of_an_epoch_is_the_one_that_earlier_runs_had():
    order = epoch_order(EMOJI, seed=3, epoch=5)
    assert np.array_equal(order, np.random.default_rng([3, 5]).permutation(len(EMOJI)))
    assert order.dtype == np.int64


def spread(order, shards, window=100):
    """Return how many shards are met within each `window` images, on average."""
    runs = [shards[order[at : at + window]] for at in range(0, len(order), window)]
    return np.mean([len(np.unique(run)) for run in runs])


def test_images_in_shards_are_shuffled_within_some_shards_at_a_time():
    shards = np.repeat(np.arange(40), np.random.default_rng(0).integers(20, 31, 40))
    images = Relabelled(None, (), shards=shards)
    orders = [epoch_order(images, seed=0, epoch=epoch) for epoch in (0, 0, 1)]
    assert all(np.array_equal(np.sort(order), np.arange(len(shards))) for order in orders)
    assert np.array_equal(orders[0], orders[1]) and orders[0].dtype == np.int64
    assert not np.array_equal(orders[0], orders[2])
    assert spread(orders[0], shards) <= 9  # two windows of 4, and a border
    assert spread(np.random.default_rng(0).permutation(len(shards)), shards) > 30
    # and not in the order of the files: neighbours in a window are mixed
    assert np.mean(np.diff(orders[0]) == 1) < 0.05
    # which shards meet in a window differs from epoch to epoch
    together = [frozenset(shards[order[:80]]) for order in (orders[0], orders[2])]
    assert together[0] != together[1] and together[0] != set(range(4))
    first_shards = shards[orders[0][:80]]
    assert len(np.unique(first_shards)) == 4 and np.any(np.diff(first_shards) < 0)


def test_images_of_a_shard_stay_together_though_a_subset_has_them_in_another_order():
    shards = np.random.default_rng(0).permutation(np.repeat(np.arange(40), 25))
    order = epoch_order(Relabelled(None, (), shards=shards), seed=0, epoch=0)
    assert sorted(order) == list(range(1000)) and spread(order, shards) <= 8


@pytest.mark.parametrize("shards", [[0], [5, 5, 2, 9, 2], [0] * 7, list(range(9))])
def test_the_order_holds_each_image_once_whatever_the_shards(shards):
    order = epoch_order(Relabelled(None, (), shards=shards), seed=1, epoch=0)
    assert sorted(order) == list(range(len(shards)))
