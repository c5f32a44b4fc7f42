import pickle

import numpy as np
import pytest

from edgereg.data.images import digest, open_images
from edgereg.data.npz import open_npz
from edgereg.errors import DataError

GREY = np.arange(4 * 2 * 3, dtype=np.uint8).reshape(4, 2, 3)
RGB = np.arange(4 * 2 * 3 * 3, dtype=np.uint8).reshape(4, 2, 3, 3)
LABELS = np.array([1, 0, 1, 0])
NAMES = np.array(["cat", "dog"])


class Bomb:
    """Makes a noise when it is unpickled."""

    def __reduce__(self):
        return pytest.fail, ("unpickled",)


@pytest.mark.parametrize(
    ("stored", "expected"),
    [(RGB, RGB), (GREY, np.stack([GREY] * 3, -1)), (GREY[..., None], np.stack([GREY] * 3, -1))],
    ids=["rgb", "grey", "one channel"],
)
def test_images_are_rgb_whatever_is_stored(tmp_path, stored, expected):
    np.savez(tmp_path / "x.npz", images=stored, labels=LABELS.astype(np.uint8), class_names=NAMES)
    images = open_images(str(tmp_path / "x.npz"))
    assert images.name == "x.npz" and images.class_names == ("cat", "dog")
    assert images.labels.dtype == np.int64 and np.array_equal(images.labels, LABELS)
    assert np.array_equal([images.load(i) for i in range(4)], expected)


def test_labels_and_names_may_be_left_out(tmp_path):
    np.savez_compressed(tmp_path / "x.npz", images=RGB)
    np.savez(tmp_path / "y.npz", images=RGB, labels=LABELS)
    assert open_npz(tmp_path / "x.npz").labels is None
    assert open_npz(tmp_path / "y.npz").class_names == ("0", "1")


def test_the_digest_is_over_the_values_and_not_over_the_file(tmp_path):
    np.savez(tmp_path / "x.npz", images=RGB)
    np.savez_compressed(tmp_path / "y.npz", images=RGB)
    np.savez(tmp_path / "z.npz", images=RGB ^ np.uint8(1))
    x, y, z = (digest(open_npz(tmp_path / f"{name}.npz")) for name in "xyz")
    assert x == y != z


@pytest.mark.parametrize(
    ("arrays", "match"),
    [
        ({"images": RGB, "label": LABELS}, r"array 'label'; remedy: did you mean 'labels'"),
        ({"labels": LABELS}, r"no array 'images'"),
        ({"images": RGB.astype(np.float32)}, r"images \(4, 2, 3, 3\) float32"),
        ({"images": RGB[..., :2]}, r"put the 1 or 3 channels last"),
        ({"images": RGB[0, 0]}, r"images \(3, 3\) uint8"),
        ({"images": RGB[:0]}, r"images \(0, 2, 3, 3\)"),
        ({"images": RGB, "labels": LABELS[:3]}, r"labels \(3,\) int64 for 4 images"),
        ({"images": RGB, "labels": LABELS / 2}, r"labels \(4,\) float64"),
        ({"images": RGB, "labels": LABELS - 1}, r"-1 to 0 in"),
        ({"images": RGB, "labels": np.array([0, 2, 0, 2])}, r"none of class 1"),
        ({"images": RGB, "labels": np.array([0, 1, 0, 10**12])}, r"none of class 2"),
        ({"images": RGB, "labels": np.full(4, 2**64 - 1, np.uint64)}, r"-1 to -1"),
        ({"images": RGB, "class_names": NAMES}, r"class names and no labels"),
        ({"images": RGB, "labels": LABELS, "class_names": np.arange(2)}, r"class_names \(2,\) int"),
        ({"images": RGB, "labels": LABELS, "class_names": NAMES[:1]}, r"there are 1 class names"),
        ({"images": np.array([Bomb()], object)}, r"allow_pickle"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_wrong_array_is_named(tmp_path, arrays, match):
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(DataError, match=match):
        open_npz(tmp_path / "x.npz")


def test_a_damaged_file_is_refused(tmp_path):
    path = tmp_path / "x.npz"
    np.savez_compressed(path, images=RGB.repeat(50, axis=0))
    whole = path.read_bytes()
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 0xFF
    np.save(tmp_path / "one.npy", RGB)
    one = (tmp_path / "one.npy").read_bytes()
    for content in (b"", b"no archive", whole[:-30], bytes(damaged), one, pickle.dumps(Bomb())):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"x\.npz"):
            open_npz(path)
    with pytest.raises(DataError, match=r"no such file"):
        open_images(str(tmp_path / "missing.npz"))
