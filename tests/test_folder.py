import numpy as np
import pytest

from deploy.errors import BadInputError
from deploy.runtime.decode import encode_png
from deploy.runtime.preprocess import Preprocessing
from edgereg.data.folder import Folder
from edgereg.data.images import check_classes, labels_of, open_images
from edgereg.data.pixels import Pixels
from edgereg.errors import DataError

SPEC = Preprocessing(16, 16, "cover", 1.0, (0.5,) * 3, (0.5,) * 3)


def png(grey=0):
    return encode_png(np.full((20, 24, 3), grey, np.uint8))


def fill(root, names):
    for grey, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(png(grey))
    return root


def test_each_sub_folder_is_a_class_in_the_order_of_names(tmp_path):
    fill(tmp_path, ["dog/b.png", "cat/deep/a.PNG", "dog/a.png", "cat/z.png"])
    images = open_images(str(tmp_path))
    assert images.class_names == ("cat", "dog") and images.labels.tolist() == [0, 0, 1, 1]
    assert [images.load(i)[0, 0, 0] for i in range(4)] == [1, 3, 2, 0]
    assert images.encoded(3) == images.content(3) == png(0)
    assert [images.image_name(i) for i in (0, 3)] == ["cat/deep/a.PNG", "dog/b.png"]
    assert images.shards is None


def test_a_folder_of_images_alone_has_no_labels(tmp_path):
    images = Folder(fill(tmp_path, ["b.png", "a.png"]))
    assert len(images) == 2 and images.labels is None and images.class_names == ()
    with pytest.raises(DataError, match=r"one sub-folder a class, .*; found: .* no labels"):
        labels_of(images)


def test_hidden_folders_and_other_files_are_left_out(tmp_path):
    fill(tmp_path, ["cat/a.png", "dog/a.png", ".cache/a.png"])
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "cat" / "a.xml").write_text("x")
    assert Folder(tmp_path).class_names == ("cat", "dog") and len(Folder(tmp_path)) == 2


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(DataError, match="no-such' is no folder"):
        open_images(str(tmp_path / "no-such"))


def test_a_folder_without_an_image_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(DataError, match=r"needs images; found: no \.bmp"):
        Folder(tmp_path)


def test_images_beside_class_folders_are_refused(tmp_path):
    fill(tmp_path, ["cat/a.png", "loose.png"])
    with pytest.raises(DataError, match=r"holds both, such as loose\.png and cat/"):
        Folder(tmp_path)


def test_a_class_without_an_image_is_named(tmp_path):
    fill(tmp_path, ["cat/a.png"])
    (tmp_path / "dog").mkdir()
    with pytest.raises(DataError, match=r"file below '.*dog'"):
        Folder(tmp_path)


@pytest.mark.parametrize("content", [png()[:-40], b"", b"no image"], ids=["cut", "empty", "text"])
def test_a_damaged_image_is_named_before_the_first_step(tmp_path, content):
    fill(tmp_path, ["cat/a.png", "dog/bad.png"])
    (tmp_path / "dog/bad.png").write_bytes(content)
    with pytest.raises(BadInputError, match=r"dog/bad\.png"):
        Pixels(Folder(tmp_path), SPEC)


def test_other_classes_than_the_models_are_named(tmp_path):
    images = Folder(fill(tmp_path, ["cat/a.png", "cow/a.png"]))
    check_classes(images, ("cat", "cow"))
    with pytest.raises(DataError, match=r"lacks \['dog'\] and adds \['cow'\]"):
        check_classes(images, ("cat", "dog"))


def test_splits_are_not_taken_for_classes(tmp_path):
    fill(tmp_path, ["train/cat/a.png", "test/cat/a.png"])
    with pytest.raises(DataError, match=r"named test, train; remedy: name one of them"):
        Folder(tmp_path)
    assert Folder(tmp_path / "train").class_names == ("cat",)
