import gzip
import struct

import numpy as np
import pytest

from deploy.runtime.decode import decode
from edgereg.data.idx import open_idx
from edgereg.data.images import digest, open_images
from edgereg.errors import DataError

PIXELS = np.arange(5 * 4 * 6, dtype=np.uint8).reshape(5, 4, 6)
LABELS = np.array([1, 0, 2, 1, 0], np.uint8)
IMAGES_FILE, LABELS_FILE = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


def idx(array):
    shape = array.shape
    return struct.pack(f">HBB{len(shape)}I", 0, 8, len(shape), *shape) + array.tobytes()


def write(folder, images=None, labels=None, *, stem="train", packed=False):
    folder.mkdir(exist_ok=True)
    for name, data in (
        (f"{stem}-images-idx3-ubyte", idx(PIXELS) if images is None else images),
        (f"{stem}-labels-idx1-ubyte", idx(LABELS) if labels is None else labels),
    ):
        path = folder / (f"{name}.gz" if packed else name)
        path.write_bytes(gzip.compress(data) if packed else data)
    return folder


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
def test_images_and_labels_are_read_in_order(tmp_path, packed):
    write(tmp_path / "digits", packed=packed)
    images = open_images(f"idx:{tmp_path / 'digits'}:train")
    assert images.name == "digits:train" and len(images) == 5
    assert images.class_names == ("0", "1", "2") and images.labels.tolist() == [1, 0, 2, 1, 0]
    assert images.labels.dtype == np.int64 and images.shards is None
    for index in range(5):
        image = images.load(index)
        assert image.shape == (4, 6, 3) and image.dtype == np.uint8
        assert all(np.array_equal(image[:, :, c], PIXELS[index]) for c in range(3))
        assert np.array_equal(decode(images.encoded(index), name="x"), image)


def test_the_digest_is_over_the_values_and_not_over_the_file(tmp_path):
    plain = open_idx(write(tmp_path / "plain"), "train")
    packed = open_idx(write(tmp_path / "packed", packed=True), "train")
    turned = idx(PIXELS.reshape(5, 6, 4))  # the same bytes in another shape
    assert digest(plain) == digest(packed)
    assert digest(plain) != digest(open_idx(write(tmp_path / "turned", turned), "train"))


def test_the_test_split_is_that_of_the_10k(tmp_path):
    write(tmp_path, stem="t10k")
    assert len(open_images(f"idx:{tmp_path}:test")) == 5
    with pytest.raises(DataError, match=r"neither train-images-idx3-ubyte nor .*\.gz in"):
        open_idx(tmp_path, "train")


def test_fashion_mnist_has_its_names(tmp_path):
    labels = np.arange(10, dtype=np.uint8)
    pixels = np.zeros((10, 2, 2), np.uint8)
    images = open_idx(write(tmp_path / "fashion-mnist", idx(pixels), idx(labels)), "train")
    assert images.class_names[0] == "T-shirt/top" and images.class_names[9] == "Ankle boot"
    other = open_idx(write(tmp_path / "other", idx(pixels), idx(labels)), "train")
    assert other.class_names == tuple("0123456789")


def test_a_labels_file_names_the_classes(tmp_path):
    folder = write(tmp_path / "fashion-mnist")
    (folder / "labels.txt").write_text("cat\ndog\n\ngnu\n", encoding="utf-8")
    assert open_idx(folder, "train").class_names == ("cat", "dog", "gnu")


@pytest.mark.parametrize(
    ("names", "match"),
    [
        (b"cat\ndog", r"0 to 2 in .*, and there are 2 class names"),
        (b"cat\ndog\ncat", r"name of its own; found: 'cat', 'dog', 'cat'"),
        (b"cat\ndog\ngnu\nbat", r"at least one image; found: none of class 'bat'"),
        (b"\xff\xfe", r"labels\.txt names one class a line, in UTF-8"),
    ],
)
def test_wrong_names_are_refused(tmp_path, names, match):
    (write(tmp_path) / "labels.txt").write_bytes(names)
    with pytest.raises(DataError, match=match):
        open_idx(tmp_path, "train")


def test_a_class_without_an_image_is_named(tmp_path):
    write(tmp_path, labels=idx(np.array([0, 1, 3, 3, 0], np.uint8)))
    with pytest.raises(DataError, match=r"at least one image; found: none of class 2 in"):
        open_idx(tmp_path, "train")


WHOLE = idx(PIXELS)


@pytest.mark.parametrize(
    ("images", "match"),
    [
        (b"", r"begins with , not 00000803"),
        (idx(LABELS), r"begins with 00000801, not 00000803"),
        (b"\0\0\x0d\x03" + WHOLE[4:], r"begins with 00000d03"),
        (WHOLE[:9], r"ends in its header"),
        (WHOLE[:-1], r"should hold 120 values, and holds only 119"),
        (WHOLE + b"x", r"should hold 120 values, and holds more"),
        (idx(np.zeros((0, 4, 6), np.uint8)), r"has the shape \(0, 4, 6\)"),
        (b"\0\0\x08\x03" + b"\xff" * 12, r"values, and holds only 0"),
        (idx(PIXELS[:4]), r"each image has a label; found: 4 images and 5 labels"),
    ],
    ids=["empty", "labels", "floats", "header", "cut", "long", "none", "huge", "count"],
)
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
def test_a_damaged_file_is_refused(tmp_path, images, match, packed):
    write(tmp_path, images, packed=packed)
    with pytest.raises(DataError, match=match):
        open_idx(tmp_path, "train")


@pytest.mark.parametrize("damage", [lambda d: d[:-12], lambda d: d[:15], lambda d: b"no gz" + d])
def test_a_damaged_gz_is_refused(tmp_path, damage):
    path = write(tmp_path, packed=True) / f"{IMAGES_FILE}.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=r"is whole.*images-idx3-ubyte\.gz'"):
        open_idx(tmp_path, "train")


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("idx:digits", r"named idx:FOLDER:SPLIT"),
        ("idx:", r"named idx:FOLDER:SPLIT"),
        ("idx:digits:tset", r"found: 'tset'; remedy: did you mean 'test'"),
        ("idx:digits:train", r"neither train-images"),
    ],
)
def test_a_wrong_name_is_refused_with_what_is_right(name, match):
    with pytest.raises(DataError, match=match):
        open_images(name)
