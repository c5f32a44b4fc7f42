import itertools

import numpy as np
import pytest
from deploy_bundle import golden_pixels, linear_onnx, write_small_bundle

from deploy.errors import BadInputError, CheckFailedError
from deploy.runtime.decode import encode_png
from deploy.runtime.runner import open_runner
from deploy.service import pictures
from deploy.service.infer import Prediction, Unreadable, classify


@pytest.fixture
def bundle(tmp_path):
    return write_small_bundle(tmp_path / "b")


@pytest.fixture
def images(tmp_path):
    """Three images, one of them in a sub-folder, and a file that is none."""
    root = tmp_path / "images"
    (root / "sub").mkdir(parents=True)
    for name, pixels in zip(("b.png", "a.PNG", "sub/c.png"), golden_pixels(3), strict=True):
        (root / name).write_bytes(encode_png(pixels))
    (root / "notes.txt").write_text("no image")
    return root


def run(bundle, *paths, k=1):
    runner = open_runner(bundle, backend="onnxruntime", precision="fp32")
    return classify(bundle, runner, paths, top_k_count=k)


def test_a_folder_is_classified_in_sorted_order_with_its_sub_folders(bundle, images):
    results = list(run(bundle, images))
    assert [r.path.relative_to(images).as_posix() for r in results] == [
        "a.PNG",
        "b.png",
        "sub/c.png",
    ]
    assert [r.top[0][0] for r in results] == ["green", "red", "blue"]


def test_the_probabilities_of_all_classes_add_up_to_one(bundle, images):
    (result,) = run(bundle, images / "b.png", k=9)
    assert len(result.top) == 3
    assert sum(p for _, p in result.top) == pytest.approx(1)


def test_an_unreadable_image_is_reported_in_its_place_and_the_others_follow(bundle, images):
    (images / "ab.png").write_bytes(encode_png(golden_pixels(1)[0])[:60])
    results = list(run(bundle, images))
    kinds = [type(r) for r in results]
    assert kinds == [Prediction, Unreadable, Prediction, Prediction]
    assert "ab.png" in results[1].error


def test_a_file_that_is_named_is_tried_whatever_its_suffix(bundle, images):
    (result,) = run(bundle, images / "notes.txt")
    assert isinstance(result, Unreadable) and "another format" in result.error


def test_a_missing_path_an_empty_folder_and_a_device_are_reported(bundle, images, tmp_path):
    from pathlib import Path

    (tmp_path / "empty").mkdir()
    results = list(run(bundle, tmp_path / "no", tmp_path / "empty", Path("/dev/null")))
    assert [r.path.name for r in results] == ["no", "empty", "null"]
    assert all(isinstance(r, Unreadable) for r in results)


def test_a_file_too_large_to_be_an_image_is_not_read(bundle, images, monkeypatch):
    monkeypatch.setattr(pictures, "_MAX_FILE_BYTES", 10)
    (result,) = run(bundle, images / "b.png")
    assert "may have 10 bytes" in result.error


def test_a_link_back_up_does_not_loop(bundle, images):
    (images / "sub" / "up").symlink_to(images)
    assert len(list(run(bundle, images))) == 3


def test_results_come_one_by_one(bundle, images):
    first = next(iter(run(bundle, *itertools.repeat(images / "b.png", 3))))
    assert first.top[0][0] == "red"


def test_a_model_whose_output_is_not_finite_stops_the_run(tmp_path, images):
    model = linear_onnx(np.full((3, 3), np.nan))
    bundle = write_small_bundle(tmp_path / "nan", **{"model.fp32.onnx": model})
    with pytest.raises(CheckFailedError, match="must be finite"):
        list(run(bundle, images))


def test_missing_pillow_is_not_blamed_on_the_images(bundle, images, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(BadInputError, match=r"edgereg\[image\]"):
        list(run(bundle, images))
