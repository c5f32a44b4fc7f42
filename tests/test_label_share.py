import numpy as np
import pytest

from edgereg.data.emoji10 import Emoji10
from edgereg.data.images import Subset
from edgereg.errors import DataError
from edgereg.evaluation.label_share import label_share

EMOJI = Emoji10(vendor="twitter", split="train")


def names(images):
    return {images.image_name(index) for index in range(len(images))}


def test_each_class_gives_its_share():
    tenth, whole = (np.bincount(label_share(EMOJI, s, seed=0).labels) for s in (0.1, 1.0))
    assert tenth.tolist() == [round(0.1 * n) for n in whole]
    assert label_share(EMOJI, 0.1, seed=0).name == "emoji-10:twitter:train (10% of the labels)"


def test_each_class_keeps_one_image_at_least():
    few = label_share(EMOJI, 1e-6, seed=0)
    assert np.bincount(few.labels).tolist() == [1] * 10 and few.class_names == EMOJI.class_names


def test_a_share_is_part_of_every_larger_one():
    small, large, whole = (names(label_share(EMOJI, s, seed=4)) for s in (0.01, 0.1, 1))
    assert small < large < whole == names(EMOJI)


def test_the_seed_decides():
    first, again, other = (names(label_share(EMOJI, 0.1, seed=seed)) for seed in (1, 1, 2))
    assert first == again != other


def test_an_image_keeps_its_pixels_and_its_label():
    few = label_share(EMOJI, 0.02, seed=3)
    for index in range(len(few)):
        original = int(few.image_name(index))
        assert np.array_equal(few.load(index), EMOJI.load(original))
        assert few.labels[index] == EMOJI.labels[original]


@pytest.mark.parametrize("share", [0.0, -0.1, 1.01, float("nan")])
def test_a_share_out_of_range_is_refused(share):
    with pytest.raises(DataError, match="above 0, and 1 at most"):
        label_share(EMOJI, share, seed=0)


def test_images_without_labels_are_refused():
    bare = Subset(EMOJI, np.arange(5))
    bare.labels, bare.class_names = None, ()
    with pytest.raises(DataError, match="no labels"):
        label_share(bare, 0.1, seed=0)
