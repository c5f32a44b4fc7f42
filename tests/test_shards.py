import io
import json
import tarfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deploy.errors import BadInputError
from deploy.runtime.decode import encode_png
from edgereg.data.images import digest, open_images
from edgereg.data.shards import Shards, expand
from edgereg.errors import DataError


def png(grey):
    return encode_png(np.full((3, 5, 3), grey, np.uint8))


def tar(members, format=tarfile.PAX_FORMAT):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def sample(key, grey, label):
    return [(f"{key}.png", png(grey)), (f"{key}.cls", str(label).encode())]


def write(folder, *shards, stem="data"):
    for number, members in enumerate(shards):
        content = members if isinstance(members, bytes) else tar(members)
        (folder / f"{stem}-{number:03}.tar").write_bytes(content)
    return f"shards:{folder}/{stem}-{{000..{len(shards) - 1:03}}}.tar"


FIRST = [*sample("a", 1, 0), *sample("b", 2, 1)]
SECOND = [*sample("c", 3, 1), *sample("d", 4, 0)]


def test_images_are_read_in_the_order_of_shards_and_members(tmp_path):
    images = open_images(write(tmp_path, FIRST, SECOND))
    assert images.name == "shards:data-{000..001}.tar" and len(images) == 4
    assert [int(images.load(i)[0, 0, 0]) for i in (3, 0, 2, 1)] == [4, 1, 3, 2]
    assert images.load(0).shape == (3, 5, 3)
    assert images.labels.tolist() == [0, 1, 1, 0] and images.labels.dtype == np.int64
    assert images.class_names == ("0", "1") and images.shards.tolist() == [0, 0, 1, 1]
    assert images.encoded(2) == images.content(2) == png(3)
    assert images.image_name(2) == "data-001.tar:c.png"


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_each_format_of_tar_is_read(tmp_path, format):
    names = ["short/a", "x" * 80 + "/b"] + ["é" * 120 + "/c"] * (format != tarfile.USTAR_FORMAT)
    members = [m for n, name in enumerate(names) for m in sample(name, n, n)]
    images = open_images(write(tmp_path, tar(members, format)))
    assert [int(images.load(i)[0, 0, 0]) for i in range(len(names))] == list(range(len(names)))


def test_labels_are_read_from_json_and_names_become_classes(tmp_path):
    members = [
        ("1.jpg", png(0)),
        ("1.json", json.dumps({"label": "dog", "licence": "CC0"}).encode()),
        ("2.WEBP", png(0)),
        ("2.cls", b"cat\n"),
        ("deep/2.png", png(0)),
        ("deep/2.cls", b"dog"),
        ("deep/2.json", b'{"caption": "a dog"}'),
    ]
    images = open_images(write(tmp_path, members))
    assert images.class_names == ("cat", "dog") and images.labels.tolist() == [1, 0, 1]


@pytest.mark.parametrize("labels", [(2, 0, 1), ("gnu", "cat", "dog")])
def test_a_labels_file_beside_the_shards_names_the_classes(tmp_path, labels):
    (tmp_path / "labels.txt").write_text("cat\ndog\ngnu\n")
    members = [m for key, label in zip("abc", labels, strict=True) for m in sample(key, 0, label)]
    images = open_images(write(tmp_path, members))
    assert images.class_names == ("cat", "dog", "gnu") and images.labels.tolist() == [2, 0, 1]


def test_shards_without_any_label_have_none(tmp_path):
    images = open_images(write(tmp_path, [("a.png", png(0)), ("a.json", b'{"url": ""}')]))
    assert images.labels is None and images.class_names == () and len(images) == 1


def test_other_members_are_passed_over(tmp_path):
    extra = [
        ("README.md", b"x"),
        ("a.txt", b"a caption"),
        ("__index__.json", b"{}"),
        ("._a.png", b""),
    ]
    images = open_images(write(tmp_path, [*extra, *FIRST]))
    assert len(images) == 2


@pytest.mark.parametrize(
    ("members", "match"),
    [
        (FIRST[:3], r"data-000\.tar:b\.png has no label, and others have numbers"),
        ([*FIRST, ("x.cls", b"1")], r"one image; found: 'data-000\.tar', key x: a label and no"),
        ([*FIRST, ("a.png", png(9))], r"key a: a\.png and a\.png"),
        ([*FIRST, ("a.jpg", png(9))], r"key a: a\.png and a\.jpg"),
        ([*FIRST, ("a.cls", b"0")], r"one label; found: .*a\.cls twice"),
        ([*FIRST, *sample("x", 0, "cat")], r"x\.png has the label 'cat', and others have numbers"),
        ([*FIRST, *sample("x", 0, 3)], r"every class .* none of class 2"),
        ([*FIRST, *sample("x", 0, 10**15)], r"every class .* none of class 2"),
        ([*FIRST, *sample("x", 0, -1)], r"-1 to 1"),
        ([*FIRST, *sample("x", 0, "")], r"x\.cls holds '', no number and no name"),
        ([*FIRST, ("x.png", png(0)), ("x.json", b'{"label": [1]}')], r"x\.json holds \[1\]"),
        ([*FIRST, ("x.png", png(0)), ("x.json", b'{"label": true}')], r"x\.json holds True"),
        ([*FIRST, ("x.png", png(0)), ("x.json", b'{"label": 1')], r"x\.json: Expecting"),
        ([*FIRST, ("x.png", png(0)), ("x.cls", b"\xff")], r"x\.cls: 'utf-8'"),
        ([("x.png", png(0)), ("x.json", b'{"label": %d}' % 10**30)], r"no 64 bits hold"),
        ([("x.txt", b"")], r"needs images; found: no \.bmp"),
    ],
)
def test_what_cannot_be_trained_on_is_named(tmp_path, members, match):
    with pytest.raises(DataError, match=match):
        open_images(write(tmp_path, members))


def test_a_label_that_is_not_in_the_labels_file_is_named(tmp_path):
    (tmp_path / "labels.txt").write_text("cat\n")
    with pytest.raises(DataError, match=r"the label 'dog' of data-000\.tar:b\.png"):
        open_images(write(tmp_path, [*sample("a", 0, "cat"), *sample("b", 0, "dog")]))


def test_a_shard_that_is_cut_off_anywhere_is_refused(tmp_path):
    whole = tar(SECOND)
    end = max(at for at in range(len(whole)) if whole[at]) // 512 * 512 + 512
    for length in {*range(0, end + 1, 512), *range(100, end, 700), end + 511}:
        pattern = write(tmp_path, FIRST, whole[:length])
        with pytest.raises(DataError, match=r"data-001\.tar"):
            open_images(pattern)
    # from one block of zeros on, the end is marked
    assert len(open_images(write(tmp_path, FIRST, whole[: end + 512]))) == 4


def test_where_a_shard_is_cut_off_is_said(tmp_path):
    whole = tar(FIRST)
    with pytest.raises(DataError, match=r"cut off there|end of data.*after b\.png"):
        open_images(write(tmp_path, whole[: whole.index(b"b.cls")]))


def test_a_damaged_header_in_the_middle_is_not_taken_for_the_end(tmp_path):
    whole = bytearray(tar(FIRST))
    whole[whole.index(b"b.png") + 2] ^= 1
    with pytest.raises(DataError, match=r"no end mark after a\.cls"):
        open_images(write(tmp_path, bytes(whole)))


def test_joined_and_compressed_shards_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"goes on after its end mark"):
        open_images(write(tmp_path, tar(FIRST) + tar(SECOND)))
    with tarfile.open(tmp_path / "data-000.tar", "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("a.png"))
    with pytest.raises(DataError, match=r"whole, uncompressed tar"):
        open_images(f"shards:{tmp_path}/data-000.tar")


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.integers(0, 10_000), st.integers(1, 255))
def test_a_flipped_byte_is_refused_or_hurts_no_other_image(tmp_path_factory, at, flip):
    folder = tmp_path_factory.mktemp("flip")
    whole = bytearray(tar([*FIRST, *SECOND]))
    whole[at % len(whole)] ^= flip
    try:
        images = open_images(write(folder, bytes(whole)))
    except DataError:
        return
    wrong = 0
    for index in range(len(images)):
        try:
            wrong += images.load(index)[0, 0, 0] not in range(1, 5)
        except BadInputError:
            wrong += 1
    assert wrong <= 1 and len(images) == 4


def test_a_damaged_image_is_named_when_it_is_decoded(tmp_path):
    members = [*FIRST, ("x.png", b"no image"), ("x.cls", b"0")]
    images = open_images(write(tmp_path, members))
    assert len(digest(images)) == 64
    with pytest.raises(BadInputError, match=r"data-000\.tar:x\.png"):
        images.load(2)


def test_a_shard_that_shrinks_later_is_noticed(tmp_path):
    images = open_images(write(tmp_path, FIRST))
    (tmp_path / "data-000.tar").write_bytes(tar(FIRST)[:1600])
    with pytest.raises(DataError, match=r"it ends in b\.png"):
        images.load(1)


def test_the_digest_is_over_images_and_labels_and_not_over_the_shards(tmp_path):
    (tmp_path / "other").mkdir()
    one = digest(open_images(write(tmp_path, FIRST, SECOND)))
    joined = digest(open_images(write(tmp_path / "other", FIRST + SECOND)))
    moved = [*FIRST, *sample("c", 3, 0), SECOND[2], SECOND[3]]
    assert one == joined != digest(open_images(write(tmp_path / "other", moved)))


def test_a_pattern_is_expanded_in_the_order_of_its_braces(tmp_path):
    for name in ("a-08", "a-09", "a-10", "b-08", "b-09", "b-10", "c-1"):
        (tmp_path / f"{name}.tar").touch()

    def names(pattern):
        return [path.stem for path in expand(f"{tmp_path}/{pattern}")]

    assert names("{b,a}-{08..10}.tar") == ["b-08", "b-09", "b-10", "a-08", "a-09", "a-10"]
    assert names("*-*9.tar") == ["a-09", "b-09"]
    assert names("c-1.tar") == ["c-1"]


@pytest.mark.parametrize(
    ("pattern", "match"),
    [
        ("a-{08..09}.tar", r"no file '.*a-09\.tar'"),
        ("b-*.tar", r"no file '.*b-\*\.tar'"),
        ("a-{09..08}.tar", r"counts upwards; found: \{09\.\.08\}"),
        ("a-{08,08}.tar", r"names .*a-08\.tar twice"),
        ("{a-08,a-*}.tar", r"names .*a-08\.tar twice"),
        ("", r"no file"),
    ],
)
def test_a_wrong_pattern_is_refused(tmp_path, pattern, match):
    (tmp_path / "a-08.tar").touch()
    with pytest.raises(DataError, match=match):
        Shards(f"{tmp_path}/{pattern}" if pattern else "")
