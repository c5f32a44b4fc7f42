import io
import json

import numpy as np
import PIL.Image
import pytest

from deploy.runtime.decode import encode_png
from edgereg.data.arrays import ArrayImages
from edgereg.data.check import MAX_NEAR, check_images
from edgereg.data.folder import Folder
from edgereg.data.images import digest
from edgereg.errors import DataError

RNG = np.random.default_rng(0)
A, B, C, D, E = RNG.integers(0, 256, (5, 6, 9, 3), dtype=np.uint8)


def bmp(image):
    buffer = io.BytesIO()
    PIL.Image.fromarray(image).save(buffer, format="BMP")
    return buffer.getvalue()


def fill(root, files):
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        data = content if isinstance(content, bytes) else encode_png(content)
        (root / name).write_bytes(data)
    return Folder(root)


CLEAN = {"cat/a.png": A, "cat/b.png": B, "dog/c.png": C, "dog/d.png": D}


def kinds(report):
    return {report.image_names[i]: finding.kind for i, finding in report.findings.items()}


def test_a_clean_data_set_has_no_findings(tmp_path):
    images = fill(tmp_path, CLEAN)
    report = check_images(images, against=[fill(tmp_path / "held", {"x/e.png": E})])
    assert report.findings == {} == report.quarantined
    assert report.digest == digest(images) and len(report.hashes) == 4
    assert report.class_counts == {"cat": (2, 2), "dog": (2, 2)} and report.imbalance == 1
    assert report.sizes == {(9, 6): 4} and report.modes == {"RGB": 4}
    assert "set aside: 0 of 4" in report.to_text()


def test_each_kind_of_bad_image_is_found_and_named(tmp_path):
    files = (
        CLEAN
        | {
            "cat/a2.bmp": bmp(A),  # other bytes, same pixels
            "cat/a3.png": A,
            "dog/cut.png": encode_png(B)[:-60],
            "dog/empty.png": b"",
            "gnu/c2.png": C,
            "gnu/e.png": E,
            "gnu/ok.png": E[::-1],
        }
    )
    images = fill(tmp_path / "train", files)
    report = check_images(images, against=[fill(tmp_path / "test", {"cow/moo.png": E})])
    assert kinds(report) == {
        "cat/a2.bmp": "duplicate",
        "cat/a3.png": "duplicate",
        "dog/c.png": "contradictory",
        "dog/cut.png": "undecodable",
        "dog/empty.png": "undecodable",
        "gnu/c2.png": "contradictory",
        "gnu/e.png": "leaked",
    }
    reasons = {report.image_names[i]: reason for i, reason in report.quarantined.items()}
    assert reasons["gnu/e.png"].endswith("cow/moo.png of test")
    assert reasons["dog/c.png"].endswith("gnu/c2.png is gnu")
    assert reasons["gnu/c2.png"].endswith("dog/c.png is dog")
    assert reasons["dog/cut.png"].startswith("cannot be decoded: ")
    assert report.class_counts == {"cat": (4, 2), "dog": (4, 1), "gnu": (3, 1)}
    assert report.imbalance == 2 and report.digest == digest(images)


def test_the_first_of_equal_images_is_kept(tmp_path):
    report = check_images(fill(tmp_path, {"1.png": A, "2.bmp": bmp(A), "3.png": B, "4.png": A}))
    assert list(report.quarantined.values()) == ["the same as an earlier image: 1.png"] * 2
    assert list(report.findings) == [1, 3] and report.class_counts == {}


def test_all_copies_of_a_leaked_image_are_set_aside_and_the_test_set_is_not_judged(tmp_path):
    images = fill(tmp_path / "train", {"x/1.png": A, "x/2.png": A, "y/3.png": B})
    held_out = fill(tmp_path / "test", {"y/1.png": A, "y/2.png": A})
    assert kinds(check_images(images, against=[held_out])) == {
        "x/1.png": "leaked",
        "x/2.png": "leaked",
    }


def test_pixels_in_another_shape_or_one_level_off_are_no_duplicates(tmp_path):
    near_by = A.copy()
    near_by[0, 0, 0] ^= 1
    assert not check_images(fill(tmp_path, {"1.png": A, "2.png": near_by})).findings
    assert not check_images(
        fill(tmp_path / "t", {"1.png": A, "2.png": A.reshape(9, 6, 3)})
    ).findings


def test_undecodable_images_of_the_test_set_are_reported(tmp_path):
    images = fill(tmp_path / "train", CLEAN)
    report = check_images(images, against=[fill(tmp_path / "test", {"x.png": b"", "y.png": E})])
    assert report.unreadable_against == {"test": 1}
    assert "1 images of test cannot be decoded, and were not looked for" in report.to_text()


def test_arrays_are_checked_too():
    pixels = np.stack([A, B, A, C])
    images = ArrayImages(pixels, name="x", labels=np.array([0, 1, 0, 1]), class_names=("a", "b"))
    report = check_images(images)
    assert report.quarantined == {2: "the same as an earlier image: 0"}
    grey = ArrayImages(pixels[:, :, :, 0], name="x", labels=None, class_names=())
    assert check_images(grey).modes == {"L": 4}


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_find_the_same(tmp_path, workers):
    files = {f"{n:03}.png": np.full((4, 4, 3), n % 60, np.uint8) for n in range(80)}
    images = fill(tmp_path, files | {"999.png": b""})
    told = []
    alone = check_images(images, near=1)
    assert check_images(images, near=1, workers=workers, progress=told.append) == alone
    assert len(alone.findings) == 21 and told == list(range(1, 82))


def test_copies_that_were_compressed_or_scaled_are_near_and_never_set_aside(tmp_path):
    rough = RNG.integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    pictures = [
        PIL.Image.fromarray(x).resize((96, 80), PIL.Image.Resampling.BICUBIC) for x in rough
    ]
    jpeg = io.BytesIO()
    pictures[0].save(jpeg, format="JPEG", quality=60)
    files = {f"{n}.png": np.asarray(picture) for n, picture in enumerate(pictures)} | {
        "0 again.png": np.asarray(pictures[0]),
        "0 jpeg.jpg": jpeg.getvalue(),
        "0 small.png": np.asarray(pictures[0].resize((60, 50))),
    }
    report = check_images(fill(tmp_path, files), near=3)
    assert list(report.quarantined.values()) == ["the same as an earlier image: 0 again.png"]
    pairs = [{report.image_names[i], report.image_names[j]} for i, j, _ in report.near]
    copies = {"0 again.png", "0 jpeg.jpg", "0 small.png"}
    assert len(pairs) == 3 and set.union(*pairs) == copies
    assert "3 pairs look alike" in report.to_text()
    assert check_images(Folder(tmp_path)).near is None


@pytest.mark.parametrize("near", [-1, MAX_NEAR + 1])
def test_a_distance_outside_of_its_range_is_refused(near):
    images = ArrayImages(np.stack([A]), name="x", labels=None, class_names=())
    with pytest.raises(DataError, match=r"0 to 8 bits"):
        check_images(images, near=near)


def test_the_report_is_json_and_shows_the_first_of_many(tmp_path):
    files = {f"a/{n}.png": A for n in range(9)} | {"b/1.png": B, "c/1.png": b""}
    report = check_images(fill(tmp_path, files), near=0)
    found = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert found["counts"] == {"undecodable": 1, "contradictory": 0, "leaked": 0, "duplicate": 8}
    assert len(found["quarantined"]) == 9 and found["imbalance"] is None
    assert found["quarantined"][0] == {
        "index": 1, "image": "a/1.png", "kind": "duplicate", "why": "a/0.png",
    }  # fmt: skip
    assert found["classes"]["a"] == {"count": 9, "kept": 1}
    assert found["small_classes"] == ["a", "b", "c"] and found["near_duplicates"] == []
    text = report.to_text()
    assert text.count("  a/") == 5 and "and 3 more" in text
    assert "leaked: not looked for" in text and "a class is empty" in text
