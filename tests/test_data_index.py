import json

import numpy as np
import pytest

from deploy.errors import BadInputError
from deploy.runtime.decode import encode_png
from edgereg.data.check import check_images
from edgereg.data.folder import Folder
from edgereg.data.images import digest
from edgereg.data.index import apply_index, write_index
from edgereg.errors import DataError

A, B, C, D = np.random.default_rng(0).integers(0, 256, (4, 6, 9, 3), dtype=np.uint8)


def fill(root, files):
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content if isinstance(content, bytes) else encode_png(content))
    return root


@pytest.fixture
def root(tmp_path):
    files = {"cat/1.png": A, "cat/2.png": A, "cat/3.png": B, "dog/1.png": b"", "dog/2.png": C}
    return fill(tmp_path / "data", files)


@pytest.fixture
def index(root, tmp_path):
    path = tmp_path / "index.json"
    write_index(check_images(Folder(root)), path)
    return path


def test_what_is_set_aside_is_skipped_and_counted(root, index):
    kept, skipped = apply_index(Folder(root), index)
    assert skipped == 2 and len(kept) == 3 and kept.name == "data (without 2 set aside)"
    assert [kept.image_name(i) for i in range(3)] == ["cat/1.png", "cat/3.png", "dog/2.png"]
    assert kept.labels.tolist() == [0, 0, 1] and np.array_equal(kept.load(2), C)


def test_the_index_lists_every_image_and_the_reasons(root, index):
    found = json.loads(index.read_text())
    assert found["format_version"] == 1 and found["data"] == "data"
    assert found["digest"] == digest(Folder(root))
    assert [name for name, _ in found["images"]][:2] == ["cat/1.png", "cat/2.png"]
    assert all(len(sha256) == 64 for _, sha256 in found["images"])
    assert list(found["quarantined"]) == ["1", "3"]
    assert found["quarantined"]["1"] == "the same as an earlier image: cat/1.png"
    assert sum('.png", "' in line for line in index.read_text().splitlines()) == 5


def test_images_of_which_nothing_is_set_aside_are_themselves(tmp_path):
    images = Folder(fill(tmp_path / "data", {"a/1.png": A, "b/1.png": B}))
    write_index(check_images(images), tmp_path / "index.json")
    assert apply_index(images, tmp_path / "index.json") == (images, 0)


def test_an_index_is_replaced_only_when_told(root, index):
    report = check_images(Folder(root))
    with pytest.raises(BadInputError, match=r"index\.json' exists; remedy: .*--force"):
        write_index(report, index)
    index.write_text("x")
    write_index(report, index, force=True)
    assert apply_index(Folder(root), index)[1] == 2


@pytest.mark.parametrize(
    ("files", "match"),
    [
        ({"cat/3.png": C}, r"cat/3\.png has changed since"),
        ({"cat/4.png": D}, r"lists 5 images, and 'data' has 6"),
    ],
)
def test_an_index_of_other_images_is_refused(root, index, files, match):
    fill(root, files)
    with pytest.raises(DataError, match=match):
        apply_index(Folder(root), index)


def test_an_index_of_renamed_images_or_classes_is_refused(root, index):
    (root / "cat/1.png").rename(root / "cat/1b.png")
    apply_index(Folder(root), index)  # the same images and labels under another name
    (root / "cat").rename(root / "cow")
    with pytest.raises(DataError, match=r"lists cat/1\.png where 'data' has cow/1b\.png"):
        apply_index(Folder(root), index)


def test_a_class_of_which_nothing_is_left_is_named(tmp_path):
    root = fill(tmp_path / "data", {"cat/1.png": A, "dog/1.png": b"", "dog/2.png": b"x"})
    write_index(check_images(Folder(root)), tmp_path / "index.json")
    with pytest.raises(DataError, match=r"at least one image; found: .* sets all of dog aside"):
        apply_index(Folder(root), tmp_path / "index.json")


def edited(text, **changes):
    return json.dumps(json.loads(text) | changes)


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (lambda text: text[:50], r"index\.json': "),
        (lambda text: "[]", r"format None"),
        (lambda text: edited(text, format_version=2), r"format 2; this edgereg reads 1"),
        (lambda text: edited(text, more=1), r"the keys data, digest, format_version, images, more"),
        (lambda text: edited(text, images=[["a"]]), r"of another kind"),
        (lambda text: edited(text, quarantined=[1]), r"of another kind"),
        (lambda text: edited(text, quarantined={"5": ""}), r"image '5' set aside, of 5"),
        (lambda text: edited(text, quarantined={"-1": ""}), r"image '-1' set aside"),
    ],
)
def test_a_damaged_index_is_refused(root, index, edit, match):
    index.write_text(edit(index.read_text()))
    with pytest.raises(DataError, match=match):
        apply_index(Folder(root), index)


def test_a_missing_index_is_named(root, tmp_path):
    with pytest.raises(DataError, match=r"no\.json"):
        apply_index(Folder(root), tmp_path / "no.json")
