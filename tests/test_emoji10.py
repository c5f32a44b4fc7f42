import hashlib
from pathlib import Path

import numpy as np
import pytest

import edgereg.data.emoji10 as module
from deploy.runtime.decode import decode
from edgereg.data.emoji10 import VENDORS, Emoji10
from edgereg.data.images import open_images
from edgereg.errors import DataError

COUNTS = {
    "face": 130, "animal": 130, "plant": 68, "food": 92, "person": 325,
    "hand": 43, "vehicle": 72, "place": 66, "clothing": 47, "flag": 270,
}  # fmt: skip
SHA256 = "6d0898324ef3401edb795b771d7a05e9859bfde36eb7357e3a807d35020a6a8c"


def test_the_archive_is_the_one_that_was_made():
    path = Path(module.__file__).parent / "emoji10.npz"
    assert hashlib.sha256(path.read_bytes()).hexdigest() == SHA256


@pytest.mark.parametrize("vendor", VENDORS[:2])
def test_there_are_1243_emoji_in_ten_classes(vendor):
    splits = [Emoji10(vendor=vendor, split=split) for split in ("train", "test")]
    assert sum(map(len, splits)) == 1243
    labels = np.concatenate([images.labels for images in splits])
    names = splits[0].class_names
    assert dict(zip(names, np.bincount(labels).tolist(), strict=True)) == COUNTS


def test_a_fifth_of_each_class_is_held_out():
    held_out = np.bincount(Emoji10(vendor="google", split="test").labels)
    for count, total in zip(held_out, COUNTS.values(), strict=True):
        assert abs(count - 0.2 * total) < 1


def test_both_vendors_split_the_same_glyphs():
    archive = module._archive()
    assert archive["held_out"].shape == archive["labels"].shape == (1243,)
    assert len(archive["twitter"]) == len(archive["google"]) == 1243
    for split in ("train", "test"):
        twitter, google, both = (Emoji10(vendor=v, split=split) for v in VENDORS)
        assert np.array_equal(twitter.labels, google.labels)
        assert np.array_equal(both.labels, np.tile(twitter.labels, 2))
        assert len(both) == 2 * len(twitter)
        assert np.array_equal(both.load(len(twitter) + 3), google.load(3))
        assert not np.array_equal(both.load(3), google.load(3))


def test_an_image_is_rgb_and_survives_its_file():
    images = Emoji10(vendor="twitter", split="test")
    image = images.load(5)
    assert image.shape == (32, 32, 3) and image.dtype == np.uint8 and image.std() > 0
    assert np.array_equal(decode(images.encoded(5), name="5.png"), image)


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("emoji-10", "named emoji-10:VENDOR:SPLIT"),
        ("emoji-10:twitter", "named emoji-10:VENDOR:SPLIT"),
        ("emoji-10:twitter:train:2", "named emoji-10:VENDOR:SPLIT"),
        ("emoji-10:twiter:train", "found: 'twiter'; remedy: did you mean 'twitter'"),
        ("emoji-10:google:tset", "found: 'tset'; remedy: did you mean 'test'"),
    ],
)
def test_a_wrong_name_is_refused_with_what_is_right(name, match):
    with pytest.raises(DataError, match=match):
        open_images(name)
